"""Quantizing a model with folded masks by modelopt, and the proof that what was pruned is still zero in the files.

Symmetric quantization maps 0 to 0, so a 2:4 matrix stays 2:4; rounding may only add zeros.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsity.errors import UserError, reported_as
from sparsity.export.weights import in_checkpoint_format
from sparsity.files import open_safetensors, read_json, safetensors_files
from sparsity.modelopt_state import pruned_errors, sparse_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def _quiet_modelopt() -> Iterator[None]:
    """Keep modelopt's progress lines and its warnings about code of its own from the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def quantize(model: PreTrainedModel, settings: str, batches: list[Tensor], device: torch.device) -> PreTrainedModel:
    """Insert modelopt's quantizers, calibrated on `batches` of token ids, in place.

    Args:
        settings: name of a configuration in modelopt.torch.quantization.

    Raises:
        UserError: modelopt cannot quantize this architecture.
    """
    import modelopt.torch.quantization as mtq
    from tqdm import tqdm

    def calibrate(prepared: PreTrainedModel) -> None:
        # The decoder without its head, which stays in full precision: logits would take time and memory.
        decoder = prepared.base_model
        for batch in tqdm(batches, desc="calibration", disable=None):
            decoder(input_ids=batch.to(device), use_cache=False)

    model.to(device)
    errors = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
    message = f"modelopt cannot quantize {type(model).__name__}; leave out --quantization"
    with reported_as(message, *errors), _quiet_modelopt(), torch.inference_mode():
        return mtq.quantize(model, vars(mtq)[settings], calibrate if batches else None)


def write_quantized(model: PreTrainedModel, shard_size: str, folder: Path) -> dict[str, Any]:
    """Write a quantized model into an existing folder with modelopt's exporter.

    Returns:
        The quantization_config that belongs into config.json; hf_quant_config.json in the folder says the same.

    Raises:
        UserError: modelopt cannot export this architecture.
    """
    from modelopt.torch.export import export_hf_checkpoint

    errors = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)  # not a full disk
    message = f"modelopt cannot export {type(model).__name__} quantized; leave out --quantization"
    with reported_as(message, *errors), _quiet_modelopt(), torch.inference_mode():
        export_hf_checkpoint(model, export_dir=folder, max_shard_size=shard_size)
    return read_json(folder / "config.json", "model configuration")["quantization_config"]


def check_zeros(folder: Path, model: PreTrainedModel, state: dict[str, Tensor]) -> int:
    """Prove on the written files that each element which a mask prunes is stored as +0, bit by bit.

    Args:
        model: for the names that tensors have in files; may be on the meta device.  state: with the masks.

    Returns:
        The number of pruned elements.

    Raises:
        UserError: a matrix is missing, has another shape (e.g. packed), or holds something else under its mask.
    """
    masks = in_checkpoint_format(model, {name: mask for name, _, mask in sparse_masks(state)})
    pruned = 0
    for file in safetensors_files(folder):
        with open_safetensors(file) as tensors:
            for name in masks.keys() & set(tensors.keys()):
                mask, weight = masks.pop(name), tensors.get_tensor(name)
                if weight.shape != mask.shape:
                    raise UserError(f"{name} is stored as {list(weight.shape)}, its mask is {list(mask.shape)}")
                if wrong := pruned_errors(weight, mask):
                    raise UserError(f"{wrong} pruned weights of {name} are not 0 in the quantized files")
                pruned += int((~mask).sum())
    if masks:
        raise UserError(f"the quantized files lack {len(masks)} pruned matrices, the first is {min(masks)}")
    return pruned
