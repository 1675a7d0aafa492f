"""Prefetching of decoder layers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from conftest import tiny_llama

from sparsity.pts.activations import LayerPrefetcher


def test_next_layer_is_read_while_one_is_at_work(monkeypatch):
    """The part of it that needs no GPU: every layer arrives with its own weights, in pinned memory but the first."""
    layers, pinned = tiny_llama(layers=3).model.layers, set()
    before = [{name: weight.clone() for name, weight in layer.named_parameters()} for layer in layers]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.add(self.data_ptr()) or self.clone())
    prefetcher = LayerPrefetcher(layers, torch.device("cpu"))
    prefetcher.reader = ThreadPoolExecutor(1)
    pointers = [{weight.data_ptr() for weight in layer.parameters()} for layer in layers]
    for index in range(3):
        layer = prefetcher.fetch(index)
        assert all(torch.equal(weight, before[index][name]) for name, weight in layer.named_parameters())
    assert pinned == pointers[1] | pointers[2]
