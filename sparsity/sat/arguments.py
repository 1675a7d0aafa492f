"""The options of fine-tuning: dataclasses for transformers' HfArgumentParser, on top of its TrainingArguments.

Fields have the reference's names, and the launcher's short names are aliases. An option is declared once, at its field:
`option` holds its help and aliases, and the annotation of its type the values it may have and whether a resumed run
must keep it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_origin, get_type_hints

from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import is_flash_attn_2_available, is_torch_tf32_available

from sparsity.devices import bf16_is_faster
from sparsity.distributed import WAIT_SECONDS, start_processes
from sparsity.errors import UserError, first_line, reported_as, warn
from sparsity.sources import check_source, is_streamed, parse_sources

# What the Trainer cannot combine with held masks, our checkpoints or our loss, unless left at its default.
REFUSED = {
    "deepspeed": "weights are sharded with FSDP",
    "parallelism_config": "weights are sharded with FSDP",
    "auto_find_batch_size": "the batch determines the run; choose --train_bs",
    "use_liger_kernel": "it replaces the loss",
    "label_smoothing_factor": "the loss is cross entropy and distillation",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "remove_unused_columns": "the batches contain more than the model's inputs",
}


@dataclass(frozen=True)
class Limits:
    """The values that an option may have."""

    words: str
    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf

    def check(self, name: str, value: float) -> None:
        """Raise a UserError unless the value is within the limits; NaN never is."""
        if not (value > self.above and self.least <= value <= self.most):
            raise UserError(f"--{name} must {self.words}, got {value}")


RESUME = "a resumed run must have the value of the run that it continues"
T = TypeVar("T")
Kept = Annotated[T, RESUME]
Positive = Annotated[T, Limits("be greater than 0", above=0)]
NotNegative = Annotated[T, Limits("not be negative", least=0)]
Fraction = Annotated[T, Limits("be between 0 and 1", least=0, most=1)]


def option(help: str, **more: Any) -> Any:
    """A dataclass field with the `help` text of its option; `aliases` are further names of it."""
    default = {key: more.pop(key) for key in ("default", "default_factory") if key in more}
    return field(**default, metadata={"help": help, **more})


@dataclass
class ModelArguments:
    """Which model is trained."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: Kept[str] = option(
        "dense model that was pruned: hub id or folder", aliases=["--model", "--model_dir"]
    )
    modelopt_restore_path: str | None = option(
        "pts_modelopt_state.pth that hf_pts.py wrote; without it the dense model is trained",
        default=None,
        aliases=["--restore_path"],
    )
    use_flash_attn: bool = option("FlashAttention 2, from the package flash-attn, not torch's attention", default=False)
    quant_cfg: str | None = option("ignored, as NVIDIA's example does", default=None)
    calib_size: int | None = option("ignored, as NVIDIA's example does", default=None)
    sparse_fmt: str | None = option("ignored, as NVIDIA's example does", default=None)
    trust_remote_code: bool = option("run model code that comes with the checkpoint", default=False)


