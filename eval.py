"""ROUGE of a model's summaries: beam search over instruction / input / output records, on one or many processes.

    accelerate launch --multi_gpu --num_processes=8 eval.py --model_dir meta-llama/Llama-2-7b-hf \\
        --data_path data/cnn_eval.json --batch_size 1 --beam_size 4 --model_max_length 1024 \\
        --modelopt_restore_path saved_models/finetuned/finetuned_modelopt_state.pth

Without --modelopt_restore_path the model is scored as it is. `python eval.py …` runs one process, and so does
`accelerate launch --cpu`; `torchrun --nproc_per_node=2 eval.py …` runs two, on the CPU too. Every example is scored
exactly once, and the scores do not depend on the number of processes. The last line printed is `ROUGE scores: {…}`,
fractions between 0 and 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from generation import (
    PredictionLog,
    beam_search_config,
    file_stamp,
    generate_batch,
    length_sorted_batches,
    run_key,
)
from model_io import DTYPES, check_lengths, load_config, load_for_inference, load_tokenizer
from processes import fail_together, start_processes
from rouge import ROUGE_TYPES, bootstrap_interval, rouge_f_measures
from text_input import PROMPT_HEAD, PROMPT_TAIL, encode_prompt, read_records
from utils import UserError, prepare_output_dir, require_file, run_cli, save_json

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to score")
    what.add_argument("--model_dir", required=True, help="Hugging Face model folder or hub id")
    what.add_argument("--modelopt_restore_path", metavar="STATE", help="sparse state from hf_pts.py or finetune.py")
    what.add_argument("--data_path", required=True, help="JSON or JSONL records, e.g. data/cnn_eval.json")
    what.add_argument("--limit", type=int, metavar="N", help="score only the first N records")
    what.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    how = parser.add_argument_group("generation")
    how.add_argument("--batch_size", type=int, default=1, help="prompts per process at a time (default %(default)s)")
    how.add_argument("--beam_size", type=int, default=4, help="beams; 1 is greedy decoding (default %(default)s)")
    how.add_argument(
        "--model_max_length",
        type=int,
        default=1024,
        help="most tokens of a prompt; longer articles lose their end, never the instruction (default %(default)s)",
    )
    how.add_argument("--max_new_tokens", type=int, default=128, help="most tokens of an answer (default %(default)s)")
    how.add_argument("--min_new_tokens", type=int, default=30, help="fewest tokens of an answer (default %(default)s)")
    how.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: the checkpoint's own)")
    how.add_argument("--device", default="auto", help="auto, cuda or cpu; auto takes a GPU if there is one")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--predictions",
        metavar="FILE",
        help="JSONL of index, prediction, reference, written as they come; the same command resumes after a kill",
    )
    out.add_argument("--output_json", metavar="FILE", help="scores with 95%% confidence intervals, and the settings")
    out.add_argument("--samples", type=int, default=2, help="predictions to print (default %(default)s)")
    arguments = parser.parse_args()
    for name in ("batch_size", "beam_size", "model_max_length", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 <= arguments.min_new_tokens <= arguments.max_new_tokens:
        parser.error("--min_new_tokens must lie between 0 and --max_new_tokens")
    if arguments.limit is not None and arguments.limit < 1:
        parser.error("--limit must be at least 1")
    return arguments


def settings_key(
    arguments: argparse.Namespace, records: list[dict[str, str]], config: PretrainedConfig, device: torch.device
) -> str:
    """Digest of all that can change a prediction: data, model, state, prompt, generation settings and versions."""
    import transformers

    local = Path(arguments.model_dir).is_dir()
    model = file_stamp(arguments.model_dir) if local else [arguments.model_dir, getattr(config, "_commit_hash", None)]
    state = file_stamp(arguments.modelopt_restore_path) if arguments.modelopt_restore_path else None
    names = ("batch_size", "beam_size", "model_max_length", "max_new_tokens", "min_new_tokens", "dtype")
    settings = {name: getattr(arguments, name) for name in names}
    versions = [torch.__version__, transformers.__version__]
    prompt = [PROMPT_HEAD, PROMPT_TAIL]
    return run_key(
        records=records, model=model, state=state, prompt=prompt, device=device.type, versions=versions, **settings
    )


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    records: list[dict[str, str]],
    batches: list[list[int]],
    config: GenerationConfig,
    process: PartialState,
    log: PredictionLog | None,
) -> dict[int, str]:
    """Generate this process's share of the batches (every num_processes-th), logging each as it is done."""
    from tqdm import tqdm

    predictions: dict[int, str] = {}
    mine = batches[process.process_index :: process.num_processes]
    total = sum(map(len, mine))
    with tqdm(total=total, desc="examples", disable=None if process.is_main_process else True) as progress:
        for batch in mine:
            texts = generate_batch(model, tokenizer, [prompts[index] for index in batch], config)
            done = dict(zip(batch, texts, strict=True))
            if log:
                log.append(process.process_index, (prediction_line(index, done[index], records) for index in batch))
            predictions.update(done)
            progress.update(len(batch))
    return predictions


