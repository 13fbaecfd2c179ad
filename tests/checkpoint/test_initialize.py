"""Random checkpoints: complete, repeatable, able to speak, and careful with the disk."""

import errno
import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import fault
from safetensors.torch import load_file

import mimo_fast
from mimo_fast.checkpoint import initialize
from mimo_fast.checkpoint.files import open_weights, write_checkpoint
from mimo_fast.checkpoint.initialize import TOKEN_IDS, init_checkpoint
from mimo_fast.checkpoint.layout import codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig, read_json
from mimo_fast.errors import CheckpointError
from mimo_fast.text.tokenizer import Tokenizer

PRESETS = Path(initialize.__file__).parents[1] / "presets"
GIB = 2**30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("random") / "new" / "tiny"
    assert init_checkpoint(directory) == (directory / "lm", directory / "codec")
    return directory


@pytest.fixture(scope="module")
def talker(tiny) -> mimo_fast.MimoAudio:
    return mimo_fast.load(tiny / "lm", tiny / "codec", device="cpu")


def test_tensors_and_configs_match(tiny, kit):
    for part, config, shapes in (("lm", LMConfig, lm_shapes), ("codec", CodecConfig, codec_shapes)):
        raw = read_json(tiny / part / "config.json")
        of_kit = read_json(kit / "checkpoint" / part / "config.json")
        assert raw == of_kit | {"torch_dtype": "float32"}
        weights = open_weights(tiny / part)
        weights.validate(shapes(config.from_dict(raw)))
        assert all(weights.dtype(name) == torch.float32 for name in weights.names())


def test_the_published_dimensions():
    lm = LMConfig.from_dict(read_json(PRESETS / "7b-lm.json"))
    codec = CodecConfig.from_dict(read_json(PRESETS / "7b-codec.json"))
    backbone = lm.backbone
    assert (backbone.layers, backbone.dim, backbone.kv_heads) == (36, 4096, 8)
    assert lm.vocab_size == 151680
    assert (lm.patch_decoder.layers, lm.patch_decoder.head_dim) == (16, 16)
    assert lm.patch_encoder.layers == 6
    assert (codec.dim, codec.encoder_layers, codec.vocoder_layers) == (1280, 32, 16)
    assert codec.codebook_sizes == (1024, 1024, *[128] * 18)
    assert lm.code_sizes == (1025, 1025, *[129] * 6)


def test_every_preset_file_is_used():
    names = {f"{preset}-{part}.json" for preset in TOKEN_IDS for part in ("lm", "codec")}
    assert {path.name for path in PRESETS.iterdir()} == names


