"""Tokenizers of foreign checkpoints: the usual form loads, no file ends or stops the program."""

import builtins
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import KIT_PAIR, fault
from test_tokenizer import read, save, saved, vocabulary  # noqa: F401

from mimo_fast.checkpoint.embedded import NANO
from mimo_fast.errors import CheckpointError, MimoFastError
from mimo_fast.text import tokenizer_file
from mimo_fast.text.tokenizer import Tokenizer

LM = KIT_PAIR[0]


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy of the kit's tokenizer, to be altered."""
    for path in LM.glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def replace(directory: Path, **pieces: Any) -> None:
    path = directory / "tokenizer.json"
    save(path, read(path) | pieces)


@pytest.fixture
def tried(monkeypatch) -> list[Path]:
    """The files that were tried in a child process."""
    found = list[Path]()
    try_in_child = tokenizer_file.try_in_child
    monkeypatch.setattr(
        tokenizer_file,
        "try_in_child",
        lambda text, path: (found.append(path), try_in_child(text, path)),
    )
    return found


def test_the_usual_form_needs_no_child(tried, saved, tmp_path):  # noqa: F811
    for source in (LM, NANO / "lm", Path(saved[0]._source)):
        Tokenizer.from_directory(source)
    assert not tried


def test_the_published_form_needs_no_child(directory, tried):
    """Fields as Qwen2's tokenizer.json has them: NFC, its pattern, then bytes; merges as texts."""
    raw = read(directory / "tokenizer.json")
    merges = [" ".join(pair) for pair in raw["model"]["merges"]]
    blank = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    pattern = {"Regex": tokenizer_file.PATTERNS[1]}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    replace(
        directory,
        normalizer={"type": "NFC"},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]},
        post_processor=level,
        model=raw["model"] | {"merges": merges} | blank,
    )
    assert Tokenizer.from_directory(directory).encode("hello 12")
    assert not tried


def test_another_form_that_works_is_loaded(directory, tried):
    replace(directory, normalizer={"type": "Prepend", "prepend": "x"})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.decode(tokenizer.encode("hello")) == "xhello"
    assert tried


def nested(depth: int, kind: str) -> dict[str, Any]:
    piece: dict[str, Any] = {"type": "Nothing"}
    for _ in range(depth):
        piece = {"type": "Sequence", kind: [piece]}
    return piece


DOUBLING = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated"}

HURTS: dict[str, dict[str, Any]] = {
    "aborts while it loads": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    },
    "panics on some texts": {
        "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "b"}
    },
    "fills the memory": {"normalizer": {"type": "Sequence", "normalizers": DOUBLING}},
    "backtracks": {"pre_tokenizer": BACKTRACKING | {"invert": False}},
    "cuts into nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "nests decoders": {"decoder": nested(20, "decoders")},
    "nests normalizers": {"normalizer": nested(20, "normalizers")},
    "inserts a book": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "inserts a book for one letter": {
        "normalizer": {"type": "Replace", "pattern": {"String": "é"}, "content": "x" * 10**5}
    },
    "multiplies": {"normalizer": {"type": "Sequence", "normalizers": DOUBLING[:9]}},
    "is of another kind": {"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]]}},
}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=pytest.mark.slow if how == "fills the memory" else ())
        for how in HURTS
    ],
)
def test_a_file_that_hurts_the_library_is_refused(directory, monkeypatch, how):
    if how == "fills the memory":
        monkeypatch.setattr(tokenizer_file, "TRIAL_SECONDS", 5)
    replace(directory, **HURTS[how])
    message = fault(lambda: Tokenizer.from_directory(directory))
    assert "tokenizer.json is damaged" in message
    assert len(message) < 600


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@pytest.mark.parametrize(
    "pieces",
    [
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [LEVEL] * 3}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 30}},
        {"added_tokens": [{"id": 0, "content": "x"}] * 10_001},
    ],
)
def test_more_of_the_usual_than_anybody_needs_is_tried_first(pieces):
    tree = read(LM / "tokenizer.json")
    assert tokenizer_file.is_usual(tree)
    assert not tokenizer_file.is_usual(tree | pieces)


