r"""Post-training sparsification: prune a causal language model to 2:4 on a small calibration set.

    python hf_pts.py --model_name_or_path meta-llama/Llama-2-7b-hf --device cuda --model_max_length 1024 --dtype fp16 \
        --sparsity_fmt sparsegpt --calib_size 128 --output_dir saved_models_Llama-2-7b-hf_sparsegpt_tp1_pp1

Writes OUTPUT_DIR/pts_modelopt_state.pth, which modelopt.torch.opt.restore() applies to the dense model, and
OUTPUT_DIR/pts_layers.jsonl with error, sparsity, time and memory of every pruned weight. An interrupted run resumes
where it stopped when the same command is given again. Several GPUs share the calibration set when the script is started
with `torchrun --nproc_per_node=N hf_pts.py …`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from sparsity.devices import DTYPES
from sparsity.errors import UserError
from sparsity.pts.calibration import DEFAULT_SOURCES, CalibrationSet, load_calibration_set, share_of_process
from sparsity.pts.recipe import METHODS, QUALITY, make_recipe
from sparsity.sources import check_source, parse_sources, shares
from utils import Parser, add_device_options, add_model_option, add_remote_code_option, check_at_least, run_cli

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel

    from sparsity.pts.recipe import Recipe


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("model")
    add_model_option(group, "hub id or folder of a decoder-only model")
    group.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="dtype of the weights; statistics are always fp32"
    )
    add_device_options(group)
    add_remote_code_option(group)
    group = parser.add_argument_group("calibration")
    group.add_argument(
        *("--calib_data", "--dataset"),
        nargs="+",
        metavar="SOURCE[=WEIGHT]",
        help="plain text: files, folders, hub data sets NAME:CONFIG:SPLIT, or self (text that the model generates), "
        f"e.g. a.jsonl=0.6 self=0.4 (default: {DEFAULT_SOURCES}; sparse_magnitude needs none)",
    )
    group.add_argument("--calib_size", type=int, default=128, help="number of calibration sequences, shared by weight")
    group.add_argument(
        "--model_max_length", type=int, default=1024, help="tokens per sequence; texts are joined, never padded"
    )
    group.add_argument(
        "--batch_size", type=int, default=1, help="sequences per forward pass; more is faster and takes more memory"
    )
    group.add_argument("--seed", type=int, default=0, help="order in which calibration texts are drawn")
    group.add_argument(
        "--activations_dir", help="folder for activations, otherwise kept in memory (--dry_run prints their size)"
    )
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--sparsity_fmt", choices=METHODS, default="sparsegpt", help="wanda and sparse_magnitude only choose masks"
    )
    group.add_argument("--quality", choices=QUALITY, default="balanced", help="speed/quality trade-off of sparsegpt")
    group.add_argument(
        "--pattern", default="2:4", help="2:4, N:M with M up to 16, or unstructured:FRACTION; GPUs accelerate 2:4"
    )
    group.add_argument(
        "--percdamp", type=float, help="damping, as a fraction of the Hessian's mean diagonal (default: 0.01)"
    )
    group.add_argument(
        "--ignore", nargs="*", default=[], metavar="GLOB", help="layers to leave dense, e.g. '*.down_proj'"
    )
    group.add_argument(
        "--keep_dense",
        type=float,
        metavar="FRACTION",
        help="leave at most this fraction of the weights dense, in the layers that cost the model most when pruned; "
        "prints them as --ignore. The whole model runs forward and backward on the device for it",
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


def check_args(args: argparse.Namespace) -> tuple[Recipe, CalibrationSet]:
    """Check the options before anything is loaded.

    Returns:
        how to prune; the calibration text, which is empty for magnitude pruning unless some is given.
    """
    for name, value in vars(args).items():
        if name.startswith("inference_") and value != 1:
            raise UserError(f"--{name} must be 1, got {value}: the state is saved whole; servers shard it on loading")
    check_at_least(args, 1, "calib_size", "batch_size")
    check_at_least(args, 2, "model_max_length")
    if args.percdamp is not None and args.sparsity_fmt != "sparsegpt":
        raise UserError(f"--percdamp has no meaning for --sparsity_fmt {args.sparsity_fmt}; leave it out")
    if args.percdamp is not None and not 0 < args.percdamp <= 1:
        raise UserError(f"--percdamp must be greater than 0 and at most 1, got {args.percdamp}")
    if args.keep_dense is not None and not 0 < args.keep_dense < 1:
        raise UserError(f"--keep_dense must be greater than 0 and less than 1, got {args.keep_dense}")
    recipe = make_recipe(args.sparsity_fmt, args.quality, args.pattern, args.percdamp)
    needs_text = args.calib_data is not None or METHODS[args.sparsity_fmt].needs_text
    sources = parse_sources(args.calib_data or DEFAULT_SOURCES.split()) if needs_text else []
    if args.keep_dense and not sources:
        raise UserError(
            f"--keep_dense needs calibration text, which {args.sparsity_fmt} does not read; add --calib_data"
        )
    for source in sources:
        check_source(source)
    calibration = CalibrationSet(sources, args.calib_size, args.model_max_length, args.batch_size, args.seed)
    shares(sources, args.calib_size)  # an error if a source gets no sequence
    return recipe, calibration


def load_dense(
    args: argparse.Namespace, recipe: Recipe, calibration: CalibrationSet, process: PartialState
) -> PreTrainedModel:
    """The dense model, without memory for its weights in a dry run; prints what will be pruned."""
    from sparsity import models
    from sparsity.devices import torch_dtype
    from sparsity.pts.report import describe_plan

    config = models.load_config(args.model_dir, args.trust_remote_code)
    if calibration.sources:
        models.check_lengths(config, {"--model_max_length": args.model_max_length})
    dtype = torch_dtype(args.dtype)
    if args.dry_run:
        model = models.empty_model(config, dtype, args.trust_remote_code)
    else:
        model = models.load_model(args.model_dir, dtype, args.trust_remote_code)
    process.print(describe_plan(model, recipe, args.ignore), end="")
    return model


def main() -> None:
    args = parse_args()
    recipe, calibration = check_args(args)

    # Imported once the options are known to be good: `--help` and mistakes need no torch.
    import torch

    from sparsity import files
    from sparsity.devices import peak_memory_mib, resolve_device, torch_dtype, use_tf32
    from sparsity.distributed import start_processes
    from sparsity.models import load_model
    from sparsity.pts import report
    from sparsity.pts.dense_budget import choose_dense
    from sparsity.pts.layer_store import LayerStore, MatrixLog, calibration_key
    from sparsity.pts.prune import prune_model
    from sparsity.pts.state import write_verified_state

    process = start_processes(args.device)
    device = process.device if process.num_processes > 1 else resolve_device(args.device)
    use_tf32(True)
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    output_dir = files.prepare_output_dir(args.output_dir)
    if args.activations_dir:
        files.prepare_output_dir(args.activations_dir)
    model = load_dense(args, recipe, calibration, process)
    if args.dry_run:
        process.print(report.estimate(model, recipe, args.ignore, calibration, device))
        if args.keep_dense:
            process.print("not counted: --keep_dense first runs the whole model forward and backward on the device")
        return
    if process.is_main_process:
        files.lock_output_dir(output_dir)

    rows: list[MatrixLog] = []

    def on_rows(new: list[MatrixLog]) -> None:
        rows[:] = new
        if process.is_main_process:
            files.save_jsonl(map(asdict, rows), output_dir / "pts_layers.jsonl")

    # Prune, with a log line for every weight as soon as its layer is finished.
    batches, weights = load_calibration_set(calibration, args.model_dir, model, device, process, args.trust_remote_code)
    if args.keep_dense:
        kept = choose_dense(model, batches, recipe.pattern, args.ignore, args.keep_dense, device)
        process.print(f"kept dense by --keep_dense {args.keep_dense}: --ignore {' '.join(kept)}")
        args.ignore += kept
    own, own_weights = share_of_process(batches, process), share_of_process(weights, process)
    key = calibration_key(recipe, [args.ignore, args.dtype, args.batch_size], batches, model, weights)
    store = LayerStore(output_dir / "pts_resume" if batches else None, key, writer=process.is_main_process)
    masks = prune_model(model, own, recipe, device, store, args.ignore, on_rows, args.activations_dir, own_weights)
    seconds, peak = time.perf_counter() - started, peak_memory_mib(device)
    process.destroy_process_group()
    if not process.is_main_process:
        return

    print(report.error_table(rows))
    if batches:
        print(report.notes(rows), end="")
    print(report.sparsity_line(masks, model))
    path = output_dir / "pts_modelopt_state.pth"
    load_dense_again = partial(load_model, args.model_dir, torch_dtype(args.dtype), args.trust_remote_code)
    write_verified_state(model, masks, path, recipe, batches, load_dense_again)
    store.remove()
    print(f"pruned in {seconds:.0f} s, peak memory {peak:.0f} MiB on {device.type}")
    print(f"saved {path}; restored into a fresh model it gives identical logits")


if __name__ == "__main__":
    run_cli(
        main,
        "lower --batch_size, --calib_size or --model_max_length, or give --activations_dir; --dry_run prints the need",
    )
