"""Plain text from files, folders and hub data sets.

`parse_sources` defines the grammar that --calib_data, --text_path and --text share:

    SOURCE[=WEIGHT] [SOURCE[=WEIGHT]…]

    SOURCE   a file           .txt, .json, .jsonl, .csv, .parquet or .arrow
             a folder         of such files, or of a data set that was saved with save_to_disk
             a hub data set   NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; FOLDER::SPLIT works as well. NAME is also one
                              of modelopt's registry (modelopt.torch.utils.get_supported_datasets)
             self             text that the model generates itself

The default weight is 1; weights are normalized to sum to 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.errors import UserError, reported_as, warn, with_downloads
from sparsity.files import file_digest, is_file, path_exists
from sparsity.text import read_texts, row_text, sample_blocks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SELF = "self"

# Names of modelopt's registry under their full addresses on the hub; see `_registered` for all others.
SHORT_NAMES = {
    "cnn_dailymail": "abisee/cnn_dailymail:3.0.0",
    "c4": "allenai/c4:en",
    "pile": "monology/pile-uncopyrighted",
    "wikitext": "Salesforce/wikitext:wikitext-103-v1",
}
TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow")

# A data set that is read in part gives twice the number of tokens asked for. At most 3200 characters of a document
# count, about the length of a news article, so that many documents contribute. A token has about four characters.
CHARACTERS_PER_TOKEN, COUNTED_CHARACTERS, SHUFFLE_BUFFER = 4, 3200, 1000


@dataclass(frozen=True)
class Source:
    """One source of plain text.

    Attributes:
        spec: a path, a hub data set, or SELF; see the grammar above.
        weight: fraction of all text; the weights of a list sum to 1.
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
    parts: list[str] = []
    for item in items:
        is_path = path_exists(item) or path_exists(item.rpartition("=")[0])
        parts += [item] if is_path else [part.strip() for part in item.split(",")]
    sources = [_parse_source(part) for part in parts]
    total = sum(source.weight for source in sources)
    if not 0 < total < math.inf:
        raise UserError(f"the weights of the sources '{' '.join(items)}' sum to {total:g}; give weights greater than 0")
    normalized = [replace(source, weight=source.weight / total) for source in sources]
    return [source for source in normalized if source.weight]  # beside a huge weight, a tiny one may round to 0


def _parse_source(part: str) -> Source:
    spec, equals, weight = part.rpartition("=")
    if not equals or path_exists(part):
        spec, weight = part, "1"
    if not spec:
        raise UserError(f"got an empty source in '{part}'; write SOURCE or SOURCE=WEIGHT")
    wrong = f"the weight of the source '{spec}' must be a number of at least 0, got '{weight}'"
    with reported_as(wrong, ValueError):
        number = float(weight)
    if not 0 <= number < math.inf:
        raise UserError(wrong)
    return Source(spec, number)


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    """Name or folder, configuration and split of a data set; None for what `spec` leaves out.

    Raises:
        UserError: no name, or more than three parts.
    """
    if path_exists(spec):
        return spec, None, None
    name, *more = spec.split(":")
    if name in SHORT_NAMES and not path_exists(name):
        name, *default = SHORT_NAMES[name].split(":")
        more += default[len(more) :]
    if not name or len(more) > 2:
        raise UserError(f"cannot parse the source '{spec}'; write NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    config, split = (more + ["", ""])[:2]
    return name, config or None, split or None


def is_streamed(source: Source) -> bool:
    """Whether the source is a hub data set, which is read only as far as needed."""
    return source.spec != SELF and not path_exists(_parts(source.spec)[0])


def check_source(source: Source) -> None:
    """Check what can be checked without reading.

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


def content_key(source: Source) -> str:
    """Digest that identifies the content of a source: of its files, or of a hub data set's name."""
    if is_file(source.spec):
        return file_digest(source.spec)
    digest = hashlib.sha256(source.spec.encode())
    if source.spec != SELF:
        path = Path(_parts(source.spec)[0])
        for file in _text_files(path):  # none of a hub data set
            digest.update(f"{file.relative_to(path)} {file_digest(file)}".encode())
    return digest.hexdigest()


def _text_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES)


