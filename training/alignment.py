"""Which word of a reply each of its patches speaks, by the language model's own ear: the best path of its CTC term.

Text to speech must find in the text what comes next. Sounds alone tell that rarely, so the training names it: see
`lm.following`. A path gives for each word the patch after which it has been heard.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from .data import joined, piece, save_whole

AT_ONCE = 32
Scores = Callable[[str, Sequence[int]], list[tuple[Tensor, list[int]]]]
"""Part and utterances -> for each the log-probabilities [T, V] of its patches and the end, and its words."""


class Alignments:
    """Of every utterance of some parts, made once by a model and kept in a file."""

    def __init__(self, path: Path, sizes: dict[str, int], scores: Scores, blank: int) -> None:
        if not path.exists():
            save_whole(path, _make(sizes, scores, blank))
        self._found = load_file(path)

    def get(self, part: str, index: int) -> Tensor:
        """The place of the word that each patch speaks, int64 [patches]."""
        return piece(self._found, part, index).long()


@torch.no_grad()
def _make(sizes: dict[str, int], scores: Scores, blank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with tqdm(total=sum(sizes.values()), desc="alignment", unit="utterance") as bar:
        for part, size in sizes.items():
            places = []
            for start in range(0, size, AT_ONCE):
                indices = range(start, min(start + AT_ONCE, size))
                places += [spoken_words(best_path(rows, words, blank), len(rows) - 1, len(words))
                           for rows, words in scores(part, indices)]  # fmt: skip
                bar.update(len(indices))
            found |= joined(part, places)
    return found


def best_path(scores: Tensor, words: Sequence[int], blank: int) -> list[int]:
    """Log-probabilities [T, V] -> the position at which each word is first emitted on the likeliest CTC path.

    Where T is too short for the words, they are spread over it evenly.
    """
    length, count = len(scores), len(words)
    repeats = sum(a == b for a, b in pairwise(words))
    if count + repeats > length:
        return [i * length // count for i in range(count)]
    labels = [blank] * (2 * count + 1)
    labels[1::2] = words
    emitted = scores[:, labels]
    skips = torch.tensor([i > 1 and label not in (blank, labels[i - 2]) for i, label in enumerate(labels)])
    best = torch.full((len(labels),), -torch.inf)
    best[:2] = emitted[0, :2]
    came = []
    for row in emitted[1:]:
        stay, step = best, torch.cat((best.new_full((1,), -torch.inf), best[:-1]))
        skip = torch.cat((best.new_full((2,), -torch.inf), best[:-2])).where(skips, best.new_tensor(-torch.inf))
        best, origin = torch.stack((stay, step, skip)).max(0)
        best = best + row
        came.append(origin)
    state = len(labels) - 1 if best[-1] > best[-2] else len(labels) - 2
    path = [state]
    for origin in reversed(came):
        state -= int(origin[state])
        path.append(state)
    path.reverse()
    return [path.index(2 * i + 1) for i in range(count)]


def spoken_words(heard: Sequence[int], patches: int, count: int) -> Tensor:
    """Positions at which words were heard -> the place of the word that each patch speaks, int16 [patches].

    A word is heard when it is over, or later: the patch at which it is heard already counts as the next one's.
    """
    ends = torch.tensor(heard)
    places = (ends[None] <= torch.arange(patches)[:, None]).sum(1)
    return places.clamp(max=max(count - 1, 0)).to(torch.int16)
