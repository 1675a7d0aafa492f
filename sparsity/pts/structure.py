"""The structure of a decoder-only model, read off a running forward pass so that no architecture needs to be named.

Which linear layers can be pruned, which of them read the same tensor, and the arguments of each decoder layer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.models import decoder_layers
from sparsity.pts.recipe import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Call = tuple[tuple, dict[str, Any]]  # args and kwargs of a decoder layer, apart from the hidden states
Group = dict[str, nn.Linear]  # linear layers that read the same tensor, by name within the model


@dataclass
class DecoderLayer:
    """A decoder layer, its place in the model, and its linear layers to prune as groups in running order."""

    module: nn.Module
    index: int
    groups: list[Group]


class Stop(Exception):
    """Ends a forward pass early."""


def reader(group: Group) -> nn.Linear:
    """The linear layer that stands for its group: all read the same input."""
    return next(iter(group.values()))


def choose_linears(model: PreTrainedModel, pattern: Pattern, ignore: list[str]) -> tuple[set[str], dict[str, str]]:
    """Choose the weights to prune.

    Returns:
        names of the linear layers to prune; name → reason for every other weight matrix inside the decoder layers.

    Raises:
        UserError: nothing is left to prune, for example because the model has Conv1D instead of linear layers (GPT-2).
    """
    prefix, layers = decoder_layers(model)
    chosen, left_dense = set(), {}
    for name, module in layers.named_modules(prefix=prefix):
        matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        if not matrices:
            continue
        if not isinstance(module, nn.Linear):
            left_dense[name] = f"{type(module).__name__} is not a linear layer"
        elif any(fnmatch.fnmatch(name, glob) for glob in ignore):
            left_dense[name] = "--ignore"
        elif pattern.m and (module.in_features % pattern.m or module.out_features % pattern.m):
            left_dense[name] = f"shape {tuple(module.weight.shape)} is not divisible by {pattern.m}"
        else:
            chosen.add(name)
    for glob in ignore:
        if not any(fnmatch.fnmatch(name, glob) for name in left_dense):
            raise UserError(
                f"--ignore {glob} matches no linear layer of the model; names look like {min(chosen, default='')}"
            )
    if not chosen:
        reasons = sorted(set(left_dense.values()))
        raise UserError(f"{type(model).__name__} is not supported: no linear layer to prune ({'; '.join(reasons)})")
    return chosen, left_dense


def shared_inputs(model: PreTrainedModel, chosen: set[str]) -> list[list[list[str]]]:
    """For each decoder layer, groups of linear layers that read the same tensor (q, k and v, say), in running order.

    One forward pass over eight tokens tells. Layers that did not run in it (experts) come last, one to a group.
    """
    prefix, layers = decoder_layers(model)
    names = {module: name for name, module in layers.named_modules(prefix=prefix) if name in chosen}
    with _without_autocast() if model.device.type == "meta" else nullcontext(), torch.inference_mode():
        tokens = torch.zeros(1, 8, dtype=torch.long, device=model.device)
        with watched(names) as calls:
            # With a mask, transformers does not look at position ids, which an empty model does not have.
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        # `calls` holds the tensors, which keeps their ids apart.
        inputs = {names[module]: pairs[0][0] for module, pairs in calls.items()}
    grouped: list[list[list[str]]] = []
    for index in range(len(layers)):
        inside = f"{prefix}.{index}."
        groups: dict[int, list[str]] = {}
        for name, tensor in inputs.items():
            if name.startswith(inside):
                groups.setdefault(id(tensor), []).append(name)
        idle = sorted(name for name in chosen if name.startswith(inside) and name not in inputs)
        grouped.append([*groups.values(), *([name] for name in idle)])
    return grouped


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Make `torch.autocast` do nothing, for the meta device, which has none.

    transformers 4 switches autocast off around position embeddings on any device.
    """
    original = torch.autocast
    torch.autocast = lambda *args, **options: nullcontext()  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


@contextmanager
def watched(modules: Collection[nn.Module], stop: bool = False) -> Iterator[dict[nn.Module, list[tuple[Any, Any]]]]:
    """Record the (input, output) pairs of modules that run within the block, in running order.

    Args:
        stop: end the forward pass, and with it the block, once all of them have run.
    """
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        calls.setdefault(module, []).append((args[0] if args else None, output))
        if stop and len(calls) == len(modules):
            raise Stop

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with suppress(Stop):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_forward(modules: Iterable[nn.Module], forward: Callable[[int], Callable]) -> Iterator[None]:
    """Within the block, module number `index` runs forward(index) instead of its own forward."""
    for index, module in enumerate(modules):
        module.forward = forward(index)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states in a decoder layer's output, a tensor or (older architectures) a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def returns_tuple(model: nn.Module, layers: nn.ModuleList) -> list[bool]:
    """Whether each decoder layer returns a tuple (older architectures) or the hidden states themselves."""
    with torch.inference_mode(), watched(list(layers)) as calls:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    return [isinstance(calls[layer][0][1], tuple) for layer in layers]


def record_calls(
    model: nn.Module, layers: nn.ModuleList, tuples: list[bool], batch: dict[str, Tensor]
) -> tuple[Tensor, list[Call]]:
    """Run all but the decoder layers on one batch.

    Returns:
        the hidden states [batch, length, width] that enter the first layer; for each layer its (args, kwargs) apart
        from the hidden states. Masks and position embeddings may differ from layer to layer (sliding windows).
    """
    first: list[Tensor] = []
    calls: list[Call] = []

    def recorder(index: int) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            first[:] = first or [hidden]
            calls.append((tuple(args[1:]), kwargs))
            if index == len(layers) - 1:
                raise Stop
            return (hidden,) if tuples[index] else hidden

        return forward

    with replaced_forward(layers, recorder), torch.no_grad(), suppress(Stop):
        model(**batch, use_cache=False)
    return first[0], calls