def prediction_line(index: int, text: str, records: list[dict[str, str]]) -> dict[str, Any]:
    return {"index": index, "prediction": text, "reference": records[index]["output"]}


def report(
    records: list[dict[str, str]], predictions: dict[int, str], arguments: argparse.Namespace, facts: dict[str, Any]
) -> None:
    """Score, print samples, intervals and the final line, and save the figures."""
    texts = [predictions[index] for index in range(len(records))]
    if not any(texts):
        raise UserError("every prediction is empty: the model only produced end-of-text or blanks; check its tokenizer")
    scores = rouge_f_measures(texts, [record["output"] for record in records], progress=True)
    low, high = bootstrap_interval(scores)
    means = dict(zip(ROUGE_TYPES, scores.mean(axis=0).tolist(), strict=True))
    intervals = {name: [low[i].item(), high[i].item()] for i, name in enumerate(ROUGE_TYPES)}
    for index in range(min(arguments.samples, len(records))):
        print(f"\n--- example {index}\nreference:  {records[index]['output']}\nprediction: {texts[index]}")
    empty = sum(not text for text in texts)
    print(f"\n{len(texts)} examples, {empty} with an empty prediction; mean F-measure in percent, 95% interval")
    for name in ROUGE_TYPES:
        below, above = intervals[name]
        print(f"  {name:<10} {100 * means[name]:6.2f}  [{100 * below:.2f}, {100 * above:.2f}]")
    if arguments.output_json:
        result = {**means, "confidence_intervals_95": intervals, "examples": len(texts), "empty": empty, **facts}
        save_json({**result, "arguments": vars(arguments)}, arguments.output_json)
        print(f"figures saved in {arguments.output_json}")
    rounded = {name: round(value, 6) for name, value in means.items()}
    print(f"ROUGE scores: {rounded}", flush=True)


def main() -> None:
    arguments = parse_arguments()
    process = start_processes(arguments.device)

    # Read and check everything cheap before the model is loaded, and the model before any generation.
    with fail_together(process):
        records = read_records(arguments.data_path)[: arguments.limit]
        config = load_config(arguments.model_dir, arguments.trust_remote_code)
        lengths = {name: getattr(arguments, name) for name in ("model_max_length", "max_new_tokens")}
        check_lengths(config, {f"--{name}": value for name, value in lengths.items()})
        if arguments.modelopt_restore_path:
            require_file(arguments.modelopt_restore_path, "modelopt state")
        if arguments.output_json:
            prepare_output_dir(Path(arguments.output_json).parent)
        log = None
        if arguments.predictions:
            log = PredictionLog(arguments.predictions, settings_key(arguments, records, config, process.device))
            log.check()
        tokenizer = load_tokenizer(arguments.model_dir, arguments.trust_remote_code)
        prompts = [encode_prompt(tokenizer, record, arguments.model_max_length) for record in records]
        model = load_for_inference(
            arguments.model_dir, arguments.dtype, arguments.modelopt_restore_path, arguments.trust_remote_code
        ).to(process.device)
        settings = beam_search_config(
            model, tokenizer, arguments.beam_size, arguments.max_new_tokens, arguments.min_new_tokens
        )

    # One process looks for finished work, so that all deal out the same list of batches.
    from accelerate.utils import broadcast_object_list, gather_object

    found = [log.load() if log and process.is_main_process else {}]
    done = broadcast_object_list(found)[0]
    batches = [
        batch for batch in length_sorted_batches(prompts, arguments.batch_size) if not all(i in done for i in batch)
    ]
    if done and process.is_main_process:
        print(f"resuming: {len(done)} of {len(records)} predictions are already in {arguments.predictions}")

    start = time.perf_counter()
    own = predict(model, tokenizer, prompts, records, batches, settings, process, log)
    predictions = {**done, **dict(gather_object(list(own.items())))}
    seconds = time.perf_counter() - start

    with fail_together(process):
        if process.is_main_process:
            assert sorted(predictions) == list(range(len(records)))
            if log:
                log.finish(prediction_line(index, predictions[index], records) for index in range(len(records)))
            generated = sum(map(len, batches))
            facts = {
                "generated": generated,
                "examples_per_second": generated / seconds if generated else None,
                "num_processes": process.num_processes,
                "device": str(process.device),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
            report(records, predictions, arguments, facts)
    process.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
