"""Weights as they are exported."""

from __future__ import annotations

import torch

from sparsity.export.weights import exported


def test_negative_zeros_become_positive():
    state = {
        "a.weight": torch.tensor([[-1.0, 2.0, -0.0, -1e-30]]),
        "a._weight_mask": torch.tensor([[False, True, False, True]]),
    }
    tensor = exported(state, "a.weight", torch.float16)
    assert tensor.dtype == torch.float16 and tensor.tolist() == [[0.0, 2.0, 0.0, 0.0]]
    assert not torch.signbit(tensor).any()
