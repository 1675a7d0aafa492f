"""What goes wrong on real machines: kills, full disks, read-only folders, damaged and hostile files, odd models.

For each: the exit code, one clear line, and whatever was saved before is still there and loads.
Inputs that are merely wrong are in test_errors.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from conftest import TEXTS, assert_clear_error, tiny_llama
from forked import (
    dies_replacing,
    jumping_clock,
    lacks_memory_in,
    little_memory,
    run_forked,
    small_files,
    without_locks,
)

from sparsity.modelopt_state import load_state, sparse_masks

RECORD = {"instruction": "Summarize.", "input": TEXTS[0], "output": TEXTS[1]}


@pytest.fixture(scope="module")
def files(tmp_path_factory, model_dir, state_path, data_dir):
    """The good inputs of every command below."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "texts.json").write_text(json.dumps(TEXTS * 3))
    rows = [{"article": f"{text} {i}", "summary": text[:20]} for i, text in enumerate(TEXTS)]
    (root / "table.json").write_text(json.dumps(rows))
    (root / "results").mkdir()
    perplexity_json = {"perplexity": 18.2, "protocol": "protocol: 8 windows"}
    (root / "results" / "perplexity.json").write_text(json.dumps(perplexity_json))
    (root / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 3 / n}) + "\n" for n in (1, 2)))
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
    "--device cpu --output_json {out}/ppl.json",
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
    "perplexity": "ppl.json",
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


def litter(folder: Path) -> list[str]:
    """Temporary files and folders that a run which was not killed should have removed."""
    return [path.name for pattern in ("*.tmp", "*.unfinished") for path in folder.rglob(pattern)]


def write_earlier(folder: Path, name: str) -> Path:
    """Put a file in the place of a script's result."""
    path = folder / RESULTS[name]
    path.parent.mkdir(exist_ok=True)
    path.write_text("earlier")
    return path


# ------------------------------------------------------------------------------------------------- kills

KILLS = [
    ("PTS", "layer_0001.safetensors"),
    ("PTS", "pts_modelopt_state.pth"),
    ("SAT", "finetuned_modelopt_state.pth"),
    ("eval", "predictions.jsonl"),
    ("eval", "rouge.json"),
    ("perplexity", "ppl.json"),
    ("data", "cnn_train.json"),
    ("verify", "table.json"),
    ("export", "exported"),
    ("report", "report.html"),
]


@pytest.mark.parametrize(("name", "target"), KILLS, ids=lambda value: str(value))
def test_kill_9_harms_nothing_and_the_same_command_ends_well(run, name, target):
    killed = run(name, setup=dies_replacing(target))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run.out / target).exists()
    again = run(name)
    assert again.returncode == 0, again.stderr
    assert_loads(run.out / RESULTS[name])
    assert not litter(run.out) and not list(run.out.glob("*.part-*"))
    # And with an earlier result in place, a kill leaves that result as it is.
    before = (run.out / RESULTS[name]).read_bytes()
    if name != "SAT":  # a finished training run is not repeated
        run(name, setup=dies_replacing(RESULTS[name].split("/")[0]))
        kept = run.out / RESULTS[name].replace("exported", ".exported.old")  # a folder cannot be replaced in one step
        assert kept.read_bytes() == before


def test_tokenized_data_that_a_kill_leaves_half_written_is_removed(run):
    def dies(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    run("SAT", setup=lambda: setattr(datasets.Dataset, "save_to_disk", dies))
    assert litter(run.out / "cache")
    assert run("SAT").returncode == 0
    assert not litter(run.out / "cache")


# ------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("PTS", 50_000),
        ("SAT", 100_000),
        ("eval", 10),
        ("perplexity", 10),
        ("export", 30_000),
        ("verify", 100),
        ("data", 100),
        ("report", 100),
    ],
)
def test_no_room_for_a_file(run, name, size):
    """A limit on the size of files, as quotas set it, stands for the disk that runs full."""
    assert_clear_error(run(name, setup=small_files(size)))
    assert not (run.out / RESULTS[name]).exists()
    assert not litter(run.out)
    assert run(name).returncode == 0
    before = (run.out / RESULTS[name]).read_bytes()
    if name != "SAT":
        assert_clear_error(run(name, setup=small_files(size)))
    assert (run.out / RESULTS[name]).read_bytes() == before


