"""Writing the modelopt state of a pruning run, and proving that it restores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsity.attention import use_blocked_attention
from sparsity.errors import UserError
from sparsity.files import atomic_path
from sparsity.modelopt_state import (
    CONFIG,
    PATTERN,
    load_state,
    mask_name,
    pruned_errors,
    restore_sparse,
    sparse_masks,
    state_to_save,
)
from sparsity.models import computing_fields
from sparsity.pattern import Pattern
from sparsity.pts.experts import one_by_one
from sparsity.pts.recipe import METHODS, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 64
ROUNDINGS = 16  # by which logits may differ: products of some models depend on where their factors lie in memory


def save_state(model: PreTrainedModel, masks: dict[str, Tensor], path: Path, recipe: Recipe) -> None:
    """Attach the masks as modelopt's sparse mode keeps them and write the state that mto.restore() reads to `path`."""
    import modelopt.torch.opt as mto
    from modelopt.torch.opt.conversion import apply_mode
    from modelopt.torch.sparsity.weight_sparsity.mode import SparsityModeRegistry

    # A rule of None leaves a layer dense; restore() would otherwise expect a mask for it.
    dense = {
        name: None for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in masks
    }
    rules = {"nn.Linear": {"*": {}, "*lm_head*": None, **dense}, "nn.Conv2d": {"*": None}}
    model = apply_mode(model, [(METHODS[recipe.method].mode, rules)], registry=SparsityModeRegistry)
    stacked = {mask_name(name): mask for name, mask in masks.items() if mask.dim() > 2}  # of experts
    for name, mask in masks.items():
        if mask.dim() == 2:
            model.get_submodule(name).set_mask(mask)
    modelopt_state = mto.modelopt_state(model)
    own = {PATTERN: str(recipe.pattern), CONFIG: computing_fields(model.config)}
    modelopt_state["modelopt_state_dict"][-1][1]["metadata"].update(own)
    torch.save(state_to_save(modelopt_state, {**model.state_dict(), **stacked}), path)


def logits_of(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] without a cache, by the attention that pruning uses."""
    use_blocked_attention(model, model.device)
    with one_by_one(model), torch.inference_mode():
        return model(input_ids=input_ids, use_cache=False).logits


def verify(model: PreTrainedModel, path: Path, pattern: Pattern, input_ids: Tensor, expected: Tensor) -> None:
    """Restore the file into `model`, freshly loaded and dense, and compare it with what was pruned.

    Args:
        input_ids: [batch, length]; the pruned model gave the logits `expected` [batch, length, vocabulary] for it.

    Raises:
        UserError: logits differ, a mask breaks the pattern or a pruned weight is not 0.
    """
    model = restore_sparse(model, path)
    logits = logits_of(model, input_ids)
    difference = (logits - expected).abs().max()
    if difference > ROUNDINGS * torch.finfo(expected.dtype).eps * expected.abs().max():
        raise UserError(f"{path} does not restore to the pruned model: logits differ by {difference:.3g}")
    for name, weight, mask in sparse_masks(load_state(path)["model_state_dict"]):
        layouts = (mask, mask.transpose(-1, -2)) if mask.dim() > 2 else (mask,)
        if pattern.m and not any((each.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all() for each in layouts):
            raise UserError(f"{path}: the mask of {name} is not {pattern}")
        if pruned_errors(weight, mask):
            raise UserError(f"{path}: {name} has pruned weights that are not 0")


def write_verified_state(
    model: PreTrainedModel,
    masks: dict[str, Tensor],
    path: Path,
    recipe: Recipe,
    batches: list[dict[str, Tensor]],
    load_dense: Callable[[], PreTrainedModel],
) -> None:
    """Write the state of a pruned model, which replaces an earlier one only if it restores to the same model.

    Args:
        model: pruned; its memory is given up afterwards.  batches: the calibration set, if any.
        load_dense: loads the dense model that the state is restored into.

    Raises:
        UserError: the logits are not finite, or the state does not restore to the pruned model.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tokens = batches[0]["input_ids"][:1] if batches else torch.arange(PROBE_TOKENS)[None] % vocabulary
    probe = tokens[:, :PROBE_TOKENS]
    expected = logits_of(model, probe)
    if not torch.isfinite(expected).all():
        dtype = str(model.dtype).removeprefix("torch.")
        advice = "; try --dtype bf16 or fp32" if dtype == "float16" else ""
        raise UserError(f"the pruned model's logits are not finite in {dtype}{advice}")
    with atomic_path(path) as temporary:
        save_state(model, masks, temporary, recipe)
        model.to("meta")  # the restored one takes its memory
        verify(load_dense(), temporary, recipe.pattern, probe, expected)
