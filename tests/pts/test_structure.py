"""What a model reveals of its structure."""

from __future__ import annotations

from conftest import tiny_llama

from sparsity.pts.structure import observe


def test_linears_that_read_one_tensor_share_a_hessian():
    model = tiny_llama(layers=1)
    names = [
        f"model.layers.0.{n}"
        for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert [sorted(group) for group in observe(model, set(names))[0][0]] == [
        sorted(names[:2]),
        sorted(names[2:4]),
        names[4:],
    ]
