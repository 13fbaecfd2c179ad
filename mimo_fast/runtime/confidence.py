"""Whether a reply to a recording can be relied on, where a checkpoint states how to tell.

A small model that was trained on a closed domain answers anything with words of its domain. What
tells is how sure it was of them, and how well its codec's codes describe the recording:

    confidence = sigmoid(bias + a entropy + b surprise + c loss)

    entropy     mean entropy, in nats, of the distributions that the reply's text tokens come from
    surprise    log(1 + s), s the sum of -log p of these tokens: what a long reply repeats adds
                nothing to it, and what it was unsure of is not averaged away
    loss        log of the share of the encoder output's energy that the codes lose

Probabilities are those of the whole vocabulary, whatever sampler drew the tokens. They come from
one teacher-forced pass over the prompt of this turn and its reply: as much arithmetic as the
prefill again, and none in the loop or its graphs. Who trains a checkpoint calibrates the numbers
(`LMConfig.confidence`); without them nothing is computed.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from mimo_fast.config import Calibration
from mimo_fast.modes import in_own_modes
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.teacher_forcing import hidden_states

LEAST_LOSS = 1e-6
"""A smaller loss counts as this one: digital silence may lose nothing."""


@dataclass(frozen=True)
class Confidence:
    """How far a reply can be relied on.

    Attributes:
        value: From 0 to 1; on speech like that of the calibration near 1.
        warning: A sentence for the user where it is below the checkpoint's bound, else None.
    """

    value: float
    warning: str | None


@in_own_modes
def evidence(lm: LM, ids: Tensor, reply: int) -> tuple[float, float]:
    """`entropy` and `surprise` of the text in the last `reply` groups of ids [C + 1, T G].

    Groups of speech are no text. (0, 0) without any.
    """
    config = lm.config
    text = ids[0, :: config.group_size].to(lm.device)
    codes = ids[1:].unflatten(1, (-1, config.group_size)).transpose(0, 1).to(lm.device)
    hidden = hidden_states(lm, text[None], codes[None])[0, len(text) - reply - 1 : -1]
    drawn = text[len(text) - reply :]
    written = drawn != lm.empty_id
    if not bool(written.any()):
        return 0.0, 0.0
    logs = lm.text_logits(hidden[written]).float().log_softmax(-1)
    entropy = -(logs.exp() * logs).nan_to_num().sum(-1).mean()
    surprise = -logs.gather(1, drawn[written, None]).sum()
    return float(entropy), math.log1p(max(float(surprise), 0.0))


def assess(calibration: Calibration, entropy: float, surprise: float, share: float) -> Confidence:
    """The confidence that a calibration gives to evidence and to the share that codes lose."""
    loss = math.log(max(share, LEAST_LOSS))
    score = calibration.bias + calibration.entropy * entropy
    score += calibration.surprise * surprise + calibration.loss * loss
    # Beyond these bounds exp overflows, and nothing changes.
    value = 1 / (1 + math.exp(-min(max(score, -50.0), 50.0)))
    if not value < calibration.warns_below:
        return Confidence(value, None)
    problem = "the recording is unlike the speech and the sentences that this model was trained on"
    return Confidence(value, f"{problem}: do not rely on the reply (confidence {value:.2f})")


def confidence_of(lm: LM, reply: Reply) -> Confidence | None:
    """The confidence of a reply of which all has been taken; None where nothing is known."""
    heard = reply.sequence.heard
    if heard is None or not reply.taken:
        return None
    begin, hearing = heard
    ids = reply.sequence.ids[:, begin * lm.config.group_size :]
    found = evidence(lm.variant(reply.sequence.adapter), ids, reply.taken)
    return assess(hearing.calibration, *found, float(hearing.loss))
