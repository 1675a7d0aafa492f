r"""Perplexity of a model on held-out text, with the measuring protocol printed beside the figure.

    python eval_ppl.py --model_dir demo/SmolLM2-135M-Instruct --text data/heldout.jsonl --context 512 --max_blocks 32
    python eval_ppl.py --model_dir meta-llama/Llama-2-7b-hf --text Salesforce/wikitext:wikitext-2-raw-v1:test \
        --context 4096 --modelopt_restore_path saved_models/pts_modelopt_state.pth

Blocked (the default): the token stream is cut into blocks of --context tokens, each judged on its own, as papers on
pruning do for WikiText-2. Sliding (--stride below --context): windows overlap, and each token is predicted once from at
least context - stride tokens before it, which gives lower figures. Perplexities compare only between models of one
tokenizer measured with one protocol.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity.errors import UserError
from utils import Parser, add_inference_options, add_placement_options, check_at_least, run_cli

if TYPE_CHECKING:
    from sparsity.placement import Placement


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_inference_options(parser.add_argument_group("model"))
    add_placement_options(parser.add_argument_group("models larger than one GPU"))
    text = parser.add_argument_group("text")
    text.add_argument(
        *("--text", "--dataset"),
        required=True,
        metavar="SOURCE",
        help="a file, a folder, or a hub data set NAME:CONFIG:SPLIT; several with weights: a=0.5,b=0.5",
    )
    text.add_argument("--dataset_config", metavar="NAME", help="configuration of a hub data set that names none")
    text.add_argument("--split", default="test", help="split of a data set that names none")
    text.add_argument("--text_column", default="text", help="column of a data set's text")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--context", type=int, default=2048, help="tokens per window")
    protocol.add_argument("--stride", type=int, help="tokens from one window to the next (by default --context)")
    protocol.add_argument("--max_blocks", type=int, metavar="N", help="use only the first N windows")
    protocol.add_argument("--batch_size", type=int, default=4, help="windows at a time")
    parser.add_argument("--output_json", metavar="FILE", help="file for the figure and its protocol")
    args = parser.parse_args()
    args.stride = args.context if args.stride is None else args.stride
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    check_at_least(args, 2, "context")
    check_at_least(args, 1, "stride", "max_blocks", "batch_size")
    if args.stride > args.context:
        raise UserError(f"--stride must lie between 1 and --context {args.context}, found {args.stride}")


def main() -> None:
    args = parse_args()
    check_args(args)

    # Imported once the options are known to be good: `--help` and mistakes need no torch.
    from sparsity.placement import choose_placement
    from sparsity.distributed import report_on_main, start_processes

    placement = choose_placement(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not placement.tensor_parallel:
        raise UserError("several processes would all measure the same; start one with python, or use --tensor_parallel")
    process = start_processes(args.device) if placement.tensor_parallel else None
    with report_on_main(process) if process else contextlib.nullcontext():  # all processes meet the same mistakes
        measure(args, placement)
    if process:
        process.destroy_process_group()


def measure(args: argparse.Namespace, placement: Placement) -> None:
    """Compute, print and save the figure."""
    from sparsity import files, models
    from sparsity.devices import inference_dtype, keep_freed_memory, resolve_device, use_tf32
    from sparsity.evaluation import perplexity
    from sparsity.placement import input_device, load_placed
    from sparsity.distributed import is_main_process

    # Phase 1: cheap checks, and the windows of text.
    device = resolve_device(args.device)
    use_tf32(True)
    keep_freed_memory()
    args.dtype = inference_dtype(args.dtype, device)
    if args.output_json:
        files.prepare_output_dir(Path(args.output_json).parent)
    if args.modelopt_restore_path:
        files.require_file(args.modelopt_restore_path, "modelopt state")
    texts = perplexity.choose_texts(args.text, args.dataset_config, args.split, args.text_column)
    config = models.load_config(args.model_dir, args.trust_remote_code)
    models.check_lengths(config, {"--context": args.context})
    tokenizer = models.load_tokenizer(args.model_dir, args.trust_remote_code)
    task = perplexity.make_task(tokenizer, texts, args.context, args.stride, args.max_blocks)
    main_process = is_main_process()
    if main_process:
        print(task.protocol, flush=True)

    # Phase 2: the figure.
    source = (args.model_dir, args.dtype, args.modelopt_restore_path, args.trust_remote_code)
    model = load_placed(*source, placement, device)
    found = perplexity.measure(model, task, input_device(model), args.batch_size)
    if main_process and args.output_json:
        facts = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(device), "arguments": vars(args)}
        files.save_json({**found, **facts}, args.output_json)
    if main_process:
        print(perplexity.result_line(found))


if __name__ == "__main__":
    run_cli(main, "lower --batch_size or --context, or use --dtype bf16")
