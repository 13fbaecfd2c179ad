"""Makes the recordings beside this file again, by flite (a Debian package): PYTHONPATH=. python
tests/words/make.py"""

from pathlib import Path

import soundfile

from training import domain
from training.data import UNHEARD_VOICE
from training.synthesis import RATE, Manner, synthesize

HERE = Path(__file__).parent


def main() -> None:
    for name in ("sentences", "questions"):
        for text in (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            wav = synthesize(domain.spoken(text), Manner(UNHEARD_VOICE)).wav
            soundfile.write(HERE / f"{text.replace(' ', '_')}.flac", wav.numpy(), RATE, "PCM_16")


if __name__ == "__main__":
    main()
