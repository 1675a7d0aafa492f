"""Prune a random model of Llama-2-7B's shape with our engine and with modelopt's SparseGPT: time and GPU memory.

    python benchmarks/gpu_pts.py --output gpu_pts.json

Every arm is a process of its own and sees the same random tokens. Ours holds one decoder layer at a time on the GPU, so
that its memory does not depend on the number of layers; modelopt holds the model and all Hessians. By default 2 of the
32 layers are pruned, and the times are scaled to 32. With --device cpu the memory is that of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import describe_machine, settings  # noqa: E402

import model_io  # noqa: E402
import utils  # noqa: E402
from layerwise import QUALITY, peak_memory_mib, prune_model  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARMS = ("modelopt", "balanced", "fast")
LAYERS = 32
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 400}


def random_model(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A Llama with random weights, filled on the device: half precision on a GPU, single on the CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = TINY_SHAPE if args.tiny else SHAPE
    config = LlamaConfig(num_hidden_layers=args.layers, max_position_embeddings=4096, **shape)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prune(arm: str, model: PreTrainedModel, batches: list[torch.Tensor], device: torch.device) -> None:
    """Prune the model in place; modelopt's lies on the device, ours on the CPU."""
    if arm != "modelopt":
        from checkpoint import LayerStore

        with tempfile.TemporaryDirectory() as folder:
            inputs = [{"input_ids": batch} for batch in batches]
            prune_model(model, inputs, QUALITY[arm], device, LayerStore(Path(folder) / "layers", arm))
        return
    import modelopt.torch.sparsity as mts

    def forward_loop(model: PreTrainedModel) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch.to(device))

    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        mts.sparsify(model, "sparsegpt", config={"forward_loop": forward_loop, "verbose": False})


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, scaled to 32 layers too, and peak memory in GiB of one arm, or why it failed."""
    device = model_io.resolve_device(args.device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = (TINY_SHAPE if args.tiny else SHAPE)["vocab_size"]
    tokens = torch.randint(vocabulary, (args.sequences, args.length), generator=generator)
    model = random_model(args, device)
    if args.arm == "modelopt":
        import modelopt.torch.sparsity  # noqa: F401  its import is not part of the pruning
    else:
        model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        prune(args.arm, model, list(tokens.split(args.batch_size)), device)
    except torch.OutOfMemoryError:
        return {"failed": "out of GPU memory"}
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    memory = peak_memory_mib(device) / 1024
    return {"seconds": seconds, "seconds_scaled": seconds * LAYERS / args.layers, "peak_gib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=2, help="decoder layers, of Llama-2-7B's 32 (default %(default)s)"
    )
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences per forward pass (default %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script out")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the figures")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args)))
        return
    device = model_io.resolve_device(args.device)
    print(describe_machine(device), flush=True)
    results: dict[str, dict[str, Any]] = {}
    for arm in args.arms:
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        results[arm] = (
            json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": "see its error above"}
        )
        print(f"{arm:<10}{results[arm]}", flush=True)
    if args.output:
        figures = {"machine": describe_machine(device), "arms": results}
        utils.save_json({**figures, "arguments": settings(args)}, args.output)
    if any("failed" in result for arm, result in results.items() if arm != "modelopt"):
        raise utils.UserError("an arm failed; its error is above")


if __name__ == "__main__":
    utils.run_cli(main)
