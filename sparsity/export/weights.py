"""Writing a sparse model as safetensors shards with the masks folded in."""

from __future__ import annotations

from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsity.errors import UserError, reported_as
from sparsity.files import open_safetensors, save_json
from sparsity.modelopt_state import folded, is_mask, mask_name
from sparsity.models import shared_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def exported(state: dict[str, torch.Tensor], name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """Tensor `name` as it is written: its mask folded in, floats cast to `dtype`, and no -0.0 in a pruned matrix."""
    tensor = folded(state, name)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if mask_name(name) in state:
        tensor = tensor + 0.0  # IEEE 754: -0.0 + 0.0 is +0.0, and nothing else changes
    return tensor.contiguous()


def in_checkpoint_format(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor], stored: Container[str] = ()
) -> dict[str, torch.Tensor]:
    """Tensors under the names and in the shapes that checkpoints of this model have on disk.

    They differ from those in memory where transformers 5 fuses weights on loading, as it does the experts of a mixture.

    Args:
        stored: names in the source, which have the model's own prefix where it is part of a larger one (Llama 4).

    Raises:
        UserError: weights that are stored fused are in different shards.
    """
    converted = dict(tensors)
    with suppress(ImportError):  # transformers 4 loads weights as they are
        from transformers.core_model_loading import revert_weight_conversion

        # Errors of many kinds, one per conversion.
        with reported_as("cannot restore the checkpoint's own format; try a larger --max_shard_size", Exception):
            converted = revert_weight_conversion(model, converted)
    # What a conversion cuts out of one tensor shares its memory, which safetensors refuses to store.
    converted = {name: tensor if name in tensors else tensor.contiguous().clone() for name, tensor in converted.items()}
    prefixed = {name: f"{model.base_model_prefix}.{name}" for name in converted if name not in stored}
    return {prefixed[name] if prefixed.get(name) in stored else name: tensor for name, tensor in converted.items()}


def other_parts(model: PreTrainedModel, stored: Iterable[str]) -> set[str]:
    """Compare the names that `in_checkpoint_format` gives the tensors of `model` with those of its source.

    Args:
        model: loaded from the source, which tells how names are converted; may be on the meta device.
        stored: names in the source; none if they are unknown.

    Returns:
        names in the source that belong to none of the model's tensors: to a vision tower, say.

    Raises:
        UserError: `model` has a tensor that the source does not have.
    """
    stored, tied = set(stored), shared_names(model)  # of tied tensors checkpoints store one, whichever
    own = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    untied = {name: tensor for name, tensor in own.items() if name not in {*tied, *tied.values()}}
    unknown = _without_prefix(model, in_checkpoint_format(model, untied, stored)) - _without_prefix(model, stored)
    if stored and unknown:
        raise UserError(
            f"'{model.name_or_path}' has no tensor '{min(unknown)}', which the export would write: the exported folder "
            "would not open as its config.json says; this kind of checkpoint is not supported"
        )
    return stored - in_checkpoint_format(model, own, stored).keys()


def _without_prefix(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Names without the model's own prefix, which checkpoints of a bare decoder lack."""
    return {name.removeprefix(f"{model.base_model_prefix}.") for name in names}


def write_weights(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    shard_size: str,
    folder: Path,
    stored: dict[str, Path],
    others: set[str],
) -> None:
    """Write safetensors shards and, if there are several, their index.

    Args:
        stored: names in the source, with the safetensors file that holds each.
        others: those of them that are copied as they are.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm

    tied = shared_names(model)
    copied: dict[str, torch.Tensor] = {}
    for name in others:
        with open_safetensors(stored[name]) as tensors:
            copied[name] = tensors.get_tensor(name)  # mapped, not read
    planned = {name: tensor.to("meta") for name, tensor in copied.items()}
    for name in [name for name in state if not is_mask(name) and name not in tied]:
        cast = dtype if state[name].is_floating_point() else None
        planned[name] = torch.empty_like(state[name], dtype=cast, device="meta")
    with reported_as(f"--max_shard_size {shard_size} is not a size; write e.g. 5GB or 500MB", ValueError):
        plan = split_torch_state_dict_into_shards(planned, max_shard_size=shard_size)
    weight_map: dict[str, str] = {}
    for file, members in tqdm(plan.filename_to_tensors.items(), desc="shards", disable=None):
        own = {name: exported(state, name, dtype) for name in members if name not in others}
        shard = in_checkpoint_format(model, own, stored) | {name: copied[name] for name in members if name in others}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        del shard, own
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": weight_map}
        save_json(index, folder / "model.safetensors.index.json")
