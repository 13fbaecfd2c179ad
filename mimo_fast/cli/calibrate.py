"""`mimo-fast calibrate CODEC WAV ...`: measures what elastic streams begin with."""

import argparse

import torch
from tqdm import tqdm

from mimo_fast.checkpoint.embedded import resolve_pair
from mimo_fast.checkpoint.folder import write_json
from mimo_fast.cli.common import SAMPLE_RATE, load_recording
from mimo_fast.cli.process import written
from mimo_fast.cli.reports import say
from mimo_fast.config import CALIBRATION
from mimo_fast.runtime.loading import HubOptions, find, load_codec


def run(args: argparse.Namespace) -> int:
    recordings = [load_recording(audio) for audio in args.audio]
    hub: HubOptions = {
        "revision": args.revision,
        "cache_dir": args.cache_dir,
        "local_files_only": args.offline,
    }
    source = resolve_pair(None, args.codec)[1]
    codec, path = (
        load_codec(source, args.device, hub, args.codec_rope),
        find(source, hub) / CALIBRATION,
    )
    books = min(args.codebooks, len(codec.codebooks))
    bar = tqdm(recordings, desc="measuring", leave=False, disable=None)
    unpool, to_mel = codec.calibrate(codec.encode(wav, books) for wav in bar)
    moments = torch.stack([torch.stack(pair) for pair in (unpool or to_mel, to_mel)]).tolist()
    seconds = sum(map(len, recordings)) / SAMPLE_RATE
    about = {"recordings": len(recordings), "seconds": round(seconds, 2), "codebooks": books}
    write_json(path, {"streaming_moments": moments, "measured": about})
    written.append(str(path))
    say(
        f"wrote {path}: measured on {seconds:.1f} s of speech; streams with an elastic look-ahead "
        "begin with it"
    )
    return 0
