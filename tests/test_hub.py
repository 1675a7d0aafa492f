"""The README's commands against a hub that speaks HTTP: as typed, with failing requests, and with the hub gone."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from itertools import count, cycle

import pytest
from conftest import TEXTS, assert_clear_error, tiny_llama
from hub import CUT, Hub, Worker

MODEL = "meta-llama/Llama-2-7b-hf"
CARD = """---
configs:
- config_name: {name}
  data_files:
{files}---
"""


def write_card(folder, name, files):
    lines = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in files.items())
    (folder / "README.md").write_text(CARD.format(name=name, files=lines))


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=20)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, tokenizer):
    """Folders of the model and the four data sets that the README and the defaults name."""
    root = tmp_path_factory.mktemp("repositories")
    tiny_llama().save_pretrained(root / "model", max_shard_size="60KB")
    tokenizer.save_pretrained(root / "model")
    news, web, wiki, code = (root / name for name in ("news", "web", "wiki", "code"))
    for split in ("train", "validation", "test"):
        rows = [{"article": f"{split} {i}. {' '.join(TEXTS)}", "highlights": TEXTS[i % 5]} for i in range(60)]
        write_parquet(news / "3.0.0" / f"{split}-00000-of-00001.parquet", rows)
    write_card(news, "3.0.0", {split: f"3.0.0/{split}-*" for split in ("train", "validation", "test")})
    (web / "en").mkdir(parents=True)
    with gzip.open(web / "en" / "c4-train.00000-of-00001.json.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": f"{i} {' '.join(TEXTS)}"}) + "\n" for i in range(60))
    write_card(web, "en", {"train": "en/c4-train.*.json.gz"})
    code.mkdir()
    with gzip.open(code / "file-000000000001.json.gz", "wt") as stream:
        stream.writelines(json.dumps({"path": "a.py", "content": f"{i} {' '.join(TEXTS)}"}) + "\n" for i in range(60))
    write_parquet(wiki / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", [{"text": text} for text in TEXTS * 20])
    write_card(wiki, "wikitext-2-raw-v1", {"test": "wikitext-2-raw-v1/test-*"})
    sets = {"abisee/cnn_dailymail": news, "allenai/c4": web, "Salesforce/wikitext": wiki}
    sets["codeparrot/codeparrot-clean-train"] = code
    tiny_llama().save_pretrained(root / "whole")
    models = {f"models/{MODEL}": root / "model", "models/one/file": root / "whole"}
    return {**models, **{f"datasets/{name}": folder for name, folder in sets.items()}}


@pytest.fixture(scope="module")
def hub(repositories):
    with Hub(repositories) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The libraries' cache of the module's worker."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def worker(hub, home):
    with Worker(hub.url, home) as process:
        yield process


def run(worker, script, *words):
    result = worker.run(script, *words)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def faulty(hub):
    """Set which requests fail, for one test."""

    def choose(faults):
        hub.faults = faults

    yield choose
    hub.faults = lambda path: None


@pytest.fixture(scope="module")
def made(worker, tmp_path_factory):
    """Folder with what the README's commands wrote, in its order and as it types them, sizes aside."""
    root = tmp_path_factory.mktemp("made")
    words = ["--device", "cpu", "--model_max_length", 64, "--dtype", "fp16", "--sparsity_fmt", "sparsegpt"]
    run(worker, "hf_pts.py", "--model_name_or_path", MODEL, *words, "--calib_size", 8, "--output_dir", root / "pts")
    run(worker, "data_prep.py", "--save_path", root / "data")
    state = root / "pts" / "pts_modelopt_state.pth"
    words = ["--max_length", 200, "--num_epochs", 0.1, "--data_path", root / "data", "--report_to", "none"]
    run(worker, "finetune.py", "--model", MODEL, *words, "--restore_path", state, "--output_dir", root / "sat")
    return root


