"""Compare ways of pruning to 2:4, side by side in one run: perplexity, wall time, peak memory.

    python data_prep.py --source aclsum --save_path demo/data
    python benchmarks/pts_benchmark.py --output benchmarks/pts_results.json

Arms: modelopt's own SparseGPT; SparseGPT as in the paper (reference_sparsegpt.py); ours in its three qualities. Every
arm is a process of its own and sees the same batches. Held-out text 1 is of the same kind as the calibration text
(papers, other documents), text 2 of another kind: the Python manual that ships inside Python (pydoc_data).
Memory is the peak of the process while it prunes, less what it held just before (the model and the libraries).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from arms import prune  # noqa: E402
from machine import describe_machine  # noqa: E402
from reference_sparsegpt import prune_llama  # noqa: E402

import model_io  # noqa: E402
import text_input  # noqa: E402
import utils  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARMS = ("dense", "modelopt", "balanced", "fast", "reference", "best")


def memory_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise SystemExit("peak memory is read from /proc, which only Linux has")


def deepen(model: PreTrainedModel, times: int) -> PreTrainedModel:
    """A model with every decoder layer repeated `times` times in a row (copies, each pruned for itself)."""
    import copy

    layers = [copy.deepcopy(layer) for layer in model.model.layers for _ in range(times)]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for kind in model.config.layer_types for _ in range(times)]
    return model


def run_arm(args: argparse.Namespace) -> dict:
    """Prune with one arm in this process and measure it."""
    import pydoc_data.topics

    tokenizer = model_io.load_tokenizer(args.model)
    model = model_io.load_model(args.model, torch.float32)
    if args.arm == "modelopt":
        import modelopt.torch.sparsity  # noqa: F401  its import is not part of the pruning
    if args.deepen > 1:
        with tempfile.TemporaryDirectory() as folder:  # mapped from a file, as every model is
            deepen(model, args.deepen).save_pretrained(folder)
            model = model_io.load_model(folder, torch.float32)
    calibration = text_input.read_texts(args.data / "calib.jsonl")
    batches = list(
        text_input.sample_blocks(tokenizer, calibration, args.length, args.calib_size, 0).split(args.batch_size)
    )
    model(batches[0][:1, :64])  # let the libraries take their working memory before the measurement begins
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before, started = memory_kib("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.arm == "reference":
            prune_llama(model, batches)
        elif args.arm != "dense":
            prune(args.arm, model, batches, torch.device("cpu"), Path(folder))
    result = {
        "seconds": round(time.perf_counter() - started, 1),
        "memory_mib": round((memory_kib("VmHWM") - before) / 1024, 1),
    }
    if args.deepen == 1:
        manual = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
        held_out = text_input.read_texts(args.data / "heldout.jsonl")
        papers = text_input.sample_blocks(tokenizer, held_out, args.length, args.eval_size, 0)
        other = text_input.token_blocks(tokenizer, [manual], args.length, args.eval_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=model_io.bf16_is_faster(torch.device("cpu"))):
            result["papers"] = model_io.perplexity(model, papers, torch.device("cpu"))
            result["manual"] = model_io.perplexity(model, other, torch.device("cpu"))
    return result


def measure(arm: str, args: argparse.Namespace, deepen: int = 1) -> dict:
    """Run one arm in a fresh process."""
    command = [sys.executable, __file__, "--arm", arm, "--deepen", str(deepen), "--model", args.model]
    command += ["--data", str(args.data), "--calib_size", str(args.calib_size), "--eval_size", str(args.eval_size)]
    command += ["--length", str(args.length), "--batch_size", str(args.batch_size)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    result = json.loads(lines[-1])
    print(f"{arm:<10} x{deepen} {result}", flush=True)
    return result


def print_table(results: dict[str, dict]) -> None:
    """Figures of every arm, and for the pruned ones the ratios to modelopt's."""
    dense, base = results["dense"], results.get("modelopt")
    columns = ("papers", "manual", "rise", "rise", "seconds", "MiB", "rise", "rise", "time", "memory")
    print("\n" + " " * 10 + "".join(f"{column:>9}" for column in columns) + "  (last four: divided by modelopt's)")
    for arm, row in results.items():
        rises = [row[text] - dense[text] for text in ("papers", "manual")]
        cells = [f"{row['papers']:.2f}", f"{row['manual']:.2f}", *(f"{rise:.2f}" for rise in rises)]
        cells += [f"{row['seconds']:.0f}", f"{row['memory_mib']:.0f}"]
        if base and arm != "dense":
            ratios = [rise / (base[text] - dense[text]) for rise, text in zip(rises, ("papers", "manual"), strict=True)]
            ratios += [row["seconds"] / base["seconds"], row["memory_mib"] / base["memory_mib"]]
            cells += [f"{ratio:.2f}" for ratio in ratios]
        print(f"{arm:<10}" + "".join(f"{cell:>9}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct", help="folder of a Llama-type model")
    parser.add_argument(
        "--data", type=Path, default=Path("demo/data"), help="folder with calib.jsonl and heldout.jsonl"
    )
    parser.add_argument("--calib_size", type=int, default=64, help="calibration sequences")
    parser.add_argument("--eval_size", type=int, default=32, help="held-out sequences of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences per forward pass, the same for every arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument(
        "--double", nargs="*", choices=ARMS, default=["fast"], help="arms to run on twice the layers too"
    )
    parser.add_argument("--output", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--deepen", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args)))
        return
    print(describe_machine(torch.device("cpu")), flush=True)
    results = {arm: measure(arm, args) for arm in args.arms}
    print_table(results)
    for arm in args.double:
        twice = measure(arm, args, deepen=2)
        results[f"{arm} x2"] = twice
        print(f"twice the layers, {arm}: time x{twice['seconds'] / results[arm]['seconds']:.2f}, ", end="")
        print(f"memory x{twice['memory_mib'] / results[arm]['memory_mib']:.2f} (masks included)")
    if args.output:
        utils.save_json({"calibration": [args.calib_size, args.length], "results": results}, args.output)


if __name__ == "__main__":
    utils.run_cli(main)
