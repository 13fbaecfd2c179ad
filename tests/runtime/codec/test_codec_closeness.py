"""How close a stream is to one-shot decoding, beside upstream's, whatever the chunks."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import slow_after, snr_db, watch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replays import layered
from test_codec_stream import cut
from test_codec_stream import stream_in as stream_parts
from torch import Tensor

from benchmarks.studies.codec_closeness import (
    KEPT_BACK,
    PAIRS,
    Pair,
    codec_of,
    codes_of,
    gains,
    measure,
)
from benchmarks.studies.codec_stream import upstream_stream
from mimo_fast.audio.files import load_audio
from mimo_fast.runtime.codec import incremental
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, PATCH_FRAMES
from mimo_fast.runtime.codec.state import RESTART_LIMIT, SETTLING
from mimo_fast.testing.parity import STAGES

FRAMES = 182

RECORDINGS = Path(__file__).parents[2] / "words"
OTHER_VOICES = (
    *("what_is_three_plus_four", "the_dog_is_big_and_black", "six_five_zero"),
    *("my_number_is_four_six_eight", "where_is_my_room", "thank_you"),
)

QUICK = (
    Pair("kit", "random 2", 120, (4, 25)),
    Pair("kit", "recordings", 64, (4, 50)),
    Pair("unit kit 1", "random 3", 100, (4,)),
    Pair("loose kit 1", "random 6", 60, (4, 13)),
    Pair("loose kit 5", "recordings", 47),
    Pair("loose wide 8", "repeated 3", 70, (4, 25)),
    Pair("loose no pooling 7", "random 9", 90, (4, 25)),
    Pair("nano unstated", "recordings", 60, (4, 17)),
    Pair("nano", "recordings", 48, (4,), LOOKAHEAD),
)


@pytest.fixture(scope="module")
def codes(golden) -> Tensor:
    return golden.get("codec:stream_codes")


@pytest.fixture(scope="module")
def oneshot(golden) -> Tensor:
    return golden.get("codec:stream_oneshot")


def stream_in(
    codec, codes: Tensor, sizes: list[int], *, last_by_finish: bool = False, again: int = 0
) -> Tensor:
    """The whole waveform from pushes of so many frames, cycled until the codes are spent."""
    options = {"last_by_finish": last_by_finish, "again": again}
    return torch.cat(stream_parts(codec, codes, cut(codes.shape[1], sizes), **options))


@pytest.mark.parametrize("size", [4, 25])
def test_upstreams_windows_give_the_kits_streams(model, golden, codes, size):
    want = golden.get(f"codec:stream_wav.{size}")
    assert snr_db(upstream_stream(model.codec, codes, size), want) >= 100


@pytest.mark.parametrize(
    "size",
    slow_after(6, [4, 7, 25, 60, 92, 160, 1, 14, 28, 36, 40, 44, 52, 80, 100, 120, 146, 150, 181]),
)
def test_chunks_of_any_size_are_as_close_as_upstreams(model, codes, oneshot, size):
    ours = snr_db(stream_in(model.codec, codes, [size]), oneshot)
    theirs = snr_db(upstream_stream(model.codec, codes, size), oneshot)
    assert ours >= theirs + (0.1 if size < 150 else -0.01)


@settings(max_examples=10)
@example([1], False)
@example([4], True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.booleans())
def test_mixed_chunks_are_as_close_as_upstreams_patches(
    model, golden, codes, oneshot, sizes, last_by_finish
):
    wav = stream_in(model.codec, codes, sizes, last_by_finish=last_by_finish)
    assert snr_db(wav, oneshot) >= snr_db(golden.get("codec:stream_wav.4"), oneshot)


@settings(max_examples=6)
@example([3, 50, 1, 4, 4], True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.booleans())
def test_mixed_chunks_decoded_again_are_as_close_as_upstreams_patches(
    model, golden, codes, oneshot, sizes, last_by_finish
):
    options = {"last_by_finish": last_by_finish, "again": RESTART_LIMIT}
    wav = stream_in(model.codec, codes, sizes, **options)
    assert snr_db(wav, oneshot) >= snr_db(golden.get("codec:stream_wav.4"), oneshot) - 0.5


@pytest.mark.parametrize("again", [0, RESTART_LIMIT])
def test_codes_pushed_at_once_are_decoded_as_in_one_shot(model, codes, again):
    wav = stream_in(model.codec, codes, [FRAMES], again=again)
    assert snr_db(wav, model.codec.decode(codes)) >= 110


def test_a_push_decodes_at_most_two_others_again(model, codes, monkeypatch):
    """Of equal pushes the third decodes all three, and no later one decodes any again."""
    rows = list[int]()
    watch(monkeypatch, incremental, "_decoder_block", lambda *args: rows.append(args[3].shape[1]))
    stream, done = layered(model.codec).stream(again=0), list[int]()
    for chunk in codes.repeat(1, 3).split(60, dim=1):
        rows.clear()
        stream.push(chunk)
        done.append(sum(rows) // 2)
    assert done == [60, 120, 180, 60, 60, 60, 60, 60, 60, 6]


def can_speak(pair: Pair) -> bool:
    """Whether the program that speaks the pair's sentences, if any, is there."""
    program = pair.codes.partition(" ")[0]
    return program not in ("flite", "espeak-ng") or shutil.which(program) is not None


