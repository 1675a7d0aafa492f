"""Every causal-LM architecture of transformers, tiny and random, through the whole pipeline.

    python -m benchmarks.architectures                 # all of them; rewrites docs/models.md
    python -m benchmarks.architectures llama mixtral   # some, without the table

Each architecture is pruned, restored by plain `mto.restore`, trained for two steps, evaluated by generation, exported,
and its perplexity compared before and after the export. Every step is a script in a forked process with a time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import add_output_option, check_output
from benchmarks.tiny_models import TEXTS, save_tiny_model
from sparsity.files import save_json
from utils import Parser, run_cli

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # for one step of one architecture
LOSSLESS = 1e-3  # largest relative difference of perplexities before and after the export, both float32


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types, e.g. llama (by default all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep models, states and logs here")
    parser.add_argument("--table", type=Path, help="Markdown table (by default docs/models.md where all are run)")
    add_output_option(parser, "architectures")
    return parser.parse_args()


def forked(work: Callable[[], None], log: Path) -> str:
    """Run `work` in a forked process with its output in `log`.

    Returns:
        "" if it ended well, otherwise the one line of its error, or "traceback: …" or "timeout".
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            work()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(0.05)
    if ended[1] == 0:
        return ""
    text = log.read_text(encoding="utf-8", errors="replace").replace(f"{log.parent}/", "")
    lines = text.strip().splitlines() or ["no output"]
    if any(line.startswith("Traceback") for line in lines):
        return f"traceback: {lines[-1]}"
    if any("every prediction is empty" in line for line in lines):  # as random models may write
        return ""
    return next((line for line in lines if line.startswith("error: ")), f"traceback: {lines[-1]}")


def build(model_type: str, folder: Path) -> None:
    """Save a tiny model, and open it: some types save a configuration that transformers itself cannot open."""
    from transformers import AutoModelForCausalLM

    save_tiny_model(model_type, folder)
    AutoModelForCausalLM.from_pretrained(folder)


def script(name: str, *arguments: Any) -> Callable[[], None]:
    """A script of the project with its arguments, to be run in a forked process."""

    def work() -> None:
        os.chdir(ROOT)
        sys.argv = [name, *map(str, arguments)]
        runpy.run_path(str(ROOT / name), run_name="__main__")

    return work


def restore(model: Path, state: Path) -> Callable[[], None]:
    """Plain `mto.restore` on the dense model: the state needs nothing of this project."""

    def work() -> None:
        import modelopt.torch.opt as mto
        from transformers import AutoModelForCausalLM

        mto.restore(AutoModelForCausalLM.from_pretrained(model), state)

    return work


def pruned_fraction(state: Path) -> float:
    """Fraction of all weights that a state's masks cover."""
    from sparsity.modelopt_state import is_mask, load_state

    tensors = load_state(state)["model_state_dict"]
    masked = sum(tensor.numel() for name, tensor in tensors.items() if is_mask(name))
    return masked / sum(tensor.numel() for name, tensor in tensors.items() if not is_mask(name))


def perplexity(path: Path) -> float:
    return json.loads(path.read_text(encoding="utf-8"))["perplexity"]


