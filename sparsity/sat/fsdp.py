"""Sharded training with FSDP2 through accelerate: setup, loading without a whole copy per process, gathering.

FSDP2 (torch's fully_shard) turns the parameters into DTensors under their own names; a mask becomes a DTensor that is
sharded like its weight. A model is built without memory for its weights and sharded; only then are the shards filled.
A state file is mapped into memory, where all processes of a machine share its pages, and each process reads its own
rows from there. Weights that only the main process has are sent one tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sparsity.modelopt_state import is_mask, mask_name, sparse_masks, weight_name
from sparsity.models import shared_names
from sparsity.sat.low_rank import LowRankLinear, mark_pruned

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

# ------------------------------------------------------------------------------------------------------------ setup


def configure_fsdp(layer_class: str, cpu_offload: bool, activation_checkpointing: bool, reshard: bool = True) -> None:
    """Configure FSDP2 through the environment variables of accelerate's launcher. Call before building the Trainer."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP=layer_class,
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_RESHARD_AFTER_FORWARD=str(reshard).lower(),
        FSDP_OFFLOAD_PARAMS=str(cpu_offload).lower(),
        FSDP_ACTIVATION_CHECKPOINTING=str(activation_checkpointing).lower(),
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )


def force_fsdp(accelerator: Accelerator) -> None:
    """Make accelerate shard on CPU processes too.

    accelerate 1.15 checks ACCELERATE_USE_FSDP only with accelerators and silently falls back to DDP on CPUs. Its FSDP
    path works over gloo once the state says FSDP, so that sharded runs can be tested without GPUs.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def shard_teacher(
    teacher: PreTrainedModel, layer_class: str, dtype: torch.dtype, mesh: DeviceMesh | None = None
) -> PreTrainedModel:
    """Shard the frozen teacher like the student: each decoder layer, the embeddings and the head; computes in `dtype`.

    Args:
        mesh: one-dimensional; by default all processes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    for module in teacher.modules():
        if type(module).__name__ == layer_class:
            fully_shard(module, **options)
    ends = [teacher.get_input_embeddings(), teacher.get_output_embeddings()]
    if ends[1] is not None and ends[0].weight is not ends[1].weight:
        for module in ends:
            fully_shard(module, **options)
    # By default the outermost unit would stay gathered from one step to the next.
    fully_shard(teacher, reshard_after_forward=True, **options)  # in place
    return teacher


# ----------------------------------------------------------------------------------------------------------- shards


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    """The name of a parameter or module without the wrappers of activation checkpointing.

    >>> plain_name("layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    return name.replace("_checkpoint_wrapped_module.", "").lstrip(".")


def rows_of(whole: torch.Tensor, sharded: DTensor) -> torch.Tensor:
    """This process's rows of `whole`, which has the shape of the DTensor `sharded`; a view."""
    rank, chunks = sharded.device_mesh.get_local_rank(), whole.chunk(sharded.device_mesh.size())
    return chunks[rank] if rank < len(chunks) else whole[:0]  # with few rows, the last processes have none


def shard_mask(mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A whole bool mask sharded like `weight` if that is a DTensor, else whole; on the weight's device."""
    if not isinstance(weight, DTensor):
        return mask.to(weight.device, torch.bool, copy=True)
    rows = rows_of(mask, weight).to(weight.to_local().device, torch.bool, copy=True)
    placed = (weight.device_mesh, weight.placements)
    return DTensor.from_local(rows, *placed, run_check=False, shape=mask.shape, stride=mask.stride())


def masked_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, parameter, bool mask) for every pruned weight; the mask is this process's shard."""
    for name, module in model.named_modules():
        for buffer, mask in module._buffers.items():
            if is_mask(buffer) and mask is not None:
                weight = weight_name(buffer)
                yield plain_name(f"{name}.{weight}"), module._parameters[weight], local(mask)


# ---------------------------------------------------------------------------------------------- loading and gathering


def allocate(model: nn.Module) -> None:
    """Replace parameters on the meta device by uninitialized ones on the CPU; shared ones stay shared.

    The system provides memory for them only when they are written. Until then they are mere addresses, by which
    accelerate recognizes an optimizer's parameters after sharding.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                if weight not in made:
                    made[weight] = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
                module._parameters[name] = made[weight]


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy whole `tensors`, by their names in the unwrapped model, into parameters and buffers, sharded or not.

    Each process reads only its own part of a sharded tensor, cast to the parameter's dtype. Masks, which are on the
    meta device, are replaced by ones that are sharded like their weights. Weights of low-rank layers carry theirs.
    """
    for path, module in model.named_modules():
        for name, own in [*module._parameters.items(), *module._buffers.items()]:
            whole = tensors.get(plain_name(f"{path}.{name}"))
            if whole is None or own is None:
                continue
            if is_mask(name):
                module._buffers[name] = shard_mask(whole, module._parameters[weight_name(name)])
            elif isinstance(own, DTensor):
                own.to_local().copy_(rows_of(whole, own))
            else:
                own.data.copy_(whole)
        if isinstance(module, LowRankLinear):
            mask = tensors[mask_name(plain_name(f"{path}.weight"))]
            mark_pruned(local(module.weight.data), local(shard_mask(mask, module.weight)))


def send_from_main(model: nn.Module, weights: dict[str, Any]) -> None:
    """Fill a sharded model with `weights`, which only the main process needs to have, one tensor at a time."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several → the first name."""
    return {plain_name(name): plain_name(first) for name, first in shared_names(model).items()}


def model_state(model: nn.Module, trained_only: bool = False, whole: bool = False) -> dict[str, Any]:
    """Weights and masks by name, sharded as they are, and tied weights only under their first name.

    Args:
        trained_only: leave out frozen weights.
        whole: gather the shards on the CPU of the main process; the others may get nothing.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole, ignore_frozen_params=trained_only)
    state = get_model_state_dict(model, options=options)
    for name in tied_names(model):
        state.pop(name, None)
    return state


def full_state(model: nn.Module, dtypes: dict[str, torch.dtype], trained_only: bool) -> dict[str, torch.Tensor]:
    """Whole weights and masks on the CPU of the main process (elsewhere possibly empty), pruned weights exactly +0.0.

    All processes must call it. Weights are cast to `dtypes`, the dtypes of the restored state.
    """
    gathered = model_state(model, trained_only, whole=torch.distributed.is_initialized())
    state: dict[str, torch.Tensor] = {}
    for name in list(gathered):
        tensor = gathered.pop(name)  # frees what was gathered for it
        state[name] = tensor.detach().to("cpu", dtypes.get(name, tensor.dtype), copy=True)
    state |= {name: state[first] for name, first in tied_names(model).items() if first in state}
    for _, weight, mask in sparse_masks(state):
        # masked_fill_ writes +0.0 where a product with the mask would leave -0.0 for negative weights
        weight.masked_fill_(~mask, 0.0)
    return state
