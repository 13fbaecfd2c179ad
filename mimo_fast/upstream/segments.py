"""Segments of a prompt that pack themselves (upstream's process_speechdata.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimo_fast.errors import PromptError
from mimo_fast.text.prompt import REPLY_PATCHES, REPLY_TEXT_TOKENS, TEXT_FILLER


class InputSegment:
    """Text, token ids [n], or codes, flattened [T C] as `MimoAudio.preprocess_input` returns them.

    Special tokens written in the text are tokens. Audio is put between `<|sosp|>` and `<|eosp|>`
    unless add_sosp_eosp is False.

    Raises:
        PromptError: there is neither text nor tokenized_text.
    """

    def __init__(
        self,
        text: str = "",
        audio: Tensor | None = None,
        tokenized_text: Tensor | None = None,
        speech_zeroemb_idx: int | Sequence[int] = 1024,
        text_zeroemb_idx: int = 152067,
        add_sosp_eosp: bool = True,
    ) -> None:
        _check_text(text, tokenized_text)
        self.text, self.audio, self.tokenized_text = text, audio, tokenized_text
        self.speech_zeroemb_idx, self.text_zeroemb_idx = speech_zeroemb_idx, text_zeroemb_idx
        self.add_sosp_eosp = add_sosp_eosp

    def to_input_id(self, tokenizer: Any, group_size: int, audio_channels: int = 8) -> Tensor:
        """Ids [C + 1, T G]: int32 of text, int64 of audio.

        Args:
            tokenizer: ours, or transformers'.

        Raises:
            PromptError: the codes are no whole groups.
        """
        empty = torch.tensor(self.speech_zeroemb_idx, dtype=torch.int32, device="cpu")
        empty = empty.expand(audio_channels)[:, None]
        if self.audio is None:
            words = _ids(tokenizer, self.text, self.tokenized_text)
            return _grouped(words, empty.expand(-1, len(words) * group_size), group_size)
        if self.audio.numel() % (audio_channels * group_size):
            problem = f"{self.audio.numel()} codes are no whole groups"
            raise PromptError(f"{problem} of {audio_channels} x {group_size}")
        codes = self.audio.reshape(-1, audio_channels).T.cpu()
        words = torch.full(
            (codes.shape[1] // group_size,), self.text_zeroemb_idx, dtype=torch.int32, device="cpu"
        )
        if self.add_sosp_eosp:
            bounds = [[tokenizer.convert_tokens_to_ids(f"<|{name}|>")] for name in ("sosp", "eosp")]
            first, last = torch.tensor(bounds, dtype=torch.int32, device="cpu")
            words, silent = torch.cat((first, words, last)), empty.expand(-1, group_size)
            codes = torch.cat((silent, codes, silent), dim=1)
        return _grouped(words, codes, group_size)


class StreamingInputSegment:
    """A spoken reply: text and codes in turn, between `<|sostm|>` and `<|eostm|>`.

    Arguments are those of `InputSegment`; the segment sizes count tokens and groups.
    """

    def __init__(
        self,
        text: str = "",
        audio: Tensor | None = None,
        tokenized_text: Tensor | None = None,
        speech_zeroemb_idx: int | Sequence[int] = 1024,
        text_zeroemb_idx: int = 152067,
        text_segment_size: int = REPLY_TEXT_TOKENS,
        audio_segment_size: int = REPLY_PATCHES,
        tokenizer: Any = None,
        group_size: int | None = None,
        audio_channels: int | None = None,
    ) -> None:
        _check_text(text, tokenized_text)
        self.text, self.audio, self.tokenized_text = text, audio, tokenized_text
        self.speech_zeroemb_idx, self.text_zeroemb_idx = speech_zeroemb_idx, text_zeroemb_idx
        self.text_segment_size, self.audio_segment_size = text_segment_size, audio_segment_size
        self.tokenizer, self.group_size, self.audio_channels = tokenizer, group_size, audio_channels

    def to_input_id(self, tokenizer: Any, group_size: int, audio_channels: int = 8) -> Tensor:
        """Ids [C + 1, T G] int64, see `InputSegment.to_input_id`."""
        if self.audio is None:
            raise PromptError("a spoken reply needs the codes of its audio")
        place = tokenizer, group_size, audio_channels
        fillers: dict[str, Any] = {"speech_zeroemb_idx": self.speech_zeroemb_idx}

        def text(**content: Any) -> Tensor:
            segment = InputSegment(**content, **fillers, text_zeroemb_idx=self.text_zeroemb_idx)
            return segment.to_input_id(*place)

        words = _ids(tokenizer, self.text, self.tokenized_text)
        texts = [*words.split(self.text_segment_size)] or [words]
        texts[-1] = torch.cat((texts[-1], _ids(tokenizer, "<|eot|>", None)))
        spoken = self.audio.split(self.audio_segment_size * group_size * audio_channels)
        parts = [text(text="<|sostm|>")]
        for i in range(max(len(texts), len(spoken))):
            if i < len(texts):
                parts.append(text(tokenized_text=texts[i]))
            if i < len(spoken):
                parts.append(text(audio=spoken[i], add_sosp_eosp=False))
        return torch.cat([*parts, text(text="<|eostm|>")], dim=1).long()


def _check_text(text: str | None, tokenized_text: Tensor | None) -> None:
    if text is None and tokenized_text is None:
        raise PromptError("a segment needs text or tokenized_text")


def _ids(tokenizer: Any, text: str, tokenized: Tensor | None) -> Tensor:
    """Token ids int32 [n]."""
    if tokenized is None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int32, device="cpu")
    return tokenized.to("cpu", torch.int32)


def _grouped(words: Tensor, codes: Tensor, group_size: int) -> Tensor:
    """Token ids [T] and codes [C, T G] -> ids [C + 1, T G]; the codes' dtype wins."""
    channel = torch.full((len(words), group_size), TEXT_FILLER, dtype=torch.int32, device="cpu")
    channel[:, 0] = words
    return torch.cat((channel.reshape(1, -1), codes))
