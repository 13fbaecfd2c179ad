"""What a reply with elastic look-ahead begins with: earlier replies, a voice prompt, or nothing."""

import asyncio
import copy
import random
from typing import Any

import pytest
import torch
from dialogues import collected, history
from helpers import snr_db
from replays import layered, repeated
from test_session import insistent
from test_speech import TEXT, stating
from torch import Tensor

import mimo_fast
from mimo_fast import Chunk, MimoAudio
from mimo_fast.bench.player import play
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, PATCH_FRAMES, elastic_reach
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.state import NormStatistics
from mimo_fast.runtime.codec.voice import PROMPT_FRAMES, Voice
from mimo_fast.text.prompt import Speech
from mimo_fast.text.tasks import voice_of

PATCH = 0.16


@pytest.fixture
def speaker(model: MimoAudio) -> MimoAudio:
    """The kit's model, which says nothing but patches; its codec is its own."""
    own = insistent(model, model.empty_token)
    own.codec = copy.copy(own.codec)
    own.clear_history()
    return own


@pytest.fixture
def opened(monkeypatch) -> list[NormStatistics | None]:
    """The statistics that each elastic stream is given."""
    found = list[NormStatistics | None]()
    inner = Codec.stream

    def stream(self: Codec, *arguments: Any, **named: Any) -> Any:
        if arguments and arguments[0] == "elastic":
            found.append(arguments[1])
        return inner(self, *arguments, **named)

    monkeypatch.setattr(Codec, "stream", stream)
    return found


def say(source: Any, groups: int = 24, lookahead: str = "elastic", **options: Any) -> list[Chunk]:
    limits = {"max_new_tokens": groups, "min_new_tokens": groups}
    if isinstance(source, MimoAudio):
        given = {"seed": 1, **limits, "lookahead": lookahead, **options}
        return list(source.stream("tts", "hello", **given))
    return list(source.stream(options["audio"], **limits, lookahead=lookahead))


def sound(chunks: list[Chunk]) -> Tensor:
    return torch.cat([chunk.audio for chunk in chunks])


def near(got: NormStatistics | None, want: NormStatistics, tolerance: float = 1e-3) -> bool:
    if got is None:
        return False
    here, there = (torch.tensor(each) for each in (got, want))
    return bool(((here - there).abs() <= tolerance * (1 + there.abs())).all())


def codes_of(model: MimoAudio, ids: Tensor, groups: int = 24) -> Tensor:
    """Codes of the patches of the last reply, without the group that ended it."""
    ids = ids[:, -groups * 4 : -4]
    return ids[1:, (ids[0, ::4] == model.empty_token).repeat_interleave(4)]


def first_patches(chunks: list[Chunk]) -> int:
    """Patches that were drawn when the first samples came."""
    return next(i for i, chunk in enumerate(chunks, 1) if len(chunk.audio))


def test_heard_after_two_patches_where_it_was_eleven(speaker, monkeypatch):
    """All that is said is the same; nothing is lost at the end."""
    exact, elastic = (say(speaker, lookahead=each) for each in ("exact", "elastic"))
    assert first_patches(exact) == LOOKAHEAD + 1
    assert first_patches(elastic) == 2
    assert len(sound(elastic)) == len(sound(exact)) == 23 * PATCH_FRAMES * 960
    assert [chunk.text for chunk in elastic] == [chunk.text for chunk in exact]
    # With known statistics the same, and nearer to what files get.
    codes = codes_of(speaker, history(speaker))
    speaker.codec.calibrate([codes])
    known = say(speaker)
    assert first_patches(known) == 2
    assert torch.equal(sound(say(speaker, lookahead="exact")), sound(exact))
    wav = speaker.codec.decode(codes)
    begun = 2 * PATCH_FRAMES * 960
    assert snr_db(sound(known)[:begun], wav[:begun]) > snr_db(sound(elastic)[:begun], wav[:begun])


def test_no_gap_while_groups_take_half_of_what_they_play(speaker):
    """Chunks of a stream as they come, on a clock that gives each group its time."""
    for lookahead in ("elastic", "exact"):
        chunks = say(speaker, 48, lookahead)
        for factor in (0.1, 0.3, 0.5):
            arrivals = [(factor * PATCH * i, len(chunk.audio)) for i, chunk in enumerate(chunks, 1)]
            heard = play(arrivals, 24000)
            assert not heard.underruns
            assert heard.duration == pytest.approx(47 * PATCH)
        assert heard.first_audio == pytest.approx(0.08 * (2 if lookahead == "elastic" else 11))


