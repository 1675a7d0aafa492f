r"""Perplexity of a model on held-out text, with the measuring protocol printed beside the figure.

    python eval_ppl.py --model_dir demo/SmolLM2-135M-Instruct --text data/heldout.jsonl --context 512 --max_blocks 32
    python eval_ppl.py --model_dir demo/SmolLM2-135M-Instruct --text papers=heldout.jsonl manual=manual.txt \
        --output_json perplexity.json
    python eval_ppl.py --model_dir meta-llama/Llama-2-7b-hf --text Salesforce/wikitext:wikitext-2-raw-v1:test \
        --context 4096 --modelopt_restore_path saved_models/pts_modelopt_state.pth

Blocked (the default): the token stream is cut into blocks of --context tokens, each judged on its own, as papers on
pruning do for WikiText-2. Sliding (--stride below --context): windows overlap, and each token is predicted once from at
least context - stride tokens before it, which gives lower figures. Perplexities compare only between models of one
tokenizer measured with one protocol.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sparsity.errors import UserError
from utils import Parser, add_inference_options, add_placement_options, check_at_least, run_cli


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_inference_options(parser.add_argument_group("model"))
    add_placement_options(parser.add_argument_group("models larger than one GPU"))
    text = parser.add_argument_group("text")
    text.add_argument(
        *("--text", "--dataset"),
        nargs="+",
        required=True,
        metavar="[NAME=]SOURCE",
        help="texts to measure, each a file, a folder, or a hub data set NAME:CONFIG:SPLIT",
    )
    text.add_argument("--split", default="test", help="split of a data set that names none")
    text.add_argument("--text_column", help="column of a data set; by default its chats, or text, input, …")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--context", type=int, default=2048, help="tokens per window")
    protocol.add_argument("--stride", type=int, help="tokens from one window to the next (by default --context)")
    protocol.add_argument("--max_blocks", type=int, metavar="N", help="use only the first N windows of each text")
    protocol.add_argument("--batch_size", type=int, default=4, help="windows at a time")
    parser.add_argument("--output_json", metavar="FILE", help="file for the figures and their protocols")
    args = parser.parse_args()
    args.stride = args.context if args.stride is None else args.stride
    return args


def check_args(args: argparse.Namespace) -> None:
    """Check the options before anything is loaded."""
    check_at_least(args, 2, "context")
    check_at_least(args, 1, "stride", "max_blocks", "batch_size")
    if args.stride > args.context:
        raise UserError(f"--stride must lie between 1 and --context {args.context}, got {args.stride}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("eval_ppl.py runs in one process; start it with python")


def main() -> None:
    args = parse_args()
    check_args(args)

    # Imported once the options are known to be good: `--help` and mistakes need no torch.
    from sparsity import files, models
    from sparsity.devices import inference_dtype, keep_freed_memory, resolve_device, use_tf32
    from sparsity.evaluation import perplexity
    from sparsity.metrics import save_perplexities
    from sparsity.modelopt_state import sparsity_name
    from sparsity.placement import check_placement, input_device, load_placed

    # Phase 1: cheap checks, and the windows of each text.
    check_placement(args)
    device = resolve_device(args.device)
    use_tf32(True)
    keep_freed_memory()
    args.dtype = inference_dtype(args.dtype, device)
    if args.output_json:
        files.prepare_output_dir(Path(args.output_json).parent)
    if args.modelopt_restore_path:
        files.require_file(args.modelopt_restore_path, "modelopt state")
    texts = perplexity.choose_texts(args.text)
    config = models.load_config(args.model_dir, args.trust_remote_code)
    models.check_lengths(config, {"--context": args.context})
    tokenizer = models.load_tokenizer(args.model_dir, args.trust_remote_code)
    reading = (args.context, args.stride, args.max_blocks, args.split, args.text_column)
    windows = {name: perplexity.windows_of(tokenizer, source, *reading) for name, source in texts.items()}

    # Phase 2: the figures.
    model = load_placed(args, device)
    results = {}
    for name, source in texts.items():
        result = perplexity.measure(model, windows[name], input_device(model), args.batch_size, args.stride)
        protocol = (args.stride, result["tokens"], source, args.split, args.text_column)
        result["protocol"] = perplexity.protocol_line(windows[name], *protocol)
        results[name] = result
        print(result["protocol"])
        label = f" ({name})" if name else ""
        print(f"perplexity{label}: {result['perplexity']:.4f} ({result['tokens']} tokens, {result['seconds']:.1f} s)")
    if args.output_json:
        sparsity = sparsity_name(args.modelopt_restore_path)
        dtype = str(model.dtype).removeprefix("torch.")
        facts = {"dtype": dtype, "device": str(device), "sparsity": sparsity, "arguments": vars(args)}
        save_perplexities(results, facts, args.output_json)


if __name__ == "__main__":
    run_cli(main, "lower --batch_size or --context, or use --dtype bf16")
