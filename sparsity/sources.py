"""Where summarization records come from: the hub's CNN/DailyMail, local files, or the ACLSum wheel.

Each source yields (article, summary, instruction) triples lazily, so that no source has to fit in memory.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity.errors import UserError, first_line
from sparsity.files import read_json, read_jsonl
from sparsity.text import DEFAULT_INSTRUCTION

Triple = tuple[str, str, str]


CNN_DAILYMAIL = ("abisee/cnn_dailymail", "3.0.0")  # hub id, configuration


SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


INPUT_COLUMNS = ("input", "article", "document", "text")


OUTPUT_COLUMNS = ("output", "highlights", "summary", "abstract")


ACLSUM_SECTIONS = ("abstract", "introduction", "conclusion")


ACLSUM_ASPECTS = ("challenge", "approach", "outcome")


ACLSUM_INSTRUCTION = (
    "Summarize the challenge, the approach and the outcome of the following paper, in one sentence each."
)


SELF = "self"  # the source that the model writes


@dataclass(frozen=True)
class Source:
    """A source of text, and its share among several."""

    spec: str  # a file, or a name such as cnn_dailymail or self
    weight: float  # the weights of all sources sum to 1


def parse_sources(text: str) -> list[Source]:
    """Read "a.jsonl=0.5,self=0.5"; a source without a weight counts 1, one of weight 0 is left out.

    Raises:
        UserError: a weight is negative or not finite, or all are 0.

    >>> [(source.spec, source.weight) for source in parse_sources("a.jsonl=3,self=1")]
    [('a.jsonl', 0.75), ('self', 0.25)]
    """
    with contextlib.suppress(OSError):  # too long for a name
        if text and Path(text).exists():  # whatever its name holds
            return [Source(text, 1.0)]
    sources = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        spec, _, number = part.rpartition("=")
        try:
            sources.append(Source(spec.strip(), float(number)) if spec else Source(part, 1.0))
        except ValueError:
            sources.append(Source(part, 1.0))
    for source in sources:
        if not 0 <= source.weight < math.inf:
            raise UserError(f"the weight {source.weight:g} of source '{source.spec}' must be a number from 0 up")
    total = sum(source.weight for source in sources)
    if total <= 0:
        raise UserError(f"the weights of the sources '{text}' sum to 0; give at least one a weight above 0")
    return [Source(source.spec, source.weight / total) for source in sources if source.weight]


def hub_triples(split: str, instruction: str | None = None) -> Iterator[Triple]:
    """Stream a split of cnn_dailymail 3.0.0 (See et al., 2017) from the Hugging Face hub.

    Raises:
        UserError: the hub cannot be reached, or the download breaks off.
    """
    from datasets import load_dataset

    count = 0
    try:
        for row in load_dataset(*CNN_DAILYMAIL, split=split, streaming=True):
            yield row["article"], row["highlights"], instruction or DEFAULT_INSTRUCTION
            count += 1
    except Exception as error:  # the network stack below datasets raises errors of a dozen unrelated classes
        raise UserError(
            f"reading cnn_dailymail from the hub failed after {count} records ({first_line(error)}); "
            "check the network, or give local files with --source"
        ) from error


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
    held_out = [
        path for path in files if re.match(r"(test|eval|val|valid|validation|dev)(?![a-z])", path.name, re.IGNORECASE)
    ]
    return [path for path in files if path not in held_out], held_out


def file_triples(
    files: Iterable[Path], input_column: str | None, output_column: str | None, instruction: str | None
) -> Iterator[Triple]:
    """Read (article, summary, instruction) from files; an `instruction` column counts unless one is given.

    Raises:
        UserError: an unreadable file, a missing column, or a field that is not text.
    """
    for path in files:
        for number, row in enumerate(read_rows(path), start=1):
            if not isinstance(row, dict):
                raise UserError(
                    f"source {path} record {number} is a {type(row).__name__}, not an object with named fields"
                )
            article, summary = (
                _field(row, wanted, known, flag, f"source {path} record {number}")
                for wanted, known, flag in (
                    (input_column, INPUT_COLUMNS, "--input_column"),
                    (output_column, OUTPUT_COLUMNS, "--output_column"),
                )
            )
            own = row.get("instruction")
            yield article, summary, instruction or (own if isinstance(own, str) and own else DEFAULT_INSTRUCTION)


def _field(row: dict[str, Any], wanted: str | None, known: tuple[str, ...], flag: str, where: str) -> str:
    name = wanted or next((column for column in known if column in row), None)
    if name is None or name not in row:
        looked_for = f"column '{wanted}'" if wanted else f"column {' or '.join(known)}"
        found = ", ".join(str(column) for column in row) or "none"
        raise UserError(f"{where} has no {looked_for}; columns found: {found}; choose one with {flag}")
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column '{name}' holds a {type(value).__name__}, not text; choose another with {flag}"
        )
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .json (list), .jsonl, .csv (with header) or .parquet file; all but .json are streamed."""
    readers = {
        ".json": _json_rows,
        ".jsonl": lambda path: read_jsonl(path, "source"),
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"source {path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except OSError as error:
        raise UserError(f"source {path} cannot be read: {first_line(error)}") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    rows = read_json(path, "source")
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise UserError(f"source {path} must hold a list of records, found {type(rows).__name__}")
    yield from rows


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is less than a long article
    with open(path, encoding="utf-8-sig", newline="") as stream:
        try:
            for row in csv.DictReader(stream, strict=True):
                row.pop(None, None)  # cells beyond the header
                yield row
        except csv.Error as error:
            raise UserError(f"source {path} is not a valid CSV file: {error}") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"source {path} is not a readable Parquet file: {first_line(error)}") from error