@pytest.mark.parametrize("pair", QUICK, ids=lambda pair: pair.name)
def test_a_young_stream_decoded_again_is_as_close_as_upstreams(pair):
    assert min(gains([measure(pair, again=RESTART_LIMIT)])) >= -0.5


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [PAIRS, KEPT_BACK], ids=["tuned on", "kept back"])
def test_over_many_codecs_and_utterances_streams_are_as_close_as_upstreams(pairs):
    """What begins earlier than upstream's is a test of its own."""
    pairs = [pair for pair in pairs if can_speak(pair) and not pair.early]
    assert len({(pair.codec, pair.codes) for pair in pairs}) >= 9
    found = gains(measure(pair, again=RESTART_LIMIT) for pair in pairs)
    assert min(found) >= -0.5
    assert sum(found) / len(found) >= 0


@pytest.mark.parametrize("again", [0, RESTART_LIMIT])
@pytest.mark.parametrize("frames", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_a_stream_outgrows_what_its_checkpoint_states(frames, again):
    """nano states the statistics of its own voice, and waits for one patch."""
    codec = codec_of("nano")
    codes = codes_of(codec, "recordings", frames)
    oneshot, sizes = codec.decode(codes), cut(frames, [PATCH_FRAMES])
    fixed = stream_parts(codec, codes, sizes, moments=codec.stated_statistics)
    ours = stream_in(codec, codes, [PATCH_FRAMES], again=again)
    assert len(fixed[1]) > 0
    begun = (LOOKAHEAD + 1) * PATCH_FRAMES * 960
    for start, better in ((0, 4), (begun, 6)):
        want = snr_db(torch.cat(fixed)[start:], oneshot[start:]) + better
        assert snr_db(ours[start:], oneshot[start:]) >= want


@pytest.mark.parametrize("again", [0, RESTART_LIMIT])
@pytest.mark.parametrize("name", slow_after(1, OTHER_VOICES))
def test_a_stream_of_another_voice_is_close_from_its_first_patch(name, again):
    """What nano states is of its own voice; these are of one that it never heard."""
    codec = codec_of("nano")
    codes = codec.encode(load_audio(RECORDINGS / f"{name}.flac", codec.sample_rate))
    oneshot, patches = codec.decode(codes), codes.split(PATCH_FRAMES, dim=1)

    def closeness(**how: object) -> float:
        stream = codec.stream(again=again, **how)
        return snr_db(torch.cat([*map(stream.push, patches), stream.finish()]), oneshot)

    found = closeness()
    assert found >= 18, "it was 8 to 22 dB where the statistics were taken for the truth"
    assert found >= closeness(weight=0.0) - 4, "what they cost beside no statistics at all"
    # Upstream's windows wait for as many frames.
    assert closeness(lookahead=LOOKAHEAD) >= found


def test_rows_decoded_again_are_bounded(model, codes, monkeypatch):
    """No push decodes more than the limit, and all together a fixed multiple of it."""
    rows = list[int]()
    watch(monkeypatch, incremental, "_decoder_block", lambda *args: rows.append(args[3].shape[1]))
    stream, done = layered(model.codec).stream(again=RESTART_LIMIT), list[int]()
    for chunk in codes.repeat(1, 3)[:, :500].split(PATCH_FRAMES, dim=1):
        rows.clear()
        stream.push(chunk)
        done.append(sum(rows) // 2)
    first, young = LOOKAHEAD + 1, RESTART_LIMIT // PATCH_FRAMES
    assert done[: first - 1] == [0] * (first - 1)
    for pushed, frames in enumerate(done[first - 1 : young], start=first):
        assert frames in (PATCH_FRAMES, pushed * PATCH_FRAMES)
    assert done[young:] == [PATCH_FRAMES] * (len(done) - young)
    # The integral of n dn / (n^2 / SETTLING), rounded up to whole patches.
    again = [frames for frames in done[first:] if frames > PATCH_FRAMES]
    assert 0.5 < sum(again) / (SETTLING * torch.tensor(256 / 44).log()) <= 1
    rows.clear()
    stream.finish()
    assert not rows


@pytest.mark.parametrize("again", [64, 100])
def test_a_lower_limit_decodes_no_more(model, codes, monkeypatch, again):
    rows = list[int]()
    watch(monkeypatch, incremental, "_decoder_block", lambda *args: rows.append(args[3].shape[1]))
    stream = layered(model.codec).stream(again=again)
    for i, chunk in enumerate(codes.split(PATCH_FRAMES, dim=1)):
        rows.clear()
        stream.push(chunk)
        assert sum(rows) // 2 <= (again if (i + 1) * PATCH_FRAMES <= again else PATCH_FRAMES)


def test_what_is_given_is_never_decoded_again(model, codes, monkeypatch):
    moments, rows = model.codec.moments(codes), list[int]()
    watch(monkeypatch, incremental, "_decoder_block", lambda *args: rows.append(args[3].shape[1]))
    codec, sizes = layered(model.codec), cut(FRAMES, [PATCH_FRAMES])
    parts = stream_parts(codec, codes, sizes, moments=moments, again=RESTART_LIMIT)
    assert sum(rows) == 2 * FRAMES
    assert sum(map(len, parts)) == FRAMES * 960


@pytest.mark.parametrize("again", [-1, RESTART_LIMIT + 1])
def test_a_limit_is_a_young_streams(model, again):
    with pytest.raises(ValueError, match=f"between 0 and {RESTART_LIMIT} code frames, not {again}"):
        model.codec.stream(again=again)


def test_what_a_stream_does_by_default_is_the_codecs_choice(model, codes):
    codec = model.codec
    assert codec.again == RESTART_LIMIT
    sizes = cut(FRAMES, [PATCH_FRAMES])
    default = torch.cat(stream_parts(codec, codes, sizes))
    assert torch.equal(default, stream_in(codec, codes, [PATCH_FRAMES], again=codec.again))
    assert not torch.equal(default, stream_in(codec, codes, [PATCH_FRAMES], again=0))


class Ground:
    """Upstream's streams of a pair, as a parity kit holds them."""

    def __init__(self, pair: Pair) -> None:
        self.codec = codec_of(pair.codec)
        codes = codes_of(self.codec, pair.codes, pair.frames)
        self.tensors = {"codec:stream_codes": codes}
        self.tensors["codec:stream_oneshot"] = self.codec.decode(codes)
        for size in pair.sizes:
            wav = upstream_stream(self.codec, codes, size)
            self.tensors[f"codec:stream_wav.{size}"] = wav
            self.tensors[f"codec:stream_lens.{size}"] = torch.tensor([len(wav)])

    def named(self, prefix: str) -> list[str]:
        return [name.rpartition(".")[2] for name in self.tensors if name.startswith(prefix + ".")]

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.mark.parametrize(
    "pair",
    slow_after(
        3,
        [
            *(Pair(f"loose kit {seed}", f"random {seed}", 120) for seed in (31, 32)),
            Pair("nano", "recordings", 60),
            *(Pair(f"loose kit {seed}", f"random {seed}", 228) for seed in (33, 34, 35, 36)),
            *(Pair(f"unit deep {seed}", f"random {seed}", 182) for seed in (37, 38)),
            *(Pair(f"unit kit {seed}", f"repeated {seed}", 320) for seed in (39, 40)),
        ],
    ),
    ids=lambda pair: pair.name,
)
def test_verify_passes_kits_that_it_has_never_seen(pair):
    ground = Ground(pair)
    for stage in ("codec stream", "decoded once"):
        compare, bound, _ = STAGES[stage]
        errors = dict(compare(ground, ground))
        assert len(errors) == len(pair.sizes)
        assert max(errors.values()) <= bound
