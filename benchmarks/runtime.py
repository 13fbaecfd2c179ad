"""One audio group and the steady state of speech at the published dimensions, beside what reading the weights takes.

    python -m benchmarks.runtime --quantization int4 --threads 2 -o benchmarks/results/DATE-runtime.json

Weights are random and made in place; every group is an audio group, the most expensive kind. The floor is the bytes of
weights and cache that one group must read, over the bandwidth that this machine reads with.
"""

import argparse
import json
import resource
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import mimo_fast
from benchmarks.synthetic import random_lm
from mimo_fast.config import LMConfig, read_json
from mimo_fast.kernels.qmatmul import Weight
from mimo_fast.kernels.quantized_weight import QuantizedWeight
from mimo_fast.machine import describe_machine
from mimo_fast.runtime.conversation import Conversation
from mimo_fast.runtime.decode import Limits, Samplers
from mimo_fast.runtime.engine import Engine
from mimo_fast.runtime.lm import LM
from mimo_fast.runtime.transformer import TransformerWeights
from mimo_fast.sampling import MiMoSampler

GROUP_SECONDS = 0.16
SPEECH = MiMoSampler(True, 0.9, top_p=0.95)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a sum over 2 GB, the best of five."""
    data = torch.zeros(2**28, dtype=torch.float64, device=device)
    times = [_timed(data.sum, device) for _ in range(5)]
    return data.numel() * 8 / min(times)


def group_bytes(lm: LM, positions: int) -> dict[str, int]:
    """Bytes that one audio group must read."""
    config = lm.config.backbone
    decoder, encoder = (stack_bytes(stack) for stack in (lm.patch_decoder, lm.patch_encoder))
    kv = 2 * config.layers * config.kv_heads * config.head_dim * lm.dtype.itemsize
    heads = lm.code_heads.nbytes * lm.config.group_size
    return {
        "backbone": stack_bytes(lm.backbone), "text head": weight_bytes(lm.text_head), "cache": kv * positions,
        "patch decoder": decoder * lm.config.patch_steps + heads,
        "patch encoder": encoder + weight_bytes(lm.patch_to_backbone) + weight_bytes(lm.backbone_to_patch),
    }


def stack_bytes(stack: TransformerWeights) -> int:
    return sum(weight_bytes(w) for layer in stack.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down))


def weight_bytes(weight: Weight | QuantizedWeight) -> int:
    return weight.nbytes


def _timed(work: Any, device: torch.device) -> float:
    began = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - began


def measure(lm: LM, prompt: int, groups: int, batch: int) -> dict[str, Any]:
    """Seconds of a prefill, and of each group of `batch` rows of speech."""
    device = lm.device
    engine = Engine(lm, batch, prompt + groups + 8)
    began = perf_counter()
    engine.warmup(progress=False)
    warmup = perf_counter() - began
    replies = []
    for row in range(batch):
        conversation = Conversation(engine, seed=row)
        ids = torch.full((lm.config.channels + 1, prompt * lm.config.group_size), 2)
        ids[1:] = lm.empty_codes.cpu()[:, None]
        conversation.ids = ids
        replies.append(engine.start(conversation, Limits(groups), Samplers(SPEECH, SPEECH), ahead=1))
    prefill = _timed(lambda: [reply.prefill() for reply in replies], device)
    times, spoken = [], 0
    for _ in range(groups):
        began = perf_counter()
        taken = [next(reply) for reply in replies]
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
        spoken += sum(group.text == lm.empty_id for group in taken)
    return {
        "batch": batch, "prompt": prompt, "prefill_s": prefill, "warmup_s": warmup, "audio_groups": spoken,
        "groups": groups * batch, "group_s": {"median": statistics.median(times[2:]), "min": min(times[2:]),
                                              "p90": sorted(times[2:])[int(0.9 * (len(times) - 2))]},
    }  # fmt: skip


def speak_only(lm: LM) -> None:
    """Random weights would mix words and speech: let every token be `<|empty|>`."""
    size = lm.config.vocab_size
    bias = torch.zeros(size, dtype=lm.dtype, device=lm.device)
    bias[lm.empty_id] = 1e4
    if isinstance(lm.text_head, QuantizedWeight):
        lm.text_head = replace(lm.text_head, bias=bias)
    else:
        lm.text_head = Weight.stack(lm.text_head.blocks, [bias])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=("7b", "tiny"))
    parser.add_argument("--quantization", default=None, choices=("int8", "int4", "nf4"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    bandwidth = read_bandwidth(device)
    print(f"reads {bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
    config = LMConfig.from_dict(read_json(Path(mimo_fast.__file__).parent / "presets" / f"{args.preset}-lm.json"))
    began = perf_counter()
    lm = random_lm(config, args.quantization, getattr(torch, args.dtype), device)
    speak_only(lm)
    print(f"made the weights in {perf_counter() - began:.0f} s", file=sys.stderr)
    needed = group_bytes(lm, args.prompt + args.groups // 2)
    floor = sum(needed.values()) / bandwidth
    print(f"a group reads {sum(needed.values()) / 1e9:.2f} GB: at least {1e3 * floor:.1f} ms", file=sys.stderr)
    rows = []
    for batch in args.batch:
        row = measure(lm, args.prompt, args.groups, batch)
        row["rtf"] = row["group_s"]["median"] / GROUP_SECONDS
        row["of_floor"] = floor / row["group_s"]["median"]
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    record = {
        "machine": [*describe_machine()], "arguments": {k: str(v) for k, v in vars(args).items()},
        "read_GB_per_s": bandwidth / 1e9, "bytes": needed, "floor_s": floor, "rows": rows,
        "peak_resident_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
