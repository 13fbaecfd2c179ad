"""The command line as a user meets it: results, exit codes, one-line errors, no stray files."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import mimo_fast
from mimo_fast.cli import main as cli
from mimo_fast.cli.main import main

KIT = Path(__file__).parents[1] / "golden"
AUDIO = KIT / "audio" / "en_m_24k.wav"
PAIR = ["--model", str(KIT / "checkpoint" / "lm"), "--codec", str(KIT / "checkpoint" / "codec")]
SHORT = ["--seed", "1", "--max-tokens", "30"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command's one error line."""
    code, out, err = run(capsys, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("mimo-fast: error: ")]
    assert (code, out, len(errors)) == (1, "", 1), err
    assert err.rstrip().endswith(errors[0]), "nothing follows the error"
    return errors[0]


def test_tts_writes_audio_and_says_how_fast(capsys, tmp_path):
    output = tmp_path / "said.wav"
    code, _, err = run(capsys, "tts", "Hello there.", "-o", output, *PAIR, *SHORT)
    assert code == 0
    samples, rate = soundfile.read(output)
    assert rate == 24000
    assert len(samples) > 0
    assert len(samples) % (4 * 960) == 0
    assert f"wrote {output}: {len(samples) / rate:.2f} s of audio" in err
    assert "real-time factor" in err
    assert list(tmp_path.iterdir()) == [output]


def test_tts_is_repeatable_and_styles_change_it(capsys, tmp_path):
    def say(*style: object) -> bytes:
        assert run(capsys, "tts", "Hello.", "-o", tmp_path / "a.wav", *style, *PAIR, *SHORT)[0] == 0
        return (tmp_path / "a.wav").read_bytes()

    assert say() == say()
    assert (
        len(
            {
                say(),
                say("--instruct", "slowly"),
                say("--natural"),
                say("--natural", "--voice", AUDIO),
            }
        )
        == 4
    )


def test_tts_names_words_that_a_model_of_stated_words_does_not_know(capsys, tmp_path):
    shutil.copytree(KIT / "checkpoint" / "lm", tmp_path / "lm")
    path = tmp_path / "lm" / "tokenizer_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(raw | {"trained_words": ["seven", "forty", "two", "hello"]}), encoding="utf-8"
    )
    limited = ["--model", tmp_path / "lm", *PAIR[2:]]

    def warnings(text: str, *options: object) -> list[str]:
        code, _, err = run(capsys, "tts", text, "-o", tmp_path / "a.wav", *options, *SHORT)
        assert code == 0, err
        return [line for line in err.splitlines() if "may garble" in line]

    text = "Seven 42, hello world of worlds: hello world!"
    assert warnings(text, *limited) == [
        "warning: this model was not trained on, and may garble: world, of, worlds"
    ]
    for fine in (["Seven 42, hello.", *limited], [text, *limited, "--natural"], [text, *PAIR]):
        assert warnings(*fine) == []
    (many,) = warnings("a b c d e f g h i", *limited)
    assert many.endswith(": a, b, c, d, e, f, g, h, ...")
    assert "no word to say" in fails(capsys, "tts", "!?", "-o", tmp_path / "a.wav", *limited)


def test_asr_prints_a_line_a_recording(capsys):
    code, out, _ = run(capsys, "asr", AUDIO, KIT / "audio" / "zh_24k_stereo.wav", *PAIR, *SHORT)
    assert code == 0
    assert out.count(".wav: ") == 2


def test_understand_prints_what_the_model_returns(capsys, model):
    code, out, _ = run(capsys, "understand", AUDIO, "What is said?", "--thinking", *PAIR, *SHORT)
    expected = model.audio_understanding_sft(
        AUDIO, "What is said?", True, seed=1, max_new_tokens=30
    )
    assert (code, out.strip()) == (0, expected)


