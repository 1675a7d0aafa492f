"""The structure of a decoder-only model, read off a running forward pass so that no architecture needs to be named.

Which linear layers can be pruned, which of them read the same tensor, and the arguments of each decoder layer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError, first_line
from sparsity.models import decoder_layers, shared_names
from sparsity.pattern import Pattern
from sparsity.pts.experts import Experts, expert_counts, expert_weights

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
    counts, tied = expert_counts(model.config), shared_names(model)
    shared = {*tied, *tied.values()}
    stacked = expert_weights(layers, counts, prefix)
    chosen, left_dense = set(), {}
    for path, module in layers.named_modules(prefix=prefix):
        # What modelopt can mask: subclasses with a forward function of their own stay as they are.
        is_plain_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        for leaf, weight in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if f"{path}.{leaf}" in stacked else path
            if weight.dim() < 2:
                continue
            if name not in stacked and not is_plain_linear:
                left_dense[name] = f"{type(module).__name__} is not a plain linear layer"
            elif f"{path}.{leaf}" in shared:
                left_dense[name] = "shared by several layers"
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


def is_router(name: str, linear: nn.Linear, experts: set[int]) -> bool:
    """Whether a linear layer chooses among experts. Routers are small and decide everything, so they stay dense."""
    *_, parent, leaf = ["", *name.split(".")]
    return linear.out_features in experts and ("router" in (parent, leaf) or leaf == "gate")


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Make `torch.autocast` do nothing, for the meta device, which has none.

    transformers 4 switches autocast off around position embeddings on any device.
    """
    with ExitStack() as stack:
        stack.callback(setattr, torch, "autocast", torch.autocast)
        torch.autocast = lambda *args, **options: nullcontext()  # type: ignore[assignment,misc]
        yield


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

    with ExitStack() as stack, suppress(Stop):
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        yield calls


@contextmanager
def replaced_forward(modules: Iterable[nn.Module], forward: Callable[[int], Callable]) -> Iterator[None]:
    """Within the block, module number `index` runs forward(index) instead of its own forward."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            module.forward = forward(index)
            stack.callback(delattr, module, "forward")
        yield


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states in a decoder layer's output, a tensor or (older architectures) a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def layer_outputs(model: nn.Module, layers: nn.ModuleList, batch: dict[str, Tensor]) -> list[Any]:
    """What each decoder layer returns when the whole model runs on a batch."""
    with torch.no_grad(), watched(list(layers)) as calls:
        model(**batch, use_cache=False)
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
            return (hidden, *outputs[index][1:]) if isinstance(outputs[index], tuple) else hidden

        return forward

    with replaced_forward(layers, recorder), torch.no_grad(), suppress(Stop):
        model(**batch, use_cache=False)
    return first[0], calls


@torch.no_grad()
def observe(model: PreTrainedModel, chosen: set[str]) -> tuple[list[list[list[str]]], list[dict[str, bool]]]:
    """Run the model on a few tokens, then its decoder layers one after the other, as pruning does.

    Returns:
        for each decoder layer, groups of linear layers that read the same tensor (q, k and v, say), in running order,
        then those that did not run, one to a group; and the weights of experts among `chosen`: name within the layer →
        whether it is transposed. For an empty model none of the latter, and where its code looks at values, each
        linear layer is a group of its own.

    Raises:
        UserError: both ways compute different values, as where a layer reads what another one has left elsewhere.
    """
    prefix, layers = decoder_layers(model)
    empty, name = any(weight.is_meta for weight in model.parameters()), type(model).__name__
    tokens = torch.arange(16, device=model.device).view(2, 8) % model.config.get_text_config(decoder=True).vocab_size
    # With a mask, transformers does not look at position ids, which an empty model does not have.
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    groups: list[list[list[str]]] = []
    transposed: list[dict[str, bool]] = []
    try:
        with _without_autocast() if empty else nullcontext():
            outputs = layer_outputs(model, layers, batch)
            start = layer_outputs(model, layers, {name: part[:, :2] for name, part in batch.items()})
            hidden, calls = record_calls(model, layers, start, batch)  # with outputs for other tokens, as calibration
            for index, (layer, (args, kwargs)) in enumerate(zip(layers, calls, strict=True)):
                path = f"{prefix}.{index}"
                linears = {module: name for name, module in layer.named_modules(prefix=path) if name in chosen}
                stacked = [n for n, _ in layer.named_parameters() if not empty and f"{path}.{n}" in chosen]
                with Experts(layer, stacked) as experts, watched(linears) as seen:
                    hidden = hidden_states_of(layer(hidden, *args, **kwargs))
                sharing: dict[int, list[str]] = {}
                for module, pairs in seen.items():  # which hold the tensors, and that keeps their ids apart
                    sharing.setdefault(id(pairs[0][0]), []).append(linears[module])
                idle = sorted(name for module, name in linears.items() if module not in seen)
                groups.append([*sharing.values(), *([name] for name in idle)])
                transposed.append(experts.transposed)
    except Exception as error:  # of the model's own code, called in a way that it does not expect
        if empty:  # it looks at values, which an empty model does not have
            parts = [path for path, _ in layers.named_modules(prefix=prefix) if path in chosen]
            alone = [[[path] for path in parts if path.startswith(f"{prefix}.{i}.")] for i in range(len(layers))]
            return alone, [{} for _ in layers]
        reason = first_line(error)
        raise UserError(f"{name} is not supported: its decoder layers do not run one by one ({reason})") from error
    expected = hidden_states_of(outputs[-1])
    differs = hidden.shape != expected.shape
    if differs or (not empty and (hidden - expected).float().norm() > 0.01 * expected.float().norm()):
        raise UserError(f"{name} is not supported: its decoder layers depend on more than their arguments")
    return groups, transposed
