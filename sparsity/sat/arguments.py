"""The options of fine-tuning: dataclasses for transformers' HfArgumentParser, on top of its TrainingArguments.

Fields carry the reference's names; the launcher's short names are aliases of them.
"""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

from sparsity.devices import bf16_is_faster
from sparsity.errors import UserError, first_line
from sparsity.distributed import WAIT_SECONDS, start_processes, warn
from sparsity.sources import check_source, is_streamed, parse_sources
from sparsity.text import read_template

if TYPE_CHECKING:
    from sparsity.sat.mask_schedule import MaskSchedule

# What the Trainer cannot combine with held masks, our own checkpoints or our own loss. An option counts as given when
# its value differs from the default.
REFUSED = {
    "deepspeed": "weights are sharded with FSDP",
    "fsdp_config": "the sharding is set up for the masks; use --fsdp, --fsdp_version and --cpu_offload",
    "parallelism_config": "weights are sharded with FSDP",
    "auto_find_batch_size": "the batch decides the run; choose --train_bs",
    "use_liger_kernel": "it replaces the loss",
    "label_smoothing_factor": "the loss is cross entropy and distillation",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
}


MASK_OPTIONS = ("mask_schedule", "mask_every", "mask_until", "mask_decay")
# Packages that optimizers come from: part of their names (a regular expression) → (its name on PyPI, its module).
OPTIMIZER_PACKAGES = {
    r"bnb|adamw_8bit|paged|lion|ademamix": ("bitsandbytes", "bitsandbytes"),
    r"torch_[48]bit": ("torchao", "torchao"),
    "^galore": ("galore-torch", "galore_torch"),
    "^apollo": ("apollo-torch", "apollo_torch"),
    "lomo": ("lomo-optim", "lomo_optim"),
    "^grokadamw": ("grokadamw", "grokadamw"),
    "^schedule_free": ("schedulefree", "schedulefree"),
    "^stable_adamw": ("torch-optimi", "optimi"),
    "anyprecision": ("torchdistx", "torchdistx"),
    "_xla": ("torch_xla", "torch_xla"),
    "_npu": ("torch_npu", "torch_npu"),
    "apex": ("apex", "apex"),  # of transformers 4
}

UNSAVED_STATE = ("galore", "apollo", "grokadamw")  # beginnings of names of optimizers that keep state elsewhere


def option(help: str, **more: Any) -> Any:
    """A dataclass field with the `help` text of its option; `aliases` are further names of it."""
    default = {key: more.pop(key) for key in ("default", "default_factory") if key in more}
    return field(**default, metadata={"help": help, **more})


def switch(help: str) -> Any:
    """A field for an option that is on, off, or left to the program (None); it takes a value or none."""
    return option(help, default=None, nargs="?", const=True)


