"""Sparse states: restored exactly, refused where they do not fit, and read without running pickled code."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama

from sparsity.errors import UserError
from sparsity.modelopt_state import load_for_inference, load_state, load_weights, restore_sparse, sparse_masks
from sparsity.models import load_model


def test_restored_model_computes_with_the_masked_weights(model_dir, state_path):
    model = restore_sparse(load_model(str(model_dir)), state_path)
    state = load_state(state_path)["model_state_dict"]
    masked = list(sparse_masks(state))
    assert len(masked) == 14
    reference = load_model(str(model_dir))
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for name, weight, mask in masked:
            assert mask.float().mean() == 0.5
            weights[name].copy_(weight * mask)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits)
    folded = load_for_inference(str(model_dir), None, state_path)
    assert type(folded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert folded.state_dict().keys() == reference.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, folded(ids).logits)


def test_state_of_another_model_is_refused(state_path):
    with pytest.raises(UserError, match="belongs to another model"):
        restore_sparse(tiny_llama(hidden=64), state_path)
    for load in (restore_sparse, lambda model, path: load_weights(model, load_state(path), path)):
        with pytest.raises(UserError, match="belongs to another model"):
            load(tiny_llama(layers=3), state_path)
