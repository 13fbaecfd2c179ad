"""Transcribes all recordings of a folder, several at once.

    python examples/transcribe_folder.py FOLDER [--model DIR --codec DIR] [--streams 4] > words.tsv

Recordings are rows of one batch. One that cannot be read is named on standard error; the others go
on, and the exit code is 1 then.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import mimo_fast

SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="directory or hub id; by default nano")
    parser.add_argument("--codec", help="directory or hub id")
    parser.add_argument("--streams", type=int, default=4, help="recordings at once")
    args = parser.parse_args()
    paths = sorted(p for p in args.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{args.folder} holds no recordings ({', '.join(sorted(SUFFIXES))})")

    failed = 0
    with (
        mimo_fast.load(args.model, args.codec, max_batch=args.streams) as model,
        ThreadPoolExecutor(args.streams) as readers,
        tqdm(total=len(paths), unit="file", disable=None) as progress,
    ):

        def words(path: Path) -> str | mimo_fast.MimoFastError:
            try:
                return "".join(chunk.text for chunk in model.stream("asr", path)).strip()
            except mimo_fast.MimoFastError as error:
                return error
            finally:
                progress.update()

        for path, found in zip(paths, readers.map(words, paths), strict=True):
            if isinstance(found, str):
                print(path, found, sep="\t")
            else:
                failed += 1
                print(f"{path}: {found}", file=sys.stderr)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
