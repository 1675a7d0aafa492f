"""What a resumed training run must share with the run it continues."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import file_digest, is_whole_number, read_json, save_json
from sparsity.sat import checkpoints, training_state
from sparsity.sat.arguments import MASK_OPTIONS, SatArguments, option_values
from sparsity.sources import content_key, parse_sources
from sparsity.text import DEFAULT_TEMPLATE, PROMPT_FIELD, RUN_RECORD, PromptTemplate

# Options that shape the course of training, under the launcher's names: a resumed run must have the same.
RESUME_KEYS = [
    *(
        "model",
        "max_length",
        "text_ratio",
        "text_length",
        "text_tokens",
        "self_tokens",
        "answer_weight",
        "packing",
        "group_by_length",
        "num_epochs",
        "max_steps",
    ),
    *("train_bs", "gradient_accumulation_steps", "lr", "lr_scheduler_type", "warmup_ratio", "weight_decay"),
    *(
        "adam_beta2",
        "max_grad_norm",
        "optim",
        "seed",
        "freeze_embeddings",
        "lora_rank",
        "lora_alpha",
        "dataloader_drop_last",
        "distill",
        "distill_kl",
        "distill_kl_answers",
    ),
    *("distill_temperature", "mixed_precision"),
    *MASK_OPTIONS,
]
# What runs did whose records lack these names: releases before them had no such option.
EARLIER = {
    "text_tokens": None,
    "self_tokens": None,
    "answer_weight": 1.0,
    "distill_kl_answers": None,
    "freeze_embeddings": False,
    "mask_schedule": "fixed",
    "mask_every": 10,
    "mask_until": 0.5,
    "mask_decay": 30.0,
    "lora_rank": 0,
    "lora_alpha": 32.0,
    "dataloader_drop_last": False,
    "order_batch": None,
    PROMPT_FIELD: asdict(DEFAULT_TEMPLATE),
}
# What decides the batches: it may change as long as every optimizer step sees the same samples.
BATCH_KEYS = ("train_bs", "num_processes", "gradient_accumulation_steps", "order_batch")
LARGEST_BATCH = 2**31  # more samples or processes are no sensible record
DIGEST_SAMPLES, DIGEST_LENGTH = 64, 16  # of the files named in the record: pieces that are hashed, digits that are kept


def run_settings(args: SatArguments, template: PromptTemplate) -> dict[str, Any]:
    """What decides the course of a run: options, prompt, number of processes, and the content of the files named."""
    values = option_values(args)
    settings = {name: values[name] for name in RESUME_KEYS} | {"num_processes": args.training.processes}
    settings["order_batch"] = args.training.order_batch
    settings[PROMPT_FIELD] = asdict(template)
    files: dict[str, Any] = {"restore_path": args.model.modelopt_restore_path}
    if args.data.uses_records:
        files["data_path"] = args.data.train_file
    digests = {name: file_digest(path, DIGEST_SAMPLES)[:DIGEST_LENGTH] for name, path in files.items() if path}
    if args.data.text_path:
        keys = [content_key(source, DIGEST_SAMPLES) for source in parse_sources(args.data.text_path)]
        digests["text_path"] = (keys[0] if len(keys) == 1 else "+".join(keys))[: DIGEST_LENGTH * len(keys)]
    return settings | digests


def order_batch(args: SatArguments, samples: int) -> int:
    """Samples of a micro-batch over all processes, by which the run orders its data; for a resumed run as it began.

    The optimizer steps of a resumed run then see the samples they would have seen, on any number of processes.

    Args:
        samples: training samples in all.

    Raises:
        UserError: the run to resume has other optimizer steps, or its record is damaged.
    """
    training = args.training
    now = training.per_device_train_batch_size * training.processes
    record, checkpoint = training.result_dir / RUN_RECORD, checkpoint_to_resume(args)
    if checkpoint is None or not record.is_file():
        return now
    before: Any = read_record(record)
    size, processes, accumulated = (
        before.get(name, value)
        for name, value in (
            ("train_bs", training.per_device_train_batch_size),
            ("num_processes", training.processes),
            ("gradient_accumulation_steps", training.gradient_accumulation_steps),
        )
    )
    if processes != training.processes and not training_state.is_saved_in(checkpoint):
        raise UserError(
            f"{checkpoint} is of an earlier release and resumes only on {processes} process(es), not on "
            f"{training.processes}; set --num_processes {processes}"
        )
    step = size * processes * accumulated
    if now * training.gradient_accumulation_steps != step:
        raise UserError(
            f"--resume needs optimizer steps of {step} samples (--train_bs {size} on {processes} process(es), "
            f"--gradient_accumulation_steps {accumulated}), found {now * training.gradient_accumulation_steps}; "
            "change --train_bs or --gradient_accumulation_steps"
        )
    batch = before.get("order_batch") or size * processes
    used = samples // batch * batch if training.dataloader_drop_last else samples
    if now != size * processes and used % now:
        raise UserError(
            f"--resume on {training.processes} process(es) with --train_bs {training.per_device_train_batch_size} does "
            f"not divide the {used} samples of an epoch; choose a --train_bs that divides it, and more "
            "--gradient_accumulation_steps"
        )
    return batch


def checkpoint_to_resume(args: SatArguments) -> Path | None:
    """The complete checkpoint from which this run resumes; None to start at the beginning.

    Raises:
        UserError: the one that was named is not complete.
    """
    wanted = args.training.resume_from_checkpoint
    if wanted and str(wanted).lower() not in ("true", "1"):
        if not checkpoints.is_complete(Path(wanted)):
            raise UserError(f"--resume_from_checkpoint {wanted} is not a complete checkpoint of finetune.py")
        return Path(wanted)
    return checkpoints.last_complete(Path(args.training.output_dir)) if args.training.resume or wanted else None


def open_run(args: SatArguments, template: PromptTemplate, is_main: bool) -> Path | None:
    """Prepare a new run, or find where an earlier one stopped.

    Returns:
        The checkpoint to resume from; None to start at the beginning.

    Raises:
        UserError: an earlier run is in the way, or was made with other options.
    """
    settings, root = run_settings(args, template), Path(args.training.output_dir)
    record = args.training.result_dir / RUN_RECORD
    checkpoint, last = checkpoint_to_resume(args), checkpoints.last_complete(root)
    if last and not (args.training.resume or args.training.resume_from_checkpoint):
        raise UserError(
            f"{root} holds checkpoints of an earlier run; add --resume to continue from {last.name}, or remove "
            "the folder, or choose another --output_dir"
        )
    if checkpoint and record.is_file():
        check_same_run(read_record(record), settings, root)
    if is_main:
        checkpoints.remove_partial(root)
        save_json(settings, record)
    return checkpoint


def read_record(path: Path) -> dict[str, Any]:
    """The settings of the run that is to be resumed.

    Raises:
        UserError: the record is damaged.
    """
    content = read_json(path, "run record")
    if not isinstance(content, dict):
        raise UserError(f"run record {path} holds no settings by name; was it changed by hand?")
    for name in BATCH_KEYS:
        value = content.get(name, 1)
        unknown = value is None and name == "order_batch"  # before the data is read, and of earlier releases
        if not unknown and not (is_whole_number(value) and 0 < value < LARGEST_BATCH):
            raise UserError(f"run record {path} has {name} = {value!r}, which is no count; was it changed by hand?")
    return content


def check_same_run(before: dict[str, Any], settings: dict[str, Any], root: Path) -> None:
    """Compare the settings of an earlier run, whose checkpoints are in `root`, with this run's.

    Raises:
        UserError: they differ.
    """
    for name, value in settings.items():
        earlier = before.get(name, EARLIER.get(name, value))
        if earlier != value and name not in BATCH_KEYS:  # see `order_batch`
            what = f"--{name} was {earlier}, now {value}"
            if name == PROMPT_FIELD:
                what = "the prompt template has changed"
            if name in ("restore_path", "text_path", "data_path"):
                what = f"the content of --{name} has changed"
            raise UserError(
                f"--resume needs the settings of the run that it continues: {what}; to start over, remove {root}"
            )
