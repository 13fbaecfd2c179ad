"""Examples of every task: the package's own prompts, and the replies that should follow them.

    words     recordings of single words, each followed by the word: speech and text alternate as in
              pretraining
    asr       a recording -> its words
    spliced   recordings of single words, joined -> the words
    written   a spoken question -> its written answer
    tts       words -> their speech
    dialogue  a spoken question -> its spoken answer
    styled    words and a style -> speech in that style
    few_shot  examples of speech to speech -> one more

In a spoken reply the text of every word stands before the patch in which its sound begins. So the
text alone decides what is said next, and the last word and the sound so far decide how it sounds.
(Upstream's replies alternate five text tokens with five patches; so do the package's own examples
in prompts.)
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mimo_fast.config import LMConfig
from mimo_fast.text import tasks
from mimo_fast.text.context import PromptContext
from mimo_fast.text.prompt import Segments, Speech, SpokenReply, pack
from mimo_fast.text.tokenizer import Tokenizer

from . import domain
from .codes import Codes
from .data import answers
from .tokenizer import INSTRUCTIONS, S2S_INSTRUCTIONS

UNDERSTANDING = {"words": 2, "spliced": 3, "asr": 8, "written": 2}
"""Weights of the tasks in the first stage, whose replies are text."""

JOINT = {"words": 1, "spliced": 3, "asr": 9, "written": 1}
JOINT |= {"tts": 8, "styled": 4, "dialogue": 2, "few_shot": 1}
"""Weights in the second stage."""

HEARING = {"words": 1, "spliced": 4, "asr": 20, "written": 2}
HEARING |= {"tts": 6, "styled": 3, "dialogue": 3, "few_shot": 1}
"""Weights for a pair that is trained further, to hear more; what it says is kept in use."""

FEW = (1, 2)
"""Number of examples before the one to be done."""

WORDS = 6
"""Most single words in a row."""

SPLICED = 5
"""Most single words in one recording."""

STRANGE = {"speech": "strangers", "words": "strange_words", "questions": "strange_questions"}
STRANGE_SHARE = 0.4
"""Share of recordings by the speakers of the other synthesizer, where there are any."""

READ = {"replies": 3, "readings": 5, "spellings": 2}
"""Weights of the parts from which plain replies are drawn."""

ASKED = {"speech": 7, "letters": 1, "questions": 2, "echoes": 2}
"""Weights of the parts that are transcribed."""

COARSE_SHARE, COARSEST = 0.5, 2
"""Share of recordings given by their first codebooks only, which tell less of the voice."""


@dataclass(frozen=True)
class Heard(Speech):
    """A recording whose words and phones are known."""

    text: str = ""
    phones: Sequence[int] = ()


@dataclass(frozen=True)
class Span:
    """Groups start ... stop - 1 of an example, up to the end of speech: these ids are heard."""

    start: int
    stop: int
    words: list[int]
    phones: Sequence[int]


@dataclass(frozen=True)
class Example:
    """ids [C + 1, T G], which of the groups are learned, bool [T], and where words are heard.

    phones: of each frame of the reply, int64 [T, G], -1 elsewhere.
    """

    ids: Tensor
    learned: Tensor
    spans: list[Span]
    phones: Tensor

    def __len__(self) -> int:
        return len(self.learned)


@dataclass(frozen=True)
class Batch:
    """B examples, padded to T groups.

    text [B, T], codes [B, T, C, G], learned bool [B, T], spans of each, and phones [B, T, G].
    """

    text: Tensor
    codes: Tensor
    learned: Tensor
    spans: list[list[Span]]
    phones: Tensor


@dataclass(frozen=True)
class Said(SpokenReply):
    """A reply whose phones are known for each frame, int64 [n G]."""

    phones: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class Examples:
    """Draws examples from the encoded speech."""

    def __init__(self, codes: Mapping[str, Codes], tokenizer: Tokenizer, config: LMConfig) -> None:
        self._codes, self._tokenizer, self._config = codes, tokenizer, config
        self._answers = {text: place for place, text in enumerate(answers())}

    def draw(self, task: str, rng: random.Random) -> Example:
        """One example of a task."""
        if task == "words":
            return self._words(rng)
        return self._example(*getattr(self, f"_{task}")(rng))

    def transcription(self, part: str, index: int, template: int = 0) -> Example:
        """The transcription of one utterance."""
        codes = self._codes[part]
        speech = Heard(codes.get(index), text=codes.text(index), phones=codes.phones(index))
        request = tasks.asr(PromptContext(), speech, template=template)
        return self._example(request, [speech.text, "<|im_end|>"])

    def reading(
        self, part: str, index: int, template: int | None = 0, seed: int | None = None
    ) -> Example:
        """One utterance to be said in the plain style."""
        text = self._codes[part].text(index)
        request = tasks.tts(PromptContext(seed=seed), text, template=template)
        return self._example(request, [self._reply(part, index)])

    def _example(self, request: Segments, reply: Segments) -> Example:
        asked = pack(request, self._tokenizer, self._config)
        said = pack(reply, self._tokenizer, self._config)
        size = self._config.group_size
        if int(asked[0, -size]) == self._tokenizer.special.sostm == int(said[0, 0]):
            # The request opens the reply's speech already.
            said = said[:, size:]
        learned = torch.arange((asked.shape[1] + said.shape[1]) // size) >= asked.shape[1] // size
        ids = torch.cat((asked, said), dim=1)
        phones = torch.full((len(learned), size), -1)
        if isinstance(said_last := reply[-1], Said):
            spoken = learned & (ids[0, ::size] == self._tokenizer.special.empty)
            phones[spoken] = said_last.phones.view(-1, size)
        return Example(ids, learned, self._spans(request, asked[0, ::size]), phones)

    def _spans(self, request: Segments, text: Tensor) -> list[Span]:
        """Where the recordings of a request lie in its text channel [T]."""
        marks = self._tokenizer.special.sosp, self._tokenizer.special.eosp
        starts, stops = ((text == mark).nonzero()[:, 0] + 1 for mark in marks)
        heard = [segment for segment in request if isinstance(segment, Speech)]
        return [
            Span(start, stop, self._tokenizer.encode(each.text), each.phones)
            for each, start, stop in zip(heard, starts.tolist(), stops.tolist(), strict=True)
            if isinstance(each, Heard)
        ]

    def _words(self, rng: random.Random) -> Example:
        pairs, spans, start = list[Example](), list[Span](), 0
        for _ in range(WORDS):
            speech = self._recording("words", rng)
            pairs.append(self._example([speech], [speech.text, "\n"]))
            for each in pairs[-1].spans:
                spans.append(replace(each, start=each.start + start, stop=each.stop + start))
            start += len(pairs[-1])
        ids = torch.cat([each.ids for each in pairs], dim=1)
        learned = torch.cat([each.learned for each in pairs])
        return Example(ids, learned, spans, torch.cat([each.phones for each in pairs]))

    def _recording(self, part: str, rng: random.Random) -> Heard:
        """A recording of a part, sometimes without its finer codebooks."""
        strange = part in STRANGE and rng.random() < STRANGE_SHARE
        codes = self._codes[STRANGE[part] if strange else part]
        index = rng.randrange(len(codes))
        speech = codes.get(index, rng.randrange(codes.variants))
        if rng.random() < COARSE_SHARE:
            kept = rng.randrange(COARSEST, len(speech))
            speech = speech.clone()
            speech[kept:] = torch.tensor(self._config.empty_codes)[kept:, None]
        return Heard(speech, text=codes.text(index), phones=codes.phones(index))

    def _reply(self, part: str, index: int) -> Said:
        codes = self._codes[part]
        text, tokens = codes.text(index), list[int]()
        for word, place in zip(text.split(), codes.places(index), strict=True):
            tokens += [place] * len(self._tokenizer.encode(word))
        return Said(text, codes.get(index), tokens, codes.frame_phones(index))

    def _answer(self, text: str) -> SpokenReply:
        return self._reply("answers", self._answers[text])

    def _asr(self, rng: random.Random) -> tuple[Segments, Segments]:
        speech = self._recording(_weighted(ASKED, rng), rng)
        return tasks.asr(_drawn(rng), speech), [speech.text, "<|im_end|>"]

    def _spliced(self, rng: random.Random) -> tuple[Segments, Segments]:
        drawn = [self._recording("words", rng) for _ in range(rng.randint(1, SPLICED))]
        text = " ".join(each.text for each in drawn)
        phones = [phone for each in drawn for phone in each.phones]
        speech = Heard(torch.cat([each.codes for each in drawn], dim=1), text=text, phones=phones)
        return tasks.asr(_drawn(rng), speech), [text, "<|im_end|>"]

    def _written(self, rng: random.Random) -> tuple[Segments, Segments]:
        speech = self._recording("questions", rng)
        request = tasks.speech2text_dialogue(PromptContext(), speech)
        return request, [domain.dialogue()[speech.text], "<|im_end|>"]

    def _tts(self, rng: random.Random) -> tuple[Segments, Segments]:
        if (part := _weighted(READ, rng)) == "replies":
            return self._said(["normal"], rng)
        reply = self._reply(part, rng.randrange(len(self._codes[part])))
        return tasks.tts(_drawn(rng), reply.text), [reply]

    def _styled(self, rng: random.Random) -> tuple[Segments, Segments]:
        return self._said([*INSTRUCTIONS], rng)

    def _said(self, styles: Sequence[str], rng: random.Random) -> tuple[Segments, Segments]:
        codes = self._codes["replies"]
        while (style := codes.style(index := rng.randrange(len(codes)))) not in styles:
            continue
        reply, instruction = self._reply("replies", index), INSTRUCTIONS.get(style)
        request = tasks.tts(_drawn(rng), reply.text, instruction)
        return request, ["</think>\n", reply] if instruction else [reply]

    def _dialogue(self, rng: random.Random) -> tuple[Segments, Segments]:
        speech = self._recording("questions", rng)
        request = tasks.spoken_dialogue(PromptContext(), speech)
        return request, [self._answer(domain.dialogue()[speech.text])]

    def _few_shot(self, rng: random.Random) -> tuple[Segments, Segments]:
        part = rng.choice([*S2S_INSTRUCTIONS])

        def pair() -> tuple[Speech, SpokenReply]:
            speech = self._recording(part, rng)
            text = domain.dialogue()[speech.text] if part == "questions" else speech.text
            return speech, self._answer(text)

        examples, (speech, reply) = [pair() for _ in range(rng.choice(FEW))], pair()
        given = [
            {"input_audio": heard, "output_audio": Speech(said.codes)}
            | {"output_transcription": said.text}
            for heard, said in examples
        ]
        instruction = S2S_INSTRUCTIONS[part]
        request = tasks.in_context_learning_s2s(PromptContext(), instruction, given, speech)
        return request, [reply]


def _drawn(rng: random.Random) -> PromptContext:
    """A prompt with a randomly drawn wording."""
    return PromptContext(seed=rng.getrandbits(32))


def _weighted(weights: Mapping[str, int], rng: random.Random) -> str:
    return rng.choices([*weights], [*weights.values()])[0]


def collate(examples: Sequence[Example], config: LMConfig, pad: int) -> Batch:
    """Batches examples of any lengths."""
    size, longest = config.group_size, max(map(len, examples))
    text = torch.full((len(examples), longest), pad)
    codes = torch.tensor(config.empty_codes)[:, None].repeat(len(examples), longest, 1, size)
    learned = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, each in enumerate(examples):
        groups = each.ids.unflatten(1, (-1, size))
        text[row, : len(each)] = groups[0, :, 0]
        codes[row, : len(each)] = groups[1:].transpose(0, 1)
        learned[row, : len(each)] = each.learned
    phones = torch.nn.utils.rnn.pad_sequence([each.phones for each in examples], True, -1)
    return Batch(text, codes, learned, [each.spans for each in examples], phones)
