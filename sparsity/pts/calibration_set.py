"""The calibration set: which text is read, and its share of each process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsity.errors import UserError, first_line
from sparsity.sources import CNN_DAILYMAIL
from sparsity.text import read_texts, sample_blocks

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

ARTICLE_TOKENS = 800  # about the length of a cnn_dailymail article


def calibration_texts(path: str | Path | None, tokens: int, seed: int) -> list[str]:
    """The texts of a file, or articles of cnn_dailymail's training split (evaluation uses its test split).

    Args:
        tokens: how many are wanted in all.

    Raises:
        UserError: the file is missing or malformed, or the hub cannot be reached.
    """
    if path:
        return read_texts(path)
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


def load_calibration(
    tokenizer: PreTrainedTokenizerBase, path: str | Path | None, size: int, length: int, batch_size: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Batches {"input_ids": int64 [batch_size, length]} of full sequences; the last one may be smaller.

    Raises:
        UserError: no text, or less than one sequence of it.
    """
    texts = calibration_texts(path, size * length, seed)
    blocks = sample_blocks(tokenizer, texts, length, size, seed)
    if len(blocks) < size:
        print(f"warning: the text gives {len(blocks)} sequences of {length}, not {size}")
    return [{"input_ids": batch} for batch in blocks.split(batch_size)]


def share_of_process(batches: list[dict[str, torch.Tensor]], process: PartialState) -> list[dict[str, torch.Tensor]]:
    """This process's part of the calibration batches, as many as every other's.

    Raises:
        UserError: there are fewer batches than processes.
    """
    world = process.num_processes
    if len(batches) < world:
        raise UserError(f"{len(batches)} calibration batches cannot be shared by {world} processes; raise --calib_size")
    return batches[: len(batches) // world * world][process.process_index :: world]
