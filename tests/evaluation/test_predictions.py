"""The log of predictions: what a resumed evaluation takes from it."""

from __future__ import annotations

import pytest

from sparsity.errors import UserError
from sparsity.evaluation.predictions import PredictionLog


def texts(*indices):
    return {index: f"text {index}" for index in indices}


def test_log_joins_the_parts_of_all_processes_and_knows_its_own_run(tmp_path):
    path = tmp_path / "p.jsonl"
    log, other = PredictionLog(path, "four beams", ["r"] * 3), PredictionLog(path, "one beam", ["r"] * 4)
    log.append(0, texts(0, 2))
    log.append(1, texts(1))
    other.append(0, texts(3))
    assert log.load() == texts(0, 1, 2)
    log.finish(texts(0, 1, 2))
    assert [item.name for item in tmp_path.iterdir()] == ["p.jsonl"]
    assert log.load() == texts(0, 1, 2)
    assert other.load() == {}


def test_only_a_log_is_overwritten(tmp_path):
    foreign = tmp_path / "notes.txt"
    foreign.write_text("my notes\n")
    with pytest.raises(UserError, match="holds something else"):
        PredictionLog(foreign, "key", []).check()
    with pytest.raises(UserError, match="holds something else"):
        PredictionLog(tmp_path, "key", []).check()
    PredictionLog(tmp_path / "new" / "p.jsonl", "key", []).check()
