"""What sparsity-aware training achieves: quality recovered in equal steps, and useful tokens per second.

    python data_prep.py --source aclsum --save_path data/aclsum
    python -m benchmarks.texts demo/texts
    python -m benchmarks.finetuning --restore_path PTS_DIR/pts_modelopt_state.pth

Part "recovery" trains the same pruned model in several ways, and the dense one for comparison, each for the same steps
of as many tokens, on records and plain text. It reports perplexity on held-out papers, the kind that is trained on, and
on four kinds of text that are in no training data; the fraction of the rise through PTS that each way regains, (PTS -
SAT) / (PTS - dense); and ROUGE on test records. Part "throughput" trains one epoch on the records with batches padded
to --max_length, padded to their longest sample, grouped by length, and packed. A batch of the packed arm holds as many
samples on average as one of the others, so that losses can be compared. Part "trainer" compares our trainer with
transformers' own on the dense model. Part "memory" compares the peak memory of low-rank training with that of full
training.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import texts
from benchmarks.commands import ROOT, run_command, run_for_figures
from benchmarks.machine import add_output_option, check_output, save_figures
from sparsity.attention import use_blocked_attention
from sparsity.devices import resolve_device
from sparsity.files import require_file, save_json
from sparsity.metrics import ROUGE_TYPES, read_metrics
from sparsity.modelopt_state import load_for_inference
from sparsity.models import load_tokenizer
from sparsity.text import read_records
from utils import Parser, check_at_least, run_cli

RANK = 64  # of low-rank training
MEMORY_STEPS = 3  # optimizer steps in which memory is measured
TEACHER = ["--distill", "--distill_kl", 0.5, "--distill_kl_answers", 0]
# Ways to train: their options, after those of all; {text} stands for --text_path, {further} for --further.
DENSE_ARM = "dense, cross entropy"  # the baseline: the dense model, trained in the same way
RECOVERY: dict[str, list[Any]] = {
    DENSE_ARM: ["--text_path", "{text}"],
    "cross entropy": ["--text_path", "{text}"],
    "KL": ["--text_path", "{text}", *TEACHER],
    "KL, self-generated text": ["--text_path", "{text}=0.4", "self=0.6", *TEACHER],
    "KL, several kinds": ["--text_path", "{text}=0.2", "{further}=0.3", "self=0.5", *TEACHER],
    "KL, self-generated text, rank 64": [
        "--text_path",
        "{text}=0.4",
        "self=0.6",
        *TEACHER,
        "--lora_rank",
        RANK,
        "--lr",
        3e-3,
    ],
}
NEVER = 10**6  # steps between evaluations or checkpoints: only at the end


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m benchmarks.finetuning")
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct", help="dense model that was pruned")
    parser.add_argument("--restore_path", type=Path, required=True, metavar="STATE", help="its state from hf_pts.py")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data/aclsum"), help="folder with cnn_train.json and cnn_eval.json"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--train_bs", type=int, default=4, help="samples or packed rows per batch")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    add_output_option(parser, "finetuning")
    group = parser.add_argument_group("recovery")
    group.add_argument("--arms", nargs="+", choices=RECOVERY, default=list(RECOVERY), help="ways to train")
    group.add_argument("--text_path", type=Path, default=Path("data/aclsum/calib.jsonl"), help="text to train on")
    group.add_argument(
        "--further", type=Path, default=Path("data/aclsum/further.jsonl"), help="texts of further kinds to train on"
    )
    group.add_argument("--text_ratio", type=float, default=0.8, help="fraction of plain text among the training tokens")
    group.add_argument("--heldout", type=Path, default=Path("data/aclsum/heldout.jsonl"), help="papers to evaluate on")
    group.add_argument("--texts", type=Path, default=Path("demo/texts"), help="folder of benchmarks.texts")
    group.add_argument("--self_tokens", type=int, default=131072, help="tokens that the dense model writes")
    group.add_argument("--more", default="", help="further options of launch_finetune.sh for all arms, in one string")
    group.add_argument("--context", type=int, default=512, help="tokens of a perplexity window and a training row")
    group.add_argument("--blocks", type=int, default=24, help="perplexity windows of each text")
    group.add_argument("--steps", type=int, default=240, help="optimizer steps of each arm")
    group.add_argument("--examples", type=int, default=32, help="test records for ROUGE")
    group = parser.add_argument_group("throughput")
    group.add_argument("--max_length", type=int, default=2048, help="tokens of the longest sample")
    group.add_argument("--records", type=int, default=32, help="training records")
    group = parser.add_argument_group("trainer")
    group.add_argument("--trainer_steps", type=int, default=20, help="optimizer steps of each trainer")
    args = parser.parse_args()
    check_at_least(args, 1, "train_bs", "blocks", "steps", "examples", "max_length", "records", "self_tokens")
    check_at_least(args, 3, "trainer_steps")
    check_at_least(args, 2, "context")
    require_file(args.restore_path, "PTS state (--restore_path)")
    for name in ("cnn_train.json", "cnn_eval.json"):
        require_file(args.data_path / name, "data file")
    if "recovery" in args.parts:
        require_file(args.text_path, "text file (--text_path)")
        require_file(args.further, "text file (--further)")
        require_file(args.heldout, "text file (--heldout)")
        texts.require_texts(args.texts)
    check_output(args.output)
    return args


def train(args: argparse.Namespace, folder: Path, *more: Any, dense: bool = False) -> list[dict[str, Any]]:
    """Run the launcher with the settings of all arms, and `more`; returns its training log."""
    from sparsity.sat.callbacks import read_log

    common = ["--model", args.model, "--data_path", args.data_path]
    common += [] if dense else ["--restore_path", args.restore_path]
    common += ["--output_dir", folder, "--train_bs", args.train_bs, "--lr", args.lr, "--logging_steps", 1]
    run_command("bash", ROOT / "launch_finetune.sh", *common, *more)
    return read_log(folder / "train_log.jsonl")


# --------------------------------------------------------------------------------------------------------- recovery


def perplexities(model_name: str, blocks: dict[str, torch.Tensor], state: Path | None) -> dict[str, float]:
    """Perplexity on blocks [N, T] of every text, of the dense model or, with a state, of the sparse one."""
    device = resolve_device("auto")
    model = load_for_inference(model_name, "fp32", state).to(device)
    use_blocked_attention(model, device)
    with torch.autocast(device.type, torch.bfloat16):
        return texts.perplexities(model, blocks, device)


def rouge(args: argparse.Namespace, state: Path | None, folder: Path) -> dict[str, float]:
    """F-measures, in percent, of greedy summaries of the first --examples test records."""
    output = folder / "rouge.json"
    command = [sys.executable, ROOT / "eval.py", "--model_dir", args.model, "--limit", args.examples]
    command += ["--data_path", args.data_path / "cnn_eval.json", "--beam_size", 1, "--batch_size", 8]
    command += ["--model_max_length", args.context, "--output_json", output, "--samples", 0]
    command += ["--modelopt_restore_path", state] if state else []
    run_command(*command)
    scores = read_metrics(output)
    return {name: scores[name] for name in ROUGE_TYPES}


def train_arm(args: argparse.Namespace, name: str, folder: Path) -> float:
    """Train one arm of the recovery; returns its tokens per second."""
    options = ["--text_ratio", args.text_ratio, "--self_tokens", args.self_tokens, "--packing", "--weight_decay", 0]
    options += ["--max_length", args.context, "--max_steps", args.steps, "--max_eval_samples", 8]
    # On a CPU, saving a checkpoint takes as long as some steps.
    options += ["--eval_steps", NEVER, "--save_steps", NEVER, *shlex.split(args.more)]
    own = [str(word).format(text=args.text_path, further=args.further) for word in RECOVERY[name]]
    log = train(args, folder, *options, *own, dense=name == DENSE_ARM)
    rates = [line["tokens_per_second"] for line in log if "loss" in line]
    return sum(rates) / len(rates)


def regained(result: dict[str, float], dense: dict[str, float], pruned: dict[str, float]) -> dict[str, float]:
    """Shares of the rise in perplexity that an arm regains: on the trained kind, and the mean of all other kinds."""
    shares = [(pruned[kind] - result[kind]) / (pruned[kind] - dense[kind]) for kind in texts.KINDS]
    return {"regained, trained kind": shares[0], "regained, other kinds": sum(shares[1:]) / len(shares[1:])}


def recovery(args: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Perplexity, ROUGE, regained fraction and tokens per second of every arm."""
    tokenizer = load_tokenizer(args.model)
    blocks = texts.held_out(tokenizer, args.heldout, args.texts, args.context, args.blocks)
    results: dict[str, dict[str, float]] = {}
    for name in ("dense", "PTS", *args.arms):
        folder = work / name.replace(" ", "")
        folder.mkdir()
        state, result = None if name == "dense" else args.restore_path, {}
        if name in RECOVERY:
            result["tokens_per_second"] = train_arm(args, name, folder)
            state = folder / "finetuned_modelopt_state.pth"
        result |= perplexities(args.model, blocks, state)
        result |= rouge(args, state, folder)
        if name in RECOVERY:
            result |= regained(result, results["dense"], results["PTS"])
        results[name] = result
        print(json.dumps({name: result}), flush=True)
        shutil.rmtree(folder)  # gigabytes of checkpoints
    return results


