"""The 8-bit formats that a sparse model can be exported in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One value of --quantization."""

    modelopt: str  # name of the configuration in modelopt.torch.quantization
    calibrated: bool  # whether it needs calibration text: scales of inputs, or SmoothQuant's factors
    float8: bool = False  # weights in float8_e4m3fn, else in int8


FORMATS = {
    "int8": Format("INT8_DEFAULT_CFG", calibrated=True),
    "int8_sq": Format("INT8_SMOOTHQUANT_CFG", calibrated=True),
    "int8_wo": Format("INT8_WEIGHT_ONLY_CFG", calibrated=False),
    "fp8": Format("FP8_DEFAULT_CFG", calibrated=True, float8=True),
    "fp8_pc_pt": Format("FP8_PER_CHANNEL_PER_TOKEN_CFG", calibrated=False, float8=True),
}
