"""EleutherAI's evaluation harness on an exported sparse checkpoint, offline, with a task of our own."""

import json

import pytest
from conftest import TEXTS, run_inline, run_script

pytest.importorskip("lm_eval", reason="the harness is not installed: pip install lm-eval")

TASK = """\
task: sentence_endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{beginning}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def endings_accuracy(model, tokenizer, items):
    """Accuracy by hand: the ending of highest log-likelihood given the beginning."""
    import torch

    right = 0
    for item in items:
        scores = []
        for ending in item["endings"]:
            start = len(tokenizer(item["beginning"])["input_ids"])
            ids = torch.tensor([tokenizer(item["beginning"] + ending)["input_ids"]])
            with torch.no_grad():
                losses = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
            scores.append(losses.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
        right += scores.index(max(scores)) == item["answer"]
    return right / len(items)


@pytest.mark.slow
def test_harness_scores_an_exported_checkpoint(model_dir, state_path, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    items = []
    for number, text in enumerate(TEXTS):
        words = text.split(" ")
        endings = [" " + " ".join(words[4 + shift : 7 + shift]) for shift in (0, 3, 5)]
        items.append({"beginning": " ".join(words[:4]), "endings": endings, "answer": number % 3})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sentence_endings.yaml").write_text(TASK.format(data=tmp_path / "items.jsonl"))
    exported = tmp_path / "exported"
    command = ["export_hf.py", "--model_dir", model_dir, "--modelopt_restore_path", state_path]
    assert run_inline(*command, "--output_dir", exported).returncode == 0

    run_script(
        *("-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={exported},dtype=float32"),
        *("--tasks", "sentence_endings", "--include_path", tasks, "--device", "cpu", "--batch_size", "2"),
        *("--output_path", tmp_path / "results"),
        env={"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_EVALUATE_OFFLINE": "1"},
        check=True,
    )
    (result,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(result.read_text())["results"]["sentence_endings"]["acc,none"]
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert accuracy == pytest.approx(endings_accuracy(model, AutoTokenizer.from_pretrained(exported), items))
    assert 0 < accuracy < 1
