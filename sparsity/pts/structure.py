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

from sparsity.errors import UserError, first_line
from sparsity.models import decoder_layers
from sparsity.pts.experts import Experts, expert_counts, expert_weights
from sparsity.pts.recipe import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Call = tuple[tuple, dict[str, Any]]  # args and kwargs of a decoder layer, apart from the hidden states
Group = dict[str, nn.Linear]  # linear layers that read the same tensor, by name within the model


@dataclass
class DecoderLayer:
    """A decoder layer, its place in the model, and what to prune in it.

    Attributes:
        name: within the model.
        groups: linear layers, in running order.
        transposed: weights that hold a matrix for each expert, by name within the layer: whether they are
            [experts, in, out].
        experts: the experts as linear layers, while this layer is pruned.
    """

    module: nn.Module
    index: int
    name: str
    groups: list[Group]
    transposed: dict[str, bool]
    experts: Experts | None = None


class Stop(Exception):
    """Ends a forward pass early."""


def reader(group: Group) -> nn.Linear:
    """The linear layer that stands for its group: all read the same input."""
    return next(iter(group.values()))


def choose_weights(model: PreTrainedModel, pattern: Pattern, ignore: list[str]) -> tuple[set[str], dict[str, str]]:
    """Choose the weights to prune.

    Returns:
        what to prune, linear layers by their names and weights of experts by their own; name → reason for every other
        weight matrix inside the decoder layers.

    Raises:
        UserError: nothing is left to prune, for example because the model has Conv1D instead of linear layers (GPT-2).
    """
    prefix, layers = decoder_layers(model)
    counts = expert_counts(model.config)
    stacked = expert_weights(layers, counts, prefix)
    chosen, left_dense = set(), {}
    for path, module in layers.named_modules(prefix=prefix):
        for leaf, weight in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if f"{path}.{leaf}" in stacked else path
            if weight.dim() < 2:
                continue
            if name not in stacked and not is_plain_linear(module):
                left_dense[name] = f"{type(module).__name__} is not a plain linear layer"
            elif name not in stacked and is_router(name, module, counts):
                left_dense[name] = "router of a mixture"
            elif any(fnmatch.fnmatch(name, glob) for glob in ignore):
                left_dense[name] = "--ignore"
            elif pattern.m and (weight.shape[-1] % pattern.m or weight.shape[-2] % pattern.m):
                left_dense[name] = f"shape {tuple(weight.shape)} is not divisible by {pattern.m}"
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


def is_plain_linear(module: nn.Module) -> bool:
    """Whether modelopt can mask the module: subclasses with a forward function of their own stay as they are."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_router(name: str, linear: nn.Linear, experts: set[int]) -> bool:
    """Whether a linear layer chooses among experts. Routers are small and decide everything, so they stay dense."""
    *_, parent, leaf = ["", *name.split(".")]
    return linear.out_features in experts and ("router" in (parent, leaf) or leaf == "gate")


def shared_inputs(model: PreTrainedModel, chosen: set[str]) -> list[list[list[str]]]:
    """For each decoder layer, groups of linear layers that read the same tensor (q, k and v, say), in running order.

    One forward pass over eight tokens tells. Layers that did not run in it come last, one to a group.
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
        idle = sorted(name for name in names.values() if name.startswith(inside) and name not in inputs)
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


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """The output of a decoder layer with other hidden states in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def layer_outputs(model: nn.Module, layers: nn.ModuleList, tokens: Tensor) -> list[Any]:
    """What each decoder layer returns for token ids [batch, length] when the whole model runs."""
    with torch.no_grad(), watched(list(layers)) as calls:
        model(input_ids=tokens, use_cache=False)
    return [calls[layer][0][1] for layer in layers]


def record_calls(
    model: nn.Module, layers: nn.ModuleList, outputs: list[Any], batch: dict[str, Tensor]
) -> tuple[Tensor, list[Call]]:
    """Run all but the decoder layers on one batch.

    Args:
        outputs: what each layer returns for some tokens; whatever is returned beside hidden states is taken from there.

    Returns:
        the hidden states that enter the first layer, mostly [batch, length, width]; for each layer its (args, kwargs)
        apart from the hidden states. Masks and position embeddings may differ from layer to layer (sliding windows).
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
            return with_hidden_states(outputs[index], hidden)

        return forward

    with replaced_forward(layers, recorder), torch.no_grad(), suppress(Stop):
        model(**batch, use_cache=False)
    return first[0], calls


@torch.no_grad()
def check_layers(model: PreTrainedModel) -> list[dict[str, bool]]:
    """Check that the decoder layers, run one after the other as pruning does, compute what the model computes.

    Returns:
        for each decoder layer, the weights of experts that it uses: name within the layer → whether it is transposed.

    Raises:
        UserError: they do not, as where a layer reads what another one has left elsewhere.
    """
    layers, counts = decoder_layers(model)[1], expert_counts(model.config)
    tokens = torch.arange(16).view(2, 8) % model.config.get_text_config(decoder=True).vocab_size
    name, transposed = type(model).__name__, []
    try:
        outputs = layer_outputs(model, layers, tokens)
        hidden, calls = record_calls(model, layers, outputs, {"input_ids": tokens})
        for layer, (args, kwargs) in zip(layers, calls, strict=True):
            with Experts(layer, expert_weights(layer, counts).keys()) as experts:
                hidden = hidden_states_of(layer(hidden, *args, **kwargs))
            transposed.append(experts.transposed)
    except Exception as error:  # of the model's own code, called in a way that it does not expect
        reason = first_line(error)
        raise UserError(f"{name} is not supported: its decoder layers do not run one by one ({reason})") from error
    expected = hidden_states_of(outputs[-1])
    if hidden.shape != expected.shape or (hidden - expected).float().norm() > 0.01 * expected.float().norm():
        raise UserError(f"{name} is not supported: its decoder layers depend on more than their arguments")
    return transposed
