"""Export in 8 bits: the files, their zeros, and that they compute what modelopt simulates."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TEXTS, assert_clear_error, run_inline
from pruning import ARCHITECTURES, small_config
from safetensors.torch import load_file, save_file

from sparsity.errors import UserError
from sparsity.export import quantize
from sparsity.export.companions import write_companions
from sparsity.export.formats import CALIBRATED, FORMATS
from sparsity.modelopt_state import load_for_inference, load_state, load_weights, sparse_masks
from sparsity.models import load_config, load_model
from sparsity.sources import draw_sequences, parse_sources

ALGORITHMS = {
    "int8": "W8A8_SQ_PER_CHANNEL",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "int8_wo": "W8A16",
    "fp8": "FP8",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN",
}
IDS = torch.arange(2, 62).view(2, 30)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calib.json"
    path.write_text(json.dumps(TEXTS * 4))
    return path


@pytest.fixture(scope="module")
def export(tmp_path_factory, model_dir, state_path, calibration):
    """Export the tiny model in a format; each format once."""
    folder = tmp_path_factory.mktemp("quantized")

    def run(name):
        target = folder / name
        if not target.exists():
            command = ["export_hf.py", "--model_dir", model_dir, "--modelopt_restore_path", state_path]
            command += ["--output_dir", target, "--quantization", name, "--dtype", "fp32"]
            if name in CALIBRATED:
                command += ["--calib_data", calibration, "--calib_size", 4, "--model_max_length", 32]
            result = run_inline(*command)
            assert result.returncode == 0, result.stderr
            assert "all 9,216 pruned weights are 0 in the quantized files" in result.stdout
        return target

    return run


@pytest.fixture(scope="module")
def masks(state_path):
    state = load_state(state_path)["model_state_dict"]
    return {name: mask for name, _, mask in sparse_masks(state)}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", FORMATS)
def test_written_files(export, masks, name):
    folder = export(name)
    tensors = load_file(folder / "model.safetensors")
    kind = torch.float8_e4m3fn if name.startswith("fp8") else torch.int8
    for weight, mask in masks.items():
        assert tensors[weight].dtype == kind
        assert not tensors[weight].view(torch.uint8)[~mask].any()
        assert tensors[weight].view(torch.uint8)[mask].count_nonzero() > 0.9 * mask.sum()
    assert tensors["lm_head.weight"].dtype == tensors["model.embed_tokens.weight"].dtype == torch.float32
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["quant_algo"]) == ("modelopt", ALGORITHMS[name])
    assert json.loads((folder / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == ALGORITHMS[name]
    assert (folder / "tokenizer.json").is_file() and ALGORITHMS[name] in (folder / "README.md").read_text()
    table = run_inline("verify_sparsity.py", folder, "--require", "2:4")
    assert table.returncode == 0 and "14 of 14 matrices are 2:4" in table.stdout


@pytest.mark.parametrize("name", FORMATS)
def test_the_folder_computes_nearly_what_the_sparse_model_does(export, model_dir, state_path, name):
    sparse = logits(load_for_inference(str(model_dir), None, state_path))
    ours = logits(load_for_inference(str(export(name)), None, None))
    error = (ours - sparse).norm() / sparse.norm()
    assert 1e-4 < error < 0.1


# SmoothQuant's export joins factors. Of fp8_pc_pt an activation at the border of two values may fall to either side.
@pytest.mark.parametrize(("name", "rounding"), [("int8", 2e-4), ("int8_wo", 2e-4), ("fp8", 2e-4), ("fp8_pc_pt", 5e-4)])
def test_the_folder_computes_what_modelopt_simulates(
    export, model_dir, state_path, calibration, tokenizer, name, rounding
):
    batches = []
    if name in CALIBRATED:
        batches = list(torch.cat(draw_sequences(tokenizer, parse_sources(str(calibration)), 4, 32, seed=0)).split(1))
    model = load_for_inference(str(model_dir), None, state_path)
    expected = logits(quantize.quantize(model, FORMATS[name], batches, torch.device("cpu")))
    ours = logits(load_for_inference(str(export(name)), None, None))
    torch.testing.assert_close(ours, expected, atol=rounding, rtol=0)


def test_scripts_evaluate_the_folder_and_refuse_to_prune_it(export, calibration, tmp_path):
    result = run_inline("eval_ppl.py", "--model_dir", export("int8"), "--text", calibration, "--context", "32")
    assert result.returncode == 0 and "perplexity: " in result.stdout
    command = ["hf_pts.py", "--model_name_or_path", export("int8"), "--calib_data", calibration, "--dtype", "fp32"]
    refused = run_inline(*command, "--model_max_length", 32, "--calib_size", 2, "--output_dir", tmp_path / "out")
    assert_clear_error(refused, "is quantized (W8A8_SQ_PER_CHANNEL)", "unquantized model")


def test_unknown_algorithm_is_refused(export, tmp_path):
    config = json.loads((export("int8") / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "NVFP4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized to NVFP4; only"):
        load_model(str(tmp_path), quantized=True)


@pytest.mark.parametrize(("name", "byte"), [("int8", 1), ("fp8", 0x80)], ids=["a weight", "-0.0"])
def test_anything_under_a_mask_is_found(export, masks, state_path, model_dir, tmp_path, name, byte):
    tensors = load_file(export(name) / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    row, column = (~masks[weight]).nonzero()[0].tolist()
    tensors[weight].view(torch.uint8)[row, column] = byte
    save_file(tensors, tmp_path / "model.safetensors")
    state = load_state(state_path)["model_state_dict"]
    with pytest.raises(UserError, match=f"1 pruned weights of {weight} are not 0"):
        quantize.check_zeros(tmp_path, load_model(str(model_dir)), state)


def test_a_failed_export_leaves_nothing(model_dir, state_path, tmp_path, monkeypatch):
    import modelopt.torch.export

    def fail(*args, **kwargs):
        raise NotImplementedError("no such experts")

    monkeypatch.setattr(modelopt.torch.export, "export_hf_checkpoint", fail)
    command = ["export_hf.py", "--model_dir", model_dir, "--modelopt_restore_path", state_path]
    result = run_inline(*command, "--output_dir", tmp_path / "out", "--quantization", "int8_wo")
    assert_clear_error(result, "modelopt cannot export LlamaForCausalLM", "no such experts")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_families(tmp_path, architecture):
    import modelopt.torch.sparsity as mts
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(architecture)).save_pretrained(tmp_path / "dense")
    dense = str(tmp_path / "dense")
    state = mts.sparsify(load_model(dense), "sparse_magnitude").state_dict()
    model = load_model(dense)
    load_weights(model, {"model_state_dict": state}, "state.pth")
    expected = logits(model)
    model = quantize.quantize(model, FORMATS["int8_sq"], list(IDS.split(1)), torch.device("cpu"))
    (tmp_path / "out").mkdir()
    settings = quantize.write_quantized(model, "5GB", tmp_path / "out")
    assert quantize.check_zeros(tmp_path / "out", load_model(dense), state) > 10_000
    write_companions(tmp_path / "dense", load_config(dense), "float32", tmp_path / "out", settings)
    ours = logits(load_model(str(tmp_path / "out"), quantized=True))
    assert (ours - expected).norm() / expected.norm() < 0.05
