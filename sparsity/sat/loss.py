"""Losses of sparsity-aware training: next-token cross entropy, and distillation from the dense model.

The logits loss is the Kullback-Leibler divergence from teacher to student (Hinton, Vinyals and Dean 2015). The hidden
loss follows SquareHead (Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models"):
the squared error of each layer's output, divided by the teacher's squared norm so that every layer counts alike. We
divide token by token, because the first token of a Llama has a norm hundreds of times that of the others.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from sparsity.errors import UserError
from sparsity.sat.batching import IGNORE, Collator

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LossWeights:
    """Weights in (1 - kl) · cross entropy + kl · T² · KL divergence at temperature T + hidden · SquareHead."""

    kl: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        return self.kl > 0 or self.hidden > 0


def model_inputs(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a batch that this model's forward takes."""
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in accepted]
    inputs = {name: batch[name] for name in names}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 4 and model.config._attn_implementation != "sdpa":
        if "flash" in model.config._attn_implementation:
            del inputs["attention_mask"]  # flash attention reads the samples' bounds from position_ids
        else:  # eager attention adds its mask to the scores
            inputs["attention_mask"] = torch.zeros(mask.shape, device=mask.device).masked_fill(
                ~mask, torch.finfo(torch.float32).min
            )
    return inputs


def label_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where a loss is taken.

    Args:
        labels: int64 [B, T], IGNORE where none is.

    Returns:
        Positions [K] whose logits any row needs; which of them each row needs, bool [B, K]; and the targets [N].
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORE
    columns = wanted.any(0).nonzero().squeeze(1)
    selected = wanted[:, columns]
    return columns, selected, targets[:, columns][selected]


def forward(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    columns: torch.Tensor,
    hidden: bool,
    unwrapped: PreTrainedModel | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run a model for the logits at `columns` only, which spares the largest activation of small models.

    Returns:
        Logits [B, K, V] and, if `hidden`, the outputs of all decoder layers, each [B, T, H], else an empty tuple.
    """
    inner = model if unwrapped is None else unwrapped
    inputs = model_inputs(inner, batch)
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
    if keeps:
        inputs["logits_to_keep"] = columns
    output = model(**inputs, use_cache=False, output_hidden_states=hidden)
    logits = output.logits if keeps else output.logits[:, columns]
    return logits, tuple(output.hidden_states[1:]) if hidden else ()


def check_packing(model: PreTrainedModel, collate: Collator, vocabulary: int) -> None:
    """Run two short samples packed and apart.

    Raises:
        UserError: the packed ones see each other, because this model does not take a mask for each row.
    """
    ids = torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(0)).tolist()
    nothing = [IGNORE] * 8
    with torch.no_grad():
        packed = collate([{"input_ids": ids, "labels": [nothing] * 2, "record": [0, 1]}])
        alone = collate([{"input_ids": ids[1], "labels": nothing, "record": 1}])
        try:
            together = model(**model_inputs(model, packed)).logits[0, 8:16]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{type(model).__name__} does not take packed rows ({error}); drop --packing") from error
        apart = model(**model_inputs(model, alone)).logits[0, :8]
    if not torch.allclose(together, apart, atol=1e-2 * apart.abs().max().item()):
        raise UserError(f"{type(model).__name__} lets packed samples see each other; train without --packing")


def hidden_error(
    student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...], real: torch.Tensor
) -> torch.Tensor:
    """Mean over layers and real tokens (bool [B, T]) of |student - teacher|² / |teacher|²; a scalar."""
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = ours[real].float(), theirs[real].float()
        error = (ours - theirs).pow(2).sum(-1) / theirs.pow(2).sum(-1).clamp_min(1e-6)
        terms.append(error.mean())
    return torch.stack(terms).mean()


def batch_loss(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    total: torch.Tensor | int,
    weights: LossWeights,
    teacher: nn.Module | None = None,
    unwrapped: PreTrainedModel | None = None,
) -> torch.Tensor:
    """Loss of a micro-batch that sums to the mean over `total` labelled tokens when micro-batches are added up."""
    columns, selected, targets = label_positions(batch["labels"])
    use_hidden = weights.hidden > 0 and teacher is not None
    logits, states = forward(model, batch, columns, use_hidden, unwrapped)
    logits = logits[selected].float()
    loss = logits.new_zeros(())
    if teacher is None or weights.kl < 1:
        cross_entropy = functional.cross_entropy(logits, targets, reduction="sum")
        loss = cross_entropy * (1 - weights.kl if teacher is not None else 1)
    if teacher is not None:
        with torch.no_grad():
            teacher_logits, teacher_states = forward(teacher, batch, columns, use_hidden)
            teacher_logits = teacher_logits[selected].float()
        if weights.kl > 0:
            temperature = weights.temperature
            ours = functional.log_softmax(logits / temperature, dim=-1)
            theirs = functional.log_softmax(teacher_logits / temperature, dim=-1)
            divergence = functional.kl_div(ours, theirs, log_target=True, reduction="sum")
            loss = loss + weights.kl * temperature**2 * divergence
        if use_hidden:
            real = batch["real"]
            loss = loss + weights.hidden * len(targets) * hidden_error(states, teacher_states, real)
    return loss / total
