"""The command line of finetune.py."""

from __future__ import annotations

import argparse
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from utils import UserError, require_file

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZERS = {
    "adamw_torch_fused": 8,  # bytes of state per trained parameter
    "adamw_torch": 8,
    "adamw_bnb_8bit": 2,
    "adafactor": 0.01,
    "sgd": 0,
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            self.exit(2)  # one process speaks for all
        super().error(message)


def parse_arguments(description: str) -> argparse.Namespace:
    parser = Parser(
        prog=os.environ.get("FINETUNE_PROG"),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a mistyped option must not pass for another
    )
    group = parser.add_argument_group("model and files")
    group.add_argument("--model", required=True, help="dense model that was pruned: hub id or folder")
    group.add_argument("--restore_path", required=True, help="pts_modelopt_state.pth that hf_pts.py wrote")
    group.add_argument("--output_dir", required=True, help="folder for the result, the log and checkpoints")
    group.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", default="data", help="folder with cnn_train.json and cnn_eval.json (default: data)"
    )
    group.add_argument(
        "--max_length",
        type=int,
        default=1024,
        help="tokens of prompt and answer; only the article is cut (default: 1024)",
    )
    group.add_argument(
        "--text_path", help="plain text (.txt, .json, .jsonl) to train on as well, with loss on all tokens"
    )
    group.add_argument(
        "--text_ratio",
        type=float,
        default=0.5,
        help="share of plain text among all training tokens, with --text_path; 1: the text alone (default: 0.5)",
    )
    group.add_argument("--text_length", type=int, help="tokens per block of plain text (default: --max_length)")
    group.add_argument(
        "--packing", action="store_true", help="put several samples into a row; attention stays within each sample"
    )
    group.add_argument(
        "--group_by_length",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batches of samples of similar length, hence less padding (default: on)",
    )
    group.add_argument("--pad_to_max", action="store_true", help="pad every batch to --max_length (for comparisons)")
    group.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that tokenize")
    group.add_argument(
        "--max_eval_samples", type=int, default=512, help="evaluate on the first N only; 0: all (default: 512)"
    )

    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--num_epochs", type=float, default=3, help="passes over the data (default: 3)")
    length.add_argument("--max_steps", type=int, help="optimizer steps, instead of --num_epochs")
    group.add_argument("--train_bs", type=int, default=4, help="samples per process and micro-batch (default: 4)")
    group.add_argument("--eval_bs", type=int, default=4, help="the same for evaluation (default: 4)")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step (default: 1)")
    group.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (default: 2e-5)")
    group.add_argument("--lr_scheduler_type", default="cosine", choices=("cosine", "linear", "constant_with_warmup"))
    group.add_argument("--warmup_ratio", type=float, default=0.03, help="share of steps to reach --lr (default: 0.03)")
    group.add_argument("--weight_decay", type=float, default=0.1, help="decoupled weight decay (default: 0.1)")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="second moment's decay (default: 0.999)")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="clip gradients at this norm (default: 1)")
    group.add_argument("--optim", default="adamw_torch_fused", choices=OPTIMIZERS, help="8 bit needs bitsandbytes")
    group.add_argument("--seed", type=int, default=0, help="data order (default: 0)")

    group = parser.add_argument_group(
        "distillation",
        "The dense model teaches: loss = (1 - kl) · cross entropy + kl · KL divergence + hidden · SquareHead.",
    )
    group.add_argument("--distill", action="store_true", help="train with the dense model as the teacher")
    group.add_argument("--distill_kl", type=float, default=1.0, help="weight of the divergence of logits (default: 1)")
    group.add_argument("--distill_hidden", type=float, default=0.0, help="weight of the hidden-state loss (default: 0)")
    group.add_argument("--distill_temperature", type=float, default=1.0, help="softens both distributions (default: 1)")
    group.add_argument(
        "--teacher_offload", action="store_true", help="keep the teacher's weights in CPU memory (FSDP only)"
    )

    group = parser.add_argument_group("memory and hardware")
    group.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "bf16", "fp16"),
        default="auto",
        help="compute type; weights and optimizer stay fp32. auto: bf16 where the hardware has it (default)",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="recompute activations instead of keeping them (default: on with a GPU, off on the CPU)",
    )
    group.add_argument(
        "--fsdp", choices=("auto", "off"), default="auto", help="shard over several processes (default), or copy"
    )
    group.add_argument(
        "--fsdp_version", type=int, choices=(1, 2), default=2, help="2: torch's fully_shard; 1: its forerunner"
    )
    group.add_argument(
        "--cpu_offload", action="store_true", help="keep sharded weights and optimizer in CPU memory: slow"
    )
    group.add_argument("--dry_run", action="store_true", help="print the estimated memory per GPU, then stop")
    group.add_argument("--world_size", type=int, help="number of GPUs that --dry_run assumes (default: this run's)")

    group = parser.add_argument_group("checkpoints and logging")
    group.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in --output_dir, if any"
    )
    group.add_argument("--save_steps", type=int, help="steps between checkpoints (default: one epoch)")
    group.add_argument("--save_total_limit", type=int, default=2, help="checkpoints kept on disk (default: 2)")
    group.add_argument("--eval_steps", type=int, help="steps between evaluations (default: one epoch)")
    group.add_argument("--load_best", action="store_true", help="end with the checkpoint of the lowest evaluation loss")
    group.add_argument("--logging_steps", type=int, default=10, help="steps between log lines (default: 10)")
    group.add_argument(
        "--check_masks_every", type=int, default=100, help="steps between mask checks; 0: never (default: 100)"
    )
    group.add_argument("--check_only", action="store_true", help="check arguments and files, then stop")
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        UserError: naming the option, its value and what to choose.
    """
    positive = (
        *("max_length", "train_bs", "eval_bs", "gradient_accumulation_steps", "workers", "save_total_limit"),
        *("logging_steps", "max_steps", "text_length", "save_steps", "eval_steps", "num_epochs", "lr", "world_size"),
    )
    for name in positive:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, found {value}")
    for name in ("weight_decay", "max_grad_norm", "distill_hidden", "check_masks_every", "max_eval_samples"):
        if not getattr(arguments, name) >= 0:
            raise UserError(f"--{name} must not be negative, found {getattr(arguments, name)}")
    for name in ("text_ratio", "distill_kl", "warmup_ratio"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise UserError(f"--{name} must lie between 0 and 1, found {getattr(arguments, name)}")
    if not arguments.distill_temperature > 0:
        raise UserError(f"--distill_temperature must be above 0, found {arguments.distill_temperature}")
    if arguments.text_length and arguments.text_length > arguments.max_length:
        raise UserError(f"--text_length {arguments.text_length} exceeds --max_length {arguments.max_length}")
    if arguments.text_path:
        require_file(arguments.text_path, "text file (--text_path)")
    if arguments.optim == "adamw_bnb_8bit" and find_spec("bitsandbytes") is None:
        raise UserError("--optim adamw_bnb_8bit needs bitsandbytes; pip install bitsandbytes, or use adafactor")


def planned_steps(arguments: argparse.Namespace, samples: int, processes: int) -> tuple[int, int]:
    """Optimizer steps in all and per epoch.

    Raises:
        UserError: the data does not fill one batch of every process.
    """
    batch = arguments.train_bs * processes
    if samples < batch:
        raise UserError(
            f"{samples} training samples do not fill one batch of {arguments.train_bs} on {processes} process(es); "
            "add data or lower --train_bs or --num_processes"
        )
    per_epoch = math.ceil(math.ceil(samples / batch) / arguments.gradient_accumulation_steps)
    return arguments.max_steps or math.ceil(per_epoch * arguments.num_epochs), per_epoch


def training_arguments(
    arguments: argparse.Namespace,
    checkpoints: Path,
    steps: int,
    per_epoch: int,
    precision: str,
    sharded: bool,
    evaluates: bool,
) -> TrainingArguments:
    """The Hugging Face TrainingArguments of a run of `steps` optimizer steps, `per_epoch` of them to an epoch."""
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=arguments.train_bs,
        per_device_eval_batch_size=arguments.eval_bs,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        adam_beta2=arguments.adam_beta2,
        max_grad_norm=arguments.max_grad_norm,
        lr_scheduler_type=arguments.lr_scheduler_type,
        warmup_steps=round(arguments.warmup_ratio * steps),
        optim=arguments.optim,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not cuda,
        # Under FSDP accelerate wraps the layers for recomputation itself, at the sharding's own bounds.
        gradient_checkpointing=arguments.gradient_checkpointing and not sharded,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=arguments.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=arguments.eval_steps or per_epoch,
        save_strategy="steps",
        save_steps=arguments.save_steps or per_epoch,
        load_best_model_at_end=arguments.load_best and evaluates,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        report_to=["tensorboard"] if find_spec("tensorboard") else [],
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
        seed=arguments.seed,
        data_seed=arguments.seed,
    )
