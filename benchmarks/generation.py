"""Examples per second of eval.py's generation: length-sorted batches compared with one prompt at a time.

    python data_prep.py --source aclsum --save_path demo/data
    python -m benchmarks.generation

Both arms summarize the same examples with the same beam search, in alternating rounds; the median round counts. With
--dtype fp32 the texts of both arms should be the same, and the number of equal texts is reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks.machine import add_output_option, check_output, describe_machine, save_figures
from sparsity.attention import use_blocked_attention
from sparsity.devices import DTYPES, resolve_device, torch_dtype
from sparsity.evaluation.generation import beam_search_config, generate_batch, length_sorted_batches
from sparsity.models import load_model, load_tokenizer
from sparsity.text import encode_prompt, read_records
from utils import Parser, check_at_least, run_cli

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m benchmarks.generation")
    parser.add_argument("--model_dir", default="demo/SmolLM2-135M-Instruct", help="Hugging Face model folder")
    parser.add_argument("--data_path", default="demo/data/cnn_eval.json", help="records to summarize")
    parser.add_argument("--examples", type=int, default=8, help="examples per round")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of both arms")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts per batch of the batched arm")
    parser.add_argument("--beam_size", type=int, default=4, help="beam search width")
    parser.add_argument("--model_max_length", type=int, default=512, help="tokens of a prompt; articles are cut to fit")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to generate per example, exactly")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the weights")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto: CUDA where there is one")
    add_output_option(parser, "generation")
    args = parser.parse_args()
    check_at_least(args, 1, "examples", "rounds", "batch_size", "beam_size", "model_max_length", "new_tokens")
    check_output(args.output)
    return args


def run_arm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batches: list[list[int]],
    config: GenerationConfig,
) -> tuple[float, dict[int, str]]:
    """One pass over `batches`, which are lists of indices into `prompts`.

    Returns:
        seconds; the generated text by index.
    """
    texts: dict[int, str] = {}
    start = time.perf_counter()
    for batch in batches:
        generated = generate_batch(model, tokenizer, [prompts[index] for index in batch], config)
        texts.update(zip(batch, generated, strict=True))
    return time.perf_counter() - start, texts


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], args: argparse.Namespace
) -> dict:
    """Run both arms in alternating rounds; returns the seconds of every round, their ratio, and the equal texts."""
    config = beam_search_config(model, tokenizer, args.beam_size, args.new_tokens, args.new_tokens)
    arms = {
        "one by one": [[index] for index in range(len(prompts))],
        f"sorted batches of {args.batch_size}": length_sorted_batches(prompts, args.batch_size),
    }
    generate_batch(model, tokenizer, [prompts[0][:16]], beam_search_config(model, tokenizer, 1, 2, 2))  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    texts: dict[str, dict[int, str]] = {}
    for _ in range(args.rounds):
        for name, batches in arms.items():
            elapsed, texts[name] = run_arm(model, tokenizer, prompts, batches, config)
            seconds[name].append(elapsed)
            print(f"  {name:<24} {len(prompts) / elapsed:8.4f} examples/s", flush=True)
    single, batched = (statistics.median(values) for values in seconds.values())
    first, second = texts.values()
    same = sum(first[index] == second[index] for index in first)
    return {"seconds": seconds, "ratio": single / batched, "same_texts": same, "examples": len(prompts)}


def main() -> None:
    args = parse_args()
    device = resolve_device(args.device)
    records = read_records(args.data_path)[: args.examples]
    tokenizer = load_tokenizer(args.model_dir)
    prompts = [encode_prompt(tokenizer, record, args.model_max_length) for record in records]
    model = load_model(args.model_dir, torch_dtype(args.dtype)).to(device)
    use_blocked_attention(model, device)
    print(f"{describe_machine(device)}; {len(prompts)} examples, {args.beam_size} beams, {args.dtype}")
    figures = compare(model, tokenizer, prompts, args)
    print(f"ratio {figures['ratio']:.2f}x; {figures['same_texts']} of {figures['examples']} texts are the same")
    save_figures(figures, args, device)


if __name__ == "__main__":
    run_cli(main)
