"""The text tokenizer: ids and texts equal those of transformers, whatever tokens the files lack."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers import KIT_PAIR, fault
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mimo_fast.errors import CheckpointError, ConfigError, PromptError
from mimo_fast.text.tokenizer import MODEL_TOKENS, Tokenizer

LM = KIT_PAIR[0]
SPECIAL = ["<|sosp|>", "<|empty|>", "<|im_start|>user\n", "<|im_end|>\n", "<|eo", "|>"]
PLAIN = ["<think>\n\n</think>\n", " ", "  \n", "\t", "hello", "It's", " 1234.5"]
UNICODE = ["今天天气真好", "北京", "é", "e\u0301", "😀", "👩\u200d👧", "ﬁ", "\u202e", "\x00"]
WORDS = SPECIAL + PLAIN + UNICODE
FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=8).map("".join)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def with_model_tokens(theirs: Any) -> Any:
    """As upstream does: each token that the vocabulary lacks is added by itself."""
    for token in MODEL_TOKENS.values():
        if token not in theirs.get_vocab():
            theirs.add_tokens([token], special_tokens=True)
    return theirs


def assert_same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy of the kit's tokenizer, to be altered."""
    for path in LM.glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_directory(LM)


@pytest.fixture(scope="module")
def theirs() -> Any:
    # It takes tokenizer.json as it is; in transformers 5 AutoTokenizer replaces the pre-tokenizer.
    return PreTrainedTokenizerFast.from_pretrained(LM)


def test_special_ids_of_the_kit(ours, kit):
    want = read(kit / "golden" / "golden.json")["special_ids"]
    got = {name: getattr(ours.special, name.removesuffix("_idx")) for name in want}
    assert got == want
    assert ours.special.human == ours.id("<|Human|>")
    assert ours.special.speech_lm == ours.id("<|SpeechLM|>")
    assert (ours.eos_id, ours.pad_id) == (want["eos"], want["pad"])


@given(TEXTS)
def test_texts_equal_those_of_transformers(ours, theirs, text):
    assert_same(ours, theirs, text)


@given(st.lists(st.integers(0, 500), max_size=30))
def test_any_ids_decode_as_in_transformers(ours, theirs, ids):
    for skip in (False, True):
        want = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == want


NO_TOKENS = st.sampled_from([-100, -1, 413, 10**6, 2**32, 2**70, -(2**70)])


@given(st.lists(st.integers(0, 412) | NO_TOKENS, max_size=10))
def test_ids_that_are_no_token_decode_to_nothing(ours, ids):
    assert ours.decode(ids) == ours.decode([i for i in ids if 0 <= i < ours.vocab_size])


def test_special_tokens_in_a_text_are_single_ids(ours):
    special = ours.special
    assert ours.encode("<|sosp|><|empty|><|eosp|>") == [special.sosp, special.empty, special.eosp]
    assert ours.encode("") == []
    assert ours.decode([special.im_start, special.im_end]) == "<|im_start|><|im_end|>"
    assert ours.decode([special.im_start, special.im_end], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "absent", [[*MODEL_TOKENS.values()], ["<|eot|>"], ["<|empty|>", "<|sostm|>"]]
)
@pytest.mark.parametrize("listed", [True, False], ids=["config-lists-them", "config-lacks-them"])
def test_absent_model_tokens_are_added_as_upstream_does(directory, absent, listed):
    content, config = read(directory / "tokenizer.json"), read(directory / "tokenizer_config.json")
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in absent
    ]
    save(directory / "tokenizer.json", content)
    if not listed:
        decoder = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {
            i: token for i, token in decoder.items() if token["content"] not in absent
        }
        config["additional_special_tokens"] = []
        save(directory / "tokenizer_config.json", config)
    (directory / "special_tokens_map.json").unlink()
    ours = Tokenizer.from_directory(directory)
    theirs = with_model_tokens(PreTrainedTokenizerFast.from_pretrained(directory))
    for token in MODEL_TOKENS.values():
        assert ours.id(token) == theirs.convert_tokens_to_ids(token)
    assert ours.vocab_size == len(theirs)
    assert_same(ours, theirs, "a<|sosp|>b <|empty|> <|eot|>")


def test_tokens_of_the_config_only_are_added_in_the_order_of_their_ids(directory):
    config = read(directory / "tokenizer_config.json")
    flags = FLAGS | {"lstrip": True, "normalized": True}
    config["added_tokens_decoder"] |= {
        "900": {"content": "<later>"} | flags,
        "1000": {"content": "<last>"} | flags | {"lstrip": False, "special": True},
        "899": {"content": "<first>"} | flags | {"rstrip": True},
    }
    config["additional_special_tokens"] += ["<|extra|>"]
    save(directory / "tokenizer_config.json", config)
    ours = Tokenizer.from_directory(directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    for token, i in (("<first>", 413), ("<later>", 414), ("<last>", 415), ("<|extra|>", 416)):
        assert ours.id(token) == i == theirs.convert_tokens_to_ids(token)
    for text in ("a <first> b", "a <later> b", "a <last> b<|extra|>", "<later><|empty|>"):
        assert_same(ours, theirs, text)


def test_truncation_and_padding_in_the_file_are_ignored(directory, ours):
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=9, pad_id=401, pad_token="<|endoftext|>")
    library.save(str(directory / "tokenizer.json"))
    assert len(library.encode("a long enough text").ids) == 9
    altered = Tokenizer.from_directory(directory)
    for text in ("ab", "a long enough text"):
        assert altered.encode(text) == ours.encode(text)


