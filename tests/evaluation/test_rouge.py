"""Sentence splitting, ROUGE figures and their bootstrap intervals."""

from __future__ import annotations

import pytest

from sparsity.evaluation.rouge import score_predictions, split_sentences
from sparsity.metrics import INTERVALS, ROUGE_TYPES


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
    scores = score_predictions([prediction], [reference])
    assert [scores[kind] for kind in ROUGE_TYPES] == pytest.approx(
        [100 * expected[kind].fmeasure for kind in ROUGE_TYPES]
    )
    # Sentence order is wrong here: only the summary-level variant, which matches sentence by sentence, forgives it.
    assert scores["rougeLsum"] > scores["rougeL"]


def test_perfect_and_empty_predictions():
    scores = score_predictions(["The river rose.", ""], ["The river rose.", "The river rose."])
    assert [scores[kind] for kind in ROUGE_TYPES] == pytest.approx([50.0] * 4)
    assert (scores["examples"], scores["empty"]) == (2, 1)


def test_interval_covers_the_mean_is_repeatable_and_narrows_with_more_examples():
    references = ["the river rose"] * 50
    predictions = [("the river rose", "the river", "a river", "nothing")[number % 4] for number in range(50)]
    scores = score_predictions(predictions, references)
    low, high = scores[INTERVALS]["rouge1"]
    assert low < scores["rouge1"] < high
    assert score_predictions(predictions, references) == scores
    narrow = score_predictions(16 * predictions, 16 * references)[INTERVALS]["rouge1"]
    assert narrow[1] - narrow[0] < (high - low) / 3
