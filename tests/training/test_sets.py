"""The domain's held-out sentences as evaluation sets, and nano's card made of them."""

import pytest
import torch
from pyarrow import parquet

import mimo_fast
from mimo_fast import MimoFastError
from mimo_fast.audio.writing import pcm16
from mimo_fast.evaluation.items import Options, Tools
from mimo_fast.evaluation.rates import rates
from mimo_fast.evaluation.run import Asked, evaluate, read_items
from mimo_fast.evaluation.sets import SETS
from mimo_fast.sampling import task_samplers
from training import data, domain, listen, sets, synthesis
from training import evaluate as card
from training.sets import write_sets

SEED, COUNT = 3, 6
"""The run of nano's card, and sentences."""

needs_flite = pytest.mark.skipif(not synthesis.has_flite(), reason="needs flite")


def test_without_flite_there_are_no_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "has_flite", lambda: False)
    with pytest.raises(MimoFastError, match="apt-get install flite"):
        write_sets(tmp_path, 1)
    assert not [*tmp_path.iterdir()]


@needs_flite
def test_sets_hold_the_held_out_sentences(tmp_path):
    write_sets(tmp_path, 2, SEED)
    asked = Asked(SETS["librispeech"], "test_clean", Options())
    for i, item in enumerate(read_items(asked, tmp_path)):
        wanted = data.item("unheard", i, SEED)
        assert item.truth["text"] == wanted.text.upper()
        wav = synthesis.synthesize(domain.spoken(wanted.text), wanted.manner).wav
        found = mimo_fast.load_audio(item.arguments["input"], 24_000)
        assert torch.equal(found, data.as_samples(wav) / 2**15)
    asked = Asked(SETS["seedtts"], "en", Options(mode="plain"))
    texts = [item.arguments["input"] for item in read_items(asked, tmp_path)]
    assert texts == [data.item("unsaid", i, SEED).text for i in range(2)]
    (file,) = (tmp_path / "big_bench_audio").rglob("*.parquet")
    first = parquet.read_table(file).to_pylist()[0]
    assert first["official_answer"] == "hello how are you"
    assert len(mimo_fast.load_audio(first["audio"]["bytes"], 24_000)) > 10_000


def test_the_listener_hears_english_alone(tmp_path):
    with pytest.raises(MimoFastError, match="English alone, not 'zh'"):
        listen.Listener()(tmp_path / "a.wav", "zh")


@needs_flite
@pytest.mark.slow
def test_the_command_gives_the_cards_figures(tmp_path):
    """As `training evaluate` measures them, sentence by sentence."""
    pytest.importorskip("pocketsphinx")
    write_sets(tmp_path / "data", COUNT, SEED)
    model = mimo_fast.load(device="cpu", max_batch=4)
    parts = {name: data.Part(tmp_path, name, COUNT, SEED) for name in ("unheard", "unsaid")}
    with card.tqdm(disable=True) as bar:
        for part in parts.values():
            part.make(bar)

    def run(name, longest, tools=None):
        chosen = SETS[name]
        options = Options(mode="plain" if chosen.modes else None)
        asked = Asked(chosen, chosen.splits[0], options, max_new_tokens=longest, sampled=True)
        items = read_items(asked, tmp_path / "data")
        folder = tmp_path / name
        found = evaluate(model, asked, items, tools or Tools(), folder, progress=False)
        (measured,) = found.measured
        figure = measured.measure.figures(measured.found)["WER, corpus"]
        pairs = [(each["reference"].lower(), each["hypothesis"]) for _, each in measured.found]
        # Two ways of counting.
        assert figure.value == pytest.approx(100 * rates(pairs, "en")[1])
        return found, figure.value, [hypothesis for _, hypothesis in pairs]

    found, rate, heard = run("librispeech", 60)
    for i, answer in enumerate(found.answers):
        read = mimo_fast.load_audio(answer.item.arguments["input"], 24_000)
        assert torch.equal(read, parts["unheard"][i].wav)
    texts = [parts["unheard"].item(i).text for i in range(COUNT)]
    expected = card.transcripts_of(model, [parts["unheard"][i].wav for i in range(COUNT)])
    assert heard == expected
    assert round(rate / 100, 4) == card.rate_of(expected, texts)

    tools = Tools(recogniser=listen.Listener(), names={"recogniser": "listener"})
    found, rate, heard = run("seedtts", card.LONGEST_REPLY, tools)
    texts = card.unsaid(parts, COUNT)
    model.task_sampler_configs = task_samplers()
    said = card.speech_of(model, texts)
    for answer, wav in zip(found.answers, said, strict=True):
        assert answer.audio.read_bytes()[44:] == pcm16(wav)
    rounded = [mimo_fast.load_audio(answer.audio, 24_000) for answer in found.answers]
    expected = [listen.recognise(wav, 24_000, listen.UNHEARD) for wav in rounded]
    assert heard == expected
    assert round(rate / 100, 4) == card.rate_of(expected, texts)