@dataclass
class ModelArguments:
    """Which model is trained."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = option("dense model that was pruned: hub id or folder", aliases=["--model"])
    modelopt_restore_path: str = option("pts_modelopt_state.pth that hf_pts.py wrote", aliases=["--restore_path"])
    trust_remote_code: bool = option("run model code that comes with the checkpoint", default=False)


@dataclass
class DataArguments:
    """What the model is trained on."""

    _argument_group_name: ClassVar[str] = "data"

    data_path: str = option("folder with cnn_train.json and cnn_eval.json", default="data")
    train_datapath: str | None = option("training records, in place of DATA_PATH/cnn_train.json", default=None)
    val_datapath: str | None = option("evaluation records, in place of DATA_PATH/cnn_eval.json", default=None)
    model_max_length: int = option(
        "tokens of prompt and answer; a longer article loses its end, then the answer",
        default=1024,
        aliases=["--max_length"],
    )
    prompt_template: str | None = option(
        'JSON {"head": …, "tail": …}: the prompt before and after the article; {instruction} stands in the head',
        default=None,
    )
    chat_template: bool = option("prompt with the tokenizer's own chat template, for instruct models", default=False)
    text_path: str | None = option(
        "plain text to train on as well, with loss on all tokens: a file, a folder, a hub set NAME:CONFIG:SPLIT, or "
        "self for text that the dense model writes; several with weights: a=0.5,self=0.5",
        default=None,
    )
    self_tokens: int | None = option(
        "tokens that the model writes for --text_path self, read again as often as needed; by default as many as the "
        "run reads",
        default=None,
    )
    text_tokens: int | None = option(
        "tokens to read of --text_path; by default all of files and folders, and of hub sets what --text_ratio needs",
        default=None,
    )
    text_ratio: float = option(
        "share of plain text among all training tokens, with --text_path; 1: only the text", default=0.5
    )
    answer_weight: float = option(
        "what a token of an answer counts in the loss, where one of plain text counts 1", default=1.0
    )
    text_length: int | None = option("tokens per block of plain text; by default --max_length", default=None)
    packing: bool = option("put several samples into a row; attention stays within each sample", default=False)
    pad_to_max: bool = option("pad every batch to --max_length (for comparisons)", default=False)
    workers: int = option("processes that tokenize", default_factory=lambda: min(8, os.cpu_count() or 1))
    cache_dir: str | None = option(
        "folder of tokenized data, which all runs share; by default cache, beside the training records", default=None
    )
    max_eval_samples: int = option("evaluate on the first N only; 0: all", default=512)

    @property
    def block(self) -> int:
        """Tokens in a block of plain text."""
        return self.text_length or self.model_max_length

    @property
    def train_file(self) -> Path:
        """The training records."""
        return Path(self.train_datapath) if self.train_datapath else Path(self.data_path) / "cnn_train.json"

    @property
    def eval_file(self) -> Path:
        """The evaluation records."""
        return Path(self.val_datapath) if self.val_datapath else Path(self.data_path) / "cnn_eval.json"

    @property
    def cache_folder(self) -> Path:
        """Where tokenized data is kept."""
        if self.cache_dir:
            return Path(self.cache_dir)
        return (self.train_file.parent if self.uses_records else Path(self.data_path)) / "cache"

    @property
    def uses_records(self) -> bool:
        """Whether records are trained on, with or without plain text."""
        return self.text_ratio < 1 or not self.text_path


@dataclass
class DistillationArguments:
    """The dense model as teacher: loss = (1 - kl) · cross entropy + kl · KL divergence."""

    _argument_group_name: ClassVar[str] = "distillation from the dense model"

    distill: bool = option("train with the dense model as the teacher", default=False)
    distill_kl: float = option("weight of the divergence of logits; cross entropy has the rest", default=1.0)
    distill_kl_answers: float | None = option(
        "the same for the answers of records; by default like --distill_kl. 0: cross entropy alone", default=None
    )
    distill_temperature: float = option("softens both distributions", default=1.0)
    teacher_offload: bool = option("keep the teacher's weights in CPU memory (FSDP only)", default=False)


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of sparse training, and its own options.

    `output_dir` is the folder of the result; once parsed, it is the folder of the checkpoints in it, as the Trainer
    expects, and `result_dir` is the folder itself. `schedule` completes what depends on the number of samples.
    """

    _argument_group_name: ClassVar[str] = "training (all options of transformers.TrainingArguments)"

    output_dir: str = option("folder for the result, the log and checkpoints")
    per_device_train_batch_size: int = option("samples per process and micro-batch", default=4, aliases=["--train_bs"])
    per_device_eval_batch_size: int = option("the same for evaluation", default=4, aliases=["--eval_bs"])
    num_train_epochs: float = option(
        "passes over the data; --max_steps overrides it", default=3.0, aliases=["--num_epochs"]
    )
    learning_rate: float = option("peak learning rate", default=2e-5, aliases=["--lr"])
    lr_scheduler_type: SchedulerType | str = option("shape of the learning rate", default="cosine")
    warmup_ratio: float = option("share of steps to reach the peak; --warmup_steps overrides it", default=0.03)
    weight_decay: float = option("decoupled weight decay", default=0.1)
    optim: OptimizerNames | str = option("optimizer; 8 bit needs bitsandbytes", default="adamw_torch_fused")
    seed: int = option("random seed, also of the data order", default=0)
    group_by_length: bool = option("batches of samples of similar length, which need less padding", default=True)
    freeze_embeddings: bool = option(
        "keep the embeddings, and an output head that is tied to them, as they are", default=True
    )
    mask_schedule: Literal["fixed", "magnitude", "saliency"] = option(
        "masks: fixed, or chosen anew every few steps by squared weight (magnitude) or by squared weight times Adam's "
        "second moment (saliency), and then frozen",
        default="fixed",
    )
    mask_every: int = option("optimizer steps between two choices of masks", default=10)
    mask_until: float = option("share of the steps after which masks are frozen", default=0.5)
    mask_decay: float = option("pruned weights shrink by the learning rate times this, a step", default=30.0)
    lora_rank: int = option(
        "freeze the pruned weights and train masked updates of this rank, which are merged at the end, in far less "
        "memory; needs about 10 times the --lr. 0: train all weights",
        default=0,
    )
    lora_alpha: float = option("the updates are scaled by lora_alpha / lora_rank", default=32.0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "compute type; weights and optimizer stay fp32. auto: bf16 where the hardware has it", default="auto"
    )
    gradient_checkpointing: bool | None = switch("recompute activations instead of keeping them; by default on GPUs")
    gradient_checkpointing_kwargs: str | None = option("arguments of torch's checkpoint, as JSON", default=None)
    fsdp: Literal["auto", "off"] = option("shard over several processes (auto), or keep a copy in each", default="auto")
    fsdp_version: Literal[1, 2] = option("2: torch's fully_shard; 1: FullyShardedDataParallel", default=2)
    cpu_offload: bool = option("keep sharded weights and optimizer in CPU memory: slow", default=False)
    dry_run: bool = option("print the estimated memory per GPU, then stop", default=False)
    world_size_of_dry_run: int | None = option(
        "number of GPUs that --dry_run assumes; by default this run's", default=None, aliases=["--world_size"]
    )
    resume: bool = option("resume from the last complete checkpoint in --output_dir, if any", default=False)
    save_steps: float | None = option("steps between checkpoints; by default one epoch", default=None)
    save_total_limit: int = option("checkpoints kept on disk", default=2)
    eval_strategy: IntervalStrategy | str = option("when to evaluate: no, steps or epoch", default="steps")
    eval_steps: float | None = option("steps between evaluations; by default one epoch", default=None)
    load_best_model_at_end: bool = option(
        "end with the checkpoint of the lowest evaluation loss", default=False, aliases=["--load_best"]
    )
    logging_steps: float = option("steps between log lines", default=10)
    logging_nan_inf_filter: bool = option("hide non-finite losses in the log", default=False)
    report_to: None | str | list[str] = option(
        "tensorboard, wandb, … or none; by default tensorboard where it is installed", default=None
    )
    check_masks_every: int = option("steps between mask checks; 0: never", default=100)
    check_only: bool = option("check arguments and files, then stop", default=False)
    remove_unused_columns: bool = option("must stay off: the batches carry more than the model takes", default=False)
    dataloader_drop_last: bool = option("leave out the last batch of an epoch if it is not full", default=True)
    ddp_timeout: int = option("seconds that processes wait for one another", default=WAIT_SECONDS)
    ddp_find_unused_parameters: bool | None = option("see DistributedDataParallel", default=False)

    def __post_init__(self) -> None:
        import torch

        self._refuse_unsupported()
        self.result_dir = Path(self.output_dir)
        self.output_dir = str(self.result_dir / "checkpoints")
        self.processes = int(os.environ.get("WORLD_SIZE", 1))
        self.sharded = self.fsdp == "auto" and self.processes > 1
        self.order_batch = self.per_device_train_batch_size * self.processes  # see resume.order_batch
        self.fsdp = ""  # type: ignore[assignment]  # see sharding.configure_fsdp, called once the model is known
        cuda = torch.cuda.is_available()
        given: Any = self  # with the fields of TrainingArguments, whose types mypy does not see
        if given.tf32 is None and is_torch_tf32_available():
            self.tf32 = True
        self.requested_precision = self.mixed_precision
        precision = "bf16" if given.bf16 else "fp16" if given.fp16 else choose_precision(self.mixed_precision)
        self.bf16, self.fp16 = precision == "bf16", precision == "fp16"
        self.compute_dtype = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32"))
        self.use_cpu = given.use_cpu or not cuda
        self._set_checkpointing(by_default=cuda or self.dry_run)  # which tells of GPUs wherever it runs
        if self.report_to is None:
            self.report_to = ["tensorboard"] if find_spec("tensorboard") else []
        self.data_seed = self.seed if given.data_seed is None else given.data_seed
        # `schedule` sets these once the number of steps is known; until then they hold values that pass all checks.
        self.planned = {name: getattr(self, name) for name in ("eval_steps", "save_steps", "load_best_model_at_end")}
        self.eval_steps, self.save_steps, self.load_best_model_at_end = 1, 1, False
        self.warmup_share, self.warmup_ratio = self.warmup_ratio, _default("warmup_ratio")
        self.keep_checkpoints, self.save_total_limit = self.save_total_limit, None  # type: ignore[assignment]
        if self.processes > 1:
            start_processes("auto")  # joins with our timeout; on CPUs TrainingArguments would leave torch's default
        if given.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"the training options cannot be used: {first_line(error)}") from error

    def _set_checkpointing(self, by_default: bool) -> None:
        """Set `recompute`, and what the Trainer reads: activation_checkpointing, the newer name, where it has one."""
        given: Any = self
        asked = (getattr(given, "activation_checkpointing", None), self.gradient_checkpointing)
        self.recompute = next((value for value in asked if value is not None), by_default)
        # Under FSDP accelerate wraps the layers for recomputation itself, at the sharding's own boundaries.
        values = {
            "checkpointing": self.recompute and not self.sharded,
            "checkpointing_kwargs": getattr(given, "activation_checkpointing_kwargs", None)
            or self.gradient_checkpointing_kwargs
            or {"use_reentrant": False},
        }
        prefix = "activation_" if hasattr(self, "activation_checkpointing") else "gradient_"
        for name, value in values.items():
            setattr(self, prefix + name, value)

    def _refuse_unsupported(self) -> None:
        for name, reason in REFUSED.items():
            if hasattr(self, name) and getattr(self, name) != _default(name):
                raise UserError(f"--{name} is not supported here: {reason}")
        if self.remove_unused_columns:
            raise UserError("--remove_unused_columns must stay off: the batches carry more than the model takes")

    def moving_masks(self) -> MaskSchedule | None:
        """How masks move; None where they are fixed."""
        if self.mask_schedule == "fixed":
            return None
        from sparsity.sat.mask_schedule import MaskSchedule

        return MaskSchedule(self.mask_schedule, self.mask_every, self.mask_until, self.mask_decay)

    def samples_per_epoch(self, samples: int) -> int:
        """How many of `samples` an epoch visits: without --dataloader_drop_last all, else those that fill batches."""
        return samples // self.order_batch * self.order_batch if self.dataloader_drop_last else samples

    def schedule(self, samples: int, evaluates: bool) -> None:
        """Set what depends on the number of training samples: steps, warm-up, evaluation and checkpoints.

        Raises:
            UserError: the data does not fill one batch of every process.
        """
        given: Any = self
        steps, per_epoch = planned_steps(self, samples)
        self.max_steps = steps
        self.warmup_steps = given.warmup_steps or round(self.warmup_share * steps)
        self.eval_strategy = self.eval_strategy if evaluates else type(self.eval_strategy)("no")
        self.eval_steps = self.planned["eval_steps"] or per_epoch
        self.save_steps = self.planned["save_steps"] or per_epoch
        if self.planned["load_best_model_at_end"] and evaluates:
            self.load_best_model_at_end, self.metric_for_best_model, self.greater_is_better = True, "loss", False


