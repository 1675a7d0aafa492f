"""finetune.py as users run it: the saved state, masks, resuming, sharding over processes, distillation and errors."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, TEXTS, assert_clear_error, run_script

import finetune
from sparsity import files
from sparsity.errors import UserError
from sparsity.modelopt_state import load_state, restore_sparse, sparse_masks
from sparsity.models import load_model
from sparsity.sat import checkpoints
from sparsity.sat.callbacks import read_log
from sparsity.sat.data import encode_records
from sparsity.sat.trainer import STATE_NAME
from sparsity.text import read_records

STEPS = 16
TRAINING = ["--max_length", 400, "--max_steps", STEPS, "--save_steps", 4, "--eval_steps", 8, "--lr", 1e-2]
TRAINING += ["--weight_decay", 0.5, "--logging_steps", 1, "--mixed_precision", "no"]


def command(model_dir, state_path, data_dir, output_dir, *more) -> list[str]:
    parts = ["finetune.py", "--model", model_dir, "--restore_path", state_path, "--data_path", data_dir]
    return [str(part) for part in [*parts, "--output_dir", output_dir, *more]]


@pytest.fixture
def run_here(monkeypatch, model_dir, state_path, data_dir, tmp_path):
    """Run finetune.main() in this process, which spares the imports; returns the output folder."""

    def run(*more, output_dir=tmp_path / "out") -> Path:
        monkeypatch.setattr(sys, "argv", command(model_dir, state_path, data_dir, output_dir, *more))
        try:
            finetune.main()
        finally:
            files.release_locks()  # as run_cli does at the end of a process
        return output_dir

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, state_path, data_dir):
    """An uninterrupted run of one process with a batch of 2; (output folder, completed process)."""
    folder = tmp_path_factory.mktemp("finished") / "out put"
    result = run_script(*command(model_dir, state_path, data_dir, folder, *TRAINING, "--train_bs", 2), check=True)
    return folder, result


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder / STATE_NAME)["model_state_dict"]


def assert_same_weights(first: Path, second: Path, tolerance: float) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), atol=tolerance, rtol=0)
    losses = [
        [line["loss"] for line in read_log(folder / "train_log.jsonl") if "loss" in line] for folder in (first, second)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3), "steps read the same samples"


# ------------------------------------------------------------------------------------------------ the result


def test_saved_state_restores_and_masks_are_intact(finished, model_dir, state_path):
    import modelopt.torch.opt as mto
    from transformers import AutoModelForCausalLM

    folder, result = finished
    assert "100% of" in result.stdout
    before = load_state(state_path)["model_state_dict"]
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    mto.restore(model, folder / STATE_NAME)  # in the way modelopt documents, without our helpers
    after = weights_of(folder)
    assert after.keys() == before.keys()
    checked = 0
    for name, weight, mask in sparse_masks(after):
        assert torch.equal(mask, before[name.removesuffix("weight") + "_weight_mask"])
        pruned = weight[~mask]
        assert (pruned == 0).all() and not torch.signbit(pruned).any()
        assert not torch.equal(weight[mask], before[name][mask]), "the kept weights were trained"
        assert weight.dtype == before[name].dtype
        checked += 1
    assert checked == 14
    batch = torch.tensor([[5, 6, 7, 8]])
    assert torch.isfinite(model(input_ids=batch).logits).all()


def test_log_and_plot(finished):
    folder, _ = finished
    lines = read_log(folder / "train_log.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert {"lr", "grad_norm", "tokens_per_second", "epoch"} <= training[0].keys()
    assert [line["step"] for line in lines if "eval_loss" in line] == [8, 16]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_rotate(finished):
    names = [path.name for path in checkpoints.checkpoint_folders(finished[0] / "checkpoints")]
    assert names == ["checkpoint-12", "checkpoint-16"]


def test_evaluation_loss_is_the_models_own(finished, model_dir, data_dir, tokenizer):
    """The logged loss equals the token-weighted loss that transformers computes sample by sample."""
    folder, _ = finished
    model = restore_sparse(load_model(str(model_dir)), folder / STATE_NAME)
    samples = encode_records(tokenizer, read_records(data_dir / "cnn_eval.json"), 400, 1)
    total = count = 0
    for sample in samples:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss.item()
        tokens = (labels[:, 1:] != -100).sum().item()
        total, count = total + loss * tokens, count + tokens
    logged = [line["eval_loss"] for line in read_log(folder / "train_log.jsonl") if "eval_loss" in line][-1]
    assert logged == pytest.approx(total / count, rel=1e-4)


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("more", [[], ["--load_best"]])
def test_killed_after_the_last_checkpoint_trains_no_further(finished, run_here, tmp_path, more):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    (folder / STATE_NAME).unlink()
    run_here(*TRAINING, "--train_bs", 2, "--resume", *more, output_dir=folder)
    assert checkpoints.last_complete(folder / "checkpoints").name == f"checkpoint-{STEPS}"
    assert read_log(folder / "train_log.jsonl") == read_log(finished[0] / "train_log.jsonl")
    if not more:
        assert_same_weights(finished[0], folder, 0)


def test_the_result_of_load_best_is_the_last_checkpoint_if_its_loss_is_lowest(finished, run_here):
    folder = run_here(*TRAINING, "--train_bs", 2, "--load_best")
    first, last = [line["eval_loss"] for line in read_log(folder / "train_log.jsonl") if "eval_loss" in line]
    assert last < first
    assert_same_weights(finished[0], folder, 1e-6)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(finished, model_dir, state_path, data_dir, tmp_path):
    arguments = command(model_dir, state_path, data_dir, tmp_path, *TRAINING, "--train_bs", 2)
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    root = tmp_path / "checkpoints"
    limit = time.monotonic() + 120
    while not (root / "checkpoint-4" / files.SEAL).is_file() and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / STATE_NAME).exists()
    # As if it had been killed once more while it saved: files are there, the marker is not, or sizes are wrong.
    whole = checkpoints.last_complete(root)
    partial = root / "checkpoint-14"
    shutil.copytree(whole, partial)
    (partial / files.SEAL).unlink()
    torn = root / "checkpoint-15"
    shutil.copytree(whole, torn)
    os.truncate(next(torn.rglob("*.safetensors")), 100)

    refused = run_script(*arguments)
    assert_clear_error(refused, "--resume", whole.name)
    other = run_script(*arguments, "--resume", "--seed", 3)
    assert_clear_error(other, "--seed was 0, now 3")
    run_script(*arguments, "--resume", check=True)
    assert_same_weights(finished[0], tmp_path, 1e-6)
    steps = [line["step"] for line in read_log(tmp_path / "train_log.jsonl") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigterm_saves_and_ends(model_dir, state_path, data_dir, tmp_path):
    more = ["--max_length", 400, "--max_steps", 5000, "--logging_steps", 1, "--save_steps", 5000, "--train_bs", 2]
    arguments = command(model_dir, state_path, data_dir, tmp_path, *more)
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not read_log(tmp_path / "train_log.jsonl") and time.monotonic() < limit:
        time.sleep(0.02)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "--resume" in out and "Traceback" not in err
    whole = checkpoints.last_complete(tmp_path / "checkpoints")
    assert whole and 0 < checkpoints.step_of(whole) < 5000


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(run_here, monkeypatch, tmp_path):
    from sparsity.sat import trainer

    real, calls = trainer.batch_loss, []

    def breaks_at_step_7(*args, **kwargs):
        loss = real(*args, **kwargs)
        calls.append(1)
        return loss * math.nan if len(calls) == 7 else loss

    monkeypatch.setattr(trainer, "batch_loss", breaks_at_step_7)
    with pytest.raises(UserError, match=r"loss is nan at step 7, in a batch of the records \[\d, \d\]"):
        run_here(*TRAINING, "--train_bs", 2, "--eval_steps", 100)
    assert checkpoints.last_complete(tmp_path / "out" / "checkpoints").name == "checkpoint-4"


def forget_the_end(folder: Path, copy: Path) -> Path:
    """A copy of a finished run as if it had been killed after step 12."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / f"checkpoint-{STEPS}")
    (copy / STATE_NAME).unlink()
    return copy


