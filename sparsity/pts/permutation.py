"""Free channel permutations: which channels share a group of the pattern.

The groups of an N:M pattern follow the order of a weight's inputs, and inside a decoder layer that order is arbitrary:
a permutation of the channels between two linear layers changes nothing if it reorders the rows of the one and the
columns of the other. Dealt by importance, the heaviest inputs of a weight no longer compete for the places of one group
(Pool & Yu, "Channel Permutations for N:M Sparsity", 2021, search such orders for magnitude pruning).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity.pattern import Pattern
from sparsity.pts.activations import PROBE, HiddenStates
from sparsity.pts.statistics import MAX_SEQUENTIAL_GROUPS
from sparsity.pts.structure import DecoderLayer, Group, reader, watched

# Relative differences of outputs that are put down to rounding; a wrong order differs by more than half.
MIN_TOLERANCE, ROUNDINGS = 1e-4, 8
SPLITS = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]  # first four of eight; the others follow
PASSES, ROWS_PER_PASS = 6, 1024  # of the search for exchanges


def dealt(importance: Tensor, size: int) -> Tensor:
    """An order of channels that deals them to groups of `size`, each of which gets one of every quantile.

    Args:
        importance: [blocks, channels], each block with an order of its own.

    Returns:
        int64 [blocks, channels]: which channel each place gets. Groups with more important channels come first.

    >>> dealt(torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]), 4)
    tensor([[0, 2, 4, 6, 1, 3, 5, 7]])
    """
    order = importance.argsort(dim=-1, descending=True, stable=True)
    return order.unflatten(-1, (size, -1)).transpose(-1, -2).flatten(-2)


def exchanged(orders: Tensor, saliency: Tensor) -> Tensor:
    """Orders for 2:4 that prune less saliency: channels exchanged between groups of four.

    Each pass joins the groups of a block to random pairs and splits the eight channels of each pair in the best of all
    35 ways. It looks at `ROWS_PER_PASS` rows at most.

    Args:
        orders: to begin with, int64 [blocks, channels].
        saliency: energy · W² [blocks, channels, rows].

    Returns:
        int64 [blocks, channels].
    """
    generator, device = torch.Generator().manual_seed(0), saliency.device
    groups, rows = orders.unflatten(1, (-1, 4)), saliency.shape[2]
    splits = torch.tensor([[*left, *({*range(8)} - {*left})] for left in SPLITS], device=device)
    count = groups.shape[1] // 2
    for _ in range(PASSES if count else 0):
        pairs = torch.randperm(groups.shape[1], generator=generator)[: 2 * count].view(count, 2).to(device)
        seen = saliency[:, :, torch.randperm(rows, generator=generator)[:ROWS_PER_PASS].to(device)]
        members = groups[:, pairs].flatten(2)  # [blocks, pairs, 8]
        index = members.flatten(1)[..., None].expand(-1, -1, seen.shape[2])
        values = seen.gather(1, index).unflatten(1, (count, 8)).unbind(2)  # eight times [blocks, pairs, rows]
        lost = [pruned_saliency(*(values[n] for n in split)) for split in splits.tolist()]
        best = splits[torch.stack(lost).argmin(0)]  # [blocks, pairs, 8]
        groups[:, pairs] = members.gather(2, best).unflatten(2, (2, 4))
    return groups.flatten(1)


def pruned_saliency(*channels: Tensor) -> Tensor:
    """What 2:4 prunes of two groups, eight channels [blocks, pairs, rows]: the two smallest of each, summed."""
    pruned = [
        torch.minimum(torch.minimum(a, b) + torch.minimum(c, d), torch.minimum(a + b, c + d))
        for a, b, c, d in (channels[:4], channels[4:])
    ]
    return (pruned[0] + pruned[1]).sum(-1)


@dataclass
class Channels:
    """Channels between linear layers: rows of the producers become, through some activation, the consumer's columns.

    Attributes:
        producers: a linear layer and the row [blocks, channels] of each channel; orders hold within blocks.
        columns: the consumer's column [repeats, blocks, channels]; query heads that share a value head repeat it.
    """

    producers: list[tuple[nn.Linear, Tensor]]
    consumer: nn.Linear
    columns: Tensor

    def best_order(self, energy: Tensor, pattern: Pattern) -> Tensor:
        """An order [blocks, channels] for the pattern; `energy` [cols] sums the squares of each input."""
        saliency = (self.consumer.weight.float().square() * energy).t()  # [cols, rows]
        saliency = saliency[self.columns].movedim(0, -2).flatten(-2)  # [blocks, channels, repeats · rows]
        order = dealt(saliency.sum(-1), pattern.m)
        return exchanged(order, saliency) if (pattern.n, pattern.m) == (2, 4) else order

    def reorder(self, order: Tensor) -> None:
        """Move the channel order[block, n] to place n of each block.

        Weights become new tensors: the memory of the old ones may be mapped from the checkpoint.
        """
        for linear, rows in self.producers:
            index = _index(linear.out_features, rows, order)
            linear.weight.data = linear.weight.data[index]
            if linear.bias is not None:
                linear.bias.data = linear.bias.data[index]
        index = _index(self.consumer.in_features, self.columns, order)
        self.consumer.weight.data = self.consumer.weight.data[:, index]


def _index(size: int, places: Tensor, order: Tensor) -> Tensor:
    index = torch.arange(size, device=places.device)
    index[places] = places.gather(-1, order.expand_as(places))
    return index


def mlp_channels(group: Group, consumer: nn.Linear) -> Channels | None:
    """The inner channels of an MLP: rows of `group` (gate and up, as two weights or one), columns of `consumer`."""
    inner = torch.arange(consumer.in_features, device=consumer.weight.device)[None]
    if any(linear.out_features % inner.numel() for linear in group.values()):
        return None
    producers = [
        (linear, inner + first) for linear in group.values() for first in range(0, linear.out_features, inner.numel())
    ]
    return Channels(producers, consumer, inner[None])


def value_channels(group: Group, consumer: nn.Linear, num_heads: int, num_kv_heads: int) -> Channels | None:
    """The channels of each value head: the last rows of `group`, columns of `consumer` of all heads that share it."""
    width, device = consumer.in_features // num_heads, consumer.weight.device
    value = list(group.values())[-1]
    if value.out_features <= consumer.in_features:  # a weight of its own, which tells the number better
        num_kv_heads = value.out_features // width
    first = value.out_features - num_kv_heads * width
    if first < 0 or not num_kv_heads or num_heads % num_kv_heads:
        return None
    rows = torch.arange(first, value.out_features, device=device).view(num_kv_heads, width)
    columns = torch.arange(consumer.in_features, device=device).view(num_kv_heads, num_heads // num_kv_heads, width)
    return Channels([(value, rows)], consumer, columns.transpose(0, 1))


def find_channels(groups: list[Group], heads: tuple[int, int, int], pattern: Pattern) -> list[Channels]:
    """Channels that may be reordered: inputs of a linear layer alone in its group, and outputs of the group before it.

    Args:
        heads: number of query heads; of key and value heads; channels of each.
    """
    if len(groups) > MAX_SEQUENTIAL_GROUPS:
        return []
    candidates = []
    for above, group in itertools.pairwise(groups):
        consumer = reader(group)
        attention = consumer.in_features == heads[0] * heads[2]
        channels = value_channels(above, consumer, *heads[:2]) if attention else mlp_channels(above, consumer)
        if len(group) == 1 and channels is not None and channels.columns.shape[-1] % pattern.m == 0:
            candidates.append(channels)
    return candidates


@torch.no_grad()
def permute(
    states: HiddenStates,
    layer: DecoderLayer,
    candidates: list[Channels],
    energies: Mapping[nn.Linear, Tensor],
    pattern: Pattern,
) -> dict[nn.Linear, Tensor]:
    """Reorder inputs of linear layers where that changes none of their outputs, tried on the running layer.

    Args:
        candidates: from `find_channels`.
        energies: by consumer, sums of the squares of each input [cols].

    Returns:
        linear layer → its old input [cols] in each place, int64.
    """
    expected = outputs(states, layer, [channels.consumer for channels in candidates]) if candidates else {}
    reordered = {}
    for channels in candidates:
        linear = channels.consumer
        if linear not in expected:
            continue
        order = channels.best_order(energies[linear], pattern)
        channels.reorder(order)
        if _same(expected[linear], outputs(states, layer, [linear])[linear], linear):
            reordered[linear] = _index(linear.in_features, channels.columns, order)
        else:
            channels.reorder(order.argsort(-1))
    return reordered


def outputs(states: HiddenStates, layer: DecoderLayer, linears: list[nn.Linear]) -> dict[nn.Module, Tensor]:
    """Outputs of linear layers within the decoder layer for a few hidden states, whichever they are by now."""
    with states.precision(), watched(linears, stop=True) as calls:
        states.run(layer, PROBE, states.probe())
    return {linear: pairs[0][1] for linear, pairs in calls.items()}


def _same(expected: Tensor, actual: Tensor, linear: nn.Linear) -> bool:
    """Whether outputs [..., rows] of a linear layer are equal but for rounding, on the mean of all tokens."""
    bias = 0.0 if linear.bias is None else linear.bias.float()  # which no order changes
    difference = (actual.float() - expected.float()).norm(dim=-1)
    relative = difference / (expected.float() - bias).norm(dim=-1).clamp(min=1e-30)
    return bool(relative.mean() <= max(MIN_TOLERANCE, ROUNDINGS * torch.finfo(expected.dtype).eps))
