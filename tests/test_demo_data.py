"""The demonstration data."""

from __future__ import annotations

import pytest

from sparsity.demo_data import detokenize


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
