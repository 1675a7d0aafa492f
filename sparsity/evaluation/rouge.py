"""ROUGE as papers report it: Porter stemming, rougeLsum over sentences, F-measures with bootstrap intervals.

Scores and intervals are rouge-score's own. What this module adds is sentence splitting that needs no downloaded data,
so that rougeLsum is the same on every machine.
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


def score_predictions(predictions: list[str], references: list[str]) -> dict[str, Any]:
    """Mean F-measures in percent under their names, with 95% intervals and the number of empty predictions.

    The intervals are rouge-score's: percentiles of the mean over 1000 bootstrap samples, always the same ones.

    Raises:
        UserError: every prediction is empty.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator
    from tqdm import tqdm

    if not any(predictions):
        raise UserError("every prediction is empty: the model only produced end-of-text or blanks; check its tokenizer")
    scorer, aggregator = RougeScorer(list(ROUGE_TYPES), use_stemmer=True), BootstrapAggregator()
    totals = dict.fromkeys(ROUGE_TYPES, 0.0)
    for pair in tqdm(zip(predictions, references, strict=True), "ROUGE", len(references), leave=False, disable=None):
        prediction, reference = ("\n".join(split_sentences(text)) for text in pair)
        scores = scorer.score(target=reference, prediction=prediction)
        aggregator.add_scores(scores)
        for name in ROUGE_TYPES:
            totals[name] += 100 * scores[name].fmeasure
    np.random.seed(0)
    bounds = aggregator.aggregate()
    return {
        **{name: total / len(predictions) for name, total in totals.items()},
        INTERVALS: {name: [100 * float(bounds[name][end].fmeasure) for end in (0, 2)] for name in ROUGE_TYPES},
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
