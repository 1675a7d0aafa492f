"""What sparsity-aware training brings: quality regained at equal steps, and useful tokens per second.

    python data_prep.py --source aclsum --save_path data/aclsum
    python benchmarks/sat_benchmark.py --restore_path PTS_DIR/pts_modelopt_state.pth --output sat_results.json

Part "recovery" trains the same pruned model with cross entropy, with the dense model as teacher, and with the teacher's
hidden states as well, each for the same steps on the same data in the same order. It reports the held-out perplexity,
the share of PTS's rise that each regains, (PTS - SAT) / (PTS - dense), and ROUGE on test records. Part "throughput"
trains one epoch on the records with batches padded to --max_length, to their longest sample, grouped by length, and
packed; each batch of the packed arm holds as many samples on average as the others, so that losses can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import describe_machine  # noqa: E402

import model_io  # noqa: E402
import sat_data  # noqa: E402
import text_input  # noqa: E402
import utils  # noqa: E402
from sat_trainer import read_log  # noqa: E402

RECOVERY = {
    "SAT": [],
    "SAT + logits": ["--distill", "--distill_kl", "0.5"],
    "SAT + logits + hidden": ["--distill", "--distill_kl", "0.5", "--distill_hidden", "1"],
}


def train(arguments: argparse.Namespace, folder: Path, *more: Any) -> list[dict]:
    """Run the launcher with settings common to all arms; returns its log."""
    common = ["--model", arguments.model, "--restore_path", arguments.restore_path, "--data_path", arguments.data_path]
    common += ["--output_dir", folder, "--train_bs", arguments.train_bs, "--lr", arguments.lr, "--logging_steps", 1]
    command = ["bash", ROOT / "launch_finetune.sh", *common, *more]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([str(part) for part in command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return read_log(folder / "train_log.jsonl")


def held_out_perplexity(arguments: argparse.Namespace, blocks: torch.Tensor, state: Path | None) -> float:
    """Perplexity on blocks [N, T] of the dense model, or with a state; all arms in the same arithmetic."""
    device = model_io.resolve_device("auto")
    model = model_io.load_model(arguments.model, torch.float32)
    model = model_io.restore_sparse(model, state) if state else model
    with torch.autocast(device.type, torch.bfloat16):
        return model_io.perplexity(model.to(device), blocks, device)


def rouge(arguments: argparse.Namespace, state: Path | None, folder: Path) -> dict[str, float]:
    """F-measures of greedy summaries of the first --examples test records."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "eval.py", "--model_dir", arguments.model, "--limit", arguments.examples]
    command += ["--data_path", Path(arguments.data_path) / "cnn_eval.json", "--beam_size", 1, "--batch_size", 8]
    command += ["--model_max_length", arguments.context, "--output_json", folder / "rouge.json", "--samples", 0]
    command += ["--modelopt_restore_path", state] if state else []
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    scores = utils.read_json(folder / "rouge.json", "scores")
    return {name: scores[name] for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")}


def recovery(arguments: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Perplexity, share regained and ROUGE of every arm."""
    tokenizer = model_io.load_tokenizer(arguments.model)
    blocks = text_input.token_blocks(tokenizer, text_input.read_texts(arguments.heldout), arguments.context)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    blocks = blocks[order[: arguments.blocks]]
    results: dict[str, dict[str, float]] = {}
    for name in ("dense", "PTS", *arguments.arms):
        folder, speed = work / name.replace(" ", ""), {}
        state = None if name == "dense" else Path(arguments.restore_path)
        if name in RECOVERY:
            more = ["--text_path", arguments.text_path, "--text_ratio", arguments.text_ratio, "--packing"]
            more += ["--weight_decay", 0, "--max_length", arguments.context, "--max_steps", arguments.steps]
            # One checkpoint, of the last step: on a CPU, saving them takes as long as some steps.
            more += ["--eval_steps", 10**6, "--save_steps", 10**6, "--max_eval_samples", 8]
            log = train(arguments, folder, *more, *RECOVERY[name])
            state = folder / "finetuned_modelopt_state.pth"
            rates = [line["tokens_per_second"] for line in log if "loss" in line]
            speed = {"tokens_per_second": sum(rates) / len(rates)}
        value = held_out_perplexity(arguments, blocks, state)
        dense, pruned = (results.get(base, {}).get("perplexity", value) for base in ("dense", "PTS"))
        results[name] = {"perplexity": value} | rouge(arguments, state, folder) | speed
        if name in RECOVERY:
            results[name]["regained"] = (pruned - value) / (pruned - dense)
        print(json.dumps({name: results[name]}), flush=True)
        shutil.rmtree(folder)  # gigabytes of checkpoints
    return results


def throughput(arguments: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Useful tokens per second and final evaluation loss of the ways to batch, over one epoch of the records."""
    tokenizer = model_io.load_tokenizer(arguments.model)
    data = work / "records"
    data.mkdir()
    for name, count in (("cnn_train.json", arguments.records), ("cnn_eval.json", 8)):
        utils.save_json(text_input.read_records(Path(arguments.data_path) / name)[:count], data / name)
    samples = sat_data.load_records(tokenizer, data / "cnn_train.json", arguments.max_length, work / "cache", 1)
    in_a_row = len(samples) / len(sat_data.Packed(samples, arguments.max_length))
    packed_bs = max(1, round(arguments.train_bs / in_a_row))
    arms = {
        "padded to max_length": ["--pad_to_max", "--no-group_by_length"],
        "padded to the longest": ["--no-group_by_length"],
        "grouped by length": [],
        "packed": ["--packing", "--train_bs", packed_bs],
    }
    results = {}
    for name, options in arms.items():
        more = ["--data_path", data, "--max_length", arguments.max_length, "--num_epochs", 1, *options]
        log = train(arguments, work / name.replace(" ", "_"), *more)
        steps = [line for line in log if "loss" in line][1:]  # the first step warms up
        # tokens_per_second = tokens / seconds of its step, so the mean over equal shares of tokens is harmonic
        rate = len(steps) / sum(1 / line["tokens_per_second"] for line in steps)
        loss = [line["eval_loss"] for line in log if "eval_loss" in line][-1]
        results[name] = {"tokens_per_second": rate, "eval_loss": loss}
        results[name]["ratio"] = rate / results["padded to max_length"]["tokens_per_second"]
        print(json.dumps({name: results[name]}), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--restore_path", required=True, help="state of hf_pts.py for the model")
    parser.add_argument(
        "--data_path", default=str(ROOT / "data/aclsum"), help="folder of cnn_train.json, cnn_eval.json"
    )
    parser.add_argument("--text_path", default=str(ROOT / "data/aclsum/calib.jsonl"), help="plain text to train on")
    parser.add_argument("--heldout", default=str(ROOT / "data/aclsum/heldout.jsonl"), help="text for the perplexity")
    parser.add_argument("--parts", nargs="+", choices=("recovery", "throughput"), default=["recovery", "throughput"])
    parser.add_argument("--arms", nargs="+", choices=RECOVERY, default=list(RECOVERY), help="of the recovery")
    parser.add_argument("--examples", type=int, default=32, help="test records for ROUGE (default %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each recovery arm (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--train_bs", type=int, default=4)
    parser.add_argument("--text_ratio", type=float, default=0.7)
    parser.add_argument("--context", type=int, default=512, help="tokens of a perplexity window and a training row")
    parser.add_argument("--blocks", type=int, default=24, help="perplexity windows (default %(default)s)")
    parser.add_argument("--max_length", type=int, default=2048, help="for the throughput (default %(default)s)")
    parser.add_argument("--records", type=int, default=32, help="for the throughput (default %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the figures")
    arguments = parser.parse_args()

    results: dict = {"machine": describe_machine(model_io.resolve_device("auto")), "arguments": vars(arguments)}
    with tempfile.TemporaryDirectory() as work:
        for part in arguments.parts:
            results[part] = globals()[part](arguments, Path(work))
    print(json.dumps(results, indent=2))
    if arguments.output:
        utils.save_json(results, arguments.output)


if __name__ == "__main__":
    utils.run_cli(main)