@dataclass
class SatArguments:
    """All options of a run."""

    model: ModelArguments
    data: DataArguments
    distillation: DistillationArguments
    training: SparseTrainingArguments


ARGUMENT_TYPES = (ModelArguments, DataArguments, DistillationArguments, SparseTrainingArguments)


def _default(name: str) -> Any:
    """TrainingArguments' own default of a field; None where it has none, as transformers 5 for warmup_ratio."""
    return next((entry.default for entry in fields(TrainingArguments) if entry.name == name), None)


def choose_precision(wanted: str) -> str:
    """Resolve --mixed_precision auto: bf16 where the hardware computes in it, else fp16 on a GPU, else none.

    Raises:
        UserError: fp16 without a GPU.
    """
    import torch

    cuda = torch.cuda.is_available()
    if wanted == "auto":
        if cuda:
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        return "bf16" if bf16_is_faster(torch.device("cpu")) else "no"
    if wanted == "fp16" and not cuda:
        raise UserError("--mixed_precision fp16 needs a CUDA GPU and torch sees none; use bf16 or no")
    return wanted


def option_values(args: SatArguments) -> dict[str, Any]:
    """What was asked for, under the launcher's short names."""
    model, data, distillation, training = args.model, args.data, args.distillation, args.training
    return {
        "model": model.model_name_or_path,
        "max_length": data.model_max_length,
        "text_ratio": data.text_ratio,
        "text_length": data.text_length,
        "text_tokens": data.text_tokens,
        "self_tokens": data.self_tokens,
        "answer_weight": data.answer_weight,
        "packing": data.packing,
        "group_by_length": training.group_by_length,
        "num_epochs": training.num_train_epochs,
        "max_steps": training.max_steps if training.max_steps > 0 else None,
        "train_bs": training.per_device_train_batch_size,
        "eval_bs": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "lr": training.learning_rate,
        "lr_scheduler_type": getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type),
        "warmup_ratio": training.warmup_share,
        "weight_decay": training.weight_decay,
        "adam_beta2": training.adam_beta2,
        "max_grad_norm": training.max_grad_norm,
        "dataloader_drop_last": training.dataloader_drop_last,
        "optim": getattr(training.optim, "value", training.optim),
        "seed": training.seed,
        "freeze_embeddings": training.freeze_embeddings,
        **{name: getattr(training, name) for name in MASK_OPTIONS},
        "lora_rank": training.lora_rank,
        "lora_alpha": training.lora_alpha,
        "distill": distillation.distill,
        "distill_kl": distillation.distill_kl,
        "distill_kl_answers": distillation.distill_kl_answers,
        "distill_temperature": distillation.distill_temperature,
        "mixed_precision": training.requested_precision,
        "workers": data.workers,
        "max_eval_samples": data.max_eval_samples,
        "save_total_limit": training.keep_checkpoints,
        "logging_steps": training.logging_steps,
        "save_steps": training.planned["save_steps"],
        "eval_steps": training.planned["eval_steps"],
        "world_size": training.world_size_of_dry_run,
        "check_masks_every": training.check_masks_every,
    }


