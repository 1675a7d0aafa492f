"""Options with a grammar of their own."""

from __future__ import annotations

import math

import pytest
from fuzzing import REFUSED, attempt, fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from sparsity.errors import UserError
from sparsity.evaluation.perplexity import choose_texts
from sparsity.files import require_file
from sparsity.pts.pattern import Pattern
from sparsity.sources import SELF, check_source, content_key, is_streamed, parse_sources, shares
from utils import parse_named

names = st.sampled_from(["a.jsonl", "self", "c4", "owner/name:en:train", "x=y.txt", "", "a b", "²", "a\nb", ":c"])
numbers = st.sampled_from(
    ["0.5", "1", "0", "-1", "nan", "inf", "1e308", "1e-320", "", "1_0", "²", "½", "x", "9" * 5000, "0x1"]
)
printable = st.text(st.sampled_from("ab=,:.;0123456789²٢ \n\x00eGiBunstructred"), max_size=24)


def joined(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(part, max_size=4).map(",".join)


@fuzz
@given(st.one_of(joined(st.builds("{}={}".format, names, numbers)), joined(names), printable))
@example("a.jsonl=0.5,self=0.5")
@example("a=1e-320,b=1e308")
@example("a=1e308,b=1e308")
def test_sources(text):
    found = attempt(lambda: parse_sources(text), "source")
    if found is REFUSED:
        return
    assert found and math.isclose(sum(source.weight for source in found), 1)
    assert all(source.spec and 0 < source.weight <= 1 for source in found)
    for source in found:
        named = attempt(lambda source=source: check_source(source), source.spec if source.spec.isprintable() else "")
        if named is not REFUSED:
            assert isinstance(is_streamed(source), bool) and len(content_key(source)) == 64
    assert attempt(lambda: choose_texts([text], "config", "test", "text"), "")


@fuzz
@given(st.lists(st.sampled_from(["a.txt", "b", SELF, "c4"]), min_size=1, max_size=4), st.data())
def test_sources_come_back_as_they_were_written(specs, data):
    weights = data.draw(st.lists(st.floats(0.001, 1000), min_size=len(specs), max_size=len(specs)))
    found = parse_sources(",".join(f"{spec}={weight!r}" for spec, weight in zip(specs, weights, strict=True)))
    assert [source.spec for source in found] == specs
    assert all(math.isclose(f.weight, w / sum(weights)) for f, w in zip(found, weights, strict=True))
    size = data.draw(st.integers(1, 10_000))
    counts = attempt(lambda: shares(found, size), "source")
    assert counts is REFUSED or sum(counts) == size
    assert counts is not REFUSED or size * min(weights) < 2 * sum(weights)


@fuzz
@given(
    st.one_of(
        st.builds("{}:{}".format, st.integers(-1, 12), st.integers(-1, 12)),
        st.builds(
            "unstructured:{}".format, st.one_of(numbers, st.floats().map(str), st.floats(0, 1).map("{:.20f}".format))
        ),
        st.builds("{}:{}".format, numbers, numbers),
        printable,
    )
)
@example("2:" + "9" * 5000)
@example("unstructured:.0")
@example("unstructured:0.99999999999999999999")
def test_pattern(text):
    found = attempt(lambda: Pattern.parse(text), "--pattern")
    if found is not REFUSED:
        assert 0 < found.fraction < 1 and (found.fraction < 1e-4 or Pattern.parse(str(found)) == found)
        assert found.m == 0 or 0 < found.n < found.m <= 8


pairs = st.lists(st.one_of(st.builds("{}={}".format, names, names), printable), max_size=3)


@fuzz
@given(pairs)
def test_pairs_of_names_and_paths(given_pairs):
    named = attempt(lambda: parse_named("--run", given_pairs), "--run")
    if named is not REFUSED:
        assert [f"{name}={path}" for name, path in named.items()] == given_pairs


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "a\nb"])
def test_impossible_names_of_files(name):
    with pytest.raises(UserError, match="prompt template not found"):
        require_file(name, "prompt template")
