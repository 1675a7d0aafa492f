r"""How close pruning, training and evaluation come to what the machine can do.

    python data_prep.py --source aclsum --save_path data/aclsum
    python -m benchmarks.roofline

Peaks, measured in the same run: FLOP/s of a matrix product in fp32 and bf16 (on a CPU it stays in the processor's
cache), and the bytes per second of summing 512 MiB.

Useful FLOPs, with N the weights of the decoder's linear layers, H those of the output head, L layers of h heads of
width w, and T tokens in a row:

    forward     per token     2 (N + H) + 2 L h w (T + 1)           every product once; causal attention
    training    per token     6 N + 4 H + 6 L h w (T + 1)           backward twice that; the frozen head has no gradient
    pruning     per token     2 N p + sum of d^2 + 2 d^2 for layers whose target is the dense hidden state
                per matrix    d^3 + d^2 o (1 + 2 r)

for p passes (of the dense and of the pruned model), each distinct input of d features, whose Hessian is symmetric, and
each matrix of o outputs, swept once and refitted with r conjugate-gradient steps. Head and attention do not count in
pruning. Generation is bound by memory: its figure is the time of reading all weights once, at the measured bandwidth,
divided by the time of a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.commands import ROOT, run_command
from benchmarks.machine import add_output_option, check_output, describe_machine, save_figures
from sparsity.attention import use_blocked_attention
from sparsity.devices import INFERENCE_DTYPES, inference_dtype, keep_freed_memory, resolve_device, torch_dtype
from sparsity.evaluation import perplexity
from sparsity.evaluation.generation import beam_search_config, generate_batch
from sparsity.files import read_json, require_file
from sparsity.models import decoder_layers, head_counts, load_model, load_tokenizer
from sparsity.pts.recipe import QUALITY
from sparsity.sources import Source
from sparsity.text import encode_prompt, read_records
from utils import Parser, check_at_least, run_cli

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHAPES = {"cpu": (1024, 576, 1536), "cuda": (4096, 4096, 4096)}  # rows, inner, columns of the product that is the peak
BEAMS, BATCH = 2, 16


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m benchmarks.roofline")
    parser.add_argument("--model_dir", default="demo/SmolLM2-135M-Instruct", help="Hugging Face model folder")
    parser.add_argument("--data", type=Path, default=Path("data/aclsum"), help="folder of data_prep.py --source aclsum")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--dtype", choices=INFERENCE_DTYPES, default="fastest", help="precision of evaluation")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt, a window, and a training row")
    parser.add_argument("--windows", type=int, default=16, help="perplexity windows and calibration sequences")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of training and steps of generation")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto: CUDA where there is one")
    add_output_option(parser, "roofline")
    args = parser.parse_args()
    check_at_least(args, 1, "windows")
    check_at_least(args, 2, "length", "steps")
    for name in ("calib.jsonl", "heldout.jsonl", "cnn_eval.json"):
        require_file(args.data / name, "data file")
    check_output(args.output)
    return args


def seconds_of(work: Callable[[], Any], device: torch.device, repeat: int = 3) -> float:
    """The shortest time of `repeat` runs, after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matrix_peak(dtype: torch.dtype, device: torch.device, products: int = 100) -> float:
    """FLOP/s of the product of the device's shape."""
    rows, inner, columns = SHAPES[device.type]
    inputs, weight = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, columns))

    def work() -> None:
        for _ in range(products):
            F.linear(inputs, weight)

    return 2 * rows * inner * columns * products / seconds_of(work, device)


def peaks(device: torch.device) -> dict[str, float]:
    """FLOP/s by precision, and bytes per second of memory."""
    large = torch.ones(2**27, device=device)  # 512 MiB
    top = {name: matrix_peak(torch_dtype(name), device) for name in ("fp32", "bf16")}
    return {"memory": 4 * large.numel() / seconds_of(large.sum, device), **top}


def sizes(model: PreTrainedModel) -> tuple[int, int, int]:
    """Weights of the decoder's linear layers and of the head; layers times heads times their width."""
    linears = [m for m in decoder_layers(model)[1].modules() if isinstance(m, nn.Linear)]
    heads, _, width = head_counts(model.config)
    head = model.get_output_embeddings().weight.numel()
    return sum(m.weight.numel() for m in linears), head, len(decoder_layers(model)[1]) * heads * width


def token_flops(model: PreTrainedModel, length: int) -> tuple[int, int]:
    """Of a forward pass and of training, per token of a row of `length`, with frozen embeddings and head."""
    linear, head, attention = sizes(model)
    attention *= length + 1
    return 2 * (linear + head + attention), 6 * linear + 4 * head + 6 * attention


