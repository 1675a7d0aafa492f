"""Losses of sparsity-aware training: next-token cross entropy, and distillation from the dense model.

The distillation loss is the Kullback-Leibler divergence from teacher to student (Hinton, Vinyals and Dean 2015).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from sparsity.errors import UserError
from sparsity.sat.data import IGNORE, Collator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GPU_CHUNK, CPU_CHUNK = 2**25, 2**20  # logits in one piece of the loss; on a CPU they stay in its cache


# ----------------------------------------------------------------------------------------------------- forward passes


def model_inputs(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a batch that this model's forward takes."""
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in accepted]
    inputs = {name: batch[name] for name in names}
    mask, attention = inputs.get("attention_mask"), model.config._attn_implementation
    if mask is not None and mask.dim() == 4 and "flash" in attention:
        del inputs["attention_mask"]  # flash attention reads the samples' bounds from position_ids
    elif mask is not None and mask.dim() == 4 and attention == "eager":  # which adds its mask to the scores
        hidden = torch.finfo(torch.float32).min
        inputs["attention_mask"] = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, hidden)
    return inputs


def token_targets(
    batch: dict[str, torch.Tensor], kl: tuple[float, float]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Positions [K] at which any row predicts a labelled token, and the N labelled tokens in logits [B, K, V] of these.

    The latter are rows of the flattened logits, target ids, and weights of the KL divergence; each [N].
    """
    labelled = batch["labels"][:, 1:] != IGNORE
    columns = labelled.any(0).nonzero().squeeze(1)
    labelled = labelled[:, columns]
    ids, plain = (batch[name][:, 1:][:, columns][labelled] for name in ("labels", "plain"))
    return columns, (labelled.flatten().nonzero().squeeze(1), ids, torch.where(plain, *kl))


def logits_at(
    model: nn.Module, batch: dict[str, torch.Tensor], columns: torch.Tensor, unwrapped: PreTrainedModel | None = None
) -> torch.Tensor:
    """Logits [B, K, V] at `columns` only: logits of all tokens are the largest activation of small models."""
    inner = model if unwrapped is None else unwrapped
    inputs = model_inputs(inner, batch)
    selects = "logits_to_keep" in inspect.signature(inner.forward).parameters
    if selects:
        inputs["logits_to_keep"] = columns
    logits = model(**inputs, use_cache=False).logits
    return logits if selects else logits[:, columns]


def check_packing(
    model: PreTrainedModel, collate: Collator, vocabulary: int, dtype: torch.dtype = torch.float32
) -> None:
    """Check that packed samples do not see each other, by a short sample behind each of two others and alone.

    Args:
        dtype: the compute dtype, where parts of the model are more precise.

    Raises:
        UserError: the model does not take a mask and positions for each row.
    """
    ids = torch.randint(vocabulary, (3, 8), generator=torch.Generator().manual_seed(0)).tolist()
    unlabelled = [IGNORE] * 8

    def behind(first: list[int]) -> torch.Tensor:
        row = {"input_ids": [first, ids[2]], "labels": [unlabelled] * 2, "record": [0, 1], "plain": [False] * 2}
        return model(**model_inputs(model, collate([row]))).logits[0, 8:16].float()

    with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        try:
            one, other = behind(ids[0]), behind(ids[1])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{type(model).__name__} does not take packed rows ({error}); drop --packing") from error
        row = {"input_ids": ids[2], "labels": unlabelled, "record": 1, "plain": False}
        alone = model(**model_inputs(model, collate([row]))).logits[0, :8].float()
    # Rows of one shape are rounded alike; of another shape a pruned model in 16 bits is rounded 3% apart.
    rounding = 1e-2 if dtype == torch.float32 else 0.1
    if (one - other).norm() > 1e-3 * one.norm() or (one - alone).norm() > rounding * alone.norm():
        raise UserError(f"{type(model).__name__} lets packed samples see each other; train without --packing")


# --------------------------------------------------------------------------------------------------------------- loss


class TokenLoss(torch.autograd.Function):
    """Σ (1 - kl) · cross entropy + kl · KL(teacher ‖ student) over labelled tokens, a few rows of logits at a time.

    The gradient for the logits is written while the loss is computed: q - (1 - kl) · onehot - kl · p, with the
    student's distribution q and the teacher's p (Hinton, Vinyals and Dean 2015, section 2). So no more than two
    tensors of the size of the logits exist, in their own dtype, where autograd would keep five in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, teacher_logits: torch.Tensor | None, tokens: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Args: logits [B, K, V] of the student, and of the teacher, and `token_targets`; returns a float32 scalar."""
        flat, theirs = logits.flatten(0, 1), None if teacher_logits is None else teacher_logits.flatten(0, 1)
        gradient = None
        if ctx.needs_input_grad[0]:
            # float16 would lose small probabilities before the loss is scaled
            dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
            new = torch.empty_like if len(tokens[0]) == len(flat) else torch.zeros_like
            gradient = new(flat, dtype=dtype)
        loss = torch.zeros((), device=logits.device)
        size = max(1, (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // logits.shape[-1])
        for rows, ids, kl in zip(*(values.split(size) for values in tokens), strict=True):
            teacher = None if theirs is None else theirs[rows].float()
            value, slope = _rows_loss(flat[rows].float(), teacher, ids[:, None], kl)
            loss += value
            if gradient is not None:
                gradient[rows] = slope.to(gradient.dtype)
        ctx.gradient = None if gradient is None else gradient.view(logits.shape)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, so it serves once
        return gradient.mul_(outputs[0].to(gradient.dtype)), None, None


def _rows_loss(
    logits: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor, kl: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of some rows of logits [N, V], float32, with targets [N, 1], and its gradient for them."""
    ours, ce = functional.log_softmax(logits, dim=-1), 1 - kl[:, None]
    loss = -(ce * ours.gather(1, targets)).sum()
    if teacher is None:
        return loss, ours.exp_().scatter_add_(1, targets, -ce)
    theirs = functional.log_softmax(teacher, dim=-1)
    p = theirs.exp()
    loss += (kl * torch.linalg.vecdot(p, theirs.sub_(ours))).sum()
    slope = ours.exp_().addcmul_(p, kl[:, None], value=-1)
    return loss, slope.scatter_add_(1, targets, -ce)


def batch_loss(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    total: torch.Tensor | int,
    teacher: nn.Module | None = None,
    kl: tuple[float, float] = (1.0, 1.0),
    unwrapped: PreTrainedModel | None = None,
) -> torch.Tensor:
    """Loss of a micro-batch that sums to the mean over `total` labelled tokens when micro-batches are added up.

    Args:
        kl: with a teacher, weight of the KL divergence on plain text and on answers; cross entropy has the rest.
    """
    columns, targets = token_targets(batch, (0.0, 0.0) if teacher is None else kl)
    logits = logits_at(model, batch, columns, unwrapped)
    teacher_logits = None
    if teacher is not None:
        with torch.no_grad():
            teacher_logits = logits_at(teacher, batch, columns)
    return TokenLoss.apply(logits, teacher_logits, targets) / total
