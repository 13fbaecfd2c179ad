"""Merges a LoRA adapter that PEFT saved into a checkpoint of upstream's form.

    python examples/adapters.py MODEL ADAPTER TARGET
    mimo-fast tts "It works." -o out.wav --model TARGET

For a weight W [out, in] with A [r, in] and B [out, r]: W + alpha / r B A, computed in float32. It
takes adapters of linear layers and replaced tensors (`modules_to_save`), and refuses other kinds.
Where upstream's model and PEFT are in memory already, `peft_model.merge_and_unload()` and then
`mimo_fast.accelerate(model)` do the same.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

UNKNOWN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


def merged(weights: dict[str, Tensor], adapter: dict[str, Tensor], scale: float) -> Iterable[str]:
    """Merges in place -> names of the adapter's tensors that were used."""
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        pair = [f"{module}.lora_{side}.weight" for side in "AB"]
        if name in adapter:
            weights[name] = adapter[name].to(weight.dtype)
            yield name
        elif pair[0] in adapter:
            a, b = (adapter[side].float() for side in pair)
            weights[name] = (weight.float() + scale * (b @ a)).to(weight.dtype)
            yield from pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of the language model")
    parser.add_argument("adapter", type=Path, help="directory that PEFT's save_pretrained wrote")
    parser.add_argument("target", type=Path, help="new directory")
    args = parser.parse_args()
    config = json.loads((args.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    other = [f"{key} {config[key]!r}" for key in UNKNOWN if config.get(key)]
    if (kind := config.get("peft_type")) != "LORA":
        other.append(f"peft_type {kind!r}")
    if (bias := config.get("bias", "none")) != "none":
        other.append(f"bias {bias!r}")
    if other:
        raise SystemExit(f"{args.adapter}: only plain LoRA is merged here, not {other[0]}")
    adapter = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(args.adapter / "adapter_model.safetensors").items()
    }

    args.target.mkdir(parents=True)
    found, scale = set[str](), config["lora_alpha"] / config["r"]
    for path in args.model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, args.target / path.name)
            continue
        weights = load_file(path)
        found.update(merged(weights, adapter, scale))
        save_file(weights, args.target / path.name, metadata={"format": "pt"})
    if unused := sorted(adapter.keys() - found):
        shutil.rmtree(args.target)
        raise SystemExit(f"{args.model} has no weights for {unused[0]} and {len(unused) - 1} more")
    print(f"wrote {args.target}: {len(found)} tensors of {args.adapter} are merged")


if __name__ == "__main__":
    main()
