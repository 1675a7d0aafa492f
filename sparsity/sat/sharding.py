"""Sharded training with FSDP through accelerate, and what modelopt's masks need when weights are sharded.

FSDP2 (torch's fully_shard) turns the parameters into DTensors under their own names; a mask becomes a DTensor that is
sharded like its weight. FSDP1 joins the parameters of a decoder layer into one flat tensor, of which every process
holds a range; its masks stay whole buffers on every process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsity.modelopt_state import MASK, sparse_masks

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel


def configure_fsdp(version: int, layer_class: str, cpu_offload: bool, activation_checkpointing: bool) -> None:
    """Tell accelerate, by the variables that its own launcher sets, to shard with FSDP. Call before the Trainer."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION=str(version),
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP=layer_class,
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_RESHARD_AFTER_FORWARD="true" if version == 2 else "FULL_SHARD",
        FSDP_USE_ORIG_PARAMS="true",  # FSDP1: the optimizer, our masks and our checks see each weight under its name
        FSDP_OFFLOAD_PARAMS=str(cpu_offload).lower(),
        FSDP_ACTIVATION_CHECKPOINTING=str(activation_checkpointing).lower(),
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )


def force_fsdp(accelerator: Accelerator) -> None:
    """Make accelerate shard on CPU processes too.

    accelerate 1.15 looks at ACCELERATE_USE_FSDP only for accelerators and quietly falls back to DDP on CPU processes.
    Its FSDP path itself works over gloo once the state says FSDP, so that the sharded run can be tested without GPUs.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    if plugin.fsdp_version == 1:
        # accelerate gathers states on the CPU. torch frees what was gathered elsewhere, even if it was there already.
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        FlatParamHandle.to_cpu = lambda handle: contextlib.nullcontext()  # type: ignore[assignment,method-assign,return-value]
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.device.type == "cpu":
        # FSDP1 does not accept the index in accelerate's "cpu:0".
        accelerator.state.device = PartialState._shared_state["device"] = torch.device("cpu")


def assert_sharded(model: nn.Module) -> int:
    """Number of sharded parameters.

    Raises:
        RuntimeError: some parameter is not sharded: FSDP was asked for but is not active.
    """
    from torch.distributed.tensor import DTensor

    parameters = dict(model.named_parameters())
    flat = {id(module._parameters[name]) for module, name, _, _ in local_flat_ranges(model)}
    whole = [name for name, weight in parameters.items() if not isinstance(weight, DTensor) and id(weight) not in flat]
    if whole:
        raise RuntimeError(f"FSDP was asked for, but {len(whole)} parameters are not sharded, the first is {whole[0]}")
    return len(parameters)


def shard_teacher(
    teacher: PreTrainedModel, layer_class: str, dtype: torch.dtype, cpu_offload: bool, mesh: DeviceMesh | None = None
) -> PreTrainedModel:
    """Shard the frozen teacher like the student, each decoder layer, the embeddings and the head; computes in `dtype`.

    Args:
        mesh: of one dimension; by default all processes.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy(),
    }
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


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_flat_ranges(model: nn.Module) -> Iterator[tuple[nn.Module, str, int, int]]:
    """For every parameter under FSDP1: (module, name in it, start, end) of this process's range of its flat values.

    A parameter that is entirely on other processes has start = end. FSDP1 has no public interface for this.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    for unit in FullyShardedDataParallel.fsdp_modules(model):
        flat = unit._handle.flat_param if unit._handle else None
        if flat is None:
            continue
        for (name, module, _), info in zip(flat._param_infos, flat._shard_param_infos, strict=True):
            first, last = info.intra_param_start_idx, info.intra_param_end_idx
            yield module, name, *((0, 0) if first is None or last is None else (first, last + 1))
        for name, module, *_ in flat._shared_param_infos:  # tied to one of those above
            yield module, name, 0, 0


def plain_name(name: str) -> str:
    """The name of a parameter or module before FSDP and activation checkpointing wrapped the layers.

    >>> plain_name("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "").lstrip(".")


def rows_of(whole: torch.Tensor, sharded: DTensor) -> torch.Tensor:
    """The part of `whole` that this process holds of `sharded`, a DTensor of the same shape; a view."""
    from torch.distributed.tensor import Shard

    part = whole
    for dimension, placement in enumerate(sharded.placements):
        if isinstance(placement, Shard):
            rank, size = sharded.device_mesh.get_local_rank(dimension), sharded.device_mesh.size(dimension)
            chunks = part.chunk(size, placement.dim)  # of few rows, the last processes have none
            part = chunks[rank] if rank < len(chunks) else part.narrow(placement.dim, 0, 0)
    return part


def shard_mask(mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The part of a whole bool mask that this process needs for `weight`, on the device of its shard.

    A DTensor where the weight is one; otherwise the whole mask.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        return mask.to(weight.device, torch.bool, copy=True)
    rows = rows_of(mask, weight).to(weight.to_local().device, torch.bool, copy=True)
    placed = (weight.device_mesh, weight.placements)
    return DTensor.from_local(rows, *placed, run_check=False, shape=mask.shape, stride=mask.stride())


def masked_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, parameter, bool mask), the mask as this process's shard, for every pruned layer.

    The parameter is read past modelopt's dynamic attribute, which would return the masked product instead.
    """
    ranges = {(id(module), name): slice(start, end) for module, name, start, end in local_flat_ranges(model)}
    for name, module in model.named_modules():
        mask = module._buffers.get(MASK)
        if mask is None:
            continue
        if (id(module), "weight") in ranges:
            mask = mask.flatten()[ranges[id(module), "weight"]]
        yield plain_name(f"{name}.weight"), module._parameters["weight"], local(mask)


def full_state(accelerator: Accelerator, model: nn.Module, dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Whole weights and masks on the CPU of the main process (elsewhere possibly empty), pruned weights exactly +0.0.

    All processes must call it. Weights are cast to `dtypes`, the types they had in the restored state.
    """
    gathered = accelerator.get_state_dict(model)  # tensor by tensor, kept on the main process only
    state: dict[str, torch.Tensor] = {}
    copies: dict[tuple, torch.Tensor] = {}  # tied weights stay one tensor, stored once
    for name in list(gathered):
        tensor = gathered.pop(name)  # frees what was gathered for it
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", dtypes.get(name, tensor.dtype), copy=True)
        state[name] = copies[key]
    for _, weight, mask in sparse_masks(state):
        # masked_fill_ writes +0.0 where a product with the mask would leave -0.0 for negative weights
        weight.masked_fill_(~mask, 0.0)
    return state
