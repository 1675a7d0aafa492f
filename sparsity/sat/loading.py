"""Loading weights without a copy of the model in every process.

A model is built without memory for its weights and sharded; only then are the shards filled. A state file is mapped
into memory, where all processes of a machine share its pages, and each process reads its own rows from there. Weights
that only the main process has are sent tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sparsity.sat.low_rank import LowRankLinear, mark_pruned
from sparsity.sat.sharding import local, local_flat_ranges, plain_name, rows_of, shard_mask
from sparsity.modelopt_state import MASK, mask_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def allocate(model: nn.Module) -> None:
    """Replace parameters on the meta device by uninitialized ones on the CPU; shared ones stay shared.

    The system provides memory for them only when they are written: until then they are mere addresses, which accelerate
    needs to recognize an optimizer's parameters after sharding.
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

    Of a sharded tensor each process reads only its own part, cast to the parameter's dtype. Masks on the meta device
    are replaced: by a shard where FSDP2 shards the weight, else by the whole mask. The weights of low-rank layers
    carry theirs.
    """
    ranges = {(id(module), name): slice(start, end) for module, name, start, end in local_flat_ranges(model)}
    for path, module in model.named_modules():
        for name, own in _tensors_of(module):
            whole = tensors.get(plain_name(f"{path}.{name}"))
            if whole is None:
                continue
            if name == MASK:
                module._buffers[name] = shard_mask(whole, module._parameters["weight"])
            elif isinstance(own, DTensor):
                own.to_local().copy_(rows_of(whole, own))
            elif (id(module), name) in ranges:
                part = whole.flatten()[ranges[id(module), name]]
                own.data[: len(part)].copy_(part)  # nothing where the range is empty: tied, or on other processes
            else:
                own.data.copy_(whole)
        if isinstance(module, LowRankLinear):
            mask = tensors[mask_name(plain_name(f"{path}.weight"))]
            mark_pruned(local(module.weight.data), local(shard_mask(mask, module.weight)))


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for tensors in (module._parameters, module._buffers):
        yield from [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def send_from_main(model: nn.Module, weights: dict[str, Any]) -> None:
    """Fill a model sharded with FSDP2 with `weights`, which only the main process needs to have, one at a time."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def bytes_held(model: PreTrainedModel | nn.Module) -> int:
    """Bytes of this process's parts of all parameters and buffers."""
    parts = [local(tensor) for tensor in (*model.parameters(), *model.buffers())]
    return sum(part.numel() * part.element_size() for part in parts if not part.is_meta)
