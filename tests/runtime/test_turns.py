"""A turn is encoded and prefilled without the host between: codes go from graph to graph."""

import copy
from pathlib import Path

import pytest
import torch
from dialogues import own_dialogue, same
from launch_counter import HostLaunches
from replays import Counted
from torch import Tensor

from mimo_fast import MimoAudio, NumericError, PromptError
from mimo_fast.audio.files import load_audio
from mimo_fast.runtime.codec.encoder_graphs import EncoderGraphs, PendingCodes
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.graphs import Capture, Graphs
from mimo_fast.sampling import GREEDY
from mimo_fast.text.prompt import PackedPrompt, PendingSpeech, fill_in

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6}
GROUP = 4


def graphed(
    model: MimoAudio, capture: Capture | None = None, prompts: bool = True, slots: int = 2
) -> MimoAudio:
    """A copy whose encoder and prompts run as stand-ins for graphs."""
    own = own_dialogue(model)
    capture = capture or Counted()
    pipeline = copy.copy(model.pipeline)
    own.pipeline = pipeline
    pipeline.codec = copy.copy(model.codec)
    pipeline.codec.encoder_graphs = EncoderGraphs(pipeline.codec, capture)
    engine = pipeline._engine = Engine(model.lm, slots, capacity=400)
    engine.decoder.graphs = Graphs(model.lm, engine.state, capture, prompts=prompts)
    own.task_sampler_configs = {"spoken_dialogue": {"global": GREEDY, "local": GREEDY}}
    return own


@pytest.fixture
def plain(greedy: MimoAudio) -> MimoAudio:
    return greedy


@pytest.fixture(scope="module")
def turns(audio: list[Path]) -> list[Tensor]:
    """Recordings of 5, 2.1 and 0.7 s."""
    wav = load_audio(audio[0], 24000)
    return [wav.repeat(9)[: round(24000 * seconds)] for seconds in (5, 2.1, 0.7)]


@pytest.mark.parametrize("voice", [False, True])
def test_a_dialogue_is_what_it_is_without_graphs(model, plain, turns, voice):
    given = turns[2] if voice else None
    ours, theirs = graphed(model), plain
    sessions = [each.session(voice=given, seed=3) for each in (ours, theirs)]
    for wav in turns:
        got, want = ([*each.stream(wav, **OPTIONS)] for each in sessions)
        assert same(got, want)
        assert torch.equal(*(each.ids for each in sessions))
    assert [turn.speech.tolist() for turn in sessions[0]._turns] == [
        turn.speech.tolist() for turn in sessions[1]._turns
    ]


@pytest.mark.parametrize("task", ["asr", "spoken_dialogue", "speech_continuation"])
def test_tasks_are_what_they_are_without_graphs(model, plain, turns, task):
    found = [[*each.stream(task, turns[1], seed=1, **OPTIONS)] for each in (graphed(model), plain)]
    assert same(*found)


def launches_of_turns(model: MimoAudio, turns: list[Tensor]) -> list[list[str]]:
    """What the host asks of the device from a recording to the end of its prefill."""
    counted, found = HostLaunches(), []
    own = graphed(model, counted.unwatched)
    engine, codec = own.pipeline.engine, own.pipeline.codec
    codec.warm_up_encoder(own.lm.config.channels, progress=False)
    engine.warmup(progress=False)
    state = engine.state
    counted.owns(*(x for x in vars(state).values() if isinstance(x, Tensor)), *state.cache.parts)
    assert codec.encoder_graphs is not None
    counted.owns(*(each.encoder.inputs for each in codec.encoder_graphs._captured.values()))
    counted.owns(*(each.inputs for each in engine.decoder.graphs._prompts.values()))
    session = own.session(seed=3)
    for wav in turns:
        # A reply's codes are copied to the host before the next turn.
        session.ids  # noqa: B018
        counted.names.clear()
        with counted:
            stream = session.stream(wav, **OPTIONS)
        found.append(list(counted.names))
        list(stream)
    return found


def test_a_turn_is_six_launches_until_it_is_prefilled(model, turns):
    """Samples and ids go to the device, codes from graph to graph, and to the host's record."""
    for names in launches_of_turns(model, turns):
        assert names == ["copy_", "graph", "clone", "copy_", "copy_", "graph"]
        assert len(names) <= 6