@pytest.mark.parametrize("name", ["training_state", "trainer_state.json", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_flipped_bit_is_skipped_in_one_line(finished, run_here, tmp_path, capfd, name):
    folder = forget_the_end(finished[0], tmp_path / "copy")
    whole = folder / "checkpoints" / "checkpoint-12"
    damaged = shutil.copytree(whole, folder / "checkpoints" / "checkpoint-13")
    path = next(path for path in sorted(damaged.rglob("*")) if path.is_file() and name in str(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run_here(*TRAINING, "--train_bs", 2, "--resume", output_dir=folder)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "checkpoint-13 is damaged and is skipped" in warnings[0]
    assert_same_weights(finished[0], folder, 1e-6)


# ---------------------------------------------------------------------------------------- several processes


def on_two_processes(arguments: list) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a launch on two processes; `arguments` are those of finetune.py."""
    command = ["bash", "launch_finetune.sh", "--num_processes=2", *map(str, arguments)]
    return command, {**os.environ, "PYTHON": sys.executable}


def run_on_two_processes(arguments: list[str]) -> subprocess.CompletedProcess:
    """Run a command line of finetune.py with the launcher."""
    words, environment = on_two_processes(arguments[1:])
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, model_dir, state_path, data_dir):
    """The run of `finished` on two processes with half the batch each."""
    folder = tmp_path_factory.mktemp("sharded") / "out put"
    wrapped = '{"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}'
    more = ["--train_bs", 1, "--fsdp_version", 1, "--fsdp", "full_shard auto_wrap", "--fsdp_config", wrapped]
    return folder, run_on_two_processes(command(model_dir, state_path, data_dir, folder, *TRAINING, *more))


@pytest.mark.slow
def test_two_sharded_processes_equal_one(finished, sharded):
    assert "weights are sharded" in sharded[1].stdout
    assert sharded[1].stderr.count("--fsdp_version 1 is no longer supported; using version 2") == 2  # check and run
    alone, together = (read_log(folder / "train_log.jsonl") for folder in (finished[0], sharded[0]))
    for key in ("loss", "eval_loss", "grad_norm"):
        ours = [line[key] for line in alone if key in line]
        theirs = [line[key] for line in together if key in line]
        assert len(ours) == len(theirs) > 0
        assert theirs == pytest.approx(ours, rel=2e-3)
    assert_same_weights(finished[0], sharded[0], 2e-3)  # of all names and shapes


@pytest.mark.slow
def test_sharded_run_saves_pruned_weights_as_zeros(sharded, model_dir, state_path):
    before = load_state(state_path)["model_state_dict"]
    for name, weight, mask in sparse_masks(weights_of(sharded[0])):
        assert torch.equal(mask, before[name.removesuffix("weight") + "_weight_mask"])
        assert (weight[~mask] == 0).all() and not torch.signbit(weight[~mask]).any()
    restore_sparse(load_model(str(model_dir)), sharded[0] / STATE_NAME)


@pytest.mark.slow
def test_one_process_resumes_what_two_wrote(finished, sharded, run_here, tmp_path):
    folder = forget_the_end(sharded[0], tmp_path / "copy")
    shards = folder / "checkpoints" / "checkpoint-12" / "training_state"
    sizes = [path.stat().st_size for path in shards.iterdir()]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes), "each process writes its half"
    with pytest.raises(UserError, match="optimizer steps of 2 samples .* got 4; change --train_bs"):
        run_here(*TRAINING, "--train_bs", 4, "--resume", output_dir=folder)
    run_here(*TRAINING, "--train_bs", 1, "--gradient_accumulation_steps", 2, "--resume", output_dir=folder)
    assert_same_weights(finished[0], folder, 2e-3)


@pytest.mark.slow
def test_two_processes_resume_what_one_wrote(finished, model_dir, state_path, data_dir, tmp_path):
    folder = forget_the_end(finished[0], tmp_path / "copy")
    more = [*TRAINING, "--train_bs", 1, "--resume"]
    words, environment = on_two_processes(command(model_dir, state_path, data_dir, folder, *more)[1:])
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_same_weights(finished[0], folder, 2e-3)


def kill_all(process: subprocess.Popen) -> None:
    """Kill a launcher and its workers, which run in sessions of their own, and wait for their end."""
    launcher = psutil.Process(process.pid)
    processes = [launcher, *launcher.children(recursive=True)]
    for each in processes:
        each.kill()
    psutil.wait_procs(processes)


@pytest.mark.slow
def test_killed_while_two_processes_save(finished, run_here, model_dir, state_path, data_dir, tmp_path):
    folder = tmp_path / "killed"
    arguments = command(model_dir, state_path, data_dir, folder, *TRAINING, "--train_bs", 1)
    words, environment = on_two_processes(arguments[1:])
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    saving = folder / "checkpoints" / "checkpoint-8"
    limit = time.monotonic() + 240
    while not any(saving.glob("training_state/*.safetensors")) and time.monotonic() < limit:
        time.sleep(0.001)
    kill_all(process)
    if files.is_sealed(saving):  # the kill came too late: take away what the slower process had to write
        (saving / files.SEAL).unlink()
        next(saving.glob("training_state/*.safetensors")).unlink()
    assert checkpoints.last_complete(folder / "checkpoints").name == "checkpoint-4"
    run_here(*TRAINING, "--train_bs", 2, "--resume", output_dir=folder)
    assert_same_weights(finished[0], folder, 2e-3)


# --------------------------------------------------------------------------------------- low-rank training

LOW_RANK = [*TRAINING, "--lora_rank", 8]


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory, model_dir, state_path, data_dir):
    """Low-rank training in one process with a batch of 2; the output folder."""
    folder = tmp_path_factory.mktemp("low rank") / "out put"
    run_script(*command(model_dir, state_path, data_dir, folder, *LOW_RANK, "--train_bs", 2), check=True)
    return folder


def test_low_rank_training_saves_an_ordinary_sparse_state(low_rank, model_dir, state_path):
    import modelopt.torch.opt as mto
    from transformers import AutoModelForCausalLM

    before, after = load_state(state_path)["model_state_dict"], weights_of(low_rank)
    mto.restore(AutoModelForCausalLM.from_pretrained(model_dir), low_rank / STATE_NAME)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }
    masked = {name for name, _, _ in sparse_masks(after)}
    for name, weight, mask in sparse_masks(after):
        pruned, change = weight[~mask], weight - before[name] * mask
        assert torch.equal(mask, before[name.removesuffix("weight") + "_weight_mask"])
        assert (pruned == 0).all() and not torch.signbit(pruned).any()
        assert (change[mask] != 0).float().mean() > 0.9, "the kept weights were trained"
    unchanged = {name for name in after.keys() - masked if torch.equal(after[name], before[name])}
    assert {name for name in after.keys() - masked - unchanged if not name.endswith("_weight_mask")} == {
        name for name in after if "norm" in name
    }
    lines = [line for line in read_log(low_rank / "train_log.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_checkpoints_of_low_rank_training_hold_no_frozen_weights_and_resume(low_rank, run_here, tmp_path):
    from safetensors import safe_open

    folder = shutil.copytree(low_rank, tmp_path / "copy")
    (folder / STATE_NAME).unlink()
    shutil.rmtree(folder / "checkpoints" / f"checkpoint-{STEPS}")
    last = checkpoints.last_complete(folder / "checkpoints")
    (file,) = (last / "training_state").iterdir()
    with safe_open(file, "pt") as saved:
        names = [name for name in saved.keys() if name.startswith("model.") and "norm" not in name]  # noqa: SIM118
    assert {name.rsplit(".", 1)[1] for name in names} == {"lora_A", "lora_B"}
    with pytest.raises(UserError, match="--lora_rank was 8, now 4"):
        run_here(*TRAINING, "--lora_rank", 4, "--train_bs", 2, "--resume", output_dir=folder)
    run_here(*LOW_RANK, "--train_bs", 2, "--resume", output_dir=folder)
    assert_same_weights(low_rank, folder, 1e-6)


@pytest.mark.slow
def test_a_sharded_teacher_gives_the_loss_of_one_process(run_here, model_dir, state_path, data_dir, tmp_path):
    options = ["--distill", "--distill_kl", 0.5, "--max_steps", 3, "--lr", 1e-2, "--mixed_precision", "no"]
    options += ["--max_length", 400, "--logging_steps", 1]
    run_here(*options, "--train_bs", 2)
    arguments = command(model_dir, state_path, data_dir, tmp_path / "two", *options, "--train_bs", 1)
    run_on_two_processes(arguments)
    logs = [read_log(tmp_path / name / "train_log.jsonl") for name in ("out", "two")]
    one, two = ([line["loss"] for line in log if "loss" in line] for log in logs)
    assert len(one) == 3 and two == pytest.approx(one, rel=2e-3)


@pytest.mark.slow
def test_low_rank_training_on_two_processes_equals_one(low_rank, model_dir, state_path, data_dir, tmp_path):
    """With recomputed activations, and ended in between: the checkpoint comes from shards."""
    more = ["--train_bs", 1, "--gradient_checkpointing", "--resume"]
    arguments = command(model_dir, state_path, data_dir, tmp_path, *LOW_RANK, *more)
    assert "weights are sharded" in run_on_two_processes(arguments).stdout
    (tmp_path / STATE_NAME).unlink()
    shutil.rmtree(tmp_path / "checkpoints" / f"checkpoint-{STEPS}")
    run_on_two_processes(arguments)
    for key in ("loss", "eval_loss", "grad_norm"):
        alone, together = (
            [line[key] for line in read_log(folder / "train_log.jsonl") if key in line]
            for folder in (low_rank, tmp_path)
        )
        assert together == pytest.approx(alone, rel=2e-3)
    assert_same_weights(low_rank, tmp_path, 2e-3)


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (1, 4), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_training_in_bf16_with_everything(run_here, model_dir, state_path, data_dir, tmp_path, processes, rank):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS * 100))
    more = ["--text_path", text, "--text_ratio", 0.3, "--packing", "--max_length", 900]
    more += ["--distill", "--load_best", "--lr", 1e-2, "--gradient_checkpointing"]
    more += ["--mixed_precision", "bf16", "--no_freeze_embeddings", "--lora_rank", rank]
    more += ["--max_steps", 10, "--train_bs", 2 // processes, "--logging_steps", 1]
    folder = tmp_path / "out"
    if processes == 1:
        run_here(*more)
    else:
        run_on_two_processes(command(model_dir, state_path, data_dir, folder, *more))
    losses = [line["loss"] for line in read_log(folder / "train_log.jsonl") if "loss" in line]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    before, after = load_state(state_path)["model_state_dict"], weights_of(folder)
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert {tensor.dtype for tensor in after.values()} == {torch.float32, torch.bool}


# -------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd", "lion_8bit"])
def test_other_optimizers_leave_pruned_weights_at_zero(run_here, state_path, optimizer, monkeypatch):
    from sparsity.sat import trainer
    from sparsity.sat.fsdp import full_state, masked_weights

    def gather(model, *args, **options):
        trained = list(masked_weights(model))
        assert trained and all((weight[~mask] == 0).all() for _, weight, mask in trained), "before it is masked again"
        return full_state(model, *args, **options)

    if optimizer == "lion_8bit":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(trainer, "full_state", gather)
    more = ["--max_steps", 3, "--weight_decay", 0.5, "--train_bs", 2, "--max_length", 400]
    more += ["--lr", 1e-2, "--mixed_precision", "no"]
    folder = run_here(*more, "--optim", optimizer)
    before = load_state(state_path)["model_state_dict"]
    for name, weight, mask in sparse_masks(weights_of(folder)):
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight[mask], before[name][mask])


def test_frozen_embeddings_stay_as_they_are(run_here, state_path, tmp_path):
    more = ["--max_steps", 2, "--train_bs", 2, "--max_length", 400, "--lr", 1e-2]
    before = load_state(state_path)["model_state_dict"]
    for option, frozen in (("--freeze_embeddings", True), ("--no_freeze_embeddings", False)):
        after = weights_of(run_here(*more, option, output_dir=tmp_path / option))
        assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"]) is frozen
        assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])  # not tied in this model


def test_runs_share_tokenized_data_and_record_the_prompt(run_here, data_dir, tmp_path, monkeypatch):
    from sparsity.sat import data
    from sparsity.text import trained_prompt

    (tmp_path / "t.json").write_text(json.dumps({"head": "{instruction}\n", "tail": "\n=>"}))
    more = ["--max_steps", 1, "--train_bs", 2, "--max_length", 400, "--prompt_template", tmp_path / "t.json"]
    first = run_here(*more, output_dir=tmp_path / "first")
    assert not (first / "cache").exists() and (data_dir / "cache").is_dir()
    assert trained_prompt(first / STATE_NAME) == {"head": "{instruction}\n", "tail": "\n=>", "special_tokens": True}
    monkeypatch.setattr(data, "encode_records", lambda *_: pytest.fail("tokenized again"))
    run_here(*more, output_dir=tmp_path / "second")


def test_dry_run_shows_memory_without_loading(model_dir, state_path, data_dir, tmp_path):
    options = ["--dry_run", "--world_size", 8]
    result = run_script(*command(model_dir, state_path, data_dir, tmp_path, *options), check=True)
    assert "estimated memory per GPU, 8 GPU(s)" in result.stdout and "optimizer" in result.stdout


# ---------------------------------------------------------------------------------------------------- errors
