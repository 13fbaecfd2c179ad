"""Parts of a tokenizer.json that its library reads, and that nobody should meet."""

import random
import reprlib
from typing import Any

HUGE = (2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
PATTERNS: tuple[dict[str, str], ...] = (
    *(
        {"Regex": "(a+)+$"},
        {"Regex": "("},
        {"Regex": ""},
        {"Regex": "(?=.)"},
        {"Regex": ".{99999}"},
    ),
    *({"Regex": "(((((.{99}){99}){99}){99}){99})"}, {"String": ""}, {"String": "e"}, {}),
)


def replaced(tokenizer: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """A tokenizer.json with one part replaced by an odd one, and which that is."""
    parts = {
        "normalizer": _normalizer,
        "pre_tokenizer": _pre_tokenizer,
        "model": _model,
        "decoder": _decoder,
        "post_processor": _post_processor,
        "added_tokens": _added_tokens,
        "truncation": _truncation,
        "padding": _padding,
    }
    name = rng.choice([*parts])
    part = parts[name](tokenizer.get(name), rng)
    return {**tokenizer, name: part}, f"{name} {reprlib.repr(part)}"


def _normalizer(_: Any, rng: random.Random) -> Any:
    pattern = rng.choice(PATTERNS)
    content = rng.choice(["", "ee", "x" * 10**5])
    charsmap = rng.choice(["", "AAAA", "////", "é", "A" * 999])
    odd: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": pattern, "content": content},
        {"type": "Precompiled", "precompiled_charsmap": charsmap},
        {"type": "Prepend", "prepend": rng.choice(["", "x" * 10**6])},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "BertNormalizer"},
        {"type": "ByteLevel"},
    ]
    return _wrapped(rng.choice(odd), "normalizers", rng)


def _pre_tokenizer(_: Any, rng: random.Random) -> Any:
    behavior = rng.choice(["Removed", "Isolated", "MergedWithPrevious", "Contiguous", "x"])
    space = rng.choice(["", "▁", "ab"])
    pattern, inverted = rng.choice(PATTERNS), rng.random() < 0.5
    odd: list[dict[str, Any]] = [
        {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": inverted},
        {"type": "Metaspace", "replacement": space, "prepend_scheme": "first"},
        {"type": "CharDelimiterSplit", "delimiter": rng.choice(["", "e", "ab"])},
        {"type": "FixedLength", "length": rng.choice([0, 1, *HUGE])},
        {"type": "Digits", "individual_digits": None},
        {"type": "UnicodeScripts"},
        {"type": "Whitespace"},
    ]
    return _wrapped(rng.choice(odd), "pretokenizers", rng)


def _model(model: Any, rng: random.Random) -> Any:
    vocabulary = model["vocab"]
    names = [*vocabulary]
    odd: list[dict[str, Any]] = [
        {**model, "dropout": rng.choice([0.0, 0.5, 1.0, 2.0, -1.0])},
        {**model, "cache_capacity": rng.choice([0, *HUGE])},
        {**model, "merges": model["merges"] * 3 + model["merges"][::-1]},
        {**model, "merges": [["a", "nowhere"]]},
        {**model, "vocab": dict.fromkeys(names, 0)},
        {**model, "vocab": {name: 2**32 - 1 - i for i, name in enumerate(names)}},
        {**model, "vocab": {}},
        {**model, "unk_token": "nowhere", "fuse_unk": True, "byte_fallback": True},
        {**model, "continuing_subword_prefix": "é" * 9, "end_of_word_suffix": "é"},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": rng.choice([None, 0, 5, 2**63])},
        {"type": "Unigram", "vocab": [[n, rng.choice([0.0, -1e308])] for n in names], "unk_id": 0},
        {"type": "Unigram", "vocab": [], "unk_id": 0},
        {"type": "WordLevel", "vocab": vocabulary, "unk_token": "nowhere"},
        {
            "type": "WordPiece",
            "vocab": vocabulary,
            "unk_token": names[0],
            "continuing_subword_prefix": rng.choice(["", "##", "é"]),
            "max_input_chars_per_word": rng.choice([0, 100, *HUGE]),
        },
    ]
    return rng.choice(odd)


def _decoder(_: Any, rng: random.Random) -> Any:
    size = rng.choice([0, 1, 5, *HUGE])
    odd: list[dict[str, Any]] = [
        {"type": "Strip", "content": "e", "start": size, "stop": size},
        {"type": "Replace", "pattern": rng.choice(PATTERNS), "content": "x" * 1000},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "BPEDecoder", "suffix": ""},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return _wrapped(rng.choice(odd), "decoders", rng)


def _post_processor(_: Any, rng: random.Random) -> Any:
    token = rng.choice(["x", "<|endoftext|>"])
    special = {token: {"id": token, "ids": [rng.choice([0, *HUGE[:2]])], "tokens": [token]}}
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    odd: list[dict[str, Any]] = [
        {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special},
        {"type": "BertProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 0]},
        {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": True, "use_regex": False},
    ]
    return _wrapped(rng.choice(odd), "processors", rng)


def _added_tokens(tokens: Any, rng: random.Random) -> Any:
    token = {**rng.choice(tokens)}
    token |= rng.choice(
        [
            *({"content": text} for text in ("", " ", "e", "\0", "a" * 10**5, "<|empty|>")),
            *({"id": number} for number in (0, 5, *HUGE)),
            {
                "lstrip": True,
                "rstrip": True,
                "single_word": True,
                "normalized": True,
                "special": False,
            },
        ]
    )
    return rng.choice([[*tokens, token], [token], [token] * 1000, [*tokens[::-1]], []])


def _truncation(_: Any, rng: random.Random) -> Any:
    size, stride = rng.choice([0, 1, *HUGE]), rng.choice([0, 1, *HUGE])
    kind = {"direction": "Right", "strategy": "LongestFirst"}
    return {**kind, "max_length": size, "stride": stride}


def _padding(_: Any, rng: random.Random) -> Any:
    token = {"pad_id": 0, "pad_type_id": 0, "pad_token": "x", "direction": "Left"}
    multiple = rng.choice([None, 0, *HUGE])
    return {**token, "strategy": {"Fixed": rng.choice(HUGE)}, "pad_to_multiple_of": multiple}


def _wrapped(part: Any, name: str, rng: random.Random) -> Any:
    """The part, or a sequence of it."""
    if rng.random() < 0.7:
        return part
    return {"type": "Sequence", name: [part] * rng.choice([0, 1, 2, 1000])}