def aclsum_folder() -> Path:
    """The data folder inside the installed wheel, found without importing it (its dependencies are not needed)."""
    spec = importlib.util.find_spec("aclsum")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / "dataset" / "test.jsonl").is_file():
            return Path(folder) / "dataset"
    raise UserError("the ACLSum data set is not installed; run: pip install --no-deps aclsum==0.1.2")


def aclsum_papers(split: str) -> list[dict[str, Any]]:
    """The papers of a split ("train", "val" or "test") with sentences and expert summaries (Takeshita et al., 2024)."""
    return read_json(aclsum_folder() / f"{split}.jsonl", "ACLSum split")


def aclsum_triples(splits: Iterable[str], instruction: str | None = None) -> Iterator[Triple]:
    """Article: abstract, introduction and conclusion as paragraphs. Summary: one line for each of the three aspects."""
    for split in splits:
        for paper in aclsum_papers(split):
            sections = [paper["sentences"][name] for name in ACLSUM_SECTIONS]
            article = "\n\n".join(" ".join(map(detokenize, sentences)) for sentences in sections if sentences)
            summary = "\n".join(paper["summary"][aspect].strip() for aspect in ACLSUM_ASPECTS)
            yield article, summary, instruction or ACLSUM_INSTRUCTION


def aclsum_bodies(split: str, without: str | None = None) -> Iterator[dict[str, str]]:
    """{"id", "text"} of the bodies of the papers in `split`, without those that are also in the split `without`."""
    excluded = {paper["id"] for paper in aclsum_papers(without)} if without else set()
    for paper in aclsum_papers(split):
        file = aclsum_folder() / "paper_jsons" / f"{paper['id']}.json"
        if paper["id"] not in excluded and file.is_file():
            paragraphs = read_json(file, "ACLSum paper")["pdf_parse"]["body_text"]
            text = "\n".join(paragraph["text"] for paragraph in paragraphs)
            if text.strip():
                yield {"id": paper["id"], "text": text}


def detokenize(sentence: str) -> str:
    """Undo Penn Treebank tokenization.

    >>> detokenize("it ca n't ( yet ) .")
    "it can't (yet)."
    """
    from nltk.tokenize.treebank import TreebankWordDetokenizer

    tokens, inside = [], False
    for token in sentence.split():
        if token == '"':  # straight quotes do not say whether they open or close; they alternate
            token, inside = ("''" if inside else "``"), not inside
        tokens.append(token)
    text = TreebankWordDetokenizer().detokenize(tokens)
    return re.sub(r" ([/–]) ", r"\1", text)
