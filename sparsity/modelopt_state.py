"""Sparse states of modelopt: reading them safely, checking that they fit a model, and restoring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsity.devices import torch_dtype
from sparsity.errors import UserError, reported_as, warn
from sparsity.files import require_file
from sparsity.models import computing_fields, load_model, shared_names
from sparsity.pattern import DENSE, Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASK = "_weight_mask"  # modelopt's buffer beside the weight that it masks
PATTERN, CONFIG = "pattern", "config"  # keys in the metadata of modelopt's sparse mode
EXPERT_MASKS = "expert_masks"  # key of a state file


def mask_name(weight_name: str) -> str:
    """Name of the mask of a weight in a state dict.

    >>> mask_name("model.layers.0.mlp.up_proj.weight"), mask_name("mlp.experts.gate_up_proj")
    ('model.layers.0.mlp.up_proj._weight_mask', 'mlp.experts._gate_up_proj_mask')
    """
    module, dot, leaf = weight_name.rpartition(".")
    return f"{module}{dot}_{leaf}_mask"


def is_mask(name: str) -> bool:
    """Whether a state dict's entry of this name is a mask."""
    leaf = name.rpartition(".")[2]
    return leaf.startswith("_") and leaf.endswith("_mask")


def weight_name(mask: str) -> str:
    """Name of the weight of a mask; the inverse of `mask_name`."""
    module, dot, leaf = mask.rpartition(".")
    return module + dot + leaf.removeprefix("_").removesuffix("_mask")


def without_expert_masks(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that modelopt's own model has: weights, and masks of linear layers."""
    return {name: tensor for name, tensor in state_dict.items() if not (is_mask(name) and tensor.dim() > 2)}


def state_to_save(modelopt_state: dict[str, Any], state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The content of a state file, which `modelopt.torch.opt.restore` reads.

    Modelopt masks linear layers only. Masks of experts stand beside what it reads, and their zeros in the weights.
    """
    tensors = without_expert_masks(state_dict)
    masks = {name: tensor for name, tensor in state_dict.items() if name not in tensors}
    state = {"modelopt_state": modelopt_state, "model_state_dict": tensors}
    return {**state, EXPERT_MASKS: masks} if masks else state


def sparse_masks(state_dict: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (weight name, weight, bool mask) for every masked weight of a state dict.

    Both are [out, in]; of experts they are [experts, out, in] or [experts, in, out].
    """
    for name, mask in state_dict.items():
        if is_mask(name):
            yield weight_name(name), state_dict[weight_name(name)], mask


def not_plus_zero(weight: Tensor) -> Tensor:
    """Where a tensor of any dtype is stored as anything but +0, bit by bit; bool."""
    return weight.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]) != 0


def pruned_errors(weight: Tensor, mask: Tensor) -> int:
    """Number of pruned elements of a weight [out, in] of any dtype that are not stored as +0, bit by bit.

    Args:
        mask: bool [out, in]; False where pruned.
    """
    return int((not_plus_zero(weight) & ~mask).sum())


def load_state(path: str | Path) -> dict[str, Any]:
    """Memory-map a modelopt state file without running any pickled code.

    Returns:
        {"modelopt_state": …, "model_state_dict": name → tensor}, with masks of experts among the tensors.

    Raises:
        UserError: missing, truncated, not such a file, or with masks that do not match their weights.
    """
    path = require_file(path, "modelopt state")
    # torch raises RuntimeError, UnpicklingError, EOFError, … for a damaged zip.
    with reported_as(f"{path} is not a readable modelopt state (damaged, truncated or unsafe)", Exception):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = state.get("model_state_dict") if isinstance(state, dict) else None
    if not isinstance(tensors, dict) or "modelopt_state" not in state:
        raise UserError(
            f"{path} is not a modelopt state: it lacks modelopt_state and model_state_dict; make it with hf_pts.py"
        )
    tensors |= state.pop(EXPERT_MASKS, {})
    for name, tensor in tensors.items():
        if not _is_valid(name, tensor, tensors):
            raise UserError(f"state {path} is damaged: '{name}' is no dense tensor, or a mask that fits no weight")
    return state