def test_chat_writes_a_reply_a_turn(capsys, tmp_path):
    arguments = [
        "chat",
        AUDIO,
        KIT / "audio" / "en_f_16k.wav",
        "-o",
        tmp_path / "reply.wav",
        "--system",
        "Be brief.",
    ]
    assert run(capsys, *arguments, "--voice", AUDIO, *PAIR, *SHORT)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reply-1.wav", "reply-2.wav"]


def test_chat_in_text(capsys):
    code, out, _ = run(capsys, "chat", "--text", "Hi.", "And now?", *PAIR, *SHORT)
    assert code == 0
    assert out


def test_continue_can_join(capsys, tmp_path):
    assert run(capsys, "continue", AUDIO, "-o", tmp_path / "more.wav", *PAIR, *SHORT)[0] == 0
    assert (
        run(capsys, "continue", AUDIO, "-o", tmp_path / "all.wav", "--join", *PAIR, *SHORT)[0] == 0
    )
    before, more, everything = (
        soundfile.info(path).frames for path in (AUDIO, tmp_path / "more.wav", tmp_path / "all.wav")
    )
    assert everything == before + more


def test_verify_passes_on_the_kit(capsys):
    code, out, err = run(capsys, "verify", "--checkpoint", KIT / "checkpoint", "--golden", KIT)
    assert code == 0
    assert "FAILED" not in out
    assert "all" in err
    assert len(out.splitlines()) == 16


def test_verify_names_the_stage_whose_golden_tensor_is_altered(capsys, tmp_path):
    shutil.copytree(KIT, tmp_path / "kit")
    file = tmp_path / "kit" / "golden" / "model.safetensors"
    tensors = load_file(file)
    tensors["generate.text"][3, 5] += 1
    save_file(tensors, file)
    code, out, err = run(
        capsys, "verify", "--checkpoint", KIT / "checkpoint", "--golden", tmp_path / "kit"
    )
    assert code == 1
    assert [line.split()[0] for line in out.splitlines() if "FAILED" in line] == ["generate"]
    assert "verify failed at: generate" in err


def test_verify_names_the_stages_a_weight_breaks(capsys, tmp_path):
    shutil.copytree(KIT / "checkpoint", tmp_path / "pair")
    file = tmp_path / "pair" / "lm" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][7] += 1
    save_file(tensors, file)
    code, _, err = run(capsys, "verify", "--checkpoint", tmp_path / "pair", "--golden", KIT)
    assert code == 1
    assert "text logits" in err


def test_init_checkpoint_and_info(capsys, tmp_path):
    assert run(capsys, "init-checkpoint", tmp_path / "pair", "--seed", 3)[0] == 0
    pair = ["--model", tmp_path / "pair" / "lm", "--codec", tmp_path / "pair" / "codec"]
    code, out, _ = run(capsys, "info", *pair)
    assert code == 0
    for word in ("torch", "cpu:", "kernels:", "backbone", "patch decoder", "vocoder", "total"):
        assert word in out
    assert run(capsys, "tts", "Hi.", "-o", tmp_path / "a.wav", *pair, *SHORT)[0] == 0


