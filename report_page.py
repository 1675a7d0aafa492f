"""Plots and HTML of report.py. Colours and layout live here; what the figures are, the caller says."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rouge import ROUGE_TYPES
from utils import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from report import Run

ROUGE_NAMES = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum")
COLOURS = ("#6b7785", "#c8553d", "#2a7f62", "#3f6fb5", "#8a5fa8", "#b0892b", "#4d9fa8")

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.5rem 4rem; color: #1d2733; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.75rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
p { margin: .4rem 0 1rem; max-width: 72ch; } .note { color: #5a6673; font-size: .92rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; border-bottom: 1px solid #e3e7ec; white-space: nowrap; }
th { font-weight: 600; font-size: .88rem; color: #5a6673; border-bottom: 2px solid #c9d0d8; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
.sample { display: grid; gap: .75rem; margin: 1rem 0 1.75rem;
          grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); }
.sample div { border: 1px solid #e3e7ec; border-top: 3px solid; border-radius: 4px; padding: .6rem .8rem;
              font-size: .9rem; white-space: pre-line; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
.sample b { display: block; font-size: .8rem; color: #5a6673; margin-bottom: .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; font-size: .92rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85rem; }
"""


# ------------------------------------------------------------------------------------------------- plots


def new_figure(ratios: tuple[float, ...], height: float = 3.4) -> tuple[Figure, Any]:
    """A figure as wide as the page with one panel for each of the relative widths `ratios`; sizes in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
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
    measured = [(run.name, run.perplexity["perplexity"], colour) for run, colour in coloured if run.perplexity]
    for place, (_, value, colour) in enumerate(measured):
        left.bar(place, value, 0.62, color=colour)
        left.annotate(f"{value:.1f}", (place, value), (0, 3), textcoords="offset points", ha="center")
    left.set_xticks(range(len(measured)), [name for name, _, _ in measured])
    left.set_title("Held-out perplexity (lower is better)", fontsize=10.5)
    left.margins(y=0.12)

    scored = [(run.name, run.rouge, colour) for run, colour in coloured if run.rouge]
    width = 0.8 / max(1, len(scored))
    for number, (name, rouge, colour) in enumerate(scored):
        places = [group + (number - (len(scored) - 1) / 2) * width for group in range(len(ROUGE_TYPES))]
        values = [100 * rouge[key] for key in ROUGE_TYPES]
        intervals = rouge.get("confidence_intervals_95", {})
        ends = [[100 * end for end in intervals[key]] if key in intervals else None for key in ROUGE_TYPES]
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


def plot_layers(layers: list[dict[str, Any]], path: Path) -> Path:
    """Relative output error and zero share of every pruned matrix, by depth, one line for each kind of matrix."""
    figure, (left, right) = new_figure((2, 1), height=3.8)
    kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for order, layer in enumerate(layers):
        name = layer["name"].removesuffix(".weight")
        depth = re.search(r"\.(\d+)\.", name)
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append((int(depth.group(1)) if depth else order, layer))
    for number, (kind, members) in enumerate(kinds.items()):
        members.sort(key=lambda member: member[0])
        depths = [depth for depth, _ in members]
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": "o",
            "markersize": 3,
            "linewidth": 1.2,
            "label": kind,
        }
        left.plot(depths, [layer["relative_error"] for _, layer in members], **style)
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
        points = [(row["step"], row[key]) for row in curve if isinstance(row.get(key), int | float)]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, linewidth=1.5)
    axis.set_xlabel("optimizer step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False)
    return save_figure(figure, path)


# -------------------------------------------------------------------------------------------------- page


def embed(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def html_table(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table><thead>{line(rows[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def squeeze(text: str) -> str:
    """Without blank lines, of which a model that has lost its way writes many."""
    return re.sub(r"\s*\n\s*", "\n", text.strip())


def html_samples(runs: list[Run], count: int) -> str:
    """The first examples that every run with predictions has, reference first."""
    speaking = [(run, colour) for run, colour in zip(runs, COLOURS, strict=False) if run.predictions]
    if not speaking:
        return ""
    shared = sorted(set.intersection(*(set(run.predictions) for run, _ in speaking)))[:count]
    blocks = []
    for index in shared:
        cells = [("reference", "#c9d0d8", speaking[0][0].predictions[index]["reference"])]
        cells += [(run.name, colour, run.predictions[index]["prediction"]) for run, colour in speaking]
        boxes = "".join(
            f'<div style="border-top-color:{colour}"><b>{html.escape(name)}</b>'
            f"{html.escape(squeeze(text)) or '(empty)'}</div>"
            for name, colour, text in cells
        )
        blocks.append(f'<p class="note">Example {index}</p><div class="sample">{boxes}</div>')
    return "".join(blocks)


def protocol_notes(runs: list[Run]) -> list[str]:
    """One sentence each on how perplexity and ROUGE were measured, as far as the result files say."""
    notes = []
    for run in runs:
        if run.perplexity and "protocol" in run.perplexity:
            notes.append(f"Perplexity {run.perplexity['protocol']}.")
            break
    for run in runs:
        if run.rouge and "examples" in run.rouge:
            notes.append(f"ROUGE: mean F-measure in percent over {run.rouge['examples']} examples.")
            break
    if any(run.sparsity for run in runs):
        notes.append("Sparsity: zeros counted in the linear layers as saved, output head and embeddings aside.")
    return notes


def write_report(
    output: Path,
    title: str,
    rows: list[list[str]],
    runs: list[Run],
    layers: list[dict[str, Any]] | None,
    curve: list[dict[str, Any]] | None,
    samples: int,
) -> Path:
    """Write the PNG files and report.html into `output`; returns the path of the page."""
    parts = [f"<h1>{html.escape(title)}</h1>", html_table(rows)]
    parts += [f'<p class="note">{html.escape(" ".join(protocol_notes(runs)))}</p>']
    if any(run.perplexity or run.rouge for run in runs):
        image = plot_scores(runs, output / "scores.png")
        parts += ["<h2>Before and after</h2>", embed(image, "Bars of perplexity and ROUGE for each model")]
    if layers:
        image = plot_layers(layers, output / "layers.png")
        parts += [
            "<h2>Pruning, layer by layer</h2>",
            '<p class="note">Relative error: squared distance between the outputs of the dense and the pruned matrix '
            "on the calibration text, divided by the squared norm of the dense outputs.</p>",
            embed(image, "Error and sparsity of each pruned matrix by depth"),
        ]
    if curve:
        image = plot_loss(curve, output / "loss.png")
        parts += ["<h2>Sparsity-aware training</h2>", embed(image, "Training and evaluation loss by step")]
    if text := html_samples(runs, samples):
        parts += ["<h2>Summaries side by side</h2>", text]
    places = "".join(
        f"<dt>{html.escape(run.name)}</dt><dd>{html.escape(str(run.state or run.folder))}</dd>" for run in runs
    )
    parts += ["<h2>Files</h2>", f"<dl>{places}</dl>"]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    with atomic_path(output / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return output / "report.html"
