"""Sources of records, apart from the script that writes them."""

from __future__ import annotations

import pytest

from sparsity.errors import UserError
from sparsity.sources import detokenize, parse_sources


@pytest.mark.parametrize(
    ("tokenized", "plain"),
    [
        ("We ca n't ( yet ) do it , sadly .", "We can't (yet) do it, sadly."),
        ('The word " Long " , and " a b " .', 'The word "Long", and "a b".'),
        ("Nearly 55 % of Passage / Sentence pairs .", "Nearly 55% of Passage/Sentence pairs."),
    ],
)
def test_detokenize(tokenized, plain):
    assert detokenize(tokenized) == plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.txt", [("a.txt", 1.0)]),
        ("a.txt,self", [("a.txt", 0.5), ("self", 0.5)]),
        (" a.txt=1 , b.txt=3 ", [("a.txt", 0.25), ("b.txt", 0.75)]),
        ("a.txt=1,self=0", [("a.txt", 1.0)]),
        ("odd=name.txt", [("odd=name.txt", 1.0)]),
    ],
)
def test_sources_and_their_weights(text, expected):
    assert [(source.spec, source.weight) for source in parse_sources(text)] == expected


def test_a_file_may_be_called_anything(tmp_path):
    file = tmp_path / "a=0.5,b=0.5"
    file.write_text("text")
    assert [source.spec for source in parse_sources(str(file))] == [str(file)]


@pytest.mark.parametrize("text", ["a=0,b=0", "a=-1,b=2", "a=nan", "a=inf", ""])
def test_weights_that_mean_nothing_are_refused(text):
    with pytest.raises(UserError, match="weight"):
        parse_sources(text)
