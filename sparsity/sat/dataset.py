"""Training samples for sparsity-aware training: tokenizing, a keyed cache on disk, packing and batching.

A sample is {"input_ids": int list [T], "labels": int list [T]} with label IGNORE where no loss is taken. Labels are
aligned with their own token, as Hugging Face models expect; the shift by one happens in the loss.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity.errors import UserError, first_line
from sparsity.files import file_digest, require_file
from sparsity.sat.arguments import DataArguments
from sparsity.sat.batching import IGNORE, Packed
from sparsity.text import PROMPT_HEAD, PROMPT_TAIL, encode_prompt, read_records, read_texts, token_blocks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


FORMAT = 2  # raise it when the layout of samples changes, so that older caches are not read


MAX_DROPPED = 0.01  # share of records whose answer may be too long before that counts as a wrong --max_length


Sample = dict[str, list[int]]


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


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything the tokenizer would save: vocabulary, merges, normalization, special tokens."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
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
            print(f"the cached data in {folder} is damaged ({first_line(error)}); tokenizing again")
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


def mix(records: Dataset | None, texts: Dataset, text_ratio: float, seed: int) -> Dataset:
    """Add text blocks, drawn without replacement, until `text_ratio` of all tokens are plain text.

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


def load_data(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, seed: int
) -> tuple[Dataset | Packed, Dataset | None]:
    """Training and evaluation samples, tokenized once and kept in `cache_dir`.

    Args:
        seed: decides which blocks of plain text are drawn.

    Raises:
        UserError: missing, malformed or too small data, or a length that does not fit.
    """
    length, records, evaluation = args.model_max_length, None, None
    if args.uses_records:
        records, evaluation = (
            load_records(tokenizer, path, length, cache_dir, args.workers) for path in (args.train_file, args.eval_file)
        )
        if args.max_eval_samples and len(evaluation) > args.max_eval_samples:
            evaluation = evaluation.select(range(args.max_eval_samples))
    train = records
    if args.text_path:
        texts = load_texts(tokenizer, args.text_path, args.text_length or length, cache_dir)
        train = mix(records, texts, args.text_ratio, seed)
    return (Packed(train, length) if args.packing else train), evaluation
