"""Logs that grow line by line, result files of reports and model cards, and caches that are made anew if damaged."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
from fuzzing import (
    REFUSED,
    attempt,
    fuzz,
    json_files,
    jsonl_files,
    parsed,
    parsed_lines,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsity.evaluation.predictions import PredictionLog, prediction_line
from sparsity.export.model_card import _figures_text
from sparsity.files import is_number, is_whole_number
from sparsity.metrics import read_metrics
from sparsity.reporting.page import html_samples, protocol_notes, write_report
from sparsity.reporting.results import markdown, read_lines, read_run, table_rows
from sparsity.sat.callbacks import read_log
from sparsity.text import valid_unicode

CURVE = [{"step": step, "loss": 3.0 - step / 10, "lr": 1e-4, "sparsity": 0.5} for step in (1, 2)]
CURVE += [{"step": 2, "eval_loss": 2.75}]
LAYERS = [
    {"name": f"model.layers.{index}.up_proj", "relative_error": error, "sparsity": 0.5, "shape": [4, 8]}
    for index, error in enumerate([0.25, None])
]
ROUGE = {"rouge1": 25.5, "rouge2": 12.5, "rougeL": 20.0, "rougeLsum": 21.0, "examples": 2}
ROUGE |= {"confidence_intervals_95": {"rouge1": [24.0, 26.0]}, "unit": "percent"}
ROUGE |= {"perplexities": {"papers": {"perplexity": 30.25, "protocol": "windows of 8 tokens"}}}
PERPLEXITY = {"perplexity": 12.5, "protocol": "windows of 8 tokens", "dtype": "fp32"}
RECORDS = [{"output": "It rose."}, {"output": "Ships left, “slowly”."}, {"output": "é"}]
KEY = "0123456789abcdef"
LINES = [{**prediction_line(index, f"“Text” {index}", RECORDS), "run": KEY} for index in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --------------------------------------------------------------------------------------------------------------- logs


@fuzz
@given(jsonl_files(CURVE))
@example(b'5\n{"loss": 1}\n{"step": "2"}\n{"step": 1, "loss": 2.5}\n')
def test_training_log(folder, content):
    path = written(folder / "train_log.jsonl", content)
    lines = [line for line in parsed_lines(content) if isinstance(line, dict) and is_whole_number(line.get("step"))]
    assert repr(read_log(path)) == repr(lines)
    assert path.read_bytes() == content


def usable_predictions(content: bytes) -> dict[int, str]:
    """The predictions in a file that belong to a run of `RECORDS`."""
    predictions = {}
    for line in parsed_lines(content):
        if isinstance(line, dict) and line.get("run") == KEY and is_whole_number(line.get("index")):
            text = line.get("prediction")
            if 0 <= line["index"] < len(RECORDS) and isinstance(text, str) and valid_unicode(text) == text:
                predictions[line["index"]] = text
    return predictions


@fuzz
@given(jsonl_files(LINES))
@example(json.dumps({**LINES[0], "index": 7}).encode())
@example(json.dumps({**LINES[0], "index": True}).encode())
@example(json.dumps({**LINES[0], "prediction": "half a pair \ud800"}).encode())
@example(json.dumps(LINES[0], ensure_ascii=False).encode().replace("“".encode(), b"\xe2\x80"))
def test_predictions(folder, content):
    path = folder / "own" / "predictions.jsonl"
    log = PredictionLog(path, KEY)
    part = written(path.with_name(f"{path.name}.part-0"), content)
    loaded = log.load(len(RECORDS))
    assert loaded == usable_predictions(content) and part.read_bytes() == content
    log.append(0, [prediction_line(index, f"new {index}", RECORDS) for index in range(3) if index not in loaded])
    assert log.load(len(RECORDS)) == {**{index: f"new {index}" for index in range(3)}, **loaded}


# ------------------------------------------------------------------------------------------------------------- results


def report(folder: Path) -> tuple:
    """A run and the text of its report."""
    run = read_run("a", folder)
    return run, markdown(table_rows([run])), protocol_notes([run]), html_samples([run], 4)


@fuzz
@given(st.sampled_from(["rouge.json", "perplexity.json", "predictions.jsonl"]), st.data())
@example("rouge.json", None).via("intervals that are no pairs")
def test_results_of_a_run(folder, name, data):
    root = folder / "run"
    shutil.rmtree(root, ignore_errors=True)
    if data is None:
        content = json.dumps({**ROUGE, "confidence_intervals_95": {"rouge1": [1]}}).encode()
    elif name == "rouge.json":
        content = data.draw(json_files(ROUGE))
    else:
        content = data.draw(jsonl_files(LINES) if name == "predictions.jsonl" else json_files(PERPLEXITY))
    path = written(root / name, content)
    result = attempt(lambda: report(root), root)
    if result is not REFUSED:
        run, table, *_ = result
        assert all(is_number(item["perplexity"]) for item in run.perplexities.values())
        lines = table.split("\n")
        assert len(lines) == 3 and all(line.isprintable() for line in lines)
        if name == "rouge.json":
            assert repr(run.rouge) == repr(parsed(content))
        if name == "predictions.jsonl":
            assert repr(run.predictions) == repr({line["index"]: line for line in lines_of(content)})
    assert path.read_bytes() == content


def lines_of(content: bytes) -> list[dict]:
    keys = {"index", "prediction", "reference"}
    return [line for line in parsed_lines(content) if isinstance(line, dict) and keys <= line.keys()]


@fuzz
@given(st.one_of(json_files(ROUGE), json_files(PERPLEXITY)))
@example(json.dumps({"perplexity": 3, "rouge1": 2}).encode())
@example(json.dumps({**ROUGE, "confidence_intervals_95": {"rouge1": "ab"}}).encode())
@example(json.dumps({**ROUGE, "rouge2": 10**400}).encode())
def test_figures_of_a_model_card(folder, content):
    path = written(folder / "figures.json", content)
    text = attempt(lambda: _figures_text([("sparse", read_metrics(path))]), path)
    assert text is REFUSED or "| sparse |" in text


# Each draws several plots.
@settings(fuzz, max_examples=25)
@given(json_files(ROUGE), json_files(PERPLEXITY), jsonl_files(LINES), jsonl_files(LAYERS), jsonl_files(CURVE))
def test_whole_report(folder, rouge, perplexity, predictions, layers, curve):
    root, output = folder / "reported", folder / "report"
    output.mkdir(exist_ok=True)
    runs = []
    for name, content in {"rouge.json": rouge, "perplexity.json": perplexity, "predictions.jsonl": predictions}.items():
        path = written(root / name / name, content)
        runs.append(attempt(functools.partial(read_run, name, path.parent), root))
    logs = []
    for content, keys in ((layers, ("name", "relative_error", "sparsity")), (curve, ("step",))):
        path = written(root / "lines.jsonl", content)
        logs.append(attempt(functools.partial(read_lines, path, "log", keys), path))
    runs, logs = [run for run in runs if run is not REFUSED], [None if log is REFUSED else log for log in logs]
    page = write_report(output, "title", table_rows(runs), runs, *logs, 3)
    assert page.read_text(encoding="utf-8").endswith("</html>\n")


# -------------------------------------------------------------------------------------------------------------- caches
