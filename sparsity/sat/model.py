"""The models of a training run: the sparse student with its masks, and the dense teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsity.distributed import is_main_process
from sparsity.errors import UserError
from sparsity.modelopt_state import check_state_fits, grow_vocabulary, load_state, require_masks, restore_layers
from sparsity.models import load_model, model_without_weights, runs_in_bf16
from sparsity.sat.data import Collator
from sparsity.sat.fsdp import allocate, fill
from sparsity.sat.loss import check_packing
from sparsity.sat.low_rank import add_low_rank, merge
from sparsity.sat.masking import use_plain_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsity.sat.arguments import SatArguments


@dataclass
class Student:
    """The sparse model on the CPU, and what its state file needs.

    Attributes:
        model: in float32; for low-rank training, in the compute dtype with float32 factors.
        modelopt_state: taken before the masked layers become plain ones and the model is wrapped for training.
        tensors: for a model that will be sharded, the whole weights and masks by name, mapped from the state file; the
            model has none of them yet, see `fsdp.fill`.
        dtypes: dtypes of the tensors in the restored state, by name; the result is saved in them.
        merge: after low-rank training, puts the trained tensors into the restored state; None: they are the whole one.
    """

    model: PreTrainedModel
    modelopt_state: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    dtypes: dict[str, torch.dtype]
    merge: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None


def load_student(args: SatArguments, pad_token_id: int) -> Student:
    """Build the model from the state of --restore_path, which has all weights, or without one from the dense model.

    Raises:
        UserError: the state is unreadable, has no masks or belongs to another model, the model does not support packed
            rows, or --lora_rank is too large for it.
    """
    import modelopt.torch.opt as mto

    training, path = args.training, args.model.modelopt_restore_path
    if path:
        state = load_state(path)
        require_masks(state["model_state_dict"], path)
    else:
        name, trusted = args.model.model_name_or_path, args.model.trust_remote_code
        state = {"model_state_dict": load_model(name, trust_remote_code=trusted).state_dict()}
    tensors = state["model_state_dict"]
    # Low-rank training reads the weights straight into the compute dtype, without a float32 copy.
    dtype = training.compute_dtype if training.lora_rank else torch.float32
    model = model_without_weights(args.model.model_name_or_path, dtype, args.model.trust_remote_code)
    if path and training.lora_rank:
        check_state_fits(state, model, path)
        modelopt_state, scale = state["modelopt_state"], training.lora_alpha / training.lora_rank
        embeddings = not training.freeze_embeddings
        add_low_rank(model, tensors, training.lora_rank, scale, training.seed, embeddings)
        merged = partial(merge, tensors, scale=scale)
    else:
        model = restore_layers(model, state, path) if path else model
        modelopt_state, merged = mto.modelopt_state(model), None
        model = use_plain_weights(model, tensors) if path else model
        if training.freeze_embeddings:
            freeze_embeddings(model)
    allocate(model)
    checks_packing = args.data.packing and is_main_process()
    if checks_packing or not training.sharded:
        fill(model, tensors)
    if checks_packing:
        check_packing(model, Collator(pad_token_id), model.config.get_text_config().vocab_size, dtype)
    if not training.sharded and training.compute_dtype == torch.bfloat16 and not runs_in_bf16(model):
        raise UserError(f"{type(model).__name__} does not run in bf16 beside float32; add --mixed_precision no")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    # The trainer empties this dict, while `merge` needs its own.
    whole = dict(tensors) if training.sharded else {}
    return Student(model, modelopt_state, whole, dtypes, merged)


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Freeze every embedding, and an output head that is tied to one."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)


def load_teacher(args: SatArguments, vocabulary: int) -> PreTrainedModel | None:
    """The dense model in the compute dtype, on the CPU; None without distillation.

    If it will be sharded, only the main process loads its weights; see `SparseTrainer.place_teacher`.

    Args:
        vocabulary: rows of the student's embedding; the teacher's is extended to as many.
    """
    if not args.distillation.distill:
        return None
    name, dtype, trusted = args.model.model_name_or_path, args.training.compute_dtype, args.model.trust_remote_code
    elsewhere = args.training.sharded and not is_main_process()
    teacher = model_without_weights(name, dtype, trusted) if elsewhere else load_model(name, dtype, trusted)
    if vocabulary > teacher.get_input_embeddings().weight.shape[0]:
        grow_vocabulary(teacher, vocabulary)
    allocate(teacher)
    return teacher
