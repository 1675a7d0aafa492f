"""Records for summarization: (article, summary, instruction) triples of the hub or of local files, read lazily."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsity.errors import UserError, reported_as
from sparsity.files import read_json, read_jsonl
from sparsity.sources import stream_rows
from sparsity.text import DEFAULT_INSTRUCTION, pick_column

Triple = tuple[str, str, str]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
INPUT_COLUMNS = ("input", "article", "document", "text")
OUTPUT_COLUMNS = ("output", "highlights", "summary", "abstract")
HELD_OUT_NAME = re.compile(r"(test|eval|val|valid|validation|dev)(?![a-z])", re.IGNORECASE)


def hub_triples(split: str, instruction: str | None = None) -> Iterator[Triple]:
    """Stream a split of cnn_dailymail 3.0.0 (See et al., 2017) from the Hugging Face hub.

    Raises:
        UserError: the hub cannot be reached, or the download breaks off.
    """
    from datasets import load_dataset

    message = (
        "cannot read cnn_dailymail from the hub; check the network (`hf download abisee/cnn_dailymail "
        "--repo-type dataset --include '3.0.0/t*' --local-dir cnn_dailymail` "
        "keeps a copy for --source cnn_dailymail/3.0.0)"
    )
    with reported_as(message, Exception):  # of a dozen unrelated classes: the network stack below datasets
        for row in load_dataset("abisee/cnn_dailymail", "3.0.0", split=split, streaming=True):
            yield row["article"], row["highlights"], instruction or DEFAULT_INSTRUCTION


def list_files(source: str | Path) -> tuple[list[Path], list[Path]]:
    """Data files of a file or folder, as (training files, evaluation files).

    In a folder, files named test, eval, val, valid, validation or dev (and test-0001 and so on) are for evaluation.

    Raises:
        UserError: nothing there, or no file of a known type.
    """
    source = Path(source)
    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise UserError(f"source {source} has an unknown type '{source.suffix}'; use {', '.join(SUFFIXES)}")
        return [source], []
    if not source.is_dir():
        raise UserError(f"source not found: {source}; give a file, a folder, or 'aclsum'")
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"source folder {source} holds no file of type {', '.join(SUFFIXES)}")
    held_out = [path for path in files if HELD_OUT_NAME.match(path.name)]
    return [path for path in files if path not in held_out], held_out


def file_triples(
    files: Iterable[Path], input_column: str | None, output_column: str | None, instruction: str | None
) -> Iterator[Triple]:
    """Read triples from files. `instruction` overrides the column of that name.

    Raises:
        UserError: an unreadable file, a missing column, or a field that is not text.
    """
    for path in files:
        for number, row in enumerate(read_rows(path), start=1):
            where = f"source {path} record {number}"
            article = pick_column(row, input_column, INPUT_COLUMNS, where, "; choose another with --input_column")
            summary = pick_column(row, output_column, OUTPUT_COLUMNS, where, "; choose another with --output_column")
            own = row.get("instruction")
            yield article, summary, instruction or (own if isinstance(own, str) and own else DEFAULT_INSTRUCTION)


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a .json (a list), .jsonl, .csv (with header) or .parquet file; all but .json are streamed.

    JSON is parsed here and not by `datasets`, which refuses columns of mixed types even if nobody needs them.

    Raises:
        UserError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from read_jsonl(path, "source")
    elif suffix == ".json":
        rows = read_json(path, "source")
        if not isinstance(rows, list):
            raise UserError(f"source {path} must hold a list of records, got {type(rows).__name__}")
        yield from rows
    else:
        with reported_as(f"source {path} is not readable", Exception):  # of many classes: pandas, pyarrow, datasets
            yield from stream_rows(path)
