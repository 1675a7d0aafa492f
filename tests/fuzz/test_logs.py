"""Logs that grow line by line, and the result files of model cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzzing import REFUSED, attempt, fuzz, json_files, jsonl_files, parsed_lines
from hypothesis import example, given
from hypothesis import strategies as st

from sparsity.evaluation.predictions import PredictionLog
from sparsity.export.model_card import _figures_text
from sparsity.files import is_whole_number
from sparsity.metrics import read_metrics
from sparsity.sat.callbacks import read_log
from sparsity.text import valid_unicode

CURVE = [{"step": step, "loss": 3.0 - step / 10, "lr": 1e-4} for step in (1, 2)]
CURVE += [{"step": 2, "eval_loss": 2.75}]
ROUGE = {"rouge1": 25.5, "rouge2": 12.5, "rougeL": 20.0, "rougeLsum": 21.0, "examples": 2}
ROUGE |= {"confidence_intervals_95": {"rouge1": [24.0, 26.0]}, "unit": "percent"}
ROUGE |= {"perplexities": {"papers": {"perplexity": 30.25, "protocol": "windows of 8 tokens"}}}
PERPLEXITY = {"perplexity": 12.5, "protocol": "windows of 8 tokens", "dtype": "fp32"}
REFERENCES = ["It rose.", "Ships left, “slowly”.", "é"]
KEY = "0123456789abcdef"
LINES = [
    {"index": index, "prediction": f"“Text” {index}", "reference": reference, "run": KEY}
    for index, reference in enumerate(REFERENCES)
]


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
            if 0 <= line["index"] < len(REFERENCES) and isinstance(text, str) and valid_unicode(text) == text:
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
    log = PredictionLog(path, KEY, REFERENCES)
    part = written(path.with_name(f"{path.name}.part-0"), content)
    loaded = log.load()
    assert loaded == usable_predictions(content) and part.read_bytes() == content
    log.append(0, {index: f"new {index}" for index in range(3) if index not in loaded})
    assert log.load() == {**{index: f"new {index}" for index in range(3)}, **loaded}


# ------------------------------------------------------------------------------------------------------------- results


@fuzz
@given(st.one_of(json_files(ROUGE), json_files(PERPLEXITY)))
@example(json.dumps({"perplexity": 3, "rouge1": 2}).encode())
@example(json.dumps({**ROUGE, "confidence_intervals_95": {"rouge1": "ab"}}).encode())
def test_figures_of_a_model_card(folder, content):
    path = written(folder / "figures.json", content)
    text = attempt(lambda: _figures_text([("sparse", read_metrics(path))]), path)
    assert text is REFUSED or "| sparse |" in text
