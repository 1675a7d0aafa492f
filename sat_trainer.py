"""The Hugging Face Trainer with masks that hold, distillation, whole checkpoints, clean stops and a JSONL log."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import sat_checkpoints
from sat_data import IGNORE, EpochSampler, Packed, sample_lengths
from sat_loss import LossWeights, batch_loss
from sat_sharding import assert_sharded, force_fsdp, local, masked_weights, shard_teacher
from utils import UserError, atomic_path

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

Batch = dict[str, torch.Tensor]  # as sat_data.Collator makes it


class SparseTrainer(Trainer):
    """Trainer for a model with modelopt masks.

    Args:
        loss_weights, teacher: see sat_loss; `teacher` is None for plain cross entropy.
        use_fsdp: shard with FSDP, on CPU processes too.
        group_by_length: put samples of similar length into a batch.
        keep_checkpoints: how many of the newest checkpoints stay on disk.
        log_path: JSONL file for the training curve.
    """

    is_fsdp_enabled: bool  # these two are Trainer's own
    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        loss_weights: LossWeights,
        teacher: PreTrainedModel | None = None,
        use_fsdp: bool = False,
        group_by_length: bool = True,
        keep_checkpoints: int = 2,
        check_masks_every: int = 100,
        log_path: Path,
        **kwargs: Any,
    ):
        self.use_fsdp = use_fsdp
        super().__init__(*args, **kwargs)
        self.loss_weights, self.teacher = loss_weights, teacher
        self.keep_checkpoints = keep_checkpoints
        self.model_accepts_loss_kwargs = True  # our loss divides by the tokens of the whole step itself
        self.interrupted = False  # a signal ended training before its last step
        group = self.args.train_batch_size * self.args.world_size if group_by_length else 0
        lengths = sample_lengths(self.train_dataset)
        self.sampler = EpochSampler(lengths, self.args.seed, group)
        self.progress = Progress(log_path, self)
        for callback in (StopOnSignal(self), MaskKeeper(check_masks_every, self), self.progress):
            self.add_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.use_fsdp and not self.is_fsdp_enabled:
            force_fsdp(self.accelerator)
            self.is_fsdp_enabled = True

    def place_teacher(self, layer_class: str, dtype: torch.dtype, cpu_offload: bool) -> None:
        """Put the teacher beside the student: sharded like it, or whole on this process's device."""
        if self.teacher is None:
            return
        self.teacher.requires_grad_(False)
        if self.use_fsdp:
            self.teacher = shard_teacher(self.teacher.to(dtype), layer_class, dtype, cpu_offload)
        else:
            self.teacher = self.teacher.to(self.args.device, dtype)

    def _get_train_sampler(self, train_dataset: Dataset | Packed | None = None) -> EpochSampler:
        return self.sampler

    # ------------------------------------------------------------------------------------------------- loss

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Labelled tokens of one optimizer step, over all micro-batches and processes; int64 scalar."""
        count = sum((batch["labels"][:, 1:] != IGNORE).sum() for batch in batch_samples)
        count = torch.as_tensor(count, device=device)
        return self.accelerator.reduce(count, "sum") if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        assert num_items_in_batch is not None  # as model_accepts_loss_kwargs asks for
        unwrapped = self.accelerator.unwrap_model(model)
        loss = batch_loss(model, inputs, num_items_in_batch, self.loss_weights, self.teacher, unwrapped)
        # Gradients are averaged over processes, while the loss is already divided by the tokens of all of them.
        return loss * self.args.world_size

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all must ask."""
        if self.args.world_size == 1:
            return flag
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "sum").item() > 0

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.progress.tokens += int(inputs["real"].sum())
        if self.any_process(not torch.isfinite(loss)):
            from accelerate.utils import gather_object

            records = sorted(set(inputs["record"].flatten().tolist()) - {-1})
            facts = gather_object([(loss.item(), records)])
            value, records = next(fact for fact in facts if not math.isfinite(fact[0]))
            raise UserError(
                f"the loss is {value} at step {self.state.global_step + 1}, in a batch of the records {records}; the "
                "checkpoints are untouched. Lower --lr or use --mixed_precision bf16 or no, then go on with --resume"
            )
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(grad_norm, "full_tensor"):  # of a sharded norm, item() gives this process's part under older torch
            grad_norm = grad_norm.full_tensor()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Cross entropy per labelled token over the evaluation set, each sample counted once."""
        samples, size = self.eval_dataset, self.args.per_device_eval_batch_size
        unwrapped = self.accelerator.unwrap_model(self.model)
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for start in range(0, len(samples), size * self.args.world_size):
            begin = start + size * self.args.process_index
            own = [samples[index] for index in range(begin, min(begin + size, len(samples)))]
            # A process without samples of its own at the end takes part with one that does not count.
            batch = self._prepare_inputs(self.data_collator(own or [samples[0]]))
            labelled = (batch["labels"][:, 1:] != IGNORE).sum()
            with torch.no_grad(), self.accelerator.autocast():
                loss = batch_loss(self.model, batch, 1, LossWeights(), None, unwrapped)
            sums += torch.stack([loss.double(), labelled.double()]) * bool(own)
        self.model.train()
        total, count = (self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(1, count)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.any_process(not all(torch.isfinite(local(weight.data)).all() for weight in model.parameters())):
            raise UserError(
                f"weights have become infinite or NaN by step {self.state.global_step}, which is therefore not saved; "
                "lower --lr, then go on from the last checkpoint with --resume"
            )
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        root = Path(self.args.output_dir)
        if self.args.should_save:
            sat_checkpoints.mark_complete(root / f"checkpoint-{self.state.global_step}")
            sat_checkpoints.rotate(root, self.keep_checkpoints, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGUSR1 (a scheduler's notice) save after the current step and end, all processes at the same one.

    SIGUSR1 is for several processes: on SIGTERM torch's launcher kills the workers after 30 s, saved or not.
    """

    def __init__(self, trainer: SparseTrainer):
        self.trainer, self.asked = trainer, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: setattr(self, "asked", True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.any_process(self.asked) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.trainer.interrupted = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class MaskKeeper(TrainerCallback):
    """Hold pruned weights at zero after each update, and check now and then that nothing had woken them.

    Gradients of pruned weights are zero already, since modelopt's layers compute with weight · mask; an optimizer with
    decoupled decay then leaves a zero at zero. The reset guards against optimizers that do not.
    """

    def __init__(self, every: int, trainer: SparseTrainer):
        self.every, self.trainer = every, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # modelopt itself may store the dense weights beside the masks
        with torch.no_grad():
            for _, weight, mask in masked_weights(model):
                weight.masked_fill_(~mask, 0.0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        check = self.every and (state.global_step == 1 or state.global_step % self.every == 0)
        zeros = total = 0
        with torch.no_grad():
            for name, weight, mask in masked_weights(model):
                if check and torch.count_nonzero(weight[~mask]):
                    raise RuntimeError(f"pruned weights of '{name}' are not zero after step {state.global_step}")
                weight.masked_fill_(~mask, 0.0)
                if check:
                    zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
        if check:
            counts = torch.tensor([zeros, total], dtype=torch.float64, device=args.device)
            counts = self.trainer.accelerator.reduce(counts, "sum") if args.world_size > 1 else counts
            self.trainer.progress.sparsity = (counts[0] / counts[1]).item()


class Progress(TrainerCallback):
    """Append the training curve to a JSONL file.

    Lines are {"step", "loss", "lr", "grad_norm", "tokens_per_second", "epoch", "sparsity"}, or {"step", "eval_loss"}.
    """

    def __init__(self, path: Path, trainer: SparseTrainer):
        self.path, self.trainer, self.tokens, self.since = path, trainer, 0, time.perf_counter()
        self.sparsity: float | None = None  # share of zeros in the pruned layers, at the last check

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.use_fsdp:
            count = assert_sharded(self.trainer.model)
            self.trainer.accelerator.print(f"{count} weights are sharded over {args.world_size} processes")
        self.tokens, self.since = 0, time.perf_counter()
        if state.is_world_process_zero:
            # A resumed run writes the steps after its checkpoint anew.
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # accelerate does not reach the sampler of a resumed, sharded data loader
        self.trainer.sampler.set_epoch(int(round(state.epoch or 0, 6)))

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
            line |= {"tokens_per_second": round(rate, 1), "epoch": state.epoch, "sparsity": self.sparsity}
            self.tokens, self.since = 0, time.perf_counter()
        elif "eval_loss" in logs:
            line["eval_loss"] = logs["eval_loss"]
        else:
            return
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log; a last line cut short by a kill is skipped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def plot_log(log_path: Path, image_path: Path) -> None:
    """Draw training and evaluation loss over steps into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log_path)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    with atomic_path(image_path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
