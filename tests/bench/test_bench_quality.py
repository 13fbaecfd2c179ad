"""What formats cost: identical models cost nothing, and teacher forcing gives the scores that
decoding draws from."""

import json
import math
import shutil

import pytest
import torch
from helpers import AUDIO, KIT, PAIR

from mimo_fast.bench import quality
from mimo_fast.bench.quality import Lesson, compare, compare_codec, head_quality, teacher_forced
from mimo_fast.cli.main import main
from mimo_fast.generation import generate


@pytest.fixture(scope="module")
def lesson(model, golden):
    """A prompt and our greedy continuation of it, which holds words and patches."""
    ids = golden.get("prompts:dialogue").long()
    grown = generate(model, ids, max_new_tokens=24)
    grown[0, 1::4] = grown[0, 2::4] = grown[0, 3::4] = -100
    return Lesson(grown, ids.shape[1] // 4)


def test_teacher_forced_choices_are_the_greedy_tokens(model, lesson):
    scores = teacher_forced(model.lm, lesson)
    groups = lesson.ids.unflatten(1, (-1, 4))[:, lesson.first :]
    assert torch.equal(scores.text.argmax(-1), groups[0, :, 0])
    spoken = groups[0, :, 0] == model.lm.empty_id
    assert 0 < spoken.sum() <= 24
    for channel, found in enumerate(scores.codes):
        assert torch.equal(found.argmax(-1), groups[channel + 1][spoken].flatten())
        assert torch.allclose(found.exp().sum(-1), torch.ones(len(found)), atol=1e-5)


def test_a_model_equals_itself(model, lesson):
    scores = [teacher_forced(model.lm, lesson)]
    heads = compare(scores, scores)
    assert len(heads) == 9
    assert all((head.kl, head.agreement) == (0, 1) for head in heads)
    assert heads[0].predictions == 24
    assert {head.predictions for head in heads[1:]} == {
        4 * int((scores[0].text.argmax(-1) == model.lm.empty_id).sum())
    }


def test_divergence_by_hand():
    reference = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    other = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).log()
    head = head_quality(reference, other)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert head.kl == pytest.approx((first + math.log(2)) / 2)
    # Of equal scores the first counts as preferred.
    assert head.agreement == 0.5
    assert head_quality(reference[:0], other[:0]).predictions == 0


def test_a_codec_equals_itself_and_not_another(model, audio):
    from mimo_fast.audio.files import load_audio

    wav = load_audio(audio[0], 24000)
    same = compare_codec(model.codec, model.codec, [wav], 8)
    assert (same.snr_db, same.mel_distance, same.code_agreement) == (math.inf, 0, 1)


def test_the_command_compares_every_format(capsys, tmp_path):
    asked = [*PAIR, "--audio", str(AUDIO), "--text", "Hello.", "--json", str(tmp_path / "q.json")]
    code = main(["bench", "--quality", *asked])
    out = capsys.readouterr().out
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if "KL" in line] == ["int8", "int4", "nf4"]
    assert sum(line.startswith("codebook") for line in lines) == 3 * 8
    record = json.loads((tmp_path / "q.json").read_text())
    text = {name: heads[0] for name, heads in record["formats"].items()}
    assert 0 < text["int8"]["kl"] < text["int4"]["kl"]
    assert text["int8"]["agreement"] > text["int4"]["agreement"]
    # All are asked for the same.
    counts = [[head["predictions"] for head in heads] for heads in record["formats"].values()]
    assert counts[0] == counts[1] == counts[2]
    assert 20 < record["codec_int8"]["snr_db"] < 80
    assert 0 < record["codec_int8"]["mel_distance"] < 0.1


def test_one_format_and_texts_alone(capsys):
    assert main(["bench", "--quality", *PAIR, "--text", "Hello.", "--format", "int8"]) == 0
    out = capsys.readouterr().out
    assert out.count("KL") == 1
    assert "codec" not in out.replace("codebook", "")


def test_a_worse_model_is_told_from_a_better(model, lesson, tmp_path, kit):
    scores = teacher_forced(model.lm, lesson)
    noisy = quality.Scores(scores.text + 0.5 * torch.randn(scores.text.shape), scores.codes)
    noisy = quality.Scores(noisy.text.log_softmax(-1), noisy.codes)
    heads = compare([scores], [noisy])
    assert heads[0].kl > 0.01
    assert all(head.kl == 0 for head in heads[1:])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--quality needs --audio or --text"),
        (PAIR, "--quality needs --audio or --text"),
        ([*PAIR, "--audio", "missing.wav"], "missing.wav"),
        (
            [*PAIR, "--text", "Hi.", "--quantization", "int8"],
            "use --format in place of --quantization",
        ),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, problem):
    assert main(["bench", "--quality", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("mimo-fast: error: ")]
    assert problem in line


def test_a_quantized_checkpoint_cannot_be_the_reference(capsys, tmp_path):
    from mimo_fast.quantization import quantize_checkpoint

    shutil.copytree(KIT / "checkpoint" / "lm", tmp_path / "lm")
    quantize_checkpoint(tmp_path / "lm", tmp_path / "small", "int8", progress=False)
    arguments = ["--model", str(tmp_path / "small"), *PAIR[2:], "--text", "Hi."]
    assert main(["bench", "--quality", *arguments]) == 1
    assert "is quantized already" in capsys.readouterr().err
