"""Step 2: sparsity-aware training (SAT). Trains the weights that pruning left, with the 2:4 masks held.

    bash launch_finetune.sh --model MODEL --restore_path PTS_DIR/pts_modelopt_state.pth --output_dir OUT \\
        --max_length 1024 --num_epochs 3

Reads DATA_PATH/cnn_train.json and cnn_eval.json (see data_prep.py). Loss is taken on the answers only, and on every
token of --text_path. Writes OUT/finetuned_modelopt_state.pth, OUT/train_log.jsonl, OUT/loss.png and OUT/checkpoints.
Killed runs go on with the same command and --resume.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sat_memory
from model_io import (
    DTYPES,
    bf16_is_faster,
    check_lengths,
    load_config,
    load_model,
    load_state,
    load_tokenizer,
    require_masks,
    restore_sparse,
    sparse_masks,
)
from processes import fail_together, start_processes
from sat_arguments import check_arguments, parse_arguments, planned_steps, training_arguments
from utils import UserError, lock_output_dir, prepare_output_dir, require_file, run_cli, save_torch

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sat_data import Packed
    from sat_trainer import SparseTrainer

STATE_NAME = "finetuned_modelopt_state.pth"


def choose_precision(wanted: str) -> str:
    """Resolve --mixed_precision auto: bf16 where the hardware computes in it, else fp16 on a GPU, else none."""
    import torch

    cuda = torch.cuda.is_available()
    if wanted == "auto":
        if cuda:
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        return "bf16" if bf16_is_faster(torch.device("cpu")) else "no"
    if wanted == "fp16" and not cuda:
        raise UserError("--mixed_precision fp16 needs a CUDA GPU and torch sees none; use bf16 or no")
    return wanted


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def load_data(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> tuple[Dataset | Packed, Dataset | None]:
    """Training and evaluation samples, tokenized once and kept under output_dir/cache.

    Raises:
        UserError: missing, malformed or too small data, or a length that does not fit.
    """
    import sat_data

    cache, records, evaluation = output_dir / "cache", None, None
    if arguments.text_ratio < 1 or not arguments.text_path:
        folder = Path(arguments.data_path)
        files = [folder / "cnn_train.json", folder / "cnn_eval.json"]
        records, evaluation = (
            sat_data.load_records(tokenizer, path, arguments.max_length, cache, arguments.workers) for path in files
        )
        if arguments.max_eval_samples and len(evaluation) > arguments.max_eval_samples:
            evaluation = evaluation.select(range(arguments.max_eval_samples))
    train = records
    if arguments.text_path:
        texts = sat_data.load_texts(
            tokenizer, arguments.text_path, arguments.text_length or arguments.max_length, cache
        )
        train = sat_data.mix(records, texts, arguments.text_ratio, arguments.seed)
    if arguments.packing:
        train = sat_data.Packed(train, arguments.max_length)
    return train, evaluation


def build_trainer(
    arguments: argparse.Namespace,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset | Packed, Dataset | None],
    output_dir: Path,
    precision: str,
    sharded: bool,
) -> SparseTrainer:
    """Assemble the Trainer; the model is wrapped only once training starts."""
    import sat_data
    from sat_loss import LossWeights
    from sat_trainer import SparseTrainer

    train, evaluation = data
    processes = int(os.environ.get("WORLD_SIZE", 1))
    steps, per_epoch = planned_steps(arguments, len(train), processes)
    weights = LossWeights(arguments.distill_kl, arguments.distill_hidden, arguments.distill_temperature)
    return SparseTrainer(
        model=model,
        args=training_arguments(
            arguments, output_dir / "checkpoints", steps, per_epoch, precision, sharded, evaluation is not None
        ),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=sat_data.Collator(tokenizer.pad_token_id, arguments.max_length if arguments.pad_to_max else None),
        loss_weights=weights if arguments.distill else LossWeights(),
        teacher=teacher,
        use_fsdp=sharded,
        group_by_length=arguments.group_by_length,
        keep_checkpoints=arguments.save_total_limit,
        check_masks_every=arguments.check_masks_every,
        log_path=output_dir / "train_log.jsonl",
    )


def save_and_verify(
    trainer: SparseTrainer, modelopt_state: dict[str, Any], dtypes: dict[str, torch.dtype], path: Path
) -> None:
    """Gather the weights, save them with the masks, and check on the saved file that all pruned weights are +0.0."""
    import torch

    from sat_sharding import full_state

    weights = full_state(trainer.accelerator, trainer.model, dtypes)
    if not trainer.args.should_save:
        return
    save_torch({"modelopt_state": modelopt_state, "model_state_dict": weights}, path)
    pruned = intact = 0
    for name, weight, mask in sparse_masks(load_state(path)["model_state_dict"]):
        kept_zero = weight[~mask]
        pruned += kept_zero.numel()
        intact += int(((kept_zero == 0) & ~torch.signbit(kept_zero)).sum())
        if not torch.isfinite(weight).all():
            raise UserError(f"'{name}' in {path} is not finite; train again with a lower --lr")
    if pruned == 0 or intact != pruned:
        raise RuntimeError(f"{pruned - intact} of {pruned} pruned weights in {path} are not zero")
    print(f"verified {path}: {100 * intact / pruned:.0f}% of {pruned:,} pruned weights are 0")


def main() -> None:
    arguments = parse_arguments(__doc__)
    check_arguments(arguments)
    precision = choose_precision(arguments.mixed_precision)

    # Phase 1: cheap checks, before anything heavy is loaded.
    require_file(arguments.restore_path, "PTS state (--restore_path)")
    if arguments.gradient_checkpointing is None:
        arguments.gradient_checkpointing = has_cuda()
    config = load_config(arguments.model, arguments.trust_remote_code)
    check_lengths(config, {"--max_length": arguments.max_length})
    output_dir = prepare_output_dir(arguments.output_dir)
    if arguments.check_only:
        return
    memory = sat_memory.settings_of(arguments, precision)
    if arguments.dry_run:
        print(sat_memory.table(sat_memory.model_shapes(config, arguments.trust_remote_code), memory))
        return

    import modelopt.torch.opt as mto
    from transformers.utils import logging

    import sat_data
    import sat_run
    from decoder import decoder_layers
    from sat_loss import check_packing
    from sat_sharding import configure_fsdp
    from sat_trainer import plot_log

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving, which take a moment; tokenizing and training keep theirs
    process = start_processes("auto")
    sharded = process.num_processes > 1 and arguments.fsdp == "auto"

    # Phase 2: data, tokenized by the main process while the others wait and then read its cache.
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    with fail_together(process):
        if process.is_main_process:
            if not sharded and (arguments.cpu_offload or arguments.teacher_offload):
                raise UserError("--cpu_offload and --teacher_offload need FSDP, that is several processes; drop them")
            lock_output_dir(output_dir)
            load_data(arguments, tokenizer, output_dir)
    with fail_together(process):
        train, evaluation = load_data(arguments, tokenizer, output_dir)
        planned_steps(arguments, len(train), process.num_processes)
        checkpoint = sat_run.open_run(arguments, output_dir, process.is_main_process)

    compute = DTYPES.get(precision, DTYPES["fp32"])

    # Phase 3: the sparse model. modelopt's state is taken now, because wrapping changes the names of the layers.
    with fail_together(process):
        model = load_model(arguments.model, "float32", arguments.trust_remote_code)
        model = restore_sparse(model, arguments.restore_path)
        modelopt_state = mto.modelopt_state(model)
        state = load_state(arguments.restore_path)["model_state_dict"]
        require_masks(state, arguments.restore_path)
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        if arguments.packing:
            check_packing(model, sat_data.Collator(tokenizer.pad_token_id), config.get_text_config().vocab_size)
        teacher = load_model(arguments.model, compute) if arguments.distill else None

    # Phase 4: training.
    layer_class = type(decoder_layers(model)[1][0]).__name__
    if sharded:
        configure_fsdp(arguments.fsdp_version, layer_class, arguments.cpu_offload, arguments.gradient_checkpointing)
    trainer = build_trainer(arguments, model, teacher, tokenizer, (train, evaluation), output_dir, precision, sharded)
    trainer.place_teacher(layer_class, compute, arguments.teacher_offload)
    with sat_run.explain_failures(trainer, lambda: sat_memory.advice(sat_memory.model_shapes(config), memory)):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.interrupted:
        step = trainer.state.global_step
        process.print(
            f"stopped by a signal after step {step}, which is saved; go on with the same command and --resume"
        )
        sys.exit(143)

    # Phase 5: the result.
    save_and_verify(trainer, modelopt_state, dtypes, output_dir / STATE_NAME)
    if process.is_main_process:
        plot_log(output_dir / "train_log.jsonl", output_dir / "loss.png")
        print(f"wrote {output_dir / STATE_NAME}")
    process.wait_for_everyone()


if __name__ == "__main__":
    run_cli(main)
