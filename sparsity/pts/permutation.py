"""Free channel permutations: which channels share a group of the pattern.

The groups of an N:M pattern follow the order of a weight's inputs, and inside a decoder layer that order is arbitrary:
a permutation of the channels between two linear layers changes nothing if it reorders the rows of the one and the
columns of the other. Dealt by importance, the heaviest inputs of a weight no longer compete for the places of one group
(Pool & Yu, "Channel Permutations for N:M Sparsity", 2021, search such orders for magnitude pruning).
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity.pts.activations import HiddenStates
from sparsity.pts.calibration import MAX_SEQUENTIAL_GROUPS
from sparsity.pts.structure import Stop
from sparsity.pts.pattern import Pattern

# Of the search for exchanges. Twice the passes lose another 1% less; a sample of few rows loses more than few passes.
PASSES, ROWS_IN_A_PASS = 6, 1024
SALIENCIES_AT_ONCE = 2**16  # of one channel, so that those of all pairs of channels stay in a CPU's cache
SALIENCIES_ON_GPU = 2**20  # which has to start fewer kernels with them
SPLITS = [  # of eight channels into two groups
    ((0, *rest), tuple(channel for channel in range(1, 8) if channel not in rest))
    for rest in itertools.combinations(range(1, 8), 3)
]
# An order is proven on this many tokens of one sequence, where it has at least so many that heads are not as wide.
PROVING_TOKENS, FROM_LENGTH = 128, 512
# Relative differences of outputs that are put down to rounding; a wrong order differs by more than half.
MIN_TOLERANCE, ROUNDINGS = 1e-4, 8


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
    """Orders for 2:4 that lose less saliency: channels exchanged between groups of four.

    Each pass joins the groups of a block to random pairs and splits the eight channels of a pair in the best of all 35
    ways. A row loses the two smallest saliencies of each group.

    Args:
        orders: to begin with, int64 [blocks, channels].
        saliency: H_jj W_ij² [blocks, channels, rows].

    Returns:
        int64 [blocks, channels].
    """
    blocks, channels, rows = saliency.shape
    if channels < 8:
        return orders
    generator, device = torch.Generator().manual_seed(0), saliency.device
    flat = saliency.flatten(0, 1)
    groups = orders + torch.arange(blocks, device=device)[:, None] * channels  # numbers in `flat`
    groups = groups.reshape(-1, 4)
    left, right = torch.tensor(SPLITS, device=device).unbind(1)  # [35, 4]
    for _ in range(PASSES):
        pairs = torch.stack([torch.randperm(channels // 4, generator=generator) for _ in range(blocks)])
        pairs = (pairs + torch.arange(blocks)[:, None] * (channels // 4))[:, : channels // 8 * 2]
        pairs = pairs.reshape(-1, 2).to(device)
        seen = flat
        if rows > ROWS_IN_A_PASS:
            seen = flat[:, torch.randperm(rows, generator=generator)[:ROWS_IN_A_PASS].to(device)]
        members = groups[pairs].flatten(1)  # [pairs, 8]
        lost = torch.zeros(len(SPLITS), len(pairs), device=device)
        at_once = SALIENCIES_AT_ONCE if device.type == "cpu" else SALIENCIES_ON_GPU
        for part in seen.split(max(1, at_once // len(pairs)), dim=1):
            lost += _lost_by_split(part[members.t()])
        best = lost.argmin(0)
        groups[pairs[:, 0]] = members.gather(1, left[best])
        groups[pairs[:, 1]] = members.gather(1, right[best])
    return groups.view(blocks, channels) % channels


def _lost_by_split(saliency: Tensor) -> Tensor:
    """What rows lose in all for each of `SPLITS` [35, pairs], by the saliency [8, pairs, rows] of channels in pairs."""
    smaller, both = {}, {}  # of two channels
    for a, b in itertools.combinations(range(8), 2):
        smaller[a, b] = torch.minimum(saliency[a], saliency[b])
        both[a, b] = saliency[a] + saliency[b]

    def two_smallest(a: int, b: int, c: int, d: int) -> Tensor:
        found = smaller[a, b] + smaller[c, d]
        torch.minimum(found, both[a, b], out=found)
        return torch.minimum(found, both[c, d], out=found)

    return torch.stack([two_smallest(*left).add_(two_smallest(*right)).sum(-1) for left, right in SPLITS])


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
        """An order [blocks, channels] for the pattern; `energy` is the diagonal of the consumer's Hessian H."""
        saliency = (self.consumer.weight.float().square() * energy).t()[
            self.columns
        ]  # [repeats, blocks, channels, rows]
        saliency = saliency.movedim(0, -2).flatten(-2)  # [blocks, channels, repeats · rows]
        orders = dealt(saliency.sum(-1), pattern.m)
        return exchanged(orders, saliency) if (pattern.n, pattern.m) == (2, 4) else orders

    def reorder(self, order: Tensor) -> None:
        """Place n of each block gets the channel order[block, n].

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


def mlp_channels(group: dict[str, nn.Linear], consumer: nn.Linear) -> Channels | None:
    """The inner channels of an MLP: rows of `group` (gate and up, as two weights or one), columns of `consumer`."""
    inner = torch.arange(consumer.in_features, device=consumer.weight.device)[None]
    if any(linear.out_features % inner.numel() for linear in group.values()):
        return None
    producers = [
        (linear, inner + first) for linear in group.values() for first in range(0, linear.out_features, inner.numel())
    ]
    return Channels(producers, consumer, inner[None])


def value_channels(group: dict[str, nn.Linear], consumer: nn.Linear, heads: int, kept_heads: int) -> Channels | None:
    """The channels of each value head: the last rows of `group`, columns of `consumer` of all heads that share it.

    Args:
        heads: of queries.  kept_heads: of keys and values.
    """
    width, device = consumer.in_features // heads, consumer.weight.device
    value = list(group.values())[-1]
    if value.out_features <= consumer.in_features:  # a weight of its own, which tells the number better
        kept_heads = value.out_features // width
    first = value.out_features - kept_heads * width
    if first < 0 or not kept_heads or heads % kept_heads:
        return None
    rows = torch.arange(first, value.out_features, device=device).view(kept_heads, width)
    columns = torch.arange(consumer.in_features, device=device).view(kept_heads, heads // kept_heads, width)
    return Channels([(value, rows)], consumer, columns.transpose(0, 1))


def reorderable(groups: list[dict[str, nn.Linear]]) -> dict[int, nn.Linear]:
    """By number of group, linear layers alone in their group whose inputs other pruned layers may produce."""
    if len(groups) > MAX_SEQUENTIAL_GROUPS:
        return {}
    return {n: next(iter(group.values())) for n, group in enumerate(groups) if n and len(group) == 1}


@torch.no_grad()
def permute(
    states: HiddenStates,
    layer: nn.Module,
    index: int,
    groups: list[dict[str, nn.Linear]],
    energies: dict[int, Tensor],
    heads: tuple[int, int, int],
    pattern: Pattern,
) -> dict[int, Tensor]:
    """Reorder the inputs of the linear layers that may be, each proven on the running layer or else undone.

    Args:
        energies: by number of group, the diagonal of its Hessian [cols]; groups of one linear layer.
        heads: of queries; of keys and values; channels of each.

    Returns:
        by number of group, the new order of its inputs [cols].
    """
    candidates: dict[int, Channels] = {}
    for number in energies:
        consumer = next(iter(groups[number].values()))
        attention = consumer.in_features == heads[0] * heads[2]
        above = groups[number - 1]
        channels = value_channels(above, consumer, *heads[:2]) if attention else mlp_channels(above, consumer)
        if channels is not None and channels.columns.shape[-1] % pattern.m == 0:
            candidates[number] = channels
    expected = outputs_of(states, layer, index, [channels.consumer for channels in candidates.values()])
    kept = {}
    for number, channels in candidates.items():
        linear = channels.consumer
        order = channels.best_order(energies[number], pattern)
        channels.reorder(order)
        if _same(expected.get(linear), outputs_of(states, layer, index, [linear]).get(linear), linear):
            kept[number] = _index(linear.in_features, channels.columns, order)
        else:
            channels.reorder(order.argsort(-1))
    return kept


def outputs_of(states: HiddenStates, layer: nn.Module, index: int, linears: list[nn.Linear]) -> dict[nn.Linear, Tensor]:
    """Outputs of linear layers within the decoder layer for one text, in the weights' own dtype."""
    seen: dict[nn.Linear, Tensor] = {}

    def note(module: nn.Linear, args: tuple, output: Tensor) -> None:
        seen[module] = output
        if len(seen) == len(linears):
            raise Stop

    handles = [linear.register_forward_hook(note) for linear in linears]
    hidden = states.pruned if states.pruned is not None else states.dense
    assert hidden is not None
    tokens = PROVING_TOKENS if hidden[0].shape[1] >= FROM_LENGTH else hidden[0].shape[1]
    with suppress(Stop):
        states.run(layer, index, 0, hidden[0][:1, :tokens], exact=True)
    for handle in handles:
        handle.remove()
    return seen


def _same(expected: Tensor | None, found: Tensor | None, linear: nn.Linear) -> bool:
    """Whether outputs [..., rows] of a linear layer are equal but for rounding, on the mean of all tokens."""
    if expected is None or found is None:
        return False
    bias = 0.0 if linear.bias is None else linear.bias.float()  # which no order changes
    difference = (found.float() - expected.float()).norm(dim=-1)
    share = difference / (expected.float() - bias).norm(dim=-1).clamp(min=1e-30)
    return bool(share.mean() <= max(MIN_TOLERANCE, ROUNDINGS * torch.finfo(expected.dtype).eps))
