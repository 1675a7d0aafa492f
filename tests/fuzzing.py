"""Inputs for the tests in tests/fuzz: valid files that are changed in structure or damaged, and what must hold then."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from sparsity.errors import UserError

fuzz = settings()  # of the profile that conftest.py loads, or --hypothesis-profile

REFUSED = object()  # what `attempt` returns for an input that is refused in one line


def attempt(read: Callable[[], Any], named: str | Path) -> Any:
    """The value that `read` returns, or REFUSED if it raises a UserError: one printable line that names the input."""
    try:
        return read()
    except UserError as error:
        assert str(error).isprintable(), repr(str(error))
        assert str(named) in str(error), f"{named} is not named in: {error}"
        return REFUSED


# -------------------------------------------------------------------------------------------------------------- bytes


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut short, with bits flipped, or with a part lost, repeated, replaced or moved."""
    size = len(content)
    place = st.integers(0, max(0, size - 1))
    kind = draw(st.sampled_from(["cut", "flip", "lose", "repeat", "replace", "insert", "noise"]))
    if kind == "cut":
        return content[: draw(place)]
    if kind == "flip":
        changed = bytearray(content)
        for position in draw(st.lists(place, min_size=1, max_size=4)) if size else []:
            changed[position] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if kind == "noise":
        return draw(st.binary(max_size=200))
    start = draw(place)
    end = min(size, start + draw(st.integers(1, 40)))
    if kind == "lose":
        return content[:start] + content[end:]
    if kind == "repeat":
        return content[:end] + content[start:]
    new = draw(st.binary(min_size=1, max_size=40))
    return content[:start] + new + content[end if kind == "replace" else start :]


# --------------------------------------------------------------------------------------------------------------- JSON

# Spelled out after json.dumps, which cannot write them.
HUGE, DEEP, LONE = "@huge@", "@deep@", "@lone@"
SPELLINGS = {HUGE: "7" * 5000, DEEP: "[" * 100_000, LONE: r'"\ud800"'}

ODD_TEXTS = ["", " ", "a\nb", "\x1b[2J\x00", "\u2028", "x" * 300, "../../etc/passwd", "/", "é\u202e", "{input}"]
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 2**63, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from([*ODD_TEXTS, HUGE, DEEP, LONE]),
    st.sampled_from([[], {}, [[]], [1, 2], ["a"], {"a": 1}, [None], [1.0, 2.0, 3.0]]).map(copy.deepcopy),
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values inside `value`, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """A copy of a JSON value in which up to `most` places are odd, missing, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        places = _places(value)
        *parents, last = draw(st.sampled_from(places)) or (None,)
        if last is None:
            value = draw(odd_values)
            continue
        holder = value
        for key in parents:
            holder = holder[key]
        kind = draw(st.sampled_from(["odd", "odd", "odd", "missing", "other"]))
        if kind == "odd":
            holder[last] = draw(odd_values)
        elif kind == "missing":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from([*ODD_TEXTS, "other"]))] = holder.pop(last)
        else:
            holder.insert(last, copy.deepcopy(holder[last]))
    return value


def spelled(value: Any, **options: Any) -> bytes:
    """JSON text of a value from `changed`."""
    text = json.dumps(value, **options)
    for name, spelling in SPELLINGS.items():
        text = text.replace(json.dumps(name), spelling).replace(name, "@")
    return text.encode()


def json_files(value: Any) -> st.SearchStrategy[bytes]:
    """Files that hold nearly `value`: changed in structure, damaged, or both."""
    whole = json.dumps(value, indent=2).encode()
    structural = changed(value).map(spelled)
    return st.one_of(structural, structural, damaged(whole), structural.flatmap(lambda text: damaged(text[:2000])))


def jsonl_files(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Files of one JSON value per line that hold nearly `rows`."""
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def lines(values: Any) -> bytes:
        values = values if isinstance(values, list) else [values]
        return b"".join(spelled(value) + b"\n" for value in values)

    structural = changed(rows).map(lines)
    return st.one_of(structural, structural, damaged(whole), structural.flatmap(lambda text: damaged(text[:2000])))


def parsed(content: bytes) -> Any:
    """What the plain `json` module reads from a file, or REFUSED."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return REFUSED


def parsed_lines(content: bytes) -> list[Any]:
    """What the plain `json` module reads from the lines that are whole; damaged ones are left out."""
    values = [parsed(line) for line in content.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    return [value for value in values if value is not REFUSED]


# -------------------------------------------------------------------------------------------------------- safetensors


def tensors_file(header: object, data: bytes, length: int | None = None) -> bytes:
    """A file in the format of safetensors, with any header; `length` is what it says of the header's size."""
    text = spelled(header)
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data


def tensors_parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a whole file of safetensors."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


# ------------------------------------------------------------------------------------------------------------- pickle


class Planted:
    """Pickles to a call that creates a file; whoever unpickles it runs foreign code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def planted_pickles(path: Path) -> st.SearchStrategy[bytes]:
    """Plain pickles of several protocols that would create `path`."""
    values = [Planted(path), {"modelopt_state": Planted(path), "model_state_dict": {}}, [Planted(path)]]
    return st.builds(pickle.dumps, st.sampled_from(values), st.integers(0, 5))
