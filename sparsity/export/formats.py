"""The 8-bit formats of --quantization: names of configurations in modelopt.torch.quantization."""

FORMATS = {
    "int8": "INT8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
}
CALIBRATED = ("int8", "int8_sq", "fp8")  # need text for the scales of inputs or SmoothQuant's factors
