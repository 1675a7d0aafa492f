"""Training samples: tokenizing, the cache on disk, mixing with plain text, packing into rows, batches and their order.

A sample is {"input_ids": int list [T], "labels": int list [T]} with label IGNORE where no loss is taken. Labels are
aligned with their own token, as Hugging Face models expect; the shift by one happens in the loss. Samples are rows of
a datasets.Dataset with further columns: record (index in its file), plain (whether it is plain text) and length.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity.errors import UserError, warn
from sparsity.files import file_digest, is_sealed, prepare_output_dir, require_file, scratch_folder, seal
from sparsity.generated_text import generate_text
from sparsity.sat.arguments import SatArguments
from sparsity.sources import SELF, Source, content_key, is_streamed, parse_sources, read_source
from sparsity.text import DEFAULT_TEMPLATE, PromptTemplate, encode_prompt, read_records, token_blocks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
FORMAT = 4  # raise it when the layout of samples changes, so that older caches are not read
STRETCH = 50  # batches that are sorted by length together

Sample = dict[str, list[int]]


# ----------------------------------------------------------------------------------------------------------- samples


def encode_record(
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, str],
    max_length: int,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> tuple[Sample, bool]:
    """Prompt, answer and end-of-text token, with loss on the answer only; and whether the template's head was cut.

    An overlong sample loses the end of its article first, and once that is empty the end of its answer, end-of-text
    token included: the model is not taught to stop there. At least a quarter of the tokens is for the answer.
    """
    answer = tokenizer(record["output"].strip(), add_special_tokens=False, verbose=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    most = max_length - min(len(answer), -(-max_length // 4))
    prompt, headless = encode_prompt(tokenizer, record, max(0, max_length - len(answer)), template, most)
    answer = answer[: max_length - len(prompt)]
    return {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}, headless


def encode_records(
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, str]],
    max_length: int,
    workers: int,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    name: str | Path = "the data",
) -> Dataset:
    """Tokenize the records of the file `name` in `workers` processes; warns if any lose more than their article."""
    from datasets import Dataset

    def encode(record: dict[str, str], index: int) -> dict[str, Any]:
        sample, headless = encode_record(tokenizer, record, max_length, template)
        return {**sample, "record": index, "plain": False, "length": len(sample["input_ids"]), "headless": headless}

    columns = ("instruction", "input", "output")
    dataset = Dataset.from_list([{key: record[key] for key in columns} for record in records]).map(
        encode,
        with_indices=True,
        remove_columns=list(columns),
        num_proc=workers if workers > 1 and len(records) >= 100 * workers else None,
        desc="tokenizing",
        load_from_cache_file=False,
    )
    headless = sum(dataset["headless"])
    full = [index for index, length in enumerate(dataset["length"]) if length >= max_length]
    cut = sum(labels[-1] != tokenizer.eos_token_id for labels in dataset.select(full)["labels"]) if full else 0
    if cut or headless:
        counts = f"of {len(records)} records {cut} lost the end of their answer and {headless} the start of the prompt"
        warn(f"--max_length {max_length} is short for {name}: {counts}")
    return dataset.remove_columns("headless")


def text_dataset(blocks: list[list[int]]) -> Dataset:
    """Samples of token blocks, with loss on every token."""
    from datasets import Dataset

    count = len(blocks)
    columns = {"input_ids": blocks, "labels": blocks, "record": list(range(count)), "plain": [True] * count}
    return Dataset.from_dict({**columns, "length": [len(block) for block in blocks]})


# ------------------------------------------------------------------------------------------------------------- cache


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything the tokenizer would save: vocabulary, merges, normalization, special tokens."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def cached(cache_dir: Path, key: Sequence[str], build: Callable[[], Dataset]) -> Dataset:
    """Load the dataset that `build()` returned for `key` from the cache, or build it and put it there.

    Runs may share the folder: of several that build the same data at once, all use what the first one to finish kept.
    """
    from datasets import load_from_disk

    name = hashlib.sha256("\0".join([str(FORMAT), *key]).encode()).hexdigest()[:24]
    folder = cache_dir / name
    if not is_sealed(folder):
        if folder.exists():
            print(f"the cached data in {folder} is damaged; tokenizing again")
        prepare_output_dir(cache_dir)
        dataset = build()
        with scratch_folder(cache_dir) as scratch:
            dataset.save_to_disk(str(scratch / name))
            seal(scratch / name)
            if not is_sealed(folder):  # else another run was faster
                shutil.rmtree(folder, ignore_errors=True)
                (scratch / name).rename(folder)
    return load_from_disk(str(folder))


def load_records(
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    max_length: int,
    cache_dir: Path,
    workers: int,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> Dataset:
    """Tokenized records of a file, cached by content, tokenizer, template and length."""
    path = require_file(path, "data file")
    prompt = [template.head, template.tail, str(template.special_tokens)]
    key = ["records", file_digest(path), tokenizer_digest(tokenizer), *prompt, str(max_length)]
    words = (max_length, workers, template, path)
    return cached(cache_dir, key, lambda: encode_records(tokenizer, read_records(path), *words))


def load_texts(
    tokenizer: PreTrainedTokenizerBase, source: Source, block_size: int, cache_dir: Path, tokens: int | None, seed: int
) -> Dataset:
    """Full blocks of plain text, cached by content, tokenizer and block size.

    Args:
        tokens: number of tokens to read; None reads the whole source.
        seed: selects the part of the source that is read, with `tokens`.
    """
    part = ["all"] if tokens is None else [str(tokens), str(seed)]
    key = ["texts", content_key(source), Path(source.spec).suffix, *part, tokenizer_digest(tokenizer), str(block_size)]
    limit = None if tokens is None else -(-tokens // block_size)

    def build() -> Dataset:
        texts = read_source(source, tokens, seed, tokenizer=tokenizer)
        return text_dataset(token_blocks(tokenizer, texts, block_size, limit).tolist())

    return cached(cache_dir, key, build)


# ------------------------------------------------------------------------------------------------------------ mixing


@dataclass
class Text:
    """Plain text to train on.

    Attributes:
        blocks: samples of one length; None until the model has generated them.
        fraction: of all plain text; the fractions of a run sum to 1.
        generated: whether the dense model writes it.
    """

    blocks: Any  # a datasets.Dataset
    fraction: float
    generated: bool = False


@dataclass
class TrainingData:
    """Training and evaluation samples before they are mixed."""

    records: Dataset | None
    evaluation: Dataset | None
    texts: list[Text]


def draw_blocks(texts: list[Text], count: int | None, seed: int) -> Dataset:
    """Blocks of several texts by their fractions, each drawn without replacement; only generated text is repeated.

    Args:
        count: number of blocks in all; None for as many as the fractions allow, which is the most in any case.
    """
    from datasets import concatenate_datasets

    limits = [len(text.blocks) / text.fraction for text in texts if not text.generated]
    if count is None and not limits:
        limits = [len(text.blocks) / text.fraction for text in texts]
    total = min([*limits, *([] if count is None else [count])])
    drawn = []
    for number, text in enumerate(texts):
        order = torch.randperm(len(text.blocks), generator=torch.Generator().manual_seed(seed + number)).tolist()
        part = max(1, round(total * text.fraction))
        drawn.append(text.blocks.select((order * math.ceil(part / len(order)))[:part]))
    return concatenate_datasets(drawn)


def blocks_for_ratio(records: Dataset, text_ratio: float, block_size: int) -> int:
    """Number of blocks of plain text that, with the tokens of the records, make up `text_ratio` of all tokens."""
    return max(1, round(sum(records["length"]) * text_ratio / (1 - text_ratio) / block_size))


def mix(records: Dataset | None, texts: list[Text], text_ratio: float, seed: int) -> Dataset:
    """Add blocks of text until `text_ratio` of all tokens are plain text, or the text ends; at ratio 1, text alone."""
    from datasets import concatenate_datasets

    if text_ratio >= 1 or records is None:
        return texts[0].blocks if len(texts) == 1 else draw_blocks(texts, None, seed)
    block = len(texts[0].blocks[0]["input_ids"])
    target = blocks_for_ratio(records, text_ratio, block)
    drawn = draw_blocks(texts, target, seed)
    if target > len(drawn) + len(texts):  # each text rounds its number of blocks
        warn(f"the text has {len(drawn)} blocks of {block} tokens; --text_ratio {text_ratio} asks for {target}")
    return concatenate_datasets([records, drawn])


# ----------------------------------------------------------------------------------------------------- data of a run


def load_data(args: SatArguments, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> TrainingData:
    """Training and evaluation samples from the cache, tokenized if they are not there; no text is generated yet.

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
            tokens = math.ceil(blocks_for_ratio(records, data.text_ratio, length) * source.weight) * length
        generated = source.spec == SELF
        samples = None if generated else load_texts(tokenizer, source, length, cache, tokens, args.training.seed)
        texts.append(Text(samples, source.weight, generated))
    return TrainingData(records, evaluation, texts)


