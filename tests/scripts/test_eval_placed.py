"""eval.py and eval_ppl.py with models that are spread over devices or split over processes: the same figures."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import TEXTS, assert_clear_error, run_inline, run_script, tiny_llama

SPREAD = ["--device_map", "auto", "--max_memory", "cpu=100KiB"]  # of the tiny model's 150; the rest goes to disk


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(records, text): files for eval.py and eval_ppl.py."""
    folder = tmp_path_factory.mktemp("inputs")
    records = [{"instruction": "Summarize.", "input": text, "output": text.split(",")[0]} for text in TEXTS[:3]]
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "text.txt").write_text(" ".join(TEXTS))
    return folder / "records.json", folder / "text.txt"


@pytest.fixture(scope="module")
def unfolded_state(tmp_path_factory, state_path):
    """A state whose pruned weights are not zero, as modelopt may leave them: only its masks make it sparse."""
    state = torch.load(state_path, weights_only=True)
    for name, mask in state["model_state_dict"].items():
        if name.endswith("_weight_mask"):
            weight = state["model_state_dict"][name.removesuffix("_weight_mask") + "weight"]
            weight[~mask] = 0.05
    path = tmp_path_factory.mktemp("unfolded") / "state.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def commands(inputs, model_dir, unfolded_state):
    records, text = inputs
    model = ["--model_dir", model_dir, "--modelopt_restore_path", unfolded_state]
    lengths = ["--beam_size", "2", "--batch_size", "2", "--max_new_tokens", "12", "--min_new_tokens", "5"]
    return {
        "rouge": ["eval.py", *model, "--data_path", records, *lengths],
        "perplexity": ["eval_ppl.py", *model, "--text", text, "--context", "32"],
    }


@pytest.fixture(scope="module")
def expected(commands, tmp_path_factory):
    """Figures of the model on one device."""
    folder = tmp_path_factory.mktemp("expected")
    run_inline(*commands["rouge"], "--predictions", folder / "p.jsonl")
    run_inline(*commands["perplexity"], "--output_json", folder / "ppl.json")
    return read(folder)


def read(folder):
    lines = [json.loads(line) for line in (folder / "p.jsonl").read_text().splitlines()]
    return [line["prediction"] for line in lines], json.loads((folder / "ppl.json").read_text())["perplexity"]


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--device_map", "auto"], "100% on CPU memory"), (SPREAD, "on disk; those off the GPUs are moved")],
)
def test_spread_over_devices(commands, expected, tmp_path, options, words):
    rouge = run_inline(*commands["rouge"], *options, "--predictions", tmp_path / "p.jsonl")
    if "disk" in words and transformers.__version__.startswith("4."):  # which takes only files to disk
        assert_clear_error(rouge, "export_hf.py")
        return
    perplexity = run_inline(*commands["perplexity"], *options, "--output_json", tmp_path / "ppl.json")
    assert rouge.returncode == perplexity.returncode == 0, rouge.stderr + perplexity.stderr
    assert rouge.stdout.count(words) == perplexity.stdout.count(words) == 1
    predictions, value = read(tmp_path)
    assert predictions == expected[0] and value == pytest.approx(expected[1], rel=1e-6)


def test_a_dense_model_on_disk(commands, inputs, model_dir, tmp_path):
    command = ["eval_ppl.py", "--model_dir", model_dir, "--text", inputs[1], "--context", "32", "--output_json"]
    run_inline(*command, tmp_path / "one.json")
    spread = run_inline(*command, tmp_path / "spread.json", *SPREAD, "--offload_folder", tmp_path / "offload")
    assert "on disk" in spread.stdout, spread.stderr
    values = [json.loads((tmp_path / name).read_text())["perplexity"] for name in ("one.json", "spread.json")]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_split_over_processes(commands, expected, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    rouge = run_script(*launcher, *commands["rouge"], "--tensor_parallel", "--predictions", tmp_path / "p.jsonl")
    assert rouge.returncode == 0, rouge.stderr
    perplexity = run_script(*launcher, *commands["perplexity"], "--tp", "--output_json", tmp_path / "ppl.json")
    assert perplexity.returncode == 0, perplexity.stderr
    assert rouge.stdout.count("split over 2 processes") == perplexity.stdout.count("split over 2 processes") == 1
    assert rouge.stdout.count("ROUGE scores:") == perplexity.stdout.count("perplexity: ") == 1
    predictions, value = read(tmp_path)
    assert predictions == expected[0] and value == pytest.approx(expected[1], rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "ppl.json"]


def test_split_with_a_tied_head(inputs, tokenizer, tmp_path):
    """The head's plan does not fit a head that shares the weights of the embeddings."""
    config = tiny_llama().config
    config.tie_word_embeddings = True
    type(tiny_llama())(config).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    command = ["eval_ppl.py", "--model_dir", tmp_path / "tied", "--text", inputs[1], "--context", "32", "--output_json"]
    run_inline(*command, tmp_path / "one.json")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    run_script(*launcher, *command, tmp_path / "split.json", "--tp", check=True)
    values = [json.loads((tmp_path / name).read_text())["perplexity"] for name in ("one.json", "split.json")]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_clear_errors(commands, monkeypatch):
    from transformers import OPTConfig

    from sparsity.errors import UserError
    from sparsity.placement import check_tensor_parallel

    command = commands["perplexity"]
    assert_clear_error(run_inline(*command, "--tp"), "--tensor_parallel splits", "torchrun")
    assert_clear_error(run_inline(*command, "--tp", "--device_map", "auto"), "exclude each other")
    assert_clear_error(run_inline(*command, "--device", "cpu", "--device_map", "auto"), "--device cpu")
    assert_clear_error(run_inline(*command, "--max_memory", "0=20GiB"), "--max_memory belongs to --device_map")
    for wrong in ("20GiB", "gpu=20GiB", "0=much"):
        assert_clear_error(run_inline(*command, "--device_map", "auto", "--max_memory", wrong), f"'{wrong}'")

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_clear_error(run_inline(*command, "--device_map", "auto"), "2 were started")
    assert_clear_error(run_inline(*command), "several processes would all measure the same")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="num_attention_heads 4 over 3 processes"):
        check_tensor_parallel(tiny_llama().config, torch.device("cpu"))
    with pytest.raises(UserError, match="no tensor-parallel plan for models of type 'opt'"):
        check_tensor_parallel(OPTConfig(hidden_size=48, num_hidden_layers=1), torch.device("cpu"))