def test_a_dialogue_begins_with_what_it_has_heard_itself_say(speaker, opened, audio):
    """Exact replies count too; one that was broken off does not."""
    session = speaker.session(seed=1)
    say(session, audio=audio[1])
    assert opened == [None]
    first = codes_of(speaker, session.ids)
    broken = session.stream(audio[1], max_new_tokens=9, lookahead="elastic")
    next(broken)
    assert near(opened[1], speaker.codec.moments(first))
    broken.close()
    say(session, audio=audio[1], lookahead="exact")
    second = codes_of(speaker, session.ids)
    say(session, audio=audio[1])
    assert not near(opened[1], NormStatistics(*opened[2]))
    both = copy.copy(speaker.codec)
    assert near(opened[2], both.calibrate([first, second]))
    session.reset()
    say(session, audio=audio[1])
    assert opened[3] is not None


def test_a_first_reply_begins_with_the_voice_prompt(speaker, opened, audio):
    session = speaker.session(voice=audio[0], seed=1)
    codes = speaker.speech(audio[0]).codes
    say(session, audio=audio[1])
    assert near(opened[0], speaker.codec.moments(codes[:, -PROMPT_FRAMES:]), 0)
    given = {"prompt_speech": audio[0], "instruct": "softly"}
    say(speaker, **given)
    assert near(opened[1], opened[0], 0)
    # A prompt that the text's form has no place for is not spoken in.
    say(speaker, prompt_speech=audio[0])
    assert opened[2] is None
    say(session, audio=audio[1])
    assert not near(opened[3], opened[0])


def test_a_restored_dialogue_begins_with_the_same(speaker, opened, audio, tmp_path):
    session = speaker.session(voice=audio[0], seed=1)
    session.save(tmp_path / "new")
    say(session, audio=audio[1])
    session.save(tmp_path / "talk")
    say(session, audio=audio[1])
    say(speaker.restore_session(tmp_path / "talk"), audio=audio[1])
    assert near(opened[2], opened[1], 0)
    say(speaker.restore_session(tmp_path / "new"), audio=audio[1])
    assert near(opened[3], opened[0], 0)


def test_what_one_codec_measured_means_nothing_to_another(speaker, opened, audio, tmp_path):
    session = speaker.session(seed=1)
    say(session, audio=audio[1])
    session.save(tmp_path / "talk")
    other = copy.copy(speaker)
    other.codec = copy.copy(other.codec)
    other.codec.__dict__.pop("fingerprint", None)
    other.codec.to_mel = copy.copy(other.codec.to_mel)
    object.__setattr__(other.codec.to_mel, "bias", other.codec.to_mel.bias + 1)
    say(other.restore_session(tmp_path / "talk"), audio=audio[1])
    assert opened[-1] is None
    voice = Voice()
    voice.add(speaker.codec, torch.ones(2, 3, dtype=torch.float64))
    assert voice.known(speaker.codec) is not None
    assert voice.known(other.codec) is None


def test_a_task_that_continues_begins_with_its_history(speaker, opened, audio):
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "seed": 1, "lookahead": "elastic"}
    [*speaker.stream("spoken_dialogue", audio[1], **options)]
    [*speaker.stream("spoken_dialogue", audio[1], add_history=True, **options)]
    [*speaker.stream("spoken_dialogue", audio[1], **options)]
    assert opened[0] is None
    assert opened[1] is not None
    assert opened[2] is None


def test_what_is_carried_on_is_a_voice_prompt(speaker, opened, audio):
    limits = {"max_new_tokens": 12, "min_new_tokens": 12, "lookahead": "elastic"}
    [*speaker.stream("speech_continuation", audio[0], **limits)]
    codes = speaker.speech(audio[0], closed=False).codes
    assert near(opened[0], speaker.codec.moments(codes[:, -PROMPT_FRAMES:]), 0)


def test_the_voice_of_a_prompt():
    speech = Speech(torch.zeros(8, 8, dtype=torch.int64))
    assert voice_of([]) is None
    assert voice_of(["<|im_start|>user\n", speech, "<|im_end|>\n"]) is None
    assert voice_of(["Your voice should be:", speech, "x"]) is speech
    assert voice_of(["a", "你的音色应该是：", speech, "x"]) is speech
    assert voice_of(["a", speech]) is None


