"""eval.py as users run it: one and two processes, batches, resume after a kill, and every wrong input."""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, TEXTS, assert_clear_error, run_inline, run_script, tiny_llama

from sparsity.devices import bf16_is_faster
from sparsity.evaluation.rouge import score_predictions
from sparsity.text import DEFAULT_TEMPLATE, PromptTemplate

LENGTHS = ("--model_max_length", "400", "--max_new_tokens", "40")


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """Eleven records of very different lengths; the longest does not fit into 400 tokens."""
    path = tmp_path_factory.mktemp("eval data") / "cnn_eval.json"
    records = [
        {
            "instruction": "Summarize the following article.",
            "input": " ".join((TEXTS * 4)[number : number + 1 + (number * 7) % 10]),
            "output": TEXTS[number % 5].split(",")[0] + ".",
        }
        for number in range(11)
    ]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, model_dir, state_path, data_path):
    """A finished evaluation of the sparse model: (CompletedProcess, figures, prediction lines, command)."""
    folder = tmp_path_factory.mktemp("one")
    command = ["eval.py", "--model_dir", model_dir, "--data_path", data_path, "--modelopt_restore_path", state_path]
    command += ["--batch_size", "2", "--beam_size", "4", *LENGTHS]
    files = ["--output_json", folder / "rouge.json", "--predictions", folder / "predictions.jsonl"]
    result = run_script(*command, *files, check=True)
    return result, json.loads((folder / "rouge.json").read_text()), read_lines(folder / "predictions.jsonl"), command


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_two_processes(*arguments):
    return run_script("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", *arguments)


def test_last_line_files_and_samples(one_process, data_path):
    result, figures, lines, _ = one_process
    records = json.loads(data_path.read_text())
    label, _, scores = result.stdout.rstrip("\n").split("\n")[-1].partition(": ")
    assert label == "ROUGE scores"
    printed = ast.literal_eval(scores)
    assert list(printed) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    for name, value in printed.items():
        assert value == round(figures[name], 4)
        low, high = figures["confidence_intervals_95"][name]
        assert 0 <= low <= figures[name] <= high <= 100
    assert figures["unit"] == "percent" and max(printed.values()) > 1
    assert figures["examples"] == figures["generated"] == len(records)
    assert [line["index"] for line in lines] == list(range(len(records)))
    assert [line["reference"] for line in lines] == [record["output"] for record in records]
    assert f"prediction: {lines[1]['prediction']}" in result.stdout


def test_scores_are_rouge_of_the_written_predictions(one_process):
    _, figures, lines, _ = one_process
    pairs = [line["prediction"] for line in lines], [line["reference"] for line in lines]
    scores = score_predictions(*pairs)
    assert {name: figures[name] for name in scores} == scores


@pytest.mark.slow
def test_two_processes_give_the_same_predictions_and_scores(one_process, tmp_path):
    _, figures, lines, command = one_process
    files = ["--output_json", tmp_path / "rouge.json", "--predictions", tmp_path / "predictions.jsonl"]
    result = run_two_processes(*command, *files)
    assert result.returncode == 0, result.stderr
    second = json.loads((tmp_path / "rouge.json").read_text())
    assert second["num_processes"] == 2 and figures["num_processes"] == 1
    assert result.stdout.count("ROUGE scores:") == 1
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum", "confidence_intervals_95", "examples", "generated"):
        assert second[name] == figures[name]
    assert read_lines(tmp_path / "predictions.jsonl") == lines
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".predictions.jsonl.lock", "predictions.jsonl", "rouge.json"]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(one_process, tmp_path):
    *_, command = one_process
    (tmp_path / "p.jsonl.part-1").mkdir()  # the second process cannot write its first batch
    started = time.monotonic()
    result = run_two_processes(*command, "--predictions", tmp_path / "p.jsonl")
    assert result.returncode != 0 and "ROUGE scores" not in result.stdout
    assert time.monotonic() - started < 100  # a hang would end in run_script's limit of 300 seconds
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.slow
def test_resumes_after_a_kill(one_process, tmp_path):
    _, figures, lines, command = one_process
    predictions = tmp_path / "predictions.jsonl"
    command = [*command, "--predictions", predictions, "--output_json", tmp_path / "rouge.json"]
    part = tmp_path / "predictions.jsonl.part-0"
    with subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not part.is_file() or not part.stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not predictions.exists(), "killed too late to test anything"
    finished = [line for line in part.read_text().splitlines() if line]
    part.write_text("\n".join(finished) + '\n{"index": 10, "predic')  # what a kill within a write leaves
    result = run_script(*command, check=True)
    assert f"resuming: {len(finished)} of {len(lines)} predictions" in result.stdout
    resumed = json.loads((tmp_path / "rouge.json").read_text())
    assert resumed["generated"] == len(lines) - len(finished)
    assert resumed["rougeLsum"] == figures["rougeLsum"]
    assert read_lines(predictions) == lines
    assert not part.exists()


