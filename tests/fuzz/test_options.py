"""Options with a grammar of their own: any text is understood or refused in one line."""

from __future__ import annotations

import math

from fuzzing import REFUSED, attempt
from hypothesis import example, given
from hypothesis import strategies as st

from sparsity.pattern import Pattern
from sparsity.sources import parse_sources
from utils import parse_named

names = st.sampled_from(["a.jsonl", "self", "c4", "owner/name:en:train", "x=y.txt", "", "a b", "²", "a\nb", ":c"])
numbers = st.sampled_from(["0.5", "1", "0", "-1", "nan", "inf", "1e308", "1e-320", "", "1_0", "²", "9" * 5000, "0x1"])
texts = st.text(st.sampled_from("ab=,:.;0123456789²٢ \n\x00eGiBunstructred"), max_size=24)


def joined(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(part, max_size=4).map(",".join)


@given(st.one_of(joined(st.builds("{}={}".format, names, numbers)), joined(names), texts))
@example("a=1e-320,b=1e308")
def test_sources(text):
    sources = attempt(lambda: parse_sources(text), "source")
    if sources is not REFUSED:
        assert sources and math.isclose(sum(source.weight for source in sources), 1)
        assert all(source.spec and 0 < source.weight <= 1 for source in sources)


@given(st.lists(st.one_of(st.builds("{}={}".format, names, names), texts), max_size=3))
def test_named_files(words):
    named = attempt(lambda: parse_named("--run", words), "--run")
    if named is not REFUSED:
        assert [f"{name}={path}" for name, path in named.items()] == words


@given(st.one_of(st.builds("{}:{}".format, numbers, numbers), st.builds("unstructured:{}".format, numbers), texts))
@example("2:4")
@example("unstructured:0.99999999999999999999")
def test_pattern(text):
    pattern = attempt(lambda: Pattern.parse(text), "--pattern")
    if pattern is not REFUSED:
        assert 0 < pattern.fraction < 1
        assert pattern.m == 0 or 0 < pattern.n < pattern.m <= 16
