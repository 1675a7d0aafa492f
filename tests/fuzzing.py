"""Inputs for the tests in tests/fuzz: valid files that are changed in structure or damaged."""

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
REFUSED = object()  # returned by `attempt` for an input that is refused in one line


def attempt(read: Callable[[], Any], named: str | Path) -> Any:
    """The value that `read` returns, or REFUSED if it raises a UserError: one printable line that names the input."""
    try:
        return read()
    except UserError as error:
        assert str(error).isprintable(), repr(str(error))
        assert str(named) in str(error), f"{named} is not named in: {error}"
        return REFUSED


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut short, with a bit flipped, or with a part replaced, lost or repeated; or noise."""
    position = draw(st.integers(0, max(0, len(content) - 1)))
    kind = draw(st.sampled_from(["cut", "flip", "replace", "repeat", "noise"]))
    if kind == "cut":
        return content[:position]
    if kind == "flip":
        bit = 1 << draw(st.integers(0, 7))
        return (
            content[:position]
            + bytes(byte ^ bit for byte in content[position : position + 1])
            + content[position + 1 :]
        )
    if kind == "noise":
        return draw(st.binary(max_size=200))
    end = position + draw(st.integers(0, 40))
    if kind == "repeat":
        return content[:end] + content[position:]
    return content[:position] + draw(st.binary(max_size=40)) + content[end:]


# Spelled out after json.dumps, which cannot write them.
SPELLINGS = {"@huge@": "7" * 5000, "@deep@": "[" * 100_000, "@lone@": r'"\ud800"'}
ODD_TEXTS = ["", " ", "a\nb", "\x1b[2J\x00", "\u2028", "x" * 300, "../../etc/passwd", "é\u202e", "{input}"]
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2**63, 10**400, 0.5, 1e308, float("nan"), -float("inf")]),
    st.sampled_from([*ODD_TEXTS, *SPELLINGS]),
    st.sampled_from([[], {}, [[]], ["a"], {"a": 1}, [None], [1.0, 2.0, 3.0]]).map(copy.deepcopy),
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values inside `value`, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """A copy of a JSON value with up to `most` values that are odd, missing or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(_places(value)))
        if not path:
            value = draw(odd_values)
            continue
        *parents, last = path
        holder = value
        for key in parents:
            holder = holder[key]
        kind = draw(st.sampled_from(["odd", "odd", "missing", "renamed"]))
        item = holder.pop(last)
        if kind == "renamed" and isinstance(holder, dict):
            holder[draw(st.sampled_from(ODD_TEXTS))] = item
        elif kind != "missing" and isinstance(holder, dict):
            holder[last] = draw(odd_values)
        elif kind != "missing":
            holder.insert(last, draw(odd_values))
    return value


def spelled(value: Any) -> bytes:
    """JSON text of a value from `changed`."""
    text = json.dumps(value)
    for name, spelling in SPELLINGS.items():
        text = text.replace(json.dumps(name), spelling)
    return text.encode()


def json_files(value: Any) -> st.SearchStrategy[bytes]:
    """Files that hold nearly `value`: changed in structure, or damaged."""
    return st.one_of(changed(value).map(spelled), damaged(json.dumps(value, indent=2).encode()))


def jsonl_files(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Files of one JSON value per line that hold nearly `rows`."""

    def lines(values: Any) -> bytes:
        return b"".join(spelled(value) + b"\n" for value in (values if isinstance(values, list) else [values]))

    return st.one_of(changed(rows).map(lines), damaged(lines(rows)))


def parsed(content: bytes) -> Any:
    """The value that the `json` module reads from a file, or REFUSED."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return REFUSED


def parsed_lines(content: bytes) -> list[Any]:
    """The values that the `json` module reads from the intact lines of a file."""
    values = [parsed(line) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    return [value for value in values if value is not REFUSED]


def tensors_file(header: object, data: bytes) -> bytes:
    """A safetensors file with any header."""
    text = spelled(header)
    return struct.pack("<Q", len(text)) + text + data


def tensors_parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of an intact safetensors file."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


class Planted:
    """Pickles to a call that creates a folder: unpickling it runs foreign code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def planted_pickles(path: Path) -> st.SearchStrategy[bytes]:
    """Plain pickles of several protocols that would create `path`."""
    values = [Planted(path), {"modelopt_state": Planted(path), "model_state_dict": {}}, [Planted(path)]]
    return st.builds(pickle.dumps, st.sampled_from(values), st.integers(0, 5))
