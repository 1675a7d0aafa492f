r"""Host memory while the models of a sharded training run are loaded, over all processes of one machine.

    python -m benchmarks.host_memory --restore_path PTS_DIR/pts_modelopt_state.pth --processes 2 4

Two arms in one run: `each` loads the whole model in every process and shards it then, `shared` is what finetune.py
does, for low-rank training with --lora_rank. Measured is the sum of the processes' proportional memory (PSS: a page
that n processes share counts 1/n for each), at its peak between the end of the imports and the sharded model. FSDP2
over gloo, on CPU processes. The ratio divides by one copy of weights and masks plus the shards, which hold as much
again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import add_output_option, check_output, save_figures
from sparsity.files import require_file
from sparsity.modelopt_state import load_state
from utils import Parser, run_cli

ARMS = ("each", "shared")
INTERVAL = 0.01  # seconds between two looks at the memory


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct", help="dense model that was pruned")
    parser.add_argument("--restore_path", type=Path, required=True, help="pts_modelopt_state.pth")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes to measure")
    parser.add_argument("--distill", action="store_true", help="with the dense teacher, as large again")
    parser.add_argument("--lora_rank", type=int, default=0, help="low-rank training in bfloat16; 0 trains all weights")
    add_output_option(parser, "host_memory")
    args = parser.parse_args()
    if min(args.processes) < 2:
        parser.error(f"--processes must be at least 2, found {min(args.processes)}")
    require_file(args.restore_path, "PTS state (--restore_path)")
    check_output(args.output)
    return args


def load(rank: int, args: argparse.Namespace, arm: str, environment: dict[str, str], steps: Any) -> None:
    """What one process does; `steps` is a barrier for all of them and the measuring process."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import modelopt.torch.sparsity  # noqa: F401  # imports are not measured
    from datasets import Dataset
    from transformers import LlamaForCausalLM, logging  # noqa: F401

    from sparsity.models import load_tokenizer
    from sparsity.sat import arguments
    from sparsity.sat.model import load_student, load_teacher
    from sparsity.sat.trainer import build_trainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run = arguments.SatArguments(
        arguments.ModelArguments(args.model, str(args.restore_path)),
        arguments.DataArguments(),
        arguments.DistillationArguments(distill=args.distill),
        arguments.SparseTrainingArguments(
            output_dir=environment["OUTPUT"],
            mixed_precision="bf16" if args.lora_rank else "no",
            report_to=[],
            lora_rank=args.lora_rank,
        ),
    )
    tokenizer = load_tokenizer(args.model)
    sample: dict[str, list[Any]] = {"input_ids": [[1, 2]], "labels": [[1, 2]], "record": [0], "length": [2]}
    data = Dataset.from_dict({name: values * 64 for name, values in sample.items()})
    steps.wait()
    steps.wait()  # the memory so far is known
    run.training.sharded = arm == "shared"
    run.training.schedule(len(data), evaluates=False)
    student = load_student(run, tokenizer.pad_token_id)
    teacher = load_teacher(run, student.model.get_input_embeddings().weight.shape[0])
    run.training.sharded = True
    trainer = build_trainer(run, student, teacher, tokenizer, (data, None))
    teacher = None  # the trainer has it sharded
    trainer.create_optimizer()
    trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    steps.wait()
    trainer.accelerator.end_training()


def proportional_bytes(processes: list[int]) -> int:
    """The sum of the PSS of running processes, which Linux tells in kB."""
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def measure(args: argparse.Namespace, arm: str, count: int) -> tuple[int, float]:
    """Bytes at the peak beyond those after the imports, and seconds of loading."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
        environment |= {"MASTER_PORT": str(port), "OUTPUT": folder, "OMP_NUM_THREADS": "1"}
        context = multiprocessing.get_context("spawn")
        steps = context.Barrier(count + 1)
        workers = [context.Process(target=load, args=(rank, args, arm, environment, steps)) for rank in range(count)]
        for worker in workers:
            worker.start()
        numbers = [worker.pid for worker in workers if worker.pid]
        steps.wait()
        before = peak = proportional_bytes(numbers)
        loaded = threading.Event()

        def wait_until_loaded() -> None:
            steps.wait()
            start = time.perf_counter()
            steps.wait()
            seconds.append(time.perf_counter() - start)
            loaded.set()

        seconds: list[float] = []
        threading.Thread(target=wait_until_loaded, daemon=True).start()
        while not loaded.wait(INTERVAL) and all(worker.is_alive() for worker in workers):
            peak = max(peak, proportional_bytes(numbers))
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError(f"a process ended with exit code {max(abs(w.exitcode or 0) for w in workers)}")
        return peak - before, seconds[0]


def main() -> None:
    args = parse_args()
    tensors = load_state(args.restore_path)["model_state_dict"].values()
    weight, mask = (2, 0) if args.lora_rank else (4, 1)  # bytes of a value; weights of low-rank training carry masks
    unique = {
        tensor.data_ptr(): tensor.numel() * (mask if tensor.dtype == torch.bool else weight) for tensor in tensors
    }
    copy = sum(unique.values()) * (2 if args.distill else 1)  # a teacher has no masks, but about as much
    print(f"one copy of weights and masks: {copy / 2**20:.0f} MiB")
    print("| processes | arm | MiB at the peak | ÷ (one copy + shards) | seconds |\n|---:|---|---:|---:|---:|")
    rows = []
    for count in args.processes:
        for arm in ARMS:
            peak, seconds = measure(args, arm, count)
            rows.append({"processes": count, "arm": arm, "peak_mib": peak / 2**20, "seconds": seconds})
            rows[-1]["ratio"] = peak / (2 * copy)
            print(f"| {count} | {arm} | {peak / 2**20:.0f} | {peak / (2 * copy):.2f} | {seconds:.1f} |", flush=True)
    save_figures({"copy_mib": copy / 2**20, "rows": rows}, args, torch.device("cpu"))


if __name__ == "__main__":
    run_cli(main)
