"""Writing a sparse model as safetensors shards with the masks folded in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsity.errors import UserError, first_line
from sparsity.files import save_json
from sparsity.modelopt_state import folded, mask_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of parameters that share another one's tensor, which a checkpoint leaves out (e.g. a tied lm_head)."""
    first: dict[int, str] = {}
    names = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            names.add(name)
    return names


def exported(state: dict[str, torch.Tensor], name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """Tensor `name` as it is written: its mask folded in, floats cast to `dtype`, and no -0.0 in a pruned matrix."""
    tensor = folded(state, name)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if mask_name(name) in state:
        tensor = tensor + 0.0  # IEEE 754: -0.0 + 0.0 is +0.0, and nothing else changes
    return tensor.contiguous()


def in_checkpoint_format(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names and in the shapes that checkpoints of this model have on disk.

    They differ from those in memory where transformers 5 fuses weights on loading, as it does the experts of a mixture.

    Raises:
        UserError: weights that are stored fused are in different shards.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 loads weights as they are
        return tensors
    try:
        converted = revert_weight_conversion(model, dict(tensors))
    except Exception as error:  # of many kinds, one per conversion
        reason = first_line(error)
        raise UserError(
            f"cannot restore the checkpoint's own format ({reason}); try a larger --max_shard_size"
        ) from error
    # What a conversion cuts out of one tensor shares its memory, which safetensors refuses to store.
    return {name: tensor if name in tensors else tensor.contiguous().clone() for name, tensor in converted.items()}


def write_weights(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    names: list[str],
    dtype: torch.dtype | None,
    shard_size: str,
    folder: Path,
) -> None:
    """Write safetensors shards and, if there are several, their index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm

    def planned(tensor: torch.Tensor) -> torch.Tensor:
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=cast, device="meta")

    try:
        plan = split_torch_state_dict_into_shards(
            {name: planned(state[name]) for name in names}, max_shard_size=shard_size
        )
    except ValueError as error:
        raise UserError(f"--max_shard_size {shard_size} is not a size; write e.g. 5GB or 500MB") from error
    weight_map: dict[str, str] = {}
    for file, members in tqdm(plan.filename_to_tensors.items(), desc="shards", disable=None):
        shard = in_checkpoint_format(model, {name: exported(state, name, dtype) for name in members})
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": weight_map}
        save_json(index, folder / "model.safetensors.index.json")
