"""The commands of NVIDIA Model Optimizer's weight sparsity example, as its README and its tests give them.

What differs: the CPU, a tiny random model, and local text in place of the hub's. The model has 32 positions and a
tokenizer without a padding token, as the reference's own test model has.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEXTS, run_inline

from sparsity.files import read_jsonl
from sparsity.inspection import inspect_path
from sparsity.modelopt_state import load_for_inference, load_state, restore_sparse, sparse_masks
from sparsity.models import load_model
from sparsity.sat.callbacks import read_log
from sparsity.text import DEFAULT_INSTRUCTION, DEFAULT_TEMPLATE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a random Llama with 32 positions; its tokenizer writes the prompt in over 64 tokens and cannot pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    prompt = DEFAULT_TEMPLATE.prompt(DEFAULT_INSTRUCTION, "")
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert tokenizer.pad_token is None and len(tokenizer(prompt)["input_ids"]) > 64
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes, bos_token_id=0, eos_token_id=1)
    folder = tmp_path_factory.mktemp("reference") / "tiny_llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data folder as the reference's tests prepare it; a local file stands for cnn_dailymail."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"article": f"Part {number}. {' '.join(TEXTS)}", "highlights": TEXTS[number % 5].split(",")[0]}
        for number in range(100)
    ]
    (folder / "articles.json").write_text(json.dumps(rows))
    words = ["--save_path", folder, "--max_samples", "64"]
    result = run_inline("data_prep.py", *words, "--source", folder / "articles.json", "--eval_fraction", "0.9")
    assert result.returncode == 0, result.stderr
    shutil.copy(folder / "cnn_eval.json", folder / "cnn_train.json")
    return folder


def prune(model, output, *more) -> subprocess.CompletedProcess:
    result = run_inline(*("hf_pts.py", "--model_name_or_path", model, "--device", "cpu", "--output_dir", output, *more))
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, model, data):
    """The state of the reference's SparseGPT test; (path, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("pts") / "pts_output"
    words = ["--sparsity_fmt", "sparsegpt", "--dtype", "bf16", "--calib_size", "8", "--model_max_length", "64"]
    result = prune(model, folder, *words, "--dataset", data / "cnn_train.json")
    return folder / "pts_modelopt_state.pth", result


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, model, data, pruned):
    """The fine-tuned state of the reference's test; (path, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("sat") / "finetune_output"
    words = ["--num_epochs", "0.001", "--max_length", "64", "--train_bs", "1", "--eval_bs", "1", "--model", model]
    words += ["--restore_path", pruned[0], "--output_dir", folder, "--data_path", data]
    words += ["--use_flash_attn", "False", "--calib_size", "512", "--sparse_fmt", "dense", "--tf32", "True"]
    command = ["bash", "launch_finetune.sh", *map(str, words)]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return folder / "finetuned_modelopt_state.pth", result


def mode_of(path) -> str:
    """The mode that a state records."""
    return load_state(path)["modelopt_state"]["modelopt_state_dict"][0][0]


def opens_with_modelopt(model, path) -> dict[str, torch.Tensor]:
    """Restore a state in the way that modelopt documents, without our helpers; returns the weights."""
    import modelopt.torch.opt as mto
    from transformers import AutoModelForCausalLM

    restored = mto.restore(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), path)
    masked = list(sparse_masks(restored.state_dict()))
    assert len(masked) == 14 and all((weight[~mask] == 0).all() for _, weight, mask in masked)
    return restored.state_dict()


# ------------------------------------------------------------------------------------------------ the reference's tests


def test_data_has_the_files_and_fields_of_the_reference(data):
    for name in ("cnn_train.json", "cnn_eval.json"):
        records = json.loads((data / name).read_text())
        assert len(records) == 64
        assert all(record.keys() == {"instruction", "input", "output"} for record in records)


def test_llama_sparsity(model, data, tmp_path):
    """Magnitudes need no text, and no tokenizer either; text only adds the error of each layer to the log."""
    import modelopt.torch.sparsity as mts

    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    words = ["--sparsity_fmt", "sparse_magnitude", "--dtype", "fp32", "--calib_size", "8", "--model_max_length", "32"]
    result = prune(bare, tmp_path / "without", *words)
    assert "warning" not in result.stderr
    prune(model, tmp_path / "with", *words, "--calib_data", data / "cnn_train.json")
    theirs = mts.sparsify(load_model(str(model)), "sparse_magnitude").state_dict()
    for folder, has_errors in (("without", False), ("with", True)):
        state = tmp_path / folder / "pts_modelopt_state.pth"
        assert mode_of(state) == "sparse_magnitude"
        opens_with_modelopt(model, state)
        ours = load_state(state)["model_state_dict"]
        masks = [name for name in theirs if name.endswith("_weight_mask")]
        assert len(masks) == 14 and all(torch.equal(ours[name], theirs[name]) for name in masks)
        log = read_jsonl(tmp_path / folder / "pts_layers.jsonl", "log")
        assert {row["relative_error"] is not None for row in log} == {has_errors}


def test_llama_sparsity_finetune(model, pruned, finetuned):
    state, result = pruned
    assert mode_of(state) == "sparsegpt"
    opens_with_modelopt(model, state)
    longer = [line for line in result.stderr.splitlines() if "64 is more than the 32 positions" in line]
    assert len(longer) == 1 and longer[0].startswith("warning: ")
    path, result = finetuned
    opens_with_modelopt(model, path)
    before, after = (load_state(file)["model_state_dict"] for file in (state, path))
    changed = [name for name, weight, mask in sparse_masks(after) if not torch.equal(weight[mask], before[name][mask])]
    assert len(changed) == 14
    assert read_log(path.parent / "train_log.jsonl")[-1]["eval_loss"] > 0
    # The training and the evaluation file are the same here, so that they are tokenized once and warned of once.
    assert result.stderr.count("of 64 records") == 1
    assert result.stderr.count("--calib_size, --sparse_fmt ignored") == 1
    assert torch.cuda.is_available() or result.stderr.count("--tf32 is ignored") == 1
    assert (path.parent / "run.json").is_file()


def test_wanda_is_recorded_as_masks_by_score(model, data, tmp_path):
    words = ["--sparsity_fmt", "wanda", "--dtype", "fp32", "--calib_size", "2", "--model_max_length", "32"]
    prune(model, tmp_path, *words, "--calib_data", data / "cnn_train.json")
    assert mode_of(tmp_path / "pts_modelopt_state.pth") == "sparse_magnitude"


# ---------------------------------------------------------------------------------------------- the reference's README


def test_readme_pruning_with_several_texts(model, data, tmp_path):
    words = ["--model_max_length", "1024", "--dtype", "fp16", "--sparsity_fmt", "sparsegpt", "--calib_size", "128"]
    (tmp_path / "more.txt").write_text("\n".join(TEXTS * 40))
    texts = f"{data / 'cnn_train.json'}=0.5,{tmp_path / 'more.txt'}=0.5"
    prune(model, tmp_path / "pts", *words, "--calib_data", texts)
    opens_with_modelopt(model, tmp_path / "pts" / "pts_modelopt_state.pth")


def test_readme_evaluation(model, data, finetuned, tmp_path):
    (tmp_path / "cnn_eval.json").write_text(json.dumps(json.loads((data / "cnn_eval.json").read_text())[:2]))
    words = ["--batch_size", "1", "--beam_size", "4", "--model_max_length", "1024"]
    result = run_inline(
        *("eval.py", "--model_dir", model, "--data_path", tmp_path / "cnn_eval.json", *words),
        *("--modelopt_restore_path", finetuned[0], "--device", "cpu"),
    )
    assert result.returncode == 0, result.stderr
    label, _, scores = result.stdout.splitlines()[-1].partition(": ")
    rouge = ast.literal_eval(scores)
    assert label == "ROUGE scores" and list(rouge) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert all(type(value) is float and round(value, 4) == value for value in rouge.values())
    assert "more than the 32 positions" in result.stderr


def test_readme_export_without_a_state(model, tmp_path):
    """export_hf_ckpt.py as the reference types it; without a state it exports the dense model."""
    from transformers import AutoModelForCausalLM

    words = ["--device", "cuda", "--dtype", "fp16", "--model_max_length", "2048", "--output_dir", tmp_path / "out"]
    result = run_inline("export_hf_ckpt.py", "--model_name_or_path", model, *words)
    assert result.returncode == 0, result.stderr
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (model, tmp_path / "out"))
    weights = ours.state_dict()
    assert all(torch.equal(weights[name], weight.half()) for name, weight in theirs.state_dict().items())
    assert "sparse" not in (tmp_path / "out" / "README.md").read_text()


def test_training_without_a_state_gives_the_dense_baseline(model, data, tmp_path):
    words = ["--max_steps", 2, "--max_length", 96, "--train_bs", 2, "--lr", 1e-3, "--report_to", "none"]
    words += ["--fsdp", "full_shard auto_wrap"]  # as `accelerate launch --cpu` starts it, in one process
    result = run_inline("finetune.py", "--model", model, "--data_path", data, "--output_dir", tmp_path / "sat", *words)
    assert result.returncode == 0, result.stderr
    assert "the dense model is trained" in result.stderr and "dense, all weights finite" in result.stdout
    assert result.stderr.count("--fsdp full_shard auto_wrap has no effect in one process") == 1
    settings = json.loads((tmp_path / "sat" / "run.json").read_text())
    assert settings["restore_path"] is None and settings["sparsity"] == "dense"
    state = tmp_path / "sat" / "finetuned_modelopt_state.pth"
    weights, before = load_state(state)["model_state_dict"], load_model(str(model)).state_dict()
    assert weights.keys() == before.keys() and not list(sparse_masks(weights))
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    report = tmp_path / "eval"
    words = ["--text", data / "cnn_eval.json", "--context", "32", "--max_blocks", "2", "--device", "cpu"]
    words += ["--modelopt_restore_path", state, "--output_json", report / "perplexity.json"]
    assert run_inline("eval_ppl.py", "--model_dir", model, *words).returncode == 0
    assert json.loads((report / "perplexity.json").read_text())["sparsity"] == "dense"
    words = ["--run", f"SAT={report}", "--state", f"SAT={state}", "--output_dir", tmp_path / "report"]
    result = run_inline("report.py", *words, "--model_dir", model)
    assert result.returncode == 0 and "0 of 14" in result.stdout
    words = ["--modelopt_restore_path", state, "--output_dir", tmp_path / "exported"]
    assert run_inline("export_hf.py", "--model_dir", model, *words).returncode == 0
    assert ", dense" in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.parametrize("pattern", ["4:8", "6:8", "8:16", "unstructured:0.5"])
def test_other_patterns_end_to_end(model, data, tmp_path, pattern):
    """The state records its pattern in modelopt's metadata; verification, card and report read it from there."""
    words = ["--calib_data", data / "cnn_train.json", "--calib_size", 4, "--model_max_length", 32, "--dtype", "fp32"]
    prune(model, tmp_path, "--pattern", pattern, *words)
    state, trained = tmp_path / "pts_modelopt_state.pth", tmp_path / "sat" / "finetuned_modelopt_state.pth"
    opens_with_modelopt(model, state)
    words = ["--max_steps", 1, "--max_length", 96, "--train_bs", 2, "--report_to", "none", "--restore_path", state]
    words += ["--data_path", data, "--output_dir", tmp_path / "sat"]
    assert run_inline("finetune.py", "--model", model, *words).returncode == 0
    for path in (state, trained):
        result = run_inline("verify_sparsity.py", path)
        assert f"14 of 14 matrices are {pattern}" in result.stdout, result.stdout
    words = ["--modelopt_restore_path", trained, "--output_dir", tmp_path / "exported"]
    result = run_inline("export_hf.py", "--model_dir", model, *words)
    assert f"14 of 14 pruned matrices are {pattern}" in result.stdout, result.stderr
    assert f"pruned to {pattern}" in (tmp_path / "exported" / "README.md").read_text()
    assert run_inline("verify_sparsity.py", tmp_path / "exported", "--require", pattern).returncode == 0
    assert {report.pattern for report in inspect_path(trained)} == {pattern}


