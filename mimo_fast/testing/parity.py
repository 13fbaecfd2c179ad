"""Compares every stage of the pipeline with ground truth, on this machine.

Ground truth has the parity kit's form (tests/golden/README.md), or is that of the codec as upstream
ships it, with rounded rotary frequencies: `codec.safetensors` alone, codes and waveforms.

Bounds are the numeric contract: codes, prompts and greedy tokens exactly; log-mel 1e-4; embeddings,
logits and hidden states 1e-3 of their largest value; waveforms 80 dB. Streams are at most 0.5 dB
farther from one-shot decoding than upstream's where a young stream is decoded again. Where it is
not, nothing tells the norm statistics of what is to come: such streams have been 15 dB above and
15 dB below upstream's, and their bound finds what is broken, not what is a little farther.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.mel import log_mel
from mimo_fast.config import ROPE_FREQUENCIES
from mimo_fast.errors import CheckpointError
from mimo_fast.generation import generate
from mimo_fast.json_files import shown
from mimo_fast.kernels.sample import filter_scores
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.codec.geometry import LOOKAHEAD
from mimo_fast.runtime.codec.state import RESTART_LIMIT
from mimo_fast.sampling import GREEDY, MiMoSampler, sampler_tensors

LOG_MEL_BOUND = 1e-4
FFT_ROUNDING = 1e-6
"""Relative to a frame's largest magnitude: 8 units in the last place of float32."""

STREAM_NOISE = -100.0, -50.0
"""Noise in dB below which streams, decoded again or not, do not differ from one-shot decoding.

Upstream's last call decodes all codes of a short utterance, whose noise then is 0.
"""

Errors = Iterator[tuple[str, float]]
"""(golden tensor, error) pairs."""

Compare = Callable[[MimoAudio, "Golden"], Errors]


@dataclass(frozen=True)
class Result:
    """One stage: its largest error, the golden tensor it occurred in, and the error's bound."""

    stage: str
    error: float
    bound: float
    unit: str
    worst: str
    compared: int

    @property
    def ok(self) -> bool:
        return self.compared > 0 and self.error <= self.bound


FILES = ("codec", "prompts", "model")

AUDIO_SUFFIXES = (".wav", ".flac")

COMMON_RATE = 24000
"""Sample rate at which the lengths of recordings are compared."""


class Golden:
    """Ground truth of one checkpoint, and which of its tensors have been compared.

    Args:
        directory: a folder with golden.json, or its parent; or one with codec.safetensors alone,
            the ground truth of the codec as shipped.
        checkpoint: the folder beside which recordings are looked for last.

    Attributes:
        shipped: whether it holds nothing but the codec as shipped.
        rope_frequencies: "exact" or "bfloat16", what the truth was computed with: what golden.json
            states by that name, "exact" where it does not.
    """

    def __init__(self, directory: Path, checkpoint: Path | None = None) -> None:
        folders = (directory, directory / "golden")
        folder = next((d for d in folders if (d / "golden.json").is_file()), None)
        self.shipped = folder is None
        if folder is None:
            folder = next((d for d in folders if _is_codec_alone(d)), None)
        if folder is None:
            raise CheckpointError(
                f"no golden.json in {' or '.join(map(str, folders))}: not a parity kit"
            )
        places = [folder / "audio", folder.parent / "audio"]
        if checkpoint is not None:
            places.append(checkpoint.absolute().parent / "audio")
        audio = next((d for d in places if d.is_dir()), None)
        if audio is None:
            raise CheckpointError(
                f"no audio folder in {folder} or beside it: not a whole parity kit"
            )
        try:
            self.tensors = {
                f"{file}:{name}": tensor
                for file in (FILES[:1] if self.shipped else FILES)
                for name, tensor in load_file(folder / f"{file}.safetensors").items()
            }
            self.meta: dict[str, Any]
            if self.shipped:
                names = _ordered_recordings(audio, self.tensors)
                self.meta = {"audio": names, "prompts": {}, "rope_frequencies": "bfloat16"}
            else:
                self.meta = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
            self.audio = [audio / name for name in self.meta["audio"]]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"the parity kit in {folder} cannot be read: {error}") from error
        self.rope_frequencies: str = self.meta.get("rope_frequencies", "exact")
        if self.rope_frequencies not in ROPE_FREQUENCIES:
            raise CheckpointError(
                f"{folder / 'golden.json'}: 'rope_frequencies' must be "
                f"{' or '.join(ROPE_FREQUENCIES)}, not {shown(self.rope_frequencies)}"
            )
        self.compared: set[str] = set()

    @property
    def stages(self) -> "Mapping[str, Stage]":
        return STAGES

    def named(self, prefix: str) -> list[str]:
        """Suffixes of the tensors called prefix.suffix, "codec:mel" -> ["0", "1", "2"]."""
        names = (name for name in self.tensors if name.startswith(f"{prefix}."))
        return sorted(name.removeprefix(f"{prefix}.") for name in names)

    def get(self, name: str) -> Tensor:
        self.compared.add(name)
        return self.tensors[name]


