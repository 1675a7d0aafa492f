"""The models of a training run: the sparse student with its masks, and the dense teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsity.models import load_model
from sparsity.sat.batching import Collator
from sparsity.sat.loss import check_packing
from sparsity.sat.masking import use_plain_weights
from sparsity.states import apply_state, grow_vocabulary, load_state, require_masks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sparsity.sat.arguments import SatArguments


@dataclass
class Student:
    """The sparse model on the CPU in float32, and what its state file needs.

    Attributes:
        modelopt_state: taken before the masked layers become plain ones and the model is wrapped for training.
        dtypes: of the tensors in the restored state, by name; the result is saved in them.
    """

    model: PreTrainedModel
    modelopt_state: dict[str, Any]
    dtypes: dict[str, torch.dtype]


def load_student(args: SatArguments, pad_token_id: int) -> Student:
    """Load the dense model and apply the state of --restore_path.

    Raises:
        UserError: the state is unreadable, has no masks or belongs to another model, or the model takes no packed rows.
    """
    import modelopt.torch.opt as mto

    path = args.model.modelopt_restore_path
    state = load_state(path)
    require_masks(state["model_state_dict"], path)
    dtypes = {name: tensor.dtype for name, tensor in state["model_state_dict"].items()}
    model = load_model(args.model.model_name_or_path, "float32", args.model.trust_remote_code)
    model = apply_state(model, state, path)
    if args.training.freeze_embeddings:
        freeze_embeddings(model)
    if args.data.packing:
        check_packing(model, Collator(pad_token_id), model.config.get_text_config().vocab_size)
    modelopt_state = mto.modelopt_state(model)
    return Student(use_plain_weights(model), modelopt_state, dtypes)


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Keep every embedding, and an output head that is tied to one, as it is."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)


def load_teacher(args: SatArguments, vocabulary: int) -> PreTrainedModel | None:
    """The dense model in the compute dtype, on the CPU; None without distillation.

    Args:
        vocabulary: rows of the student's embedding, to which the teacher's is grown.
    """
    if not args.distillation.distill:
        return None
    teacher = load_model(args.model.model_name_or_path, args.training.compute_dtype, args.model.trust_remote_code)
    if vocabulary > teacher.get_input_embeddings().weight.shape[0]:
        grow_vocabulary(teacher, vocabulary)
    return teacher
