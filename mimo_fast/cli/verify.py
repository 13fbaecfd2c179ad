"""`mimo-fast verify`: every stage against ground truth, on this machine."""

import argparse

from mimo_fast.cli.reports import say
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.loading import find_device
from mimo_fast.testing.asr_parity import open_golden
from mimo_fast.testing.parity import verify


def run(args: argparse.Namespace) -> int:
    pair = args.checkpoint / "lm", args.codec or args.checkpoint / "codec"
    golden, dtype = open_golden(args.golden, args.checkpoint, pair[1]), args.dtype or "float32"
    rope = args.codec_rope or golden.rope_frequencies
    model = MimoAudio(*pair, find_device(args.device), dtype=dtype, codec_rope=rope)
    print(f"{'stage':<15}{'largest error':>14}{'bound':>10}  {'unit':<9} {'compared':>8}  worst")
    failed = []
    for result in verify(model, golden):
        verdict = "" if result.ok else "  FAILED"
        print(
            f"{result.stage:<15}{result.error:>14.3g}{result.bound:>10.3g}  {result.unit:<9} "
            f"{result.compared:>8}  {result.worst}{verdict}",
            flush=True,
        )
        if not result.ok:
            failed.append(result.stage)
    if failed:
        say(f"mimo-fast: verify failed at: {', '.join(failed)}")
        return 1
    count = len(golden.compared)
    of = f"{dtype}, {rope} rotary frequencies in the codec"
    say(f"all {count} golden tensors within bounds, on {model.device}, {of}")
    return 0
