"""Training samples for sparsity-aware training: tokenizing, a keyed cache on disk, packing and batching.

A sample is {"input_ids": int list [T], "labels": int list [T]} with label IGNORE where no loss is taken. Labels are
aligned with their own token, as Hugging Face models expect; the shift by one happens in the loss.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity.errors import UserError, first_line
from sparsity.files import (
    file_digest,
    prepare_output_dir,
    read_json,
    remove_scratch_folders,
    require_file,
    save_json,
    scratch_folder,
)
from sparsity.distributed import warn
from sparsity.sat.arguments import SatArguments
from sparsity.sat.batching import IGNORE, Packed
from sparsity.generated_text import self_text
from sparsity.sources import SELF, Source, content_key, is_streamed, parse_sources, read_source
from sparsity.text import DEFAULT_TEMPLATE, PromptTemplate, encode_prompt, read_records, token_blocks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


BUILDING = ".building."  # how the folders of data begin that is being tokenized
FORMAT = 4  # raise it when the layout of samples changes, so that older caches are not read


DIGESTS = "digests.json"  # of the other files in a folder of tokenized data, by name; earlier releases wrote none
DIGEST_SAMPLES = 64  # pieces of a file that are hashed
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
        datasets.Dataset with columns input_ids, labels, record (its index in its file), plain (false: no plain text)
        and length (tokens).

    Raises:
        UserError: max_length is too small for all records.
    """
    from datasets import Dataset

    def encode(record: dict[str, str], index: int) -> dict[str, Any]:
        sample = encode_record(tokenizer, record, max_length, template) or {"input_ids": [], "labels": []}
        return {**sample, "record": index, "plain": False, "length": len(sample["input_ids"])}

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
    blocks = token_blocks(tokenizer, texts, block_size, limit).tolist()
    return text_dataset(blocks)


