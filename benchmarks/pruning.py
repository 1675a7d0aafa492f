"""Compare ways of pruning to 2:4, side by side in one run: perplexity, wall time, peak memory.

    python data_prep.py --source aclsum --save_path demo/data
    python -m benchmarks.texts demo/texts
    python -m benchmarks.pruning

Arms: modelopt's SparseGPT; llm-compressor's, where it is installed; SparseGPT as in the paper (reference_sparsegpt.py);
hf_pts.py's two qualities and, only on request, its magnitude pruning. Each arm runs in a process of its own, with as
many calibration sequences. They are papers; for hf_pts.py's qualities three tenths of them are texts of other kinds and
four tenths text that the model wrote itself, as by `--calib_data calib.jsonl=0.3 further.jsonl=0.3 self=0.4`, and
`balanced_read` has papers alone. Writing that text is measured apart, since it is done once for a model.

The first held-out text is of the same kind as the calibration text (papers, but other documents). The others are of
other kinds: the Python manual and the source code that come with Python, an encyclopedia, and a novel, which was held
back: no setting was chosen by it. Memory is the peak of the process during pruning, less what it held just before (the
model and the libraries).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from benchmarks import texts
from benchmarks.arms import prune
from benchmarks.commands import run_for_figures
from benchmarks.machine import add_output_option, check_output, describe_machine, save_figures
from benchmarks.process import PROCESS_STATUS, measured
from benchmarks.reference_sparsegpt import prune_llama
from sparsity.attention import use_blocked_attention
from sparsity.devices import bf16_is_faster
from sparsity.errors import UserError
from sparsity.files import require_file
from sparsity.generated_text import generate_text
from sparsity.models import load_model, load_tokenizer
from sparsity.pts.calibration import split_batches
from sparsity.pts.recipe import QUALITY
from sparsity.sources import SELF, Source, draw_sequences, parse_sources
from utils import Parser, check_at_least, run_cli

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARMS = ("dense", "modelopt", "llmcompressor", "balanced", "balanced_read", "fast", "reference", "magnitude")
BASELINES = ("modelopt", "llmcompressor")
MIXED = "calib.jsonl=0.3,further.jsonl=0.3,self=0.4"
CPU = torch.device("cpu")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m benchmarks.pruning")
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct", help="folder of a Llama-type model")
    parser.add_argument("--data", type=Path, default=Path("demo/data"), help="folder of `data_prep.py --source aclsum`")
    parser.add_argument(
        "--texts",
        type=Path,
        default=Path("demo/texts"),
        help="folder of benchmarks.texts with jargon.txt and novel.txt",
    )
    parser.add_argument("--calib_size", type=int, default=64, help="calibration sequences")
    parser.add_argument("--eval_size", type=int, default=32, help="held-out sequences of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences per forward pass, the same for every arm")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, help="arms to compare (by default all); dense is always added"
    )
    parser.add_argument(
        "--double", nargs="*", choices=ARMS, default=["fast"], help="of the arms, those to run on twice the layers too"
    )
    parser.add_argument(
        "--llmcompressor_python",
        metavar="PYTHON",
        default=sys.executable if importlib.util.find_spec("llmcompressor") else None,
        help="Python of an environment that has llm-compressor (by default this one, if it has); without, no such arm",
    )
    add_output_option(parser, "pruning")
    # The options of a process that measures one arm.
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deepen", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_at_least(args, 1, "calib_size", "eval_size", "batch_size")
    check_at_least(args, 2, "length")
    asked, args.arms = args.arms, [arm for arm in ARMS if arm == "dense" or arm in (args.arms or ARMS[:-1])]
    if not args.llmcompressor_python and "llmcompressor" in args.arms:
        if asked:
            raise UserError(
                "arm llmcompressor: this Python has no llm-compressor; give one with --llmcompressor_python"
            )
        args.arms.remove("llmcompressor")
    args.double = [arm for arm in args.double if arm in args.arms]
    for name in ("calib.jsonl", "further.jsonl", "heldout.jsonl"):
        require_file(args.data / name, "text file")
    texts.require_texts(args.texts)
    if not PROCESS_STATUS.is_file():
        raise UserError(f"peak memory is read from {PROCESS_STATUS}, which only Linux has; run this on Linux")
    if not args.arm:
        check_output(args.output)
    return args


# ---------------------------------------------------------------------------------------------------------- one arm


def deepen(model: PreTrainedModel, times: int) -> PreTrainedModel:
    """Repeat each decoder layer of `model` `times` times in a row, as copies that are pruned one by one."""
    layers = [copy.deepcopy(layer) for layer in model.model.layers for _ in range(times)]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for kind in model.config.layer_types for _ in range(times)]
    return model


def run_arm(args: argparse.Namespace) -> dict[str, float]:
    """Prune with one arm in this process and measure it; the perplexity only where no layers were added."""
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, torch.float32)
    if args.arm == "llmcompressor":
        return run_llm_compressor(model, args) | perplexities(model, tokenizer, args)
    if args.arm == "modelopt":
        import modelopt.torch.sparsity  # noqa: F401  its import is not part of the pruning
    if args.deepen > 1:
        with tempfile.TemporaryDirectory() as folder:  # mapped from a file, as every model is
            deepen(model, args.deepen).save_pretrained(folder)
            model = load_model(folder, torch.float32)
    tokens = load_file(args.tokens)
    mixed = args.arm in QUALITY
    batches = list(tokens["mixed"].split(tokens["sizes"].tolist()) if mixed else tokens["read"].split(args.batch_size))
    token_weights = tokens["weights"].tolist() if mixed else None
    model(batches[0][:1, :64])  # the libraries allocate their working memory before the measurement begins
    with tempfile.TemporaryDirectory() as folder, measured() as result:
        if args.arm == "reference":
            prune_llama(model, batches)
        elif args.arm != "dense":
            prune(args.arm.removesuffix("_read"), model, batches, CPU, Path(folder), token_weights)
    return result if args.deepen > 1 else result | perplexities(model, tokenizer, args)


def run_llm_compressor(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, float]:
    """Prune with llm-compressor in a process of its own, perhaps of another environment; `model` gets the weights."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        words = (args.llmcompressor_python, "-m", "benchmarks.llm_compressor", args.model, args.tokens)
        figures = run_for_figures(*words, args.batch_size, weights)
        missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:  # which is tied
            raise UserError(f"llm-compressor left weights of other names: {sorted([*missing, *unexpected])[:3]}")
    return figures