def test_nothing_waits_for_the_codes_before_they_are_prefilled(model, turns, monkeypatch):
    own, events = graphed(model), list[str]()
    wait, run = PendingCodes.wait, type(own.pipeline.engine.decoder.graphs).prefill_parts
    monkeypatch.setattr(PendingCodes, "wait", lambda self: (events.append("wait"), wait(self))[1])
    monkeypatch.setattr(
        Graphs, "prefill_parts", lambda self, parts: (events.append("prefill"), run(self, parts))[1]
    )
    session = own.session(seed=3)
    for wav in turns:
        events.clear()
        list(session.stream(wav, **OPTIONS))
        assert events[0] == "prefill"
        assert "wait" in events
    assert not session._sequence._pending


def test_without_graphs_of_prompts_codes_are_waited_for(model, plain, turns):
    own = graphed(model, prompts=False)
    assert not isinstance(own.pipeline.speech_later(turns[0]), PendingSpeech)
    found = [[*each.session(seed=3).stream(turns[0], **OPTIONS)] for each in (own, plain)]
    assert same(*found)


def test_what_is_wrong_with_a_recording_is_told_and_leaves_no_trace(model, plain, turns):
    own = graphed(model)
    sessions = [each.session(seed=3) for each in (own, plain)]
    first = [[*each.stream(turns[1], **OPTIONS)] for each in sessions]
    assert same(*first)
    list(own.stream("spoken_dialogue", turns[2], **OPTIONS))
    codec = own.pipeline.codec
    whole = codec.conv1
    codec.conv1 = whole[0] * torch.inf, whole[1]
    with pytest.raises(NumericError, match=r"encoder gives values that are not finite: .*conv1"):
        sessions[0].stream(turns[0], **OPTIONS)
    before = own.history
    for more in (True, False):
        with pytest.raises(NumericError, match="encoder"):
            own.stream("spoken_dialogue", turns[0], add_history=more, **OPTIONS)
        if more:
            assert torch.equal(own.history, before)
    assert own.history is None
    codec.conv1 = whole
    assert sessions[0].turns == 1
    assert same(*[[*each.stream(turns[2], **OPTIONS)] for each in sessions])
    assert torch.equal(*(each.ids for each in sessions))
    with pytest.raises(PromptError, match="shorter than one patch"):
        list(own.stream("speech_continuation", turns[0][:100]))


def test_speech_that_is_read_at_once_has_its_codes(model, plain, turns):
    own = graphed(model)
    later, want = own.pipeline.speech_later(turns[0]), plain.pipeline.speech(turns[0])
    assert isinstance(later, PendingSpeech)
    segments = ["<|im_start|>user\n", later, "<|im_end|>\n"]
    packed = own.pipeline.packed(segments)
    assert packed.ids[1:, packed.pending[0][0]].count_nonzero() == 0
    expected = plain.pipeline.ids([segments[0], want, segments[2]])
    assert torch.equal(own.pipeline.ids(segments), expected)
    assert torch.equal(packed.settled(), expected)
    assert torch.equal(later.codes, want.codes)
    assert torch.equal(own.speech(turns[0]).codes, want.codes)


@pytest.mark.parametrize(("first", "end"), [(0, 40), (0, 12), (12, 24), (16, 40), (32, 40)])
def test_a_part_of_a_prompt_has_its_part_of_the_codes(first, end):
    class Codes:
        frames = 20

        def wait(self) -> Tensor:
            return torch.arange(1, 41).view(2, 20)

    ids = torch.zeros(3, 40, dtype=torch.int64)
    whole = PackedPrompt(ids, ((8, Codes()),))
    want = fill_in(ids, whole.pending)
    assert want[1, 8:28].tolist() == [*range(1, 21)]
    assert ids.count_nonzero() == 0
    part = whole.part(first, end)
    assert torch.equal(part.settled(), want[:, first:end])
    assert torch.equal(part.part(4, 8).settled(), want[:, first + 4 : first + 8])
    assert bool(part.pending) == (first < 28 and end > 8)
