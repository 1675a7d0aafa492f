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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity.devices import DTYPES
from sparsity.errors import UserError
from sparsity.pts.calibration_set import DEFAULT_SOURCES, load_calibration, share_of_process
from sparsity.pts.recipe import METHODS, QUALITY, make_recipe
from sparsity.sources import SELF, Source, check_source, parse_sources, shares
from utils import Parser, add_device_options, add_remote_code_option, check_at_least, run_cli

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from transformers import PreTrainedModel

    from sparsity.pts.recipe import Recipe


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", required=True, help="hub id or folder of a decoder-only model")
    group.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="dtype of the weights; statistics are always fp32"
    )
    add_device_options(group)
    add_remote_code_option(group)
    group = parser.add_argument_group("calibration")
    group.add_argument(
        *("--calib_data", "--dataset"),
        metavar="SOURCE",
        help="plain text: a file, a folder, a hub data set NAME:CONFIG:SPLIT, or self (text that the model writes); "
        f"several with weights: a=0.6,self=0.4 (by default {DEFAULT_SOURCES}; sparse_magnitude needs none)",
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
    group.add_argument(
        "--quality", choices=QUALITY, default="balanced", help="effort of sparsegpt: time against perplexity"
    )
    group.add_argument("--pattern", default="2:4", help="2:4, 4:8 or unstructured:FRACTION; GPUs accelerate 2:4")
    group.add_argument(
        "--percdamp", type=float, help="damping, as a share of the Hessian's mean diagonal (by default 0.01)"
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


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name in ("inference_tensor_parallel", "inference_pipeline_parallel"):
        if getattr(args, name) != 1:
            raise UserError(
                f"--{name} {getattr(args, name)}: the state is saved whole, give 1; servers shard it when they load it"
            )
    check_at_least(args, 1, "calib_size", "batch_size")
    check_at_least(args, 2, "model_max_length")
    if args.percdamp is not None and args.sparsity_fmt != "sparsegpt":
        raise UserError(f"--percdamp has no meaning for --sparsity_fmt {args.sparsity_fmt}; leave it out")
    if args.percdamp is not None and not 0 < args.percdamp <= 1:
        raise UserError(f"--percdamp must be above 0 and at most 1, found {args.percdamp}")


def choose_sources(args: argparse.Namespace) -> list[Source]:
    """The calibration text; empty for magnitude pruning unless some is given, which then measures errors only."""
    if args.calib_data is None and args.sparsity_fmt == "sparse_magnitude":
        return []
    sources = parse_sources(args.calib_data or DEFAULT_SOURCES)
    for source in sources:
        check_source(source)
    shares(sources, args.calib_size)  # refuses weights that leave a source without a sequence
    return sources


def load_calibration_set(
    args: argparse.Namespace,
    sources: list[Source],
    device: torch.device,
    process: PartialState,
    model: PreTrainedModel,
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """The batches of calibration and what their tokens count, in every process.

    The main process loads first, so that the others find in the cache what the model has written.
    """
    from sparsity.models import load_tokenizer
    from sparsity.distributed import fail_together
    from sparsity.generated_text import generate_text

    name, length = args.model_name_or_path, args.model_max_length

    def load() -> tuple[list[dict[str, torch.Tensor]], list[float]]:
        tokenizer = load_tokenizer(name, args.trust_remote_code)

        def write(count: int) -> torch.Tensor:
            return generate_text(name, tokenizer, count, length, device, args.seed, args.trust_remote_code, dense=model)

        return load_calibration(tokenizer, sources, args.calib_size, length, args.batch_size, args.seed, write)

    with fail_together(process):
        if process.is_main_process:
            loaded = load()
    with fail_together(process):
        return loaded if process.is_main_process else load()


def load_dense(
    args: argparse.Namespace, recipe: Recipe, sources: list[Source], process: PartialState
) -> PreTrainedModel:
    """The dense model, without memory for its weights if only estimates are wanted; prints what will be pruned."""
    from sparsity import models
    from sparsity.devices import torch_dtype
    from sparsity.pts.report import describe_plan

    config = models.load_config(args.model_name_or_path, args.trust_remote_code)
    if sources:
        models.check_lengths(config, {"--model_max_length": args.model_max_length})
    dtype = torch_dtype(args.dtype)
    if args.dry_run:
        model = models.empty_model(config, dtype, args.trust_remote_code)
    else:
        model = models.load_model(args.model_name_or_path, dtype, args.trust_remote_code)
    if process.is_main_process:
        print(describe_plan(model, recipe, args.ignore), end="")
    return model


def estimate(
    args: argparse.Namespace, recipe: Recipe, sources: list[Source], model: PreTrainedModel, device: torch.device
) -> str:
    """Shapes, time and memory of pruning and of the text that the model would write."""
    from sparsity.models import empty_model
    from sparsity.pts import report
    from sparsity.generated_text import writing_dtype

    if not sources:
        return "pruning by magnitude reads each weight once: no calibration text, no forward pass"
    counts = shares(sources, args.calib_size)
    calibration = (sum(counts), args.model_max_length, args.batch_size)
    written = sum(count for source, count in zip(sources, counts, strict=True) if source.spec == SELF)
    writer = empty_model(model.config, writing_dtype(device), args.trust_remote_code) if written else None
    lines = [report.estimate(model, recipe, args.ignore, calibration, device.type, writer)]
    if writer is not None:
        lines.append(report.self_text_estimate(writer, written, args.model_max_length, device.type))
    return "\n".join(lines)


def write_state(
    args: argparse.Namespace,
    recipe: Recipe,
    model: PreTrainedModel,
    masks: dict[str, torch.Tensor],
    batches: list[dict[str, torch.Tensor]],
) -> Path:
    """Write the state, proven on a freshly loaded model before it replaces an earlier one."""
    import torch

    from sparsity.devices import torch_dtype
    from sparsity.models import load_model
    from sparsity.pts.state import write_verified_state

    path = Path(args.output_dir) / "pts_modelopt_state.pth"
    if batches:
        probe = batches[0]["input_ids"][:1, : min(64, args.model_max_length)]
    else:
        probe = torch.arange(16)[None] % model.config.get_text_config().vocab_size
    fresh = partial(load_model, args.model_name_or_path, torch_dtype(args.dtype), args.trust_remote_code)
    write_verified_state(model, masks, path, recipe, probe, fresh)
    return path


def main() -> None:
    args = parse_args()
    check_args(args)
    recipe = make_recipe(args.sparsity_fmt, args.quality, args.pattern, args.percdamp)
    sources = choose_sources(args)

    # Imported once the options are known to be good: `--help` and mistakes need no torch.
    import torch

    from sparsity import files
    from sparsity.devices import peak_memory_mib, resolve_device, use_tf32
    from sparsity.distributed import fail_together, report_on_main, start_processes
    from sparsity.pts import report
    from sparsity.pts.layer_store import LayerStore, calibration_key
    from sparsity.pts.log import MatrixLog, save_log
    from sparsity.pts.magnitude import prune_by_magnitude
    from sparsity.pts.prune import prune_model

    process = start_processes(args.device)
    device = process.device if process.num_processes > 1 else resolve_device(args.device)
    use_tf32(True)
    started = time.perf_counter()

    # Phase 1: the model and the calibration text.
    with fail_together(process):
        output_dir = files.prepare_output_dir(args.output_dir)
        if args.activations_dir:
            files.prepare_output_dir(args.activations_dir)
        model = load_dense(args, recipe, sources, process)
    if args.dry_run:
        process.print(estimate(args, recipe, sources, model, device))
        return
    with fail_together(process):
        if process.is_main_process:
            files.lock_output_dir(output_dir)
    batches: list[dict[str, torch.Tensor]] = []
    if sources:
        batches, token_weights = load_calibration_set(args, sources, device, process, model)
        with fail_together(process):
            own, own_weights = share_of_process(batches, process), share_of_process(token_weights, process)
            settings = [args.ignore, args.dtype, args.batch_size]
            key = calibration_key(recipe, settings, batches, model, token_weights)
            store = LayerStore(output_dir / "pts_resume", key, writer=process.is_main_process)

    # Phase 2: pruning, with a log line for every weight as soon as its layer is finished.
    rows: list[MatrixLog] = []

    def on_rows(new: list[MatrixLog]) -> None:
        rows[:] = new
        if process.is_main_process:
            save_log(rows, output_dir / "pts_layers.jsonl")

    torch.manual_seed(args.seed)
    with report_on_main(process):
        if sources:
            masks = prune_model(
                model, own, recipe, device, store, args.ignore, on_rows, args.activations_dir, own_weights
            )
        elif process.is_main_process:  # one process is enough to read each weight once
            masks = prune_by_magnitude(model, recipe, device, args.ignore, on_rows)
    seconds, peak = time.perf_counter() - started, peak_memory_mib(device)
    process.destroy_process_group()
    if not process.is_main_process:
        return

    # Phase 3: the result.
    print(report.error_table(rows))
    print(report.sparsity_line(masks, model))
    path = write_state(args, recipe, model, masks, batches)
    if sources:
        store.remove()
    print(f"pruned in {seconds:.0f} s, peak memory {peak:.0f} MiB on {device.type}")
    print(f"saved {path}; restored into a fresh model it gives identical logits")


if __name__ == "__main__":
    run_cli(
        main,
        "lower --batch_size, --calib_size or --model_max_length, or give --activations_dir; --dry_run prints the need",
    )
