"""hf_pts.py as a user runs it: the state it leaves, resume after a kill, wrong inputs; and the layer walk behind it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TEXTS, assert_clear_error, run_inline, run_script, tiny_llama

from sparsity.modelopt_state import load_state, sparse_masks

RESTORE = """
import sys, torch
import modelopt.torch.opt as mto
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = mto.restore(model, sys.argv[2]).eval()
torch.save(model(torch.arange(20)[None]).logits.detach(), sys.argv[3])
"""


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    path = tmp_path_factory.mktemp("calib") / "calib text.txt"
    path.write_text("\n".join(TEXTS * 12))
    return path


def command(model_dir, calib, output_dir, *more):
    return [
        *("hf_pts.py", "--model_name_or_path", model_dir, "--calib_data", calib, "--output_dir", output_dir),
        *("--device", "cpu", "--dtype", "fp32", "--calib_size", 12, "--model_max_length", 48, "--batch_size", 5, *more),
    ]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, model_dir, calib):
    output = tmp_path_factory.mktemp("pts") / "saved model"
    return output, run_script(*command(model_dir, calib, output), check=True).stdout


def test_plain_modelopt_restores_the_pruned_model_in_a_fresh_process(pruned, model_dir, tmp_path):
    output, _ = pruned
    arguments = [str(model_dir), str(output / "pts_modelopt_state.pth"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", RESTORE, *arguments], check=True, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    model = tiny_llama()
    weights = {n: t for n, t in load_state(arguments[1])["model_state_dict"].items() if not n.endswith("_weight_mask")}
    model.load_state_dict(weights)
    torch.testing.assert_close(logits, model(torch.arange(20)[None]).logits, rtol=0, atol=0)


def test_state_is_exactly_two_of_four_and_the_rest_is_dense(pruned):
    state = load_state(pruned[0] / "pts_modelopt_state.pth")["model_state_dict"]
    masks = list(sparse_masks(state))
    assert len(masks) == 14
    for _, weight, mask in masks:
        assert bool((mask.view(-1, 4).sum(1) == 2).all())
        assert bool((weight[~mask] == 0).all())
        assert not bool(torch.signbit(weight[~mask]).any())
    dense = tiny_llama().state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(state[name], dense[name])


def test_log_has_a_row_for_every_pruned_weight_and_the_screen_says_what_was_done(pruned):
    output, stdout = pruned
    rows = [json.loads(line) for line in (output / "pts_layers.jsonl").read_text().splitlines()]
    assert len(rows) == 14
    assert all(row["sparsity"] == 0.5 and 0 < row["relative_error"] < 1 and row["percdamp"] == 0.01 for row in rows)
    assert "50.00%" in stdout
    assert "identical logits" in stdout
    assert sorted(path.name for path in output.glob("[!.]*")) == ["pts_layers.jsonl", "pts_modelopt_state.pth"]


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1])
def test_killed_run_resumes_and_ends_with_the_same_bits(pruned, model_dir, calib, tmp_path, after):
    arguments = [str(item) for item in command(model_dir, calib, tmp_path)]
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    finished = f"pts_resume/*/layer_{after:04d}.safetensors"
    while process.poll() is None and not list(tmp_path.glob(finished)):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(finished))
    assert not (tmp_path / "pts_modelopt_state.pth").exists()
    run_script(*arguments, check=True)
    assert states_equal(tmp_path, pruned[0])


def states_equal(left, right) -> bool:
    one, other = (load_state(folder / "pts_modelopt_state.pth")["model_state_dict"] for folder in (left, right))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_hidden_states_on_disk_change_no_bit_and_leave_no_file(pruned, model_dir, calib, tmp_path):
    folder = tmp_path / "hidden states"
    more = ["--activations_dir", folder]
    run_script(*command(model_dir, calib, tmp_path / "out", *more), check=True)
    assert states_equal(tmp_path / "out", pruned[0])
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_two_processes_save_one_state_and_report_a_mistake_once(model_dir, calib, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    more = ["--batch_size", 1, "--keep_dense", 0.2]
    result = run_script(*launch, *command(model_dir, calib, tmp_path / "out", *more), check=True)
    names = result.stdout.partition("--ignore ")[2].partition("\n")[0].split()
    masks = list(sparse_masks(load_state(tmp_path / "out" / "pts_modelopt_state.pth")["model_state_dict"]))
    assert names and len(masks) == 14 - len(names)
    for change in (["--calib_data", "missing.txt"], ["--batch_size", 12]):
        result = run_script(*launch, *command(model_dir, calib, tmp_path / "no", *change))
        assert result.returncode != 0
        assert result.stderr.count("error: ") == 1, result.stderr


def test_text_of_the_model_itself_is_written_once_and_counts_by_its_weight(model_dir, calib, tmp_path):
    mixed = ["--calib_data", f"{calib}=0.5,self=0.5", "--calib_size", 8]
    first = run_script(*command(model_dir, calib, tmp_path / "one", *mixed), check=True)
    assert "[transformers]" not in first.stderr  # such as its warning of layers that are not sharded
    again = run_inline(*command(model_dir, calib, tmp_path / "two", *mixed))
    assert again.returncode == 0, again.stderr
    assert states_equal(tmp_path / "one", tmp_path / "two")
    other = run_inline(*command(model_dir, calib, tmp_path / "three", *mixed[:1], f"{calib}=0.9,self=0.1", *mixed[2:]))
    assert other.returncode == 0, other.stderr
    assert not states_equal(tmp_path / "one", tmp_path / "three")


def test_model_can_be_pruned_without_any_text(model_dir, calib, tmp_path):
    result = run_inline(*command(model_dir, calib, tmp_path, "--calib_data", "self", "--quality", "fast"))
    assert result.returncode == 0, result.stderr
    assert "identical logits" in result.stdout


def test_dry_run_counts_the_text_that_the_model_writes(model_dir, calib, tmp_path):
    result = run_inline(*command(model_dir, calib, tmp_path, "--calib_data", f"{calib}=1,self=1", "--dry_run"))
    assert "self-generated text: 6 sequences of 48 tokens" in result.stdout
    assert "calibration: 12 sequences" in result.stdout


def test_dry_run_prints_shapes_and_memory_and_writes_no_state(model_dir, calib, tmp_path):
    result = run_script(*command(model_dir, calib, tmp_path, "--dry_run"), check=True)
    assert "mlp.gate_proj (64, 32), mlp.up_proj (64, 32)" in result.stdout
    assert "computed peak memory of the process" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choice", "group", "kept"),
    [
        (["--pattern", "4:8"], 8, 4),
        (["--dtype", "bf16"], 4, 2),
        (["--pattern", "unstructured:0.5"], None, None),
        (["--sparsity_fmt", "wanda"], 4, 2),
        (["--sparsity_fmt", "sparse_magnitude"], 4, 2),
        (["--quality", "fast", "--ignore", "*.down_proj"], 4, 2),
    ],
)
def test_other_choices_leave_a_state_that_restores(model_dir, calib, tmp_path, choice, group, kept):
    result = run_inline(*command(model_dir, calib, tmp_path, *choice))
    assert result.returncode == 0, result.stderr
    assert "identical logits" in result.stdout
    masks = list(sparse_masks(load_state(tmp_path / "pts_modelopt_state.pth")["model_state_dict"]))
    assert len(masks) == (12 if "--ignore" in choice else 14)
    for _, weight, mask in masks:
        assert not weight[~mask].any()
        if group:
            assert bool((mask.view(-1, group).sum(1) == kept).all())
        assert float(mask.float().mean()) == 0.5


def test_what_keep_dense_prints_gives_the_same_state_as_ignore(model_dir, calib, tmp_path):
    result = run_inline(*command(model_dir, calib, tmp_path / "chosen", "--keep_dense", 0.2))
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("kept dense by --keep_dense 0.2: ")]
    names = line.partition("--ignore ")[2].split()
    given = run_inline(*command(model_dir, calib, tmp_path / "given", "--ignore", *names))
    assert given.returncode == 0, given.stderr
    assert states_equal(tmp_path / "chosen", tmp_path / "given")
    assert len(list(sparse_masks(load_state(tmp_path / "given" / "pts_modelopt_state.pth")["model_state_dict"]))) < 14


def test_keep_dense_needs_text(model_dir, tmp_path):
    words = ["hf_pts.py", "--model_name_or_path", model_dir, "--output_dir", tmp_path, "--keep_dense", 0.2]
    result = run_inline(*words, "--sparsity_fmt", "sparse_magnitude", "--device", "cpu")
    assert_clear_error(result, "--keep_dense needs calibration text", "sparse_magnitude", "--calib_data")


def test_encoder_and_conv1d_models_are_refused(calib, tmp_path, tokenizer):
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=400, **small)).save_pretrained(tmp_path / "bert")
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    for name, needle in (("bert", "BertForMaskedLM"), ("gpt2", "Conv1D")):
        tokenizer.save_pretrained(tmp_path / name)
        assert_clear_error(run_inline(*command(tmp_path / name, calib, tmp_path / "out")), needle)
