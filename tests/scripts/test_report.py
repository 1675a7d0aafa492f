"""report.py: the table's figures, the page and its plots, and clear errors on files that are not results."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch

import report
from sparsity.errors import UserError
from sparsity.modelopt_state import load_state


@pytest.fixture
def results(tmp_path):
    """Folders of two runs as the evaluation scripts leave them, a layer log and a training log."""
    for name, perplexity, rouge in (("dense", 18.234, 25.0), ("PTS", 47.9, 12.5)):
        folder = tmp_path / "eval" / name
        folder.mkdir(parents=True)
        perplexity_json = {"perplexity": perplexity, "protocol": "protocol: 8 windows"}
        (folder / "perplexity.json").write_text(json.dumps(perplexity_json))
        scores = {"rouge1": rouge, "rouge2": rouge / 2, "rougeL": rouge / 4, "rougeLsum": rouge / 5}
        intervals = {key: [value * 0.9, value * 1.1] for key, value in scores.items()}
        (folder / "rouge.json").write_text(json.dumps({**scores, "confidence_intervals_95": intervals, "examples": 3}))
        lines = [
            {"index": i, "prediction": f"{name} says <b>{i}</b> & more", "reference": f"truth {i}"} for i in range(3)
        ]
        (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    layer = "model.layers.{}.mlp.{}_proj.weight"
    layers = [
        {"name": layer.format(i, kind), "relative_error": 0.1 * i, "sparsity": 0.5, "shape": [8, 8]}
        for i in range(3)
        for kind in ("up", "down")
    ]
    (tmp_path / "layers.jsonl").write_text("\n".join(map(json.dumps, layers)))
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "eval_loss": 2.7}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return tmp_path


@pytest.fixture
def make(monkeypatch, results):
    def run(*arguments, runs=("dense", "PTS")):
        pairs = [word for name in runs for word in ("--run", f"{name}={results / 'eval' / name}")]
        command = ["report.py", "--output_dir", results / "report", *pairs, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        report.main()
        return results / "report"

    return run


def test_table_shows_measured_figures(make, state_path, model_dir, capsys):
    make("--state", f"PTS={state_path}", "--model_dir", model_dir)
    rows = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in capsys.readouterr().out.splitlines()]
    # Four attention and three feed-forward matrices in each of two layers.
    assert rows[2] == ["dense", "18.23", "25.00", "12.50", "6.25", "5.00", "0.00%", "0 of 14"]
    assert rows[3] == ["PTS", "47.90", "12.50", "6.25", "3.12", "2.50", "50.00%", "14 of 14"]


def test_page_is_whole_and_self_contained(make, results):
    folder = make("--pts_layers", results / "layers.jsonl", "--train_log", results / "log.jsonl", "--samples", 2)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "dense says &lt;b&gt;1&lt;/b&gt; &amp; more" in page and "truth 1" in page
    assert "truth 2" not in page  # only two samples were asked for
    for name in ("scores.png", "layers.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["layers.png", "loss.png", "report.html", "scores.png"]


def test_quality_is_plotted_over_what_three_runs_keep(make, results, model_dir, state_path, tmp_path, capsys):
    """The dense model, half of all weights, and a state with every other matrix dense."""
    state = load_state(state_path)
    tensors = state["model_state_dict"]
    masks = [name for name in tensors if name.endswith("weight_mask")]
    state["model_state_dict"] = {name: tensors[name] for name in tensors if name not in masks[::2]}
    torch.save(state, tmp_path / "half.pth")
    weights = [tensors[name].numel() for name in masks]
    expected = 0.5 * sum(weights[1::2]) / sum(weights)
    shutil.copytree(results / "eval" / "PTS", results / "eval" / "half")
    more = ["--state", f"PTS={state_path}", "--state", f"half={tmp_path / 'half.pth'}", "--model_dir", model_dir]
    folder = make(*more, runs=("dense", "PTS", "half"))
    assert f"{expected:.2%}" in capsys.readouterr().out
    assert (folder / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert "Quality by weights kept" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_a_run_lacks_is_left_out(make, results, capsys):
    (results / "eval" / "PTS" / "rouge.json").unlink()
    (results / "eval" / "PTS" / "predictions.jsonl").unlink()
    page = (make() / "report.html").read_text(encoding="utf-8")
    assert re.search(r"\| PTS +\| +47.90 \| +- \|", capsys.readouterr().out)
    assert "dense says" in page and "PTS says" not in page


def test_only_summaries_that_all_runs_have_are_shown(make, results):
    lines = (results / "eval" / "PTS" / "predictions.jsonl").read_text().splitlines()
    (results / "eval" / "PTS" / "predictions.jsonl").write_text(lines[2])
    page = (make() / "report.html").read_text(encoding="utf-8")
    assert "Example 2" in page and "Example 0" not in page


def break_file(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (break_file("eval/dense/perplexity.json", '{"perplexity": "low"}'), (), "has no ROUGE or perplexity"),
        (break_file("eval/dense/perplexity.json", "{"), (), "is not valid JSON"),
        (break_file("eval/dense/rouge.json", "[]"), (), "has no ROUGE or perplexity"),
        (break_file("eval/dense/predictions.jsonl", ""), (), "has no line with the fields index"),
        (None, ("--run", "x=/nowhere/at all"), "has none of perplexity.json"),
        (None, ("--run", "x"), "takes NAME=VALUE"),
        (None, ("--run", "PTS=elsewhere"), "got the name 'PTS' twice"),
        (None, ("--state", "SAT=a.pth"), "which is no --run"),
        (None, ("--state", "PTS=/nowhere.pth"), "not found: /nowhere.pth"),
        (None, ("--pts_layers", "/nowhere.jsonl"), "layer log not found"),
        (break_file("log.jsonl", '{"loss": 1}'), ("--train_log", "log.jsonl"), "no line with the fields step"),
    ],
)
def test_wrong_results_are_refused_in_one_line(make, results, monkeypatch, damage, arguments, message):
    monkeypatch.chdir(results)
    if damage:
        damage(results)
    with pytest.raises(UserError, match=message) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)
    assert not (results / "report" / "report.html").exists()
