"""Trainer callbacks: checkpoints, stopping on a signal, holding the masks, and the training log.

Their arguments are transformers' TrainingArguments (args), TrainerState (state) and TrainerControl (control).
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from sparsity.distributed import any_process
from sparsity.files import append_jsonl, is_whole_number, read_jsonl, save_jsonl, seal
from sparsity.sat import checkpoints
from sparsity.sat.data import EpochSampler
from sparsity.sat.fsdp import fill
from sparsity.sat.masking import ELEMENTWISE, mask_weights

SCHEDULER = "scheduler.pt"  # in the folder of a checkpoint, transformers' own name


class AlreadyFinished(Exception):
    """Ends a resumed training whose checkpoint is that of the last step; the Trainer would take one more step."""


class Checkpoints(TrainerCallback):
    """Give the model its weights before the first step, and complete every checkpoint.

    Args:
        tensors: whole weights and masks by name, for a model that has none yet; emptied once they are loaded.
        keep: how many of the newest checkpoints stay on disk.
        trained_only: checkpoints hold only the parameters that are trained.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], keep: int, trained_only: bool):
        self.tensors, self.keep, self.trained_only = tensors, keep, trained_only
        self.resume_from: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.tensors:
            fill(model, self.tensors)
            self.tensors.clear()  # nothing else needs the file mapped
        if self.resume_from:
            checkpoints.load_weights(self.resume_from, model, self.trained_only)
            checkpoints.load_optimizer(self.resume_from, model, kwargs["optimizer"].optimizer)  # torch's own
            kwargs["lr_scheduler"].load_state_dict(torch.load(self.resume_from / SCHEDULER, weights_only=True))
        if state.global_step >= state.max_steps:
            raise AlreadyFinished

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            seal(folder)
            checkpoints.rotate(folder, self.keep, state.best_model_checkpoint)
        PartialState().wait_for_everyone()


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGUSR1 (a scheduler's notice), save after the current step and stop, all processes at once.

    Use SIGUSR1 with several processes: on SIGTERM torch's launcher kills the workers after 30 s, saved or not.
    """

    def __init__(self) -> None:
        self.requested = False  # this process has received the signal
        self.interrupted = False  # training ends before its last step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: setattr(self, "requested", True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any_process(self.requested, args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.interrupted = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class MaskKeeper(TrainerCallback):
    """Hold pruned weights at zero.

    The trainer masks the gradients, which is enough for an elementwise optimizer; for any other, the weights are masked
    after each of its steps.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        mask_weights(model)  # modelopt itself may have stored the dense weights beside the masks

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if args.given["optim"] not in ELEMENTWISE:
            mask_weights(model)


class Progress(TrainerCallback):
    """Append the training curve to a JSONL file.

    Lines are {"step", "loss", "lr", "grad_norm", "tokens_per_second", "epoch"}, or {"step", "eval_loss"}.
    """

    def __init__(self, path: Path, sampler: EpochSampler):
        self.path, self.sampler = path, sampler  # `tokens` and `since` are set when training begins

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if args.sharded:
            weights = list(model.parameters())
            if whole := sum(not isinstance(weight, DTensor) for weight in weights):
                raise RuntimeError(f"FSDP is not active: {whole} of {len(weights)} weights are not sharded")
            if state.is_world_process_zero:
                print(f"{len(weights)} weights are sharded over {args.world_size} processes")
        self.tokens, self.since = 0, time.perf_counter()
        if state.is_world_process_zero:
            # A resumed run repeats the steps after its checkpoint.
            save_jsonl([line for line in read_log(self.path) if line["step"] <= state.global_step], self.path)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.epoch = int(round(state.epoch or 0, 6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before release 5, transformers does not evaluate after a last step that eval_steps does not divide.
        ends = state.global_step >= state.max_steps and args.eval_delay <= state.global_step
        if ends and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        line: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            elapsed = time.perf_counter() - self.since
            line |= {"loss": logs["loss"], "lr": logs.get("learning_rate"), "grad_norm": logs.get("grad_norm")}
            rate = self.tokens * args.world_size / max(elapsed, 1e-9)  # as if all processes had as many
            line |= {"tokens_per_second": round(rate, 1), "epoch": state.epoch}
            self.tokens, self.since = 0, time.perf_counter()
        elif "eval_loss" in logs:
            line["eval_loss"] = logs["eval_loss"]
        else:
            return
        if state.is_world_process_zero:
            append_jsonl([line], self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log; skips a line that a kill cut short or that has no step."""
    lines = read_jsonl(path, "training log", skip_damaged=True) if path.is_file() else ()
    return [line for line in lines if isinstance(line, dict) and is_whole_number(line.get("step"))]
