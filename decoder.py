"""What can be observed of a running decoder-only model, so that no architecture needs to be named.

The list of decoder layers, the arguments each is called with, which linear layers read one tensor, and the stream of
calibration data on its way from layer to layer.
"""

from __future__ import annotations

import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from model_io import bf16_is_faster
from sparsegpt import Pattern
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = tuple[tuple, dict[str, Any]]  # what a layer is called with beside the hidden states: args, kwargs


class Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the largest ModuleList of config.num_hidden_layers equal modules."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(layer) for layer in module}) == 1
    ]
    if not lists:
        raise UserError(
            f"found no list of {count} decoder layers in {type(model).__name__}; this architecture is not supported"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


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
    # transformers 4 switches autocast off around position embeddings, and torch has no autocast for the meta device.
    skipped = patch.object(torch, "autocast", lambda *args, **options: nullcontext())
    try:
        with skipped if model.device.type == "meta" else nullcontext(), torch.inference_mode():
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
def replaced_forward(modules: Iterable[nn.Module], forward: Callable[[int], Callable]) -> Iterator[None]:
    """Let module number `index` run forward(index) instead of its own forward for a while."""
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


# ------------------------------------------------------------------------------------- calibration stream


class Stream:
    """The calibration set on its way through the model: hidden states per batch, in CPU memory, pinned for CUDA.

    Batches without padding and of one shape share their layers' arguments; others keep their own.

    Args:
        folder: keep the activations in files here instead, which have no names and vanish with the process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        batches: list[dict[str, Tensor]],
        device: torch.device,
        folder: Path | None = None,
    ):
        self.device, self.folder = device, folder
        self.hidden: list[Tensor] = []  # [batch, length, width]
        self.keep: list[Tensor | None] = []  # bool [batch · length], False on padding
        self.calls: list[list[Call]] = []
        # Float32 models run the linear layers of their calibration passes in bfloat16 where the CPU has instructions
        # for it (twice the speed); weights, residual stream and Hessians stay float32.
        self.autocast = device.type == "cpu" and model.dtype == torch.float32 and bf16_is_faster(device)
        tuples = returns_tuple(model, layers)
        seen: dict[torch.Size, list[Call]] = {}
        for number, batch in enumerate(batches):
            hidden, calls = record_calls(model, layers, tuples, batch)
            mask = batch.get("attention_mask")
            if mask is not None and bool(mask.all()):
                mask = None  # nothing is padded
            if not self.hidden:
                shapes = [torch.Size((*batch["input_ids"].shape, hidden.shape[-1])) for batch in batches]
                self.hidden = self.allocate(shapes, hidden.dtype)
            self.put(hidden, self.hidden[number])
            self.keep.append(None if mask is None else mask.flatten().bool().to(device))
            self.calls.append(seen.setdefault(hidden.shape, calls) if mask is None else calls)

    def allocate(self, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
        """Room for activations of every batch where the stream keeps them: memory, pinned for CUDA, or a mapped file.

        It is one piece, which unlike many small ones goes back to the system as soon as it is free.
        """
        counts = [shape.numel() for shape in shapes]
        if self.folder:
            with tempfile.NamedTemporaryFile(dir=self.folder) as file:
                # A mapped file that outgrows the disk would end the process with SIGBUS; this raises OSError.
                os.posix_fallocate(file.fileno(), 0, sum(counts) * dtype.itemsize)
                piece = torch.from_file(file.name, shared=True, size=sum(counts), dtype=dtype)
        else:
            piece = torch.empty(sum(counts), dtype=dtype, pin_memory=self.device.type == "cuda")
        return [part.view(shape) for part, shape in zip(piece.split(counts), shapes, strict=True)]

    def put(self, activations: Tensor, room: Tensor) -> None:
        """Write activations of one batch into their room.

        Only the device reads them again, in the order of its queue, so that nothing needs to wait for the copy.
        """
        room.copy_(activations.detach(), non_blocking=True)

    def copy_hidden(self) -> list[Tensor]:
        """The hidden states once more, in room of their own.

        Where layers run in bfloat16 these are kept in it too, as a model in bfloat16 would keep them: they become the
        dense model's, which serve as targets. What pruned layers are given stays in the model's own dtype.
        """
        dtype = torch.bfloat16 if self.autocast else self.hidden[0].dtype
        copies = self.allocate([hidden.shape for hidden in self.hidden], dtype)
        for hidden, copy in zip(self.hidden, copies, strict=True):
            self.put(hidden, copy)
        return copies

    def run(self, layer: nn.Module, index: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """Output [batch, length, width] of decoder layer `index` for one batch (on the stream, or on `hidden`)."""
        args, kwargs = _to_device(self.calls[batch][index], self.device)
        hidden = (self.hidden[batch] if hidden is None else hidden).to(self.device, non_blocking=True)
        hidden = hidden.to(self.hidden[batch].dtype)
        with self.precision():
            output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def linear(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        """Output of a linear layer for inputs on the device, to the bit as in `run`."""
        with self.precision():
            return linear(inputs)

    def precision(self) -> torch.autocast:
        """The context in which layers run on the stream."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    @torch.no_grad()
    def advance(self, layer: nn.Module, index: int, hidden: list[Tensor]) -> None:
        """Replace each of `hidden` (one per batch) by the layer's output for it, in place."""
        for batch, room in enumerate(hidden):
            self.put(self.run(layer, index, batch, room), room)


class Delivery:
    """Decoder layers on their way to the device; on CUDA the next one is meanwhile read into pinned memory."""

    def __init__(self, layers: nn.ModuleList, device: torch.device):
        self.layers, self.device = layers, device
        self.reader = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self.reading: Future | None = None

    def bring(self, index: int) -> nn.Module:
        """Decoder layer `index`, on the device."""
        if self.reading:
            self.reading.result()
        layer = self.layers[index].to(self.device, non_blocking=True)
        if self.reader and index + 1 < len(self.layers):
            self.reading = self.reader.submit(_pin, self.layers[index + 1])
        return layer


def _pin(layer: nn.Module) -> None:
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = tensor.data.pin_memory()


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value
