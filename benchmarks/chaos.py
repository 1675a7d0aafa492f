r"""Kill every script at random moments, repeat the same command until it ends, and compare the results.

    python -m benchmarks.chaos 40 --output benchmarks/results/chaos.json
    python -m benchmarks.chaos 10 --jobs PTS SAT

Each script first runs once without interruption. Then it starts again and again in new folders; at a random moment all
its processes are killed with SIGKILL, and the same command is given again, until N kills have happened. Results must
equal those of the first run: to the bit for pruning, data, evaluation and export, to 1e-5 for training. Files that the
first run did not leave count as left over. The model is a small random Llama, whose runs take seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from sparsity.devices import resolve_device
from sparsity.errors import UserError
from sparsity.files import read_json, save_json
from utils import Parser, check_at_least, run_cli

ROOT = Path(__file__).resolve().parent.parent
TAG = "SPARSITY_CHAOS_RUN"  # environment variable that all processes of a run inherit
VOLATILE = {"seconds", "layer_seconds", "generated", "examples_per_second", "tokens_per_second"}
VOLATILE |= {"arguments", "run"}


@dataclass
class Job:
    """A script to kill.

    Attributes:
        command: words, with {out} for the output folder and {inputs} for the folder of the inputs.
        results: files in the output folder to compare.
        tolerance: largest difference of a weight or number; 0 asks for the same bits.
    """

    command: str
    results: tuple[str, ...]
    tolerance: float = 0.0


@dataclass
class Outcome:
    """Counts of one job, and a line for each failure."""

    kills: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)  # ended with an error, or never
    different: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)


TRAIN = (
    "--model {inputs}/model --restore_path {inputs}/pts_modelopt_state.pth --data_path {inputs}/data --max_length 200 "
)
TRAIN += "--text_path {inputs}/texts.json=0.5,self=0.5 --text_ratio 0.5 --self_tokens 1600 --distill --distill_kl 0.5 "
TRAIN += "--max_steps 6 --save_steps 2 --eval_steps 3 --logging_steps 1 --train_bs 1 --workers 1 --mixed_precision no "
TRAIN += "--output_dir {out} --resume"
TRAINED = ("finetuned_modelopt_state.pth", "train_log.jsonl")
JOBS = {
    "data": Job(
        "{python} data_prep.py --source {inputs}/table.json --save_path {out}", ("cnn_train.json", "cnn_eval.json")
    ),
    "PTS": Job(
        "{python} hf_pts.py --model_name_or_path {inputs}/model --device cpu --dtype fp32 --model_max_length 64 "
        "--calib_size 8 --calib_data {inputs}/texts.json=0.5,self=0.5 --output_dir {out}",
        ("pts_modelopt_state.pth", "pts_layers.jsonl"),
    ),
    "SAT": Job("bash launch_finetune.sh " + TRAIN, TRAINED, 1e-5),
    "SAT, two processes": Job("bash launch_finetune.sh --num_processes 2 " + TRAIN, TRAINED, 1e-5),
    "eval": Job(
        "{python} eval.py --model_dir {inputs}/model --modelopt_restore_path {inputs}/pts_modelopt_state.pth "
        "--data_path {inputs}/data/cnn_eval.json --beam_size 2 --model_max_length 200 --max_new_tokens 8 "
        "--min_new_tokens 1 --device cpu --output_json {out}/rouge.json --predictions {out}/predictions.jsonl",
        ("rouge.json", "predictions.jsonl"),
    ),
    "export": Job(
        "{python} export_hf.py --model_dir {inputs}/model --modelopt_restore_path {inputs}/pts_modelopt_state.pth "
        "--output_dir {out}/exported --overwrite",
        ("exported/model.safetensors", "exported/config.json"),
    ),
}


def start(job: Job, out: Path, inputs: Path) -> tuple[subprocess.Popen, str]:
    """Start a job; its output goes to a log beside `out`. Returns the process and the tag of all its processes."""
    words = [word.format(python=sys.executable, out=out, inputs=inputs) for word in job.command.split()]
    tag = f"{out}-{random.getrandbits(64):x}"
    environment = {**os.environ, TAG: tag, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["XDG_CACHE_HOME"] = str(out.with_suffix(".cache"))  # leftovers in shared caches are removed by age
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log), tag


def kill_tagged(tag: str) -> None:
    """SIGKILL for every process that has the tag in its environment, until there is none."""
    marker, running = f"{TAG}={tag}".encode(), True
    while running:
        running = False
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marker in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
                    running = True
        time.sleep(0.02)


def run_with_kills(job: Job, out: Path, inputs: Path, seconds: float, kills_left: int, rng: random.Random) -> int:
    """Run a job in `out`, killing it at random moments and repeating the command, until it ends.

    Args:
        seconds: duration of an uninterrupted run.

    Returns:
        The number of kills.

    Raises:
        UserError: the job ended with an error, or did not end.
    """
    kills = 0
    while True:
        process, tag = start(job, out, inputs)
        is_victim = kills < kills_left and (kills == 0 or rng.random() < 0.7)
        try:
            process.wait(timeout=rng.uniform(0.0, seconds) if is_victim else 20 * seconds + 60)
        except subprocess.TimeoutExpired:
            kill_tagged(tag)
            process.wait()
            if not is_victim:
                raise UserError(f"{out.name} did not end") from None
            kills += 1
            continue
        if process.returncode != 0:
            lines = out.with_suffix(".log").read_text(errors="replace").strip().splitlines()
            raise UserError(f"{out.name} after {kills} kills: exit code {process.returncode}, {lines[-1:]}")
        return kills


def leaves(value: Any) -> list[Any]:
    """All values inside a JSON value, in order, but for those that differ between equal runs: times and paths."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() if key not in VOLATILE for leaf in (key, *leaves(item))]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def tensors_of(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file or a modelopt state, by name."""
    from safetensors.torch import load_file

    from sparsity.modelopt_state import load_state

    return load_file(path) if path.suffix == ".safetensors" else load_state(path)["model_state_dict"]


