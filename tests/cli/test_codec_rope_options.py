"""The codec as shipped on the command line: `verify` of its kit, and what `info` says of it."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from helpers import KIT, KIT_PAIR, PAIR, kit_config
from safetensors.torch import load_file, save_file
from test_cli import fails, run, runs

from mimo_fast.config import CodecConfig, read_json
from mimo_fast.runtime.loading import describe_rope
from mimo_fast.testing import parity

SHIPPED = ("verify", "--checkpoint", KIT / "checkpoint", "--golden", KIT / "shipped")


def failed(out: str) -> list[str]:
    """Stages that a `verify` calls failed."""
    return [line.split()[0] for line in out.splitlines() if "FAILED" in line]


def test_verify_passes_on_the_codec_as_shipped(capsys):
    out, err = runs(capsys, *SHIPPED)
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["codes", "codec"]
    assert "all 7 golden tensors within bounds" in err
    assert "bfloat16 rotary frequencies" in err
    code, out, _ = run(capsys, *SHIPPED, "--codec-rope", "exact")
    assert code == 1
    assert failed(out) == ["codes", "codec"]


@pytest.mark.parametrize(
    ("name", "place", "add", "stage"),
    [
        ("wav_dec8.2", (1,), 0.02, "codec"),
        pytest.param("codes.3", (11, 1000), 1, "codes", marks=pytest.mark.slow),
    ],
)
def test_verify_notices_altered_truth(capsys, tmp_path, name, place, add, stage):
    (tmp_path / "audio").symlink_to(KIT / "audio")
    tensors = load_file(KIT / "shipped" / "codec.safetensors")
    tensors[name][place] += add
    save_file(tensors, tmp_path / "codec.safetensors")
    code, out, _ = run(capsys, *SHIPPED[:-1], tmp_path)
    assert code == 1
    assert failed(out) == [stage]


def test_recordings_of_the_shipped_kit_are_told_by_their_lengths(capsys, tmp_path):
    """Whatever they are called, and beside the checkpoint where they are not beside the kit."""
    (tmp_path / "kit").mkdir()
    (tmp_path / "audio").mkdir()
    shutil.copytree(KIT / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "kit" / "codec.safetensors").symlink_to(KIT / "shipped" / "codec.safetensors")
    for name, path in zip("bca", sorted((KIT / "audio").glob("*.wav")), strict=True):
        (tmp_path / "audio" / f"{name}.wav").symlink_to(path)
    arguments = ("verify", "--checkpoint", tmp_path / "checkpoint", "--golden")
    runs(capsys, *arguments, tmp_path / "kit")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kit").symlink_to(tmp_path / "kit")
    runs(capsys, *arguments, tmp_path / "elsewhere" / "kit")
    (tmp_path / "audio" / "a.wav").unlink()
    assert "holds 2 recordings" in fails(capsys, *arguments, tmp_path / "kit")


def test_a_golden_folder_states_its_frequencies(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "STAGES", {"codes": parity.STAGES["codes"]})
    shutil.copytree(KIT, tmp_path / "kit")
    meta = tmp_path / "kit" / "golden" / "golden.json"
    stated = json.loads(meta.read_text())
    arguments = ("verify", "--checkpoint", KIT / "checkpoint", "--golden", tmp_path / "kit")
    meta.write_text(json.dumps(stated | {"rope_frequencies": "bfloat16"}))
    code, out, _ = run(capsys, *arguments)
    assert code == 1
    assert failed(out) == ["codes"]
    assert run(capsys, *arguments, "--codec-rope", "exact")[0] == 0
    meta.write_text(json.dumps(stated | {"rope_frequencies": "float8"}))
    assert "'rope_frequencies' must be exact or bfloat16, not 'float8'" in fails(capsys, *arguments)


def test_info_says_which_rotary_frequencies_and_why(capsys, tmp_path):
    def line(*options: object) -> str:
        out, _ = runs(capsys, "info", *options)
        return next(line for line in out.splitlines() if line.startswith("  rope"))

    assert "exact frequencies, as its config states" in line()
    assert "rounded to bfloat16, as asked" in line("--codec-rope", "bfloat16")
    assert "exact frequencies, as nothing is stated and its dimensions" in line(*PAIR)
    shutil.copytree(KIT_PAIR[1], tmp_path / "codec")
    config = tmp_path / "codec" / "config.json"
    config.write_text(json.dumps(kit_config("codec") | {"rope_frequencies": "bfloat16"}))
    assert "rounded to bfloat16, as its config states" in line(*PAIR[:3], tmp_path / "codec")


def test_info_knows_the_published_codec_by_its_dimensions(tmp_path):
    raw = read_json(Path(str(files("mimo_fast") / "presets" / "7b-codec.json")))
    del raw["rope_frequencies"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = describe_rope(tmp_path, CodecConfig.from_dict(raw), None)
    assert found.startswith("frequencies rounded to bfloat16, as upstream runs the published codec")
