"""The HTML page of the report."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any

from sparsity.files import atomic_path
from sparsity.reporting.plots import COLOURS, plot_kept, plot_layers, plot_loss, plot_scores
from sparsity.reporting.results import Run, text_names
from sparsity.text import valid_unicode

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


def embed(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def html_table(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table><thead>{line(rows[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def html_samples(runs: list[Run], count: int) -> str:
    """The first examples that every run with predictions has, reference first."""
    with_predictions = [(run, colour) for run, colour in zip(runs, COLOURS, strict=False) if run.predictions]
    if not with_predictions:
        return ""
    shared = sorted(set.intersection(*(set(run.predictions) for run, _ in with_predictions)))[:count]
    blocks = []
    for index in shared:
        cells = [("reference", "#c9d0d8", with_predictions[0][0].predictions[index]["reference"])]
        cells += [(run.name, colour, run.predictions[index]["prediction"]) for run, colour in with_predictions]
        boxes = ""
        for name, colour, text in cells:
            lines = html.escape(re.sub(r"\s*\n\s*", "\n", text.strip()))  # a damaged model can write many blank lines
            boxes += f'<div style="border-top-color:{colour}"><b>{html.escape(name)}</b>{lines or "(empty)"}</div>'
        blocks.append(f'<p class="note">Example {index}</p><div class="sample">{boxes}</div>')
    return "".join(blocks)


def protocol_notes(runs: list[Run]) -> list[str]:
    """One sentence each on how perplexity and ROUGE were measured, as far as the result files say."""
    notes = []
    for text in text_names(runs):
        result = next(run.perplexities[text] for run in runs if text in run.perplexities)
        if "protocol" in result:
            notes.append(f"Perplexity{f', {text}' if text else ''}, {result['protocol']}.")
    if counts := [run.rouge["examples"] for run in runs if run.rouge and "examples" in run.rouge]:
        notes.append(f"ROUGE: mean F-measure in percent over {counts[0]} examples.")
    if any(run.matrices for run in runs):
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
    if any(run.perplexities or run.rouge for run in runs):
        image = plot_scores(runs, output / "scores.png")
        parts += ["<h2>Before and after</h2>", embed(image, "Bars of perplexity and ROUGE for each model")]
    if len({round(run.sparsity(), 3) for run in runs if run.matrices and run.perplexities}) > 2:
        image = plot_kept(runs, output / "kept.png")
        parts += ["<h2>Quality by weights kept</h2>", embed(image, "Perplexity over the weights that are kept")]
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
        temporary.write_text(valid_unicode(page), encoding="utf-8")
    return output / "report.html"
