"""What goes wrong on real machines: kills, full disks, too little memory, hostile and damaged files, odd models.

For each: the exit code, one clear line, and whatever was saved before is still there and loads.
Inputs that are merely wrong are in test_errors.py.
"""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TEXTS, assert_clear_error, tiny_llama
from forked import dies_replacing, lacks_memory_in, run_forked, small_files, waits_replacing

from sparsity.modelopt_state import load_state, sparse_masks


@pytest.fixture(scope="module")
def files(tmp_path_factory, model_dir, state_path, data_dir):
    """The good inputs of every command below."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "texts.json").write_text(json.dumps(TEXTS * 3))
    rows = [{"article": f"{text} {i}", "summary": text[:20]} for i, text in enumerate(TEXTS)]
    (root / "table.json").write_text(json.dumps(rows))
    (root / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 3 / n}) + "\n" for n in (1, 2)))
    (root / "results").mkdir()
    (root / "results" / "perplexity.json").write_text(json.dumps({"perplexity": 18.2, "protocol": "8 windows"}))
    return {
        "results": root / "results",
        "log": root / "log.jsonl",
        "model": model_dir,
        "state": state_path,
        "data": data_dir,
        "records": data_dir / "cnn_eval.json",
        "texts": root / "texts.json",
        "table": root / "table.json",
    }


COMMANDS = {
    "PTS": "hf_pts.py --model_name_or_path {model} --device cpu --dtype fp32 --model_max_length 32 --calib_size 4 "
    "--calib_data {texts} --output_dir {out}",
    "SAT": "finetune.py --model {model} --restore_path {state} --data_path {data} --max_length 200 --max_steps 2 "
    "--train_bs 1 --save_steps 1 --output_dir {out} --cache_dir {out}/cache --resume",
    "eval": "eval.py --model_dir {model} --modelopt_restore_path {state} --data_path {records} --beam_size 1 "
    "--model_max_length 200 --max_new_tokens 4 --min_new_tokens 1 --device cpu --output_json {out}/rouge.json "
    "--predictions {out}/predictions.jsonl",
    "perplexity": "eval_ppl.py --model_dir {model} --modelopt_restore_path {state} --text {texts} --context 32 "
    "--device cpu --output_json {out}/perplexity.json",
    "export": "export_hf.py --model_dir {model} --modelopt_restore_path {state} --output_dir {out}/exported "
    "--overwrite",
    "verify": "verify_sparsity.py {state} --output_json {out}/table.json",
    "data": "data_prep.py --source {table} --save_path {out}",
    "report": "report.py --run dense={results} --train_log {log} --output_dir {out}",
}
RESULTS = {
    "PTS": "pts_modelopt_state.pth",
    "SAT": "finetuned_modelopt_state.pth",
    "eval": "rouge.json",
    "perplexity": "perplexity.json",
    "export": "exported/model.safetensors",
    "verify": "table.json",
    "data": "cnn_train.json",
    "report": "report.html",
}


@pytest.fixture
def run(files, tmp_path):
    """Run one of COMMANDS with some of its paths replaced; `run.out` is its output folder."""
    out = tmp_path / "out"
    out.mkdir()

    def call(name, *extra, setup=lambda: None, **changed):
        paths = {**files, "out": out, **changed}
        words = [word.format(**paths) for word in COMMANDS[name].split()]
        return run_forked(*words, *extra, setup=setup)

    call.out = out
    return call


def assert_loads(path: Path) -> None:
    """The file is whole: it opens as what its name says."""
    if path.suffix == ".pth":
        assert load_state(path)["model_state_dict"]
    elif path.suffix == ".safetensors":
        assert safetensors.torch.load_file(path)
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>")
    else:
        assert json.loads(path.read_text())


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders that a run which was not killed should have removed."""
    return [path.name for pattern in ("*.tmp", "*.unfinished") for path in folder.rglob(pattern)]


# ------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("PTS", "layer_0001.safetensors"),
        ("SAT", "finetuned_modelopt_state.pth"),
        ("eval", "predictions.jsonl"),
        ("export", "exported"),
        ("data", "cnn_train.json"),
    ],
)
def test_kill_9_harms_nothing_and_the_same_command_ends_well(run, name, file):
    killed = run(name, setup=dies_replacing(file))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run.out / file).exists()
    again = run(name)
    assert again.returncode == 0, again.stderr
    assert_loads(run.out / RESULTS[name])
    assert not leftovers(run.out) and not list(run.out.glob("*.part-*"))


# ------------------------------------------------------------------------------- full disk, too little memory


