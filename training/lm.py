"""Training of the language model, in the two stages of the technical report.

    understanding   loss = 2 text + CTC, over tasks whose replies are text
    joint           loss = 2 text + CTC + phones + 2 codes, over all tasks; codes are the patch
                    decoder's 8 codebooks

The CTC term uses linear layers that are discarded after training. They read the words of a
recording from its keys and values that later positions attend to, and its phones from those of a
lower layer: a reply can copy words before the model has learned by itself what they sound like.
Another such layer reads the phones of a patch from the hidden state from which the patch is drawn:
phones teach how far a word has come and what follows much sooner than codes do.

Loss is taken on the groups of replies only. At most `MAX_PATCHES` of their patches a step go
through the patch decoder, whose 11 steps a patch would otherwise cost more than everything else.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.config import LMConfig
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.teacher_forcing import code_logits, hidden_states
from mimo_fast.text.tokenizer import Tokenizer

from . import parallel
from .codes import Codes
from .data import Sizes
from .examples import HEARING, JOINT, UNDERSTANDING, Batch, Example, Examples, Span, collate
from .loop import Losses, Run, Schedule
from .losses import ctc
from .parameters import (
    Tensors,
    build_lm,
    codebook_names,
    config_json,
    embed_codebooks,
    initial_lm,
    trainable,
)
from .synthesis import PHONES

NAME = "lm"
SCHEDULE = Schedule(steps=10300, rate=3e-3)
STAGES = ((0.08, UNDERSTANDING), (1.0, JOINT))
"""Share of the steps at which a stage ends, and the weights of its tasks."""

HEARING_SCHEDULE = Schedule(steps=4500, rate=5e-4)
HEARING_STAGES = ((1.0, HEARING),)
HEARING_SIZES = Sizes(
    speech=8000,
    replies=2000,
    readings=4000,
    strangers=3500,
    strange_words=800,
    strange_questions=400,
    spellings=1000,
    letters=2000,
)
"""Of `python -m training hearing`, which trains a pair further, to hear more. A pair has none of
the layers that only training has; new ones would drown what its text teaches.
"""

HEARING_SHARE = 0.75
"""Share of the trained weights in the pair that is written; the rest is what it began with."""

BATCH = 16
POOL = 8
"""Batches drawn at once and sorted by length, so that little of a batch is padding."""

MAX_PATCHES = 128

TEXT, CODES = 2.0, 2.0
CODE_WEIGHTS = (12, 8, 6, 4, 2, 2, 1, 1)
"""Weights of the codebooks' losses: the first ones carry the words."""

WRONG_SHARE, LOST_SHARE = 0.1, 0.06
"""Share of the codes that are replaced in the input, and of frames of recordings masked."""

CTC = 0.5
CTC_LAYERS = (2, 3)
"""Backbone layers whose keys and values tell the words; layers below recognise them."""

HEARING_LAYER = 1
"""Layer whose keys and values tell the phones, four slots a patch."""

VALIDATION = 32


Stages = Sequence[tuple[float, Mapping[str, int]]]


def lm_config() -> LMConfig:
    return LMConfig.from_dict(config_json("lm"))


