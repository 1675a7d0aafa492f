"""Examples per second of eval.py's generation: length-sorted batches against one prompt after another.

    python data_prep.py --source aclsum --save_path demo/data
    python benchmarks/eval_benchmark.py --output benchmarks/eval_results.json

Both arms summarize the same examples with the same beam search, in rounds that alternate, and the median round counts.
In 32-bit floats the texts of both arms are compared as well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import describe_machine, settings  # noqa: E402

import model_io  # noqa: E402
import text_input  # noqa: E402
import utils  # noqa: E402
from generation import beam_search_config, generate_batch, length_sorted_batches  # noqa: E402

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def run_arm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batches: list[list[int]],
    config: GenerationConfig,
) -> tuple[float, dict[int, str]]:
    """Seconds and texts by example of one pass over `batches` (lists of indices into `prompts`)."""
    texts: dict[int, str] = {}
    start = time.perf_counter()
    for batch in batches:
        generated = generate_batch(model, tokenizer, [prompts[index] for index in batch], config)
        texts.update(zip(batch, generated, strict=True))
    return time.perf_counter() - start, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default=str(ROOT / "demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--data_path", default=str(ROOT / "demo/data/cnn_eval.json"))
    parser.add_argument("--examples", type=int, default=8, help="examples per round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of both arms (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="of the batched arm (default %(default)s)")
    parser.add_argument("--beam_size", type=int, default=4)
    parser.add_argument("--model_max_length", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=64, help="per example, neither more nor less")
    parser.add_argument("--dtype", choices=model_io.DTYPES, default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the figures")
    arguments = parser.parse_args()

    device = model_io.resolve_device(arguments.device)
    records = text_input.read_records(arguments.data_path)[: arguments.examples]
    tokenizer = model_io.load_tokenizer(arguments.model_dir)
    prompts = [text_input.encode_prompt(tokenizer, record, arguments.model_max_length) for record in records]
    model = model_io.load_model(arguments.model_dir, model_io.DTYPES[arguments.dtype]).to(device)
    config = beam_search_config(model, tokenizer, arguments.beam_size, arguments.new_tokens, arguments.new_tokens)
    arms = {
        "one by one": [[index] for index in range(len(prompts))],
        f"sorted batches of {arguments.batch_size}": length_sorted_batches(prompts, arguments.batch_size),
    }
    print(f"{describe_machine(device)}; {len(prompts)} examples, {arguments.beam_size} beams, {arguments.dtype}")
    generate_batch(model, tokenizer, [prompts[0][:16]], beam_search_config(model, tokenizer, 1, 2, 2))  # warm up

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    texts: dict[str, dict[int, str]] = {}
    for _ in range(arguments.rounds):
        for name, batches in arms.items():
            spent, texts[name] = run_arm(model, tokenizer, prompts, batches, config)
            seconds[name].append(spent)
            print(f"  {name:<24} {len(prompts) / spent:8.4f} examples/s", flush=True)
    single, batched = (statistics.median(values) for values in seconds.values())
    first, second = texts.values()
    same = sum(first[index] == second[index] for index in first)
    print(f"ratio {single / batched:.2f}x; {same} of {len(first)} texts are the same")
    if arguments.output:
        figures = {"seconds": seconds, "ratio": single / batched, "same_texts": same, "examples": len(first)}
        figures |= {"machine": describe_machine(device), "torch": torch.__version__, "arguments": settings(arguments)}
        utils.save_json(figures, arguments.output)


if __name__ == "__main__":
    utils.run_cli(main)