def tensors(part: object) -> Iterator[torch.Tensor]:
    """All within weights, dataclasses of dataclasses, in order."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple | list):
        for each in part:
            yield from tensors(each)
    elif is_dataclass(part):
        for field in fields(part):
            yield from tensors(getattr(part, field.name))


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
def test_quantize_and_speak(capsys, tmp_path, form):
    code, out, err = run(capsys, "quantize", PAIR[1], tmp_path / "small", "--format", form)
    assert code == 0
    assert "model.layers.0.self_attn.q_proj.weight" in out
    assert "GB" in err
    small = ["--model", tmp_path / "small", *PAIR[2:]]
    code, out, _ = run(capsys, "info", *small)
    assert "248,880 parameters" in out
    assert run(capsys, "tts", "Hi.", "-o", tmp_path / "stored.wav", *small, *SHORT)[0] == 0
    assert (
        run(
            capsys, "tts", "Hi.", "-o", tmp_path / "now.wav", "--quantization", form, *PAIR, *SHORT
        )[0]
        == 0
    )
    # The weights are equal, which speech need not be to the bit: a dense product of torch's adds in
    # another order where a mapped file puts its weight at an odd address.
    stored = mimo_fast.load(tmp_path / "small", PAIR[3], device="cpu").lm
    now = mimo_fast.load(PAIR[1], PAIR[3], device="cpu", quantization=form).lm
    for part in ("backbone", "patch_encoder", "patch_decoder"):
        pairs = [list(tensors(getattr(lm, part))) for lm in (stored, now)]
        assert pairs[0]
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
    assert "quantized already" in fails(capsys, "asr", AUDIO, "--quantization", form, *small)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty|no samples|cannot"),
        (b"just text\n" * 99, "cannot decode"),
        (b"RIFF", "cannot decode"),
    ],
)
def test_bad_audio_is_one_line_and_leaves_no_file(capsys, tmp_path, content, complaint):
    recording = tmp_path / "bad.wav"
    recording.write_bytes(content)
    message = fails(capsys, "chat", recording, "-o", tmp_path / "reply.wav", *PAIR)
    assert any(part in message for part in complaint.split("|")), message
    assert list(tmp_path.iterdir()) == [recording]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["asr", "/nowhere/a.wav", *PAIR], "/nowhere/a.wav"),
        (["asr", AUDIO, "--model", "/nowhere/lm", *PAIR[2:]], "/nowhere/lm"),
        (["asr", AUDIO, "--model", PAIR[3], *PAIR[2:]], "config.json"),
        (["tts", "Hi.", "-o", "a.wav", "--voice", AUDIO, *PAIR], "--voice needs"),
        (["tts", "", "-o", "a.wav", *PAIR], "no text"),
        (["chat", AUDIO, *PAIR], "-o FILE.wav"),
        (["chat", "--text", "Hi.", "-o", "a.wav", *PAIR], "--text"),
        (
            ["demo", "-o", ".", *PAIR[:2], "--cache-dir", "none", "--offline"],
            "Tokenizer is not in the cache",
        ),
        (["verify", "--checkpoint", KIT / "checkpoint", "--golden", KIT / "audio"], "golden.json"),
        (["asr", AUDIO, "--device", "nonsense", *PAIR], "nonsense"),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert complaint in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["tts"],
        ["tts", "Hi."],
        ["tts", "Hi.", "-o", "/nowhere/a.wav"],
        ["tts", "Hi.", "-o", "/"],
        ["tts", "Hi.", "-o", "a.wav", "--max-tokens", "0"],
        ["tts", "Hi.", "-o", "a.wav", "--dtype", "int3"],
        ["init-checkpoint", "x", "--preset", "70b"],
    ],
)
def test_bad_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_file_that_cannot_grow_leaves_the_old_one(tmp_path):
    output = tmp_path / "a.wav"
    output.write_bytes(b"what was here before")
    command = [sys.executable, "-m", "mimo_fast", "tts", "Hi.", "-o", str(output), *PAIR, *SHORT]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    result = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "mimo-fast: error:" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert output.read_bytes() == b"what was here before"
    assert list(tmp_path.iterdir()) == [output]


def test_unexpected_errors_are_one_line_too(capsys, monkeypatch):
    def broken(_: object) -> int:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("mimo_fast.cli.info.run", broken)
    assert "ZeroDivisionError: first line second line" in fails(capsys, "info")
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert "Traceback" in run(capsys, "info")[2]


def test_interrupt_stops_at_once_and_writes_nothing(tmp_path):
    # Native calls would be done with the reply too soon, and so would some seeds.
    command = [
        sys.executable,
        "-m",
        "mimo_fast",
        "continue",
        str(AUDIO),
        "-o",
        str(tmp_path / "a.wav"),
        "--seed",
        "0",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "MIMO_FAST_KERNELS": "torch",
    }
    command += PAIR
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert "loading" in process.stderr.readline()
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, rest
    assert rest.strip() == "mimo-fast: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_output_into_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m mimo_fast --help | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