def test_changed_settings_or_state_never_meet_old_predictions(one_process, tmp_path, model_dir, data_path):
    _, _, lines, command = one_process
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(json.dumps({**line, "prediction": "stale"}) + "\n" for line in lines))
    same = run_inline(*command, "--predictions", predictions)
    assert "resuming: 11 of 11" in same.stdout  # the control: an unchanged run does take them
    dense = ["eval.py", "--model_dir", model_dir, "--data_path", data_path, "--batch_size", "2", *LENGTHS]
    changed = run_inline(*dense, "--limit", "2", "--predictions", predictions)
    assert "resuming" not in changed.stdout
    assert len(read_lines(predictions)) == 2 and "stale" not in predictions.read_text()


def test_dtype_is_applied(model_dir, data_path, tmp_path):
    command = ["eval.py", "--model_dir", model_dir, "--data_path", data_path, *LENGTHS, "--limit", "1"]
    fast = bf16_is_faster(torch.device("cpu"))
    for name, dtype in (("bf16", "bfloat16"), ("fastest", "bfloat16" if fast else "float32")):
        result = run_inline(*command, "--dtype", name, "--beam_size", "1", "--output_json", tmp_path / "r.json")
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / "r.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("flag", ["--prompt_template", "--chat_template"])
def test_prompts_of_another_template(model_dir, data_path, state_path, tmp_path, flag):
    """The template reaches the prompt, and one that the state was not trained with is warned of."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    shutil.copy(state_path, tmp_path / "state.pth")
    (tmp_path / "run.json").write_text(json.dumps({"prompt": asdict(DEFAULT_TEMPLATE)}))
    (tmp_path / "t.json").write_text(json.dumps({"head": "{instruction}: ", "tail": "=>"}))
    chat = {"chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **chat}))
    command = ["eval.py", "--model_dir", folder, "--data_path", data_path, *LENGTHS, "--limit", "1", "--beam_size", "1"]
    command += ["--modelopt_restore_path", tmp_path / "state.pth", "--output_json"]
    words = [flag, tmp_path / "t.json"] if flag == "--prompt_template" else [flag]
    plain = run_inline(*command, tmp_path / "plain.json")
    other = run_inline(*command, tmp_path / "other.json", *words)
    assert plain.returncode == other.returncode == 0, plain.stderr + other.stderr
    assert "another prompt template" not in plain.stderr
    assert other.stderr.count("was trained with another prompt template") == 1
    own = PromptTemplate("{instruction}: ", "=>")
    template = own if len(words) > 1 else PromptTemplate("<s>{instruction}\n\n", "</s>", special_tokens=False)
    (tmp_path / "run.json").write_text(json.dumps({"prompt": asdict(template)}))
    again = run_inline(*command, tmp_path / "again.json", *words)
    assert "another prompt template" not in again.stderr


def test_empty_predictions_are_an_error(data_path, tokenizer, tmp_path):
    model = tiny_llama()
    model.lm_head.weight.data.zero_()  # every logit equal: greedy search emits token 0, which is <s>
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["eval.py", "--model_dir", tmp_path, "--data_path", data_path, *LENGTHS, "--beam_size", "1"]
    assert_clear_error(run_inline(*command), "every prediction is empty")