def _is_valid(name: Any, tensor: Any, tensors: dict[str, Any]) -> bool:
    """Whether an entry of a state dict is a dense tensor, and if it is a mask, a bool one of its weight's shape."""
    if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided) or tensor.is_meta:
        return False
    if not is_mask(name):
        return True
    weight = tensors.get(weight_name(name))
    fits = isinstance(weight, Tensor) and weight.is_floating_point() and weight.shape == tensor.shape
    return fits and tensor.dtype == torch.bool


def require_masks(state_dict: dict[str, Tensor], path: str | Path) -> list[str]:
    """Names of the masks of a state that was read from `path`.

    Raises:
        UserError: it has none.
    """
    masks = [name for name in state_dict if is_mask(name)]
    if not masks:
        raise UserError(f"state {path} holds no masks: its model was never made sparse; make one with hf_pts.py")
    return masks


def metadata(state: dict[str, Any]) -> dict[str, Any]:
    """What is kept with modelopt's modes in a state: of states by hf_pts.py, PATTERN and CONFIG."""
    found: dict[str, Any] = {}
    with suppress(KeyError, TypeError, ValueError):  # of another structure, which modelopt will refuse
        for _, mode in state["modelopt_state"]["modelopt_state_dict"]:
            found |= mode["metadata"]
    return found if isinstance(found.get(CONFIG, {}), dict) else {}


def pattern_of(state: dict[str, Any], path: str | Path) -> Pattern:
    """The pattern of a state that was read from `path`; 2:4, modelopt's own, where it names none.

    Raises:
        UserError: it is no pattern.
    """
    pattern = metadata(state).get(PATTERN)
    return Pattern.parse(str(pattern), f"state {path}") if pattern else Pattern()


def sparsity_name(path: str | Path | None) -> str | None:
    """The pattern of a state file, if any; DENSE if it has no masks, as after training without --restore_path."""
    if not path:
        return None
    state = load_state(path)
    return str(pattern_of(state, path)) if any(map(is_mask, state["model_state_dict"])) else DENSE


# ------------------------------------------------------------------------------------------------------------- fitting


def grow_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give embedding and output head `rows` rows; new rows are the mean of the existing ones.

    Reference scripts add a padding token before they prune where a tokenizer has none, so their states have more rows.
    """
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                weight = module.weight
                weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)


def fit_vocabulary(state_dict: dict[str, Tensor], model: PreTrainedModel, path: str | Path) -> None:
    """Grow the vocabulary of `model`, with a warning, if the state has more rows in its embedding."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding) + ".weight"
    before, width = embedding.weight.shape
    saved = state_dict.get(name)
    if saved is None or saved.shape[1:] != (width,) or len(saved) <= before:
        return
    rows = len(saved)
    grow_vocabulary(model, rows)
    warn(
        f"state {path} has {rows} tokens and the model {before}: embedding and output head get {rows - before} more "
        "row(s), as if a [PAD] token had been added before pruning"
    )


def check_ties(state_dict: dict[str, Tensor], model: PreTrainedModel, path: str | Path) -> None:
    """Check that a state has one value for weights that are one tensor in `model`.

    Raises:
        UserError: it has two.
    """
    for name, other in shared_names(model).items():
        if {name, other} <= state_dict.keys() and not torch.equal(state_dict[name], state_dict[other]):
            raise UserError(
                f"state {path} belongs to another model: '{name}' and '{other}' are tied in the model, not in the state"
            )


def check_config(state: dict[str, Any], model: PreTrainedModel, path: str | Path) -> None:
    """Check that a state was made from a model that computes as `model` does, as far as the state knows.

    Fields that only one of them has are skipped: they come and go between versions of transformers.

    Raises:
        UserError: a field of the configuration, such as rope_parameters or num_attention_heads, differs.
    """
    made_from, own = metadata(state).get(CONFIG, {}), computing_fields(model.config)
    for key in sorted(made_from.keys() & own.keys()):
        if made_from[key] != own[key]:
            raise UserError(
                f"state {path} belongs to another model: {key} is {made_from[key]} in the state and {own[key]} in the "
                "model"
            )


