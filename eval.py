r"""ROUGE of a model's summaries: beam search over instruction / input / output records, on one or many processes.

    accelerate launch --multi_gpu --num_processes=8 eval.py --model_dir meta-llama/Llama-2-7b-hf \
        --data_path data/cnn_eval.json --batch_size 1 --beam_size 4 --model_max_length 1024 \
        --modelopt_restore_path saved_models/finetuned/finetuned_modelopt_state.pth

Without --modelopt_restore_path the model is scored as it is. `python eval.py …` runs one process, and so does
`accelerate launch --cpu`; `torchrun --nproc_per_node=2 eval.py …` runs two, on the CPU too. Every example is scored
exactly once, and the scores do not depend on the number of processes. The last line printed is `ROUGE scores: {…}`,
in percent. eval_ppl.py measures perplexity.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.errors import UserError
from utils import (
    Parser,
    add_inference_options,
    add_placement_options,
    add_template_options,
    check_at_least,
    run_cli,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from sparsity.text import PromptTemplate


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_inference_options(parser.add_argument_group("model"))
    add_placement_options(parser.add_argument_group("models larger than one GPU"))
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", required=True, help="JSON or JSONL records, e.g. data/cnn_eval.json")
    data.add_argument("--limit", type=int, metavar="N", help="score only the first N records")
    add_template_options(data)
    how = parser.add_argument_group("generation")
    how.add_argument("--batch_size", type=int, default=1, help="prompts per process at a time")
    how.add_argument("--beam_size", type=int, default=4, help="beams; 1 is greedy decoding")
    how.add_argument(
        "--model_max_length",
        type=int,
        default=1024,
        help="most tokens of a prompt; longer articles lose their end",
    )
    how.add_argument("--max_new_tokens", type=int, default=128, help="most tokens of an answer")
    how.add_argument("--min_new_tokens", type=int, default=30, help="fewest tokens of an answer")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--predictions",
        metavar="FILE",
        help="JSONL of index, prediction, reference, written as they come; the same command resumes after a kill",
    )
    out.add_argument("--output_json", metavar="FILE", help="scores with 95%% confidence intervals, and the settings")
    out.add_argument("--samples", type=int, default=2, help="predictions to print")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the options before anything is loaded."""
    check_at_least(args, 1, "batch_size", "beam_size", "model_max_length", "max_new_tokens", "limit")
    if not 0 <= args.min_new_tokens <= args.max_new_tokens:
        raise UserError(
            f"--min_new_tokens must lie between 0 and --max_new_tokens {args.max_new_tokens}, got {args.min_new_tokens}"
        )


def read_inputs(
    args: argparse.Namespace,
) -> tuple[list[dict[str, str]], PretrainedConfig, PreTrainedTokenizerBase, PromptTemplate]:
    """Records, the model's configuration, tokenizer and prompt template, with every check that needs no weights."""
    from sparsity import files, models, text
    from sparsity.errors import warn

    records = text.read_records(args.data_path)[: args.limit]
    config = models.load_config(args.model_dir, args.trust_remote_code)
    models.check_lengths(config, {"--model_max_length": args.model_max_length, "--max_new_tokens": args.max_new_tokens})
    if args.modelopt_restore_path:
        files.require_file(args.modelopt_restore_path, "modelopt state")
    if args.output_json:
        files.prepare_output_dir(Path(args.output_json).parent)
    tokenizer = models.load_tokenizer(args.model_dir, args.trust_remote_code)
    template = text.choose_template(args.prompt_template, args.chat_template, tokenizer)
    trained = text.trained_prompt(args.modelopt_restore_path) if args.modelopt_restore_path else None
    if trained not in (None, asdict(template)):
        warn(
            f"{args.modelopt_restore_path} was trained with another prompt template (see {text.RUN_RECORD} beside "
            "it); give the --prompt_template or --chat_template of its training"
        )
    return records, config, tokenizer, template


def report_scores(
    args: argparse.Namespace, records: list[dict[str, str]], predictions: list[str], facts: dict[str, Any]
) -> None:
    """Score the predictions, save the scores with the facts of the run, and print them with some samples."""
    from sparsity.evaluation.rouge import print_scores, score_predictions
    from sparsity.files import save_json

    references = [record["output"] for record in records]
    scores = score_predictions(predictions, references)
    if args.output_json:
        save_json({**scores, **facts, "unit": "percent"}, args.output_json)
    for index in range(min(args.samples, len(records))):
        print(f"\n--- example {index}\nreference:  {references[index]}\nprediction: {predictions[index]}")
    print_scores(scores, args.output_json)


def main() -> None:
    args = parse_args()
    check_args(args)

    # Imported once the options are known to be good: `--help` and mistakes need no torch.
    from accelerate.utils import broadcast_object_list, gather_object

    from sparsity import text
    from sparsity.devices import inference_dtype, keep_freed_memory, use_tf32
    from sparsity.distributed import start_processes
    from sparsity.errors import warn
    from sparsity.evaluation.generation import beam_search_config, length_sorted_batches, predict
    from sparsity.evaluation.predictions import PredictionLog, settings_key
    from sparsity.modelopt_state import sparsity_name
    from sparsity.placement import check_placement, load_placed

    check_placement(args)
    process = start_processes(args.device)
    use_tf32(True)
    keep_freed_memory()
    args.dtype = inference_dtype(args.dtype, process.device)

    # Phase 1: everything cheap is checked before the model is loaded, and the model before any generation.
    records, config, tokenizer, template = read_inputs(args)
    log = None
    if args.predictions:
        key = settings_key(args, records, config, process.device, template)
        log = PredictionLog(args.predictions, key, [record["output"] for record in records])
        log.check()
    encoded = [text.encode_prompt(tokenizer, record, args.model_max_length, template) for record in records]
    prompts = [ids for ids, _ in encoded]
    if headless := sum(cut for _, cut in encoded):
        counts = f"{headless} of {len(records)} prompts lost their start"
        warn(f"--model_max_length {args.model_max_length} is short: {counts}")
    model = load_placed(args, process.device)
    generation = beam_search_config(model, tokenizer, args.beam_size, args.max_new_tokens, args.min_new_tokens)

    # Phase 2: generation. One process looks for finished work, so that all share out the same list of batches.
    done = broadcast_object_list([log.load() if log and process.is_main_process else {}])[0]
    batches = [b for b in length_sorted_batches(prompts, args.batch_size) if not all(index in done for index in b)]
    if done:
        process.print(f"resuming: {len(done)} of {len(records)} predictions are already in {args.predictions}")
    start = time.perf_counter()
    part = (process.process_index, process.num_processes)
    own = predict(model, tokenizer, prompts, batches, generation, part, log)
    predictions = {**done, **dict(gather_object(list(own.items())))}
    seconds = time.perf_counter() - start

    # Phase 3: scores, by the main process.
    if process.is_main_process:
        assert sorted(predictions) == list(range(len(records)))
        if log:
            log.finish(predictions)
        generated = sum(map(len, batches))
        facts = {
            "generated": generated,
            "examples_per_second": generated / seconds if generated else None,
            "num_processes": process.num_processes,
            "device": str(process.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "sparsity": sparsity_name(args.modelopt_restore_path),
            "arguments": vars(args),
        }
        report_scores(args, records, [predictions[index] for index in range(len(records))], facts)


if __name__ == "__main__":
    run_cli(main, "lower --batch_size, --beam_size or --model_max_length, or use --dtype bf16")
