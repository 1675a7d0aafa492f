"""The final norm's scale after pruning."""

from __future__ import annotations

import pytest
import torch
from pruning import calibration, prune, small_config
from transformers import AutoModelForCausalLM

from sparsity.models import decoder_layers
from sparsity.pts.structure import returns_tuple
from sparsity.pts.final_norm import final_norm
from sparsity.pts.recipe import QUALITY


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "gpt_neox"])
def test_final_hidden_states_come_nearer_to_the_dense_models(architecture):
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    pruned = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    pruned.load_state_dict(dense.state_dict())
    batches = calibration()
    prune(pruned, batches, QUALITY["balanced"])
    outputs = {}

    def hidden_states(model, name):
        norm = final_norm(model, returns_tuple(model, decoder_layers(model)[1]))
        handle = norm.register_forward_hook(lambda module, args, output: outputs.update({name: output}))
        with torch.no_grad():
            model(torch.cat([batch["input_ids"] for batch in batches]))
        handle.remove()
        return norm

    norm, original = hidden_states(pruned, "scaled"), hidden_states(dense, "dense")
    norm.load_state_dict(original.state_dict())
    hidden_states(pruned, "unscaled")
    scale = float((outputs["scaled"] / outputs["unscaled"]).median())
    assert 0.2 < scale < 1
    torch.testing.assert_close(outputs["scaled"], outputs["unscaled"] * scale, rtol=1e-2, atol=1e-3)
    distances = {name: float((outputs[name] - outputs["dense"]).square().sum()) for name in ("scaled", "unscaled")}
    assert distances["scaled"] < distances["unscaled"]
