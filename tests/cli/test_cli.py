"""The command line as a user meets it: results, exit codes, one-line errors, no stray files."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest
import soundfile
import torch
from helpers import AUDIO, KIT, PAIR, altered_checkpoint, limited_tokenizer
from safetensors.torch import load_file, save_file

import mimo_fast
from mimo_fast.cli import main as cli
from mimo_fast.cli.main import main
from mimo_fast.testing.parity import STAGES

SHORT = ["--seed", "1", "--max-tokens", "30"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def runs(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Output and error output of a command that succeeds."""
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    return out, err


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command's one error line."""
    code, out, err = run(capsys, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("mimo-fast: error: ")]
    assert (code, out, len(errors)) == (1, "", 1), err
    assert err.rstrip().endswith(errors[0]), "nothing follows the error"
    return errors[0]


def test_tts_writes_audio_and_says_how_fast(capsys, tmp_path):
    output = tmp_path / "said.wav"
    _, err = runs(capsys, "tts", "Hello there.", "-o", output, *PAIR, *SHORT)
    samples, rate = soundfile.read(output)
    assert rate == 24000
    assert len(samples) > 0
    assert len(samples) % (4 * 960) == 0
    assert f"wrote {output}: {len(samples) / rate:.2f} s of audio" in err
    assert "real-time factor" in err
    assert list(tmp_path.iterdir()) == [output]


def test_tts_is_repeatable_and_styles_change_it(capsys, tmp_path):
    def say(*style: object) -> bytes:
        runs(capsys, "tts", "Hello.", "-o", tmp_path / "a.wav", *style, *PAIR, *SHORT)
        return (tmp_path / "a.wav").read_bytes()

    styles = [("--instruct", "slowly"), ("--natural",), ("--natural", "--voice", AUDIO)]
    assert say() == say()
    assert len({say(), *(say(*style) for style in styles)}) == 4


def test_tts_names_words_that_a_model_of_stated_words_does_not_know(capsys, tmp_path):
    lm = limited_tokenizer(tmp_path / "lm", ["seven", "forty", "two", "hello"])
    limited = ["--model", lm, *PAIR[2:]]

    def warnings(text: str, *options: object) -> list[str]:
        _, err = runs(capsys, "tts", text, "-o", tmp_path / "a.wav", *options, *SHORT)
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


def test_tts_says_a_long_text_in_pieces_or_whole(capsys, tmp_path):
    text, sound = "Come to the mountain on Friday. The dog is big! Six 50", {}
    nano = ["--model", "nano", "--codec", "nano", "--seed", 1]
    for options in ((), ("--whole",)):
        output = tmp_path / "a.wav"
        out, err = runs(capsys, "tts", text, "-o", output, *options, *nano)
        sound[options] = soundfile.info(output).frames
        if not options:
            assert out.strip() == "come to the mountain on friday the dog is big six fifty"
            assert "wrote" in err
            long = out
    assert sound[()] > 1.2 * sound[("--whole",)]
    out, _ = runs(capsys, "tts", text, "-o", tmp_path / "b.wav", "--max-tokens", 12, *nano)
    assert long.startswith(out.strip())
    assert soundfile.info(tmp_path / "b.wav").frames < sound[()] / 2


def test_asr_prints_a_line_a_recording(capsys):
    out, _ = runs(capsys, "asr", AUDIO, KIT / "audio" / "zh_24k_stereo.wav", *PAIR, *SHORT)
    assert out.count(".wav: ") == 2


def test_understand_prints_what_the_model_returns(capsys, model):
    out, _ = runs(capsys, "understand", AUDIO, "What is said?", "--thinking", *PAIR, *SHORT)
    options = {"seed": 1, "max_new_tokens": 30}
    want = model.audio_understanding_sft(AUDIO, "What is said?", True, **options)
    assert out.strip() == want


def test_chat_writes_a_reply_a_turn(capsys, tmp_path):
    arguments = ["chat", AUDIO, KIT / "audio" / "en_f_16k.wav", "-o", tmp_path / "reply.wav"]
    prompt = ["--system", "Be brief.", "--voice", AUDIO]
    runs(capsys, *arguments, *prompt, *PAIR, *SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reply-1.wav", "reply-2.wav"]


def test_chat_in_text(capsys):
    out, _ = runs(capsys, "chat", "--text", "Hi.", "And now?", *PAIR, *SHORT)
    assert out


def test_continue_can_join(capsys, tmp_path):
    more, everything = tmp_path / "more.wav", tmp_path / "all.wav"
    for arguments in ([more], [everything, "--join"]):
        runs(capsys, "continue", AUDIO, "-o", *arguments, *PAIR, *SHORT)
    frames = [soundfile.info(path).frames for path in (AUDIO, more, everything)]
    assert frames[2] == frames[0] + frames[1]


def test_verify_passes_on_the_kit(capsys):
    out, err = runs(capsys, "verify", "--checkpoint", KIT / "checkpoint", "--golden", KIT)
    assert "FAILED" not in out
    assert "all" in err
    assert len(out.splitlines()) == 1 + len(STAGES)


def test_verify_names_the_stage_whose_golden_tensor_is_altered(capsys, tmp_path):
    shutil.copytree(KIT, tmp_path / "kit")
    file = tmp_path / "kit" / "golden" / "model.safetensors"
    tensors = load_file(file)
    tensors["generate.text"][3, 5] += 1
    save_file(tensors, file)
    pair = ["--checkpoint", KIT / "checkpoint"]
    code, out, err = run(capsys, "verify", *pair, "--golden", tmp_path / "kit")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines() if "FAILED" in line] == ["generate"]
    assert "verify failed at: generate" in err