# ------------------------------------------------------------------------------------------------------- throughput


def throughput(args: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Useful tokens per second and final evaluation loss of the ways to batch, over one epoch of the records."""
    from sparsity.sat.data import Packed, load_records

    data = work / "records"
    data.mkdir()
    for name, count in (("cnn_train.json", args.records), ("cnn_eval.json", 8)):
        save_json(read_records(args.data_path / name)[:count], data / name)
    tokenizer = load_tokenizer(args.model)
    samples = load_records(tokenizer, data / "cnn_train.json", args.max_length, work / "cache", 1)
    samples_per_row = len(samples) / len(Packed(samples, args.max_length))
    arms = {
        "padded to the longest": ["--no_group_by_length"],
        "grouped by length": [],
        "packed": ["--packing", "--train_bs", max(1, round(args.train_bs / samples_per_row))],
    }
    results: dict[str, dict[str, float]] = {}
    for name, options in arms.items():
        common = ("--data_path", data, "--max_length", args.max_length, "--num_epochs", 1)
        log = train(args, work / name.replace(" ", "_"), *common, *options)
        steps = [line for line in log if "loss" in line]
        steps = steps[1:] or steps  # the first step warms up
        # A rate is the tokens of a step divided by its seconds, so its mean over equal shares of tokens is harmonic.
        rate = len(steps) / sum(1 / line["tokens_per_second"] for line in steps)
        loss = [line["eval_loss"] for line in log if "eval_loss" in line][-1]
        results[name] = {"tokens_per_second": rate, "eval_loss": loss}
        results[name]["ratio"] = rate / results["padded to the longest"]["tokens_per_second"]
        print(json.dumps({name: results[name]}), flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------- trainer


def trainer(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """Useful tokens per second of our trainer with masks, and of transformers' Trainer on the dense model."""
    shared = ["--model", args.model, "--restore_path", args.restore_path, "--data_path", args.data_path, "--packing"]
    shared += ["--text_path", args.text_path, "--text_ratio", args.text_ratio, "--max_length", args.context]
    shared += ["--train_bs", args.train_bs, "--lr", args.lr, "--max_steps", args.trainer_steps, "--logging_steps", 1]
    shared += ["--save_strategy", "no", "--eval_strategy", "no"]
    command = (sys.executable, "-m", "benchmarks.plain_trainer", *shared, "--output_dir", work / "plain")
    plain = run_for_figures(*command)["tokens_per_second"]
    run_command("bash", ROOT / "launch_finetune.sh", *shared, "--output_dir", work / "ours")
    from sparsity.sat.callbacks import read_log

    steps = [line for line in read_log(work / "ours" / "train_log.jsonl") if "loss" in line][1:]
    ours = len(steps) / sum(1 / line["tokens_per_second"] for line in steps)
    return {"transformers, dense": plain, "ours, with masks": ours, "ratio": ours / plain}


# ----------------------------------------------------------------------------------------------------------- memory


def memory(args: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Peak MiB beyond the weights of training in full and of a low rank, on one process."""
    shared = ["--model", args.model, "--restore_path", args.restore_path, "--data_path", args.data_path, "--packing"]
    shared += ["--max_length", args.context, "--train_bs", args.train_bs, "--max_steps", MEMORY_STEPS]
    shared += ["--save_strategy", "no", "--eval_strategy", "no"]
    results: dict[str, dict[str, float]] = {}
    command = (sys.executable, "-m", "benchmarks.training_memory", *shared)
    for suffix, checkpointing in (("", []), (", gradient checkpointing", ["--gradient_checkpointing"])):
        full, low = f"full{suffix}", f"rank {RANK}{suffix}"
        for name, options in ((full, []), (low, ["--lora_rank", RANK])):
            output = ("--output_dir", work / name.replace(" ", "_"))
            results[name] = run_for_figures(*command, *checkpointing, *options, *output)
            print(json.dumps({name: results[name]}), flush=True)
        results[low]["of_full_training"] = results[low]["memory_mib"] / results[full]["memory_mib"]
    return results


PARTS = {"recovery": recovery, "throughput": throughput, "trainer": trainer, "memory": memory}


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = {part: PARTS[part](args, Path(work)) for part in args.parts}
    print(json.dumps(results, indent=2))
    save_figures(results, args, resolve_device("auto"))


if __name__ == "__main__":
    run_cli(main)
