"""Training samples for sparsity-aware training: tokenizing, a keyed cache on disk, packing and batching.

A sample is {"input_ids": int list [T], "labels": int list [T]} with label IGNORE where no loss is taken. Labels stand
at their own token, as Hugging Face models expect; the shift by one happens in the loss.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from text_input import PROMPT_HEAD, PROMPT_TAIL, encode_prompt, read_records, read_texts, token_blocks
from utils import UserError, first_line, require_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
FORMAT = 2  # raise it when the layout of samples changes, so that older caches are not read
MAX_DROPPED = 0.01  # share of records whose answer may be too long before that counts as a wrong --max_length
Sample = dict[str, list[int]]


# ---------------------------------------------------------------------------------------------- tokenizing


def encode_record(tokenizer: PreTrainedTokenizerBase, record: dict[str, str], max_length: int) -> Sample | None:
    """Prompt, answer and end-of-text token, with loss on the answer only; the prompt's article is cut to fit.

    Returns:
        None if the whole answer and the prompt without its article do not fit into `max_length` tokens.
    """
    answer = tokenizer(record["output"].strip(), add_special_tokens=False, verbose=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    try:
        prompt = encode_prompt(tokenizer, record, max(0, max_length - len(answer)))
    except UserError:
        return None
    return {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}


def encode_records(
    tokenizer: PreTrainedTokenizerBase, records: list[dict[str, str]], max_length: int, workers: int
) -> Dataset:
    """Tokenize records in `workers` processes.

    Returns:
        datasets.Dataset with columns input_ids, labels, record (index of the record in its file) and length (tokens).

    Raises:
        UserError: max_length is too small for more than a few records.
    """
    from datasets import Dataset

    def encode(record: dict[str, str], index: int) -> dict[str, Any]:
        sample = encode_record(tokenizer, record, max_length) or {"input_ids": [], "labels": []}
        return {**sample, "record": index, "length": len(sample["input_ids"])}

    dataset = Dataset.from_list(
        [{key: record[key] for key in ("instruction", "input", "output")} for record in records]
    )
    dataset = dataset.map(
        encode,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=workers if workers > 1 and len(records) >= 100 * workers else None,
        desc="tokenizing",
        load_from_cache_file=False,
    )
    fits = [index for index, length in enumerate(dataset["length"]) if length]
    dropped = len(dataset) - len(fits)
    if dropped > MAX_DROPPED * len(dataset):
        first = next(index for index, length in enumerate(dataset["length"]) if not length)
        raise UserError(
            f"--max_length {max_length} is too small: {dropped} of {len(dataset)} records (first: record {first}) do "
            "not fit even without their article; choose a larger value"
        )
    if dropped:
        print(f"left out {dropped} records whose answer does not fit into {max_length} tokens")
        dataset = dataset.select(fits)
    return dataset


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], block_size: int) -> Dataset:
    """Plain text as full blocks of `block_size` tokens with loss on every token; columns as in `encode_records`."""
    from datasets import Dataset

    blocks = token_blocks(tokenizer, texts, block_size).tolist()
    numbers, lengths = list(range(len(blocks))), [block_size] * len(blocks)
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks, "record": numbers, "length": lengths})


# --------------------------------------------------------------------------------------------------- cache


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything the tokenizer would save: vocabulary, merges, normalization, special tokens."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def cached(cache_dir: Path, key: Sequence[str], build: Callable[[], Dataset]) -> Dataset:
    """Load the Arrow dataset that `build()` made for `key`, or build it and keep it; whole or not at all."""
    from datasets import disable_progress_bars, enable_progress_bars, load_from_disk

    name = hashlib.sha256("\0".join([str(FORMAT), *key]).encode()).hexdigest()[:24]
    folder = cache_dir / name
    if (folder / "state.json").is_file():
        try:
            return load_from_disk(str(folder))
        except Exception as error:  # datasets and Arrow have no common class for damaged files
            print(f"the cached data in {folder} is damaged ({first_line(error)}); making it anew")
    dataset = build()
    cache_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".building.", dir=cache_dir))
    disable_progress_bars()  # writing takes a moment; tokenizing keeps its bar
    try:
        dataset.save_to_disk(str(scratch / name))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch / name, folder)
    finally:
        enable_progress_bars()
        shutil.rmtree(scratch, ignore_errors=True)
    return load_from_disk(str(folder))


def load_records(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, max_length: int, cache_dir: Path, workers: int
) -> Dataset:
    """Tokenized records of a file, from the cache where data, tokenizer, template and length are the same."""
    path = require_file(path, "data file")
    key = ["records", file_digest(path), tokenizer_digest(tokenizer), PROMPT_HEAD, PROMPT_TAIL, str(max_length)]
    return cached(cache_dir, key, lambda: encode_records(tokenizer, read_records(path), max_length, workers))


def load_texts(tokenizer: PreTrainedTokenizerBase, path: str | Path, block_size: int, cache_dir: Path) -> Dataset:
    """Blocks of a plain-text file, from the cache where text, tokenizer and block size are the same."""
    path = require_file(path, "text file")
    key = ["texts", file_digest(path), path.suffix, tokenizer_digest(tokenizer), str(block_size)]
    return cached(cache_dir, key, lambda: encode_texts(tokenizer, read_texts(path), block_size))


# ----------------------------------------------------------------------------------------- mixing and packing


def mix(records: Dataset | None, texts: Dataset, text_ratio: float, seed: int) -> Dataset:
    """Add so many text blocks, drawn without replacement, that `text_ratio` of all tokens are plain text.

    Fewer are added if the text does not suffice. At ratio 1 only the text is trained on.
    """
    from datasets import concatenate_datasets

    if text_ratio >= 1 or records is None:
        return texts
    block = len(texts[0]["input_ids"])
    record_tokens = sum(records["length"])
    wanted = max(1, round(record_tokens * text_ratio / (1 - text_ratio) / block))
    if wanted > len(texts):
        print(f"the text has {len(texts)} blocks of {block} tokens; --text_ratio {text_ratio} asks for {wanted}")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return concatenate_datasets([records, texts.select(order[:wanted])])


class Packed(torch.utils.data.Dataset):
    """Rows of several samples each, filled by first-fit decreasing up to `max_length` tokens; nothing is cut.

    An item holds lists over its samples: {"input_ids": [[…], …], "labels": [[…], …], "record": […]}.
    """

    def __init__(self, samples: Dataset, max_length: int):
        self.samples = samples
        lengths = list(samples["length"])
        self.rows: list[list[int]] = []
        # Rows by the room they have left: a sample goes to the fullest row that still takes it.
        by_room: dict[int, list[int]] = {}
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            room = next((room for room in range(lengths[index], max_length + 1) if by_room.get(room)), None)
            row = len(self.rows) if room is None else by_room[room].pop()
            if room is None:
                self.rows.append([])
                room = max_length
            self.rows[row].append(index)
            by_room.setdefault(room - lengths[index], []).append(row)
        self.lengths = [sum(lengths[index] for index in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list]:
        return self.samples[self.rows[index]]


def sample_lengths(dataset: Dataset | Packed) -> list[int]:
    """Tokens per item of a packed or plain dataset."""
    return dataset.lengths if isinstance(dataset, Packed) else list(dataset["length"])


# -------------------------------------------------------------------------------------------------- batching


class Collator:
    """Turn samples or packed rows into a batch padded to its longest row, rounded up to a multiple of 8.

    The batch holds input_ids, labels and position_ids [B, T]; real, bool [B, T], false on padding; record [B, most
    samples in a row] padded with -1; and attention_mask: [B, T] of 0 and 1, or for packed rows bool [B, 1, T, T] that
    keeps attention causal and within a sample.
    """

    def __init__(self, pad_token_id: int, pad_to: int | None = None):
        self.pad_token_id, self.pad_to = pad_token_id, pad_to

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        packed = isinstance(items[0]["record"], list)
        rows = [(item["input_ids"], item["labels"], item["record"]) for item in items]
        if not packed:
            rows = [([ids], [labels], [record]) for ids, labels, record in rows]
        longest = max(sum(map(len, ids)) for ids, _, _ in rows)
        width = self.pad_to or -(-longest // 8) * 8
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "record": torch.full((len(rows), max(len(record) for _, _, record in rows)), -1),
        }
        segments = torch.zeros(shape, dtype=torch.long)  # 1, 2, … for the samples of a row, 0 for padding
        for row, (all_ids, all_labels, records) in enumerate(rows):
            start = 0
            batch["record"][row, : len(records)] = torch.tensor(records)
            for number, (ids, labels) in enumerate(zip(all_ids, all_labels, strict=True), start=1):
                span = slice(start, start + len(ids))
                batch["input_ids"][row, span] = torch.tensor(ids)
                # The first label of a sample would be predicted by the last token of the sample before it.
                batch["labels"][row, span] = torch.tensor([IGNORE, *labels[1:]])
                batch["position_ids"][row, span] = torch.arange(len(ids))
                segments[row, span] = number
                start += len(ids)
        batch["real"] = segments > 0
        batch["attention_mask"] = packed_mask(segments) if packed else (segments > 0).long()
        return batch


def packed_mask(segments: torch.Tensor) -> torch.Tensor:
    """Bool mask [B, 1, T, T], true where attention is allowed: causal, and each token sees its own segment only.

    A padding token (segment 0) sees the padding before it and itself, so that no softmax row is empty.
    """
    same = segments[:, :, None] == segments[:, None, :]
    return (same & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril())[:, None]


class EpochSampler(torch.utils.data.Sampler):
    """Every item once an epoch in an order that follows from seed and epoch alone, hence the same after a resume.

    With `group` > 0, shuffled stretches of 50 batches of `group` items are sorted by length and their batches shuffled,
    so that a batch holds samples of similar length and the longest stretch comes at a random time.
    """

    def __init__(self, lengths: list[int], seed: int, group: int = 0):
        self.lengths, self.seed, self.group, self.epoch = lengths, seed, group, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 7919 * self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group:
            return iter(order)
        stretch = 50 * self.group
        batches: list[list[int]] = []
        for start in range(0, len(order), stretch):
            part = sorted(order[start : start + stretch], key=lambda index: -self.lengths[index])
            batches += [part[begin : begin + self.group] for begin in range(0, len(part), self.group)]
        short = [batch for batch in batches if len(batch) < self.group]  # an uneven batch would shift all that follow
        full = [batch for batch in batches if len(batch) == self.group]
        shuffled = [full[index] for index in torch.randperm(len(full), generator=generator).tolist()]
        return iter([index for batch in shuffled + short for index in batch])
