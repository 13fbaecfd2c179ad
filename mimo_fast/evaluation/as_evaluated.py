"""MiMo-Audio-Eval's own runtime, where it differs from the released one (`models/mimo_audio.py`).

The models are the same, so are the codec and its weights; what surrounds them is not:

codec       recordings are encoded in segments of 3,000 mel frames (30 s, released: 6,000), replies
            decoded in segments of 750 frames of codes (released: 1,500), and not as a stream
asr         one wording a language, with a full stop (released: drawn of 22 without)
tts         one wording a language, with a full stop or a colon, before ": " (released: drawn of 10)
samplers    upstream's, whatever the checkpoint states (`greedy_tasks`)
dialogue    text at temperature 0.3 and codes at 0.7 (released: 0.6 and 0.9); a system turn even
            without a voice in it, then empty
thinking    "You can think about the question briefly and then answer it." behind the question:
            the sets say so themselves

docs/evaluation.md lists what is not reproduced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from copy import copy
from time import perf_counter
from typing import Any

import torch

from mimo_fast.evaluation.items import Item
from mimo_fast.mimo_audio import STREAM_OPTIONS, MimoAudio
from mimo_fast.runtime.codec.finite import checked_samples
from mimo_fast.runtime.engine.policy import Priority
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.request import FinishReason
from mimo_fast.runtime.engine.stream import Chunk, Timing
from mimo_fast.runtime.engine.voicing import ReplyReader
from mimo_fast.sampling import MiMoSampler, task_samplers
from mimo_fast.text.prompt import Segments
from mimo_fast.text.tasks import Task, find_task

ENCODE_SEGMENT, DECODE_SEGMENT = 3000, 750

DIALOGUE = {
    "global": MiMoSampler(do_sample=True, temperature=0.3, top_p=0.95),
    "local": MiMoSampler(do_sample=True, temperature=0.7, top_p=0.95),
}

ASR_WORDINGS = {
    "zh": "请将这段语音转换为文字.",
    "en": "Transcribe the following voice message.",
}

TTS_WORDINGS = {
    "zh": "请将这段文字转换为语音：",
    "en": "Please convert this text to speech.",
}


def wording(task: str, item: Item) -> Mapping[str, Any]:
    """The template that MiMo-Audio-Eval asks with; of other tasks than asr and tts none."""
    if find_task(task) is find_task("asr_sft"):
        return {"template": ASR_WORDINGS[item.truth.get("language", "zh")]}
    if find_task(task) is find_task("tts_sft") and item.arguments.get("read_text_only", True):
        chinese = re.search("[\u4e00-\u9fff]", item.arguments["input"])
        return {"template": TTS_WORDINGS["zh" if chinese else "en"]}
    return {}


class AsEvaluated(MimoAudio):
    """A model that answers as MiMo-Audio-Eval's runtime does; it shares the model's parts.

    The codec's segments are those of the model, too, from then on.
    """

    def __init__(self, model: MimoAudio) -> None:
        self.__dict__.update(copy(model).__dict__)
        self.task_sampler_configs = {**task_samplers(), "spoken_dialogue": DIALOGUE}
        self.codec.encode_segment, self.codec.decode_segment = ENCODE_SEGMENT, DECODE_SEGMENT

    def stream(self, task: str, *arguments: Any, **options: Any) -> Any:
        """`MimoAudio.stream`, without a history; a spoken reply has its audio in the last chunk."""
        spec, seed = find_task(task), options.pop("seed", None)
        how = {name: options.pop(name) for name in STREAM_OPTIONS & options.keys()}
        # As upstream, wordings and texts may hold special tokens.
        gathers = (rank := Priority.of(how.get("priority", "listener"))) is Priority.BATCH
        context = self.pipeline.context(seed, special_tokens=True, gathers=gathers)
        segments = _with_system_turn(spec, spec.prompt(context, *arguments, **options))
        prompt = self.pipeline.packed(segments, spec.sampler)
        self.engine.check_room(prompt.ids.shape[1] // self.group_size)
        sequence = self.pipeline.sequence(seed, how.get("adapter"))
        sequence.add(prompt)
        limits = how.get("max_new_tokens"), how.get("min_new_tokens", 0)
        ends = self._samplers(spec.sampler), spec.stop_ids(self.tokenizer.special)
        reply = self.pipeline.start(sequence, *ends, *limits, priority=rank)
        return self._chunks(reply, self.pipeline.reader(prompt.ids, spec.speaks), spec.speaks)

    def _chunks(self, reply: Reply, reader: ReplyReader, speaks: bool) -> Iterator[Chunk]:
        began, rate = perf_counter(), self.codec.sample_rate
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        patches, groups = list[torch.Tensor](), 0

        def chunk(audio: torch.Tensor, text: str, reason: FinishReason | None = None) -> Chunk:
            timing = Timing(perf_counter() - began, 0.0, None, groups, len(audio) / rate)
            return Chunk(audio, rate, text, timing, reason)

        with closing(reply):
            for group in reply:
                groups += 1
                if not group.finished:
                    text, spoken = reader.read(group.text, group.codes)
                    patches += spoken
                    yield chunk(nothing, text)
            text, spoken = reader.finish()
            patches += spoken
            audio = nothing
            if patches and speaks:
                codes = torch.cat(patches, dim=1)
                audio = checked_samples(self.codec, self.codec.decode(codes).cpu(), codes)
            yield chunk(audio, text, reply.finish_reason)


def _with_system_turn(task: Task, segments: Segments) -> Segments:
    """Segments of a spoken dialogue with the system turn that MiMo-Audio-Eval never leaves out."""
    spoken = task.speaks and task.sampler == "spoken_dialogue"
    if not spoken or segments[0] == "<|im_start|>system\n":
        return segments
    return ["<|im_start|>system\n", "<|im_end|>\n", *segments]