def generated_blocks(args: SatArguments, loaded: TrainingData) -> int:
    """Number of blocks that the model has to generate: --self_tokens, or at most as many as the run reads.

    Raises:
        UserError: nothing limits the number.
    """
    data, training = args.data, args.training
    fraction = sum(text.fraction for text in loaded.texts if text.generated)
    if not fraction:
        return 0
    if data.self_tokens is not None:
        return math.ceil(data.self_tokens / data.model_max_length)
    limits = [len(text.blocks) / text.fraction for text in loaded.texts if text.blocks is not None]
    if data.text_tokens is not None:
        limits.append(data.text_tokens / data.model_max_length)
    if loaded.records is not None and data.text_ratio < 1:
        limits.append(blocks_for_ratio(loaded.records, data.text_ratio, data.model_max_length))
    if training.max_steps > 0:
        samples = training.max_steps * training.gradient_accumulation_steps * training.processes
        tokens = samples * training.per_device_train_batch_size * data.model_max_length
        limits.append(tokens * data.text_ratio / data.model_max_length)
    if not limits:
        raise UserError(f"nothing says how much text the model is to write for '{SELF}'; give --self_tokens")
    return max(1, math.ceil(min(limits) * fraction))


def load_generated(
    args: SatArguments,
    loaded: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> Dataset | None:
    """The blocks that the dense model writes, from the cache as far as they are there; see `generate_text`.

    Args:
        process, processes: index of this process, and number of processes that share the work.

    Returns:
        The blocks that this process has to generate, all by default; None if none are needed.
    """
    blocks = generated_blocks(args, loaded)
    if not blocks:
        return None
    model = args.model
    options = (args.data.model_max_length, device, args.training.seed, model.trust_remote_code)
    tokens = generate_text(model.model_name_or_path, tokenizer, blocks, *options, part=(process, processes))
    return text_dataset(tokens.tolist())


def training_samples(args: SatArguments, loaded: TrainingData, generated: Dataset | None) -> Dataset | Packed:
    """The training set: records and plain text, mixed and, if asked, packed into rows."""
    train = loaded.records
    if loaded.texts:
        texts = [replace(text, blocks=generated) if text.generated else text for text in loaded.texts]
        train = mix(loaded.records, texts, args.data.text_ratio, args.training.seed)
    return Packed(train, args.data.model_max_length) if args.data.packing else train


# ----------------------------------------------------------------------------------------------------------- batches


class Packed(torch.utils.data.Dataset):
    """Rows of several samples each, filled by first-fit decreasing up to `max_length` tokens; nothing is cut.

    An item holds lists over its samples: {"input_ids": [[…], …], "labels": [[…], …], "record": […], "plain": […]}.
    """

    def __init__(self, samples: Dataset, max_length: int):
        self.samples = samples
        lengths = list(samples["length"])
        self.rows: list[list[int]] = []
        by_room: dict[int, list[int]] = {}  # rows by free tokens: a sample goes to the fullest row that takes it
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


class Collator:
    """Turn samples or packed rows into a batch padded to its longest row, rounded up to a multiple of 8.

    The batch holds input_ids, labels and position_ids [B, T]; real, bool [B, T], false on padding; plain, bool [B, T],
    true on plain text; record [B, most samples in a row], padded with -1; and attention_mask: [B, T] of 0 and 1, or for
    packed rows bool [B, 1, T, T] that keeps attention causal and within a sample.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        packed = isinstance(items[0]["record"], list)
        rows = [tuple(item[name] for name in ("input_ids", "labels", "record", "plain")) for item in items]
        if not packed:
            rows = [tuple([value] for value in row) for row in rows]
        longest = max(sum(map(len, row[0])) for row in rows)
        shape = (len(rows), -(-longest // 8) * 8)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "plain": torch.zeros(shape, dtype=torch.bool),
            "record": torch.full((len(rows), max(len(row[2]) for row in rows)), -1),
        }
        segments = torch.zeros(shape, dtype=torch.long)  # 1, 2, … for the samples of a row, 0 for padding
        for row, (all_ids, all_labels, records, plain) in enumerate(rows):
            start = 0
            batch["record"][row, : len(records)] = torch.tensor(records)
            for number, (ids, labels, is_plain) in enumerate(zip(all_ids, all_labels, plain, strict=True), start=1):
                span = slice(start, start + len(ids))
                batch["input_ids"][row, span] = torch.tensor(ids)
                # The first label of a sample would be predicted by the last token of the sample before it.
                batch["labels"][row, span] = torch.tensor([IGNORE, *labels[1:]])
                batch["position_ids"][row, span] = torch.arange(len(ids))
                batch["plain"][row, span] = is_plain
                segments[row, span] = number
                start += len(ids)
        batch["real"] = segments > 0
        batch["attention_mask"] = packed_mask(segments) if packed else (segments > 0).long()
        return batch


def packed_mask(segments: torch.Tensor) -> torch.Tensor:
    """Bool mask [B, 1, T, T], true where attention is allowed: causal, and each token sees its own segment only.

    A padding token (segment 0) sees the padding before it and itself, so that no softmax row is empty.

    >>> packed_mask(torch.tensor([[1, 1, 2]]))[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    same = segments[:, :, None] == segments[:, None, :]
    return (same & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril())[:, None]


class EpochSampler(torch.utils.data.Sampler):
    """Every item once per epoch, in an order that depends only on seed and epoch and is thus the same after a resume.

    With `group` > 0, shuffled stretches of STRETCH batches of `group` items are sorted by length and their batches
    shuffled, so that a batch holds samples of similar length and the longest batch comes at a random time.

    Args:
        size: items per epoch; those beyond it are left out. By default all.

    Attributes:
        epoch: of the next iteration. There is no `set_epoch`: accelerate 1.10 would set it to 0 after a resume.
    """

    def __init__(self, lengths: list[int], seed: int, group: int = 0, size: int | None = None):
        self.lengths, self.seed, self.group, self.epoch = lengths, seed, group, 0
        self.size = len(lengths) if size is None else size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 7919 * self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group:
            return iter(order[: self.size])
        batches: list[list[int]] = []
        for start in range(0, len(order), STRETCH * self.group):
            part = sorted(order[start : start + STRETCH * self.group], key=lambda index: -self.lengths[index])
            batches += [part[begin : begin + self.group] for begin in range(0, len(part), self.group)]
        short = [batch for batch in batches if len(batch) < self.group]  # an uneven batch would shift all that follow
        full = [batch for batch in batches if len(batch) == self.group]
        shuffled = [full[index] for index in torch.randperm(len(full), generator=generator).tolist()]
        return iter([index for batch in shuffled + short for index in batch][: self.size])
