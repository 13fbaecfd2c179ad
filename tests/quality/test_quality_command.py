"""`mimo-fast quality` end to end: what it writes, what it refuses, and that its figures add up."""

import json
import shutil

import pytest
import soundfile
from helpers import AUDIO, KIT, PAIR

from mimo_fast.cli.main import main
from mimo_fast.errors import EvaluationError
from mimo_fast.quality import measure
from mimo_fast.quality.advice import Bounds, advice
from mimo_fast.quality.measure import candidates

SHORT = ["--max-tokens", "24"]
ASR_PAIR = ["--model", str(KIT / "asr" / "lm"), *PAIR[2:]]


def compared(tmp_path, *arguments):
    """The exit code and the report of a comparison of the kit's checkpoint."""
    folder = tmp_path / "report"
    code = main(["quality", *PAIR, *map(str, arguments), *SHORT, "-o", str(folder)])
    file = folder / "report.json"
    return code, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judges")
def test_the_report_is_whole_and_its_advice_follows_from_its_figures(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("seven of them", encoding="utf-8")
    shutil.copy(AUDIO, tmp_path / "a.wav")
    code, found = compared(
        tmp_path, "--audio", tmp_path / "a.wav", AUDIO, "--text", "Hi.", "Hello."
    )
    assert code == 0
    assert found["full"] == "float32"
    assert [*found["formats"]] == ["float32", "int8", "int4"]
    sources = [(each["file"], each["from"]) for each in found["recordings"]]
    assert sources == [("a.wav", "given"), (AUDIO.name, "heard by the full format")]
    text = {name: each["heads"][0] for name, each in found["formats"].items() if "heads" in each}
    assert 0 < text["int8"]["kl"] < text["int4"]["kl"]
    assert text["int8"]["agreement"] > text["int4"]["agreement"]
    assert 20 < found["codecs"]["int8"]["snr_db"] < 80
    weights = [each["memory"]["weights"] for each in found["formats"].values()]
    assert weights == sorted(weights, reverse=True)
    # What the full format hears in the second recording, it hears.
    assert found["formats"]["float32"]["hearing"]["errors"][1] == 0
    again = advice(candidates(found), Bounds(**found["bounds"]))
    assert (again.format, again.sentence) == (
        found["advice"]["format"],
        found["advice"]["sentence"],
    )
    out = capsys.readouterr().out
    assert out == again.sentence + "\n"
    report = (tmp_path / "report" / "report.md").read_text()
    assert again.sentence in report
    for line in report.splitlines():
        for link in [part.split(")")[0] for part in line.split("](")[1:]]:
            assert (tmp_path / "report" / link).is_file()
    for name in found["formats"]:
        for number in (1, 2):
            heard = soundfile.info(tmp_path / f"report/audio/{name}/text-{number:03}.wav")
            assert heard.samplerate == 24000


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judges")
def test_texts_alone_in_one_format(tmp_path):
    code, found = compared(tmp_path, "--text", "Hello.", "--format", "nf4", "--seed", "3")
    assert code == 0
    assert [*found["formats"]] == ["float32", "nf4"]
    assert "hearing" not in found["formats"]["nf4"]
    assert found["streaming"] is None
    assert found["not_measured"]["hearing"] == "no recordings were given (--audio)"
    assert set(found["formats"]["nf4"]["losses"]) <= {"speech"}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judges")
def test_recordings_alone_whose_words_nobody_gave(tmp_path):
    code, found = compared(tmp_path, "--audio", AUDIO, "--format", "int8")
    assert code == 0
    assert found["texts"] == []
    assert "no texts were given" in found["not_measured"]["speech"]
    assert found["formats"]["int8"]["speed"]["hearing_factor"] > 0
    assert "real_time_factor" not in found["formats"]["int8"]["speed"]


@pytest.mark.slow
def test_a_model_that_transcribes_alone(tmp_path, capsys):
    folder = tmp_path / "report"
    asked = ["--audio", str(AUDIO), "--format", "int8", "--text", "Hi.", "-o", str(folder)]
    assert main(["quality", *ASR_PAIR, *asked]) == 0
    found = json.loads((folder / "report.json").read_text())
    assert found["not_measured"]["speech"] == "the model was not trained to say texts"
    heads = found["formats"]["int8"]["heads"]
    assert heads[0]["predictions"] > 0
    assert "hearing" in found["formats"]["int8"]["losses"]


@pytest.mark.slow
def test_missing_packages_leave_figures_out_and_say_so(capsys, tmp_path, monkeypatch):
    def missing(*_: object) -> None:
        raise EvaluationError("it needs the package x: pip install 'mimo-fast[quality]'")

    monkeypatch.setattr(measure, "Resemblyzer", missing)
    monkeypatch.setattr(measure.judged, "dnsmos", missing)
    monkeypatch.setattr("mimo_fast.cli.quality.draw", missing)
    code, found = compared(tmp_path, "--audio", AUDIO, "--text", "Hi.", "--format", "int8")
    assert code == 0
    assert set(found["not_measured"]) == {"voice", "sound"}
    assert set(found["formats"]["int8"]["losses"]) <= {"hearing", "speech"}
    err = capsys.readouterr().err
    assert "not measured: voice: it needs the package x" in err
    assert not [*(tmp_path / "report").glob("*.png")]


@pytest.mark.parametrize(
    ("recordings", "texts", "speaks", "transcribes", "ears", "missing"),
    [
        (1, 1, True, True, False, {}),
        (0, 1, True, True, False, {"hearing", "streaming"}),
        (1, 0, False, True, False, {"speech", "voice", "sound"}),
        (1, 1, False, True, False, {"speech", "voice", "sound"}),
        (1, 1, True, False, False, {"hearing", "speech"}),
        (1, 1, True, False, True, {"hearing"}),
    ],
)
def test_what_is_missing_has_a_reason(
    tmp_path, recordings, texts, speaks, transcribes, ears, missing
):
    recogniser = (lambda *_: "") if ears else None
    given = [None] * recordings, ["Hi."] * texts
    study = measure.Study(*given, ["int8"], tmp_path, recogniser=recogniser)
    assert set(measure._reasons(study, speaks, transcribes)) == set(missing)


@pytest.mark.slow
def test_own_ears_are_asked(tmp_path, monkeypatch):
    (tmp_path / "my_ears.py").write_text(
        "def hear(audio, language):\n    assert audio.is_file()\n    return f'{language} hi'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(measure, "_judge", lambda *_: None)
    options = ["--text", "Hi.", "--format", "int8", "--recogniser", "my_ears:hear"]
    code, found = compared(tmp_path, *options)
    assert code == 0
    assert found["recogniser"] == "my_ears:hear"
    assert found["formats"]["int8"]["speech"]["heard"] == ["en hi"]
    assert found["formats"]["int8"]["speech"]["errors"] == [1]


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        ([], 1, "give --audio or --text"),
        (["--audio", "missing.wav"], 1, "missing.wav"),
        (["--text", "Hi.", "--quantization", "int8"], 1, "use --format in place of --quantization"),
        (["--text", "Hi.", "--text-of", "none.tsv"], 1, "cannot read none.tsv"),
        (["--text", "Hi.", "--recogniser", "nowhere"], 1, "--recogniser"),
        (["--text", "Hi.", "--recogniser", "nowhere:ears"], 1, "--recogniser"),
        (["--text", "Hi.", "--margin", "0"], 2, "argument --margin: must be a number up to 100"),
        (["--text", "Hi.", "--language", "de"], 2, "invalid choice: 'de'"),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, arguments, code, problem):
    folder = tmp_path / "report"
    try:
        found = main(["quality", *PAIR, *arguments, "-o", str(folder)])
    except SystemExit as usage:
        found = usage.code
    out, err = capsys.readouterr()
    assert (found, out) == (code, "")
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert problem in line
    assert not folder.exists()


def test_a_folder_with_something_in_it_is_refused(capsys, tmp_path):
    (tmp_path / "old.txt").touch()
    assert main(["quality", *PAIR, "--text", "Hi.", "-o", str(tmp_path)]) == 1
    assert "is not empty: name another folder" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [tmp_path / "old.txt"]


def test_an_interrupted_report_is_none(capsys, tmp_path, monkeypatch):
    def stop(study: measure.Study, *_: object) -> None:
        (study.folder / "audio").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("mimo_fast.cli.quality.measure", stop)
    code, found = compared(tmp_path, "--text", "Hi.")
    assert (code, found) == (130, None)
    folder = tmp_path / "report"
    assert capsys.readouterr().err.endswith(f"interrupted; {folder} is incomplete\n")


def test_a_quantized_checkpoint_cannot_be_the_full_one(capsys, tmp_path):
    from mimo_fast.quantization import quantize_checkpoint

    shutil.copytree(KIT / "checkpoint" / "lm", tmp_path / "lm")
    quantize_checkpoint(tmp_path / "lm", tmp_path / "small", "int8", progress=False)
    arguments = ["--model", str(tmp_path / "small"), *PAIR[2:], "--text", "Hi."]
    assert main(["quality", *arguments, "-o", str(tmp_path / "report")]) == 1
    assert "is quantized already" in capsys.readouterr().err
