"""Weights that modelopt quantized to 8 bits, as `export_hf.py --quantization` writes them: read back as floats.

Transformers does not know modelopt's format and would take the stored integers for weights. Here a stored weight is
multiplied by its scale, and the inputs of its layer are rounded as a server rounds them, so that a quantized folder is
evaluated on any machine, without its speed. A layer computes, with q of 8 bits,

    y = (s_w q_w) (s_x q_x) + b,   q_x = round(p x / s_x)

where s_w is one number per output row or one for the matrix, s_x one number for the layer or one per token, and p
SmoothQuant's factor per input channel (Xiao et al., 2023, section 4), 1 elsewhere.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError, reported_as
from sparsity.files import open_safetensors, safetensors_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Type that inputs are rounded to, by modelopt's quant_algo; None: not rounded.
INPUT_TYPES = {
    "W8A8_SQ_PER_CHANNEL": torch.int8,
    "W8A16": None,
    "FP8": torch.float8_e4m3fn,
    "FP8_PER_CHANNEL_PER_TOKEN": torch.float8_e4m3fn,
}
SCALES = ("weight_scale", "input_scale", "pre_quant_scale")


def quantization_algorithm(config: PretrainedConfig, model: str) -> str | None:
    """Modelopt's name of a model's quantization; None for a model that modelopt did not quantize.

    Raises:
        UserError: the quantization cannot be read here.
    """
    settings = config.to_dict().get("quantization_config") or {}
    if settings.get("quant_method") != "modelopt":
        return None
    algorithm = str(settings.get("quant_algo"))
    if algorithm not in INPUT_TYPES:
        raise UserError(f"'{model}' is quantized to {algorithm}; only {', '.join(INPUT_TYPES)} can be opened here")
    return algorithm


def read_dequantized(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Read a quantized folder.

    Returns:
        The weights, name → tensor of `dtype`, and the scales of each quantized layer: its name → {"weight_scale": …}.

    Raises:
        UserError: a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in safetensors_files(folder):
        with open_safetensors(file) as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  safe_open is no dict
    scales: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.rpartition(".")[2] in SCALES]:
        layer, _, kind = name.rpartition(".")
        scales.setdefault(layer, {})[kind] = tensors.pop(name)
    for layer, layer_scales in scales.items():
        weight, scale = tensors.get(f"{layer}.weight"), layer_scales.get("weight_scale")
        if weight is None or scale is None or weight.dim() != 2 or scale.shape not in ((), (1,), weight.shape[:1]):
            raise UserError(f"{folder} is damaged: the layer {layer} has no weight with a weight_scale that fits it")
        tensors[f"{layer}.weight"] = weight.float() * (scale.float()[:, None] if scale.dim() else scale.float())
    # A type that torch cannot convert, such as packed 4-bit numbers.
    with reported_as(f"{folder} cannot be read as {dtype}", RuntimeError):
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}, scales


def round_values(values: Tensor, kind: torch.dtype, scale: Tensor | None) -> Tensor:
    """`values` rounded to int8 or float8 steps of `scale`; without one, the scale follows each row's largest value."""
    largest = torch.iinfo(kind).max if kind == torch.int8 else torch.finfo(kind).max
    exact = values.float()
    if scale is None:
        scale = (exact.abs().amax(dim=-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    steps = exact / scale.float()
    if kind == torch.int8:
        rounded = steps.round().clamp(-largest - 1, largest)
    else:
        rounded = steps.clamp(-largest, largest).to(kind).float()
    return (rounded * scale).to(values.dtype)


def round_inputs(model: nn.Module, scales: dict[str, dict[str, Tensor]], algorithm: str) -> None:
    """Have the layers of a model with dequantized weights round their inputs as the algorithm does, in place.

    Args:
        scales: of each quantized layer, from `read_dequantized`.

    Raises:
        UserError: a quantized layer is not a linear layer of the model (e.g. experts that transformers fuses).
    """
    kind = INPUT_TYPES[algorithm]
    modules = dict(model.named_modules())
    for layer, layer_scales in scales.items():
        module = modules.get(layer)
        if not isinstance(module, nn.Linear):
            raise UserError(f"the quantized layer {layer} is not a linear layer of the model; it cannot be evaluated")
        for name in ("input_scale", "pre_quant_scale"):
            # As buffers they follow the model to its device.
            module.register_buffer(name, layer_scales.get(name), persistent=False)
        if kind is not None:
            module.register_forward_pre_hook(partial(_round_input, kind))


def _round_input(kind: torch.dtype, module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    values = inputs[0]
    if module.pre_quant_scale is not None:
        values = values * module.pre_quant_scale.to(values.dtype)
    return (round_values(values, kind, module.input_scale), *inputs[1:])