def calibration(args: argparse.Namespace, text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences of `--calib_data`, with the file in the data folder, as tensors that a file can hold.

    Returns:
        tokens [calib_size, length]; for each batch, how many of them it has and what each of its tokens counts.
    """
    tokenizer = load_tokenizer(args.model)

    def write(count: int) -> torch.Tensor:
        return generate_text(args.model, tokenizer, count, args.length, CPU, folder=args.texts / "self_text")

    sources = [
        Source(str(args.data / source.spec) if source.spec != SELF else SELF, source.weight)
        for source in parse_sources(text)
    ]
    drawn = draw_sequences(tokenizer, sources, args.calib_size, args.length, 0, write)
    batches, weights = split_batches(sources, drawn, args.batch_size)
    return torch.cat(batches), torch.tensor([len(batch) for batch in batches]), torch.tensor(weights)


def perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> dict[str, float]:
    """Perplexity on every held-out text."""
    blocks = texts.held_out(tokenizer, args.data / "heldout.jsonl", args.texts, args.length, args.eval_size)
    use_blocked_attention(model, CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_faster(CPU)):
        return texts.perplexities(model, blocks, CPU)


# --------------------------------------------------------------------------------------------------------- all arms


def measure(arm: str, args: argparse.Namespace, deepen: int = 1) -> dict[str, float]:
    """Run one arm in a new process."""
    names = ["model", "data", "texts", "tokens", "calib_size", "eval_size", "length", "batch_size"]
    names += ["llmcompressor_python"] if arm == "llmcompressor" else []
    options = [word for name in names for word in (f"--{name}", getattr(args, name))]
    command = (sys.executable, "-m", "benchmarks.pruning", "--arm", arm, "--deepen", deepen, *options)
    result = run_for_figures(*command)
    print(f"{arm:<10} x{deepen} {result}", flush=True)
    return result


def ratios(results: dict[str, dict[str, float]], baseline: str) -> dict[str, dict[str, float]]:
    """Of each pruned arm, ÷ another's: rise in perplexity by text and on average over other kinds; time; memory."""
    dense, base = results["dense"], results[baseline]
    found = {}
    for arm, row in results.items():
        if arm == "dense" or "papers" not in row:
            continue
        rises = {kind: (row[kind] - dense[kind]) / (base[kind] - dense[kind]) for kind in texts.KINDS}
        rises["other"] = sum(rises[kind] for kind in texts.KINDS[1:]) / len(texts.KINDS[1:])
        parts = {name: row[name] / base[name] for name in ("seconds", "cpu_seconds", "memory_mib")}
        found[arm] = {name: round(value, 3) for name, value in (rises | parts).items()}
    return found


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Figures of every arm, and for the pruned ones the ratios to modelopt's."""
    print(f"\n{'perplexity':<16}" + "".join(f"{name:>9}" for name in (*texts.KINDS, "seconds", "CPU s", "MiB")))
    for arm, row in results.items():
        cells = [f"{row[kind]:.2f}" for kind in texts.KINDS] + [
            f"{row[name]:.0f}" for name in ("seconds", "cpu_seconds", "memory_mib")
        ]
        print(f"{arm:<16}" + "".join(f"{cell:>9}" for cell in cells))
    for baseline in BASELINES:
        if baseline in results:
            names = (*texts.KINDS, "other", "time", "CPU time", "memory")
            print(f"\n{'÷ ' + baseline:<16}" + "".join(f"{name:>9}" for name in names))
            for arm, found in ratios(results, baseline).items():
                print(f"{arm:<16}" + "".join(f"{value:>9.3f}" for value in found.values()))


def main() -> None:
    args = parse_args()
    if args.arm:
        print(json.dumps(run_arm(args)))
        return
    print(describe_machine(CPU), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        mixed, sizes, weights = calibration(args, MIXED)
        seconds = round(time.perf_counter() - started, 1)
        print(f"calibration text with self text in {seconds} s, faster from the cache", flush=True)
        args.tokens = Path(folder) / "tokens.safetensors"
        read, _, _ = calibration(args, "calib.jsonl")
        save_file({"mixed": mixed, "sizes": sizes, "weights": weights, "read": read}, args.tokens)
        results = {arm: measure(arm, args) for arm in args.arms}
        doubled = {arm: measure(arm, args, deepen=2) for arm in args.double}
    print_table(results)
    found = {f"÷ {name}": ratios(results, name) for name in BASELINES if name in results}
    for arm, twice in doubled.items():
        results[f"{arm} x2"] = twice
        print(f"twice the layers, {arm}: time x{twice['seconds'] / results[arm]['seconds']:.2f}, ", end="")
        print(f"memory x{twice['memory_mib'] / results[arm]['memory_mib']:.2f} (masks included)")
    facts = {"calibration": [args.calib_size, args.length], "self_text_seconds": seconds}
    save_figures({**facts, "results": results, "ratios": found}, args, CPU)


if __name__ == "__main__":
    run_cli(main)
