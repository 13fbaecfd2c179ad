"""A fine-tune's adapter, as PEFT saved it: beside the model, or merged into a new checkpoint.

    python examples/adapters.py MODEL ADAPTER [--codec DIR] [--text TEXT] [--target DIR]

MODEL is the directory or the hub id of the language model that ADAPTER was trained on; LoRA, DoRA
and saved modules are taken. The question is answered with the adapter and without it: a request
chooses. TARGET is a checkpoint like any other, with the adapter merged: `mimo_fast.load(TARGET)`.
Where upstream's model and PEFT are in memory already, `peft_model.merge_and_unload()` and then
`mimo_fast.accelerate(model)` do the same.
"""

import argparse
from pathlib import Path

import mimo_fast
from mimo_fast.checkpoint.embedded import resolve_pair
from mimo_fast.checkpoint.files import find_checkpoint
from mimo_fast.runtime.merging import merge_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory or hub id of the language model")
    parser.add_argument("adapter", type=Path, help="directory that PEFT's save_pretrained wrote")
    parser.add_argument("--codec", help="directory or hub id")
    parser.add_argument("--text", default="What is three plus four?", help="what to ask")
    parser.add_argument("--target", type=Path, help="new directory for the merged checkpoint")
    args = parser.parse_args()
    named = {"tuned": args.adapter}
    with mimo_fast.load(args.model, args.codec, adapters=named, merge_adapters=False) as model:
        for adapter in (None, "tuned"):
            said = model.text_dialogue_sft(args.text, seed=0, max_new_tokens=64, adapter=adapter)
            print(f"{adapter or 'as it is'}: {said}")
    if args.target:
        source = find_checkpoint(resolve_pair(args.model, args.codec)[0])
        changed = merge_adapter(source, args.adapter, args.target)
        print(f"wrote {args.target}: {changed} tensors are changed by {args.adapter}")


if __name__ == "__main__":
    main()
