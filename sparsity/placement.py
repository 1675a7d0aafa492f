"""Where the weights of an evaluated model are: on one device, or spread over GPUs, CPU memory and disk."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity.attention import use_blocked_attention
from sparsity.devices import torch_dtype
from sparsity.errors import UserError, reported_as
from sparsity.modelopt_state import check_state_fits, folded_weights, load_for_inference, load_state
from sparsity.models import load_config, load_model, load_structure
from sparsity.quantized import quantization_algorithm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_placement(args: argparse.Namespace) -> None:
    """Check the options of `utils.add_placement_options`.

    Raises:
        UserError: --max_memory without --device_map, a malformed --max_memory, or several processes.
    """
    if args.max_memory and not args.device_map:
        raise UserError("--max_memory requires --device_map")
    if args.device_map and args.device != "auto":
        raise UserError(f"--device_map chooses the devices; drop --device {args.device}")
    if args.device_map and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--device_map spreads the model over the GPUs of one process; start it with python")
    parse_max_memory(args.max_memory)


def parse_max_memory(text: str | None) -> dict[int | str, str] | None:
    """The sizes of --max_memory by GPU number or "cpu"; None for no limits.

    Raises:
        UserError: a part is no DEVICE=SIZE, or its size is unknown.

    >>> parse_max_memory("0=20GiB,cpu=64GiB")
    {0: '20GiB', 'cpu': '64GiB'}
    """
    from accelerate.utils import convert_file_size_to_int

    limits: dict[int | str, str] = {}
    for part in text.split(",") if text else ():
        device, _, size = part.partition("=")
        wrong = f"--max_memory takes DEVICE=SIZE, e.g. 0=20GiB,cpu=64GiB; got '{part}'"
        with reported_as(wrong, ValueError, OverflowError):
            convert_file_size_to_int(size)
            limits["cpu" if device == "cpu" else int(device)] = size
    return limits or None


def load_placed(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The model of --model_dir, with --modelopt_restore_path a sparse one with its masks folded in, ready to compute.

    With --device_map each weight goes straight to its place, so no device ever holds a whole copy.

    Args:
        args: the options of `utils.add_inference_options` and `utils.add_placement_options`.
        device: of a model that is not spread.

    Raises:
        UserError: as `load_for_inference`, or the model cannot be placed.
    """
    model, state, trusted = args.model_dir, args.modelopt_restore_path, args.trust_remote_code
    if not args.device_map:
        loaded = load_for_inference(model, args.dtype, state, trusted).to(device)
    else:
        if algorithm := quantization_algorithm(load_config(model, trusted), model):
            raise UserError(f"'{model}' is quantized ({algorithm}), which works on one device only; drop --device_map")
        offload = tempfile.mkdtemp(prefix="hf-sparsity-offload-")  # for layers on disk
        atexit.register(shutil.rmtree, offload, ignore_errors=True)
        limits = parse_max_memory(args.max_memory)
        placing = {"device_map": args.device_map, "max_memory": limits, "offload_folder": offload}
        dtype = torch_dtype(args.dtype) if args.dtype else "auto"
        if state:
            loaded = load_sparse(model, dtype, state, trusted, placing)
        else:
            loaded = load_model(model, dtype, trusted, placing=placing)
        places = Counter(map(str, vars(loaded).get("hf_device_map", {"": loaded.device}).values()))
        print("modules by device: " + ", ".join(f"{place}: {count}" for place, count in places.items()), flush=True)
    use_blocked_attention(loaded, input_device(loaded))
    return loaded


def load_sparse(
    model: str, dtype: torch.dtype | str, path: str | Path, trust_remote_code: bool, placing: dict[str, Any]
) -> PreTrainedModel:
    """The model with the weights of a modelopt state, placed by `from_pretrained` as `placing` says.

    They come from the memory-mapped file; the dense ones are not read.
    """
    from transformers import GenerationConfig

    empty = load_structure(model, trust_remote_code)
    state = load_state(path)
    weights = state["model_state_dict"]
    check_state_fits(state, empty, path)
    empty.config.get_text_config().vocab_size = empty.get_input_embeddings().weight.shape[0]
    if dtype == "auto":
        dtype = empty.config.dtype or next(iter(weights.values())).dtype
    create: Any = type(empty).from_pretrained
    # The last error: transformers 4 with weights on disk.
    with reported_as(f"cannot load the weights of {path}", OSError, ValueError, RuntimeError, TypeError):
        loaded = create(None, config=empty.config, state_dict=folded_weights(weights), dtype=dtype, **placing)
    with contextlib.suppress(OSError):  # the checkpoint has none
        loaded.generation_config = GenerationConfig.from_pretrained(model)
    return loaded.eval()


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs; weights of layers that are moved there for each pass say nothing about it."""
    places = vars(model).get("hf_device_map")
    if not places:
        return model.device
    computing = [place for place in places.values() if place not in ("cpu", "disk")]
    return torch.device(computing[0] if computing else "cpu")
