r"""Step 2: sparsity-aware training (SAT). Trains the weights that pruning left, with the 2:4 masks held.

    bash launch_finetune.sh --model MODEL --restore_path PTS_DIR/pts_modelopt_state.pth --output_dir OUT \
        --max_length 1024 --num_epochs 3

Reads DATA_PATH/cnn_train.json and cnn_eval.json (see data_prep.py). Loss is taken on the answers only, and on every
token of --text_path. Writes OUT/finetuned_modelopt_state.pth, OUT/train_log.jsonl, OUT/loss.png and OUT/checkpoints.
A killed run resumes with the same command and --resume.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from utils import dataclass_parser, run_cli

if TYPE_CHECKING:
    from sparsity.sat.arguments import SatArguments


def parse_args() -> SatArguments:
    from sparsity.sat.arguments import ARGUMENT_TYPES, SatArguments

    program = os.environ.get("FINETUNE_PROG", "finetune.py")
    parser = dataclass_parser(
        ARGUMENT_TYPES,
        __doc__,
        prog=program,
        usage="%(prog)s --model MODEL --restore_path STATE --output_dir FOLDER [options; --help lists them]",
    )
    parser.add_argument(
        *("--no_gradient_checkpointing", "--no-gradient_checkpointing", "--no-gradient-checkpointing"),
        dest="gradient_checkpointing",
        action="store_false",
        default=None,
        help="keep activations; by default on the CPU",
    )
    parser.add_argument(
        "--no-freeze_embeddings", dest="freeze_embeddings", action="store_false", default=True, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--no-group_by_length", dest="group_by_length", action="store_false", default=True, help=argparse.SUPPRESS
    )
    return SatArguments(*parser.parse_args_into_dataclasses(look_for_args_file=False))


def main() -> None:
    args = parse_args()

    # Phase 1: cheap checks, before anything heavy is loaded.
    from sparsity import files, models
    from sparsity.sat import memory
    from sparsity.sat.arguments import check_arguments

    check_arguments(args)
    model_args, training = args.model, args.training

    files.require_file(model_args.modelopt_restore_path, "PTS state (--restore_path)")
    config = models.load_config(model_args.model_name_or_path, model_args.trust_remote_code)
    models.check_lengths(config, {"--max_length": args.data.model_max_length})
    files.prepare_output_dir(training.result_dir)
    if training.check_only:
        return
    if training.dry_run:
        print(memory.table(memory.model_shapes(config, model_args.trust_remote_code), memory.settings_of(args)))
        return

    from transformers.utils import logging

    from sparsity.devices import keep_freed_memory
    from sparsity.distributed import fail_together, start_processes
    from sparsity.reporting.plots import plot_loss
    from sparsity.sat import resume
    from sparsity.sat.callbacks import read_log
    from sparsity.sat.data import load_data, load_generated, training_samples
    from sparsity.sat.model import load_student, load_teacher
    from sparsity.sat.result import STATE_NAME, save_and_verify
    from sparsity.sat.trainer import build_trainer, explain_failures
    from sparsity.text import choose_template

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving, which take a moment; tokenizing and training keep theirs
    process = start_processes("auto")

    # Phase 2: data, tokenized by the main process while the others wait and then read its cache; each process writes a
    # part of the text that the model writes itself.
    tokenizer = models.load_tokenizer(model_args.model_name_or_path, model_args.trust_remote_code)
    template = choose_template(args.data.prompt_template, args.data.chat_template, tokenizer)
    with fail_together(process):
        if process.is_main_process:
            files.lock_output_dir(training.result_dir)
            load_data(args, tokenizer, template)
    with fail_together(process):
        data = load_data(args, tokenizer, template)
        load_generated(args, data, tokenizer, process.device, process.process_index, process.num_processes)
    with fail_together(process):
        train = training_samples(args, data, load_generated(args, data, tokenizer, process.device))
        training.order_batch = resume.order_batch(args, len(train))
        training.schedule(len(train), data.evaluation is not None)
        checkpoint = resume.open_run(args, template, process.is_main_process)

    # Phase 3: the sparse model and its teacher.
    with fail_together(process):
        student = load_student(args, tokenizer.pad_token_id)
        teacher = load_teacher(args, student.model.get_input_embeddings().weight.shape[0])

    # Phase 4: training.
    keep_freed_memory()  # activations of the next step take the place of this one's
    trainer = build_trainer(args, student, teacher, tokenizer, (train, data.evaluation))
    with explain_failures(trainer, lambda: memory.advice(memory.model_shapes(config), memory.settings_of(args))):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.interrupted:
        step = trainer.state.global_step
        process.print(
            f"stopped by a signal after step {step}, which is saved; resume with the same command and --resume"
        )
        sys.exit(143)

    # Phase 5: the result.
    result = training.result_dir / STATE_NAME
    save_and_verify(trainer, student, result)
    if process.is_main_process:
        plot_loss(read_log(training.result_dir / "train_log.jsonl"), training.result_dir / "loss.png")
        print(f"wrote {result}")
    process.wait_for_everyone()


if __name__ == "__main__":
    run_cli(main, "lower --train_bs or --max_length, or set --lora_rank; --dry_run prints the need")
