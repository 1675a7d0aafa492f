"""Caches of keys and values with room for what will be generated."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from sparsity.caches import ROOM, buffer_of, give_room


def random(positions):
    return torch.randn(2, 3, positions, 4), torch.randn(2, 3, positions, 4)


@pytest.mark.parametrize("length", [2 * ROOM, ROOM + 10, 5])  # a length that is too small is only a slower one
def test_layer_grows_as_transformers_own_does(length):
    torch.manual_seed(0)
    own, roomy = DynamicCache(), DynamicCache()
    prompt = random(5)
    own.update(*prompt, 0)
    roomy.update(*prompt, 0)
    roomy = give_room(roomy, length)
    for positions in (1, 3, ROOM, 1, 1):
        new = random(positions)
        for ours, theirs in zip(roomy.update(*new, 0), own.update(*new, 0), strict=True):
            assert torch.equal(ours, theirs)
    assert roomy.get_seq_length() == own.get_seq_length()


def test_buffer_holds_what_is_known_and_then_zeros():
    cache = DynamicCache()
    cache.update(*random(5), 0)
    keys, values = give_room(cache, 50).update(*random(1), 0)
    for part in (keys, values):
        buffer = buffer_of(part)
        assert buffer.is_contiguous() and buffer.shape == (2, 3, 50, 4)
        assert torch.equal(buffer[:, :, :6], part) and not buffer[:, :, 6:].any()
    assert buffer_of(torch.ones(1)) is None
