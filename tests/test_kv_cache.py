"""Caches of keys and values with room for what will be generated."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from sparsity.kv_cache import ROOM, buffer_of, give_room, mark_attended, prompt_of


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


def prompts(beams, seen=True):
    """A cache of two prompts for `beams` rows each, beside transformers' own."""
    torch.manual_seed(0)
    own, ours = DynamicCache(), DynamicCache()
    for cache, states in zip((own, ours), [random(5)] * 2, strict=True):
        cache.update(*states, 0)
    if seen:
        mark_attended(ours.layers[0].keys, ours.layers[0].values)
    own.batch_repeat_interleave(beams)
    return own, give_room(ours, 50, beams)


@pytest.mark.parametrize("seen", [True, False])
def test_prompts_are_kept_once_only_where_attention_knows_of_it(seen):
    _, cache = prompts(beams=3, seen=seen)
    new = torch.randn(6, 3, 1, 4)
    keys, _ = cache.update(new, new, 0)
    assert cache.get_seq_length() == 6
    if seen:
        assert prompt_of(keys).shape == (2, 3, 5, 4) and torch.equal(keys, new)
    else:
        assert prompt_of(keys) is None and keys.shape == (6, 3, 6, 4)


def test_beams_are_rearranged_as_transformers_own_are():
    own, cache = prompts(beams=3)
    order = torch.tensor([2, 0, 0, 4, 4, 3])
    for _ in range(3):
        new = [torch.randn(6, 3, 1, 4) for _ in range(2)]
        for ours, theirs in zip(cache.update(*new, 0), own.update(*new, 0), strict=True):
            assert torch.equal(torch.cat([prompt_of(ours).repeat_interleave(3, 0), ours], 2), theirs)
            mark_attended(ours)
        cache.reorder_cache(order)
        own.reorder_cache(order)


def test_another_way_of_attention_than_the_prompt_had_is_an_error():
    _, cache = prompts(beams=3)
    new = torch.randn(6, 3, 1, 4)
    cache.update(new, new, 0)
    with pytest.raises(RuntimeError, match="attention"):
        cache.update(new, new, 0)