def read_source(
    source: Source,
    num_tokens: int | None,
    seed: int | None,
    split: str = "train",
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """The texts of a source.

    Args:
        num_tokens: stop at about twice as many tokens; None reads all. JSON and .txt files are always read whole.
        seed: shuffles a data set that is read in part; None keeps its order.
        split: default split of a data set.
        column: text column of a data set; None takes its chats or the first of TEXT_FIELDS that it has.
        tokenizer: for chats; see `row_text`.

    Raises:
        UserError: not found, unreadable, or without text.
    """
    if source.spec == SELF:
        raise UserError(f"the source '{SELF}' (text that the model generates) is not available here; name a text")
    check_source(source)
    if is_file(source.spec) and Path(source.spec).suffix.lower() in (".txt", ".json", ".jsonl"):
        return read_texts(source.spec, tokenizer)
    texts = list(_dataset_texts(source.spec, num_tokens, seed, split, column, tokenizer))
    if not texts:
        raise UserError(f"source '{source.spec}' holds no text")
    return texts


def shares(sources: Sequence[Source], size: int) -> list[int]:
    """Split `size` sequences by the weights of the sources; leftovers of rounding go to the largest remainders.

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
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    size: int,
    length: int,
    seed: int,
    write: Callable[[int], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """At most `size` calibration sequences, shared by weight: int64 [count, length] of each source, all of them full.

    Args:
        write: from a number of sequences to self-generated text, where that is available.

    Raises:
        UserError: a source cannot be read, gets no sequence, or does not fill one.
    """
    drawn = []
    for source, count in zip(sources, shares(sources, size), strict=True):
        if write is not None and source.spec == SELF:
            drawn.append(write(count))
            continue
        texts = read_source(source, count * length, seed, tokenizer=tokenizer)
        drawn.append(sample_blocks(tokenizer, texts, length, count, seed, source.spec))
        if len(drawn[-1]) < count:
            warn(f"{source.spec} gives {len(drawn[-1])} sequences of {length}, not {count}; its weight is the same")
    return drawn


# ----------------------------------------------------------------------------------------------------------- data sets


def stream_rows(path: Path) -> Any:
    """An IterableDataset of the rows of a .csv, .parquet, .arrow, .json or .jsonl file."""
    from datasets import load_dataset

    kind = path.suffix.lower().removeprefix(".").replace("jsonl", "json")
    options = {"keep_default_na": False} if kind == "csv" else {}  # a cell "NA" is text
    return load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)


def _dataset_texts(
    spec: str,
    num_tokens: int | None,
    seed: int | None,
    split: str,
    column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[str]:
    """Texts that are not blank, of a file, folder or hub data set; see `read_source`."""
    characters = 0
    advice = "; check the name, your access (hf auth login) and the network, or give a local file or folder"
    hint = "" if path_exists(_parts(spec)[0]) else advice
    # datasets and the network stack below it raise errors of a dozen unrelated classes.
    with reported_as(f"cannot read the data set '{spec}'{hint}", Exception):
        parts = with_downloads(_registered, spec) or [with_downloads(_open_dataset, spec, split)]
        if num_tokens is not None and seed is not None:
            parts = [rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) for rows in parts]
        for row in chain.from_iterable(zip(*parts, strict=False)):
            text = row_text(row, column, f"data set '{spec}'", tokenizer)
            if text.strip():
                yield text
                characters += min(len(text), COUNTED_CHARACTERS)
            if num_tokens is not None and characters >= 2 * CHARACTERS_PER_TOKEN * num_tokens:
                return


def _registered(spec: str) -> list[Any]:
    """The splits of a name, or of a group of names, in modelopt's registry, as IterableDatasets; none for another name.

    Rows that are no chats get the column "text" as the registry makes it of theirs.
    """
    name, _, own_split = _parts(spec)
    if path_exists(name) or "/" in name:
        return []
    from datasets import load_dataset
    from modelopt.torch.utils.dataset_utils import DATASET_COMBOS, SUPPORTED_DATASET_CONFIG

    parts = []
    for member in DATASET_COMBOS.get(name, [name] if name in SUPPORTED_DATASET_CONFIG else []):
        entry = SUPPORTED_DATASET_CONFIG[member]
        config = dict(entry["config"])
        for split in [own_split] if own_split else config.pop("split"):
            if "data_files" in entry:
                files = {"data_files": entry["data_files"].format(split=split), "split": "train"}
                rows = load_dataset(config["path"], streaming=True, **files)
            else:
                rows = load_dataset(**{**config, "split": split}, streaming=True)
            if "chat_key" not in entry:
                rows = rows.map(lambda row, make=entry["preprocess"]: {"text": make(row)})
            parts.append(rows)
    return parts


def _open_dataset(spec: str, split: str) -> Any:
    """An IterableDataset of the rows of a file, folder or hub data set; `split` is the default."""
    from datasets import Dataset, load_dataset, load_from_disk

    name, config, own_split = _parts(spec)
    path = Path(name)
    if not path_exists(name):
        return load_dataset(name, config, split=own_split or split, streaming=True)
    if path.is_file():
        return stream_rows(path)
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(name)
        splits = {split: saved} if isinstance(saved, Dataset) else saved
    else:
        suffixes = {file.suffix.lower() for file in _text_files(path)}
        if not suffixes:
            raise UserError(f"folder {name} holds no file of type {', '.join(TEXT_SUFFIXES)}")
        options = {"sample_by": "document"} if suffixes == {".txt"} else {}
        splits = load_dataset(name, config, streaming=True, **options)
    if own_split is None and len(splits) == 1:
        split = next(iter(splits))
    if (own_split or split) not in splits:
        raise UserError(f"data set '{name}' has no split '{own_split or split}'; it has {', '.join(splits)}")
    rows = splits[own_split or split]
    return rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows
