"""What a resumed training run must share with the run it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import file_digest, read_json, save_json
from sparsity.sat import checkpoints
from sparsity.sat.arguments import MASK_OPTIONS, SatArguments, option_values
from sparsity.sources import content_key, parse_sources
from sparsity.text import DEFAULT_TEMPLATE, PROMPT_FIELD, RUN_RECORD, PromptTemplate, template_record

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
        "distill_hidden",
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
    "lora_rank": 0,
    "lora_alpha": 32.0,
    "dataloader_drop_last": False,
    PROMPT_FIELD: template_record(DEFAULT_TEMPLATE),
}
DIGEST_SAMPLES, DIGEST_LENGTH = 64, 16  # of the files named in the record: pieces that are hashed, digits that are kept


def run_settings(args: SatArguments, template: PromptTemplate) -> dict[str, Any]:
    """What decides the course of a run: options, prompt, number of processes, and the content of the files named."""
    values = option_values(args)
    settings = {name: values[name] for name in RESUME_KEYS} | {"num_processes": args.training.processes}
    settings[PROMPT_FIELD] = template_record(template)
    files: dict[str, Any] = {"restore_path": args.model.modelopt_restore_path}
    if args.data.uses_records:
        files["data_path"] = args.data.train_file
    digests = {name: file_digest(path, DIGEST_SAMPLES)[:DIGEST_LENGTH] for name, path in files.items() if path}
    if args.data.text_path:
        keys = [content_key(source, DIGEST_SAMPLES) for source in parse_sources(args.data.text_path)]
        digests["text_path"] = (keys[0] if len(keys) == 1 else "+".join(keys))[: DIGEST_LENGTH * len(keys)]
    return settings | digests


def open_run(args: SatArguments, template: PromptTemplate, is_main: bool) -> Path | None:
    """Prepare a new run, or find where an earlier one stopped.

    Returns:
        The checkpoint to resume from; None to start at the beginning.

    Raises:
        UserError: an earlier run is in the way, or was made with other options.
    """
    settings, wanted = run_settings(args, template), args.training.resume_from_checkpoint
    record, root = args.training.result_dir / RUN_RECORD, Path(args.training.output_dir)
    checkpoint = checkpoints.last_complete(root)
    if checkpoint and not (args.training.resume or wanted):
        raise UserError(
            f"{root} holds checkpoints of an earlier run; add --resume to continue from {checkpoint.name}, or remove "
            "the folder, or choose another --output_dir"
        )
    if wanted and str(wanted).lower() not in ("true", "1"):
        checkpoint = Path(wanted)
        if not checkpoints.is_complete(checkpoint):
            raise UserError(f"--resume_from_checkpoint {wanted} is not a complete checkpoint of finetune.py")
    if checkpoint and record.is_file():
        check_same_run(read_json(record, "run record"), settings, root)
    if is_main:
        checkpoints.remove_partial(root)
        save_json(settings, record)
    return checkpoint


def check_same_run(before: dict[str, Any], settings: dict[str, Any], root: Path) -> None:
    """Compare the settings of an earlier run, whose checkpoints are in `root`, with this run's.

    Raises:
        UserError: they differ.
    """
    for name, value in settings.items():
        earlier = before.get(name, EARLIER.get(name, value))
        if earlier != value:
            what = f"--{name} was {earlier}, now {value}"
            if name == PROMPT_FIELD:
                what = "the prompt template has changed"
            if name in ("restore_path", "text_path", "data_path"):
                what = f"the content of --{name} has changed"
            raise UserError(
                f"--resume needs the settings of the run that it continues: {what}; to start over, remove {root}"
            )
