"""The table of all runs, and reading what they left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsity.errors import UserError
from sparsity.reporting.results import Run, Sparsity, markdown, read_run, split_pairs, table_rows

ROUGE = {"rouge1": 25.0, "rouge2": 12.5, "rougeL": 20.0, "rougeLsum": 21.0}


def test_rows_show_percent_and_dashes_for_what_is_missing():
    full = Run("PTS", Path("a"), {"": {"perplexity": 12.345}}, ROUGE, sparsity=Sparsity(50, 100, 7, 6))
    header, *rows = table_rows([full, Run("dense", Path("b"))])
    assert rows[0] == ["PTS", "12.35", "25.00", "12.50", "20.00", "21.00", "50.00%", "6 of 7"]
    assert rows[1] == ["dense", *["-"] * 7] and len(header) == 8


def test_markdown_table_is_aligned():
    lines = markdown([["model", "n"], ["a", "10"], ["longer name", "9"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == "| model       |  n |" and lines[1] == "|-------------|---:|" and lines[3].endswith("|  9 |")


def test_pairs_are_names_and_paths():
    assert split_pairs(["a=x/y", "b=c=d"], "--run") == {"a": Path("x/y"), "b": Path("c=d")}
    for wrong in ("a", "=x", "a="):
        with pytest.raises(UserError, match="--run takes NAME=PATH"):
            split_pairs([wrong], "--run")
    with pytest.raises(UserError, match="'a' twice"):
        split_pairs(["a=x", "a=y"], "--run")


def test_files_with_and_without_a_unit_give_the_same_figures(tmp_path):
    """Earlier versions wrote fractions and no unit."""
    intervals = {"rouge1": [24.0, 26.0]}
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, factor in ((old, 0.01), (new, 1)):
        folder.mkdir()
        scores = {name: factor * value for name, value in ROUGE.items()}
        bounds = {name: [factor * end for end in pair] for name, pair in intervals.items()}
        found = {**scores, "confidence_intervals_95": bounds, "examples": 3}
        (folder / "rouge.json").write_text(json.dumps(found | ({"unit": "percent"} if factor == 1 else {})))
    for folder in (old, new):
        found = read_run("a", folder).rouge
        assert {name: found[name] for name in ROUGE} == pytest.approx(ROUGE)
        assert found["confidence_intervals_95"]["rouge1"] == pytest.approx(intervals["rouge1"])
        assert found["examples"] == 3
    (new / "rouge.json").write_text(json.dumps({**ROUGE, "unit": "permille"}))
    with pytest.raises(UserError, match="unit 'permille'"):
        read_run("a", new)


def test_empty_folder_is_no_run(tmp_path):
    with pytest.raises(UserError, match="has none of ppl.json"):
        read_run("a", tmp_path)


def test_every_text_has_a_column(tmp_path):
    """Perplexities of eval.py by name, of eval_ppl.py by file, and of an earlier run with one text."""
    (tmp_path / "new").mkdir()
    named = {"papers": {"perplexity": 30.0}, "manual": {"perplexity": 14.5}}
    (tmp_path / "new" / "rouge.json").write_text(json.dumps({**ROUGE, "unit": "percent", "perplexities": named}))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "ppl.json").write_text(json.dumps({"perplexity": 40.0}))
    (tmp_path / "old" / "ppl_manual.json").write_text(json.dumps({"perplexity": 20.0}))
    header, *rows = table_rows([read_run(name, tmp_path / name) for name in ("new", "old")])
    assert header[1:4] == ["perplexity, papers", "perplexity, manual", "perplexity"]
    assert [row[1:4] for row in rows] == [["30.00", "14.50", "-"], ["-", "20.00", "40.00"]]
    (tmp_path / "new" / "rouge.json").write_text(json.dumps({**ROUGE, "perplexities": {"papers": 30.0}}))
    with pytest.raises(UserError, match="'perplexities' without numbers"):
        read_run("new", tmp_path / "new")
