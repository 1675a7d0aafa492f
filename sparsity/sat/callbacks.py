"""Trainer callbacks: stopping on a signal, holding the masks, and the training log."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from sparsity.files import append_jsonl, is_whole_number, read_jsonl, save_jsonl
from sparsity.distributed import any_process, sum_over_processes
from sparsity.sat.data import EpochSampler
from sparsity.sat.mask_schedule import MaskSchedule
from sparsity.sat.masking import ELEMENTWISE, count_zeros, mask_weights
from sparsity.sat.sharding import assert_sharded

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGUSR1 (a scheduler's notice) save after the current step and end, all processes at the same one.

    SIGUSR1 is for several processes: on SIGTERM torch's launcher kills the workers after 30 s, saved or not.
    """

    def __init__(self) -> None:
        self.asked = False  # this process has had the signal
        self.interrupted = False  # training ends before its last step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: setattr(self, "asked", True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any_process(self.asked, args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.interrupted = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class AlreadyFinished(Exception):
    """Ends a resumed training whose checkpoint is that of the last step."""


class NoStepTooMany(TrainerCallback):
    """Ends training before a step after the last one.

    The Trainer looks whether it is at the last step only after a step, so that a run that was killed between its last
    checkpoint and its result would otherwise take one more.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyFinished


class MaskKeeper(TrainerCallback):
    """Hold pruned weights at zero, and check from time to time that nothing has changed them.

    The trainer masks the gradients, which is enough for an optimizer that works value by value; for any other the
    weights are masked after each of its steps. Masks may move by a schedule first.
    """

    def __init__(self, every: int, schedule: MaskSchedule | None = None):
        self.every, self.checked = every, False  # whether this process has checked yet
        self.schedule = schedule
        self.sparsity: float | None = None  # share of zeros in the pruned layers, at the last check

    @property
    def moving(self) -> bool:
        """Whether pruned weights are trained as well, because masks may still change."""
        return self.schedule is not None and self.schedule.moving

    def whole_weights(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within the block the model holds the values of pruned weights that may come back, as a checkpoint must."""
        return self.schedule.whole_weights(model) if self.schedule else contextlib.nullcontext()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self.schedule is not None:
            self.schedule.begin(model, state.global_step, state.max_steps)
        else:
            mask_weights(model)  # modelopt itself may have stored the dense weights beside the masks

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self.schedule is not None and self.moving:
            self.rate = kwargs["optimizer"].param_groups[0]["lr"]
            self.schedule.bring_back(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self.schedule is not None and self.moving:
            optimizer = kwargs["optimizer"]
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            self.schedule.after_step(model, optimizer, state.global_step, state.max_steps, self.rate)
        elif getattr(args.optim, "value", args.optim) not in ELEMENTWISE:
            mask_weights(model)
        if self.every and (not self.checked or state.global_step % self.every == 0):
            self.checked = True
            counts = torch.tensor(count_zeros(model), dtype=torch.float64, device=args.device)
            counts = sum_over_processes(counts)
            self.sparsity = (counts[0] / counts[1]).item()


class Progress(TrainerCallback):
    """Append the training curve to a JSONL file.

    Lines are {"step", "loss", "lr", "grad_norm", "tokens_per_second", "epoch", "sparsity"}, or {"step", "eval_loss"}.
    """

    def __init__(self, path: Path, sampler: EpochSampler, masks: MaskKeeper, sharded: bool):
        self.path, self.sampler, self.masks, self.sharded = path, sampler, masks, sharded
        self.tokens, self.since = 0, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self.sharded:
            count = assert_sharded(model)
            if state.is_world_process_zero:
                print(f"{count} weights are sharded over {args.world_size} processes")
        self.tokens, self.since = 0, time.perf_counter()
        if state.is_world_process_zero:
            # A resumed run repeats the steps after its checkpoint.
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            save_jsonl(kept, self.path)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.epoch = int(round(state.epoch or 0, 6))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Before release 5, transformers does not evaluate after a last step that eval_steps does not divide.
        ends = state.global_step >= state.max_steps and args.eval_delay <= state.global_step
        if ends and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        line: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            elapsed = time.perf_counter() - self.since
            line |= {"loss": logs["loss"], "lr": logs.get("learning_rate"), "grad_norm": logs.get("grad_norm")}
            rate = self.tokens * args.world_size / max(elapsed, 1e-9)  # of this process, taken for all
            line |= {"tokens_per_second": round(rate, 1), "epoch": state.epoch, "sparsity": self.masks.sparsity}
            self.tokens, self.since = 0, time.perf_counter()
        elif "eval_loss" in logs:
            line["eval_loss"] = logs["eval_loss"]
        else:
            return
        if state.is_world_process_zero:
            append_jsonl([line], self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log; a line that a kill cut short, or that names no step, is skipped."""
    lines = read_jsonl(path, "training log", skip_damaged=True) if path.is_file() else ()
    return [line for line in lines if isinstance(line, dict) and is_whole_number(line.get("step"))]