def _is_codec_alone(folder: Path) -> bool:
    """Whether it holds the codec's file of a parity kit, and not the others."""
    found = [name for name in FILES if (folder / f"{name}.safetensors").is_file()]
    return found == ["codec"]


def _ordered_recordings(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Names of a folder's recordings in the order of the codes, which their lengths tell.

    Raises:
        ValueError: there are more or fewer of them than waveforms.
    """
    named = sorted(path for path in folder.iterdir() if path.suffix in AUDIO_SUFFIXES)
    counts = [tensors[f"codec:codes.{i}"].shape[1] for i in range(len(named))]
    if sum(name.startswith("codec:wav_dec8.") for name in tensors) != len(named):
        raise ValueError(f"{folder} holds {len(named)} recordings, not those of its waveforms")
    shortest = sorted(named, key=lambda path: len(load_audio(path, COMMON_RATE)))
    places = sorted(range(len(named)), key=counts.__getitem__)
    ordered = dict(zip(places, shortest, strict=True))
    return [ordered[i].name for i in range(len(named))]


class Truth(Protocol):
    """Ground truth of any form, with the stages that it is compared in."""

    shipped: bool
    rope_frequencies: str
    compared: set[str]

    @property
    def stages(self) -> "Mapping[str, Stage]": ...


def verify(model: MimoAudio, golden: Truth) -> Iterator[Result]:
    """Runs the stages one after the other; those of the codec alone where there is no more.

    The model's codec must have the rotary frequencies of `golden.rope_frequencies`.
    """
    for stage, (compare, bound, unit) in golden.stages.items():
        errors = list(compare(model, golden))
        if golden.shipped and not errors:
            continue
        # NaN must win the maximum.
        nothing = ("nothing to compare", 0.0)
        worst, error = max(errors, key=lambda pair: (pair[1] != pair[1], pair[1]), default=nothing)
        yield Result(stage, error, bound, unit, worst.partition(":")[2] or worst, len(errors))


def _max_abs(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return torch.inf
    return (got.cpu().double() - want.double()).abs().max().item() if want.numel() else 0.0


def relative(got: Tensor, want: Tensor) -> float:
    return _max_abs(got, want) / max(want.double().abs().max().item(), 1e-30)


def differing(got: Tensor, want: Tensor) -> float:
    return torch.inf if got.shape != want.shape else float((got.cpu() != want).sum())


def _noise_db(got: Tensor, want: Tensor) -> float:
    """Noise relative to the signal in dB: minus the SNR."""
    if got.shape != want.shape:
        return torch.inf
    noise = (got.cpu().double() - want.double()).square().sum()
    if noise != 0:
        return (10 * torch.log10(noise / want.double().square().sum())).item()
    return -torch.inf


def _each(
    prefix: str,
    error: Callable[[Tensor, Tensor], float],
    compute: Callable[[MimoAudio, Golden, str], Tensor],
) -> Compare:
    """Compares `compute(model, golden, suffix)` with every golden tensor prefix.suffix."""

    def compare(model: MimoAudio, golden: Golden) -> Errors:
        for suffix in golden.named(prefix):
            name = f"{prefix}.{suffix}"
            yield name, error(compute(model, golden, suffix), golden.get(name))

    return compare


def _wav(model: MimoAudio, golden: Golden, i: str) -> Tensor:
    return load_audio(golden.audio[int(i)], model.codec.sample_rate)


def _joined(model: MimoAudio, golden: Golden, i: str) -> Tensor:
    """What codes.i of the shipped codec were made from.

    Beyond the recordings it is all of them in turn, again and again, cut at a whole frame.
    """
    if int(i) < len(golden.audio):
        return _wav(model, golden, i)
    recordings = torch.cat([_wav(model, golden, str(j)) for j in range(len(golden.audio))])
    # A waveform that ends with a frame has one frame more.
    frames = golden.get(f"codec:codes.{i}").shape[1] - 1
    samples = frames * model.codec.config.samples_per_frame
    return recordings.repeat(-(-samples // len(recordings)))[:samples]


def _mel(model: MimoAudio, golden: Golden, i: str) -> Tensor:
    return log_mel(_wav(model, golden, i).to(model.device), model.codec.config)


def _log_error(got: Tensor, want: Tensor) -> float:
    """Largest difference of log-mels [T, n_mels] that the FFT's rounding does not explain.

    Float32 FFTs of different libraries and instruction sets disagree by a few units in the last
    place of a frame's largest magnitude; the logarithm amplifies that in bands far below it. A
    difference of FFT_ROUNDING of that magnitude counts as LOG_MEL_BOUND, a smaller one as less.
    """
    if got.shape != want.shape:
        return torch.inf
    got, want = got.cpu().double(), want.double()
    magnitudes, wanted = got.exp(), want.exp()
    of_peak = (magnitudes - wanted).abs() / wanted.amax(-1, keepdim=True)
    return torch.minimum((got - want).abs(), of_peak / FFT_ROUNDING * LOG_MEL_BOUND).max().item()


def _encoder(model: MimoAudio, golden: Golden, i: str) -> Tensor:
    return model.codec.encode_mel(golden.get(f"codec:mel.{i}").to(model.device))


def _encoded(model: MimoAudio, golden: Golden, i: str) -> Tensor:
    return model.codec.encode(_joined(model, golden, i))


def _quantized(model: MimoAudio, golden: Golden, i: str) -> Tensor:
    return model.codec.quantize(golden.get(f"codec:enc_hidden.{i}").to(model.device))


def _codes(model: MimoAudio, golden: Golden) -> Errors:
    # The shipped codec's truth has no hidden states.
    hidden = golden.named("codec:enc_hidden")
    for compute in (_encoded, _quantized) if hidden else (_encoded,):
        yield from _each("codec:codes", differing, compute)(model, golden)


def _packed(model: MimoAudio, golden: Golden, i: str) -> Tensor:
    return model.preprocess_input(str(golden.audio[int(i)]))


def _dequantize(model: MimoAudio, golden: Golden, i: str) -> Tensor:
    return model.codec.dequantize(golden.get(f"codec:codes.{i}")[: model.audio_channels])


def _decoder(model: MimoAudio, golden: Golden) -> Errors:
    for name, count in (("wav_dec8", model.audio_channels), ("wav_decall", None)):
        for i in golden.named(f"codec:{name}"):
            wav = model.codec.decode(golden.get(f"codec:codes.{i}")[:count])
            yield f"codec:{name}.{i}", _noise_db(wav, golden.get(f"codec:{name}.{i}"))
    if "codec:stream_codes" in golden.tensors:
        oneshot = model.codec.decode(golden.get("codec:stream_codes"))
        yield "codec:stream_oneshot", _noise_db(oneshot, golden.get("codec:stream_oneshot"))


def _stream(again: int, floor: float) -> Compare:
    """Decibels that a stream is farther from one-shot decoding than upstream's own stream is.

    again: of `Codec.stream`; floor: noise in dB that counts as none.
    """

    def compare(model: MimoAudio, golden: Golden) -> Errors:
        for size in golden.named("codec:stream_wav"):
            # Neither equals it, because of the norms over time.
            oneshot = golden.get("codec:stream_oneshot")
            *chunks, last = golden.get("codec:stream_codes").split(int(size), dim=1)
            # Upstream's waits as long, whatever statistics the checkpoint states.
            stream = model.codec.stream(LOOKAHEAD, again=again)
            wav = torch.cat([*(stream.push(chunk) for chunk in chunks), stream.finish(last)])
            if len(wav) != int(golden.get(f"codec:stream_lens.{size}").sum()):
                yield f"codec:stream_lens.{size}", torch.inf
            upstream = golden.get(f"codec:stream_wav.{size}")
            # NaN must stay.
            ours, theirs = (
                floor if noise < floor else noise
                for noise in (_noise_db(each, oneshot) for each in (wav, upstream))
            )
            yield f"codec:stream_wav.{size}", ours - theirs

    return compare


def _prompts(model: MimoAudio, golden: Golden) -> Errors:
    for name in sorted(golden.meta["prompts"]):
        ids = golden_prompt(model, golden.meta["prompts"][name], golden.audio)
        yield f"prompts:{name}", differing(ids, golden.get(f"prompts:{name}"))


def golden_prompt(model: MimoAudio, call: dict[str, Any], audio: list[Path]) -> Tensor:
    """The prompt that an entry of golden.json asks for, with the first template of its list."""
    given = dict(call)
    method, path = given.pop("method"), lambda key: str(audio[given.pop(key)])
    if "prompt_speech" in given:
        given["prompt_speech"] = path("prompt_speech")
    if method == "asr_sft":
        return model.get_asr_sft_prompt(path("audio"), template=0)
    if method == "tts_sft":
        return model.get_tts_sft_prompt(given.pop("text"), template=0, **given)
    if method == "audio_understanding_sft":
        return model.get_audio_understanding_sft_prompt(path("audio"), given.pop("text"), **given)
    if method == "in_context_learning_s2s":
        examples = [
            example | {key: str(audio[example[key]]) for key in ("input_audio", "output_audio")}
            for example in given["examples"]
        ]
        request = (given["instruction"], examples, path("audio"))
        return model.get_in_context_learning_s2s_prompt(*request)
    build = getattr(model, f"get_{method.replace('speech2text', 's2t')}_prompt")
    if "messages" in given:
        return build([_message(message, audio) for message in given.pop("messages")], **given)
    return build(given.pop("text") if "text" in given else path("audio"), **given)


def _message(message: dict[str, Any], audio: list[Path]) -> dict[str, Any]:
    """golden.json names audio by index; the task methods take upstream's message form."""
    if "content" in message:
        return message
    speech = str(audio[message["audio"]]) if "audio" in message else None
    both = {"text": message.get("text"), "audio": speech}
    content = both if None not in both.values() else speech or message["text"]
    return {"role": message["role"], "content": content}


def _prefilled(model: MimoAudio, golden: Golden, name: str) -> Tensor:
    ids = golden.get(f"prompts:{name}")
    state = model.lm.new_state([0], ids.shape[1] // model.group_size)
    model.lm.prefill(ids.long(), state, 0)
    return state.hidden[:1]


def _embeddings(model: MimoAudio, golden: Golden, name: str) -> Tensor:
    ids = golden.get(f"prompts:{name}").long().to(model.device)
    groups = ids.unflatten(1, (-1, model.group_size))
    return model.lm.embed(groups[0, :, 0], groups[1:].transpose(0, 1))


def _logits(model: MimoAudio, golden: Golden, name: str) -> Tensor:
    return model.lm.text_logits(_prefilled(model, golden, name))[0]


def _local_hidden(model: MimoAudio, golden: Golden, name: str) -> Tensor:
    return model.lm.local_hidden(_prefilled(model, golden, name))[0]


def _patch_decoder(model: MimoAudio, golden: Golden) -> Errors:
    if "model:local_in" not in golden.tensors:
        return
    local = golden.get("model:local_in").to(model.device, model.lm.dtype)
    state = model.lm.new_state([0] * len(local), 1)
    greedy = sampler_tensors([GREEDY] * len(local), model.device)
    codes = model.lm.decode_patch(local, state, state.rows[: len(local)], greedy)
    yield "model:local_greedy", differing(codes.transpose(1, 2), golden.get("model:local_greedy"))


def _sampler(model: MimoAudio, golden: Golden) -> Errors:
    for size in golden.named("model:sampler_logits"):
        logits = golden.get(f"model:sampler_logits.{size}")
        for j, setting in enumerate(golden.meta["sampler_settings"]):
            settings = sampler_tensors([MiMoSampler(True, **setting)] * len(logits), model.device)
            kept = filter_scores(logits.to(model.device), settings).cpu() > -torch.inf
            want = golden.get(f"model:sampler_kept.{size}.{j}").bool()
            # Upstream's sort keeps arbitrary ones of equal logits at the threshold: compare values,
            # not places.
            values = (
                logits.masked_fill(~mask, -torch.inf).sort(dim=-1).values for mask in (kept, want)
            )
            yield f"model:sampler_kept.{size}.{j}", differing(*values)


def _generate(model: MimoAudio, golden: Golden) -> Errors:
    for name in golden.named("model:generate"):
        want = golden.get(f"model:generate.{name}")
        groups = want.shape[1] // model.group_size
        ids = generate(model, golden.get(f"prompts:{name}").long(), max_new_tokens=groups)
        yield f"model:generate.{name}", differing(ids[:, -want.shape[1] :], want)


Stage = tuple[Callable[[MimoAudio, Any], Errors], float, str]
"""Comparison with ground truth of one form, bound on its error, unit of the error."""

STAGES: dict[str, Stage] = {
    "resample": (_each("codec:wav24k", _max_abs, _wav), 1e-5, "max abs"),
    "log-mel": (_each("codec:mel", _log_error, _mel), LOG_MEL_BOUND, "max abs"),
    "codec encoder": (_each("codec:enc_hidden", relative, _encoder), 1e-3, "of max"),
    "codes": (_codes, 0, "differ"),
    "packed codes": (_each("codec:packed", differing, _packed), 0, "differ"),
    "dequantize": (_each("codec:rvq_sum8", relative, _dequantize), 1e-3, "of max"),
    "codec decoder": (_decoder, -80, "dB noise"),
    "codec stream": (_stream(RESTART_LIMIT, STREAM_NOISE[0]), 0.5, "dB lost"),
    "decoded once": (_stream(0, STREAM_NOISE[1]), 20, "dB lost"),
    "prompts": (_prompts, 0, "differ"),
    "embeddings": (_each("model:embeds", relative, _embeddings), 1e-3, "of max"),
    "text logits": (_each("model:text_logits", relative, _logits), 1e-3, "of max"),
    "local hidden": (_each("model:local_hidden", relative, _local_hidden), 1e-3, "of max"),
    "patch decoder": (_patch_decoder, 0, "differ"),
    "sampler": (_sampler, 0, "differ"),
    "generate": (_generate, 0, "differ"),
}
