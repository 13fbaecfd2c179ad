"""Values that are not finite, end to end on the Triton kernels, as on a GPU: the host sees tokens
alone, graphs replay, and slots that held NaN serve again."""

from typing import Any

import pytest
from broken import broken_lm, prompt
from replays import repeated
from replies import GREEDILY, drawn
from torch import Tensor

from mimo_fast import LM, MimoAudio, NumericError
from mimo_fast.kernels import decode_attention
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.kernels.matmul import launch
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.runtime.engine.engine import Engine, Reply
from mimo_fast.runtime.lm.decode import Limits
from mimo_fast.runtime.lm.graphs import Graphs
from mimo_fast.runtime.lm.state import DecodeState

GROUPS = 4


@pytest.fixture(autouse=True)
def taller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs, of which the interpreter does some hundred a second."""
    monkeypatch.setattr(launch, "gemv_block_n", lambda *args: 64)
    monkeypatch.setattr(decode_attention, "SPLITS", ((10**9, 4),))


def engine_of(lm: LM, slots: int) -> Engine:
    engine = Engine(lm, slots, 16)
    engine.decoder.graphs = Graphs(lm, engine.state, repeated)
    engine.decoder.check_codes = False
    return engine


def start(engine: Engine, model: MimoAudio, groups: slice) -> Reply:
    assert use_triton(engine.state.hidden)
    sequence, size = engine.sequence(1), model.lm.config.group_size
    sequence.add(prompt(model)[:, groups.start * size : groups.stop * size])
    return engine.start(sequence, Limits(GROUPS), GREEDILY, ahead=None)


def test_a_lost_row_leaves_its_neighbour_and_its_slot_alone(model: MimoAudio) -> None:
    """The row of an embedding that only one of the prompts has is NaN."""
    lm = broken_lm(model, "model.embed_tokens.weight")
    alone = drawn(list(start(engine_of(lm, 1), model, slice(2, 4))))
    engine = engine_of(lm, 2)
    lost, sane = (start(engine, model, part) for part in (slice(0, 4), slice(2, 4)))
    with pytest.raises(NumericError, match=r"model\.embed_tokens\.weight holds 1 NaN"):
        next(lost)
    slot = lost._request.sequence.slot
    assert drawn(list(sane)) == alone
    again = [start(engine, model, slice(2, 4)) for _ in range(2)]
    assert [drawn(list(reply)) for reply in again] == [alone, alone]
    assert slot in {reply._request.sequence.slot for reply in again}


def test_codes_that_the_host_does_not_see_show_in_the_next_group(
    model: MimoAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "local_transformer_lm_heads.5.weight"
    draw = LM.sample_text

    def speaking(lm: LM, state: DecodeState, slots: Tensor, *settings: Any) -> Tensor:
        text = draw(lm, state, slots, *settings)
        text = text.where(text == NOT_FINITE, lm.empty_id)
        state.text[slots] = text
        return text

    monkeypatch.setattr(LM, "sample_text", speaking)
    reply = start(engine_of(broken_lm(model, name), 1), model, slice(2, 4))
    codes = next(reply).codes
    assert (codes[5] == NOT_FINITE).all()
    assert (codes[:5] >= 0).all()
    with pytest.raises(NumericError, match=f"codes of group 1 of the reply .*{name} holds 1 NaN"):
        next(reply)
