"""Attention by blocks: the values and gradients of sdpa, and the models and machines it is used for."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsity import attention
from sparsity.attention import NAME, blocked_attention, use_blocked_attention

LENGTH, HEADS, WIDTH = 100, 6, 8  # more positions than a block has
CPU = torch.device("cpu")


def tensors(num_kv_heads, positions, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, HEADS, positions, WIDTH), (3, num_kv_heads, LENGTH, WIDTH), (3, num_kv_heads, LENGTH, WIDTH)]
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def layer(num_kv_heads, causal):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // num_kv_heads, causal
    return module


def visible(kind, positions):
    """A mask [3, 1, positions, LENGTH], or None: causal where there is a position for each key."""
    if kind is None:
        return None
    later = torch.arange(LENGTH) > torch.arange(LENGTH - positions, LENGTH)[:, None]
    mask = (~later).expand(3, 1, positions, LENGTH).clone()
    if kind == "padded":  # on the left, where a padding token sees itself
        mask[0, ..., :7] = False
        mask[0, 0, :, :7] |= torch.eye(LENGTH, dtype=torch.bool)[-positions:, :7]
    if kind == "packed":
        sample = torch.arange(LENGTH) // 40
        mask &= sample[-positions:, None] == sample
    if kind == "any":
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[..., 0] = True
    return mask


@pytest.mark.parametrize("kind", [None, "padded", "packed", "any"])
@pytest.mark.parametrize(("num_kv_heads", "positions"), [(6, 1), (2, 1), (2, 5), (6, LENGTH), (2, LENGTH), (1, LENGTH)])
def test_attention_and_its_gradients(num_kv_heads, positions, kind):
    module, mask = layer(num_kv_heads, causal=positions == LENGTH), visible(kind, positions)
    exact, rounded = tensors(num_kv_heads, positions), tensors(num_kv_heads, positions, torch.bfloat16)
    expected, _ = sdpa_attention_forward(module, *exact, mask, scaling=0.4)
    output, _ = blocked_attention(module, *rounded, mask, scaling=0.4)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected_grads = torch.autograd.grad(expected, exact, slope)
    grads = torch.autograd.grad(output, rounded, slope.bfloat16())
    for ours, theirs in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


def test_only_bf16_is_computed_by_blocks():
    module, inputs = layer(2, causal=True), tensors(2, LENGTH)
    expected, _ = sdpa_attention_forward(module, *inputs, None)
    assert torch.equal(blocked_attention(module, *inputs, None)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = blocked_attention(module, *inputs, None)
    assert output.dtype == torch.bfloat16 and (output - expected).norm() < 0.02 * expected.norm()


def test_row_without_keys_is_finite():
    module, inputs = layer(2, causal=False), tensors(2, LENGTH, torch.bfloat16)
    mask = visible("padded", LENGTH)
    mask[0, :, :3] = False
    assert torch.isfinite(blocked_attention(module, *inputs, mask)[0]).all()


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_model_uses_blocks_only_where_the_cpu_has_bf16_instructions(monkeypatch, has_bf16):
    """Elsewhere they take more than twice as long as torch's own attention."""
    monkeypatch.setattr(attention, "bf16_is_faster", lambda device: has_bf16)
    calls = []
    monkeypatch.setattr(attention, "_Blocks", lambda *args: calls.append(args) or BLOCKS(*args))
    model = tiny_llama().bfloat16()
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        expected = model(ids).logits
        use_blocked_attention(model, CPU)
        logits = model(ids).logits
    assert bool(calls) == has_bf16 == (model.config._attn_implementation == NAME)
    assert (logits - expected).norm() <= 0.05 * expected.norm()


BLOCKS = attention._Blocks


def test_models_with_attention_of_their_own_keep_it(monkeypatch, caplog):
    monkeypatch.setattr(attention, "bf16_is_faster", lambda device: True)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=4))
    before = bloom.config._attn_implementation
    use_blocked_attention(bloom, CPU)
    assert bloom.config._attn_implementation == before and not caplog.records
    on_gpu = tiny_llama()
    use_blocked_attention(on_gpu, torch.device("cuda"))
    assert on_gpu.config._attn_implementation == "sdpa"