@contextlib.contextmanager
def mounted(folder: Path, *options: str | Path):
    """A file system at `folder`, as `mount` takes its options; skips the test where the system does not allow it."""
    folder.mkdir(exist_ok=True)
    if os.getuid() or subprocess.run(["mount", *options, folder]).returncode:
        pytest.skip("this system lets this user mount nothing")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(run, name, tmp_path):
    small = tmp_path / "small disk"
    with mounted(small, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        (small / "filler").write_bytes(b"x" * (60 << 10))
        earlier = write_earlier(small, name)
        assert_clear_error(run(name, out=small))
        assert earlier.read_text() == "earlier"
        assert not litter(small)


@pytest.mark.parametrize(
    ("name", "variable", "options"), [("PTS", "XDG_CACHE_HOME", ["--calib_data", "self"]), ("SAT", "TMPDIR", [])]
)
def test_full_disk_elsewhere(run, name, variable, options, tmp_path):
    """Where the model's own text is kept, and where temporary files are."""
    small = tmp_path / "small disk"
    with mounted(small, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        (small / "filler").write_bytes(b"x" * (64 << 10))

        def setup():
            os.environ[variable] = str(small)
            tempfile.tempdir = os.environ.get("TMPDIR")  # Python itself avoids a disk that is full when it starts

        assert_clear_error(run(name, *options, setup=setup))
        assert not litter(small)


@contextlib.contextmanager
def read_only(folder: Path, original: Path | None = None):
    """A folder that nobody can write to; for root, whom permissions do not stop, a read-only file system.

    Args:
        original: whose content the folder has.
    """
    if os.getuid():
        shutil.copytree(original, folder) if original else folder.mkdir()
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    with mounted(folder, *(("--bind", "-o", "ro", original) if original else ("-t", "tmpfs", "-o", "ro", "tmpfs"))):
        yield


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "verify"])
def test_read_only_output(run, name, tmp_path):
    with read_only(tmp_path / "read only"):
        assert_clear_error(run(name, out=tmp_path / "read only"), "read only")


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if "{model}" in command])
def test_read_only_model(run, name, tmp_path, model_dir):
    with read_only(tmp_path / "model", model_dir):
        result = run(name, model=tmp_path / "model")
        assert result.returncode == 0, result.stderr


# -------------------------------------------------------------------------------------------- too little memory


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("PTS", (torch.nn.Linear, "forward", 10)),
        ("SAT", (torch.nn.Linear, "forward", 10)),
        ("eval", (torch.nn.Linear, "forward", 10)),
        ("perplexity", (torch.nn.Linear, "forward", 10)),
        ("export", (safetensors.torch, "save_file")),
        ("verify", (torch, "load")),
    ],
)
def test_memory_that_ends_during_the_work(run, name, where):
    earlier = write_earlier(run.out, name)
    assert_clear_error(run(name, setup=lacks_memory_in(*where)), "out of memory (tried to allocate 262144.0 GiB)", "; ")
    assert earlier.read_text() == "earlier"
    assert not litter(run.out)


@pytest.mark.parametrize("name", ["PTS", "perplexity"])
def test_memory_limit_below_the_size_of_the_model(run, name, tmp_path, tokenizer):
    model = save_model(tmp_path / "large", tokenizer, tiny_llama(hidden=1024))
    result = run(name, model=model, setup=little_memory(32 << 20))
    assert_clear_error(result, "out of memory")
    assert not (run.out / RESULTS[name]).exists()


@pytest.mark.parametrize(
    "where",
    [(torch.nn.Linear, "forward", 10), (transformers.AutoModelForCausalLM, "from_pretrained")],
    ids=["work", "loading"],
)
def test_memory_that_ends_in_one_of_two_processes(run, where):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(rank: int):
        def setup():
            settings = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
            settings |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in settings.items()})
            PartialState._reset_state()  # which an earlier test may have left in this process
            if rank == 1:
                lacks_memory_in(*where)()

        return run("PTS", setup=setup)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(start, range(2)))
    assert all(result.returncode == 1 for result in results), [(r.returncode, r.stderr) for r in results]
    both = subprocess.CompletedProcess("", 1, "", "".join(result.stderr for result in results))
    assert_clear_error(both, "out of memory (tried to allocate 262144.0 GiB)")


# ------------------------------------------------------------------------------------- two runs at a time


LOCKS = {
    "PTS": ".lock",
    "SAT": ".lock",
    "data": ".lock",
    "eval": ".predictions.jsonl.lock",
    "export": ".exported.unfinished/.lock",
}


