"""Plots as PNG files, whatever part of the data there is."""

from __future__ import annotations

import math

import pytest

from sparsity.metrics import INTERVALS, ROUGE_TYPES
from sparsity.reporting.plots import plot_layers, plot_loss, plot_scores
from sparsity.reporting.results import Run

TRAINING = [{"step": step, "loss": 3.0 - step / 10} for step in range(1, 5)]


EXTREME = [{"step": 10**300, "loss": 1.0}, {"step": 1, "loss": -1e308}, {"step": 2, "loss": 1e308}, *TRAINING]


EVALUATED = [*TRAINING, {"step": 4, "eval_loss": 2.7}]


@pytest.mark.parametrize("curve", [TRAINING, EVALUATED, EXTREME, [{"step": 1, "loss": None}]])
def test_loss_curve(curve, tmp_path):
    assert plot_loss(curve, tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_layers_may_be_named_without_a_number(tmp_path):
    rows = [{"name": name, "relative_error": 0.1, "sparsity": 0.5} for name in ("model.layers.3.q_proj", "head.weight")]
    assert plot_layers(rows, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_layers_of_odd_names_and_errors(tmp_path):
    names = ["a.$x^$", "model.layers.99999999999999.up_proj", "_", "a.\u202e"]
    rows = [{"name": name, "relative_error": error, "sparsity": 0.5} for name in names for error in (1e308, -1e308)]
    assert plot_layers(rows, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e308, -1e308, 0])
def test_scores_of_a_model_that_is_broken(value, tmp_path):
    rouge = {**dict.fromkeys(ROUGE_TYPES, value), INTERVALS: {"rouge1": [value, 26.0]}}
    runs = [Run("a", tmp_path, {"": {"perplexity": value}}, rouge), Run("b", tmp_path, {"": {"perplexity": 12.5}})]
    assert plot_scores(runs, tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
