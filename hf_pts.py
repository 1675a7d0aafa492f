"""Post-training sparsification: prune a causal language model to 2:4 on a small calibration set.

    python hf_pts.py --model_name_or_path meta-llama/Llama-2-7b-hf --device cuda --model_max_length 1024 --dtype fp16 \\
        --sparsity_fmt sparsegpt --calib_size 128 --output_dir saved_models_Llama-2-7b-hf_sparsegpt_tp1_pp1

Writes OUTPUT_DIR/pts_modelopt_state.pth, which modelopt.torch.opt.restore() applies to the dense model, and
OUTPUT_DIR/pts_layers.jsonl with error, sparsity, time and memory of every pruned weight. A run that was interrupted
goes on where it stopped when the same command is given again. Several GPUs share the calibration set when the script
is started with `torchrun --nproc_per_node=N hf_pts.py …`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import model_io
import pts_report
import text_input
import utils
from checkpoint import LayerStore, fingerprint
from decoder import choose_linears, decoder_layers
from layerwise import QUALITY, Recipe, prune_model
from model_io import DTYPES
from processes import fail_together, peak_memory_mib, start_processes, told_by_main
from pts_state import logits_of, save_state, verify
from sources import CNN_DAILYMAIL
from sparsegpt import Pattern
from utils import UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel

METHODS = {"sparsegpt": "sparsegpt", "sparse_magnitude": "magnitude", "wanda": "wanda"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", required=True, help="hub id or folder of a decoder-only model")
    group.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="dtype of the weights (statistics are always fp32)"
    )
    group.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto: CUDA where there is one")
    group.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib_data", help=".txt, .json or .jsonl of plain text; default: cnn_dailymail's training articles"
    )
    group.add_argument("--calib_size", type=int, default=128, help="number of calibration sequences")
    group.add_argument(
        "--model_max_length", type=int, default=1024, help="tokens per sequence; texts are joined, never padded"
    )
    group.add_argument(
        "--batch_size", type=int, default=1, help="sequences per forward pass; more is faster and takes more memory"
    )
    group.add_argument("--seed", type=int, default=0, help="order in which calibration texts are drawn")
    group.add_argument(
        "--activations_dir", help="folder for activations, which else stay in memory (--dry_run tells their size)"
    )
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--sparsity_fmt", choices=METHODS, default="sparsegpt", help="wanda and sparse_magnitude only choose masks"
    )
    group.add_argument(
        "--quality", choices=QUALITY, default="balanced", help="effort of sparsegpt: time against perplexity"
    )
    group.add_argument("--pattern", default="2:4", help="2:4, 4:8 or unstructured:FRACTION; GPUs accelerate 2:4")
    group.add_argument(
        "--percdamp", type=float, help="damping, as a share of the Hessian's mean diagonal (default 0.1)"
    )
    group.add_argument(
        "--ignore", nargs="*", default=[], metavar="GLOB", help="layers to leave dense, e.g. '*.down_proj'"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, help="folder for the state; created if missing")
    group.add_argument(
        "--dry_run", action="store_true", help="print layers, shapes, estimated time and memory, then stop"
    )
    group = parser.add_argument_group(
        "inherited", "Options of the reference scripts; only the value 1 is meaningful here."
    )
    group.add_argument(
        "--inference_tensor_parallel", type=int, default=1, help="the state is whole, not sharded for serving"
    )
    group.add_argument("--inference_pipeline_parallel", type=int, default=1, help="the same for pipeline stages")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name in ("inference_tensor_parallel", "inference_pipeline_parallel"):
        if getattr(args, name) != 1:
            raise UserError(
                f"--{name} {getattr(args, name)}: the state is saved whole, give 1; servers shard it when they load it"
            )
    for name in ("calib_size", "model_max_length", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.model_max_length < 2:
        raise UserError("--model_max_length must be at least 2")
    if args.percdamp is not None and args.sparsity_fmt != "sparsegpt":
        raise UserError(f"--percdamp has no meaning for --sparsity_fmt {args.sparsity_fmt}; leave it out")
    if args.percdamp is not None and not 0 < args.percdamp <= 1:
        raise UserError(f"--percdamp must be above 0 and at most 1, got {args.percdamp}")


def calibration_texts(args: argparse.Namespace) -> list[str]:
    """The user's texts, or articles of cnn_dailymail's training split (evaluation uses its test split)."""
    if args.calib_data:
        return text_input.read_texts(args.calib_data)
    from datasets import load_dataset

    try:
        articles = load_dataset(*CNN_DAILYMAIL, split="train", streaming=True)
        articles = articles.shuffle(seed=args.seed, buffer_size=1000)
        # An article has some 800 tokens; twice the need lets every article give a part.
        wanted = 2 + 2 * args.calib_size * args.model_max_length // 800
        return [row["article"] for row in articles.take(wanted)]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot load cnn_dailymail from the hub ({utils.first_line(error)}); give --calib_data FILE instead"
        ) from error


def load_calibration(args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Batches {"input_ids": [batch_size, model_max_length]} of full sequences."""
    tokenizer = model_io.load_tokenizer(args.model_name_or_path, args.trust_remote_code)
    texts = calibration_texts(args)
    blocks = text_input.sample_blocks(tokenizer, texts, args.model_max_length, args.calib_size, args.seed)
    if len(blocks) < args.calib_size:
        print(f"warning: the text gives {len(blocks)} sequences of {args.model_max_length}, not {args.calib_size}")
    return [{"input_ids": batch} for batch in blocks.split(args.batch_size)]