@pytest.mark.slow
def test_readme_commands(worker, made, hub):
    sat = made / "sat" / "finetuned_modelopt_state.pth"
    records = json.loads((made / "data" / "cnn_eval.json").read_text())
    assert len(records) == 60 and records[0]["input"].startswith("test 0.")
    (made / "few.json").write_text(json.dumps(records[:2]))
    words = ["--data_path", made / "few.json", "--batch_size", 1, "--beam_size", 4, "--model_max_length", 200]
    words += ["--min_new_tokens", 1, "--max_new_tokens", 8, "--device", "cpu", "--modelopt_restore_path", sat]
    assert "ROUGE scores: {" in run(worker, "eval.py", "--model_dir", MODEL, *words).stdout
    words = ["--text", "Salesforce/wikitext:wikitext-2-raw-v1:test", "--context", 64, "--modelopt_restore_path", sat]
    assert "perplexity: " in run(worker, "eval_ppl.py", "--model_dir", MODEL, *words).stdout
    words = ["--dtype", "fp16", "--modelopt_restore_path", sat, "--output_dir", made / "exported"]
    run(worker, "export_hf.py", "--model_dir", MODEL, *words)
    assert "base_model: meta-llama/Llama-2-7b-hf" in (made / "exported" / "README.md").read_text()
    words = ["--calib_data", "allenai/c4:en:train", "--calib_size", 2, "--model_max_length", 64, "--dtype", "fp32"]
    run(worker, "hf_pts.py", "--model_name_or_path", MODEL, *words, "--output_dir", made / "c4")


@pytest.mark.slow
def test_failing_requests_and_connections_that_end_in_the_middle_of_files(hub, faulty, tmp_path):
    """Every seventh request fails, every data file's first transfer, and two of each weight file's downloads."""
    numbers, statuses, faults = count(1), cycle([429, 503]), {}

    def fault(path):
        if path.endswith((".safetensors", ".parquet")) and "/resolve/" in path:
            is_weight = path.endswith(".safetensors")  # requested twice each time, the first time for its size alone
            return next(faults.setdefault(path, iter([None, 503, None, CUT] if is_weight else [CUT])), None)
        return next(statuses) if next(numbers) % 7 == 0 else None

    faulty(fault)
    words = ["--calib_data", "cnn_dailymail", "--calib_size", 2, "--model_max_length", 64, "--dtype", "fp32"]
    with Worker(hub.url, tmp_path / "home") as fresh:
        run(fresh, "hf_pts.py", "--model_name_or_path", MODEL, *words, "--output_dir", tmp_path / "pts")
        assert len(faults) >= 4  # shards and a parquet file
        run(fresh, "data_prep.py", "--save_path", tmp_path / "data")


@pytest.mark.parametrize(("status", "needle"), [(403, "gated"), (503, "503")])
def test_a_model_that_the_server_refuses_is_named_with_the_answer(worker, faulty, tmp_path, status, needle):
    faulty(lambda path: status if "other/model" in path else None)
    words = ["--sparsity_fmt", "sparse_magnitude", "--output_dir", tmp_path / "pts"]
    result = worker.run("hf_pts.py", "--model_name_or_path", "other/model", *words)
    assert_clear_error(result, "other/model", needle)


def test_the_only_weight_file_that_the_server_refuses_is_named(worker, faulty, tmp_path):
    faulty(lambda path: 403 if path.endswith("model.safetensors") else None)
    words = ["--sparsity_fmt", "sparse_magnitude", "--output_dir", tmp_path / "pts"]
    result = worker.run("hf_pts.py", "--model_name_or_path", "one/file", *words)
    assert_clear_error(result, "one/file", "403", "model.safetensors")


def test_unknown_repositories_are_named(worker, tmp_path):
    words = ["--sparsity_fmt", "sparse_magnitude", "--output_dir", tmp_path / "pts"]
    assert_clear_error(worker.run("hf_pts.py", "--model_name_or_path", "no/such", *words), "no/such")
    words = ["--model_name_or_path", MODEL, "--calib_data", "no/such-set", "--output_dir", tmp_path / "pts"]
    assert_clear_error(worker.run("hf_pts.py", *words), "no/such-set", "check the name, your access")


@pytest.mark.slow
def test_a_second_run_without_the_server(hub, home, made, tmp_path):
    """The model comes from the cache. Streamed records do not; the message says how to keep them, and that works."""
    copy = tmp_path / "cnn_dailymail"
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "abisee/cnn_dailymail"]
    command += ["--repo-type", "dataset", "--include", "3.0.0/t*", "--local-dir", str(copy)]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    with hub.gone(), Worker(hub.url, home) as second:
        words = ["--sparsity_fmt", "sparse_magnitude", "--dtype", "fp32", "--output_dir", tmp_path / "pts"]
        run(second, "hf_pts.py", "--model_name_or_path", MODEL, *words)
        result = second.run("data_prep.py", "--save_path", tmp_path / "again")
        assert_clear_error(result, "hf download abisee/cnn_dailymail", "--source cnn_dailymail/3.0.0")
        run(second, "data_prep.py", "--source", copy / "3.0.0", "--save_path", tmp_path / "again")
    for name in ("cnn_train.json", "cnn_eval.json"):
        assert (tmp_path / "again" / name).read_text() == (made / "data" / name).read_text()