@dataclass
class DataArguments:
    """What the model is trained on."""

    _argument_group_name: ClassVar[str] = "data"

    data_path: str = option("folder with cnn_train.json and cnn_eval.json", default="data")
    train_datapath: str | None = option("training records, in place of DATA_PATH/cnn_train.json", default=None)
    val_datapath: str | None = option("evaluation records, in place of DATA_PATH/cnn_eval.json", default=None)
    model_max_length: Kept[Annotated[int, Limits("be at least 2", least=2)]] = option(
        "tokens of prompt and answer; a longer article loses its end, then the answer",
        default=1024,
        aliases=["--max_length"],
    )
    prompt_template: str | None = option(
        'JSON {"head": …, "tail": …}: the prompt before and after the article; {instruction} stands in the head',
        default=None,
    )
    chat_template: bool = option("prompt with the tokenizer's own chat template, for instruct models", default=False)
    text_path: list[str] | None = option(
        "plain text to train on as well, with loss on all tokens: a file, a folder, a hub set NAME:CONFIG:SPLIT, or "
        "self for text that the dense model writes; several with weights: a=0.5 self=0.5",
        default=None,
    )
    self_tokens: Kept[Positive[int | None]] = option(
        "tokens that the model writes for --text_path self, read again as often as needed; by default as many as the "
        "run reads",
        default=None,
    )
    text_tokens: Kept[Positive[int | None]] = option(
        "tokens to read of --text_path; by default all of files and folders, and of hub sets what --text_ratio needs",
        default=None,
    )
    text_ratio: Kept[Fraction[float]] = option(
        "fraction of plain text among all training tokens, with --text_path; 1: only the text", default=0.5
    )
    packing: Kept[bool] = option("put several samples into a row; attention stays within each sample", default=False)
    workers: Positive[int] = option("processes that tokenize", default_factory=lambda: min(8, os.cpu_count() or 1))
    cache_dir: str | None = option(
        "folder of tokenized data, shared by all runs; by default cache, beside the training records", default=None
    )
    max_eval_samples: NotNegative[int] = option("evaluate on the first N only; 0: all", default=512)

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
        """The folder of tokenized data."""
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

    distill: Kept[bool] = option("train with the dense model as the teacher", default=False)
    distill_kl: Kept[Fraction[float]] = option(
        "weight of the KL divergence from the teacher; cross entropy has the rest", default=1.0
    )
    distill_kl_answers: Kept[Fraction[float | None]] = option(
        "the same for the answers of records; by default --distill_kl. 0: cross entropy only", default=None
    )


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of sparse training, and its own options.

    `output_dir` is the folder of the result; once parsed, it is the folder of the checkpoints in it, as the Trainer
    expects, and `result_dir` is the folder itself. `schedule` completes what depends on the number of samples. `given`
    has the values of all options as they were parsed.
    """

    _argument_group_name: ClassVar[str] = "training (all options of transformers.TrainingArguments)"

    output_dir: str = option("folder for the result, the log and checkpoints")
    per_device_train_batch_size: Positive[int] = option(
        "samples per process and micro-batch", default=4, aliases=["--train_bs"]
    )
    per_device_eval_batch_size: Positive[int] = option("the same for evaluation", default=4, aliases=["--eval_bs"])
    gradient_accumulation_steps: Positive[int] = option("micro-batches per optimizer step", default=1)
    num_train_epochs: Kept[Positive[float]] = option(
        "passes over the data; --max_steps overrides it", default=3.0, aliases=["--num_epochs"]
    )
    max_steps: Kept[Positive[int]] = option("optimizer steps; -1: as many as --num_epochs takes", default=-1)
    learning_rate: Kept[Positive[float]] = option("peak learning rate", default=2e-5, aliases=["--lr"])
    lr_scheduler_type: Kept[SchedulerType | str] = option("shape of the learning rate", default="cosine")
    warmup_ratio: Kept[Fraction[float]] = option(
        "fraction of the steps to reach the peak; --warmup_steps overrides it", default=0.03
    )
    weight_decay: Kept[NotNegative[float]] = option("decoupled weight decay", default=0.1)
    adam_beta2: Kept[float] = option("decay rate of Adam's second moment", default=0.999)
    max_grad_norm: Kept[NotNegative[float]] = option("norm to which gradients are clipped; 0: not clipped", default=1.0)
    optim: Kept[OptimizerNames | str] = option("optimizer; 8 bit needs bitsandbytes", default="adamw_torch_fused")
    seed: Kept[int] = option("random seed, also for the data order", default=0)
    group_by_length: Kept[bool] = option("batches of samples of similar length, which need less padding", default=True)
    freeze_embeddings: Kept[bool] = option("freeze the embeddings, and a head tied to them", default=True)
    lora_rank: Kept[NotNegative[int]] = option(
        "freeze the pruned weights and train masked updates of this rank, which are merged at the end, in far less "
        "memory; needs about 10 times the --lr. 0: train all weights",
        default=0,
    )
    lora_alpha: Kept[Positive[float]] = option("the updates are scaled by lora_alpha / lora_rank", default=32.0)
    mixed_precision: Kept[Literal["auto", "no", "bf16", "fp16"]] = option(
        "compute dtype; weights and optimizer stay fp32. auto: bf16 if the hardware computes in it", default="auto"
    )
    gradient_checkpointing: bool | None = option(
        "recompute activations instead of keeping them; by default on GPUs", default=None, nargs="?", const=True
    )
    gradient_checkpointing_kwargs: str | None = option("arguments of torch's checkpoint, as JSON", default=None)
    fsdp: str = option(
        "shard over several processes (auto), or keep a copy in each (off); or words of transformers: full_shard, "
        "shard_grad_op, offload, auto_wrap",
        default="auto",
    )
    fsdp_config: str | None = option(
        "JSON or a file of it, with transformer_layer_cls_to_wrap and cpu_offload only", default=None
    )
    fsdp_version: Literal[1, 2] = option("always 2, torch's fully_shard; 1 is accepted with a warning", default=2)
    cpu_offload: bool = option("keep sharded weights and optimizer in CPU memory: slow", default=False)
    dry_run: bool = option("print the estimated memory per GPU, then stop", default=False)
    world_size_of_dry_run: Positive[int | None] = option(
        "number of GPUs that --dry_run assumes; by default this run's", default=None, aliases=["--world_size"]
    )
    resume: bool = option("resume from the last complete checkpoint in --output_dir, if any", default=False)
    save_steps: Positive[float | None] = option("steps between checkpoints; by default one epoch", default=None)
    save_total_limit: Positive[int] = option("checkpoints kept on disk", default=2)
    eval_strategy: IntervalStrategy | str = option("when to evaluate: no, steps or epoch", default="steps")
    eval_steps: Positive[float | None] = option("steps between evaluations; by default one epoch", default=None)
    load_best_model_at_end: bool = option(
        "use the checkpoint with the lowest evaluation loss as the result", default=False, aliases=["--load_best"]
    )
    logging_steps: Positive[float] = option("steps between log lines", default=10)
    report_to: None | str | list[str] = option(
        "tensorboard, wandb, … or none; by default tensorboard if it is installed", default=None
    )
    check_only: bool = option("check arguments and files, then stop", default=False)
    remove_unused_columns: bool = option("must stay off", default=False)
    dataloader_drop_last: Kept[bool] = option("leave out the last batch of an epoch if it is not full", default=True)
    ddp_timeout: int = option("seconds that processes wait for one another", default=WAIT_SECONDS)
    ddp_find_unused_parameters: bool | None = option("see DistributedDataParallel", default=False)

    def __post_init__(self) -> None:
        import torch

        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        self.given = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
        for name, reason in REFUSED.items():
            if name in self.given and self.given[name] != _default(name):
                raise UserError(f"--{name} is not supported: {reason}")
        if self.fsdp_version == 1:
            warn("--fsdp_version 1 is no longer supported; using version 2")
        self.result_dir = Path(self.output_dir)
        self.output_dir = str(self.result_dir / "checkpoints")
        self.processes = int(os.environ.get("WORLD_SIZE", 1))
        self._set_sharding()
        self.order_batch = self.per_device_train_batch_size * self.processes  # see resume.order_batch
        self._set_precision()
        self._set_checkpointing(by_default=torch.cuda.is_available() or self.dry_run)  # a dry run estimates GPUs
        self.use_cpu = self.given["use_cpu"] or not torch.cuda.is_available()
        if self.report_to is None:
            self.report_to = ["tensorboard"] if find_spec("tensorboard") else []
        self.data_seed = self.seed if self.given["data_seed"] is None else self.given["data_seed"]
        # Until `schedule` sets these, they have values that pass all of transformers' checks.
        self.eval_steps, self.save_steps, self.load_best_model_at_end = 1, 1, False
        self.load_best = False  # the Trainer cannot load the best of our checkpoints
        self.warmup_ratio = _default("warmup_ratio", TrainingArguments)
        self.keep_checkpoints, self.save_total_limit = self.save_total_limit, None  # type: ignore[assignment]
        if self.processes > 1:
            start_processes("auto")  # joins with our timeout; on CPUs TrainingArguments would leave torch's default
        if self.given["disable_tqdm"] is None:
            self.disable_tqdm = not sys.stderr.isatty()
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"the training options cannot be used: {first_line(error)}") from error

    @property
    def place_model_on_device(self) -> bool | None:
        """Sharding places the model itself, which until then has masks on the meta device."""
        return False if self.sharded else super().place_model_on_device

    def _set_sharding(self) -> None:
        """Read transformers' words of --fsdp and keys of --fsdp_config; `fsdp.configure_fsdp` does what they mean."""
        words, config = set(self.fsdp.split()), self.fsdp_config or "{}"
        if unknown := words - {"auto", "off", "full_shard", "shard_grad_op", "offload", "auto_wrap"}:
            raise UserError(
                f"--fsdp {min(unknown)} is not supported; use auto, off, full_shard, shard_grad_op, offload, auto_wrap"
            )
        with reported_as(f"cannot read --fsdp_config '{config}'", OSError, ValueError, TypeError):
            keys = dict(json.loads(config if config.lstrip().startswith("{") else Path(config).read_text()))
        keys = {name.removeprefix("fsdp_"): value for name, value in keys.items()}
        if unknown := keys.keys() - {"transformer_layer_cls_to_wrap", "cpu_offload"}:
            raise UserError(f"--fsdp_config: '{min(unknown)}' is not supported; leave it out")
        self.sharded = "off" not in words and self.processes > 1
        self.reshard = "shard_grad_op" not in words  # give weights up between forward and backward pass
        self.cpu_offload |= "offload" in words or bool(keys.get("cpu_offload"))
        layers = keys.get("transformer_layer_cls_to_wrap", [])
        self.wrapped_layers = [layers] if isinstance(layers, str) else list(layers)
        self.fsdp, self.fsdp_config = "", None

    def _set_precision(self) -> None:
        import torch

        if self.given["tf32"] is not False:
            self.tf32 = is_torch_tf32_available() or None
            if self.given["tf32"] and not self.tf32:
                warn("--tf32 is ignored: it needs an NVIDIA GPU of the Ampere generation or newer")
        self.requested_precision = self.mixed_precision
        explicit = "bf16" if self.given["bf16"] else "fp16" if self.given["fp16"] else None
        precision = explicit or choose_precision(self.mixed_precision)
        self.bf16, self.fp16 = precision == "bf16", precision == "fp16"
        self.compute_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)

    def _set_checkpointing(self, by_default: bool) -> None:
        """Set `recompute` and the Trainer's option, which transformers 5 calls activation_checkpointing."""
        prefix = "activation_" if "activation_checkpointing" in self.given else "gradient_"
        names = ("activation_checkpointing", "gradient_checkpointing")
        values = [self.given[name] for name in names if self.given.get(name) is not None]
        self.recompute = values[0] if values else by_default
        # With FSDP, accelerate wraps the layers for recomputation itself, at the boundaries of the sharding.
        setattr(self, f"{prefix}checkpointing", self.recompute and not self.sharded)
        kwargs = [self.given.get(f"{name}_kwargs") for name in names]
        setattr(self, f"{prefix}checkpointing_kwargs", kwargs[0] or kwargs[1] or {"use_reentrant": False})

    def samples_per_epoch(self, samples: int) -> int:
        """How many of `samples` an epoch visits: without --dataloader_drop_last all, else those that fill batches."""
        return samples // self.order_batch * self.order_batch if self.dataloader_drop_last else samples

    def schedule(self, samples: int, evaluates: bool) -> None:
        """Set what depends on the number of training samples: steps, warm-up, evaluation and checkpoints.

        Raises:
            UserError: the data does not fill one batch of every process.
        """
        size, processes = self.per_device_train_batch_size, self.processes
        if samples < size * processes:
            raise UserError(
                f"{samples} training samples do not fill one batch of {size} on {processes} process(es); "
                "add data or lower --train_bs or --num_processes"
            )
        batches = math.ceil(self.samples_per_epoch(samples) / (size * processes))
        per_epoch = math.ceil(batches / self.gradient_accumulation_steps)
        if self.max_steps <= 0:
            self.max_steps = math.ceil(per_epoch * self.num_train_epochs)
        self.warmup_steps = self.given["warmup_steps"] or round(self.given["warmup_ratio"] * self.max_steps)
        self.eval_strategy = self.eval_strategy if evaluates else type(self.eval_strategy)("no")
        self.eval_steps = self.given["eval_steps"] or per_epoch
        self.save_steps = self.given["save_steps"] or per_epoch
        self.load_best = self.given["load_best_model_at_end"] and evaluates
        if self.load_best:
            self.metric_for_best_model, self.greater_is_better = "loss", False