class LMTraining:
    """The language model, its examples and its losses.

    Args:
        codec: the trained codec's tensors, whose codebooks initialize the code embeddings.
        helped: whether the layers that are discarded after training are there to help.
    """

    def __init__(
        self,
        directory: Path,
        codes: Mapping[str, Codes],
        tokenizer: Tokenizer,
        schedule: Schedule = SCHEDULE,
        seed: int = 0,
        device: str = "cpu",
        codec: Tensors | None = None,
        stages: Stages = STAGES,
        helped: bool = True,
    ) -> None:
        self.config = lm_config()
        initial = initial_tensors(self.config, seed)
        if codec is not None:
            names = codebook_names(self.config.channels)
            usage = [codec[f"{name}.cluster_size"] for name in names]
            embed_codebooks(initial, [codec[f"{name}.embed"] for name in names], usage)
        self.tensors = {name: tensor.to(device) for name, tensor in initial.items()}
        self.examples, self.special = Examples(codes, tokenizer, self.config), tokenizer.special
        self.seed, self.device, self._pool = seed, device, (-1, list[list[Example]]())
        self.codes, self.stages, self._helped = codes, stages, helped
        self.run = Run(directory, NAME, trainable(self.tensors), {}, schedule)

    def train(self) -> None:
        self.run.train(self.losses, self.validate)

    def model(self) -> LM:
        return build_lm(self.config, self.special.empty, self.tensors)

    def losses(self, step: int) -> Losses:
        """One batch forward."""
        batch = collate(self._examples_of(step), self.config, self.special.pad)
        generator = torch.Generator().manual_seed(parallel.seed_of(self.seed) * 1_000_003 + step)
        projections, states = list[Tensor](), list[Tensor]()
        fed = blurred(batch, self.config, generator)
        text, codes = batch_losses(self.model(), batch, generator, projections, states, fed)
        loss, shown = TEXT * text, {"text": text.detach()}
        if self._helped:
            heard = self.heard(projections, batch.spans)
            loss, shown = loss + CTC * heard, {**shown, "ctc": heard.detach()}
        if codes is None:
            return {"loss": loss, **shown}
        weights = torch.tensor(CODE_WEIGHTS, device=codes.device) / sum(CODE_WEIGHTS)
        if self._helped:
            phones = self.phones(states[0], batch.phones)
            loss, shown = loss + phones, {**shown, "phones": phones.detach()}
        loss = loss + CODES * (codes * weights).sum()
        shown |= {"codes": codes.detach().mean()}
        return {"loss": loss, **shown, "code_0": codes[0].detach()}

    def heard(self, projections: list[Tensor], spans: list[list[Span]]) -> Tensor:
        """Cross entropies of heard speech: of words per word, and of phones per phone."""
        flat = [(row, span) for row, each in enumerate(spans) for span in each if span.words]
        if not flat:
            return torch.zeros((), device=self.device)
        words, phones = [span.words for _, span in flat], [span.phones for _, span in flat]
        scores = self._read(f"phones_heard.{HEARING_LAYER}", projections, flat, len(PHONES) + 1)
        total = ctc(scores, phones, blank=len(PHONES))
        for layer in CTC_LAYERS:
            scores = self._read(f"ctc.{layer}", projections, flat, self.config.vocab_size)
            total = total + ctc(scores, words, blank=self.special.empty) / len(CTC_LAYERS)
        return total

    def _read(
        self, head: str, projections: list[Tensor], flat: list[tuple[int, Span]], classes: int
    ) -> list[Tensor]:
        """Log-probabilities of each span, [T k, classes], from a layer's keys and values."""
        layer, weight = int(head.rsplit(".", 1)[1]), self.tensors[f"{head}.weight"]
        seen, bias = projections[layer][..., -weight.shape[1] :], self.tensors[f"{head}.bias"]
        parts = (seen[row, span.start : span.stop] for row, span in flat)
        scores = (F.linear(part, weight, bias).view(-1, classes) for part in parts)
        return [each.log_softmax(-1) for each in scores]

    def phones(self, hidden: Tensor, phones: Tensor) -> Tensor:
        """Cross entropy of the phones [B, T, G] of replies' patches, from hidden [B, T, D]."""
        wanted = phones[:, 1:].to(self.device)
        known = wanted[..., 0] >= 0
        weight, bias = self.tensors["phones.weight"], self.tensors["phones.bias"]
        scores = F.linear(hidden[:, :-1][known], weight, bias)
        return F.cross_entropy(scores.view(-1, len(PHONES) + 1), wanted[known].flatten())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses on held-out sentences: transcribing an unheard voice, and reading text aloud."""
        count = min(VALIDATION, len(self.codes["unheard"]), len(self.codes["unsaid"]))
        heard = [self.examples.transcription("unheard", i) for i in range(count)]
        said = [self.examples.reading("unsaid", i) for i in range(count)]
        batches = (collate(each, self.config, self.special.pad) for each in (heard, said))
        model = self.model()
        (asr, _), (text, codes) = (batch_losses(model, each, None) for each in batches)
        found = {"asr": float(asr), "text": float(text)}
        if codes is None:
            return found
        return found | {"codes": float(codes.mean()), "code_0": float(codes[0])}

    def _examples_of(self, step: int) -> list[Example]:
        number = step // POOL
        if self._pool[0] != number:
            rng = random.Random(f"{parallel.seed_of(self.seed)}/lm/{number}")
            count = parallel.share(BATCH)
            share = step / self.run.schedule.steps
            tasks = next(weights for end, weights in self.stages if share < end)
            drawn = rng.choices([*tasks], [*tasks.values()], k=POOL * count)
            examples = sorted((self.examples.draw(task, rng) for task in drawn), key=len)
            batches = [examples[i : i + count] for i in range(0, len(examples), count)]
            rng.shuffle(batches)
            self._pool = (number, batches)
        return self._pool[1][step % POOL]


def initial_tensors(config: LMConfig, seed: int) -> Tensors:
    """Tensors of the model, and of the heads that only training needs, for words and phones."""
    seen = 2 * config.backbone.kv_heads * config.backbone.head_dim
    sizes = {f"ctc.{layer}": (config.vocab_size, seen) for layer in CTC_LAYERS}
    phones = (len(PHONES) + 1) * config.group_size
    sizes["phones"] = phones, config.backbone.dim
    sizes[f"phones_heard.{HEARING_LAYER}"] = phones, seen
    weights = {f"{name}.weight": torch.zeros(size) for name, size in sizes.items()}
    biases = {f"{name}.bias": torch.zeros(size[0]) for name, size in sizes.items()}
    return initial_lm(config, seed) | weights | biases


def blurred(batch: Batch, config: LMConfig, generator: torch.Generator) -> Tensor:
    """The batch's codes [B, T, C, G] with errors, as sampling makes them in replies.

    A synthesizer says the same words in the same codes. Without errors, they identify the recording
    and what comes next, so the text would be ignored, and the model would learn the input voices by
    heart. In half of the replies the finer codebooks are missing as well, and in recordings some
    frames.
    """
    count, _, channels, _ = batch.codes.shape
    wrong = torch.rand(batch.codes.shape, generator=generator) < WRONG_SHARE
    sizes = torch.tensor(config.empty_codes)[:, None]
    drawn = (torch.rand(batch.codes.shape, generator=generator) * sizes).long()
    kept = torch.randint(1, 2 * channels, (count, 1, 1, 1), generator=generator)
    missing = torch.arange(channels)[:, None] >= kept
    lost = torch.rand(batch.codes[:, :, :1].shape, generator=generator) < LOST_SHARE
    spoken, replies = batch.codes != sizes, batch.learned[:, :, None, None]
    codes = torch.where(spoken & wrong, drawn, batch.codes)
    return torch.where(spoken & torch.where(replies, missing, lost), sizes, codes)


def batch_losses(
    model: LM,
    batch: Batch,
    generator: torch.Generator | None,
    projections: list[Tensor] | None = None,
    states: list[Tensor] | None = None,
    fed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mean cross entropies of a batch's replies: of the text ids, and [C] of the codes.

    The latter is None where nothing is spoken. The mean over text ids is one of means over
    examples: a spoken reply has many groups with an obvious id, a transcript few, and each tells
    something.

    Args:
        generator: chooses the patches where there are more than `MAX_PATCHES`; None keeps all.
        projections: see `hidden_states`.
        states: collects what that returns.
        fed: the backbone's codes [B, T, C, G] in place of the batch's.
    """
    hidden = hidden_states(model, batch.text, batch.codes if fed is None else fed, projections)
    if states is not None:
        states.append(hidden)
    hidden = hidden[:, :-1]
    text, codes, learned = (
        x[:, 1:].to(model.device) for x in (batch.text, batch.codes, batch.learned)
    )
    logits = model.text_logits(hidden[learned]).float()
    each_text = F.cross_entropy(logits, text[learned], reduction="none")
    text_loss = _mean_of_means(each_text, learned)
    patches = (learned & (text == model.empty_id)).nonzero()
    if not len(patches):
        return text_loss, None
    if generator is not None and len(patches) > (most := parallel.share(MAX_PATCHES)):
        chosen = torch.randperm(len(patches), generator=generator)[:most]
        patches = patches[chosen.to(patches.device)]
    rows, columns = patches.T
    wanted = codes[rows, columns]
    scores = (x.flatten(0, 1).float() for x in code_logits(model, hidden[rows, columns], wanted))
    losses = [F.cross_entropy(x, wanted[:, c].flatten()) for c, x in enumerate(scores)]
    return text_loss, torch.stack(losses)


def _mean_of_means(losses: Tensor, learned: Tensor) -> Tensor:
    """Mean over rows of the mean losses [n] at the places that are set in learned [B, T]."""
    rows = learned.nonzero()[:, 0]
    counts = learned.sum(1)
    return (losses / counts[rows]).sum() / (counts > 0).sum()
