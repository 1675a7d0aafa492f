"""Calibration activations, layer by layer, and prefetching of decoder layers."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from sparsity.devices import bf16_is_faster
from sparsity.models import runs_in_bf16
from sparsity.pts.structure import Call, DecoderLayer, hidden_states_of, layer_outputs, record_calls

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tests of how a layer works run on a batch of their own, the first tokens of the first sequence.
PROBE, PROBE_TOKENS = -1, 128


class HiddenStates:
    """The hidden states of the calibration set between two decoder layers, one tensor per batch.

    They are kept in CPU memory, pinned for CUDA. Batches of one shape share the arguments of their layers where
    these are equal, as masks and positions are.

    On CPUs with bf16 instructions the linear layers of float32 models run in bf16 during calibration, which is faster;
    weights, the residual stream and sums stay float32.

    Attributes:
        pruned: hidden states [batch, length, width] of the model as it is pruned so far; None unless `needs_pruned`.
        dense: the same of the dense model; None unless `needs_dense`.
        token_weights: for each batch, the weight of each of its tokens in statistics.
        dtype: of the layers' inputs.
        linear_dtype: in which linear layers run.
        outputs: what each dense decoder layer returns for `first_tokens`.

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
        self.calls: list[list[Call]] = []
        self.pruned: list[Tensor] | None = None
        self.dense: list[Tensor] | None = None
        self._moved: tuple[Call, Call] | None = None  # a layer's arguments, and the same on the device
        self.first_tokens = batches[0]["input_ids"][:, :2]
        self.outputs = outputs = layer_outputs(model, layers, {"input_ids": self.first_tokens})
        distinct = {batch["input_ids"].shape: batch for batch in batches}
        shapes = {shape: record_calls(model, layers, outputs, batch)[0].shape for shape, batch in distinct.items()}
        seen: dict[torch.Size, list[Call]] = {}
        for number, batch in enumerate(batches):
            embedded, calls = record_calls(model, layers, outputs, batch)
            if number == 0:
                in_bf16 = device.type == "cpu" and embedded.dtype == torch.float32 and bf16_is_faster(device)
                in_bf16 = in_bf16 and runs_in_bf16(model)
                self.dtype, self.linear_dtype = embedded.dtype, torch.bfloat16 if in_bf16 else embedded.dtype
                self.shapes = [shapes[batch["input_ids"].shape] for batch in batches]
                self.pruned = self.allocate(self.shapes, self.dtype) if needs_pruned else None
                # Only targets and inputs of linear layers are taken from the dense model: they need no more precision.
                self.dense = self.allocate(self.shapes, self.linear_dtype) if needs_dense else None
            for stream in (self.pruned, self.dense):
                if stream is not None:
                    self.store(embedded, stream[number])
            first = seen.setdefault(embedded.shape, calls)
            self.calls.append(first if _equal(first, calls) else calls)
        embedded, calls = record_calls(
            model, layers, outputs, {"input_ids": batches[0]["input_ids"][:1, :PROBE_TOKENS]}
        )
        self.probe_shape = embedded.shape
        self.calls.append(calls)  # as number PROBE

    def probe(self) -> Tensor:
        """The dense hidden states of the first tokens of the first sequence; `run` takes them as the batch `PROBE`."""
        assert self.dense is not None
        return self.dense[0][tuple(map(slice, self.probe_shape))]

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
        buffer.copy_(activations.detach().view_as(buffer), non_blocking=True)

    def load(self, buffer: Tensor) -> Tensor:
        """A buffer's activations on the device."""
        return buffer.to(self.device, non_blocking=True)

    def run(self, layer: DecoderLayer, batch: int, hidden: Tensor) -> Tensor:
        """Output of a decoder layer for the hidden states of a batch, both mostly [batch, length, width].

        Call it within `precision`.
        """
        args, kwargs = self._call(batch, layer.index)
        with layer.experts or nullcontext():
            return hidden_states_of(layer.module(self.load(hidden).to(self.dtype), *args, **kwargs))

    def _call(self, batch: int, index: int) -> Call:
        """The layer's arguments on the device. The latest stay there: mostly those of the next batch are the same."""
        call = self.calls[batch][index]
        if self._moved is None or self._moved[0] is not call:
            self._moved = call, send_to_device(call, self.device, non_blocking=True)
        return self._moved[1]

    def precision(self) -> torch.autocast:
        """The context in which layers run. It keeps the weights that it converts, so enter it once for all batches."""
        in_bf16 = self.linear_dtype != self.dtype
        return torch.autocast(self.device.type, self.linear_dtype if in_bf16 else None, enabled=in_bf16)

    @torch.no_grad()
    def advance(self, layer: DecoderLayer, hidden: list[Tensor] | None) -> None:
        """Replace each of `hidden` (`pruned` or `dense`) by the layer's output for it, in place."""
        with self.precision():
            for batch, buffer in enumerate(hidden or []):
                self.store(self.run(layer, batch, buffer), buffer)


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


def _equal(left: Any, right: Any) -> bool:
    """Whether the arguments of two calls are equal: some models give their layers what depends on the tokens."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or torch.equal(left, right)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return left is right or (left == right if isinstance(left, (int, float, str)) else type(left) is type(right))