def test_verify_names_the_stages_a_weight_breaks(capsys, tmp_path):
    altered_checkpoint(tmp_path, "lm", "lm_head.weight", (7,), add=1)
    code, _, err = run(capsys, "verify", "--checkpoint", tmp_path, "--golden", KIT)
    assert code == 1
    assert "text logits" in err


def test_init_checkpoint_and_info(capsys, tmp_path):
    runs(capsys, "init-checkpoint", tmp_path / "pair", "--seed", 3)
    pair = ["--model", tmp_path / "pair" / "lm", "--codec", tmp_path / "pair" / "codec"]
    out, _ = runs(capsys, "info", *pair)
    for word in ("torch", "cpu:", "kernels:", "backbone", "patch decoder", "vocoder", "total"):
        assert word in out
    runs(capsys, "tts", "Hi.", "-o", tmp_path / "a.wav", *pair, *SHORT)


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
    out, err = runs(capsys, "quantize", PAIR[1], tmp_path / "small", "--format", form)
    assert "model.layers.0.self_attn.q_proj.weight" in out
    assert "GB" in err
    small = ["--model", tmp_path / "small", *PAIR[2:]]
    out, _ = runs(capsys, "info", *small)
    assert "248,880 parameters" in out
    for name, options in (("stored", small), ("now", ["--quantization", form, *PAIR])):
        output = tmp_path / f"{name}.wav"
        runs(capsys, "tts", "Hi.", "-o", output, *options, *SHORT)
        assert output.exists()
    # The weights are equal, which speech need not be to the bit: a dense product of torch's adds in
    # another order where a mapped file puts its weight at an odd address.
    stored = mimo_fast.load(tmp_path / "small", PAIR[3], device="cpu").lm
    now = mimo_fast.load(PAIR[1], PAIR[3], device="cpu", quantization=form).lm
    for part in ("backbone", "patch_encoder", "patch_decoder"):
        pairs = [list(tensors(getattr(lm, part))) for lm in (stored, now)]
        assert pairs[0]
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
    assert "quantized already" in fails(capsys, "asr", AUDIO, "--quantization", form, *small)


def test_calibrate_and_load(capsys, tmp_path):
    """The codec's folder says what speech is like; another file there is refused by its name."""
    shutil.copytree(PAIR[3], tmp_path / "codec", copy_function=shutil.copyfile)
    codec, path = tmp_path / "codec", tmp_path / "codec" / "streaming_moments.json"
    assert mimo_fast.load(PAIR[1], codec, device="cpu").codec.calibration is None
    _, err = runs(capsys, "calibrate", codec, AUDIO, KIT / "audio" / "en_f_16k.wav")
    assert f"wrote {path}" in err
    loaded = mimo_fast.load(PAIR[1], codec, device="cpu").codec
    recordings = [
        loaded.encode(mimo_fast.load_audio(KIT / "audio" / name, 24000), 8)
        for name in ("en_m_24k.wav", "en_f_16k.wav")
    ]
    found, want = loaded.calibration, loaded.calibrate(recordings)
    for here, there in zip(found, want, strict=True):
        assert torch.allclose(torch.stack(here), torch.stack(there))
    with pytest.raises(ValueError, match="at least one recording"):
        loaded.calibrate([])
    for odd in ("{}", '{"streaming_moments": [[0, 1], [0, -1]]}', "[]", "{"):
        path.write_text(odd)
        assert str(path) in fails(capsys, "tts", "hi", "-o", tmp_path / "a.wav", *PAIR[:3], codec)


UNDECODABLE = "cannot decode"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "empty|no samples|cannot"), (b"just text\n" * 99, UNDECODABLE), (b"RIFF", UNDECODABLE)],
)
def test_bad_audio_is_one_line_and_leaves_no_file(capsys, tmp_path, content, complaint):
    recording = tmp_path / "bad.wav"
    recording.write_bytes(content)
    message = fails(capsys, "chat", recording, "-o", tmp_path / "reply.wav", *PAIR)
    assert any(part in message for part in complaint.split("|")), message
    assert list(tmp_path.iterdir()) == [recording]


OFFLINE = ["--cache-dir", "none", "--offline"]


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
        (["demo", "no.wav", "-o", "out"], "no.wav"),
        (["demo", "--text", " ", "-o", "out"], "no text to say"),
        (["demo", "-o", ".", *PAIR[:2], *OFFLINE], "Tokenizer is not in the cache"),
        (["verify", "--checkpoint", KIT / "checkpoint", "--golden", KIT / "audio"], "golden.json"),
        (["asr", AUDIO, "--device", "nonsense", *PAIR], "nonsense"),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert complaint in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        "",
        "sing",
        "tts",
        "tts Hi.",
        "tts Hi. -o /nowhere/a.wav",
        "tts Hi. -o /",
        "tts Hi. -o a.wav --max-tokens 0",
        "tts Hi. -o a.wav --dtype int3",
        "init-checkpoint x --preset 70b",
    ],
)
def test_bad_usage_exits_with_2(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main(command.split())
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
    arguments = ["continue", str(AUDIO), "-o", str(tmp_path / "a.wav"), "--seed", "0", *PAIR]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"MIMO_FAST_KERNELS": "torch"}
    command = [sys.executable, "-m", "mimo_fast", *arguments]
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
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
