r"""Sparse low-rank training: every pruned weight is frozen and receives a masked update of low rank.

    W_eff = W + mask ⊙ (scale · B A),   scale = alpha / rank

This is LoRA (Hu et al. 2021, section 4.1) with the mask applied to the product of the factors, as in SparsePEFT (Muñoz
et al. 2024, "SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation Models", section 3.2), so that the
update can be merged into W without losing a zero. Factors, normalizations and biases are trained in float32; all other
weights stay in the compute dtype and have neither gradients nor optimizer state.

During training the frozen weight itself carries the mask: pruned weights are stored as +0.0, retained weights that are
zero as -0.0, which computes the same. A mask thus needs no memory, and is sharded with its weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from sparsity.errors import UserError
from sparsity.modelopt_state import not_plus_zero, sparse_masks, without_expert_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mark_pruned(weight: torch.Tensor, mask: torch.Tensor) -> None:
    """Store the bool mask (True is retained) in the weight, in place: +0.0 is pruned, a retained zero becomes -0.0.

    `not_plus_zero` reads it.
    """
    weight.masked_fill_(mask & (weight == 0), -0.0).masked_fill_(~mask, 0.0)


def masked_sum(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """W_eff [out, in] in the dtype of `weight`, which carries its mask; A is [rank, in], B is [out, rank]."""
    total = torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=scale)
    return total.mul_(not_plus_zero(weight))  # several times as fast as masked_fill_ on a CPU


class MaskedLowRankProduct(torch.autograd.Function):
    """Y = X W_effᵀ, saving only X for the backward pass, which computes W_eff again.

    With G = Yᵀ' X ⊙ mask, where Y' is the gradient of the output, the chain rule gives the gradients scale · G Aᵀ of B
    and scale · Bᵀ G of A. G has the size of the weight and lives for one layer's backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.scale, ctx.input_dtype = scale, x.dtype
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight, A, B)
        return functional.linear(x, masked_sum(weight, A, B, scale))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = (gradient @ masked_sum(weight, A, B, ctx.scale)).to(ctx.input_dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            G = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            G.mul_(not_plus_zero(weight))
            grad_A = ((B.to(G.dtype).T @ G) * ctx.scale).to(A.dtype)
            grad_B = ((G @ A.to(G.dtype).T) * ctx.scale).to(B.dtype)
        return grad_x, None, grad_A, grad_B, None


class LowRankLinear(nn.Linear):
    """A linear layer with a frozen pruned weight and a trained, masked update of low rank.

    Attributes:
        weight: [out, in], frozen; has to carry its mask, see `mark_pruned`.
        lora_A, lora_B: float32 [rank, in] and [out, rank]. At first B is zero, so that the layer computes with W.
        scale: factor of the update.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)  # as peft initializes A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = MaskedLowRankProduct.apply(x, self.weight, self.lora_A, self.lora_B, self.scale)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def add_low_rank(
    model: PreTrainedModel, state: dict[str, torch.Tensor], rank: int, scale: float, seed: int, embeddings: bool
) -> None:
    """Freeze a model and give the layers that a sparse state prunes trained updates, in place.

    The model may be on the meta device; the updates are not. `fsdp.fill` gives it weights that carry their masks.

    Args:
        state: weights and masks by name.
        seed: for the initial factors, which are the same on all processes.
        embeddings: train the embeddings and the output head too, in full and in float32.

    Raises:
        UserError: the rank is larger than a weight's smaller side, or a pruned layer is not linear.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight, _ in sparse_masks(without_expert_masks(state)):  # experts stay as they are
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear):
            raise UserError(f"'{path}' is a {type(layer).__name__}; --lora_rank trains pruned linear layers only")
        if rank > min(weight.shape):
            sides = " x ".join(map(str, weight.shape))
            raise UserError(f"--lora_rank {rank} exceeds the smaller side of '{name}' ({sides}); choose a lower rank")
        model.set_submodule(path, LowRankLinear(layer, rank, scale, generator))
    for module in model.modules():
        vectors = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 1]
        for vector in vectors:  # weights of normalizations and biases
            train_in_float32(vector)
        if vectors and not isinstance(module, LowRankLinear):
            module.register_forward_hook(keep_dtype)
    if embeddings:
        for outer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if outer is not None:
                train_in_float32(outer.weight)


def train_in_float32(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.float()
    parameter.requires_grad_(True)


def keep_dtype(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook that undoes the promotion of a normalization's output to float32, which takes twice the memory."""
    if isinstance(output, torch.Tensor) and inputs and isinstance(inputs[0], torch.Tensor):
        return output.to(inputs[0].dtype)
    return output


def merge(state: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The sparse state with the trained values in it, in its own names, shapes and dtypes.

    Updates are added in float32 to the weights of the state, which may be more precise than those used in training.
    Pruned weights are +0.0.
    """
    result = {name: trained[name].to(tensor.dtype) if name in trained else tensor for name, tensor in state.items()}
    for name, weight, mask in sparse_masks(without_expert_masks(state)):
        path = name.removesuffix("weight")
        A, B = trained[f"{path}lora_A"].float(), trained[f"{path}lora_B"].float()
        total = torch.addmm(weight.float(), B, A, alpha=scale)
        result[name] = total.to(weight.dtype).masked_fill_(~mask, 0.0)
    return result
