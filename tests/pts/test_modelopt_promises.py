"""What modelopt promises of a sparse state, kept by the states that our pruning writes."""

from __future__ import annotations

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import modelopt.torch.sparsity as mts
import pytest
import torch
from conftest import tiny_llama
from pruning import calibration, prune

from sparsity.modelopt_state import sparse_masks
from sparsity.pts.recipe import Recipe
from sparsity.pts.state import save_state


@pytest.fixture(scope="module")
def state_file(tmp_path_factory):
    """A state of the tiny model, pruned by SparseGPT and saved as hf_pts.py saves it."""
    model = tiny_llama()
    path = tmp_path_factory.mktemp("pruned") / "state.pth"
    save_state(model, prune(model), path, Recipe())
    return path


@pytest.fixture
def restored(state_file):
    return mto.restore(tiny_llama(), state_file)


def masks_of(model):
    return {name: mask.clone() for name, _, mask in sparse_masks(model.state_dict())}


def zero_under(weights: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> bool:
    """Whether each mask is 2:4 and its weight zero wherever it prunes."""
    assert len(masks) == 14
    assert all(bool((mask.view(-1, 4).sum(1) == 2).all()) for mask in masks.values())
    return all(not weights[name][~mask].any() for name, mask in masks.items())


def train_one_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    ids = calibration()[0]["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model.eval()


def quantize(model):
    def forward_loop(prepared):
        for batch in calibration():
            prepared(**batch)

    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop)


def quantized_weights(model, masks):
    """What each layer multiplies with: its weight after the weight quantizer."""
    modules = {name.removesuffix(".weight"): name for name in masks}
    return {
        weight: model.get_submodule(module).weight_quantizer(model.get_submodule(module).weight)
        for module, weight in modules.items()
    }


def test_order_of_calls_of_upstream(restored, tmp_path):
    """Prune, save, restore, train, save, restore, export, quantize: each on the outcome of the call before."""
    masks = masks_of(restored)
    mto.save(train_one_step(restored), tmp_path / "trained.pth")
    model = quantize(mts.export(mto.restore(tiny_llama(), tmp_path / "trained.pth").eval()))
    mto.save(model, tmp_path / "quantized.pth")
    again = mto.restore(tiny_llama(seed=1), tmp_path / "quantized.pth").eval()
    ids = calibration()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert zero_under(quantized_weights(again, masks), masks)
