"""Sentence splitting, ROUGE figures and their bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from sparsity.evaluation.rouge import bootstrap_interval, rouge_f_measures, split_sentences
from sparsity.metrics import ROUGE_TYPES


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It rained. We left.", ["It rained.", "We left."]),
        ("Mr. Smith met Dr. Jones on Jan. 5. They talked.", ["Mr. Smith met Dr. Jones on Jan. 5.", "They talked."]),
        ("He lives in the U.S. He is happy.", ["He lives in the U.S.", "He is happy."]),
        ("The U.S. Senate met at 5 p.m. Tuesday.", ["The U.S. Senate met at 5 p.m. Tuesday."]),
        ("J. K. Rowling wrote it. It sold.", ["J. K. Rowling wrote it.", "It sold."]),
        ("Smith et al. (2017) agree. We do not.", ["Smith et al. (2017) agree.", "We do not."]),
        ("It rose 3.5 percent. Why? Nobody knows!", ["It rose 3.5 percent.", "Why?", "Nobody knows!"]),
        ('"Stop it." She left.', ['"Stop it."', "She left."]),
        ("first highlight\nsecond highlight", ["first highlight", "second highlight"]),
        ("  \n ", []),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_splitting_loses_no_character():
    text = 'A. "B c." d? (E.) f... G! h e.g. i. J\nK'
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_equals_rouge_score_on_newline_separated_sentences():
    from rouge_score.rouge_scorer import RougeScorer

    prediction = "The cats were sleeping. A dog barked at them loudly."
    reference = "A dog barked loudly. Cats slept on."
    expected = RougeScorer(list(ROUGE_TYPES), use_stemmer=True).score(
        "A dog barked loudly.\nCats slept on.", "The cats were sleeping.\nA dog barked at them loudly."
    )
    row = rouge_f_measures([prediction], [reference])[0]
    assert row.tolist() == [expected[kind].fmeasure for kind in ROUGE_TYPES]
    # Sentence order is wrong here: only the summary-level variant, which matches sentence by sentence, forgives it.
    assert row[ROUGE_TYPES.index("rougeLsum")] > row[ROUGE_TYPES.index("rougeL")]


def test_perfect_and_empty_predictions():
    scores = rouge_f_measures(["The river rose.", ""], ["The river rose.", "The river rose."])
    assert scores[0].tolist() == pytest.approx([1.0] * 4)
    assert scores[1].tolist() == [0.0] * 4


def test_interval_covers_the_mean_is_repeatable_and_narrows_with_more_examples():
    scores = np.random.default_rng(1).random((50, 4))
    low, high = bootstrap_interval(scores)
    mean = scores.mean(axis=0)
    assert (low < mean).all() and (mean < high).all()
    # The normal approximation of the standard error is close for 50 uniform values.
    half = 1.96 * scores.std(axis=0) / np.sqrt(50)
    assert np.allclose(low, mean - half, atol=0.015) and np.allclose(high, mean + half, atol=0.015)
    again = bootstrap_interval(scores)
    assert (again[0] == low).all() and (again[1] == high).all()
    wide = high - low
    low, high = bootstrap_interval(np.repeat(scores, 16, axis=0))
    assert ((high - low) < wide / 3).all()
