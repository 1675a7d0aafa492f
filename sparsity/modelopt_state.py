"""Sparse states of modelopt: reading them safely, checking that they fit a model, and restoring them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity.devices import torch_dtype
from sparsity.distributed import warn
from sparsity.errors import UserError, first_line
from sparsity.files import require_file
from sparsity.models import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MASK = "_weight_mask"  # modelopt's buffer, beside the weight that it masks
SPARSE = -1  # modelopt's setting `is_sparse` of a layer that has a mask; 0 of one that has not


def mask_name(weight_name: str) -> str:
    """Name of the mask of the weight `….weight` in a state dict.

    >>> mask_name("model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj._weight_mask'
    """
    return weight_name.removesuffix("weight") + MASK


def is_mask(name: str) -> bool:
    """Whether a state dict's entry of this name is a mask."""
    return name.endswith(f".{MASK}")


def weight_name(mask: str) -> str:
    """Name of the weight that the mask `…._weight_mask` belongs to; the inverse of `mask_name`."""
    return mask.removesuffix(MASK) + "weight"


def load_state(path: str | Path) -> dict[str, Any]:
    """Memory-map a modelopt state file without running any pickled code.

    Returns:
        {"modelopt_state": …, "model_state_dict": name → tensor}, as `modelopt.torch.opt.save` writes it.

    Raises:
        UserError: missing, truncated or not such a file, or one whose tensors or masks cannot be used.
    """
    path = require_file(path, "modelopt state")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, … for a damaged zip
        raise UserError(
            f"{path} is not a readable modelopt state (damaged, truncated or unsafe): {first_line(error)}"
        ) from None
    if not isinstance(state, dict) or not {"modelopt_state", "model_state_dict"} <= state.keys():
        raise UserError(
            f"{path} is not a modelopt state: it lacks modelopt_state and model_state_dict; make it with hf_pts.py"
        )
    _check_tensors(state["model_state_dict"], path)
    for layer in _sparse_layers(state["modelopt_state"]):
        if mask_name(f"{layer}.weight") not in state["model_state_dict"]:
            raise UserError(f"state {path} is damaged: its settings say that {layer} is sparse, but it has no mask")
    return state


def _sparse_layers(settings: Any) -> list[str]:
    """Names of the layers that modelopt's settings in a state call sparse; none where they are not as expected.

    Settings that modelopt cannot use are refused when it restores them. Once it has folded the masks there are none.
    """
    modes = settings.get("modelopt_state_dict") if isinstance(settings, dict) else None
    modes = [mode for mode in modes if isinstance(mode, tuple) and len(mode) == 2] if isinstance(modes, list) else []
    names: list[str] = []
    for mode, content in modes:
        if mode == "export_sparse":
            return []
        metadata = content.get("metadata") if isinstance(content, dict) else None
        layers = metadata.get("subnet_config") if isinstance(metadata, dict) else None
        for key, value in layers.items() if isinstance(layers, dict) else ():
            if isinstance(key, str) and key.endswith(".is_sparse") and isinstance(value, int) and value == SPARSE:
                names.append(key.removesuffix(".is_sparse"))
    return names


def _check_tensors(tensors: Any, path: Path) -> None:
    """Check that a state dict that was read from `path` holds plain tensors, and masks that suit their weights.

    A mask without a weight is left to `check_state_fits`, which knows what the model has.
    """
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"state {path} is damaged: model_state_dict holds no tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"state {path} is damaged: '{name}' is no plain tensor")
        if not is_mask(name):
            continue
        if tensor.dtype != torch.bool:
            raise UserError(f"state {path} is damaged: mask '{name}' is {tensor.dtype}, not torch.bool")
        weight = tensors.get(weight_name(name), tensor)
        if not isinstance(weight, torch.Tensor) or weight.shape != tensor.shape:
            raise UserError(f"state {path} is damaged: mask '{name}' has no weight of its shape")
        if weight is not tensor and not weight.is_floating_point():
            raise UserError(f"state {path} is damaged: the weight of mask '{name}' is {weight.dtype}, no float")


def require_masks(state_dict: dict[str, torch.Tensor], path: str | Path) -> list[str]:
    """Names of the masks of a state that was read from `path`.

    Raises:
        UserError: it has none.
    """
    masks = [name for name in state_dict if is_mask(name)]
    if not masks:
        raise UserError(f"state {path} holds no masks: its model was never made sparse; make one with hf_pts.py")
    return masks


def grow_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding and the output head `rows` rows; the new ones are the mean of those before, as for no token.

    Reference scripts do this where a tokenizer has no padding token, before they prune: their states have a row more.
    """
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                weight = module.weight
                weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)


def fit_vocabulary(state_dict: dict[str, torch.Tensor], model: PreTrainedModel, path: str | Path) -> None:
    """Grow the vocabulary of `model` if the state has more rows in embedding and head, and is the same elsewhere.

    Says so in one line. What else differs is left to `check_state_fits`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {id(embedding), id(head)}
    names = {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if id(module) in modules}
    own = model.state_dict()
    grown = {
        tensor.shape[0]
        for name, tensor in state_dict.items()
        if name in names and name in own and tensor.dim() == 2 and tensor.shape[1:] == own[name].shape[1:]
    }
    before = embedding.weight.shape[0]
    if len(grown) != 1 or (rows := grown.pop()) <= before:
        return
    grow_vocabulary(model, rows)
    warn(
        f"state {path} has {rows} tokens and the model {before}: embedding and output head get {rows - before} more "
        "row(s), as where a [PAD] token was added before pruning"
    )


def check_state_fits(state_dict: dict[str, torch.Tensor], model: PreTrainedModel, path: str | Path) -> None:
    """Check that a state has exactly the tensors of `model` (which may be on the meta device), masks aside.

    Where the state only has more tokens, `model` and its configuration are given their rows first.

    Raises:
        UserError: names or shapes differ: the state, read from `path`, belongs to another model.
    """
    fit_vocabulary(state_dict, model, path)
    _compare_shapes({name: tensor for name, tensor in state_dict.items() if not is_mask(name)}, model, path)
    for name in state_dict:
        if is_mask(name) and weight_name(name) not in state_dict:
            raise UserError(f"state {path} is damaged: mask '{name}' has no weight")


def _compare_shapes(tensors: dict[str, torch.Tensor], model: PreTrainedModel, path: str | Path) -> None:
    saved = {name: tensor.shape for name, tensor in tensors.items()}
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(saved.keys() ^ own.keys()) + sorted(n for n in saved.keys() & own.keys() if saved[n] != own[n]):
        ours, theirs = own.get(name), saved.get(name)
        raise UserError(
            f"state {path} belongs to another model: '{name}' is {list(theirs) if theirs else 'absent'} in the state "
            f"and {list(ours) if ours else 'absent'} in the model"
        )


def folded(state_dict: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Tensor `name` of a state, +0.0 where its mask prunes; not copied where it is so already."""
    weight, mask = state_dict[name], state_dict.get(mask_name(name))
    if mask is None or not ((weight.ne(0) | weight.signbit()) & ~mask).any():
        return weight
    return weight.masked_fill(~mask, 0)


def folded_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a state without its masks, pruned ones +0.0."""
    return {name: folded(state_dict, name) for name in state_dict if not is_mask(name)}


def load_weights(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy the weights of a sparse state, read from `path`, into a freshly loaded dense `model`, which keeps its dtype.

    Pruned weights are zero, and the layers stay plain ones without masks. They give the outputs of modelopt's masked
    layers, which multiply weight and mask in every forward pass and so take longer than decoding a token.

    Raises:
        UserError: the state belongs to another model.
    """
    check_state_fits(state_dict, model, path)
    model.load_state_dict(folded_weights(state_dict))


def restore_sparse(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """Read a modelopt state file and apply it to a freshly loaded dense `model`; see `apply_state`.

    Raises:
        UserError: the file is unreadable, or belongs to a model of other layers or sizes.
    """
    return apply_state(model, load_state(path), path)


def apply_state(model: PreTrainedModel, state: dict[str, Any], path: str | Path) -> PreTrainedModel:
    """Apply a modelopt state (masks and weights) that was read from `path` to a freshly loaded dense `model`, in place.

    A state with further tokens, such as one of the reference scripts with [PAD], gives the model their rows.

    Raises:
        UserError: the state belongs to a model of other layers or sizes.
    """
    model = restore_layers(model, state, path)
    try:
        model.load_state_dict(state["model_state_dict"])
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"state {path} does not fit the model: {first_line(error)}") from error
    return model


def restore_layers(model: PreTrainedModel, state: dict[str, Any], path: str | Path) -> PreTrainedModel:
    """Turn the layers of a dense `model` (which may be on the meta device) into modelopt's sparse ones, in place.

    Weights and masks are left as they are, but the state is known to have each of them in its shape.

    Raises:
        UserError: the state belongs to a model of other layers or sizes.
    """
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity  # noqa: F401  # registers the sparsity modes

    check_state_fits(state["model_state_dict"], model, path)
    try:
        model = mto.restore_from_modelopt_state(model, state["modelopt_state"])
    except Exception as error:  # modelopt takes the file's settings for its own and fails in many ways on others
        raise UserError(f"state {path} does not fit the model: {first_line(error)}") from error
    _compare_shapes(state["model_state_dict"], model, path)
    return model


def load_for_inference(
    model: str, dtype: str | None, state: str | Path | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The dense model, or with the path of a state the sparse one with its masks folded in, on the CPU.

    Args:
        dtype: a key of DTYPES; None keeps the checkpoint's own.

    Raises:
        UserError: as `load_model`, `load_state` and `load_weights`.
    """
    loaded = load_model(model, torch_dtype(dtype) if dtype else "auto", trust_remote_code, quantized=state is None)
    if state:
        load_weights(loaded, load_state(state)["model_state_dict"], state)
    return loaded


def sparse_masks(state_dict: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (weight name, weight [out, in], bool mask [out, in]) for every masked layer of a state dict."""
    for name, mask in state_dict.items():
        if is_mask(name):
            yield weight_name(name), state_dict[weight_name(name)], mask
