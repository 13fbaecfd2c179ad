"""Makes the recordings beside this file again, by flite (a Debian package): PYTHONPATH=. python
tests/foreign/make.py

Sentences of which nano knows few words, in the voice of tests/words, which it was not trained on.
"""

import subprocess
from pathlib import Path

import soundfile

from mimo_fast.audio.files import load_audio
from training.data import UNHEARD_VOICE

HERE = Path(__file__).parent
RATE = 16_000
SENTENCES = {
    "publish": "The committee will publish its annual report before the end of the fiscal year.",
    "pianist": "The pianist performed a difficult sonata without looking at the score.",
    "glacier": "The glacier has retreated by several kilometers since records began.",
}


def main() -> None:
    for name, text in SENTENCES.items():
        wav = HERE / f"{name}.wav"
        subprocess.run(["flite", "-voice", UNHEARD_VOICE, "-t", text, "-o", str(wav)], check=True)
        soundfile.write(HERE / f"{name}.flac", load_audio(wav, RATE).numpy(), RATE, "PCM_16")
        wav.unlink()


if __name__ == "__main__":
    main()
