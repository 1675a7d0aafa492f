"""Checkpoints that are damaged, misnamed, tied or built otherwise than usual: the right result, or one clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, TEXTS, assert_clear_error
from forked import run_forked
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.json"
    path.write_text(json.dumps(TEXTS * 3))
    return path


FUSES = int(transformers.__version__.partition(".")[0]) > 4
fused_experts = pytest.mark.skipif(not FUSES, reason="transformers 4 keeps the experts of Mixtral as linear layers")


def change_tensors(source, target, change):
    """A copy of a model folder whose tensors are `change(name → tensor)`."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def prune(model, text, out, *more):
    calibration = ("--calib_data", text, "--calib_size", 4, "--model_max_length", 32, "--batch_size", 2)
    return run_forked(
        "hf_pts.py", "--model_name_or_path", model, "--dtype", "fp32", *calibration, "--output_dir", out, *more
    )


def perplexity(model, text, folder, state=None):
    options = ("--modelopt_restore_path", state) if state else ()
    output = folder / "ppl.json"
    result = run_forked(
        *("eval_ppl.py", "--model_dir", model, "--text", text, "--context", 32, "--dtype", "fp32"),
        *("--output_json", output, *options),
    )
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text())["perplexity"]


def succeed(script, *arguments):
    result = run_forked(script, *arguments)
    assert result.returncode == 0, f"{script}: {result.stderr[-3000:]}"
    return result.stdout


# ------------------------------------------------------------------------------------------------------ loading reports

