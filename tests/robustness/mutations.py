"""Mutators: pure functions of (data, rng) that return other data.

Those of bytes know nothing of a format; those of JSON change one place of a tree; those of
safetensors rebuild the header, so that a change gets past the parser's first checks.
"""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]

INTEGERS = (
    *(0, 1, 2, 3, 7, 8, 9, 16, 255, 256, 1000, 44100, 65535, 65536),
    *(2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1),
)


def odd_json(rng: random.Random) -> Any:
    """A value that JSON can hold, of any type and range."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([None, True, False, {}, [], "", [[]], [{}], {"": None}])
    if kind == 1:
        return rng.choice([0, 1, 2, 3, 5, 7, 64, 128, 1000, 4097, 2**15, -1, -2, -(2**31)])
    if kind == 2:
        return rng.choice([10**6, 10**9, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -(2**63)])
    if kind == 3:
        return rng.choice([0.0, -0.0, 0.5, 1.5, -1.5, 1e-45, 1e38, 1e308, -1e308])
    if kind == 4:
        return rng.choice([float("nan"), float("inf"), float("-inf")])
    if kind == 5:
        texts = ["x", "1", "-1", "0-1-2", "-", "1-", "nan", "default", "../x", "/dev/zero", "\0"]
        return rng.choice([*texts, "\ud800", "日本語", "😀", "a\nb", "0-" * 1000 + "0", "é" * 5000])
    if kind == 6:
        size = rng.choice([1, 2, 3, 8, 1000])
        return [odd_json(rng) for _ in range(size)] if size < 4 else [rng.randrange(9)] * size
    if rng.random() < 0.3:
        return nested(rng.choice([10, 200, 500]), rng)
    names = ("type", "rope_type", "content", "id", "0", "data", "x")
    return {rng.choice(names): odd_json(rng) for _ in range(rng.randrange(1, 4))}


def nested(depth: int, rng: random.Random) -> Any:
    value: Any = 0
    wrap: Callable[[Any], Any] = (lambda x: [x]) if rng.random() < 0.5 else (lambda x: {"a": x})
    for _ in range(depth):
        value = wrap(value)
    return value


def near(value: Any, rng: random.Random) -> Any:
    """A value of the same type, not far from this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, value // 2, -value, value * 10**6])
    if isinstance(value, float):
        return rng.choice([value * 2, -value, value / 1e30, value * 1e30, float("nan")])
    if isinstance(value, str):
        return rng.choice([value.upper(), value[:-1], value + "x", value[::-1], value * 2])
    if isinstance(value, list) and value:
        return rng.choice([value[:-1], value + value[-1:], value[::-1], value * 3, [value]])
    return odd_json(rng)


def place(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    """(container, key) of a node, found by walking down: a long list is no likelier than a short
    one."""
    while True:
        key = rng.choice([*tree] if isinstance(tree, dict) else [*range(len(tree))])
        inner = tree[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return tree, key
        tree = inner


def json_tree(tree: Any, rng: random.Random, depth: int | None = None) -> tuple[Any, str]:
    """A copy with one place changed, and what was changed. depth: 1 changes the outermost only."""
    tree = json.loads(json.dumps(tree))
    if not isinstance(tree, dict | list) or not tree:
        return odd_json(rng), "the whole"
    if depth == 1:
        keys = [*tree] if isinstance(tree, dict) else [*range(len(tree))]
        node, key = tree, rng.choice(keys)
    else:
        node, key = place(tree, rng)
    before = node[key]
    how = rng.randrange(10)
    if how < 5:
        node[key] = odd_json(rng)
    elif how < 7:
        node[key] = near(before, rng)
    elif how == 7:
        del node[key]
        return tree, f"{key!r} deleted"
    elif how == 8 and isinstance(node, dict):
        node[str(odd_json(rng))[:50]] = node.pop(key)
        return tree, f"{key!r} renamed"
    else:
        other, name = place(tree, rng)
        node[key] = json.loads(json.dumps(other[name]))
    return tree, f"{key!r}: {shown(before)} -> {shown(node[key])}"


def shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 60 else text[:57] + "..."


def json_text(text: str, rng: random.Random) -> tuple[bytes, str]:
    """The bytes of a JSON file, damaged as text."""
    data = text.encode()
    cuts = [
        (lambda: b"", "empty"),
        (lambda: data[: rng.randrange(len(data) + 1)], "truncated"),
        (lambda: b"\xef\xbb\xbf" + data, "with a byte order mark"),
        (lambda: text.encode("utf-16"), "in UTF-16"),
        (lambda: data + b"\xff\xfe", "with bytes that are not UTF-8"),
        (lambda: b"[" * 100_000, "of 100,000 brackets"),
        (lambda: b'{"a":' * 100_000, "of 100,000 objects"),
        (lambda: data.replace(b": ", b": " + b"[" * 100_000, 1), "with 100,000 brackets in it"),
        (lambda: b"[" + data + b"]", "in a list"),
        (lambda: b"null", "null"),
        (lambda: b'"' + b"x" * 100_000 + b'"', "a long string"),
        (lambda: data.replace(b":", b": 1" + b"0" * 5000 + b', "z":', 1), "with 10**5000"),
        (lambda: flip(data, rng), "with bits flipped"),
        (lambda: data.replace(b"{", b"{ // comment\n", 1), "with a comment"),
        (lambda: b"\0" * 64, "of zeros"),
        (lambda: data + data, "twice"),
    ]
    make, what = rng.choice(cuts)
    return make(), what


# Bytes


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bits, mostly near the beginning."""
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16, 64])):
        changed[_position(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A run of bytes becomes zeros, ones, or chance."""
    at, size = _position(data, rng), rng.choice([1, 2, 4, 8, 32, 200])
    fill = rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size)])
    return data[:at] + fill[: len(data) - at] + data[at + size :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: _position(data, rng)]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = _position(data, rng)
    return data[:at] + rng.randbytes(rng.choice([1, 2, 3, 4, 16, 100])) + data[at:]


