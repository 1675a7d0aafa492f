"""Hidden states and layers on their way to the device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_llama
from pruning import ARCHITECTURES, calibration, small_config
from transformers import AutoModelForCausalLM

from sparsity.models import decoder_layers
from sparsity.pts.activations import HiddenStates, LayerPrefetcher


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_runs_on_the_first_tokens_as_on_the_whole_text(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    _, layers = decoder_layers(model)
    states = HiddenStates(model, layers, calibration(), torch.device("cpu"))
    hidden = states.pruned[0][:1]
    with torch.no_grad():
        whole, part = (states.run(layers[0], 0, 0, tokens, exact=True) for tokens in (hidden, hidden[:, :10]))
    torch.testing.assert_close(part, whole[:, :10], rtol=1e-4, atol=1e-5)
