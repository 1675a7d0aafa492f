"""The scale of the final hidden states, fitted to the dense model's once every decoder layer is pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsity.models import decoder_layers
from sparsity.pts.activations import HiddenStates
from sparsity.pts.structure import replaced_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def final_norm(model: PreTrainedModel, tuples: list[bool]) -> nn.Module | None:
    """The normalization, with a gain for each channel, that reads the last decoder layer's output; None without one.

    Found without running a layer, whose weights are not in memory once it is pruned.

    Args:
        tuples: whether each decoder layer returns a tuple.
    """
    _, layers = decoder_layers(model)
    outputs: list[Tensor] = []
    found: list[nn.Module] = []

    def skip(index: int) -> Callable:
        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor]:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            outputs[:] = [hidden + 0]
            return (outputs[0],) if tuples[index] else outputs[0]

        return forward

    def note(module: nn.Module, args: tuple) -> None:
        if outputs and args and args[0] is outputs[0]:
            found.append(module)

    inside = {module for layer in layers for module in layer.modules()}
    norms = [
        module
        for module in model.modules()
        if module not in inside and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    ]
    handles = [module.register_forward_pre_hook(note) for module in norms]
    with replaced_forward(layers, skip), torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    for handle in handles:
        handle.remove()
    return found[0] if found else None


@torch.no_grad()
def rescale_final_norm(model: PreTrainedModel, states: HiddenStates) -> float:
    """Scale the final norm's gain (and bias) by the factor s that minimizes Σ ‖s·n(p) - n(d)‖² over calibration tokens.

    p and d are the last layer's outputs in the pruned and in the dense model, n is the norm. What pruning added to p
    says nothing about d, so s is below 1: the pruned model's logits become less certain, and their order stays.

    Returns:
        s; 1 where the model has no final norm that can be scaled.
    """
    assert states.pruned is not None and states.dense is not None
    norm = final_norm(model, states.tuples)
    if norm is None:
        return 1.0
    norm.to(states.device)
    sums = torch.zeros(2, dtype=torch.float64, device=states.device)
    for batch, (pruned, dense) in enumerate(zip(states.pruned, states.dense, strict=True)):
        p, d = (norm(hidden.to(states.device).to(states.dtype)).float() for hidden in (pruned, dense))
        p, d = states.kept(batch, p, d)
        p, d = p.float(), d.float()
        sums += states.token_weights[batch] * torch.stack([(p * d).sum(), (p * p).sum()]).double()
    if dist.is_initialized():
        dist.all_reduce(sums)
    norm.to("cpu")
    scale = float(sums[0] / sums[1].clamp(min=1e-30))
    probe = states.pruned[0].flatten(0, -2)[:16].to("cpu", states.dtype)
    return scale if scale > 0 and _scale(norm, scale, probe) else 1.0


def _scale(norm: nn.Module, scale: float, probe: Tensor) -> bool:
    """Make a norm return `scale` times what it returned, tried on a probe; False leaves it as it was.

    Some norms (Gemma's) multiply by 1 + weight.
    """
    before = norm(probe).float()
    parameters = dict(norm.named_parameters(recurse=False))
    old = {name: parameter.data for name, parameter in parameters.items()}
    for offset in (0.0, 1.0):
        for name, parameter in parameters.items():
            shift = offset if name == "weight" else 0.0
            parameter.data = ((old[name].float() + shift) * scale - shift).to(old[name].dtype)
        if torch.allclose(norm(probe).float(), before * scale, rtol=0.02, atol=1e-3 * float(before.abs().max())):
            return True
    for name, parameter in parameters.items():
        parameter.data = old[name]
    return False