def check_arguments(args: SatArguments) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        UserError: naming the option, its value and what to choose.
    """
    values = option_values(args)
    if args.training.max_steps not in (-1, values["max_steps"]):
        raise UserError(f"--max_steps must be above 0, found {args.training.max_steps}")
    positive = (
        *("max_length", "train_bs", "eval_bs", "gradient_accumulation_steps", "workers", "save_total_limit"),
        *("logging_steps", "text_length", "text_tokens", "save_steps", "eval_steps", "num_epochs", "lr", "world_size"),
        *("distill_temperature", "self_tokens", "answer_weight", "mask_every", "lora_alpha"),
    )
    for name in positive:
        if values[name] is not None and not values[name] > 0:
            raise UserError(f"--{name} must be above 0, found {values[name]}")
    not_negative = ("weight_decay", "max_grad_norm", "check_masks_every", "max_eval_samples")
    for name in (*not_negative, "mask_decay", "lora_rank"):
        if not values[name] >= 0:
            raise UserError(f"--{name} must not be negative, found {values[name]}")
    for name in ("text_ratio", "distill_kl", "distill_kl_answers", "warmup_ratio", "mask_until"):
        if values[name] is not None and not 0 <= values[name] <= 1:
            raise UserError(f"--{name} must lie between 0 and 1, found {values[name]}")
    if args.data.text_length and args.data.text_length > args.data.model_max_length:
        raise UserError(f"--text_length {args.data.text_length} exceeds --max_length {args.data.model_max_length}")
    if args.data.text_path:
        for source in parse_sources(args.data.text_path):
            check_source(source)
            if is_streamed(source) and args.data.text_ratio >= 1 and not args.data.text_tokens:
                raise UserError(
                    f"--text_ratio 1 would read all of the hub set '{source.spec}'; say how much with --text_tokens"
                )
    if args.data.prompt_template and args.data.chat_template:
        raise UserError("--prompt_template cannot be combined with --chat_template; give one of them")
    if args.data.prompt_template:
        read_template(args.data.prompt_template)
    if values["mask_schedule"] == "saliency" and not values["optim"].startswith("adamw_torch"):
        raise UserError(f"--mask_schedule saliency reads Adam's second moments, which --optim {values['optim']} lacks")
    check_optimizer(values["optim"], args.training.resume)
    check_low_rank(args.training, values["optim"])
    offload = args.training.cpu_offload or args.distillation.teacher_offload
    if offload and not (args.training.sharded or args.training.dry_run or args.training.check_only):
        raise UserError("--cpu_offload and --teacher_offload need FSDP, that is several processes; drop them")


def check_optimizer(name: str, resume: bool) -> None:
    """Check that an optimizer's package and hardware are there, and that a run with it can be resumed if it is to be.

    Raises:
        UserError: naming what is missing.
    """
    import torch

    for pattern, (package, module) in OPTIMIZER_PACKAGES.items():
        if re.search(pattern, name) and find_spec(module) is None:
            raise UserError(f"--optim {name} needs {package}; pip install {package}, or use adafactor")
    if name == "adalomo" and not torch.cuda.is_available():
        raise UserError("--optim adalomo needs a CUDA GPU and torch sees none; use lomo or adafactor")
    if name.startswith(UNSAVED_STATE):
        if resume:
            raise UserError(
                f"a run with --optim {name} cannot be resumed, because checkpoints do not hold all of its state; "
                "drop --resume, or use adafactor"
            )
        warn(f"checkpoints do not hold all of the state of --optim {name}: the run cannot be resumed")


def check_low_rank(training: SparseTrainingArguments, optimizer: str) -> None:
    """Check that --lora_rank is not combined with what cannot work.

    Raises:
        UserError: it is.
    """
    if not training.lora_rank:
        if training.lora_alpha != SparseTrainingArguments.lora_alpha:
            raise UserError(f"--lora_alpha {training.lora_alpha} scales low-rank updates; give --lora_rank too")
        return
    if training.mask_schedule != "fixed":
        raise UserError(f"--mask_schedule {training.mask_schedule} trains all weights; drop it or --lora_rank")
    if training.fsdp_version == 1:
        raise UserError("--lora_rank needs --fsdp_version 2: FSDP1 joins frozen and trained weights of different types")
    if optimizer.startswith(("galore", "apollo")):
        raise UserError(f"--optim {optimizer} works on whole weights, which --lora_rank keeps frozen; drop one of them")


def planned_steps(training: SparseTrainingArguments, samples: int) -> tuple[int, int]:
    """Optimizer steps in all and per epoch.

    Raises:
        UserError: the data does not fill one batch of every process.
    """
    size, processes = training.per_device_train_batch_size, training.processes
    if samples < size * processes:
        raise UserError(
            f"{samples} training samples do not fill one batch of {size} on {processes} process(es); "
            "add data or lower --train_bs or --num_processes"
        )
    batches = math.ceil(training.samples_per_epoch(samples) / (size * processes))
    per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    if training.max_steps > 0:
        return training.max_steps, per_epoch
    return math.ceil(per_epoch * training.num_train_epochs), per_epoch