@pytest.mark.parametrize("name", LOCKS)
def test_second_run_in_the_same_folder_is_refused(run, name):
    lock = run.out / LOCKS[name]
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    held = os.open(lock, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert_clear_error(run(name), "another run", str(run.out))
    os.close(held)
    assert run(name).returncode == 0
    assert not litter(run.out)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in LOCKS])
def test_two_runs_at_the_same_time_write_whole_files(run, name):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: run(name), range(2)))
    assert all(result.returncode == 0 for result in results)
    assert_loads(run.out / RESULTS[name])
    assert not litter(run.out)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("PTS", errno.ENOLCK),
        ("SAT", errno.ENOTSUP),
        ("data", errno.ENOTSUP),
        ("eval", errno.EOPNOTSUPP),
        ("export", errno.ENOLCK),
    ],
)
def test_file_system_without_locks(run, name, code):
    result = run(name, setup=without_locks(code))
    assert result.returncode == 0, result.stderr
    assert_loads(run.out / RESULTS[name])
    assert result.stderr.count("has no locks") == 1


# ---------------------------------------------------------------------------------------- wrong clocks


@pytest.mark.parametrize(
    ("name", "half"),
    [("PTS", "layer_0001.safetensors"), ("SAT", "finetuned_modelopt_state.pth"), ("eval", "rouge.json")],
)
def test_clock_that_jumps(run, name, half):
    """A run that is killed and resumes, its files from the future and from the past."""
    run(name, setup=lambda: (jumping_clock(), dies_replacing(half)()))
    for number, path in enumerate(sorted(run.out.rglob("*"))):
        os.utime(path, ((-1) ** number * 10**6 + path.stat().st_mtime,) * 2)
    result = run(name, setup=jumping_clock)
    assert result.returncode == 0, result.stderr
    assert_loads(run.out / RESULTS[name])


# ------------------------------------------------------------------------------------------ hostile files


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


STATE_READERS = ["SAT", "eval", "perplexity", "export", "verify"]


@pytest.mark.parametrize("name", STATE_READERS)
def test_pickled_code_in_a_state_does_not_run(run, name, tmp_path, state_path):
    trap, state = tmp_path / "trap", tmp_path / "state.pth"
    content = torch.load(state_path, weights_only=True)
    torch.save({**content, "modelopt_state": Malicious(str(trap))}, state)
    assert_clear_error(run(name, state=state), str(state))
    state.write_bytes(pickle.dumps(Malicious(str(trap))))
    assert_clear_error(run(name, state=state), str(state))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["PTS", "eval"])
def test_pickled_code_in_a_checkpoint_does_not_run(run, name, tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "model.safetensors").unlink()
    trap = tmp_path / "trap"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malicious(str(trap))}))
    assert_clear_error(run(name, model=model), "cannot load the weights")
    assert not trap.exists()


def test_pickled_code_in_resume_and_cache_files_does_not_run(run, tmp_path):
    trap = tmp_path / "trap"
    bomb = pickle.dumps(Malicious(str(trap)))
    run("PTS", setup=dies_replacing("pts_modelopt_state.pth"))
    for file in (run.out / "pts_resume").iterdir():
        file.write_bytes(bomb)
    assert run("PTS").returncode == 0
    assert_loads(run.out / RESULTS["PTS"])
    run("SAT", setup=dies_replacing("finetuned_modelopt_state.pth"))
    for file in run.out.rglob("cache/**/*"):
        if file.is_file():
            file.write_bytes(bomb)
    shutil.rmtree(run.out / "checkpoints")
    result = run("SAT")
    assert result.returncode == 0, result.stderr
    assert not trap.exists()


