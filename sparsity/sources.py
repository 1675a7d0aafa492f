"""Where text comes from: plain text of files, folders and hub data sets; summarization records of data_prep.py.

`parse_sources` defines the grammar that --calib_data, --text_path and --text share:

    SOURCE[=WEIGHT] [SOURCE[=WEIGHT]…]

    SOURCE   a file           .txt, .json, .jsonl, .csv, .parquet or .arrow
             a folder         of such files, or of a data set that was saved with save_to_disk
             a hub data set   NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; FOLDER::SPLIT works as well
             self             text that the model writes itself

A source without a weight has the weight 1; what counts is its share of the sum. Records come as (article, summary,
instruction) triples, lazily, so that no source has to fit in memory.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.errors import UserError, first_line
from sparsity.files import file_digest, is_file, path_exists, read_json, read_jsonl
from sparsity.text import DEFAULT_INSTRUCTION, TEXT_FIELDS, read_texts, sample_blocks, valid_unicode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

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


# -------------------------------------------------------------------------------------------------------- plain text


SELF = "self"


CALIBRATION_TEXT = "cnn_dailymail"  # what hf_pts.py calibrates on unless told otherwise


# Names that modelopt's calibration knows, and the hub data sets of plain text that they stand for.
SHORT_NAMES = {
    "cnn_dailymail": f"{CNN_DAILYMAIL[0]}:{CNN_DAILYMAIL[1]}",
    "c4": "allenai/c4:en",
    "pile": "monology/pile-uncopyrighted",
    "wikitext": "Salesforce/wikitext:wikitext-103-v1",
}


TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow")


# Of a data set that is read in part: twice the wanted text, counting no more of a document than the length of a usual
# article, so that many documents contribute. Four characters are about one token.
CHARACTERS_PER_TOKEN, COUNTED_CHARACTERS, SHUFFLE_BUFFER = 4, 3200, 1000


@dataclass(frozen=True)
class Source:
    """One source of plain text.

    Attributes:
        spec: a path, a hub data set, or SELF; see the grammar above.
        weight: its share of the text; the weights of a list sum to 1.
    """

    spec: str
    weight: float = 1.0


def parse_sources(given: str | Sequence[str]) -> list[Source]:
    """Parse SOURCE[=WEIGHT] items, without opening any source; an item may also hold several, separated by commas.

    An existing path may contain ',', ':' and '='.

    Raises:
        UserError: an empty source, a weight that is not a number of at least 0, or weights that sum to 0.
    """
    items = [given] if isinstance(given, str) else given
    sources = [_parse_source(part) for item in items for part in _parts_of_item(item)]
    total = sum(source.weight for source in sources)
    if not 0 < total < math.inf:
        raise UserError(f"the weights of the sources '{' '.join(items)}' sum to {total:g}; give weights greater than 0")
    normalized = [replace(source, weight=source.weight / total) for source in sources]
    return [source for source in normalized if source.weight]  # beside a huge weight, a tiny one may round to 0


def _parts_of_item(item: str) -> list[str]:
    """The sources in one item: those between commas, unless it names one existing path."""
    is_one = path_exists(item) or path_exists(item.rpartition("=")[0])
    return [item] if is_one else [part.strip() for part in item.split(",")]


def _parse_source(part: str) -> Source:
    if path_exists(part):
        return Source(part)
    spec, equals, weight = part.rpartition("=")
    if not equals:
        spec, weight = part, "1"
    if not spec:
        raise UserError(f"got an empty source in '{part}'; write SOURCE or SOURCE=WEIGHT")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"the weight of the source '{spec}' must be a number of at least 0, got '{weight}'")
    return Source(spec, number)


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    """Name or folder, configuration and split of a data set's specification; None for what is left out.

    Raises:
        UserError: no name, or more than three parts.
    """
    if path_exists(spec):
        return spec, None, None
    name, *more = spec.split(":")
    if name in SHORT_NAMES and not path_exists(name):
        name, *default = SHORT_NAMES[name].split(":")
        more = [*more, *default[len(more) :]]
    if not name:
        raise UserError(f"source '{spec}' has no name; write NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    if len(more) > 2:
        raise UserError(f"source '{spec}' has too many parts; write NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    config, split = ([part or None for part in more] + [None, None])[:2]
    return name, config, split


def is_streamed(source: Source) -> bool:
    """Whether the source is a data set of the hub, which is read only as far as needed."""
    return source.spec != SELF and not path_exists(_parts(source.spec)[0])


def check_source(source: Source) -> None:
    """Check what can be known without reading.

    Raises:
        UserError: a path that does not exist, or a file of an unknown type.
    """
    if source.spec == SELF:
        return
    name = _parts(source.spec)[0]
    path = Path(name)
    if not path_exists(name):
        if name.startswith((".", "/", "~")) or path.suffix.lower() in TEXT_SUFFIXES or name.count("/") > 1:
            raise UserError(f"text file not found: {name}")
    elif path.is_file() and path.suffix.lower() not in TEXT_SUFFIXES:
        raise UserError(f"text file {name} has an unknown type '{path.suffix}'; use {', '.join(TEXT_SUFFIXES)}")


def content_key(source: Source, samples: int | None = None) -> str:
    """What identifies the content of a source: the digest of its files; of a hub data set only its name.

    Args:
        samples: see `file_digest`.
    """
    path = Path(_parts(source.spec)[0])
    if source.spec == SELF or not path_exists(str(path)):
        return hashlib.sha256(source.spec.encode()).hexdigest()
    if path.is_file():
        return file_digest(path, samples)
    digest = hashlib.sha256(source.spec.encode())
    for file in sorted(item for item in path.rglob("*") if item.is_file() and item.suffix.lower() in TEXT_SUFFIXES):
        digest.update(f"{file.relative_to(path)} {file_digest(file, samples)}".encode())
    return digest.hexdigest()


def read_source(
    source: Source, wanted_tokens: int | None, seed: int | None, split: str = "train", column: str | None = None
) -> list[str]:
    """The texts of a source.

    Args:
        wanted_tokens: read about as many as give twice that; None: all. Of .txt and JSON files always all.
        seed: of the shuffle of a data set that is read in part; None: in its order.
        split: of a data set that does not name its split.
        column: of a data set; None: the first of TEXT_FIELDS that it has.

    Raises:
        UserError: nothing there, unreadable, or without text.
    """
    check_source(source)
    if source.spec == SELF:
        return own_texts(wanted_tokens, seed)
    path = Path(source.spec)
    if is_file(source.spec) and path.suffix.lower() in (".txt", ".json", ".jsonl"):
        return read_texts(path)
    texts = list(_dataset_texts(source.spec, wanted_tokens, seed, split, column))
    if not texts:
        raise UserError(f"source '{source.spec}' holds no text")
    return texts


def shares(sources: Sequence[Source], size: int) -> list[int]:
    """Split `size` sequences by the weights of the sources; what rounding leaves goes to the largest remainders.

    Raises:
        UserError: a source would get none.

    >>> shares([Source("a", 0.5), Source("b", 0.2), Source("self", 0.3)], 64)
    [32, 13, 19]
    """
    exact = [source.weight * size for source in sources]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(sources)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: size - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise UserError(f"--calib_size {size} leaves no sequence for the source '{source.spec}'; raise it")
    return counts


def draw_sequences(
    tokenizer: PreTrainedTokenizerBase, source: Source, count: int, length: int, seed: int
) -> torch.Tensor:
    """At most `count` full sequences of a source for calibration, int64 [sequences, length].

    Raises:
        UserError: the source cannot be read, or does not fill one sequence.
    """
    texts = read_source(source, count * length, seed)
    try:
        return sample_blocks(tokenizer, texts, length, count, seed)
    except UserError as error:
        raise UserError(f"source {source.spec} is too short for its share of --calib_data: {error}") from error


def own_texts(wanted_tokens: int | None, seed: int | None) -> list[str]:
    """Text that the model writes itself.

    Raises:
        UserError: always, where no model can write.
    """
    raise UserError(f"the source '{SELF}' (text that the model writes itself) is not available here; name a text")


def _dataset_texts(
    spec: str, wanted_tokens: int | None, seed: int | None, split: str, column: str | None
) -> Iterator[str]:
    """Texts of a file, folder or hub data set, read through the `datasets` library."""
    count = counted = 0
    try:
        rows = _open_dataset(spec, split)
        if wanted_tokens is not None and seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for row in rows:
            text = _row_text(row, column, spec)
            count += 1
            if not text.strip():
                continue
            yield text
            counted += min(len(text), COUNTED_CHARACTERS)
            if wanted_tokens is not None and counted >= 2 * CHARACTERS_PER_TOKEN * wanted_tokens:
                return
    except UserError:
        raise
    except Exception as error:  # datasets and the network stack below it raise errors of a dozen unrelated classes
        where = f"after {count} rows " if count else ""
        name = _parts(spec)[0]
        hint = "" if path_exists(name) else "; check the name and the network, or give a local file or folder"
        raise UserError(f"cannot read the data set '{spec}' {where}({first_line(error)}){hint}") from error


def _open_dataset(spec: str, split: str) -> Any:
    """An IterableDataset of the rows of a file, folder or hub data set."""
    from datasets import load_dataset, load_from_disk

    name, config, own_split = _parts(spec)
    split, path = own_split or split, Path(name)
    if not path_exists(name):
        return load_dataset(name, config, split=split, streaming=True)
    if path.is_file():
        return load_dataset(_builder(path), data_files=str(path), split="train", streaming=True)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, dict):
            if split not in saved:
                raise UserError(f"data set '{name}' has no split '{split}'; it has {', '.join(saved)}")
            saved = saved[split]
        return saved.to_iterable_dataset()
    suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()} & set(TEXT_SUFFIXES)
    if not suffixes:
        raise UserError(f"folder {name} holds no file of type {', '.join(TEXT_SUFFIXES)}")
    whole = {"sample_by": "document"} if suffixes == {".txt"} else {}
    splits = load_dataset(name, config, streaming=True, **whole)
    if split not in splits and own_split is None and len(splits) == 1:
        split = next(iter(splits))  # the only one there is
    if split not in splits:
        raise UserError(f"data set '{name}' has no split '{split}'; it has {', '.join(splits)}")
    return splits[split]


def _builder(path: Path) -> str:
    """The name of the loader in `datasets` for a file."""
    return path.suffix.lower().removeprefix(".")


def _row_text(row: dict[str, Any], column: str | None, spec: str) -> str:
    name = column or next((field for field in TEXT_FIELDS if field in row), None)
    if name is None or name not in row:
        looked_for = f"column '{column}'" if column else f"column {' or '.join(TEXT_FIELDS)}"
        raise UserError(f"data set '{spec}' has no {looked_for}; its columns are {', '.join(row)}")
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"data set '{spec}': column '{name}' holds a {type(value).__name__}, not text")
    return valid_unicode(value)


# ----------------------------------------------------------------------------------------------------------- records


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
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: text or dates out of range
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


def python_manual() -> str:
    """The topics of Python's manual as `help()` shows them: text of another kind than articles or papers.

    It comes with Python itself, so it differs a little between Python's versions.

    Raises:
        UserError: this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data.topics, the text of its manual; install Python whole") from None
    return "\n\n".join(text for _, text in sorted(topics.items()))


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
