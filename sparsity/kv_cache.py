"""A cache of keys and values that is allocated once, instead of being copied for every generated token."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """A cache layer with memory for `length` positions; `keys` and `values` are the part in use.

    Args:
        layer: the layer that it continues, with the keys and values of a prompt, one row for each beam. Beams of an
            example share their prompt, so only later positions move when beams are reordered.
    """

    def __init__(self, layer: DynamicLayer, length: int):
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._prompt_length = layer.keys.shape[-2]
        self._buffers = []
        for tensor in (layer.keys, layer.values):
            buffer = tensor.new_empty(*tensor.shape[:-2], length, tensor.shape[-1])
            buffer[..., : self._prompt_length, :] = tensor
            self._buffers.append(buffer)
        self.keys, self.values = (buffer[..., : self._prompt_length, :] for buffer in self._buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, new positions, width]; return all so far."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the generated positions of row beam_idx[i], a beam of the same example.

        Args:
            beam_idx: int64 [batch].
        """
        for tensor in (self.keys, self.values):
            generated = tensor[..., self._prompt_length :, :]
            generated.copy_(generated.index_select(0, beam_idx.to(tensor.device)))


def preallocate(cache: DynamicCache, length: int, beams: int) -> DynamicCache:
    """The cache of prompts, repeated for `beams` rows each, with memory for `length` positions in all.

    Layers of other kinds than the one that grows by copying, such as those of a sliding window, are only repeated.
    """
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    cache.layers = [
        PreallocatedLayer(layer, length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