def text_dataset(blocks: list[list[int]]) -> Dataset:
    """Samples of token blocks of one length, with loss on every token."""
    from datasets import Dataset

    count = len(blocks)
    columns = {"input_ids": blocks, "labels": blocks, "record": list(range(count)), "plain": [True] * count}
    return Dataset.from_dict({**columns, "length": [len(block) for block in blocks]})


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything the tokenizer would save: vocabulary, merges, normalization, special tokens."""
    digest = hashlib.sha256()
    with scratch_folder(prefix="hf-sparsity.tokenizer.") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(folder.rglob("*")):
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
    if cache_dir.is_dir():
        remove_scratch_folders(cache_dir, BUILDING)
    damaged = False
    if folder.is_dir():
        try:
            check_digests(folder)
            return load_from_disk(str(folder))
        except Exception as error:  # datasets and Arrow have no common class for files of another release
            print(f"the cached data in {folder} is damaged ({first_line(error)}); tokenizing again")
            damaged = True
    prepare_output_dir(cache_dir)
    dataset = build()
    with scratch_folder(cache_dir, BUILDING) as scratch:
        disable_progress_bars()  # writing takes a moment; tokenizing keeps its bar
        try:
            dataset.save_to_disk(str(scratch / name))
        finally:
            enable_progress_bars()
        save_digests(scratch / name)
        if damaged:
            with contextlib.suppress(OSError):
                folder.rename(scratch / "damaged")
        try:
            (scratch / name).rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # those two say that another run was faster
    return load_from_disk(str(folder))


def save_digests(folder: Path) -> None:
    """Record the content of the files in a folder, so that `check_digests` can tell whether it has changed."""
    save_json({path.name: file_digest(path, DIGEST_SAMPLES) for path in folder.iterdir()}, folder / DIGESTS)


def check_digests(folder: Path) -> None:
    """Check the files of a folder: from an Arrow file that was cut short, fewer rows are read without an error.

    Raises:
        UserError, OSError: a file is missing or has changed.
    """
    if not (folder / DIGESTS).exists():
        return
    digests = read_json(folder / DIGESTS, "list of files")
    data = {path.name for path in folder.iterdir() if path.suffix in (".json", ".arrow")} - {DIGESTS}
    if not isinstance(digests, dict) or not digests.keys() >= data:
        raise UserError(f"{DIGESTS} does not list all files")
    for name, digest in digests.items():
        if file_digest(folder / name, DIGEST_SAMPLES) != digest:
            raise UserError(f"{name} has changed")


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


@dataclass
class Text:
    """Plain text to train on.

    Attributes:
        blocks: samples of one length; None until the model has written them.
        share: of all plain text; the shares of a run sum to 1.
        own: whether the model writes it.
    """

    blocks: Any  # a datasets.Dataset
    share: float
    own: bool = False


def draw_blocks(texts: list[Text], wanted: int | None, seed: int) -> Dataset:
    """Blocks of several texts by their shares, each drawn without replacement; only the model's own text is repeated.

    Args:
        wanted: blocks in all; None or more than there are: as many as the shares allow.
    """
    from datasets import concatenate_datasets

    limits = [len(text.blocks) / text.share for text in texts if not text.own]
    total: float = wanted or 0
    if wanted is None or limits:
        available = min(limits or [len(text.blocks) / text.share for text in texts])
        total = available if wanted is None else min(wanted, available)
    drawn = []
    for number, text in enumerate(texts):
        order = torch.randperm(len(text.blocks), generator=torch.Generator().manual_seed(seed + number)).tolist()
        count = max(1, round(total * text.share))
        drawn.append(text.blocks.select((order * math.ceil(count / len(order)))[:count]))
    return concatenate_datasets(drawn)


def wanted_blocks(records: Dataset, text_ratio: float, block_size: int) -> int:
    """How many blocks of plain text, with the tokens of the records, make up `text_ratio` of all tokens."""
    return max(1, round(sum(records["length"]) * text_ratio / (1 - text_ratio) / block_size))


def mix(records: Dataset | None, texts: list[Text], text_ratio: float, seed: int) -> Dataset:
    """Add blocks of text, as `draw_blocks` draws them, until `text_ratio` of all tokens are plain text.

    Fewer are added if the text does not suffice. At ratio 1 only the text is trained on.
    """
    from datasets import concatenate_datasets

    if text_ratio >= 1 or records is None:
        return texts[0].blocks if len(texts) == 1 else draw_blocks(texts, None, seed)
    block = len(texts[0].blocks[0]["input_ids"])
    wanted = wanted_blocks(records, text_ratio, block)
    drawn = draw_blocks(texts, wanted, seed)
    if wanted > len(drawn) + len(texts):
        warn(f"the text has {len(drawn)} blocks of {block} tokens; --text_ratio {text_ratio} asks for {wanted}")
    return concatenate_datasets([records, drawn])


@dataclass
class TrainingData:
    """What a run trains and evaluates on, before it is mixed."""

    records: Dataset | None
    evaluation: Dataset | None
    texts: list[Text]


def load_data(args: SatArguments, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> TrainingData:
    """Training and evaluation samples, tokenized once and kept in the cache; the model's own text is not written yet.

    Raises:
        UserError: missing, malformed or too small data, or a length that does not fit.
    """
    data = args.data
    length, cache, records, evaluation = data.model_max_length, data.cache_folder, None, None
    if data.uses_records:
        records, evaluation = (
            load_records(tokenizer, path, length, cache, data.workers, template)
            for path in (data.train_file, data.eval_file)
        )
        if data.max_eval_samples and len(evaluation) > data.max_eval_samples:
            evaluation = evaluation.select(range(data.max_eval_samples))
    texts = []
    for source in parse_sources(data.text_path) if data.text_path else []:
        tokens = None if data.text_tokens is None else math.ceil(data.text_tokens * source.weight)
        if tokens is None and records is not None and is_streamed(source):
            tokens = math.ceil(wanted_blocks(records, data.text_ratio, data.block) * source.weight) * data.block
        own = source.spec == SELF
        blocks = None if own else load_texts(tokenizer, source, data.block, cache, tokens, args.training.seed)
        texts.append(Text(blocks, source.weight, own))
    return TrainingData(records, evaluation, texts)


def own_blocks(args: SatArguments, known: TrainingData) -> int:
    """How many blocks of text the model is to write: --self_tokens, or as many as the run reads at most.

    Raises:
        UserError: nothing says how many.
    """
    data, training = args.data, args.training
    share = sum(text.share for text in known.texts if text.own)
    if not share:
        return 0
    if data.self_tokens is not None:
        return math.ceil(data.self_tokens / data.block)
    limits = [len(text.blocks) / text.share for text in known.texts if text.blocks is not None]
    if data.text_tokens is not None:
        limits.append(data.text_tokens / data.block)
    if known.records is not None and data.text_ratio < 1:
        limits.append(wanted_blocks(known.records, data.text_ratio, data.block))
    if training.max_steps > 0:
        samples = training.max_steps * training.gradient_accumulation_steps * training.processes
        tokens = samples * training.per_device_train_batch_size * data.model_max_length
        limits.append(tokens * data.text_ratio / data.block)
    if not limits:
        raise UserError(f"nothing says how much text the model is to write for '{SELF}'; give --self_tokens")
    return max(1, math.ceil(min(limits) * share))


def load_own_text(
    args: SatArguments,
    known: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> Dataset | None:
    """The blocks that the dense model writes, from its cache as far as they are there; see `self_text`.

    Args:
        process, processes: number of this process, and of those that share the work.

    Returns:
        None where nothing is to be written; a part where others have a share in the work.
    """
    blocks = own_blocks(args, known)
    if not blocks:
        return None
    model = args.model
    options = (args.data.block, device, args.training.seed, model.trust_remote_code)
    written = self_text(model.model_name_or_path, tokenizer, blocks, *options, part=(process, processes))
    return text_dataset(written.tolist())


def training_samples(args: SatArguments, known: TrainingData, own: Dataset | None) -> Dataset | Packed:
    """What is trained on: records and plain text, mixed and, if asked, packed into rows.

    Args:
        own: the text that the model wrote.
    """
    train = known.records
    if known.texts:
        texts = [replace(text, blocks=own) if text.own else text for text in known.texts]
        train = mix(known.records, texts, args.data.text_ratio, args.training.seed)
    return Packed(train, args.data.model_max_length) if args.data.packing else train
