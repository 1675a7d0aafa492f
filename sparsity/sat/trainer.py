"""The Hugging Face Trainer with fixed masks, distillation, complete checkpoints, clean stops and a JSONL log."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from sparsity.attention import use_blocked_attention
from sparsity.errors import UserError
from sparsity.models import decoder_layers
from sparsity.distributed import any_process, report_on_main, sum_over_processes
from sparsity.sat import checkpoints, saved_values, training_state
from sparsity.sat.arguments import SatArguments
from sparsity.sat.data import IGNORE, Collator, EpochSampler, Packed, sample_lengths
from sparsity.sat.callbacks import AlreadyFinished, MaskKeeper, NoStepTooMany, Progress, StopOnSignal
from sparsity.sat.loading import fill, send_from_main
from sparsity.sat.loss import LossWeights, batch_loss
from sparsity.sat.mask_schedule import MaskSchedule
from sparsity.sat.masking import mask_gradients
from sparsity.sat.sharding import configure_fsdp, force_fsdp, local, shard_teacher

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl

    from sparsity.sat.model import Student


SCHEDULER, SCALER = "scheduler.pt", "scaler.pt"  # transformers' own names
Batch = dict[str, torch.Tensor]  # as Collator makes it


class SparseTrainer(Trainer):
    """Trainer for a model with modelopt masks.

    Args:
        loss_weights, teacher: see loss.py; `teacher` is None for plain cross entropy.
        initial_tensors: whole weights and masks by name; they fill the model once it is sharded, and are then released.
        use_fsdp: shard with FSDP, on CPU processes too.
        group_by_length: put samples of similar length into a batch.
        keep_checkpoints: how many of the newest checkpoints stay on disk.
        trained_only: checkpoints hold only the parameters that are trained.
        log_path: JSONL file for the training curve.
    """

    is_fsdp_enabled: bool  # these two are Trainer's own
    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        loss_weights: LossWeights,
        teacher: PreTrainedModel | None = None,
        initial_tensors: dict[str, torch.Tensor] | None = None,
        use_fsdp: bool = False,
        group_by_length: bool = True,
        keep_checkpoints: int = 2,
        check_masks_every: int = 100,
        mask_schedule: MaskSchedule | None = None,
        trained_only: bool = False,
        log_path: Path,
        **kwargs: Any,
    ):
        self.use_fsdp, self.initial_tensors = use_fsdp, initial_tensors or {}
        super().__init__(*args, **kwargs)
        self.loss_weights, self.teacher = loss_weights, teacher
        self.keep_checkpoints, self.trained_only = keep_checkpoints, trained_only
        self.model_accepts_loss_kwargs = True  # our loss divides by the tokens of the whole step itself
        lengths = sample_lengths(self.train_dataset)
        group = self.args.order_batch if group_by_length else 0
        size = self.args.samples_per_epoch(len(lengths))
        self.sampler = EpochSampler(lengths, self.args.data_seed, group, size)
        self.stopper, self.masks = StopOnSignal(), MaskKeeper(check_masks_every, mask_schedule)
        self.progress = Progress(log_path, self.sampler, self.masks, use_fsdp)
        for callback in (self.stopper, NoStepTooMany(), self.masks, self.progress):
            self.add_callback(callback)

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended training before its last step."""
        return self.stopper.interrupted

    @property
    def _train_batch_size(self) -> int:
        return self.args.train_batch_size

    @_train_batch_size.setter
    def _train_batch_size(self, value: int) -> None:
        """Nothing: transformers 4 would set the batch of a run that is resumed on another number of processes."""

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            saved_values.check_progress(Path(resume_from_checkpoint))
        try:
            result = super().train(resume_from_checkpoint, **kwargs)
            self._use_averages()
            return result
        except AlreadyFinished:
            self._use_averages()
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
                self._load_best_model()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return None

    def _use_averages(self) -> None:
        """Let an optimizer that averages its weights, such as the schedule-free ones, put the averages into the model.

        The Trainer has it take them out again before the next step.
        """
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.use_fsdp and not self.is_fsdp_enabled:
            force_fsdp(self.accelerator)
            self.is_fsdp_enabled = True
        prepare = self.accelerator.prepare
        self.accelerator.prepare = lambda *args, **kwargs: self._fill_after(prepare(*args, **kwargs))

    def _fill_after(self, prepared: Any) -> Any:
        """Give the model its weights once accelerate has sharded it; they cannot be read from a checkpoint before."""
        for item in prepared if isinstance(prepared, (list, tuple)) else (prepared,):
            if isinstance(item, nn.Module) and self.initial_tensors:
                fill(item, self.initial_tensors)
                self.initial_tensors.clear()  # nothing else needs the file mapped
        return prepared

    def place_teacher(self, layer_class: str, dtype: torch.dtype, cpu_offload: bool) -> None:
        """Move the teacher to the student's devices: sharded like it, or complete on this process's device."""
        if self.teacher is None:
            return
        self.teacher.requires_grad_(False)
        if self.use_fsdp:
            weights = self.teacher.state_dict() if self.accelerator.is_main_process else {}
            self.teacher = shard_teacher(self.teacher, layer_class, dtype, cpu_offload)
            send_from_main(self.teacher, weights)
        else:
            self.teacher = self.teacher.to(self.args.device)

    def _get_train_sampler(self, train_dataset: Dataset | Packed | None = None) -> EpochSampler:
        return self.sampler

    # ------------------------------------------------------------------------------------------------- loss

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Labelled tokens of one optimizer step, over all micro-batches and processes; int64 scalar."""
        count = sum((batch["labels"][:, 1:] != IGNORE).sum() for batch in batch_samples)
        count = torch.as_tensor(count, device=device)
        return sum_over_processes(count)

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

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and not self.masks.moving:  # the last micro-batch of a step
            mask_gradients(model)
        self.progress.tokens += int(inputs["real"].sum())
        if any_process(not torch.isfinite(loss), self.args.device):
            from accelerate.utils import gather_object

            records = sorted(set(inputs["record"].flatten().tolist()) - {-1})
            facts = gather_object([(loss.item(), records)])
            value, records = next(fact for fact in facts if not math.isfinite(fact[0]))
            raise UserError(
                f"the loss is {value} at step {self.state.global_step + 1}, in a batch of the records {records}; the "
                "checkpoints are untouched. Lower --lr or use --mixed_precision bf16 or no, then continue with --resume"
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
        self._use_averages()
        for start in range(0, len(samples), size * self.args.world_size):
            begin = start + size * self.args.process_index
            own = [samples[index] for index in range(begin, min(begin + size, len(samples)))]
            # A process that has no samples left takes part with one that is not counted.
            batch = self._prepare_inputs(self.data_collator(own or [samples[0]]))
            labelled = (batch["labels"][:, 1:] != IGNORE).sum()
            with torch.no_grad(), self.accelerator.autocast():
                loss = batch_loss(self.model, batch, 1, LossWeights(), None, unwrapped)
            sums += torch.stack([loss.double(), labelled.double()]) * bool(own)
        self.model.train()
        total, count = sum_over_processes(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(1, count)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        finite = all(torch.isfinite(local(weight.data)).all() for weight in model.parameters())
        if any_process(not finite, self.args.device):
            raise UserError(
                f"weights have become infinite or NaN by step {self.state.global_step}, which is therefore not saved; "
                "lower --lr, then resume from the last checkpoint with --resume"
            )
        with self.masks.whole_weights(model):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        root = Path(self.args.output_dir)
        if self.args.should_save:
            checkpoints.mark_complete(root / f"checkpoint-{self.state.global_step}")
            checkpoints.rotate(root, self.keep_checkpoints, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: the weights of a checkpoint are in its training state, those of the result in the modelopt state."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        training_state.save(Path(output_dir), self.model, self.optimizer, self.trained_only)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if training_state.is_saved_in(Path(resume_from_checkpoint)):
            model = self.model if model is None else model
            training_state.load_weights(Path(resume_from_checkpoint), model, self.trained_only)
        else:
            with saved_values.reading(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and training_state.is_saved_in(Path(checkpoint)):
            training_state.load_optimizer(Path(checkpoint), self.model, self.optimizer)
            saved_values.load_values(Path(checkpoint) / SCHEDULER, self.lr_scheduler)
        elif checkpoint:
            with saved_values.reading(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)  # only of training in float16
        if checkpoint and scaler and (Path(checkpoint) / SCALER).is_file():
            saved_values.load_values(Path(checkpoint) / SCALER, scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            with saved_values.reading(Path(checkpoint)):
                super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best and training_state.is_saved_in(Path(best)):
            training_state.load_weights(Path(best), self.model, self.trained_only)
        else:
            super()._load_best_model()


@contextlib.contextmanager
def explain_failures(trainer: SparseTrainer, advice: Callable[[], str]) -> Iterator[None]:
    """Turn errors that all processes meet alike into one message, and a GPU out of memory into advice.

    Args:
        advice: gives a line on what to change when memory ran out.
    """
    try:
        with report_on_main(trainer.accelerator.state):
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"CUDA ran out of memory at step {trainer.state.global_step + 1}. {advice()}") from error


def build_trainer(
    args: SatArguments,
    student: Student,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset | Packed, Dataset | None],
) -> SparseTrainer:
    """Assemble the Trainer for a model on the CPU; under FSDP it is wrapped and filled only once training starts."""
    train, evaluation = data
    training, distillation = args.training, args.distillation
    for model in filter(None, (student.model, teacher)):
        use_blocked_attention(model, training.device)
    layer = type(decoder_layers(student.model)[1][0]).__name__
    if training.sharded:
        configure_fsdp(training.fsdp_version, layer, training.cpu_offload, training.recompute)
    weights = LossWeights(answers=args.data.answer_weight)
    if distillation.distill:
        weights = replace(
            weights,
            kl=distillation.distill_kl,
            answer_kl=distillation.distill_kl_answers,
            temperature=distillation.distill_temperature,
        )
    trainer = SparseTrainer(
        model=student.model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=Collator(tokenizer.pad_token_id, args.data.model_max_length if args.data.pad_to_max else None),
        loss_weights=weights,
        teacher=teacher,
        initial_tensors=student.tensors if training.sharded else None,
        use_fsdp=training.sharded,
        group_by_length=training.group_by_length,
        keep_checkpoints=training.keep_checkpoints,
        check_masks_every=training.check_masks_every,
        mask_schedule=training.moving_masks(),
        trained_only=training.lora_rank > 0,
        log_path=training.result_dir / "train_log.jsonl",
    )
    trainer.place_teacher(layer, training.compute_dtype, distillation.teacher_offload)
    return trainer
