"""The Hugging Face Trainer with held masks, distillation, sealed checkpoints, clean stops and a JSONL log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from sparsity.attention import use_blocked_attention
from sparsity.devices import return_freed_memory
from sparsity.distributed import any_process, sum_over_processes
from sparsity.errors import UserError, first_line
from sparsity.files import atomic_path
from sparsity.modelopt_state import load_state, pruned_errors, sparse_masks, state_to_save
from sparsity.models import decoder_layers
from sparsity.sat import checkpoints
from sparsity.sat.callbacks import SCHEDULER, AlreadyFinished, Checkpoints, MaskKeeper, Progress, StopOnSignal
from sparsity.sat.data import IGNORE, Collator, EpochSampler, Packed
from sparsity.sat.fsdp import configure_fsdp, force_fsdp, full_state, local, send_from_main, shard_teacher
from sparsity.sat.loss import batch_loss
from sparsity.sat.masking import mask_gradients

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl

    from sparsity.sat.arguments import SatArguments
    from sparsity.sat.model import Student

STATE_NAME = "finetuned_modelopt_state.pth"
Batch = dict[str, torch.Tensor]  # as Collator makes it


class SparseTrainer(Trainer):
    """Trainer for a model with modelopt masks; `fit` trains it.

    Args:
        teacher, kl: see `batch_loss`; `teacher` is None for plain cross entropy.
        tensors: whole weights and masks by name, for a model that gets them once it is sharded.
    """

    is_fsdp_enabled: bool  # these two are defined by Trainer
    control: TrainerControl

    def __init__(
        self,
        *,
        teacher: PreTrainedModel | None,
        kl: tuple[float, float],
        tensors: dict[str, torch.Tensor],
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        args = self.args
        if args.sharded and not self.is_fsdp_enabled:
            force_fsdp(self.accelerator)
            self.is_fsdp_enabled = True
        self.teacher, self.kl = teacher, kl
        self.model_accepts_loss_kwargs = True  # our loss divides by the tokens of the whole step itself
        train = self.train_dataset
        lengths = train.lengths if isinstance(train, Packed) else list(train["length"])
        group = args.order_batch if args.group_by_length else 0
        self.sampler = EpochSampler(lengths, args.data_seed, group, args.samples_per_epoch(len(lengths)))
        self.checkpoints = Checkpoints(tensors, args.keep_checkpoints, args.lora_rank > 0)
        self.stopper = StopOnSignal()
        self.progress = Progress(args.result_dir / "train_log.jsonl", self.sampler)
        for callback in (self.checkpoints, self.stopper, MaskKeeper(), self.progress):
            self.add_callback(callback)

    def fit(self, checkpoint: Path | None = None) -> None:
        """Train until the last step or a signal, and end with the best checkpoint's weights if --load_best is set.

        Args:
            checkpoint: resume from this complete checkpoint.
        """
        self.checkpoints.resume_from = checkpoint
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except AlreadyFinished:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.args.load_best and self.state.best_model_checkpoint:
            checkpoints.load_weights(Path(self.state.best_model_checkpoint), self.model, self.checkpoints.trained_only)

    def place_teacher(self, layer_class: str, dtype: torch.dtype) -> None:
        """Move the teacher to the student's devices: sharded like it, or complete on this process's device."""
        if self.teacher is None:
            return
        self.teacher.requires_grad_(False)
        if self.args.sharded:
            weights = self.teacher.state_dict() if self.accelerator.is_main_process else {}
            self.teacher = shard_teacher(self.teacher, layer_class, dtype)
            send_from_main(self.teacher, weights)
        else:
            self.teacher = self.teacher.to(self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        """Our own order of samples, which a resumed run continues on any number of processes."""
        return self.sampler

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Labelled tokens of one optimizer step, over all micro-batches and processes; int64 scalar."""
        count = sum((batch["labels"][:, 1:] != IGNORE).sum() for batch in batch_samples)
        return sum_over_processes(torch.as_tensor(count, device=device))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        assert num_items_in_batch is not None  # because model_accepts_loss_kwargs is set
        unwrapped = self.accelerator.unwrap_model(model)
        loss = batch_loss(model, inputs, num_items_in_batch, self.teacher, self.kl, unwrapped)
        # Gradients are averaged over processes, while the loss is already divided by the tokens of all of them.
        return loss * self.args.world_size

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            mask_gradients(model)
        self.progress.tokens += int(inputs["real"].sum())
        if not torch.isfinite(loss):  # the launcher stops the other processes
            records = sorted(set(inputs["record"].flatten().tolist()) - {-1})
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, in a batch of the records {records}; "
                "the checkpoints are unchanged. Lower --lr or use --mixed_precision bf16 or no, then continue with "
                "--resume"
            )
        return loss

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
            # A process that has no samples left takes part with one that is not counted.
            batch = self._prepare_inputs(self.data_collator(own or [samples[0]]))
            labelled = (batch["labels"][:, 1:] != IGNORE).sum()
            with torch.no_grad(), self.accelerator.autocast():
                loss = batch_loss(self.model, batch, 1, unwrapped=unwrapped)
            sums += torch.stack([loss.double(), labelled.double()]) * bool(own)
        self.model.train()
        total, count = sum_over_processes(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(1, count)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Prepare the folder of a checkpoint; `_save_optimizer_and_scheduler` writes the weights as well.

        Raises:
            UserError: a weight is not finite.
        """
        finite = all(torch.isfinite(local(weight.data)).all() for weight in self.model.parameters())
        if any_process(not finite, self.args.device):
            raise UserError(
                f"weights became infinite or NaN by step {self.state.global_step}, which is therefore not saved; "
                "lower --lr, then resume from the last checkpoint with --resume"
            )
        if self.args.should_save and output_dir:
            checkpoints.remove(Path(output_dir))  # a damaged one, for example, would mix its files with the new ones
            Path(output_dir).mkdir(parents=True)  # the Trainer takes only a folder that exists for the best checkpoint
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.save(Path(output_dir), self.model, self.optimizer.optimizer, self.checkpoints.trained_only)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: `callbacks.Checkpoints` loads weights, optimizer and scheduler once the model is sharded."""


def build_trainer(
    args: SatArguments,
    student: Student,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset | Packed, Dataset | None],
) -> SparseTrainer:
    """Build the Trainer for a model on the CPU; with FSDP it is sharded and filled only once training starts.

    Raises:
        UserError: the optimizer is not available.
    """
    train, evaluation = data
    training, distillation, kl = args.training, args.distillation, args.distillation.distill_kl
    try:
        SparseTrainer.get_optimizer_cls_and_kwargs(training, student.model)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"--optim {training.given['optim']} cannot be used: {first_line(error)}") from error
    for model in filter(None, (student.model, teacher)):
        use_blocked_attention(model, training.device)
        if args.model.use_flash_attn:
            model.set_attn_implementation("flash_attention_2")
    layer = type(decoder_layers(student.model)[1][0]).__name__
    if training.wrapped_layers not in ([], [layer]):
        raise UserError(f"--fsdp_config wraps {', '.join(training.wrapped_layers)}, the model's layers are {layer}")
    if training.sharded:
        configure_fsdp(layer, training.cpu_offload, training.recompute, training.reshard)
    trainer = SparseTrainer(
        model=student.model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=Collator(tokenizer.pad_token_id),
        teacher=teacher,
        kl=(kl, kl if distillation.distill_kl_answers is None else distillation.distill_kl_answers),
        tensors=student.tensors if training.sharded else {},
    )
    trainer.place_teacher(layer, training.compute_dtype)
    return trainer


def save_and_verify(trainer: SparseTrainer, student: Student, path: Path) -> None:
    """Gather the weights, save them with the masks, and check in the saved file that all pruned weights are +0.0."""
    trainer.model.zero_grad(set_to_none=True)  # gradients and optimizer state take as much memory as the saved state
    trainer.optimizer.state.clear()
    return_freed_memory()
    weights = full_state(trainer.model, student.dtypes, trained_only=student.merge is not None)
    if not trainer.args.should_save:
        return
    if student.merge is not None:
        weights = student.merge(weights)
    with atomic_path(path) as temporary:
        torch.save(state_to_save(student.modelopt_state, weights), temporary)
    pruned = 0
    for name, weight, mask in sparse_masks(load_state(path)["model_state_dict"]):
        pruned += int((~mask).sum())
        if errors := pruned_errors(weight, mask):
            raise RuntimeError(f"{errors} pruned weights of '{name}' in {path} are not zero")
        if not torch.isfinite(weight).all():
            raise UserError(f"'{name}' in {path} is not finite; train again with a lower --lr")
    print(
        f"verified {path}: " + (f"100% of {pruned:,} pruned weights are 0" if pruned else "dense, all weights finite")
    )
