"""Packing samples into rows, batches, and the order in which an epoch visits them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset


IGNORE = -100


class Packed(torch.utils.data.Dataset):
    """Rows of several samples each, filled by first-fit decreasing up to `max_length` tokens; nothing is cut.

    An item holds lists over its samples: {"input_ids": [[…], …], "labels": [[…], …], "record": […], "plain": […]}.
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


class Collator:
    """Turn samples or packed rows into a batch padded to its longest row, rounded up to a multiple of 8.

    The batch holds input_ids, labels and position_ids [B, T]; real, bool [B, T], false on padding; plain, bool [B, T],
    true on plain text, false on records and padding; record [B, most
    samples in a row] padded with -1; and attention_mask: [B, T] of 0 and 1, or for packed rows bool [B, 1, T, T] that
    keeps attention causal and within a sample.
    """

    def __init__(self, pad_token_id: int, pad_to: int | None = None):
        self.pad_token_id, self.pad_to = pad_token_id, pad_to

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        packed = isinstance(items[0]["record"], list)
        rows = [tuple(item[name] for name in ("input_ids", "labels", "record", "plain")) for item in items]
        if not packed:
            rows = [tuple([value] for value in row) for row in rows]
        longest = max(sum(map(len, row[0])) for row in rows)
        width = self.pad_to or -(-longest // 8) * 8
        shape = (len(rows), width)
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

    With `group` > 0, shuffled stretches of 50 batches of `group` items are sorted by length and their batches shuffled,
    so that a batch holds samples of similar length and the longest stretch comes at a random time.

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
        stretch = 50 * self.group
        batches: list[list[int]] = []
        for start in range(0, len(order), stretch):
            part = sorted(order[start : start + stretch], key=lambda index: -self.lengths[index])
            batches += [part[begin : begin + self.group] for begin in range(0, len(part), self.group)]
        short = [batch for batch in batches if len(batch) < self.group]  # an uneven batch would shift all that follow
        full = [batch for batch in batches if len(batch) == self.group]
        shuffled = [full[index] for index in torch.randperm(len(full), generator=generator).tolist()]
        return iter([index for batch in shuffled + short for index in batch][: self.size])
