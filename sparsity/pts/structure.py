"""What a running decoder-only model reveals of its structure, so that no architecture needs to be named.

Which linear layers there are to prune, which of them read one tensor, and with which arguments each decoder layer is
called.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.models import decoder_layers
from sparsity.pts.pattern import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Call = tuple[tuple, dict[str, Any]]  # what a layer is called with in addition to the hidden states: args, kwargs


class Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


def choose_linears(model: PreTrainedModel, pattern: Pattern, ignore: list[str]) -> tuple[set[str], dict[str, str]]:
    """Which weights to prune.

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

    Found with one forward pass over eight tokens. Layers that did not run in it (experts) come last, one to a group.
    """
    prefix, layers = decoder_layers(model)
    calls: dict[str, Tensor] = {}  # holding the tensors keeps their ids apart

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            calls.setdefault(name, args[0])

        return hook

    modules = dict(layers.named_modules(prefix=prefix))
    handles = [modules[name].register_forward_pre_hook(note(name)) for name in chosen]
    try:
        with _without_autocast() if model.device.type == "meta" else nullcontext(), torch.inference_mode():
            tokens = torch.zeros(1, 8, dtype=torch.long, device=model.device)
            # With a mask given, transformers does not look at position ids, which an empty model has not got.
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    grouped: list[list[list[str]]] = []
    for index in range(len(layers)):
        inside = f"{prefix}.{index}."
        groups: dict[int, list[str]] = {}
        for name, tensor in calls.items():
            if name.startswith(inside):
                groups.setdefault(id(tensor), []).append(name)
        idle = sorted(name for name in chosen if name.startswith(inside) and name not in calls)
        grouped.append([*groups.values(), *([name] for name in idle)])
    return grouped


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Make `torch.autocast` do nothing, for the meta device, which has none.

    transformers 4 switches autocast off around position embeddings, whatever the device.
    """
    original = torch.autocast
    torch.autocast = lambda *args, **options: nullcontext()  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


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


def returns_tuple(model: nn.Module, layers: nn.ModuleList) -> list[bool]:
    """Whether each decoder layer returns a tuple (older architectures) or the hidden states themselves."""
    tuples: list[bool] = [False] * len(layers)

    def watch(index: int) -> Callable:
        original = layers[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            tuples[index] = isinstance(output, tuple)
            return output

        return forward

    with replaced_forward(layers, watch), torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    return tuples


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