@pytest.mark.parametrize("eos", ["<|im_start|>", {"content": "<|im_start|>", "lstrip": False}])
def test_eos_and_pad_come_from_the_config(directory, eos):
    config = read(directory / "tokenizer_config.json") | {"eos_token": eos, "pad_token": None}
    save(directory / "tokenizer_config.json", config)
    save(directory / "special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": "<think>"})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.eos_id == tokenizer.special.im_start == tokenizer.special.eos
    assert tokenizer.pad_id == tokenizer.id("<think>") == tokenizer.special.pad


def test_without_tokenizer_config(directory):
    (directory / "tokenizer_config.json").unlink()
    assert Tokenizer.from_directory(directory).eos_id == 400
    (directory / "special_tokens_map.json").unlink()
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("a<|empty|>")[-1] == 407
    assert "names no eos_token" in fault(lambda: tokenizer.special)


def test_a_text_with_half_a_surrogate_pair(ours):
    assert "position 2" in fault(lambda: ours.encode("ab\ud83dc"), PromptError)


def test_ids_that_are_wrong_are_named(ours):
    assert "<|nothing|>" in fault(lambda: ours.id("<|nothing|>"))
    ours.check_vocab(413)
    message = fault(lambda: ours.check_vocab(412))
    assert "'<|eot|>' has id 412" in message
    assert "vocab_size 412" in message


GIT_LFS = "version https://git-lfs.github.com/spec/v1\n"
ADDED = '{"added_tokens_decoder": %s}'


@pytest.mark.parametrize(
    ("name", "content", "says", "kind"),
    [
        ("tokenizer", "{", "tokenizer.json is damaged", CheckpointError),
        ("tokenizer", GIT_LFS, "tokenizer.json is damaged", CheckpointError),
        ("tokenizer_config", "[]", "tokenizer_config.json", ConfigError),
        ("tokenizer_config", ADDED % '{"a": {"content": "x"}}', "malformed", CheckpointError),
        ("tokenizer_config", ADDED % '{"1": {}}', "malformed", CheckpointError),
        ("tokenizer_config", ADDED % '["x"]', "malformed", CheckpointError),
        ("special_tokens_map", "", "special_tokens_map.json", ConfigError),
    ],
)
def test_damaged_files(directory, name, content, says, kind):
    (directory / f"{name}.json").write_text(content)
    assert says in fault(lambda: Tokenizer.from_directory(directory), kind)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """vocab.json and merges.txt alone, as of Qwen2, which normalises and splits digits."""
    directory = tmp_path_factory.mktemp("vocabulary")
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ", "1 2", "e Ì", "ä ½", "ä½ ł", "Ċ Ċ"]
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    save(directory / "vocab.json", {token: i for i, token in enumerate(tokens)})
    merges_file = "\n".join(["#version: 0.2", *merges, ""])
    (directory / "merges.txt").write_text(merges_file, encoding="utf-8")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    flags = FLAGS | {"special": True}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {
            str(i): {"content": name} | flags for i, name in enumerate(names, len(tokens))
        },
        "additional_special_tokens": names[1:],
        "clean_up_tokenization_spaces": False,
    }
    save(directory / "tokenizer_config.json", config)
    shutil.copyfile(LM / "config.json", directory / "config.json")
    return directory


def both(directory: Path) -> tuple[Tokenizer, Any]:
    theirs = with_model_tokens(AutoTokenizer.from_pretrained(directory))
    return Tokenizer.from_directory(directory), theirs


@pytest.fixture(scope="module")
def from_vocabulary(vocabulary) -> tuple[Tokenizer, Any]:
    return both(vocabulary)


@given(TEXTS | st.text("hello 12\n"))
def test_a_vocabulary_without_tokenizer_json(from_vocabulary, text):
    assert_same(*from_vocabulary, text)


def test_special_ids_of_a_vocabulary(from_vocabulary):
    ours, theirs = from_vocabulary
    assert ours.special.sosp == theirs.convert_tokens_to_ids("<|sosp|>")
    assert ours.special.eot == theirs.convert_tokens_to_ids("<|eot|>") == ours.vocab_size - 1
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)


@given(TEXTS | st.text("hello 12\n"))
def test_tokenizer_json_of_qwen2_equals_auto_tokenizer(saved, text):
    assert_same(*saved, text)


@pytest.fixture(scope="module")
def saved(vocabulary, tmp_path_factory) -> tuple[Tokenizer, Any]:
    directory = tmp_path_factory.mktemp("saved")
    AutoTokenizer.from_pretrained(vocabulary).save_pretrained(directory)
    shutil.copyfile(LM / "config.json", directory / "config.json")
    assert (directory / "tokenizer.json").is_file()
    return both(directory)


def test_a_vocabulary_needs_transformers(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = fault(lambda: Tokenizer.from_directory(vocabulary))
    assert "pip install mimo-fast[transformers]" in message


def test_a_damaged_vocabulary(vocabulary, tmp_path):
    shutil.copytree(vocabulary, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.json").write_text("{")
    assert "vocab.json" in fault(lambda: Tokenizer.from_directory(tmp_path))


def test_a_directory_without_tokenizer(tmp_path):
    assert "no tokenizer.json" in fault(lambda: Tokenizer.from_directory(tmp_path))
    (tmp_path / "vocab.json").write_text("{}")
    assert "merges.txt" in fault(lambda: Tokenizer.from_directory(tmp_path))