def test_values_depend_on_the_seed_alone(tiny, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        init_checkpoint(tmp_path / name, seed=seed)
    for part in ("lm", "codec"):
        directories = (tiny / part, tmp_path / "same" / part, tmp_path / "other" / part)
        here, same, other = (load_file(path / "model.safetensors") for path in directories)
        assert all(torch.equal(here[name], same[name]) for name in here)
        random = [name for name in here if here[name].unique().numel() > 1 and "window" not in name]
        assert len(random) > len(here) // 2
        assert not any(torch.equal(here[name], other[name]) for name in random)


def test_tensors_differ_from_each_other(tiny):
    weights = load_file(tiny / "lm" / "model.safetensors")
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up")]
    values = torch.stack([weights[name].flatten() for name in names])
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.1


def test_values_are_the_same_in_shards_and_pieces(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(initialize, "PIECE", 1024)
    in_shards = functools.partial(write_checkpoint, shard_bytes=10**5)
    monkeypatch.setattr(initialize, "write_checkpoint", in_shards)
    _, codec = init_checkpoint(tmp_path / "sharded")
    assert len(list(codec.glob("*.safetensors"))) > 5
    sharded, whole = open_weights(codec), open_weights(tiny / "codec")
    assert all(torch.equal(sharded.get(name), whole.get(name)) for name in whole.names())


def test_scales(tiny):
    lm, codec = (load_file(tiny / part / "model.safetensors") for part in ("lm", "codec"))
    window = codec["decoder.vocoder.head.istft.window"]
    assert torch.equal(window, torch.hann_window(960, periodic=True))
    for weights in (lm, codec):
        vectors = {name: values for name, values in weights.items() if values.ndim == 1}
        gains = [x for name, x in vectors.items() if "norm" in name and "weight" in name]
        assert all((gain == 1).all() for gain in gains)
    assert codec["encoder.conv1.bias"].abs().max() < 0.1
    widths = {"model.layers.0.mlp.down_proj.weight": 96, "speech_group_downcast.weight": 192}
    for name, size in widths.items():
        assert lm[name].std() == pytest.approx(size**-0.5, rel=0.05)
    assert lm["speech_embeddings.0.weight"][64].std() > 0.5, "empty rows are random, too"


def test_dtype_may_be_chosen(tiny, tmp_path):
    lm, codec = init_checkpoint(tmp_path / "half", dtype=torch.bfloat16)
    for part in (lm, codec):
        assert read_json(part / "config.json")["torch_dtype"] == "bfloat16"
        half, full = open_weights(part), open_weights(tiny / part.name)
        assert all(torch.equal(half.get(name), full.get(name).bfloat16()) for name in full.names())


def test_tokenizer_of_the_tiny_preset(tiny):
    tokenizer = Tokenizer.from_directory(tiny / "lm")
    tokenizer.check_vocab(448)
    for token, i in TOKEN_IDS["tiny"].items():
        assert tokenizer.id(token) == i
        assert tokenizer.encode(f"a{token}")[1:] == [i]
    ends = [tokenizer.id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert [tokenizer.eos_id, tokenizer.pad_id] == ends
    for text in ("It's 12:30.\n", "今天天气真好", "😀\x00\t"):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert max(ids) < 256
        assert tokenizer.decode(ids) == text


def test_tokenizer_of_the_7b_preset(tmp_path):
    raw = read_json(PRESETS / "7b-lm.json")
    initialize.write_tokenizer(tmp_path, raw, TOKEN_IDS["7b"])
    tokenizer = Tokenizer.from_directory(tmp_path)
    tokenizer.check_vocab(raw["vocab_size"])
    special = tokenizer.special
    assert (special.pad, special.im_start, special.im_end) == (151643, 151644, 151645)
    assert special.eos == raw["eos_token_id"]
    names = ["sosp", "eosp", "empty", "human", "speech_lm", "sostm", "eostm", "eot"]
    assert [getattr(special, name) for name in names] == list(range(151665, 151673))
    assert tokenizer.decode(tokenizer.encode("北京<|empty|>")) == "北京<|empty|>"
    assert tokenizer.decode([5000, 151646]) == ""


@pytest.mark.parametrize("preset", TOKEN_IDS)
def test_transformers_reads_the_tokenizer_alike(preset, tmp_path):
    transformers = pytest.importorskip("transformers")
    raw = read_json(PRESETS / f"{preset}-lm.json")
    initialize.write_tokenizer(tmp_path, raw, TOKEN_IDS[preset])
    shutil.copyfile(PRESETS / f"{preset}-lm.json", tmp_path / "config.json")
    ours = Tokenizer.from_directory(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nIt's 12 e\u0301 北京<|empty|> <|eot|>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_recordings_give_varied_codes(talker, audio):
    for recording in audio:
        codes = talker.codec.encode(mimo_fast.load_audio(recording, talker.codec.sample_rate))
        assert min(row.unique().numel() for row in codes) >= 3
        assert sum(row.unique().numel() for row in codes) >= 6 * len(codes)


def test_the_tiny_preset_speaks_and_ends(talker):
    special, limit = talker.tokenizer.special, 300
    prompt = talker.get_tts_sft_prompt("It works.", template=0)
    stop = mimo_fast.MiMoStopper(talker.group_size, talker.audio_channels, [special.im_end])
    samplers = {f"{which}_sampler": x for which, x in talker.get_task_sampler("tts").items()}
    given = {"stopping_criteria": [stop], "max_new_tokens": limit, "seed": list(range(8))}
    replies = mimo_fast.generate(talker, [prompt] * 8, **given, **samplers)
    texts = [reply[0, prompt.shape[1] :: talker.group_size].tolist() for reply in replies]
    tokens = [token for text in texts for token in text if token != special.im_end]
    assert 0.7 < tokens.count(special.empty) / len(tokens) < 1, "usually audio, not always"
    assert sorted(len(text) for text in texts)[4] < limit, "most end by themselves"


def test_audio_of_the_tiny_preset_is_audible_and_bounded(talker):
    sizes = talker.codec.config.codebook_sizes[:8]
    codes = torch.stack([torch.randint(0, size, (50,)) for size in sizes])
    wav = talker.codec.decode(codes)
    assert torch.isfinite(wav).all()
    assert 0.01 < wav.square().mean().sqrt() < 0.5
    assert wav.abs().max() < 1


def test_the_directory_says_that_it_is_random(tiny):
    text = (tiny / "README.md").read_text()
    assert "Random weights" in text
    assert "biased towards speaking" in text
    assert "--preset tiny --seed 0" in text


def test_only_an_empty_directory_is_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    assert "is not an empty directory" in fault(lambda: init_checkpoint(tmp_path))
    assert "is not an empty directory" in fault(lambda: init_checkpoint(tmp_path / "mine.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert init_checkpoint(tmp_path / "empty", progress=False)[0].is_dir()


def test_an_unknown_preset(tmp_path):
    assert "'huge': use one of tiny, 7b" in fault(lambda: init_checkpoint(tmp_path, "huge"))


def test_the_disk_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(initialize.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * GIB))
    message = fault(lambda: init_checkpoint(tmp_path / "a" / "b", "7b"))
    assert "needs 17.34 GiB" in message
    assert "10.00 GiB free" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    draw, asked = initialize._draw, []

    def failing(shapes, seed, name):
        asked.append(name)
        if len(asked) == 100:
            raise error
        return draw(shapes, seed, name)

    monkeypatch.setattr(initialize, "_draw", failing)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        init_checkpoint(tmp_path / "new")
    assert not list(tmp_path.iterdir()), "the folder is whole or is not there"
