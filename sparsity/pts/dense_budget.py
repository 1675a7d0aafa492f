"""Which linear layers --keep_dense leaves dense: those that cost the model most, for their size, when pruned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from sparsity.distributed import hide_bar
from sparsity.errors import UserError
from sparsity.pattern import Pattern
from sparsity.pts.recipe import score_mask, wanda
from sparsity.pts.structure import choose_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEQUENCES = 4  # of the calibration set, spread over its sources; each is run on its own


def choose_dense(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    pattern: Pattern,
    ignore: list[str],
    fraction: float,
    device: torch.device,
) -> list[str]:
    """The names of linear layers to keep dense, costliest per weight first; the same on every process.

    Args:
        model: dense, on the CPU; all of it runs forward and backward on `device`.
        batches: {"input_ids": int64 [sequences, length]}, the whole calibration set.
        ignore: globs of layers that stay dense in any case and do not count.
        fraction: of the weights to prune that may stay dense. Experts stored as one tensor count but are always pruned.
    """
    chosen, _ = choose_weights(model, pattern, ignore)
    linears = {name: module for name, module in model.named_modules() if name in chosen}
    total = sum(p.numel() for n, p in model.named_parameters() if n in chosen or n.removesuffix(".weight") in linears)
    kept, room = [], fraction * total
    least = min((linear.weight.numel() for linear in linears.values()), default=total)
    if least > room:
        raise UserError(f"--keep_dense {fraction} keeps nothing; the smallest layer has a share of {least / total:.2g}")
    firsts = [batch["input_ids"][:1] for batch in batches]
    costs = pruning_costs(model.to(device), firsts[:: -(-len(firsts) // SEQUENCES)], linears, pattern)
    model.to("cpu")
    for name in sorted(linears, key=lambda name: costs[name] / linears[name].weight.numel(), reverse=True):
        if (size := linears[name].weight.numel()) <= room:
            kept.append(name)
            room -= size
    return broadcast_object_list([kept])[0]  # rounding may differ from GPU to GPU


def pruning_costs(
    model: PreTrainedModel, sequences: list[Tensor], linears: dict[str, nn.Module], pattern: Pattern
) -> dict[str, float]:
    """By how much pruning each linear layer alone raises the KL divergence from the dense model, to second order.

    That is ½ Σ (g · ΔW x)² over tokens, where ΔW is what Wanda prunes, x the layer's input and g the gradient, at its
    output, of the log-likelihood of a token drawn from the model's prediction (Fisher information; Martens 2020,
    section 9).

    Args:
        sequences: token ids, int64 [1, length] each.
    """
    costs = dict.fromkeys(linears, 0.0)
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            calls[name] = args[0].detach(), output

        return hook

    model.requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(0)
    with ExitStack() as hooks, torch.enable_grad():
        start = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        hooks.callback(start.remove)
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(note(name)).remove)
        for ids in tqdm(sequences, "choosing what stays dense", unit="sequence", leave=False, disable=hide_bar()):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            functional.cross_entropy(logits, drawn, reduction="sum").backward()
            for name, (inputs, output) in calls.items():
                if output.grad is None:  # what it computed reached no logit
                    continue
                weight, x = linears[name].get_parameter("weight").float(), inputs.flatten(0, -2).float()
                pruned = weight.masked_fill(score_mask(wanda(weight, x.square().mean(0).sqrt()), pattern), 0)
                costs[name] += 0.5 * (output.grad.flatten(0, -2) * (x @ pruned.t())).sum(-1).square().sum().item()
            calls.clear()
    return costs
