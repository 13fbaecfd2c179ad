"""Exports a run as a pair of checkpoints in the published form, for `mimo_fast.load`."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from mimo_fast.checkpoint.files import open_weights, write_checkpoint
from mimo_fast.checkpoint.layout import codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig
from mimo_fast.json_files import read_json

from . import codec, decoder, lm
from .data import Part
from .loop import trained_tensors
from .parameters import Tensors, build_codec, config_json
from .tokenizer import S2S_INSTRUCTIONS, build_tokenizer

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
UPSTREAM = {"tie_word_embeddings": False, "model_type": "mimo_audio"}
"""What upstream's code and transformers need in the language model's config.

transformers 5 gives every "qwen2" the tokenizer of Qwen2, whatever tokenizer.json says; a type that
it does not know keeps its own, and upstream's code reads any type.
"""

WINDOW = "decoder.vocoder.head.istft.window"
LEVEL = 0.33
"""Gain of the exported codec's output. Trained on spectra, it puts the harmonics of a voice in
phase: pulses of up to three times the recording's peaks, which files and sound cards would clip.
"""

GREEDY_TASKS = ("tts",)
"""Tasks that are greedy by default: so small a model often draws a wrong code."""

STATED = {
    "greedy_tasks": list(GREEDY_TASKS),
    "sentences_at_once": 1,
    "words_at_once": 12,
    "trained_tasks": [
        "asr_sft",
        "tts_sft",
        "tts_sft.instruct",
        "spoken_dialogue_sft",
        "speech2text_dialogue_sft",
        "in_context_learning_s2s",
    ],
    "example_instructions": {
        "voice": S2S_INSTRUCTIONS["echoes"],
        "answer": S2S_INSTRUCTIONS["questions"],
    },
}
"""What the language model's config states besides its dimensions, see `LMConfig`."""

MEASURED = 64
"""Utterances over which the norm statistics of the codec are averaged."""


def export(
    run: Path, target: Path, replies: Part, dtype: torch.dtype = torch.float16
) -> tuple[Path, Path]:
    """Writes TARGET/lm and TARGET/codec from a run's directory and returns their paths.

    replies: speech on which the codec's norm statistics are measured, for streaming.

    Raises:
        CheckpointError: one of the two was not trained, or the target holds weights already.
    """
    quieter = scaled(trained_tensors(run, decoder.NAME), LEVEL)
    return write_pair(target, trained_tensors(run, lm.NAME), quieter, replies, dtype)


def export_lm(run: Path, pair: Path, target: Path, share: float) -> None:
    """Writes a pair that differs from another in the language model's weights.

    share: of the run's weights in those that are written, the rest is the other pair's: the mean
        of what was there and what was trained from it keeps most of what both can (WiSE-FT,
        arXiv:2109.01903).

    Raises:
        CheckpointError: nothing was trained, or the target holds weights already.
    """
    trained, before = trained_tensors(run, lm.NAME), open_weights(pair / "lm")
    trained |= {HEAD: trained[EMBEDDINGS]}
    weights = shutil.ignore_patterns("*.safetensors*", "config.json")
    shutil.copytree(pair / "codec", target / "codec", dirs_exist_ok=True)
    shutil.copytree(pair / "lm", target / "lm", ignore=weights, dirs_exist_ok=True)
    raw = read_json(pair / "lm" / "config.json")
    shapes = lm_shapes(LMConfig.from_dict(raw))
    dtype = getattr(torch, raw["torch_dtype"])

    def mean(name: str) -> Tensor:
        return before.get(name, dtype=torch.float32).lerp(trained[name].float(), share)

    write_checkpoint(target / "lm", shapes, mean, dtype=dtype, config=raw)


def scaled(codec_tensors: Tensors, factor: float) -> Tensors:
    """The codec with its output scaled by `factor`.

    Overlapping frames are divided by their squared window, so the window is scaled; the bound on
    magnitudes before it stays as it was in training.
    """
    return codec_tensors | {WINDOW: codec_tensors[WINDOW] / factor}


def write_pair(
    target: Path, lm_tensors: Tensors, codec_tensors: Tensors, replies: Part, dtype: torch.dtype
) -> tuple[Path, Path]:
    """Writes both checkpoints from their tensors, without what only training needs.

    The text head is trained as one with the text embeddings and written twice: upstream's code has
    no tied head, and would draw one at random.
    """
    tokenizer = build_tokenizer(target / "lm")
    stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.special.eos)
    lm_raw = config_json("lm") | stored | ends | UPSTREAM | STATED
    lm_tensors = lm_tensors | {HEAD: lm_tensors[EMBEDDINGS]}
    moments = {"streaming_moments": typical_moments(codec_tensors, replies)}
    codec_raw = config_json("codec") | stored | moments
    for part, raw, shapes, tensors in (
        ("lm", lm_raw, lm_shapes(LMConfig.from_dict(lm_raw)), lm_tensors),
        ("codec", codec_raw, codec_shapes(CodecConfig.from_dict(codec_raw)), codec_tensors),
    ):
        write_checkpoint(target / part, shapes, tensors.__getitem__, dtype=dtype, config=raw)
    return target / "lm", target / "codec"


def typical_moments(tensors: Tensors, replies: Part) -> list[list[float]]:
    """Mean and variance of each of the codec's two norms over time, averaged over utterances."""
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    trained = build_codec(codec.codec_config(), detached)
    found = []
    for i in range(min(MEASURED, len(replies))):
        unpool, to_mel = trained.moments(trained.encode(replies[i].wav))
        found.append(torch.stack([*(unpool or to_mel), *to_mel]))
    return torch.stack(found).mean(0).view(2, 2).tolist()