@pytest.mark.parametrize("cloned", [False, True])
def test_pieces_of_one_voice_begin_with_those_before(model, opened, monkeypatch, cloned):
    inner = MimoAudio._start

    def start(self: MimoAudio, ids: Tensor, task: str, stops: Any, *rest: Any) -> Any:
        return inner(self, ids, task, stops, 12, *rest[1:])

    monkeypatch.setattr(MimoAudio, "_start", start)
    told = ("tts_sft", "tts_sft.instruct", *(["tts_sft.prompt_speech"] if cloned else []))
    sentences = stating(model, sentences_at_once=1, trained_tasks=told, max_positions=400)
    own = insistent(sentences, model.empty_token)
    [*own.stream("tts", TEXT, split=True, seed=3, lookahead="elastic")]
    assert len(opened) == 4
    assert opened[0] is None
    assert all((known is not None) == cloned for known in opened[1:])


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 25))]
)
@pytest.mark.parametrize("lookahead", ["exact", "elastic"])
def test_any_mix_sounds_like_lone_runs(speaker, lookahead, seed):
    """Streams that share a batch, taken from in any order, some closed early; bit for bit.

    Every other mix has graphs of the codec's chunks, which lone runs do without.
    """
    rng = random.Random(seed)
    if seed % 2:
        speaker.codec = layered(speaker.codec)
    speaker.codec.calibrate([torch.randint(0, 15, (8, 40), generator=torch.manual_seed(3))])
    asked = [
        {"seed": rng.randrange(4), "max_new_tokens": n, "min_new_tokens": n, "lookahead": each}
        for n in (rng.choice([3, 9, 20, 32]) for _ in range(6))
        # In a mix of elastic streams there are exact ones, too.
        for each in [lookahead if rng.random() < 0.7 else "exact"]
    ]
    if seed % 2:
        speaker.codec.stream_graphs = StreamGraphs(speaker.codec, repeated)
    running: dict[int, Any] = {}
    taken: dict[int, list[Tensor]] = {i: [] for i in range(len(asked))}
    waiting, closed = list(range(len(asked))), set[int]()
    while running or waiting:
        if waiting and (not running or rng.random() < 0.3):
            i = waiting.pop()
            running[i] = copy.copy(speaker).stream("tts", "hello", **asked[i])
            continue
        i = rng.choice(list(running))
        if rng.random() < 0.01:
            running.pop(i).close()
            closed.add(i)
        elif (chunk := next(running[i], None)) is None:
            running.pop(i)
        else:
            taken[i].append(chunk.audio)
    assert len(closed) < len(asked)
    lone: dict[str, list[Tensor]] = {}
    speaker.codec.stream_graphs = None
    for i, given in enumerate(asked):
        if str(given) not in lone:
            alone = copy.copy(speaker).stream("tts", "hello", **given)
            lone[str(given)] = [chunk.audio for chunk in alone]
        want = lone[str(given)]
        assert i in closed or len(taken[i]) == len(want)
        assert all(map(torch.equal, taken[i], want[: len(taken[i])]))


def test_threads_and_tasks_sound_like_lone_runs(speaker):
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "lookahead": "elastic"}

    async def together() -> list[list[Chunk]]:
        streams = (
            collected(copy.copy(speaker).astream("tts", "hello", seed=seed, **options))
            for seed in range(3)
        )
        return await asyncio.gather(*streams)

    found = asyncio.run(together())
    for seed, chunks in enumerate(found):
        alone = [*speaker.stream("tts", "hello", seed=seed, **options)]
        assert torch.equal(sound(chunks), sound(alone))


def test_a_look_ahead_that_there_is_not(speaker, audio):
    with pytest.raises(TypeError, match="lookahead must be"):
        speaker.stream("tts", "hello", lookahead=3)
    with pytest.raises(TypeError, match="lookahead must be"):
        speaker.session().stream(audio[1], lookahead="elastically")


def test_nano_is_heard_no_later_than_before():
    """Its vocoder reaches one patch and its config states statistics: two patches either way."""
    nano = mimo_fast.load(device="cpu")
    assert elastic_reach(nano.codec.config) == 1
    firsts, wholes = [], []
    for lookahead in ("exact", "elastic"):
        chunks = [*nano.stream("tts", "seven forty two", seed=1, lookahead=lookahead)]
        firsts.append(next(i for i, chunk in enumerate(chunks) if len(chunk.audio)))
        wholes.append(sound(chunks))
    assert firsts[0] == firsts[1]
    assert len(wholes[0]) == len(wholes[1])
