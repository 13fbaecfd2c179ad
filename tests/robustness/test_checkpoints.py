"""Checkpoints whose config, index, weights or tokenizer somebody has changed."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations as m
import odd_tokenizers
import pytest
from pairs import (
    GROUPS,
    KIT,
    SECOND,
    Bystander,
    Files,
    answer,
    check_speech,
    copy_kit,
    read_files,
    special_file,
    write_files,
)
from safetensors.torch import load, save
from trials import Case, Note, check

COUNT, CHUNKS, SECONDS = 1300, 2, 30

pytestmark = pytest.mark.slow

CONFIGS = ("lm/config.json", "codec/config.json")
TOKENIZER = ("lm/tokenizer.json", "lm/tokenizer_config.json", "lm/special_tokens_map.json")
INDEX = "lm/model.safetensors.index.json"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_foreign_checkpoint_loads_or_is_refused(chunk: int, tmp_path: Path) -> None:
    check("checkpoints", COUNT, CHUNKS, chunk, tmp_path)


def config_changed(files: Files, rng: random.Random) -> str:
    name = rng.choice(CONFIGS)
    return _json_changed(files, name, rng, outer=0.8)


def tokenizer_changed(files: Files, rng: random.Random) -> str:
    how = rng.randrange(10)
    if how == 0:
        return "vocab.json and merges.txt, " + _vocabulary_changed(files, rng)
    if how < 5:
        tree, what = odd_tokenizers.replaced(json.loads(_bytes(files, TOKENIZER[0])), rng)
        files[TOKENIZER[0]] = json.dumps(tree).encode()
        return what
    name = rng.choice([name for name in TOKENIZER if name in files])
    return _json_changed(files, name, rng)


def _vocabulary_changed(files: Files, rng: random.Random) -> str:
    """Without tokenizer.json, the vocabulary is read from other files."""
    tokenizer = json.loads(_bytes(files, TOKENIZER[0]))
    del files[TOKENIZER[0]]
    model = tokenizer["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    files["lm/vocab.json"] = json.dumps(model["vocab"]).encode()
    files["lm/merges.txt"] = "\n".join(["#version: 0.2", *merges]).encode()
    if rng.random() < 0.5:
        return _json_changed(files, "lm/vocab.json", rng)
    # It asks for code of its own, as `trust_remote_code` would run it.
    for name in (CONFIGS[0], TOKENIZER[1]):
        tree = json.loads(_bytes(files, name))
        tree["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None], "AutoConfig": "code.Config"}
        tree["tokenizer_class"] = rng.choice(["CodeTokenizer", "Qwen2Tokenizer", None])
        tree["model_type"] = rng.choice(["qwen2", "mimo_audio", None])
        files[name] = json.dumps(tree).encode()
    files["lm/code.py"] = b"raise SystemExit('the code of the checkpoint was run')"
    return "code of its own"


def _json_changed(files: Files, name: str, rng: random.Random, outer: float = 0.3) -> str:
    text = _bytes(files, name).decode()
    if rng.random() < 0.15:
        files[name], what = m.json_text(text, rng)
        return f"{name} {what}"
    tree, said = json.loads(text), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        tree, what = m.json_tree(tree, rng, 1 if rng.random() < outer else None)
        said.append(what)
        if not isinstance(tree, dict):
            break
    files[name] = json.dumps(tree).encode()
    return f"{name}: {'; '.join(said)}"


def weights_changed(files: Files, rng: random.Random) -> str:
    name = rng.choice([name for name in files if name.endswith(".safetensors")])
    files[name], what = m.safetensors_file(_bytes(files, name), rng)
    return f"{name}: {what}"


def index_changed(files: Files, rng: random.Random) -> str:
    """The weights in two files with an index, which somebody has changed."""
    tensors = load(_bytes(files, "lm/model.safetensors"))
    del files["lm/model.safetensors"]
    table, names = {}, [*tensors]
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{i}.safetensors"
        files[f"lm/{shard}"] = save({each: tensors[each] for each in part})
        table |= dict.fromkeys(part, shard)
    files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": table}).encode()
    how = rng.randrange(6)
    if how == 0:
        return "shards, " + weights_changed(files, rng)
    if how == 1:
        del files["lm/model-1.safetensors"]
        return "a shard is missing"
    if how == 2:
        odd = [
            "../codec/model.safetensors",
            "/dev/zero",
            "",
            ".",
            "..",
            "config.json",
            "\0",
            "a\nb",
        ]
        name = rng.choice(odd)
        table[names[0]] = name
        files[INDEX] = json.dumps({"weight_map": table}).encode()
        return f"a shard is called {name!r}"
    return _json_changed(files, INDEX, rng)


def files_changed(files: Files, rng: random.Random) -> str:
    """A file is missing, of the other part, or no file at all."""
    name = rng.choice([*files])
    how = rng.randrange(4)
    if how == 0:
        del files[name]
        return f"no {name}"
    if how == 1:
        other = rng.choice([*files])
        files[name] = files[other]
        return f"{name} is {other}"
    if how == 2:
        files["lm/" + rng.choice(["a.safetensors", "model.bin", "model.SAFETENSORS"])] = b"x"
        return "one file more"
    files[name], what = special_file(rng)
    return f"{name} is {what}"


def _bytes(files: Files, name: str) -> bytes:
    content = files[name]
    assert isinstance(content, bytes)
    return content


CHANGES: tuple[Callable[[Files, random.Random], str], ...] = (
    *(config_changed, config_changed, config_changed, weights_changed, weights_changed),
    *(tokenizer_changed, tokenizer_changed, index_changed, files_changed),
)


def prepare(folder: Path) -> Case:
    import mimo_fast
    from mimo_fast.checkpoint.embedded import NANO
    from mimo_fast.quantization import import_checkpoint, quantize_checkpoint

    bystander = Bystander()
    copy_kit(folder / "kit")
    shutil.copytree(NANO, folder / "nano", copy_function=shutil.copyfile)
    for form in ("int4", "int8"):
        shutil.copytree(KIT / "codec", folder / form / "codec", copy_function=shutil.copyfile)
        quantize_checkpoint(KIT / "lm", folder / form / "lm", form, progress=False)
    names = ["kit"] * 8 + ["int4"] * 2 + ["int8", "nano"]
    originals = {name: read_files(folder / name) for name in {*names}}

    def case(rng: random.Random, note: Note) -> None:
        name = rng.choice(names)
        files = dict(originals[name])
        what = rng.choice(CHANGES)(files, rng)
        note(f"{name}: {what}")
        changed = folder / "changed"
        write_files(files, originals[name], folder / name, changed)
        options: dict[str, Any] = {"max_batch": 1}
        if rng.random() < 0.5:
            options["max_seq_len"] = GROUPS
        with bystander.watched(rng):
            if rng.random() < 0.05:
                shutil.rmtree(folder / "out", ignore_errors=True)
                convert = rng.choice([quantize_checkpoint, import_checkpoint])
                convert(changed / "lm", folder / "out", "int8", progress=False)
            model = mimo_fast.load(changed / "lm", changed / "codec", device="cpu", **options)
            answer(model)
            check_speech([*model.stream("asr", SECOND, seed=1, max_new_tokens=2)])
            check_speech([*model.stream("spoken_dialogue", SECOND, seed=1, max_new_tokens=3)])

    return case