def make_recipe(args: argparse.Namespace) -> Recipe:
    pattern = Pattern.parse(args.pattern)
    if args.sparsity_fmt == "sparsegpt":
        recipe = replace(QUALITY[args.quality], pattern=pattern)
        return replace(recipe, percdamp=args.percdamp) if args.percdamp else recipe
    return Recipe(method=METHODS[args.sparsity_fmt], pattern=pattern)


def describe(model: PreTrainedModel, args: argparse.Namespace, recipe: Recipe) -> None:
    """Print what will be pruned and what stays dense."""
    chosen, left_dense = choose_linears(model, recipe.pattern, args.ignore)
    print(f"{len(decoder_layers(model)[1])} decoder layers, {len(chosen)} linear layers to prune to {recipe.pattern}")
    print(pts_report.describe_dense(left_dense), end="")


def share(batches: list[dict[str, torch.Tensor]], process: PartialState) -> list[dict[str, torch.Tensor]]:
    """This process's part of the calibration batches, as many as every other's."""
    world = process.num_processes
    if len(batches) < world:
        raise UserError(f"{len(batches)} calibration batches cannot be shared by {world} processes; raise --calib_size")
    return batches[: len(batches) // world * world][process.process_index :: world]


def save_result(
    args: argparse.Namespace,
    recipe: Recipe,
    model: PreTrainedModel,
    masks: dict[str, torch.Tensor],
    rows: list[dict],
    probe: torch.Tensor,
) -> Path:
    """Print the table of errors and write the state, which replaces an earlier one only if it restores."""
    path = Path(args.output_dir) / "pts_modelopt_state.pth"
    expected = logits_of(model, probe)
    if not torch.isfinite(expected).all():
        raise UserError(f"the pruned model's logits are not finite in {args.dtype}; try --dtype bf16 or fp32")
    print(pts_report.error_table(rows))
    print(pts_report.sparsity_line(masks, model))
    with utils.atomic_path(path) as temporary:
        save_state(model, masks, temporary)
        model.to("meta")  # the restored one takes its memory
        restored = model_io.load_model(args.model_name_or_path, DTYPES[args.dtype], args.trust_remote_code)
        verify(restored, temporary, recipe.pattern, probe, expected)
    return path


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    recipe = make_recipe(args)
    process = start_processes(args.device)
    device = process.device if process.num_processes > 1 else model_io.resolve_device(args.device)
    started = time.perf_counter()

    # Phase 1: model and calibration text.
    with fail_together(process):
        output_dir = utils.prepare_output_dir(args.output_dir)
        if args.activations_dir:
            utils.prepare_output_dir(args.activations_dir)
        config = model_io.load_config(args.model_name_or_path, args.trust_remote_code)
        model_io.check_lengths(config, {"--model_max_length": args.model_max_length})
        if args.dry_run:
            model = model_io.empty_model(config, DTYPES[args.dtype], args.trust_remote_code)
        else:
            model = model_io.load_model(args.model_name_or_path, DTYPES[args.dtype], args.trust_remote_code)
        if process.is_main_process:
            describe(model, args, recipe)
    if args.dry_run:
        calibration = (args.calib_size, args.model_max_length, args.batch_size)
        process.print(pts_report.estimate(model, recipe, args.ignore, calibration, device.type))
        return
    with fail_together(process):
        if process.is_main_process:
            utils.lock_output_dir(output_dir)
        batches = load_calibration(args)
        own = share(batches, process)
        key = fingerprint([asdict(recipe), args.ignore, args.dtype, args.batch_size], batches, model)
        store = LayerStore(output_dir / "pts_resume", key, writer=process.is_main_process)

    # Phase 2: pruning, with a log line of every layer as it is finished.
    rows: list[dict] = []

    def on_rows(new: list[dict]) -> None:
        rows[:] = new
        if process.is_main_process:
            with utils.atomic_path(output_dir / "pts_layers.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    torch.manual_seed(args.seed)
    with told_by_main(process):
        masks = prune_model(model, own, recipe, device, store, args.ignore, on_rows, args.activations_dir)
    seconds, peak = time.perf_counter() - started, peak_memory_mib(device)
    process.destroy_process_group()
    if not process.is_main_process:
        return

    # Phase 3: the state.
    probe = batches[0]["input_ids"][:1, : min(64, args.model_max_length)]
    path = save_result(args, recipe, model, masks, rows, probe)
    store.remove()
    print(f"pruned in {seconds:.0f} s, peak memory {peak:.0f} MiB on {device.type}")
    print(f"saved {path}; restored into a fresh model it gives identical logits")


if __name__ == "__main__":
    utils.run_cli(main)