def differs(first: Path, second: Path, tolerance: float) -> bool:
    """Whether two results of the same kind differ by more than `tolerance`."""
    if first.suffix in (".pth", ".safetensors"):
        weights, others = tensors_of(first), tensors_of(second)
        if weights.keys() != others.keys():
            return True
        return any((w.float() - others[name].float()).abs().max().item() > tolerance for name, w in weights.items())
    ours, theirs = (leaves(read_json(path, "result")) for path in (first, second))
    if tolerance == 0 or len(ours) != len(theirs):
        return ours != theirs
    slack = 1e-4  # of numbers that are printed, such as losses
    return any(
        abs(a - b) > slack + tolerance * abs(a) if isinstance(a, float) and isinstance(b, float) else a != b
        for a, b in zip(ours, theirs, strict=True)
    )


def listing(folder: Path) -> set[str]:
    """Files of a result folder, except those whose names contain a time or a process."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if "events.out" not in name and "/runs/" not in f"/{name}"}


def check(name: str, job: Job, out: Path, reference: Path, outcome: Outcome) -> None:
    """Compare a finished run with the uninterrupted one."""
    for result in job.results:
        if not (out / result).is_file() or differs(reference / result, out / result, job.tolerance):
            outcome.different.append(f"{name} {out.name}: {result}")
    outcome.left_over += [f"{name} {out.name}: {file}" for file in sorted(listing(out) - listing(reference))]


TEXT = (
    "The river rose slowly through the night, and by morning the lower fields lay under water. Some engineers "
    "met on Tuesday to discuss why the new bridge had been closed for a third time since the spring of last year."
)


def make_inputs(folder: Path) -> None:
    """Write the model, records and texts that the jobs read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparsity.models import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "demo/SmolLM2-135M-Instruct"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_key_value_heads=2)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = [
        {"instruction": "Summarize.", "input": f"{TEXT} Case {i}.", "output": f"Water rose, case {i}."}
        for i in range(12)
    ]
    save_json([f"{TEXT} Number {i}." for i in range(60)], folder / "texts.json")
    save_json([{"article": r["input"], "summary": r["output"]} for r in records], folder / "table.json")
    (folder / "data").mkdir()
    save_json(records, folder / "data/cnn_train.json")
    save_json(records[:6], folder / "data/cnn_eval.json")


def run_job(name: str, job: Job, kills: int, work: Path, inputs: Path, rng: random.Random) -> Outcome:
    """Kill a job `kills` times and compare every finished run."""
    outcome = Outcome()
    reference = work / "uninterrupted"
    reference.mkdir()
    started = time.perf_counter()
    run_with_kills(job, reference, inputs, 600, 0, rng)
    seconds = time.perf_counter() - started
    while outcome.kills < kills and len(outcome.lost) < 3:
        out = work / f"run {outcome.runs}"
        out.mkdir()
        outcome.runs += 1
        try:
            outcome.kills += run_with_kills(job, out, inputs, seconds, kills - outcome.kills, rng)
        except UserError as error:
            outcome.lost.append(str(error))
        else:
            check(name, job, out, reference, outcome)
    return outcome


def run_chaos(kills: int, names: list[str], seed: int) -> Iterator[tuple[str, Outcome]]:
    """Kill every named job `kills` times; jobs that need a state get the one of an uninterrupted pruning run.

    Yields:
        The name and outcome of each job as soon as it is finished.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="chaos ") as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        pruned = Path(folder) / "pruned"
        pruned.mkdir()
        run_with_kills(JOBS["PTS"], pruned, inputs, 600, 0, rng)
        (inputs / "pts_modelopt_state.pth").symlink_to(pruned / "pts_modelopt_state.pth")
        for number, name in enumerate(names):
            work = Path(folder) / f"job {number}"
            work.mkdir()
            yield name, run_job(name, JOBS[name], kills, work, inputs, rng)


def print_outcome(name: str, outcome: Outcome) -> None:
    failures = f"{len(outcome.lost)} lost, {len(outcome.different)} different, {len(outcome.left_over)} left over"
    print(f"{name:<20} {outcome.kills:>4} kills in {outcome.runs:>3} runs: {failures}", flush=True)
    for line in (outcome.lost + outcome.different + outcome.left_over)[:5]:
        print(f"    {line}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("kills", type=int, help="how often each script is killed")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="which scripts")
    parser.add_argument("--seed", type=int, default=0, help="moments of the kills")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the counts")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_at_least(args, 1, "kills")
    outcomes = {}
    for name, outcome in run_chaos(args.kills, args.jobs, args.seed):
        outcomes[name] = outcome
        print_outcome(name, outcome)
        if args.output:
            jobs = {name: asdict(outcome) for name, outcome in outcomes.items()}
            save_json({"machine": describe_machine(resolve_device("auto")), "jobs": jobs}, args.output)
    if any(outcome.lost or outcome.different or outcome.left_over for outcome in outcomes.values()):
        raise UserError("not every run survived; see above")


if __name__ == "__main__":
    run_cli(main)
