"""eval.py and eval_ppl.py with models that are spread over devices: the same figures."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import TEXTS, assert_clear_error, run_inline

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
    [(["--device_map", "auto"], "modules by device: cpu: "), (SPREAD, "disk: ")],
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
    spread = run_inline(*command, tmp_path / "spread.json", *SPREAD)
    assert "disk: " in spread.stdout, spread.stderr
    values = [json.loads((tmp_path / name).read_text())["perplexity"] for name in ("one.json", "spread.json")]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_clear_errors(commands, monkeypatch):
    command = commands["perplexity"]
    assert_clear_error(run_inline(*command, "--device", "cpu", "--device_map", "auto"), "--device cpu")
    assert_clear_error(run_inline(*command, "--max_memory", "0=20GiB"), "--max_memory requires --device_map")
    for wrong in ("20GiB", "gpu=20GiB", "0=much"):
        assert_clear_error(run_inline(*command, "--device_map", "auto", "--max_memory", wrong), f"'{wrong}'")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_clear_error(run_inline(*commands["rouge"], "--device_map", "auto"), "one process")
    assert_clear_error(run_inline(*command), "one process")