@pytest.mark.parametrize(
    ("name", "size"),
    [("PTS", 50_000), ("SAT", 100_000), ("eval", 10), ("export", 30_000), ("verify", 100), ("report", 100)],
)
def test_no_room_for_a_file(run, name, size):
    """A limit on the size of files, as quotas set it, stands for the disk that runs full."""
    result = run.out / RESULTS[name]
    result.parent.mkdir(exist_ok=True)
    result.write_text("earlier")
    assert_clear_error(run(name, setup=small_files(size)))
    assert result.read_text() == "earlier"
    assert not leftovers(run.out)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("PTS", (torch.nn.Linear, "forward", 10)),
        ("SAT", (torch.nn.Linear, "forward", 10)),
        ("eval", (torch.nn.Linear, "forward", 10)),
        ("export", (safetensors.torch, "save_file")),
    ],
)
def test_memory_that_ends_during_the_work(run, name, where):
    result = run.out / RESULTS[name]
    result.parent.mkdir(exist_ok=True)
    result.write_text("earlier")
    assert_clear_error(run(name, setup=lacks_memory_in(*where)), "memory", "; ")
    assert result.read_text() == "earlier"
    assert not leftovers(run.out)


# ------------------------------------------------------------------------------------- two runs at a time


@pytest.mark.parametrize("name", ["PTS", "SAT", "eval", "data"])
def test_second_run_in_the_same_folder_is_refused(run, name, tmp_path):
    waiting, release = tmp_path / "waiting", tmp_path / "release"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, name, setup=waits_replacing(RESULTS[name], str(waiting), str(release)))
        while not waiting.exists() and not first.done():
            time.sleep(0.05)
        try:
            assert_clear_error(run(name), "another run", str(run.out))
        finally:
            release.touch()
        assert first.result().returncode == 0, first.result().stderr
    assert_loads(run.out / RESULTS[name])
    assert not leftovers(run.out)


# ----------------------------------------------------------------------------------- hostile and damaged files


class Malicious:
    """Pickles to a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["SAT", "eval", "verify"])
def test_pickled_code_in_a_state_does_not_run(run, name, tmp_path, state_path):
    trap, state = tmp_path / "trap", tmp_path / "state.pth"
    content = torch.load(state_path, weights_only=True)
    torch.save({**content, "modelopt_state": Malicious(trap)}, state)
    assert_clear_error(run(name, state=state), str(state))
    state.write_bytes(pickle.dumps(Malicious(trap)))
    assert_clear_error(run(name, state=state), str(state))
    assert not trap.exists()


def test_pickled_code_in_a_checkpoint_does_not_run(run, tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malicious(tmp_path / "trap")}))
    assert_clear_error(run("PTS", model=model), "code in it")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"", "damaged or truncated"),
        ("model.safetensors", b"<!DOCTYPE html><p>404", "damaged or truncated"),
        ("config.json", b"{", ""),
        ("config.json", b"[]", ""),
        ("tokenizer.json", b"{", "cannot load a tokenizer"),
    ],
)
def test_damaged_model(run, file, content, words, tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / file).write_bytes(content)
    assert_clear_error(run("perplexity", model=model), words, str(model))


# -------------------------------------------------------------------------------------------- odd models


def save_model(path: Path, tokenizer, model) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_nan_weights_are_named(run, tmp_path, tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 5] = float("nan")
    model = save_model(tmp_path / "nan", tokenizer, model)
    assert_clear_error(run("PTS", model=model), "model.layers.1.self_attn.v_proj")
    assert not (run.out / RESULTS["PTS"]).exists()


@pytest.mark.parametrize("kind", ["tied head", "odd vocabulary, one layer"])
def test_every_kind_of_model_goes_through(run, kind, tmp_path, tokenizer):
    model = tiny_llama() if kind == "tied head" else tiny_llama(vocab_size=431, layers=1)
    if kind == "tied head":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model = save_model(tmp_path / "model", tokenizer, model)
    assert run("PTS", model=model).returncode == 0
    state = run.out / RESULTS["PTS"]
    for name in ("SAT", "perplexity", "export", "verify"):
        result = run(name, model=model, state=state)
        assert result.returncode == 0, result.stderr
        assert_loads(run.out / RESULTS[name])


def test_a_width_that_four_does_not_divide_stays_dense(run, tmp_path, tokenizer):
    """Such a matrix cannot be 2:4, and the run says so."""
    model = tiny_llama(intermediate=66)
    result = run("PTS", model=save_model(tmp_path / "model", tokenizer, model))
    assert result.returncode == 0, result.stderr
    assert "down_proj" in result.stdout + result.stderr
    masks = {name for name, _, _ in sparse_masks(load_state(run.out / RESULTS["PTS"])["model_state_dict"])}
    assert masks and not any("down_proj" in name for name in masks)


def test_tokenizer_without_end_of_text(run, tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    assert_clear_error(run("perplexity", model=model), "no end-of-text token")
