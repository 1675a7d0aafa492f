"""Perplexity of a model on held-out text, with the measuring protocol printed beside the figure.

    python eval_ppl.py --model_dir demo/SmolLM2-135M-Instruct --text data/heldout.jsonl --context 512 --max_blocks 32
    python eval_ppl.py --model_dir meta-llama/Llama-2-7b-hf --dataset Salesforce/wikitext \\
        --dataset_config wikitext-2-raw-v1 --context 4096 --modelopt_restore_path saved_models/pts_modelopt_state.pth

Blocked (the default): the token stream is cut into blocks of --context tokens, each judged on its own, as papers on
pruning do for WikiText-2. Sliding (--stride below --context): windows overlap, and each token is predicted once from at
least context - stride tokens before it, which gives lower figures. Perplexities compare only between models of one
tokenizer measured with one protocol.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model_io import DTYPES, check_lengths, load_config, load_for_inference, load_tokenizer, perplexity, resolve_device
from text_input import read_texts, token_blocks
from utils import UserError, first_line, prepare_output_dir, require_file, run_cli, save_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model_dir", required=True, help="Hugging Face model folder or hub id, dense or exported")
    model.add_argument("--modelopt_restore_path", metavar="STATE", help="sparse state from hf_pts.py or finetune.py")
    model.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: the checkpoint's own)")
    model.add_argument("--device", default="auto", help="auto, cuda or cpu; auto takes a GPU if there is one")
    model.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    text = parser.add_argument_group("text")
    source = text.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help=".txt, or .json / .jsonl with text fields")
    source.add_argument("--dataset", metavar="ID", help="hub data set, e.g. Salesforce/wikitext")
    text.add_argument("--dataset_config", metavar="NAME", help="its configuration, e.g. wikitext-2-raw-v1")
    text.add_argument("--split", default="test", help="its split (default %(default)s)")
    text.add_argument("--text_column", default="text", help="its column of text (default %(default)s)")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--context", type=int, default=2048, help="tokens per window (default %(default)s)")
    protocol.add_argument("--stride", type=int, help="tokens from one window to the next (default: --context)")
    protocol.add_argument("--max_blocks", type=int, metavar="N", help="use only the first N windows")
    protocol.add_argument("--batch_size", type=int, default=4, help="windows at a time (default %(default)s)")
    parser.add_argument("--output_json", metavar="FILE", help="file for the figure and its protocol")
    arguments = parser.parse_args()
    arguments.stride = arguments.context if arguments.stride is None else arguments.stride
    if arguments.context < 2:
        parser.error("--context must be at least 2")
    if not 1 <= arguments.stride <= arguments.context:
        parser.error("--stride must lie between 1 and --context")
    if arguments.batch_size < 1 or (arguments.max_blocks is not None and arguments.max_blocks < 1):
        parser.error("--batch_size and --max_blocks must be at least 1")
    return arguments


def read_dataset(name: str, config: str | None, split: str, column: str) -> list[str]:
    """One text: the rows of a hub data set joined by blank lines, as WikiText-2 is joined in the literature.

    Raises:
        UserError: the data set, split or column is not there, or the hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises many kinds: connection, missing set, missing config, bad split
        chosen = f"{name} {config or ''} {split}"
        raise UserError(f"cannot load the data set {chosen}: {first_line(error)}") from error
    if column not in rows.column_names:
        raise UserError(f"data set '{name}' has no column '{column}'; --text_column may be one of {rows.column_names}")
    return ["\n\n".join(rows[column])]


def token_windows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], context: int, stride: int, limit: int | None
) -> torch.Tensor:
    """Full windows of the texts' token stream, each starting `stride` tokens after the one before.

    Returns:
        int64 tensor [windows, context], a view of the stream. What follows the last full window is left out.
    """
    needed = context + (limit - 1) * stride if limit else None
    stream = token_blocks(tokenizer, texts, block_size=1, limit=needed).flatten()
    if len(stream) < context:
        raise UserError(f"the text has only {len(stream)} tokens, less than --context {context}")
    return stream.unfold(0, context, stride)


def protocol_line(windows: torch.Tensor, stride: int, scored: int, source: str) -> str:
    count, context = windows.shape
    kind = "blocked" if stride == context else f"sliding by {stride}"
    return f"protocol: {source}; {count} windows of {context} tokens, {kind}; {scored} tokens predicted"


def main() -> None:
    arguments = parse_arguments()
    device = resolve_device(arguments.device)
    if arguments.output_json:
        prepare_output_dir(Path(arguments.output_json).parent)
    if arguments.modelopt_restore_path:
        require_file(arguments.modelopt_restore_path, "modelopt state")
    if arguments.text:
        texts, source = read_texts(arguments.text), Path(arguments.text).name
    else:
        selection = (arguments.dataset, arguments.dataset_config, arguments.split, arguments.text_column)
        texts, source = read_dataset(*selection), " ".join(filter(None, selection))
    config = load_config(arguments.model_dir, arguments.trust_remote_code)
    check_lengths(config, {"--context": arguments.context})
    tokenizer = load_tokenizer(arguments.model_dir, arguments.trust_remote_code)
    windows = token_windows(tokenizer, texts, arguments.context, arguments.stride, arguments.max_blocks)
    scored = windows.shape[1] - 1 + (len(windows) - 1) * min(arguments.stride, windows.shape[1] - 1)
    protocol = protocol_line(windows, arguments.stride, scored, source)
    print(protocol, flush=True)

    model = load_for_inference(
        arguments.model_dir, arguments.dtype, arguments.modelopt_restore_path, arguments.trust_remote_code
    ).to(device)
    start = time.perf_counter()
    value = perplexity(model, windows, device, arguments.batch_size, arguments.stride)
    seconds = time.perf_counter() - start
    if math.isnan(value):
        raise UserError(
            "the perplexity is not a number: the model overflows in this precision; try --dtype bf16 or fp32"
        )

    if arguments.output_json:
        result: dict[str, Any] = {
            "perplexity": value,
            "tokens": scored,
            "windows": len(windows),
            "context": arguments.context,
            "stride": arguments.stride,
            "protocol": protocol,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(device),
            "seconds": seconds,
            "arguments": vars(arguments),
        }
        save_json(result, arguments.output_json)
    print(f"perplexity: {value:.4f} ({scored} tokens in {seconds:.1f} s)")


if __name__ == "__main__":
    run_cli(main)
