"""Plots as PNG files, whatever part of the data there is."""

from __future__ import annotations

import pytest

from sparsity.reporting.plots import plot_layers, plot_loss

TRAINING = [{"step": step, "loss": 3.0 - step / 10} for step in range(1, 5)]


@pytest.mark.parametrize("curve", [TRAINING, [*TRAINING, {"step": 4, "eval_loss": 2.7}], [{"step": 1, "loss": None}]])
def test_loss_curve(curve, tmp_path):
    assert plot_loss(curve, tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_layers_may_be_named_without_a_number(tmp_path):
    rows = [{"name": name, "relative_error": 0.1, "sparsity": 0.5} for name in ("model.layers.3.q_proj", "head.weight")]
    assert plot_layers(rows, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
