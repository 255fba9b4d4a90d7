"""Damage to a file, drawn by a seed: of its values where it is JSON or YAML, and of its bytes."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import yaml


def deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 1.5, 1e-300, 1e308, 2**31, 2**63, -(2**63), 2**64),
    *(10**12, 10**18, 10**40, 10**90, float("nan"), float("inf"), -float("inf")),
    *("", "a", "0", "-1", "x" * 5000, "\x1b[2J\u202e\x00", "\ud800", "é", "\n", "{}", "{{ a }}"),
    *("../../etc/passwd", "/etc/passwd", "(a+)+$", "[", "true", "null", "float32", "F32", "BF16"),
    *([], {}, [[]], [None], [0] * 1000, {"": None}, {"a": 1}, deep(20), deep(150)),
]
SNIPPETS = [
    *(b"", b"\x00", b"\xff", b"\xef\xbb\xbf", "\u202e\u2028".encode(), b"\x1b[31m", b"\n", b"\t"),
    *(b"9" * 400, b"-" + b"9" * 9000, b"1e999", b"NaN", b"-Infinity", b"0x", b"1_0", b":", b","),
    *(b"[" * 500, b'{"a":' * 500, b"]", b"}", b'"', b"'", b"\\", b'"\\ud800"', b'"a": 1, "a": 2,'),
    *(b"&a [*a]", b"*a", b"<<: *a", b"<<: {a: 1}", b"!!int z", b"!!binary z", b"2020-99-99"),
    *(b"!!python/name:os.system", b"- ", b"? ", b"--- ", b"%YAML 9.9\n", b"{{ a }}", b"|", b">"),
]
Path = tuple[Any, ...]


def damaged_values(value: Any, draw: random.Random) -> Any:
    """A copy of plain values with one to three of them changed, removed, repeated or added."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw.randint(1, 3)):
        *path, key = draw.choice(list(_places(whole)))
        holder: Any = whole
        for step in path:
            holder = holder[step]
        act = draw.choice(["put", "put", "put", "drop", "twin", "add", "move"])
        if act == "drop" and path:
            del holder[key]
        elif act == "twin" and isinstance(holder, list) and path:
            holder.insert(key, copy.deepcopy(holder[key]))
        elif act == "add" and isinstance(holder, dict):
            name = draw.choice([str(key) + "x", "", "x" * 999, "a\x1b[2J", "\u202e", "../a", "__"])
            holder[name] = copy.deepcopy(draw.choice(VALUES))
        elif act == "move":
            other = draw.choice(list(_places(whole)))
            found: Any = whole
            for step in other:
                found = found[step]
            holder[key] = copy.deepcopy(found)
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return whole[0]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """A copy with one to four cuts, flips, repetitions or insertions."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(content))
        end = min(len(content), start + draw.choice([1, 1, 2, 5, 20, 200]))
        act = draw.choice(["flip", "flip", "cut", "drop", "twin", "put"])
        if act == "flip" and start < len(content):
            flipped = content[start] ^ (1 << draw.randrange(8))
            content = content[:start] + bytes([flipped]) + content[start + 1 :]
        elif act == "cut":
            content = content[:start]
        elif act == "drop":
            content = content[:start] + content[end:]
        elif act == "twin":
            content = content[:end] + content[start:end] + content[end:]
        else:
            content = content[:start] + draw.choice(SNIPPETS) + content[start:]
    return content


def damaged_json(content: bytes, draw: random.Random) -> bytes:
    """The text of an object of JSON, its values or its bytes damaged, or both."""
    act = draw.choice(["values", "values", "bytes", "both"])
    if act != "bytes":
        content = json.dumps(damaged_values(json.loads(content), draw)).encode()
    return content if act == "values" else damaged_bytes(content, draw)


def damaged_yaml(content: bytes, draw: random.Random) -> bytes:
    """As `damaged_json`, of a text of YAML, in either of its styles."""
    act = draw.choice(["values", "values", "bytes", "both"])
    if act != "bytes":
        values = damaged_values(yaml.safe_load(content), draw)
        flow = draw.choice([True, False])
        text = yaml.safe_dump(values, default_flow_style=flow, allow_unicode=draw.random() < 0.5)
        content = text.encode("utf-8", "surrogatepass")
    return content if act == "values" else damaged_bytes(content, draw)


def damaged_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with its header damaged, or the length before it."""
    length = int.from_bytes(content[:8], "little")
    header, data = damaged_json(content[8 : 8 + length], draw), content[8 + length :]
    said = draw.choice([len(header)] * 6 + [length, 0, 2**62, 2**64 - 1, len(header) + 1])
    return said.to_bytes(8, "little") + header + data


def _places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The keys and indices that lead to every value within a list or mapping."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield (*path, key)
        if isinstance(each, dict | list) and len(path) < 40:
            yield from _places(each, (*path, key))