DAMAGES = {
    "module.": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "_orig_mod.": lambda tensors: {name.replace("layers.0.", "layers.0._orig_mod."): t for name, t in tensors.items()},
    "base_model.": lambda tensors: {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
    "up_proj": lambda tensors: {name: tensor for name, tensor in tensors.items() if "0.mlp.up_proj" not in name},
    "lm_head": lambda tensors: {name: tensor for name, tensor in tensors.items() if "lm_head" not in name},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_missing_tensors_end_in_one_line(damage, model_dir, text, tmp_path):
    model = change_tensors(model_dir, tmp_path / "model", DAMAGES[damage])
    assert_clear_error(prune(model, text, tmp_path / "out"), damage, "lacks")
    assert not (tmp_path / "out" / "pts_modelopt_state.pth").exists()
    evaluated = run_forked("eval_ppl.py", "--model_dir", model, "--text", text, "--context", 32)
    assert_clear_error(evaluated, damage, "lacks")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_nonfinite_weights_are_named_at_load(name, model_dir, text, tmp_path):
    def poison(tensors):
        tensors[name].view(-1)[5] = float("nan")
        return tensors

    model = change_tensors(model_dir, tmp_path / "model", poison)
    result = prune(model, text, tmp_path / "out")
    assert_clear_error(result, name, "NaN")
    assert "--dtype" not in result.stderr


WRONG = {  # what is done to the tensors: words of the error line
    "bias": (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, ["q_proj.bias", "config.json"]),
    "shape": (
        lambda t: {**t, "model.layers.1.mlp.up_proj.weight": torch.ones(48, 32)},
        ["up_proj", "config.json", *(["[48, 32]", "[64, 32]"] if FUSES else [])],
    ),
    "adapter": (
        lambda t: {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in t.items()},
        ["LoRA", "merge_and_unload"],
    ),
    "int8": (
        lambda t: {name: tensor.to(torch.int8) if "q_proj" in name else tensor for name, tensor in t.items()},
        ["quantized", "I8"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_the_config_does_not_describe(wrong, model_dir, text, tmp_path):
    change, words = WRONG[wrong]
    assert_clear_error(prune(change_tensors(model_dir, tmp_path / "m", change), text, tmp_path / "out"), *words)


def test_truncated_file_is_named(model_dir, text, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert_clear_error(prune(model, text, tmp_path / "out"), str(file), "truncated")


def test_weight_beyond_float16(model_dir, text, tmp_path):
    def enlarge(tensors):
        tensors["model.norm.weight"][5] = 7e4
        return tensors

    model = change_tensors(model_dir, tmp_path / "model", enlarge)
    assert_clear_error(prune(model, text, tmp_path / "out", "--dtype", "fp16"), "model.norm.weight", "--dtype bf16")
    assert prune(model, text, tmp_path / "out").returncode == 0


def test_nan_in_a_router_bias_is_named(text, tmp_path):
    def poison(tensors):
        next(tensor for name, tensor in tensors.items() if "e_score_correction_bias" in name)[0] = float("nan")
        return tensors

    model = change_tensors(save_model("deepseek_v3", tmp_path / "clean"), tmp_path / "model", poison)
    assert_clear_error(prune(model, text, tmp_path / "out"), "e_score_correction_bias", "NaN")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_more_layers_than_the_config_says(family, text, tmp_path):
    model = change_config(save_model(family, tmp_path / "model"), num_hidden_layers=2)
    assert_clear_error(prune(model, text, tmp_path / "out"), "model.layers.2", "num_hidden_layers")


def test_layers_for_several_tokens_are_exported_as_they_are(model_dir, text, tmp_path):
    """Multi-token prediction, as DeepSeek and GLM have it; transformers leaves it out of the model."""

    def add_layer(tensors):
        layer = {name.replace("layers.1", "layers.2"): t + 0 for name, t in tensors.items() if "layers.1." in name}
        return {**tensors, **layer, "model.layers.2.eh_proj.weight": torch.ones(8, 8)}

    model = change_tensors(model_dir, tmp_path / "model", add_layer)
    state = tmp_path / "pts" / "pts_modelopt_state.pth"
    result = prune(model, text, state.parent)
    assert result.returncode == 0
    assert result.stderr.count("tensor(s) of") == 1
    succeed("export_hf.py", "--model_dir", model, "--modelopt_restore_path", state, "--output_dir", tmp_path / "new")
    source, exported = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "new"))
    assert source.keys() == exported.keys()
    assert all(torch.equal(source[name], exported[name]) for name in source if "layers.2." in name)


@fused_experts
@pytest.mark.parametrize("missing", [".experts.1.", ".experts.1.w1"])
def test_mixture_that_lacks_an_expert(missing, text, tmp_path):
    def drop(tensors):
        return {name: tensor for name, tensor in tensors.items() if missing not in name}

    model = change_tensors(save_model("mixtral", tmp_path / "whole"), tmp_path / "model", drop)
    assert_clear_error(prune(model, text, tmp_path / "out"), "mlp.experts.")


def quantized_fp8(source, target):
    """A copy of a model folder whose linear layers are stored in fp8 with scales, and whose config.json is silent."""

    def quantize(tensors):
        layers = {name: tensor for name, tensor in tensors.items() if "proj" in name}
        scales = {f"{name}_scale": tensor.abs().max() / 448 for name, tensor in layers.items()}
        packed = {name: (t / scales[f"{name}_scale"]).to(torch.float8_e4m3fn) for name, t in layers.items()}
        return {**tensors, **packed, **scales}

    return change_tensors(source, target, quantize)


def test_quantized_weights_without_a_word_in_the_config(model_dir, text, tmp_path):
    model = quantized_fp8(model_dir, tmp_path / "model")
    assert_clear_error(prune(model, text, tmp_path / "out"), "quantized", "F8_E4M3")
    assert_clear_error(run_forked("eval_ppl.py", "--model_dir", model, "--text", text, "--context", 32), "quantized")


def test_quantization_named_in_the_text_config(text, tmp_path):
    model = save_model("gemma3", tmp_path / "model")
    nested = json.loads((model / "config.json").read_text())["text_config"]
    change_config(model, text_config={**nested, "quantization_config": {"quant_method": "fp8"}})
    assert_clear_error(prune(model, text, tmp_path / "out"), "is quantized (fp8)")


# ------------------------------------------------------------------------------------------------ another model's state


@pytest.fixture(scope="module")
def pruned_state(model_dir, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    assert prune(model_dir, text, folder).returncode == 0
    return folder / "pts_modelopt_state.pth"


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 0.1}, {"hidden_act": "relu"}, {"rope_parameters": {"rope_theta": 9.0}}], ids=str
)
def test_state_of_a_model_that_computes_otherwise(change, model_dir, pruned_state, text, data_dir, tmp_path):
    if not change.keys() <= json.loads((model_dir / "config.json").read_text()).keys():
        pytest.skip("transformers 4 has rope_theta")
    other = change_config(shutil.copytree(model_dir, tmp_path / "other"), **change)
    options = ("--model_dir", other, "--modelopt_restore_path", pruned_state)
    assert_clear_error(run_forked("eval_ppl.py", *options, "--text", text, "--context", 32), *change)
    assert_clear_error(run_forked("export_hf.py", *options, "--output_dir", tmp_path / "exported"), *change)
    training = ("--data_path", data_dir, "--output_dir", tmp_path / "sat", "--max_length", 200)
    assert_clear_error(run_forked("finetune.py", "--model", other, "--restore_path", pruned_state, *training), *change)


def test_state_fits_whatever_does_not_change_its_model(model_dir, pruned_state, text, tmp_path):
    changes = {"use_cache": False, "attention_dropout": 0.5, "max_position_embeddings": 4096, "pad_token_id": 3}
    other = change_config(shutil.copytree(model_dir, tmp_path / "other"), **changes)
    assert perplexity(other, text, tmp_path, pruned_state) == perplexity(model_dir, text, tmp_path, pruned_state)


# ----------------------------------------------------------------------------------------------------------------- ties


def test_head_stored_apart_from_a_config_that_says_tied(model_dir, text, data_dir, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    change_config(model, tie_word_embeddings=True)
    state = tmp_path / "pts" / "pts_modelopt_state.pth"
    assert prune(model, text, state.parent).returncode == 0
    expected = perplexity(model, text, tmp_path, state)
    training = ("--data_path", data_dir, "--max_length", 200, "--max_steps", 1, "--train_bs", 2, "--lr", 1e-12)
    succeed("finetune.py", "--model", model, "--restore_path", state, "--output_dir", tmp_path / "sat", *training)
    tuned = tmp_path / "sat" / "finetuned_modelopt_state.pth"
    assert perplexity(model, text, tmp_path, tuned) == pytest.approx(expected, rel=1e-4)
    succeed(
        "export_hf.py", "--model_dir", model, "--modelopt_restore_path", state, "--output_dir", tmp_path / "exported"
    )
    assert perplexity(tmp_path / "exported", text, tmp_path) == pytest.approx(expected, rel=1e-4)


def test_state_of_an_untied_model_does_not_fit_a_tied_one(model_dir, state_path, text, tmp_path):
    def tie(tensors):
        return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}

    tied = change_config(change_tensors(model_dir, tmp_path / "tied", tie), tie_word_embeddings=True)
    options = ("--model_dir", tied, "--modelopt_restore_path", state_path)
    assert_clear_error(run_forked("eval_ppl.py", *options, "--text", text, "--context", 32), "lm_head.weight", "tied")
    assert_clear_error(run_forked("export_hf.py", *options, "--output_dir", tmp_path / "exported"), "tied")


# ---------------------------------------------------------------------------------------------------------- dead inputs


def opt_with_dead_units(folder, tokenizer, rest):
    """An OPT of which half of the MLP's units never fire; `rest` scales what the second matrix has for them."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        **{"vocab_size": 400, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"word_embed_proj_dim": 32, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1},
    )
    model = OPTForCausalLM(config)
    dead = torch.arange(64) % 4 < 2
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight.normal_(0, 0.2)
            layer.fc2.weight.normal_(0, 0.2)
            layer.fc1.bias[dead] = -100.0
            layer.fc2.weight[:, dead] *= rest
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_dead_inputs_cost_nothing(method, tokenizer, text, tmp_path):
    outputs = []
    for rest in (1.0, 20.0):
        model = opt_with_dead_units(tmp_path / f"model{rest}", tokenizer, rest)
        out = tmp_path / f"out{rest}"
        assert prune(model, text, out, "--sparsity_fmt", method).returncode == 0
        rows = [json.loads(line) for line in (out / "pts_layers.jsonl").read_text().splitlines()]
        errors = [row["relative_error"] for row in rows if row["name"].endswith("fc2")]
        assert max(errors) < 1e-6
        tensors = torch.load(out / "pts_modelopt_state.pth", weights_only=True)["model_state_dict"]
        dead = tensors["model.decoder.layers.0.fc1.bias"] < -50  # pruning may have put the units into another order
        assert not tensors["model.decoder.layers.0.fc2.weight"][:, dead].any()
        outputs.append(tensors)
    for name, tensor in outputs[0].items():
        assert torch.equal(tensor, outputs[1][name]), name


# ----------------------------------------------------------------------------------------------------- other structures


def skip_unknown(family):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"no {family} in this release of transformers")


def save_model(model_type, folder, **settings):
    from benchmarks.tiny_models import save_tiny_model

    skip_unknown(model_type)
    save_tiny_model(model_type, folder, **settings)
    return folder


def test_layers_without_statistics_have_no_error(text, tmp_path):
    model = save_model("mamba", tmp_path / "model")
    out = tmp_path / "out"
    assert prune(model, text, out).returncode == 0
    for line in (out / "pts_layers.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["relative_error"] is None or row["relative_error"] < 2, row


@pytest.mark.parametrize("family", ["qwen3_5", "llama4", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_text_model_of_a_multimodal_folder(family, text, tmp_path):
    """The exported folder opens as its configuration says, with the vision weights of the source."""
    model, state = tmp_path / "model", tmp_path / "pts" / "pts_modelopt_state.pth"
    whole = save_multimodal(family, model)
    result = prune(model, text, state.parent)
    assert result.returncode == 0, result.stderr
    succeed("export_hf.py", "--model_dir", model, "--modelopt_restore_path", state, "--output_dir", tmp_path / "new")
    _, report = whole.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "new" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        if "vision" in name or "visual" in name:
            assert torch.equal(before[name], after[name])
    assert perplexity(tmp_path / "new", text, tmp_path) == pytest.approx(perplexity(model, text, tmp_path, state))


def save_multimodal(family, folder):
    """Save a model with its vision tower; returns its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from benchmarks.tiny_models import config_of, make_tokenizer

    skip_unknown(family)
    config = config_of(family)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    torch.manual_seed(0)
    whole(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return whole


def test_decoder_is_not_the_vision_tower(text, tmp_path):
    model = save_model("gemma3", tmp_path / "model", vision_config={"hidden_size": 256, "intermediate_size": 512})
    result = prune(model, text, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "vision" not in (tmp_path / "out" / "pts_layers.jsonl").read_text()


METHODS = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "mxfp4": {"quant_method": "mxfp4"},
}


@pytest.mark.parametrize("method", METHODS)
def test_quantized_checkpoints_are_refused_at_once(method, model_dir, text, tmp_path):
    model = change_config(shutil.copytree(model_dir, tmp_path / "model"), quantization_config=METHODS[method])
    assert_clear_error(prune(model, text, tmp_path / "out"), "quantized", method)
    if method not in ("fp8", "mxfp4"):  # which transformers reads as they are
        evaluated = run_forked("eval_ppl.py", "--model_dir", model, "--text", text, "--context", 32)
        assert_clear_error(evaluated, "cannot load")


def test_generated_text_without_a_home(model_dir, text, tmp_path, monkeypatch):
    """Where the user's cache cannot be written, the output folder takes what the model writes."""
    closed = tmp_path / "closed"
    closed.write_text("")  # a file, so that nobody, root included, can make folders in it
    monkeypatch.setenv("XDG_CACHE_HOME", str(closed / "cache"))
    result = prune(model_dir, f"{text}=0.5,self=0.5", tmp_path / "out")
    assert result.returncode == 0, result.stderr


# -------------------------------------------------------------------------------------------------------------- experts


@pytest.fixture(scope="module")
def mixture(text, tmp_path_factory):
    """A Mixtral, which stores experts one by one, and its pruned state."""
    folder = tmp_path_factory.mktemp("mixture")
    model = save_model("mixtral", folder / "model")
    result = prune(model, text, folder / "pts")
    assert result.returncode == 0, result.stderr
    return model, folder / "pts" / "pts_modelopt_state.pth", result


@fused_experts
def test_state_with_experts_is_restored_by_modelopt_alone(mixture):
    import modelopt.torch.opt as mto
    from transformers import AutoModelForCausalLM

    model, state, result = mixture
    assert "matrices of experts" in result.stdout
    restored = mto.restore(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), state)
    for layer in restored.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            assert bool(((weight != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())


@fused_experts
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_holds_the_zeros_of_experts(processes, mixture, data_dir, tmp_path):
    from sparsity.modelopt_state import load_state, sparse_masks

    model, state, _ = mixture
    options = ("--model", model, "--restore_path", state, "--data_path", data_dir, "--output_dir", tmp_path / "sat")
    training = ("--max_length", 200, "--max_steps", 2, "--train_bs", 2, "--lr", 1e-3)
    command = ["bash", "launch_finetune.sh", f"--num_processes={processes}", *map(str, (*options, *training))]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    before = load_state(state)["model_state_dict"]
    after = load_state(tmp_path / "sat" / "finetuned_modelopt_state.pth")["model_state_dict"]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert not torch.equal(before[name], after[name])
    masks = {name: mask for name, _, mask in sparse_masks(before)}
    assert masks.keys() == {name for name, _, _ in sparse_masks(after)}
    for name, weight, mask in sparse_masks(after):
        assert torch.equal(mask, masks[name])
        assert not weight[~mask].any()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_verification_counts_experts(family, text, tmp_path):
    """In the file, Mixtral's experts are matrices of their own; gpt-oss stores them together and transposed."""
    model, state = save_model(family, tmp_path / "model"), tmp_path / "pts" / "pts_modelopt_state.pth"
    dense = run_forked("verify_sparsity.py", model, "--require", "2:4")
    assert_clear_error(dense, "not 2:4")
    assert "experts" in dense.stdout
    assert prune(model, text, state.parent).returncode == 0
    succeed("export_hf.py", "--model_dir", model, "--modelopt_restore_path", state, "--output_dir", tmp_path / "new")
    assert "experts" in succeed("verify_sparsity.py", tmp_path / "new", "--require", "2:4")
    assert perplexity(tmp_path / "new", text, tmp_path) == pytest.approx(perplexity(model, text, tmp_path, state))


@fused_experts
def test_verification_names_experts_that_were_left_dense(mixture, text, tmp_path):
    model, state = mixture[0], tmp_path / "pts" / "pts_modelopt_state.pth"
    assert prune(model, text, state.parent, "--ignore", "*experts*").returncode == 0
    table = succeed("verify_sparsity.py", state, "--require", "2:4")
    assert "dense, without a mask: 8 matrices" in table
    assert "mlp.experts.down_proj" in table
    assert "without a mask" not in succeed("verify_sparsity.py", mixture[1], "--require", "2:4")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_fast_pruning_of_experts(family, text, tmp_path):
    """It takes the statistics of all else from the dense model, and the experts' from what the router sends them."""
    model, state = save_model(family, tmp_path / "model"), tmp_path / "pts" / "pts_modelopt_state.pth"
    result = prune(model, text, state.parent, "--quality", "fast")
    assert result.returncode == 0, result.stderr
    assert "experts" in succeed("verify_sparsity.py", state, "--require", "2:4")


@fused_experts
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_dry_run_counts_experts(family, text, tmp_path):
    model = save_model(family, tmp_path / "model")
    assert "4 experts, 4 at a time" in prune(model, text, tmp_path / "pts", "--dry_run").stdout
