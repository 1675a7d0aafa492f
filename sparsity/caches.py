"""Caches of keys and values with room for what will be generated, instead of ones that are copied for every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 128  # positions by which a layer grows


class RoomyLayer(DynamicLayer):
    """A cache layer with room for further positions, at most `length` in all.

    In beam search all beams of an example begin with the same prompt, so only the positions behind those that the layer
    was made with are rearranged when beams are; its rows must already hold each example once per beam.
    """

    def __init__(self, layer: DynamicLayer, length: int):
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._shared, self._length = layer.keys.shape[-2], length
        self._buffers = [layer.keys, layer.values]
        self._grow(self._shared + 1)
        self._show(self._shared)

    def _grow(self, needed: int) -> None:
        """Make room for `needed` positions and some more; what is not yet used is zero."""
        used, room = self.keys.shape[-2], min(-(-needed // ROOM) * ROOM, max(needed, self._length))
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


def buffer_of(tensor: Tensor) -> Tensor | None:
    """The contiguous buffer [batch, heads, room, width] that keys or values of a `RoomyLayer` are the first part of.

    None for any other tensor.
    """
    return getattr(tensor, "buffer", None)


def give_room(cache: Any, length: int) -> Any:
    """The cache of a prompt, its layers replaced by ones with room for `length` positions in all.

    Layers of other kinds than the one that grows by copying, such as those of a sliding window, stay as they are.
    """
    if isinstance(cache, DynamicCache):
        cache.layers = [RoomyLayer(layer, length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