# ------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    "damage",
    {
        "empty": lambda raw: b"",
        "cut": lambda raw: raw[: len(raw) // 2],
        "header of zeros": lambda raw: b"\0" * 64 + raw[64:],
        "header longer than the file": lambda raw: (1 << 40).to_bytes(8, "little") + raw[8:],
        "web page": lambda raw: b"<!DOCTYPE html><p>404",
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("name", ["PTS", "eval"])
def test_damaged_safetensors(run, name, damage, tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(damage[1](file.read_bytes()))
    assert_clear_error(run(name, model=model), "cannot load the weights", str(model))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"], ids=repr)
def test_damaged_config(run, content, tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "config.json").write_bytes(content)
    assert_clear_error(run("perplexity", model=model), str(model))


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"\xff"], ids=repr)
def test_damaged_tokenizer(run, content, tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "tokenizer.json").write_bytes(content)
    assert_clear_error(run("perplexity", model=model), "cannot load a tokenizer")


@pytest.mark.parametrize("name", ["SAT", "eval"])
def test_state_without_one_mask_or_with_a_wrong_one(run, name, tmp_path, state_path):
    key = "model.layers.0.mlp.up_proj._weight_mask"
    for damage in (lambda tensors: tensors.pop(key), lambda tensors: tensors.update({key: torch.ones(3, 3).bool()})):
        content = torch.load(state_path, weights_only=True)
        damage(content["model_state_dict"])
        torch.save(content, tmp_path / "state.pth")
        assert_clear_error(run(name, state=tmp_path / "state.pth"), "state.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe[]", "UTF-8"),
        (b'[{"instruction": "a\x00"}]', "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b"3", "list"),
        (b'[{"instruction": "a", "input": ["b"], "output": "c"}]', "'input'"),
        (b'{"instruction": "a", "input": "b", "output": "c"}', "list"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else None,
)
@pytest.mark.parametrize("name", ["SAT", "eval", "data"])
def test_damaged_records(run, name, content, words, tmp_path):
    for file in ("cnn_train.json", "cnn_eval.json"):
        (tmp_path / file).write_bytes(content)
    path = tmp_path / "cnn_eval.json"
    result = run(name, data=tmp_path, records=path, table=path)
    assert_clear_error(result, "" if name == "data" and words == "'input'" else words)


@pytest.mark.parametrize("name", ["SAT", "eval", "data"])
def test_odd_but_right_records_are_taken(run, name, tmp_path):
    """A byte order mark, duplicates, a line of 10 MB, half a surrogate pair, further fields."""
    odd = [
        {**RECORD, "input": "word " * 2_000_000} if name == "data" else RECORD,
        RECORD,
        {**RECORD, "input": "half a pair: \ud83d", "note": 1},
        {**RECORD, "input": "another"},
    ]
    for file in ("cnn_train.json", "cnn_eval.json"):
        (tmp_path / file).write_text(json.dumps(odd), encoding="utf-8-sig")
    path = tmp_path / "cnn_eval.json"
    result = run(name, data=tmp_path, records=path, table=path)
    assert result.returncode == 0, result.stderr
    assert_loads(run.out / RESULTS[name])


def test_damaged_predictions_log_is_made_anew(run):
    assert run("eval").returncode == 0
    first = (run.out / "predictions.jsonl").read_text()
    (run.out / "predictions.jsonl").write_text(first[: len(first) // 2])
    assert run("eval").returncode == 0
    assert (run.out / "predictions.jsonl").read_text() == first


def test_damaged_resume_files_of_pruning_are_made_anew(run):
    assert run("PTS").returncode == 0
    whole = load_state(run.out / RESULTS["PTS"])["model_state_dict"]
    shutil.rmtree(run.out / "pts_resume", ignore_errors=True)
    run("PTS", setup=dies_replacing("pts_modelopt_state.pth"))
    files = sorted((run.out / "pts_resume").glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    result = run("PTS")
    assert result.returncode == 0, result.stderr
    again = load_state(run.out / RESULTS["PTS"])["model_state_dict"]
    assert all(torch.equal(whole[key], again[key]) for key in whole)


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


@pytest.mark.parametrize("kind", ["tied head", "untied head", "odd vocabulary", "one layer"])
def test_every_kind_of_model_goes_through(run, kind, tmp_path, tokenizer):
    model = tiny_llama(vocab_size=431 if kind == "odd vocabulary" else 400, layers=1 if kind == "one layer" else 2)
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


def test_widths_that_four_does_not_divide(run, tmp_path, tokenizer):
    """Such a matrix cannot be 2:4: it stays dense, and the run says so; or the model is refused by name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=66,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    result = run("PTS", model=save_model(tmp_path / "model", tokenizer, LlamaForCausalLM(config)))
    assert "down_proj" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    if result.returncode == 0:
        masks = {name for name, _, _ in sparse_masks(load_state(run.out / RESULTS["PTS"])["model_state_dict"])}
        assert not any("down_proj" in name for name in masks) and masks


def test_tokenizer_without_end_of_text(run, tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    assert_clear_error(run("perplexity", model=model), "no end-of-text token")