def check_state_fits(state: dict[str, Any], model: PreTrainedModel, path: str | Path) -> None:
    """Check that a state belongs to `model` (which may be on the meta device): configuration, names and shapes.

    If the state only has more tokens, `model` and its configuration are given their rows first.

    Raises:
        UserError: the state, read from `path`, belongs to another model.
    """
    tensors = state["model_state_dict"]
    check_config(state, model, path)
    fit_vocabulary(tensors, model, path)
    check_ties(tensors, model, path)
    _compare_shapes({name: tensor for name, tensor in tensors.items() if not is_mask(name)}, model, path)


def _compare_shapes(tensors: dict[str, Tensor], model: PreTrainedModel, path: str | Path) -> None:
    saved = {name: tensor.shape for name, tensor in tensors.items()}
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    different = saved.keys() ^ own.keys() or {name for name in saved if saved[name] != own[name]}
    if different:
        name = min(different)
        shapes = [list(shape) if shape is not None else "absent" for shape in (saved.get(name), own.get(name))]
        raise UserError(
            f"state {path} belongs to another model: '{name}' is {shapes[0]} in the state and {shapes[1]} in the model"
        )


# ----------------------------------------------------------------------------------------------------------- restoring


def folded(state_dict: dict[str, Tensor], name: str) -> Tensor:
    """Tensor `name` of a state, with +0.0 where its mask prunes; not copied if it is so already."""
    weight, mask = state_dict[name], state_dict.get(mask_name(name))
    return weight if mask is None or not pruned_errors(weight, mask) else weight.masked_fill(~mask, 0)


def folded_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state without its masks, pruned ones +0.0."""
    return {name: folded(state_dict, name) for name in state_dict if not is_mask(name)}


def load_weights(model: PreTrainedModel, state: dict[str, Any], path: str | Path) -> None:
    """Copy the weights of a sparse state, read from `path`, into a freshly loaded dense `model`, which keeps its dtype.

    Pruned weights are zero, and layers stay plain. Their outputs equal those of modelopt's masked layers, which
    multiply weight and mask in every forward pass and so take longer than decoding a token.

    Raises:
        UserError: the state belongs to another model.
    """
    check_state_fits(state, model, path)
    model.load_state_dict(folded_weights(state["model_state_dict"]))


def restore_sparse(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """Apply a modelopt state file (masks and weights) to a freshly loaded dense `model`, in place.

    Raises:
        UserError: the file is unreadable, or belongs to a model of other layers or sizes.
    """
    state = load_state(path)
    model = restore_layers(model, state, path)
    model.load_state_dict(without_expert_masks(state["model_state_dict"]))
    return model


def restore_layers(model: PreTrainedModel, state: dict[str, Any], path: str | Path) -> PreTrainedModel:
    """Turn the layers of a dense `model` (which may be on the meta device) into modelopt's sparse ones, in place.

    Weights and masks keep their values; the state is checked to have each of them in its shape.

    Raises:
        UserError: the state belongs to a model of other layers or sizes.
    """
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity  # noqa: F401  # registers the sparsity modes

    check_state_fits(state, model, path)
    # modelopt trusts the file's settings and fails in many ways on wrong ones.
    with reported_as(f"state {path} does not fit the model", Exception):
        model = mto.restore_from_modelopt_state(model, state["modelopt_state"])
    _compare_shapes(without_expert_masks(state["model_state_dict"]), model, path)
    return model


def load_for_inference(
    model: str, dtype: str | None, state: str | Path | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The dense model, or with a state's path the sparse one with its masks folded in, on the CPU.

    Args:
        dtype: a key of DTYPES; None keeps the checkpoint's own.

    Raises:
        UserError: see `load_model`, `load_state` and `load_weights`.
    """
    loaded = load_model(model, torch_dtype(dtype) if dtype else "auto", trust_remote_code, quantized=state is None)
    if state:
        load_weights(loaded, load_state(state), state)
    return loaded