def run(model_type: str, folder: Path) -> dict[str, Any]:
    """One architecture through all steps, up to the first that fails.

    Returns:
        {"steps": step → "" or what it ended in, "pruned": fraction or None, "built": "" or why not}.
    """
    model, pts, sat, exported = (folder / name for name in ("model", "pts", "sat", "exported"))
    failure = forked(lambda: build(model_type, model), folder / "build.log")
    outcome: dict[str, Any] = {"built": failure, "steps": {}, "pruned": None}
    if failure:
        return outcome
    (folder / "records.json").write_text(
        json.dumps([{"instruction": "Summarize.", "input": text * 2, "output": text} for text in TEXTS * 2])
    )
    for name in ("cnn_train.json", "cnn_eval.json"):
        (folder / name).write_text((folder / "records.json").read_text())
    (folder / "texts.json").write_text(json.dumps(TEXTS * 3))
    state, tuned = pts / "pts_modelopt_state.pth", sat / "finetuned_modelopt_state.pth"
    text = ("--text", folder / "texts.json", "--context", 32, "--max_blocks", 4, "--dtype", "fp32")
    pruning = ("hf_pts.py", "--model_name_or_path", model, "--dtype", "fp32", "--output_dir", pts, "--batch_size", 2)
    calibration = ("--calib_data", folder / "texts.json", "--calib_size", 4, "--model_max_length", 32)
    lengths = ("--max_length", 200, "--max_steps", 2, "--train_bs", 2)
    generation = ("--limit", 2, "--batch_size", 2, "--beam_size", 2, "--max_new_tokens", 16, "--min_new_tokens", 8)
    before, after = folder / "before.json", folder / "after.json"
    steps = {
        "prune": script(*pruning, *calibration),
        "restore": restore(model, state),
        "train": script(
            *("finetune.py", "--model", model, "--restore_path", state, "--output_dir", sat),
            *("--data_path", folder, *lengths),
        ),
        "evaluate": script(
            *("eval.py", "--model_dir", model, "--modelopt_restore_path", tuned),
            *("--data_path", folder / "cnn_eval.json", "--model_max_length", 200, *generation),
        ),
        "export": script(
            "export_hf.py", "--model_dir", model, "--modelopt_restore_path", tuned, "--output_dir", exported
        ),
        "perplexity": script(
            *("eval_ppl.py", "--model_dir", model, "--modelopt_restore_path", tuned, *text),
            *("--output_json", before),
        ),
        "exported perplexity": script("eval_ppl.py", "--model_dir", exported, *text, "--output_json", after),
        "dry run": script(*pruning, *calibration, "--dry_run"),
    }
    for step, work in steps.items():
        outcome["steps"][step] = failure = forked(work, folder / f"{step}.log")
        if failure:
            return outcome
        if step == "prune":
            outcome["pruned"] = round(pruned_fraction(state), 4)
    difference = abs(perplexity(after) / perplexity(before) - 1)
    if difference > LOSSLESS:
        outcome["steps"]["exported perplexity"] = (
            f"wrong: {perplexity(before):.4g} before, {perplexity(after):.4g} after"
        )
    return outcome


def verdict(outcome: dict[str, Any]) -> str:
    """The last column of the table: "whole chain", or where an architecture ended and how."""
    failed = [f"{step}: {failure.removeprefix('error: ')}" for step, failure in outcome["steps"].items() if failure]
    return failed[0] if failed else "whole chain"


def table(outcomes: dict[str, dict[str, Any]]) -> str:
    """Markdown: the architectures that pass, with the pruned fraction of their weights; where each other one ended."""
    import transformers

    built = {name: outcome for name, outcome in sorted(outcomes.items()) if not outcome["built"]}
    others = ", ".join(sorted(outcomes.keys() - built.keys()))
    whole = [name for name, outcome in built.items() if verdict(outcome) == "whole chain"]
    lines = [
        "# Models",
        "",
        f"Tiny random models of {len(outcomes)} causal-LM architectures of transformers {transformers.__version__}, "
        "each pruned, restored, trained for two steps, evaluated by generation, exported and compared by perplexity; "
        f"written by `python -m benchmarks.architectures`. {len(whole)} of {len(built)} go through the whole chain. "
        f"transformers could not build these in a small size, or not open them again: {others}.",
        "",
        "The whole chain, with the fraction of all weights that is pruned to 2:4: "
        + ", ".join(f"{name} {built[name]['pruned']:.0%}" for name in whole)
        + ".",
        "",
        "| ends before | in this line |",
        "|---|---|",
    ]
    lines += [f"| {name} | {verdict(built[name]).replace('|', '/')} |" for name in built if name not in whole]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_args()
    check_output(args.output)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot be forked

    # Imported once, for all processes that are forked from this one.
    import datasets  # noqa: F401
    import modelopt.torch.sparsity  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import sparsity.sat.trainer  # noqa: F401

    torch.set_num_threads(1)
    outcomes: dict[str, dict[str, Any]] = {}
    for model_type in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.keep / model_type if args.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            outcomes[model_type] = run(model_type, folder)
        result = outcomes[model_type]["built"] or verdict(outcomes[model_type])
        print(f"{model_type:<28}{time.perf_counter() - started:6.1f} s  {result}", flush=True)
        save_json(outcomes, args.output)
    path = args.table or (None if args.types else ROOT / "docs/models.md")
    if path:
        path.write_text(table(outcomes), encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
