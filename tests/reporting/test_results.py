"""The table of all runs, and reading what they left."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import sparse_matrix

from sparsity.inspection import inspect_matrix
from sparsity.reporting.results import Run, markdown, read_run, table_rows

ROUGE = {"rouge1": 25.0, "rouge2": 12.5, "rougeL": 20.0, "rougeLsum": 21.0}


def test_rows_show_percent_and_dashes_for_what_is_missing():
    matrices = [inspect_matrix("a", sparse_matrix()), inspect_matrix("b", torch.ones(32, 64))]
    full = Run("PTS", Path("a"), {"": {"perplexity": 12.345}}, ROUGE, matrices=matrices)
    header, *rows = table_rows([full, Run("dense", Path("b"))])
    assert rows[0] == ["PTS", "12.35", "25.00", "12.50", "20.00", "21.00", "25.00%", "1 of 2"]
    assert rows[1] == ["dense", *["-"] * 7] and len(header) == 8


def test_markdown_table_is_aligned():
    lines = markdown([["model", "n"], ["a", "10"], ["longer name", "9"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == "| model       |  n |" and lines[1] == "|-------------|---:|" and lines[3].endswith("|  9 |")


def test_every_text_has_a_column(tmp_path):
    """Perplexities of several texts by name, and that of a text without a name."""
    named = {"perplexities": {"papers": {"perplexity": 30.0}, "manual": {"perplexity": 14.5}}}
    for name, content in {"several": named, "one": {"perplexity": 40.0}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "perplexity.json").write_text(json.dumps(content))
    header, *rows = table_rows([read_run(name, tmp_path / name) for name in ("several", "one")])
    assert header[1:4] == ["perplexity, papers", "perplexity, manual", "perplexity"]
    assert [row[1:4] for row in rows] == [["30.00", "14.50", "-"], ["-", "-", "40.00"]]
