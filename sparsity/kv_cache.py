"""Caches of keys and values with room for what will be generated, instead of ones that are copied for every token.

In beam search all beams of an example begin with the same prompt, whose keys and values are kept once for all of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 128  # positions by which a layer grows
SMALL_ROOM = 32  # of a layer without the prompts, which is copied in no time


class RoomyLayer(DynamicLayer):
    """A cache layer with room for further positions, at most `length` in all.

    Only the positions behind those that the layer was made with are rearranged when beams are, as those are a prompt
    that all beams share; its rows must already hold each example once per beam.
    """

    step = ROOM

    def __init__(self, layer: DynamicLayer, length: int):
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._shared, self._length = layer.keys.shape[-2], length
        self._buffers = [layer.keys, layer.values]
        self._grow(self._shared + 1)
        self._show(self._shared)

    def _grow(self, needed: int) -> None:
        """Make room for `needed` positions and some more; what is not yet used is zero."""
        used, room = self.keys.shape[-2], min(-(-needed // self.step) * self.step, max(needed, self._length))
        for number, tensor in enumerate((self.keys, self.values)):
            buffer = tensor.new_zeros(*tensor.shape[:-2], room, tensor.shape[-1])
            buffer[..., :used, :] = tensor
            self._buffers[number] = buffer

    def _show(self, used: int) -> None:
        self.keys, self.values = (buffer[..., :used, :] for buffer in self._buffers)
        for view, buffer in zip((self.keys, self.values), self._buffers, strict=True):
            view.buffer = buffer

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, new positions, width]; return all so far."""
        used = self.keys.shape[-2]
        end = used + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._grow(end)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., used:end, :] = new
        self._show(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i what was generated in row beam_idx[i], a beam of the same example.

        Args:
            beam_idx: int64 [batch].
        """
        for tensor in (self.keys, self.values):
            generated = tensor[..., self._shared :, :]
            generated.copy_(generated.index_select(0, beam_idx.to(tensor.device)))


class BeamLayer(RoomyLayer):
    """A cache layer that keeps each prompt once for all its beams.

    `keys` and `values` are those of the generated positions, [batch * beams, heads, positions, width], and carry the
    prompt's. Nothing but `sparsity.attention.attention` knows of them, so the layer is only for models that call it
    with the very tensors that their cache returns; see `attended`.
    """

    step = SMALL_ROOM

    def __init__(self, layer: DynamicLayer, length: int, beams: int):
        self._prompt = layer.keys, layer.values
        generated = DynamicLayer()
        generated.__dict__.update(layer.__dict__)
        rows, heads, known, _ = layer.keys.shape
        generated.keys, generated.values = (t.new_empty(rows * beams, heads, 0, t.shape[-1]) for t in self._prompt)
        super().__init__(generated, length - known)

    def _show(self, used: int) -> None:
        super()._show(used)
        self.keys.prompt, self.values.prompt = self._prompt

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """As of `RoomyLayer`, without the prompt's keys and values.

        Raises:
            RuntimeError: the model attended to the last ones in another way, which does not know of the prompt.
        """
        if self.keys.shape[-2] and not attended(self.keys):
            raise RuntimeError("a model that shares prompts among beams changed its way of attention")
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, *args: object) -> int:
        """Positions so far, the prompt's included."""
        return self._prompt[0].shape[-2] + self.keys.shape[-2]


def prompt_of(tensor: Tensor) -> Tensor | None:
    """The prompt's part [batch, heads, positions, width] that the keys or values of a `BeamLayer` leave out.

    None for any other tensor.
    """
    return getattr(tensor, "prompt", None)


def mark_attended(*tensors: Tensor) -> None:
    """Note that `sparsity.attention.attention` was given these keys or values."""
    for tensor in tensors:
        setattr(tensor, "attended", True)  # noqa: B010


def attended(*tensors: Tensor) -> bool:
    """Whether all of them are marked."""
    return all(getattr(tensor, "attended", False) for tensor in tensors)


def buffer_of(tensor: Tensor) -> Tensor | None:
    """The contiguous buffer [batch, heads, room, width] that keys or values of a `RoomyLayer` are the first part of.

    None for any other tensor.
    """
    return getattr(tensor, "buffer", None)


def give_room(cache: Any, length: int, beams: int = 1) -> Any:
    """The cache of prompts, each for `beams` rows, its layers replaced by ones with room for `length` positions in all.

    Layers of other kinds than the one that grows by copying, such as those of a sliding window, are only repeated.

    Raises:
        AttributeError, TypeError: the cache, or a layer of it, cannot be repeated.
    """
    if not isinstance(cache, DynamicCache):
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        return cache
    for number, layer in enumerate(cache.layers):
        grows = type(layer) is DynamicLayer
        if grows and beams > 1 and attended(layer.keys, layer.values):
            cache.layers[number] = BeamLayer(layer, length, beams)
            continue
        if beams > 1:
            layer.batch_repeat_interleave(beams)
        if grows:
            cache.layers[number] = RoomyLayer(layer, length)
    return cache
