"""The preallocated cache behaves as transformers' own."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache

from sparsity.kv_cache import preallocate


def random(positions, rows=2):
    return torch.randn(rows, 3, positions, 4), torch.randn(rows, 3, positions, 4)


def prompts(beams=1):
    """transformers' cache of two prompts of 5 tokens for `beams` rows each, and ours."""
    torch.manual_seed(0)
    own, ours = DynamicCache(), DynamicCache()
    states = random(5)
    for cache in (own, ours):
        cache.update(*states, 0)
    own.batch_repeat_interleave(beams)
    return own, preallocate(ours, 50, beams)


def test_layer_grows_as_transformers_own_does_without_copying():
    own, ours = prompts()
    first = ours.layers[0].keys.data_ptr()
    for positions in (1, 3, 40, 1):
        new = random(positions)
        for mine, theirs in zip(ours.update(*new, 0), own.update(*new, 0), strict=True):
            assert torch.equal(mine, theirs)
    assert ours.get_seq_length() == own.get_seq_length() == 50
    assert ours.layers[0].keys.data_ptr() == first


def test_beams_are_reordered_as_transformers_own_are():
    own, ours = prompts(beams=3)
    order = torch.tensor([2, 0, 0, 4, 4, 3])
    for _ in range(3):
        new = random(1, rows=6)
        for mine, theirs in zip(ours.update(*new, 0), own.update(*new, 0), strict=True):
            assert torch.equal(mine, theirs)
        ours.reorder_cache(order)
        own.reorder_cache(order)