def pruning_flops(model: PreTrainedModel, quality: str, tokens: int) -> int:
    """Of all layers on `tokens` calibration tokens."""
    recipe = QUALITY[quality]
    total = 0
    for layer in decoder_layers(model)[1]:
        linears = {n: (m.out_features, m.in_features) for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        total += 2 * sum(o * d for o, d in linears.values()) * tokens * (recipe.needs_dense + recipe.needs_pruned)
        outputs = [d for name, (_, d) in linears.items() if name.endswith(("o_proj", "down_proj"))]
        inputs = [d for name, (_, d) in linears.items() if name.endswith(("q_proj", "up_proj"))]  # as of k, v, gate
        total += tokens * sum(d * d for d in outputs + inputs)
        total += tokens * sum(2 * d * d for d in outputs) * recipe.asymmetric
        total += sum(d**3 + d * d * o * (1 + 2 * recipe.refit_iterations) for o, d in linears.values())
    return total


def pruning(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top: dict[str, float]
) -> dict[str, Any]:
    """`balanced` and `fast`, in processes of their own, by the times of the layers in pts_layers.jsonl."""
    results = {}
    for quality in ("balanced", "fast"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "hf_pts.py", "--model_name_or_path", args.model_dir, "--dtype", "fp32"]
            command += ["--calib_data", args.data / "calib.jsonl", "--calib_size", args.windows, "--batch_size", 4]
            command += ["--model_max_length", args.length, "--quality", quality, "--device", args.device]
            run_command(*command, "--output_dir", folder)
            rows = read_json(Path(folder) / "pts_layers.jsonl", "layer log")
        layers = {row["name"].rpartition(".self_attn")[0] or row["name"].rpartition(".mlp")[0]: row for row in rows}
        seconds = sum(row["layer_seconds"] for row in layers.values())
        rate = pruning_flops(model, quality, args.windows * args.length) / seconds
        results[quality] = {"seconds": seconds, "flops": rate, "of_peak": rate / top["fp32"]}
    return results


def training(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top: dict[str, float]
) -> dict[str, Any]:
    """Packed rows, two a step, by the tokens per second in train_log.jsonl after the first steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "hf_pts.py", "--model_name_or_path", args.model_dir, "--dtype", "fp32"]
        run_command(*command, "--sparsity_fmt", "sparse_magnitude", "--output_dir", folder, "--device", args.device)
        command = ["bash", ROOT / "launch_finetune.sh", "--model", args.model_dir, "--data_path", args.data]
        command += ["--restore_path", Path(folder) / "pts_modelopt_state.pth", "--output_dir", Path(folder) / "tuned"]
        command += ["--max_length", args.length, "--packing", "--train_bs", 2, "--max_steps", args.steps + 2]
        command += ["--logging_steps", 1, "--eval_steps", 10**6, "--save_steps", 10**6, "--max_eval_samples", 1]
        run_command(*command)
        log = read_json(Path(folder) / "tuned" / "train_log.jsonl", "training log")
    rates = sorted(row["tokens_per_second"] for row in log if "loss" in row)[2:]
    tokens = rates[len(rates) // 2]
    rate = tokens * token_flops(model, args.length)[1]
    return {"tokens_per_second": tokens, "flops": rate, "of_peak": rate / top["bf16"]}


def perplexities(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top: dict[str, float]
) -> dict[str, Any]:
    """Blocks of held-out text, in batches of four, losses included."""
    source = Source(str(args.data / "heldout.jsonl"))
    windows = perplexity.windows_of(tokenizer, source, args.length, args.length, args.windows)
    device = model.device
    seconds = seconds_of(lambda: perplexity.total_loss(model, windows, device, 4, windows.shape[1]), device, repeat=2)
    rate = windows.numel() * token_flops(model, args.length)[0] / seconds
    peak = top["fp32" if model.dtype == torch.float32 else "bf16"]
    return {"seconds": seconds, "flops": rate, "of_peak": rate / peak}


def generation(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top: dict[str, float]
) -> dict[str, Any]:
    """The time of a step, from answers of two lengths."""
    records = read_records(args.data / "cnn_eval.json")[:BATCH]
    prompts = [encode_prompt(tokenizer, record, args.length)[0] for record in records]

    def seconds(new: int) -> float:
        config = beam_search_config(model, tokenizer, BEAMS, new, new)
        return seconds_of(lambda: generate_batch(model, tokenizer, prompts, config), model.device, repeat=1)

    step = (seconds(2 + args.steps) - seconds(2)) / args.steps
    linear, head, _ = sizes(model)
    reading = (linear + head) * model.dtype.itemsize / top["memory"]
    return {"seconds_of_a_step": step, "seconds_of_reading_the_weights": reading, "of_bandwidth": reading / step}


PARTS = {"pruning": pruning, "training": training, "perplexity": perplexities, "generation": generation}


def main() -> None:
    args = parse_args()
    device = resolve_device(args.device)
    keep_freed_memory()
    print(describe_machine(device))
    top = peaks(device)
    print("\n".join(f"  {name:<18} {value / 1e9:10,.1f} G/s" for name, value in top.items()), flush=True)
    tokenizer = load_tokenizer(args.model_dir)
    dtype = inference_dtype(args.dtype, device)
    model = load_model(args.model_dir, torch_dtype(dtype) if dtype else "auto").to(device)
    use_blocked_attention(model, device)
    figures: dict[str, Any] = {"peaks": top}
    for part in args.parts:
        figures[part] = PARTS[part](args, model, tokenizer, top)
        print(f"{part}: {figures[part]}", flush=True)
    save_figures(figures, args, device)


if __name__ == "__main__":
    run_cli(main)