def delete(data: bytes, rng: random.Random) -> bytes:
    at = _position(data, rng)
    return data[:at] + data[at + rng.choice([1, 2, 4, 8, 50, 500]) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """A part of it again, somewhere else."""
    begin, at = _position(data, rng), _position(data, rng)
    part = data[begin : begin + rng.choice([4, 16, 100, 1000])]
    return data[:at] + part * rng.choice([1, 1, 2, 20]) + data[at:]


def integer(data: bytes, rng: random.Random) -> bytes:
    """A number of 1 to 8 bytes, in either order, becomes a remarkable one."""
    at, size = _position(data, rng), rng.choice([1, 2, 4, 4, 8])
    value = rng.choice(INTEGERS) % 2 ** (8 * size)
    order = "big" if rng.random() < 0.5 else "little"
    return data[:at] + value.to_bytes(size, order)[: len(data) - at] + data[at + size :]


def garbage(data: bytes, rng: random.Random) -> bytes:
    """Something else, in front of it, after it, or in its place."""
    chance = rng.randbytes(rng.choice([0, 1, 12, 44, 1000]))
    return rng.choice([chance, chance + data, data + chance, bytes(len(data)), data[:4] + chance])


BYTES: tuple[Mutator, ...] = (
    *(flip, overwrite, truncate, insert, delete, repeat, integer, integer, garbage),
)


def _position(data: bytes, rng: random.Random) -> int:
    """Anywhere, but every other time in the first 80 bytes: there are the sizes."""
    size = max(1, len(data))
    return rng.randrange(min(size, 80) if rng.random() < 0.5 else size)


# Audio


def wav_field(data: bytes, rng: random.Random) -> bytes:
    """A field of a canonical WAV header: sizes, format tag, channels, rates, widths."""
    fields = {4: 4, 16: 4, 20: 2, 22: 2, 24: 4, 28: 4, 32: 2, 34: 2, 36: 4, 40: 4}
    at, size = rng.choice([*fields.items()])
    tags = (1, 2, 3, 6, 7, 0x11, 0x31, 0x50, 0x55, 0x64, 0xFFFE)
    value = rng.choice([*INTEGERS, *tags, -1]) % 2 ** (8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def float_samples(data: bytes, rng: random.Random) -> bytes:
    """Samples that are not finite, or huge."""
    at = max(44, len(data) - 4 * rng.randrange(1, 200))
    value = rng.choice([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45])
    return data[:at] + struct.pack("<f", value) * rng.choice([1, 50]) + data[at + 4 :]


def riff_chunk(data: bytes, rng: random.Random) -> bytes:
    """Another chunk in front of the samples, whose size may be a lie."""
    names = (b"LIST", b"fact", b"cue ", b"smpl", b"bext", b"PEAK", b"data", b"fmt ", b"\0\0\0\0")
    body = rng.randbytes(rng.choice([0, 1, 4, 24, 100]))
    size = rng.choice([len(body), len(body), *INTEGERS]) % 2**32
    at = rng.choice([12, 36])
    return data[:at] + rng.choice(names) + struct.pack("<I", size) + body + data[at:]


def flac_field(data: bytes, rng: random.Random) -> bytes:
    """STREAMINFO: block sizes, frame sizes, rate, channels, width, length; or a block's length."""
    at = rng.choice([4, 5, 6, 7, 8, 10, 12, 15, 18, 19, 20, 21, 22, 25, 26])
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def id3_tag(data: bytes, rng: random.Random) -> bytes:
    """A tag in front of it, as MP3 files have them; its size may be a lie."""
    body = rng.randbytes(rng.choice([0, 10, 300]))
    size = rng.choice([len(body), 0, 2**28 - 1, 1000])
    packed = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3" + bytes([rng.randrange(6), 0, rng.choice([0, 0x80, 0x40])]) + packed + body + data


def ogg_sums(data: bytes) -> bytes:
    """The same pages with right checksums, so that a decoder gets to see what was changed."""
    changed, at = bytearray(data), data.find(b"OggS")
    while at >= 0 and at + 27 <= len(data):
        segments = data[at + 26]
        end = at + 27 + segments + sum(data[at + 27 : at + 27 + segments])
        changed[at + 22 : at + 26] = bytes(4)
        changed[at + 22 : at + 26] = struct.pack("<I", _ogg_sum(changed[at:end]))
        at = data.find(b"OggS", end)
    return bytes(changed)


def _ogg_table() -> list[int]:
    table = []
    for i in range(256):
        value = i << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


OGG_TABLE = _ogg_table()


def _ogg_sum(page: bytes | bytearray) -> int:
    value = 0
    for byte in page:
        value = (value << 8 & 0xFFFFFFFF) ^ OGG_TABLE[value >> 24 ^ byte]
    return value


# safetensors


def unpacked(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def repacked(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I16", "I8", "U8", "BOOL", "X", "")


def retyped(header: dict[str, Any], body: bytes, name: str, rng: random.Random) -> bytes:
    """The file with another type, shape or place of one tensor; every other time with a body that
    fits, so that the parser accepts it."""
    entry = header[name]
    begin, end = entry["data_offsets"]
    sizes = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    dtype = rng.choice(DTYPES) if rng.random() < 0.5 else entry["dtype"]
    shape = list(entry["shape"])
    how = rng.randrange(7)
    if how == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 3, 2**31, 2**62, -1])
    elif how == 1:
        shape = rng.choice([[], [0], [1], [*shape, 1], shape[::-1], shape[1:], [1] * 70])
    elif how == 2 and shape:
        axis = rng.randrange(len(shape))
        shape[axis] = max(0, shape[axis] + rng.choice([-4, -1, 1, 4]))
    changed: dict[str, Any] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    count = 1
    for size in shape:
        count *= size
    if 0 <= (needed := count * sizes.get(dtype, 1)) < 2**22 and rng.random() < 0.8:
        # The new tensor's bytes go to the end; what was there stays, under another name.
        rest = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        changed["data_offsets"] = [len(body), len(body) + needed]
        # Without a hole in the file, as the format wants it; an unexpected tensor is a case too.
        other = {"__rest__": rest} if rng.random() < 0.1 else {}
        if not other:
            body = body[:begin] + body[end:]
            moved = end - begin
            header = {
                key: _moved(value, end, moved) if key != "__metadata__" else value
                for key, value in header.items()
            }
            changed["data_offsets"] = [len(body), len(body) + needed]
        fill = rng.choice([bytes(needed), rng.randbytes(needed), b"\xff" * needed])
        return repacked({**header, **other, name: changed}, body + fill)
    return repacked({**header, name: changed}, body)


def _moved(entry: dict[str, Any], after: int, by: int) -> dict[str, Any]:
    begin, end = entry["data_offsets"]
    return entry if begin < after else entry | {"data_offsets": [begin - by, end - by]}


def safetensors_file(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with one thing changed, and what that is."""
    header, body = unpacked(data)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    begin, end = header[name]["data_offsets"]
    how = rng.randrange(12)
    if how < 4:
        return retyped(header, body, name, rng), f"{name} of another type, shape or place"
    if how == 4:
        tree, what = json_tree(header, rng)
        return repacked(tree, body), f"header {what}"
    if how == 5:
        return rng.choice(BYTES[:-1])(data, rng), "damaged bytes"
    if how == 6:
        size = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data), 100_000_000, 8])
        return size.to_bytes(8, "little") + data[8:], f"header of {size} bytes"
    if how == 7:
        cut = rng.choice([0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1])
        return data[:cut], f"cut to {cut} bytes"
    if how == 8:
        del header[name]
        return repacked(header, body), f"{name} deleted"
    if how == 9:
        header[name + "x"] = header.pop(name)
        return repacked(header, body), f"{name} renamed"
    patterns = (b"\xff\xff", b"\x00\x7e", b"\x00\x7c", b"\xff\x7f", b"\x00\xfc", b"\x00\x00")
    fill = rng.choice([*patterns, rng.randbytes(2)])
    at = begin + rng.choice([0, 4 * rng.randrange(max(1, (end - begin) // 4))])
    size = rng.choice([4, end - at])
    body = body[:at] + (fill * (size // 2 + 1))[:size] + body[at + size :]
    return repacked(header, body), f"values of {name} are {fill.hex()}"