# ---------------------------------------------------------------------------------------------------- states exchanged


@pytest.fixture(scope="module")
def padded_state(tmp_path_factory, model):
    """A state in the reference's way: [PAD] is added to the tokenizer and a row to embedding and head, then pruned."""
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity as mts

    dense = load_model(str(model))
    rows = dense.get_input_embeddings().weight.shape[0] + 1
    dense.resize_token_embeddings(rows)
    path = tmp_path_factory.mktemp("padded") / "pts_modelopt_state.pth"
    mto.save(mts.sparsify(dense, "sparse_magnitude"), path)
    return path, rows, dense


def test_states_with_a_padding_token_restore(model, padded_state, capsys):
    path, rows, reference = padded_state
    ids = torch.arange(2, 22)[None]
    for restored in (restore_sparse(load_model(str(model)), path), load_for_inference(str(model), None, path)):
        assert restored.get_input_embeddings().weight.shape[0] == rows == restored.config.vocab_size
        with torch.no_grad():
            torch.testing.assert_close(restored(ids).logits, reference(ids).logits)
    assert capsys.readouterr().err.count("embedding and output head get 1 more row(s)") == 2


def test_states_with_a_padding_token_train_with_a_teacher(model, data, padded_state, tmp_path):
    path, rows, _ = padded_state
    words = ["--max_steps", 1, "--max_length", 96, "--train_bs", 2, "--distill", "--report_to", "none"]
    result = run_inline(
        *("finetune.py", "--model", model, "--restore_path", path, "--data_path", data, "--output_dir", tmp_path),
        *words,
    )
    assert result.returncode == 0, result.stderr
    weights = load_state(tmp_path / "finetuned_modelopt_state.pth")["model_state_dict"]
    assert weights["model.embed_tokens.weight"].shape[0] == weights["lm_head.weight"].shape[0] == rows


def test_states_with_a_padding_token_export(model, padded_state, tmp_path):
    from transformers import AutoModelForCausalLM

    path, rows, reference = padded_state
    result = run_inline(
        *("export_hf.py", "--model_dir", model, "--modelopt_restore_path", path, "--output_dir", tmp_path / "out")
    )
    assert result.returncode == 0, result.stderr
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.vocab_size == rows
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, reference(ids).logits)
