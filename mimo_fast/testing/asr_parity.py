"""Ground truth of MiMo-V2.5-ASR (tests/golden/asr/README.md), compared as `testing/parity.py` does.

waves -> codes -> prompts -> embeddings -> text logits -> greedy groups -> transcripts
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.errors import CheckpointError
from mimo_fast.generation import generate
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.testing.parity import Errors, Golden, Stage, Truth, differing, relative

FILE = "golden.safetensors"


class AsrGolden:
    """Ground truth of one checkpoint, and which of its tensors and texts have been compared.

    Args:
        directory: a folder with golden.json and golden.safetensors, in which, or in one of whose
            parents, the recording of golden.json lies.
        codec: the folder of the codec that is to be verified.
    """

    shipped, rope_frequencies = False, "exact"

    def __init__(self, directory: Path, codec: Path) -> None:
        try:
            self.meta: dict[str, Any] = json.loads(
                (directory / "golden.json").read_text(encoding="utf-8")
            )
            self.tensors = load_file(directory / FILE)
            name, wanted = self.meta["parity_audio"], self.meta["codec_sha256"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"the kit in {directory} cannot be read: {error}") from error
        places = [directory, *directory.absolute().parents]
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"no {name} in {directory} or above it: not a whole kit")
        weights = codec / "model.safetensors"
        if weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() != wanted:
            raise CheckpointError(
                f"{codec} is not the codec that {directory} was made with: name that by --codec"
            )
        self.recording, self.compared = found, set[str]()

    @property
    def stages(self) -> Mapping[str, Stage]:
        return ASR_STAGES

    def wave(self, name: str, sample_rate: int) -> Tensor:
        """A waveform [n] of `lengths`: the recording again and again, cut."""
        wav, samples = load_audio(self.recording, sample_rate), self.meta["lengths"][name]
        return wav.repeat(-(-samples // len(wav)))[:samples]

    def get(self, name: str) -> Tensor:
        self.compared.add(name)
        return self.tensors[name]


def open_golden(directory: Path, checkpoint: Path, codec: Path) -> Truth:
    """The ground truth in a folder, of whichever form; the checkpoint's folder and its codec's.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if (directory / FILE).is_file():
        return AsrGolden(directory, codec)
    return Golden(directory, checkpoint)


def _codes(model: MimoAudio, golden: AsrGolden) -> Errors:
    for name, groups in golden.meta["groups"].items():
        codes = model.speech(golden.wave(name, model.codec.sample_rate)).codes
        yield f"codes.{name}", differing(codes, golden.get(f"codes.{name}"))
        yield f"groups.{name}", abs(codes.shape[1] / model.group_size - groups)


def _prompts(model: MimoAudio, golden: AsrGolden) -> Errors:
    for name, asked in golden.meta["prompts"].items():
        wav = golden.wave(asked["audio"], model.codec.sample_rate)
        tag, template = asked["audio_tag"], asked["template"]
        ids = model.get_asr_sft_prompt(wav, audio_tag=tag, template=template)
        yield f"prompt.{name}", differing(ids, golden.get(f"prompt.{name}"))


def _embeddings(model: MimoAudio, golden: AsrGolden) -> Errors:
    for name in golden.meta["generated"]:
        ids = golden.get(f"prompt.{name}").long().to(model.device)
        groups = ids.unflatten(1, (-1, model.group_size))
        embedded = model.lm.embed(groups[0, :, 0], groups[1:].transpose(0, 1))
        yield f"embeds_sum.{name}", relative(embedded.sum(0), golden.get(f"embeds_sum.{name}"))


def _logits(model: MimoAudio, golden: AsrGolden) -> Errors:
    for name in golden.meta["generated"]:
        ids = golden.get(f"prompt.{name}").long()
        state = model.lm.new_state([0], ids.shape[1] // model.group_size)
        model.lm.prefill(ids, state, 0)
        logits = model.lm.text_logits(state.hidden[:1])[0]
        yield f"text_logits.{name}", relative(logits, golden.get(f"text_logits.{name}"))


def _generate(model: MimoAudio, golden: AsrGolden) -> Errors:
    for name, generated in golden.meta["generated"].items():
        want = golden.get(f"generate.{name}")
        groups = want.shape[1] // model.group_size
        ids = generate(model, golden.get(f"prompt.{name}").long(), max_new_tokens=groups)
        new = ids[:, -want.shape[1] :]
        yield f"generate.{name}", differing(new, want)
        yield f"generated.{name}", float(new[0, :: model.group_size].tolist() != generated["ids"])


def _texts(model: MimoAudio, golden: AsrGolden) -> Errors:
    prompt = golden.get("prompt.auto").long()

    def read(tokens: list[int]) -> str:
        reader = model.pipeline.reader(prompt, speaks=False, special_tokens=True)
        words = [reader.read(token, prompt[1:, : model.group_size])[0] for token in tokens]
        return "".join([*words, reader.finish()[0]]).strip()

    for name, generated in golden.meta["generated"].items():
        # Upstream takes the last group for that of the end.
        text = read(generated["ids"][:-1])
        yield f"returned.{name}", float(text != generated["returned"])
    for i, (raw, returned) in enumerate(golden.meta["postprocess"]):
        yield f"postprocess.{i}", float(read(model.tokenizer.encode(raw)) != returned)


ASR_STAGES: dict[str, Stage] = {
    "codes": (_codes, 0, "differ"),
    "prompts": (_prompts, 0, "differ"),
    "embeddings": (_embeddings, 1e-3, "of max"),
    "text logits": (_logits, 1e-3, "of max"),
    "generate": (_generate, 0, "differ"),
    "transcripts": (_texts, 0, "differ"),
}
"""Stages of `AsrGolden` by their names, in the order of the data."""
