"""What a resumed training run must share with the run it continues."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import file_digest, is_sealed, read_json, save_json
from sparsity.modelopt_state import sparsity_name
from sparsity.pattern import DENSE
from sparsity.sat import checkpoints
from sparsity.sat.arguments import RESUME, SatArguments, options
from sparsity.sources import content_key, parse_sources
from sparsity.text import PROMPT_FIELD, RUN_RECORD, PromptTemplate

BATCH = "batch"  # field of the run record: it may change as long as every optimizer step sees the same samples


def run_settings(args: SatArguments, template: PromptTemplate) -> dict[str, Any]:
    """What determines the course of a run: options, prompt, batches, and the content of the input files."""
    training = args.training
    settings = {name: value for name, value, notes in options(args) if RESUME in notes}
    settings[BATCH] = {
        "samples": training.per_device_train_batch_size,
        "processes": training.processes,
        "accumulated": training.gradient_accumulation_steps,
        "order": training.order_batch,
    }
    settings[PROMPT_FIELD] = asdict(template)
    state = args.model.modelopt_restore_path
    settings["restore_path"] = file_digest(state) if state else None
    if args.data.uses_records:
        settings["data_path"] = file_digest(args.data.train_file)
    if args.data.text_path:
        settings["text_path"] = [content_key(source) for source in parse_sources(args.data.text_path)]
    settings["sparsity"] = sparsity_name(state) or DENSE
    return settings


def find_checkpoint(args: SatArguments) -> Path | None:
    """The complete checkpoint from which this run resumes; None to start at the beginning. All processes must call it.

    The main process alone reads the checkpoint's files, to compare them with its seal.

    Raises:
        UserError: the named checkpoint is not complete, or an earlier run is in the way.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    named, root = args.training.resume_from_checkpoint, Path(args.training.output_dir)
    chosen = None
    if PartialState().is_main_process:
        if named and named.lower() not in ("true", "1"):
            chosen = Path(named)
            if not is_sealed(chosen):
                raise UserError(f"--resume_from_checkpoint {named} is not a complete checkpoint of finetune.py")
        else:
            chosen = checkpoints.last_complete(root)
        if chosen and not (args.training.resume or named):
            raise UserError(
                f"{root} has checkpoints of an earlier run; add --resume to continue from {chosen.name}, remove the "
                "folder, or choose another --output_dir"
            )
    return broadcast_object_list([chosen])[0]


def order_batch(args: SatArguments, checkpoint: Path | None, samples: int) -> int:
    """Samples of a micro-batch over all processes, by which the run orders its data; a resumed run keeps the first.

    The optimizer steps of a resumed run then see the samples they would have seen, on any number of processes.

    Args:
        checkpoint: the run resumes from it.
        samples: number of training samples.

    Raises:
        UserError: the run to resume has other optimizer steps, or its record is damaged.
    """
    training = args.training
    batch = training.per_device_train_batch_size * training.processes
    record = training.result_dir / RUN_RECORD
    if checkpoint is None or not record.is_file():
        return batch
    before = read_json(record, "run record")[BATCH]
    earlier = before["samples"] * before["processes"]
    step, own_step = earlier * before["accumulated"], batch * training.gradient_accumulation_steps
    if own_step != step:
        raise UserError(
            f"--resume needs optimizer steps of {step} samples (--train_bs {before['samples']} on "
            f"{before['processes']} process(es), --gradient_accumulation_steps {before['accumulated']}), got "
            f"{own_step}; change --train_bs or --gradient_accumulation_steps"
        )
    used = samples // before["order"] * before["order"] if training.dataloader_drop_last else samples
    if batch != earlier and used % batch:
        raise UserError(
            f"--resume on {training.processes} process(es) with --train_bs {training.per_device_train_batch_size} does "
            f"not divide the {used} samples of an epoch; choose a --train_bs that divides it, and more "
            "--gradient_accumulation_steps"
        )
    return before["order"]


def open_run(args: SatArguments, template: PromptTemplate, checkpoint: Path | None) -> None:
    """Record a new run, or check that a resumed one continues its own; only the main process calls it.

    Raises:
        UserError: the earlier run had other settings.
    """
    settings, record = run_settings(args, template), args.training.result_dir / RUN_RECORD
    before = read_json(record, "run record") if checkpoint and record.is_file() else settings
    contents = {PROMPT_FIELD: "the prompt template has changed"}
    contents |= {name: f"the content of --{name} has changed" for name in ("restore_path", "text_path", "data_path")}
    for name, value in settings.items():
        if name != BATCH and before.get(name) != value:
            what = contents.get(name, f"--{name} was {before.get(name)}, now {value}")
            raise UserError(
                f"--resume needs the settings of the run it continues: {what}; to start over, remove "
                f"{args.training.output_dir}"
            )
    checkpoints.remove_partial(Path(args.training.output_dir))
    save_json(settings, record)
