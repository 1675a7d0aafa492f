"""ROUGE as papers report it: Porter stemming, rougeLsum over sentences, F-measures with bootstrap intervals.

The scores are rouge-score's own. What this module adds is sentence splitting that needs no downloaded data, so that
rougeLsum is the same on every machine.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity.errors import UserError
from sparsity.metrics import INTERVALS, ROUGE_TYPES

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer


# Words whose period usually does not end a sentence, written in lower case and without that period. Single capital
# letters (initials) and dotted forms (u.s, e.g) need care as well; the latter must be listed.
ABBREVIATIONS = """
mr mrs ms dr prof rev hon gov sen rep pres gen col maj capt lt cmdr adm sgt cpl det supt insp messrs mme st ste mt ft
jr sr bros inc ltd co corp assn dept univ ave blvd rd jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues
wed thu thur thurs fri vs v etc al cf approx est ca fig figs eq eqs sec secs ch chap vol vols no nos pp p ed eds
ref refs resp e.g eg i.e ie viz a.m p.m u.s u.k u.n e.u u.s.a d.c l.a n.y ph.d m.d b.a m.a b.c a.d w.r.t i.i.d a.k.a
ariz ark calif colo conn fla ga kan ky mich minn mont neb nev okla pa tenn tex va vt wis
"""


# Words that, capitalized after an abbreviation, show that a new sentence has begun ("… in the U.S. He said …").
SENTENCE_STARTERS = """
the a an this that these those it he she they we i you his her their our its there here in on at for from with by as
but and so if when while after before since because although though however moreover furthermore then thus also
according what who where why how most many some all both each another one no not yet now finally
"""


@functools.cache
def sentence_tokenizer() -> PunktSentenceTokenizer:
    """NLTK's Punkt algorithm with the lists above in place of its downloadable English model."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    parameters.sent_starters = set(SENTENCE_STARTERS.split())
    return PunktSentenceTokenizer(parameters)


def split_sentences(text: str) -> list[str]:
    """Cut `text` into sentences. A line break always ends one, as between the highlights of CNN/DailyMail."""
    sentences = [sentence for line in text.splitlines() for sentence in sentence_tokenizer().tokenize(line.strip())]
    return [sentence for sentence in sentences if sentence.strip()]


def rouge_f_measures(predictions: list[str], references: list[str]) -> np.ndarray:
    """F-measure of every pair for every one of ROUGE_TYPES.

    Returns:
        float64 array of shape [pairs, 4], fractions in 0..1.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from tqdm import tqdm

    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    rows = []
    for pair in tqdm(zip(predictions, references, strict=True), "ROUGE", len(references), leave=False, disable=None):
        prediction, reference = ("\n".join(split_sentences(text)) for text in pair)
        scores = scorer.score(target=reference, prediction=prediction)
        rows.append([scores[kind].fmeasure for kind in ROUGE_TYPES])
    return np.array(rows, dtype=np.float64).reshape(-1, len(ROUGE_TYPES))


def bootstrap_interval(
    scores: np.ndarray, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over examples (Efron & Tibshirani, 1993, chapter 13).

    Args:
        scores: float array [examples, metrics]. Examples are resampled as wholes, so metrics stay paired.

    Returns:
        (low, high), each of shape [metrics]. The same scores always give the same interval.
    """
    examples = len(scores)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, scores.shape[1]))
    for row in range(resamples):
        means[row] = scores[generator.integers(examples, size=examples)].mean(axis=0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high


def score_predictions(predictions: list[str], references: list[str]) -> dict[str, Any]:
    """Mean F-measures in percent under their names, with 95% intervals and the number of empty predictions.

    Raises:
        UserError: every prediction is empty.
    """
    if not any(predictions):
        raise UserError("every prediction is empty: the model only produced end-of-text or blanks; check its tokenizer")
    scores = 100 * rouge_f_measures(predictions, references)
    low, high = bootstrap_interval(scores)
    return {
        **dict(zip(ROUGE_TYPES, scores.mean(axis=0).tolist(), strict=True)),
        INTERVALS: {name: [low[i].item(), high[i].item()] for i, name in enumerate(ROUGE_TYPES)},
        "examples": len(predictions),
        "empty": sum(not text for text in predictions),
    }


def print_scores(scores: dict[str, Any], saved_in: str | None) -> None:
    """Print what `score_predictions` returned; the last line is `ROUGE scores: {…}`, in percent."""
    print(f"\n{scores['examples']} examples, {scores['empty']} with an empty prediction; ", end="")
    print("mean F-measure in percent, 95% interval")
    for name in ROUGE_TYPES:
        low, high = scores[INTERVALS][name]
        print(f"  {name:<10} {scores[name]:6.2f}  [{low:.2f}, {high:.2f}]")
    if saved_in:
        print(f"figures saved in {saved_in}")
    print(f"ROUGE scores: { {name: round(scores[name], 4) for name in ROUGE_TYPES} }", flush=True)
