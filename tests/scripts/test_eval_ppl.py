"""eval_ppl.py against perplexities computed token by token, over files and data sets."""

import json
import math

import pytest
import torch
from conftest import TEXTS, assert_clear_error, run_inline


@pytest.fixture(scope="module")
def text_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text(" ".join(TEXTS))
    return path


@pytest.fixture(scope="module")
def dense(model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model_dir).eval(), AutoTokenizer.from_pretrained(model_dir)


def reference_perplexity(model, stream, context, stride, windows):
    """Token by token: each from the window that sees it first."""
    losses = []
    for window in range(windows):
        begin = window * stride
        logits = model(input_ids=torch.tensor([stream[begin : begin + context]])).logits[0].double()
        already = 1 if window == 0 else context - stride
        for position in range(max(1, already), context):
            target = stream[begin + position]
            losses.append(-torch.log_softmax(logits[position - 1], dim=-1)[target].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize(("context", "stride", "windows"), [(16, 16, 9), (16, 5, 9), (32, 1, 6)])
def test_equals_the_token_by_token_figure(model_dir, dense, text_path, tmp_path, context, stride, windows):
    model, tokenizer = dense
    stream = tokenizer(text_path.read_text())["input_ids"]
    with torch.no_grad():
        expected, tokens = reference_perplexity(model, stream, context, stride, windows)
    protocol = ["--context", str(context), "--stride", str(stride), "--max_blocks", str(windows)]
    output = tmp_path / "ppl.json"
    result = run_inline(
        "eval_ppl.py", "--model_dir", model_dir, "--text", text_path, *protocol, "--output_json", output
    )
    figures = json.loads(output.read_text())
    assert figures["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert figures["tokens"] == tokens
    assert (figures["context"], figures["stride"], figures["windows"]) == (context, stride, windows)
    assert figures["protocol"] in result.stdout
    assert f"perplexity: {figures['perplexity']:.4f}" in result.stdout


def test_sparse_state_changes_the_figure_and_a_data_set_equals_a_file(
    model_dir, state_path, text_path, tmp_path, monkeypatch
):
    command = ["eval_ppl.py", "--model_dir", model_dir, "--context", "32"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text(json.dumps({"text": text_path.read_text()}) + "\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    outputs = {}
    for name, options in {
        "dense": ["--text", text_path],
        "sparse": ["--text", text_path, "--modelopt_restore_path", state_path],
        "set": ["--dataset", tmp_path / "set"],
    }.items():
        run_inline(*command, *options, "--output_json", tmp_path / f"{name}.json")
        outputs[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert outputs["sparse"]["perplexity"] != pytest.approx(outputs["dense"]["perplexity"], rel=1e-4)
    assert outputs["set"]["perplexity"] == outputs["dense"]["perplexity"]
    wrong = run_inline(*command, "--dataset", tmp_path / "set", "--text_column", "article")
    assert_clear_error(wrong, "no column 'article'", "text")


def test_chats_are_measured_as_plain_text_is(model_dir, text_path, tmp_path, monkeypatch):
    """In a file and in a data set; this tokenizer has no template, so that the turns are joined by line breaks."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    turns = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": text_path.read_text()}]
    (tmp_path / "plain.txt").write_text("\n".join(turn["content"] for turn in turns))
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "test.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    words = ["plain=" + str(tmp_path / "plain.txt"), "set=" + str(tmp_path / "chats")]
    words += ["file=" + str(tmp_path / "chats" / "test.jsonl"), "--output_json", tmp_path / "out.json"]
    result = run_inline("eval_ppl.py", "--model_dir", model_dir, "--context", "32", "--text", *words)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())["perplexities"]
    assert len({found[name]["perplexity"] for name in ("plain", "set", "file")}) == 1


def test_several_texts_give_the_figures_of_each_alone(model_dir, text_path, tmp_path):
    other = tmp_path / "other=text.txt"  # a path that exists is no NAME=SOURCE
    other.write_text(" ".join(TEXTS[:2]))
    command = ["eval_ppl.py", "--model_dir", model_dir, "--context", "16", "--max_blocks", "5"]
    alone = {}
    for name, path in (("news", text_path), ("more", other)):
        run_inline(*command, "--text", path, "--output_json", tmp_path / "one.json")
        alone[name] = json.loads((tmp_path / "one.json").read_text())
    result = run_inline(
        *command, "--text", f"news={text_path}", f"more={other}", "--output_json", tmp_path / "both.json"
    )
    both = json.loads((tmp_path / "both.json").read_text())["perplexities"]
    assert list(both) == ["news", "more"]
    for name, single in alone.items():
        assert both[name]["perplexity"] == single["perplexity"] and both[name]["protocol"] == single["protocol"]
        assert f"perplexity ({name}): {single['perplexity']:.4f}" in result.stdout


def test_clear_errors(model_dir, text_path, tmp_path):
    command = ["eval_ppl.py", "--model_dir", model_dir]
    assert_clear_error(run_inline(*command, "--text", text_path, "--context", "900"), "less than a window of 900")
    result = run_inline(*command, "--text", text_path, "--context", "2000")
    assert "2000 is more than the 1024 positions" in result.stderr  # this text is shorter still
    assert_clear_error(result, "less than a window of 2000")
