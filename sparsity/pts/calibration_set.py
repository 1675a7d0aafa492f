"""The calibration set: which texts it is drawn from, how much each counts, and the share of each process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparsity.errors import UserError, first_line
from sparsity.sources import CNN_DAILYMAIL, SELF, Source
from sparsity.text import read_texts, sample_blocks

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

ARTICLE_TOKENS = 800  # about the length of a cnn_dailymail article
HUB = "cnn_dailymail"  # the source that is read from the hub
DEFAULT_SOURCES = f"{HUB}=0.5,{SELF}=0.5"


def calibration_texts(spec: str, tokens: int, seed: int) -> list[str]:
    """The texts of a file, or articles of cnn_dailymail's training split (evaluation uses its test split).

    Args:
        spec: a file, or `HUB`.
        tokens: how many are wanted in all.

    Raises:
        UserError: the file is missing or malformed, or the hub cannot be reached.
    """
    if spec != HUB:
        return read_texts(spec)
    from datasets import load_dataset

    try:
        articles = load_dataset(*CNN_DAILYMAIL, split="train", streaming=True)
        articles = articles.shuffle(seed=seed, buffer_size=1000)
        # Twice the need, so that every article contributes a part.
        return [row["article"] for row in articles.take(2 + 2 * tokens // ARTICLE_TOKENS)]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot load cnn_dailymail from the hub ({first_line(error)}); give --calib_data FILE instead"
        ) from error


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


def load_calibration(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    size: int,
    length: int,
    batch_size: int,
    seed: int,
    write: Callable[[int], torch.Tensor],
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Calibration sequences of all sources, no batch with those of two.

    Args:
        write: from a number of sequences to the model's own text, int64 [sequences, length].

    Returns:
        batches {"input_ids": int64 [batch_size, length]} of full sequences, the last of a source may be smaller; for
        each batch, what its tokens count, 1 on average: a source counts by its weight, however long it is.

    Raises:
        UserError: no text, or less than one sequence of it.
    """
    blocks = []
    for source, count in zip(sources, shares(sources, size), strict=True):
        if source.spec == SELF:
            blocks.append(write(count))
            continue
        texts = calibration_texts(source.spec, count * length, seed)
        try:
            blocks.append(sample_blocks(tokenizer, texts, length, count, seed))
        except UserError as error:
            raise UserError(f"source {source.spec} is too short for its share of --calib_data: {error}") from error
        if len(blocks[-1]) < count:
            counts = ", which count as much" if len(sources) > 1 else ""
            print(f"warning: {source.spec} gives {len(blocks[-1])} sequences of {length}, not {count}{counts}")
    total = sum(map(len, blocks))
    batches, token_weights = [], []
    for source, found in zip(sources, blocks, strict=True):
        parts = found.split(batch_size)
        batches += [{"input_ids": part} for part in parts]
        token_weights += [source.weight * total / len(found)] * len(parts)
    return batches, token_weights


def share_of_process(items: list, process: PartialState) -> list:
    """This process's part of the calibration batches or of their weights, as many as every other's.

    Raises:
        UserError: there are fewer batches than processes.
    """
    world = process.num_processes
    if len(items) < world:
        raise UserError(f"{len(items)} calibration batches cannot be shared by {world} processes; raise --calib_size")
    return items[: len(items) // world * world][process.process_index :: world]
