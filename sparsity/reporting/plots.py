"""Plots of the report: colours and layout."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.files import atomic_path
from sparsity.metrics import INTERVALS, ROUGE_TYPES
from sparsity.reporting.results import Run, text_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure
ROUGE_NAMES = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum")
COLOURS = ("#6b7785", "#c8553d", "#2a7f62", "#3f6fb5", "#8a5fa8", "#b0892b", "#4d9fa8")


def new_figure(ratios: tuple[float, ...], height: float = 3.4) -> tuple[Figure, Any]:
    """A figure as wide as the page with one panel for each of the relative widths `ratios`; sizes in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
    plt.rcParams["text.parse_math"] = False  # names from files may hold dollar signs
    figure, axes = plt.subplots(
        1, len(ratios), figsize=(10.4, height), width_ratios=ratios, layout="constrained", squeeze=False
    )
    for axis in axes[0]:
        axis.grid(axis="y", color="#e3e7ec")
    return figure, axes[0]


def save_figure(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=144)
    plt.close(figure)
    return path


def plot_scores(runs: list[Run], path: Path) -> Path:
    """Bars of perplexity (lower is better) and ROUGE in percent with its 95% intervals (higher is better)."""
    figure, (left, right) = new_figure((1, 1.2))
    coloured = list(zip(runs, COLOURS, strict=False))
    texts = text_names(runs)
    measured = [run for run in runs if run.perplexities]
    width = 0.8 / max(1, len(texts))
    for place, run in enumerate(measured):
        for number, text in enumerate(texts):
            if text not in run.perplexities:
                continue
            value, where = run.perplexities[text]["perplexity"], place + (number - (len(texts) - 1) / 2) * width
            height = value if math.isfinite(value) else 0.0
            # The shade tells the texts apart, the colour the models.
            left.bar(where, height, width * 0.92, color=COLOURS[runs.index(run) % len(COLOURS)], alpha=1 / (1 + number))
            figure_text = f"{value:.1f}" if abs(value) < 1e6 else f"{value:.2g}"
            label = f"{figure_text}\n{text}" if text else figure_text
            left.annotate(label, (where, height), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    left.set_xticks(range(len(measured)), [run.name for run in measured])
    left.set_title("Held-out perplexity (lower is better)", fontsize=10.5)
    left.margins(y=0.18 if any(texts) else 0.12)

    scored = [(run.name, run.rouge, colour) for run, colour in coloured if run.rouge]
    width = 0.8 / max(1, len(scored))
    for number, (name, rouge, colour) in enumerate(scored):
        places = [group + (number - (len(scored) - 1) / 2) * width for group in range(len(ROUGE_TYPES))]
        values = [rouge[key] for key in ROUGE_TYPES]
        ends = [rouge.get(INTERVALS, {}).get(key) for key in ROUGE_TYPES]
        right.bar(places, values, width * 0.92, color=colour, label=name)
        for middle, value, pair in zip(places, values, ends, strict=True):
            if pair:
                errors = [[max(0, value - pair[0])], [max(0, pair[1] - value)]]
                right.errorbar(middle, value, errors, color="#1d2733", linewidth=1, capsize=2)
    right.set_xticks(range(len(ROUGE_TYPES)), ROUGE_NAMES)
    right.set_title("ROUGE F-measure in percent, 95% intervals (higher is better)", fontsize=10.5)
    if scored:
        right.legend(frameon=False, ncols=len(scored), fontsize=9)
        right.margins(y=0.18)
    return save_figure(figure, path)


def plot_kept(runs: list[Run], path: Path) -> Path:
    """Perplexity over the weights that each run keeps, in percent, one line for each text."""
    figure, (axis,) = new_figure((1,))
    for text, colour in zip(text_names(runs), COLOURS, strict=False):
        measured = [run for run in runs if run.matrices and text in run.perplexities]
        points = sorted((100 - 100 * run.sparsity(), run.perplexities[text]["perplexity"]) for run in measured)
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=1.5, label=text or "text")
    axis.set_xlabel("weights kept, in percent")
    axis.set_ylabel("held-out perplexity")
    axis.legend(frameon=False)
    return save_figure(figure, path)


def plot_layers(layers: list[dict[str, Any]], path: Path) -> Path:
    """Relative output error and zero share of every pruned matrix, by depth, one line for each kind of matrix."""
    figure, (left, right) = new_figure((2, 1), height=3.8)
    kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for order, layer in enumerate(layers):
        name = layer["name"].removesuffix(".weight")
        depth = re.search(r"\.([0-9]{1,9})\.", name)
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append((int(depth.group(1)) if depth else order, layer))
    for number, (kind, members) in enumerate(kinds.items()):
        depths = [depth for depth, _ in members]
        colour = COLOURS[number % len(COLOURS)]
        style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.2, "label": kind}
        # Magnitude pruning without calibration text measures no errors.
        errors = [math.nan if layer["relative_error"] is None else layer["relative_error"] for _, layer in members]
        left.plot(depths, errors, **style)
        right.plot(depths, [100 * layer["sparsity"] for _, layer in members], **style)
    left.set_title("Relative output error of each pruned matrix", fontsize=10.5)
    left.set_ylim(bottom=0)
    right.set_title("Zeros in percent", fontsize=10.5)
    right.set_ylim(0, 100)
    for axis in (left, right):
        axis.set_xlabel("decoder layer")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, ncols=8, fontsize=9, loc="outside lower center")
    return save_figure(figure, path)


def plot_loss(curve: list[dict[str, Any]], path: Path) -> Path:
    """Training loss and, where it was measured, evaluation loss (nats per answer token) over optimizer steps."""
    figure, (axis,) = new_figure((1,))
    for key, label, colour, marker in (
        ("loss", "training", COLOURS[3], None),
        ("eval_loss", "evaluation", COLOURS[1], "o"),
    ):
        points = [(row["step"], row[key]) for row in curve if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, linewidth=1.5)
    axis.set_xlabel("optimizer step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False)
    return save_figure(figure, path)