@dataclass
class SatArguments:
    """All options of a run."""

    model: ModelArguments
    data: DataArguments
    distillation: DistillationArguments
    training: SparseTrainingArguments


ARGUMENT_TYPES = (ModelArguments, DataArguments, DistillationArguments, SparseTrainingArguments)


def _default(name: str, owner: type = SparseTrainingArguments) -> Any:
    """The default of a field; None if there is no such field, as for warmup_ratio in transformers 5."""
    return next((entry.default for entry in fields(owner) if entry.name == name), None)


def options(args: SatArguments) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield (short name, value as parsed, notes) for every option; its notes are Limits or RESUME.

    A value that is its option's default is yielded without Limits: max_steps has -1 for an open number of steps.
    """
    for part in (args.model, args.data, args.distillation, args.training):
        values = part.given if isinstance(part, SparseTrainingArguments) else vars(part)
        hints = get_type_hints(type(part), include_extras=True)
        for entry in fields(part):
            notes = hints[entry.name].__metadata__ if get_origin(hints[entry.name]) is Annotated else ()
            value = values[entry.name]
            if value is None or (entry.default is not MISSING and value == entry.default):
                notes = tuple(note for note in notes if note is RESUME)
            name = entry.metadata.get("aliases", [entry.name])[0].removeprefix("--")  # the short one, if there is one
            yield name, value, notes


def choose_precision(requested: str) -> str:
    """Resolve --mixed_precision auto: bf16 if the hardware computes in it, else fp16 on a GPU, else no.

    Raises:
        UserError: fp16 without a GPU.
    """
    import torch

    cuda = torch.cuda.is_available()
    if requested == "auto":
        if cuda:
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        return "bf16" if bf16_is_faster(torch.device("cpu")) else "no"
    if requested == "fp16" and not cuda:
        raise UserError("--mixed_precision fp16 needs a CUDA GPU and torch sees none; use bf16 or no")
    return requested


def check_arguments(args: SatArguments) -> None:
    """Check for values that cannot work, before anything is loaded.

    Raises:
        UserError: names the option, its value and what to choose.
    """
    for name, value, notes in options(args):
        for limits in notes:
            if isinstance(limits, Limits):
                limits.check(name, value)
    data, training = args.data, args.training
    if ignored := [f"--{name}" for name in ("quant_cfg", "calib_size", "sparse_fmt") if vars(args.model)[name]]:
        warn(f"{', '.join(ignored)} ignored: training starts from --restore_path, export_hf.py quantizes")
    if args.model.use_flash_attn and not is_flash_attn_2_available():
        raise UserError("--use_flash_attn needs a GPU and the package flash-attn; install it, or leave the option out")
    if args.model.use_flash_attn and data.packing:
        raise UserError("--use_flash_attn cannot be combined with --packing, whose masks it does not take; drop one")
    if not args.model.modelopt_restore_path:
        warn("no --restore_path: the dense model is trained, without masks")
        if training.lora_rank:
            raise UserError(f"--lora_rank {training.lora_rank} trains pruned weights; give their state: --restore_path")
    for source in parse_sources(data.text_path) if data.text_path else []:
        check_source(source)
        if is_streamed(source) and data.text_ratio >= 1 and not data.text_tokens:
            raise UserError(f"--text_ratio 1 would read all of the hub set '{source.spec}'; set --text_tokens")
    if training.given["optim"].startswith("schedule_free"):
        raise UserError(f"--optim {training.given['optim']} is not supported; use another, such as adamw_torch_fused")
    if training.lora_alpha != _default("lora_alpha") and not training.lora_rank:
        raise UserError(f"--lora_alpha {training.lora_alpha} scales low-rank updates; set --lora_rank too")
    unsharded = not (training.sharded or training.dry_run or training.check_only)
    if unsharded and "shard" in training.given["fsdp"]:
        warn(f"--fsdp {training.given['fsdp']} has no effect in one process; `accelerate launch --cpu` starts only one")
    if training.cpu_offload and unsharded:
        raise UserError("--cpu_offload needs FSDP, that is several processes; drop it")
