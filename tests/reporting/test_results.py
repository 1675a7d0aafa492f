"""The table of all runs, and reading what they left."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsity.errors import UserError
from sparsity.reporting.results import Run, Sparsity, markdown, read_run, split_pairs, table_rows

ROUGE = {"rouge1": 0.25, "rouge2": 0.125, "rougeL": 0.2, "rougeLsum": 0.21}


def test_rows_show_percent_and_dashes_for_what_is_missing():
    full = Run("PTS", Path("a"), {"perplexity": 12.345}, ROUGE, sparsity=Sparsity(50, 100, 7, 6))
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


def test_empty_folder_is_no_run(tmp_path):
    with pytest.raises(UserError, match="has none of ppl.json"):
        read_run("a", tmp_path)