def test_the_trial_takes_no_module_from_the_working_directory(directory, monkeypatch):
    (directory / "tokenizers.py").write_text("raise SystemExit('foreign code')")
    monkeypatch.chdir(directory)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # where somebody may have put "."
    replace(directory, normalizer={"type": "Prepend", "prepend": "x"})
    assert Tokenizer.from_directory(directory).encode("hello")


def test_a_file_that_takes_for_ever_is_refused(directory, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "TRIAL", "import time\ntime.sleep(60)")
    monkeypatch.setattr(tokenizer_file, "TRIAL_SECONDS", 0.2)
    replace(directory, **HURTS["backtracks"])
    assert "is not done after 0.2 s" in fault(lambda: Tokenizer.from_directory(directory))


def test_a_padding_of_any_size_is_left_out(directory, tried):
    padding = {"strategy": {"Fixed": 10**15}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    replace(directory, padding=padding)
    assert Tokenizer.from_directory(directory).encode("a") == Tokenizer.from_directory(LM).encode(
        "a"
    )


TEXTS = {
    b"[" * 100_000: "nested too deeply",
    b'"' + b"x" * 100_000 + b'"': "holds a str",
    b'{"model": 1, "model": 2}': "given twice",
    b"\xff\xfe": "not valid JSON",
}


@pytest.mark.parametrize(("content", "says"), TEXTS.items())
def test_a_file_that_is_no_json_object(directory, content, says):
    (directory / "tokenizer.json").write_bytes(content)
    message = fault(lambda: Tokenizer.from_directory(directory))
    assert says in message
    assert len(message) < 600


MALFORMED: list[dict[str, Any]] = [
    {"trained_words": [["may"]]},
    {"trained_words": "may"},
    {"trained_words": {"may": 1}},
    {"additional_special_tokens": "abc"},
    {"additional_special_tokens": [1]},
    {"extra_special_tokens": {"a": [1]}},
    {"eos_token": ["<|im_end|>"]},
    {"added_tokens_decoder": {"900": {"content": 1}}},
    {"added_tokens_decoder": {str(i): {"content": f"<{i}>"} for i in range(20_000)}},
]


@pytest.mark.parametrize("changes", MALFORMED, ids=lambda changes: next(iter(changes)))
def test_a_config_with_odd_tokens(directory, changes):
    path = directory / "tokenizer_config.json"
    save(path, read(path) | changes)
    assert "malformed" in fault(lambda: Tokenizer.from_directory(directory))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_fifo_is_not_opened(directory, name):
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert "it is a FIFO" in fault(lambda: Tokenizer.from_directory(directory), MimoFastError)


class TestAVocabularyAlone:
    @pytest.fixture
    def folder(self, vocabulary, tmp_path) -> Path:  # noqa: F811
        shutil.copytree(vocabulary, tmp_path, dirs_exist_ok=True)
        return tmp_path

    @pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "TheirTokenizer"])
    def test_its_code_is_not_run_and_nobody_is_asked(self, folder, monkeypatch, kind):
        def asked(*_: object) -> str:
            raise AssertionError("a question on stdin")

        monkeypatch.setattr(builtins, "input", asked)
        for name in ("config.json", "tokenizer_config.json"):
            raw = read(folder / name) | {"tokenizer_class": kind}
            raw["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None], "AutoConfig": "code.C"}
            save(folder / name, raw)
        (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
        with suppress(CheckpointError):
            assert Tokenizer.from_directory(folder).encode("hello")
        assert not (folder / "ran").exists()

    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json"])
    def test_a_fifo_is_not_opened(self, folder, name):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        assert fault(lambda: Tokenizer.from_directory(folder))


def test_a_trial_sees_the_same_text_as_this_process(directory, tried, monkeypatch):
    """What is loaded is what was tried, not what the file holds a moment later."""
    replace(directory, normalizer={"type": "Prepend", "prepend": "x"})
    tried_text = list[str]()
    monkeypatch.setattr(
        tokenizer_file,
        "try_in_child",
        lambda text, path: (tried_text.append(text), path.write_text("{}")),
    )
    assert Tokenizer.from_directory(directory).encode("a")
    assert json.loads(tried_text[0])["normalizer"] == {"type": "Prepend", "prepend": "x"}
