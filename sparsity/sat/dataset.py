"""Training samples for sparsity-aware training: tokenizing, a keyed cache on disk, packing and batching.

A sample is {"input_ids": int list [T], "labels": int list [T]} with label IGNORE where no loss is taken. Labels are
aligned with their own token, as Hugging Face models expect; the shift by one happens in the loss.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity.errors import UserError, first_line
from sparsity.files import file_digest, prepare_output_dir, require_file
from sparsity.processes import warn
from sparsity.sat.arguments import DataArguments
from sparsity.sat.batching import IGNORE, Packed
from sparsity.sources import Source, content_key, is_streamed, parse_sources, read_source
from sparsity.text import DEFAULT_TEMPLATE, PromptTemplate, encode_prompt, read_records, token_blocks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


FORMAT = 3  # raise it when the layout of samples changes, so that older caches are not read


Sample = dict[str, list[int]]


def encode_record(
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, str],
    max_length: int,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> Sample | None:
    """Prompt, answer and end-of-text token, with loss on the answer only.

    What is too long loses the end of its article first, and once that is empty the end of its answer, end-of-text token
    included: the model is not taught to stop there.

    Returns:
        None if the prompt without its article leaves no room for any token of the answer.
    """
    answer = tokenizer(record["output"].strip(), add_special_tokens=False, verbose=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    try:
        prompt = encode_prompt(tokenizer, record, max(0, max_length - len(answer)), template)
    except UserError:
        prompt = encode_prompt(tokenizer, {**record, "input": ""}, sys.maxsize, template)
    answer = answer[: max(0, max_length - len(prompt))]
    return {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer} if answer else None


def encode_records(
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, str]],
    max_length: int,
    workers: int,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> Dataset:
    """Tokenize records in `workers` processes.

    Returns:
        datasets.Dataset with columns input_ids, labels, record (index of the record in its file) and length (tokens).

    Raises:
        UserError: max_length is too small for all records.
    """
    from datasets import Dataset

    def encode(record: dict[str, str], index: int) -> dict[str, Any]:
        sample = encode_record(tokenizer, record, max_length, template) or {"input_ids": [], "labels": []}
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
    return without_empty(dataset, max_length, tokenizer.eos_token_id)


def without_empty(dataset: Dataset, max_length: int, end: int) -> Dataset:
    """Leave out records without a label, and count in one warning what `max_length` has cost.

    Args:
        end: the end-of-text token, which an answer has lost together with its own end.

    Raises:
        UserError: no record is left.
    """
    lengths = dataset["length"]
    fits = [index for index, length in enumerate(lengths) if length]
    if not fits:
        raise UserError(
            f"--max_length {max_length} is too small: the prompt without its article takes up all of it in each of the "
            f"{len(dataset)} records; choose a larger value"
        )
    # Only samples that fill the length can have been cut.
    full = [index for index in fits if lengths[index] >= max_length]
    cut = sum(labels[-1] != end for labels in dataset.select(full)["labels"]) if full else 0
    empty = len(dataset) - len(fits)
    if cut or empty:
        counts = [f"{cut} lost the end of their answer"] * bool(cut) + [f"{empty} were left out"] * bool(empty)
        warn(f"--max_length {max_length} is short for the answers: of {len(dataset)} records {' and '.join(counts)}")
    return dataset.select(fits) if empty else dataset


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], block_size: int, limit: int | None = None
) -> Dataset:
    """Plain text as full blocks of `block_size` tokens with loss on every token; columns as in `encode_records`.

    Args:
        limit: most blocks; None: all.
    """
    from datasets import Dataset

    blocks = token_blocks(tokenizer, texts, block_size, limit).tolist()
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
    """Load the Arrow dataset that `build()` made for `key`, or build it and keep it; whole or not at all.

    Runs may share the folder: of several that build the same data, the first to finish keeps its own, and the others
    take that.
    """
    from datasets import disable_progress_bars, enable_progress_bars, load_from_disk

    name = hashlib.sha256("\0".join([str(FORMAT), *key]).encode()).hexdigest()[:24]
    folder = cache_dir / name
    damaged = False
    if (folder / "state.json").is_file():
        try:
            return load_from_disk(str(folder))
        except Exception as error:  # datasets and Arrow have no common class for damaged files
            print(f"the cached data in {folder} is damaged ({first_line(error)}); tokenizing again")
            damaged = True
    prepare_output_dir(cache_dir)
    dataset = build()
    scratch = Path(tempfile.mkdtemp(prefix=".building.", dir=cache_dir))
    disable_progress_bars()  # writing takes a moment; tokenizing keeps its bar
    try:
        dataset.save_to_disk(str(scratch / name))
        if damaged:
            with contextlib.suppress(OSError):
                folder.rename(scratch / "damaged")
        try:
            (scratch / name).rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # those two say that another run was faster
    finally:
        enable_progress_bars()
        shutil.rmtree(scratch, ignore_errors=True)
    return load_from_disk(str(folder))


def load_records(
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    max_length: int,
    cache_dir: Path,
    workers: int,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> Dataset:
    """Tokenized records of a file, from the cache where data, tokenizer, template and length are the same."""
    path = require_file(path, "data file")
    prompt = [template.head, template.tail, str(template.special_tokens)]
    key = ["records", file_digest(path), tokenizer_digest(tokenizer), *prompt, str(max_length)]
    return cached(cache_dir, key, lambda: encode_records(tokenizer, read_records(path), max_length, workers, template))


def load_texts(
    tokenizer: PreTrainedTokenizerBase, source: Source, block_size: int, cache_dir: Path, tokens: int | None, seed: int
) -> Dataset:
    """Blocks of plain text, from the cache where text, tokenizer and block size are the same.

    Args:
        tokens: how many are wanted; None reads the whole source.
        seed: decides which part of the source is read, with `tokens`.
    """
    part = ["all"] if tokens is None else [str(tokens), str(seed)]
    key = ["texts", content_key(source), Path(source.spec).suffix, *part, tokenizer_digest(tokenizer), str(block_size)]
    blocks = None if tokens is None else -(-tokens // block_size)
    return cached(
        cache_dir, key, lambda: encode_texts(tokenizer, read_source(source, tokens, seed), block_size, blocks)
    )


def draw_blocks(texts: list[tuple[Dataset, float]], wanted: int | None, seed: int) -> Dataset:
    """Blocks of several texts by weight, each drawn without replacement.

    Args:
        texts: blocks of one size and the share of each text; the shares sum to 1.
        wanted: blocks in all; None or more than there are: as many as the shares allow.
    """
    from datasets import concatenate_datasets

    available = min(len(blocks) / share for blocks, share in texts)
    total = available if wanted is None else min(wanted, available)
    drawn = []
    for number, (blocks, share) in enumerate(texts):
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed + number)).tolist()
        drawn.append(blocks.select(order[: max(1, round(total * share))]))
    return concatenate_datasets(drawn)


def wanted_blocks(records: Dataset, text_ratio: float, block_size: int) -> int:
    """How many blocks of plain text, with the tokens of the records, make up `text_ratio` of all tokens."""
    return max(1, round(sum(records["length"]) * text_ratio / (1 - text_ratio) / block_size))


def mix(records: Dataset | None, texts: list[tuple[Dataset, float]], text_ratio: float, seed: int) -> Dataset:
    """Add blocks of text, drawn without replacement, until `text_ratio` of all tokens are plain text.

    Fewer are added if the text does not suffice. At ratio 1 only the text is trained on.

    Args:
        texts: see `draw_blocks`.
    """
    from datasets import concatenate_datasets

    if text_ratio >= 1 or records is None:
        return texts[0][0] if len(texts) == 1 else draw_blocks(texts, None, seed)
    block = len(texts[0][0][0]["input_ids"])
    wanted = wanted_blocks(records, text_ratio, block)
    drawn = draw_blocks(texts, wanted, seed)
    if wanted > len(drawn) + len(texts):
        print(f"the text has {len(drawn)} blocks of {block} tokens; --text_ratio {text_ratio} asks for {wanted}")
    return concatenate_datasets([records, drawn])


def load_data(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, seed: int
) -> tuple[Dataset | Packed, Dataset | None]:
    """Training and evaluation samples, tokenized once and kept in the cache.

    Args:
        seed: decides which plain text is drawn.

    Raises:
        UserError: missing, malformed or too small data, or a length that does not fit.
    """
    length, cache, records, evaluation = args.model_max_length, args.cache_folder, None, None
    if args.uses_records:
        records, evaluation = (
            load_records(tokenizer, path, length, cache, args.workers, template)
            for path in (args.train_file, args.eval_file)
        )
        if args.max_eval_samples and len(evaluation) > args.max_eval_samples:
            evaluation = evaluation.select(range(args.max_eval_samples))
    train = records
    if args.text_path:
        train = mix(records, text_blocks(args, tokenizer, records, seed), args.text_ratio, seed)
    return (Packed(train, length) if args.packing else train), evaluation


def text_blocks(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, records: Dataset | None, seed: int
) -> list[tuple[Dataset, float]]:
    """Blocks and share of each source in --text_path; of a hub set only as many as the mixture needs."""
    assert args.text_path is not None
    block = args.text_length or args.model_max_length
    wanted = args.text_tokens
    found = []
    for source in parse_sources(args.text_path):
        tokens = None if wanted is None else math.ceil(wanted * source.weight)
        if tokens is None and records is not None and is_streamed(source):
            tokens = math.ceil(wanted_blocks(records, args.text_ratio, block) * source.weight) * block
        found.append((load_texts(tokenizer, source, block, args.cache_folder, tokens, seed), source.weight))
    return found
