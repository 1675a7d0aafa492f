"""The calibration set on its way through the decoder layers, and the layers on their way to the device."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsity.devices import bf16_is_faster
from sparsity.pts.structure import Call, record_calls, returns_tuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HiddenStates:
    """The calibration set on its way through the decoder layers: hidden states per batch.

    They are kept in CPU memory, pinned for CUDA.

    Batches without padding and of one shape share the arguments of their layers; others keep their own.

    Attributes:
        pruned: hidden states [batch, length, width] of the model as it is pruned so far, one tensor per batch; None
            where `needs_pruned` is False.
        dense: the same of the dense model; None where `needs_dense` is False.
        keep: for each batch a bool tensor [batch * length] that is False on padding; None without padding.
        token_weights: for each batch, what each of its tokens counts in statistics.
        tuples: whether each decoder layer returns a tuple.

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
        needs_pruned: bool = True,
        needs_dense: bool = False,
        token_weights: Sequence[float] | None = None,
    ):
        self.device, self.folder = device, folder
        self.token_weights = list(token_weights or [1.0] * len(batches))
        self.keep: list[Tensor | None] = []
        self.calls: list[list[Call]] = []
        self._moved: tuple[Call, Call] | None = None  # a layer's arguments, and they on the device
        # On CPUs with bfloat16 instructions the linear layers of float32 models run in bfloat16 during calibration
        # (several times the speed); weights, the residual stream and sums of the statistics stay float32.
        self.autocast = device.type == "cpu" and model.dtype == torch.float32 and bf16_is_faster(device)
        self.tuples = returns_tuple(model, layers)
        hidden: list[Tensor] = []
        seen: dict[torch.Size, list[Call]] = {}
        for number, batch in enumerate(batches):
            embedded, calls = record_calls(model, layers, self.tuples, batch)
            mask = batch.get("attention_mask")
            if mask is not None and bool(mask.all()):
                mask = None  # nothing is padded
            if not hidden:
                self.dtype = embedded.dtype  # of the layers' inputs
                shapes = [torch.Size((*batch["input_ids"].shape, embedded.shape[-1])) for batch in batches]
                hidden = self.allocate(shapes, embedded.dtype)
            self.store(embedded, hidden[number])
            self.keep.append(None if mask is None else mask.flatten().bool().to(device))
            if self.autocast:
                calls = [_with_half_positions(call) for call in calls]
            self.calls.append(seen.setdefault(embedded.shape, calls) if mask is None else calls)
        self.shapes = [tensor.shape for tensor in hidden]
        self.pruned = hidden if needs_pruned else None
        self.dense: list[Tensor] | None = None
        if needs_dense:
            self.dense = self._copy(hidden) if needs_pruned else hidden

    def allocate_with_tail(
        self, shapes: list[torch.Size], tail_shapes: list[torch.Size], dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Two buffers for each batch in one allocation, the smaller ones at the end of the larger ones' memory.

        The larger ones may be written in order while the smaller ones are read in order: number n of the larger
        reaches into none of the smaller but those up to number n.
        """
        buffers = self.allocate(shapes, dtype)
        whole = buffers[0].as_strided((sum(buffer.numel() for buffer in buffers),), (1,), 0)
        counts = [shape.numel() for shape in tail_shapes]
        assert all(count <= shape.numel() for count, shape in zip(counts, shapes, strict=True))
        tail = whole[len(whole) - sum(counts) :].split(counts)
        return buffers, [part.view(shape) for part, shape in zip(tail, tail_shapes, strict=True)]

    def allocate(self, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
        """One buffer for each batch, where activations are kept: memory, pinned for CUDA, or a mapped file.

        The buffers are parts of one allocation, which unlike many small ones returns to the system when it is freed.
        """
        counts = [shape.numel() for shape in shapes]
        if self.folder:
            with tempfile.TemporaryFile(dir=self.folder) as file:  # without a name: a kill leaves nothing
                # A mapped file that outgrows the disk would end the process with SIGBUS; this raises OSError.
                size = sum(counts) * dtype.itemsize
                os.posix_fallocate(file.fileno(), 0, size)
                whole = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype)
        else:
            whole = torch.empty(sum(counts), dtype=dtype, pin_memory=self.device.type == "cuda")
        return [part.view(shape) for part, shape in zip(whole.split(counts), shapes, strict=True)]

    def store(self, activations: Tensor, buffer: Tensor) -> None:
        """Copy the activations of one batch from the device into their buffer.

        Only the device reads them again, in the order of its queue, so nothing needs to wait for the copy.
        """
        buffer.copy_(activations.detach(), non_blocking=True)

    def _copy(self, hidden: list[Tensor]) -> list[Tensor]:
        """The hidden states once more, for the dense model.

        Where layers run in bfloat16 the copies are bfloat16, as a model in bfloat16 would keep them, since they only
        serve as targets. What pruned layers are given stays in the model's own dtype.
        """
        dtype = torch.bfloat16 if self.autocast else self.dtype
        copies = self.allocate(self.shapes, dtype)
        for source, buffer in zip(hidden, copies, strict=True):
            self.store(source, buffer)
        return copies

    def run(self, layer: nn.Module, index: int, batch: int, hidden: Tensor, exact: bool = False) -> Tensor:
        """Output [batch, length, width] of decoder layer `index` for the first or all sequences of one batch.

        Args:
            hidden: [batch, length, width]; of fewer tokens, only where sequences are longer than any head is wide.
        """
        args, kwargs = self._call(batch, index)
        if len(hidden) < self.shapes[batch][0]:
            args, kwargs = _first_rows((args, kwargs), self.shapes[batch][0], len(hidden))
        whole, length = self.shapes[batch][1], hidden.shape[1]
        if length < whole:
            args, kwargs = _first_tokens((args, kwargs), whole, length)
        hidden = hidden.to(self.device, non_blocking=True).to(self.dtype)
        with nullcontext() if exact else self.precision():
            output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _call(self, batch: int, index: int) -> Call:
        """The layer's arguments on the device. The latest stay there: mostly those of the next batch are the same."""
        call = self.calls[batch][index]
        if self._moved is None or self._moved[0] is not call:
            self._moved = call, _to_device(call, self.device)
        return self._moved[1]

    def linear(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        """Output of a linear layer for inputs on the device, bit for bit as in `run`."""
        with self.precision():
            return nn.functional.linear(inputs, linear.weight, linear.bias)

    def kept(self, batch: int, *activations: Tensor) -> list[Tensor]:
        """Activations [batch, length, width] or [tokens, width] of one batch as [tokens, width], without padding.

        Where linears run in bfloat16, that is also how they are given: what a linear multiplies.
        """
        keep = self.keep[batch]
        flat = [tensor.flatten(0, -2) for tensor in activations]
        flat = [tensor[keep] if keep is not None and len(keep) == len(tensor) else tensor for tensor in flat]
        return [tensor.bfloat16() for tensor in flat] if self.autocast else flat

    def precision(self) -> torch.autocast:
        """The autocast context in which layers run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    @contextmanager
    def converted_weights(self, layer: nn.Module) -> Iterator[None]:
        """Within the block, linear layers hold the bfloat16 weights that autocast would convert anew for each batch.

        An input that several of them read is converted once.
        """
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)] if self.autocast else []
        weights = [linear.weight.data for linear in linears]
        latest: list[Tensor] = []  # an input, and it in bfloat16

        def convert(module: nn.Module, args: tuple) -> tuple:
            if not args:
                return args
            if not latest or latest[0] is not args[0]:
                latest[:] = [args[0], args[0].bfloat16()]
            return (latest[1], *args[1:])

        for linear in linears:
            linear.weight.data = linear.weight.data.bfloat16()
        handles = [linear.register_forward_pre_hook(convert) for linear in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.data = weight

    @torch.no_grad()
    def advance(self, layer: nn.Module, index: int, hidden: list[Tensor]) -> None:
        """Replace each of `hidden` (one per batch) by the layer's output for it, in place."""
        with self.converted_weights(layer):
            for batch, buffer in enumerate(hidden):
                self.store(self.run(layer, index, batch, buffer), buffer)


class LayerPrefetcher:
    """Moves decoder layers to the device; on CUDA it meanwhile reads the next one into pinned memory."""

    def __init__(self, layers: nn.ModuleList, device: torch.device):
        self.layers, self.device = layers, device
        self.reader = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self.reading: Future | None = None

    def fetch(self, index: int) -> nn.Module:
        """Decoder layer `index`, moved to the device."""
        if self.reading:
            self.reading.result()
        layer = self.layers[index].to(self.device, non_blocking=True)
        if self.reader and index + 1 < len(self.layers):
            self.reading = self.reader.submit(_pin, self.layers[index + 1])
        return layer


def _pin(layer: nn.Module) -> None:
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = tensor.data.pin_memory()


def _with_half_positions(call: Call) -> Call:
    """A layer's arguments with rotary cosines and sines in bfloat16, as a model in bfloat16 computes with them."""
    args, kwargs = call
    if (positions := kwargs.get("position_embeddings")) is not None:
        kwargs = {**kwargs, "position_embeddings": tuple(part.bfloat16() for part in positions)}
    return args, kwargs


def _first_rows(value: Any, rows: int, count: int) -> Any:
    """The first of a batch of `rows`: of masks and positions, where they are given for each row."""
    return _map_tensors(value, lambda tensor: tensor[:count] if tensor.ndim > 1 and len(tensor) == rows else tensor)


def _first_tokens(value: Any, length: int, count: int) -> Any:
    """The first `count` of sequences of `length`: of masks and positions, in each dimension of that size."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[tuple(slice(count) if size == length else slice(None) for size in tensor.shape)]

    return _map_tensors(value, cut)


def _to_device(value: Any, device: torch.device) -> Any:
    return _map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a layer with `change` applied to every tensor in them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value
