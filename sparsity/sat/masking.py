"""Masks during training: layers compute with plain weights, whose pruned entries are zero and stay zero.

modelopt's sparse layers multiply weight and mask in every forward pass, which costs a copy of every weight and its
backward pass. The product only repeats the zeros that the weights already have, so training uses ordinary layers that
carry the mask as a buffer of the same name: the state dict keeps its entries. The zeros are held by masking the
gradient once per optimizer step, before it is clipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsity.modelopt_state import MASK, without_expert_masks
from sparsity.sat.fsdp import local, masked_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Optimizers that leave a zero weight at zero while its gradient is zero: they change a weight by a multiple of its own
# gradient, momentum or value. Others mix the values of a matrix, or round them together.
ELEMENTWISE = {"adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"}


def use_plain_weights(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Turn modelopt's sparse layers into plain ones whose pruned weights are zero, with the mask as a buffer.

    Call `modelopt.torch.opt.modelopt_state` before: the model no longer has it afterwards.

    Args:
        state_dict: with the masks of experts, which modelopt does not have; buffers on the meta device for them.
    """
    import modelopt.torch.sparsity as mts

    masks = {name: dict(module.named_buffers(recurse=False)).get(MASK) for name, module in model.named_modules()}
    model = mts.export(model)
    for name, mask in masks.items():
        if mask is not None:
            model.get_submodule(name).register_buffer(MASK, mask)
    known = without_expert_masks(state_dict)
    for name in [name for name in state_dict if name not in known]:  # in one order on all processes
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_buffer(leaf, torch.empty_like(state_dict[name], device="meta"))
    model.tie_weights()  # the export gives a head its own weight even if it is tied to the embedding
    return model


@torch.no_grad()
def mask_weights(model: nn.Module) -> None:
    """Set pruned weights to zero."""
    for _, weight, mask in masked_weights(model):
        local(weight.data).mul_(mask)  # several times as fast as masked_fill_ on a CPU


@torch.no_grad()
def mask_gradients(model: nn.Module) -> None:
    """Set the gradients of pruned weights to zero."""
    for _, weight, mask in masked_weights(model):
        if weight.grad is not None:
            local(weight.grad).mul_(mask)
