"""Where the weights of a model that is evaluated lie: on one device, over several, or split by tensor parallelism."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsity.devices import torch_dtype
from sparsity.errors import UserError, first_line
from sparsity.files import scratch_folder
from sparsity.models import empty_model, load_config, load_model
from sparsity.distributed import is_main_process
from sparsity.quantized import quantization_algorithm
from sparsity.modelopt_state import check_state_fits, folded_weights, load_for_inference, load_state

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Placement:
    """How a model is laid out; by default it is on the device of its process.

    Attributes:
        device_map: accelerate's strategy to place layers over all GPUs, then in CPU memory, then on disk.
        max_memory: the most bytes or a size such as "20GiB" by GPU number or "cpu"; None: what is free.
        offload_folder: for layers on disk; None: a temporary one.
        tensor_parallel: split every matrix over the processes, which all work on the same batch.
    """

    device_map: str | None = None
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: str | None = None
    tensor_parallel: bool = False

    def share(self, process: PartialState) -> tuple[int, int]:
        """(index, count) of the part of the batches that this process works on; with tensor parallelism all of them."""
        return (0, 1) if self.tensor_parallel else (process.process_index, process.num_processes)


def choose_placement(args: argparse.Namespace) -> Placement:
    """The placement that the options of `utils.add_placement_options` describe.

    Raises:
        UserError: options exclude each other, or do not suit the number of processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.tensor_parallel and args.device_map:
        raise UserError("--tensor_parallel and --device_map exclude each other; give one of them")
    if args.tensor_parallel and processes == 1:
        raise UserError(
            "--tensor_parallel splits the model over several processes, and this is one; start them with "
            "torchrun --nproc_per_node N, or use --device_map auto"
        )
    if args.device_map and processes > 1:
        raise UserError(
            f"--device_map places one model over the GPUs of one process, and {processes} were started; "
            "start one with python, or use --tensor_parallel"
        )
    if args.device_map and args.device != "auto":
        raise UserError(f"--device {args.device} and --device_map exclude each other; give one of them")
    for name in ("max_memory", "offload_folder"):
        if getattr(args, name) and not args.device_map:
            raise UserError(f"--{name} belongs to --device_map; give that too, for example --device_map auto")
    limits = parse_max_memory(args.max_memory) if args.max_memory else None
    return Placement(args.device_map, limits, args.offload_folder, args.tensor_parallel)


def parse_max_memory(text: str) -> dict[int | str, int | str]:
    """The sizes of --max_memory by GPU number or "cpu".

    Raises:
        UserError: a part is no DEVICE=SIZE, its size is unknown, or a device is named twice.

    >>> parse_max_memory("0=20GiB,cpu=64GiB")
    {0: '20GiB', 'cpu': '64GiB'}
    """
    from accelerate.utils import convert_file_size_to_int

    limits: dict[int | str, int | str] = {}
    for part in text.split(","):
        device, _, size = (word.strip() for word in part.partition("="))
        try:
            convert_file_size_to_int(size)
        except (ValueError, OverflowError):
            size = ""
        is_gpu = re.fullmatch(r"[0-9]{1,9}", device) is not None
        if not size or not (device == "cpu" or is_gpu):
            raise UserError(f"--max_memory takes DEVICE=SIZE, for example 0=20GiB,cpu=64GiB; found '{part}'")
        name = int(device) if is_gpu else device
        if name in limits:
            raise UserError(f"--max_memory names {device} twice: {text}")
        limits[name] = size
    return limits


# ------------------------------------------------------------------------------------------------------------ loading


def load_placed(
    model: str,
    dtype: str | None,
    state: str | Path | None,
    trust_remote_code: bool,
    placement: Placement,
    device: torch.device,
) -> PreTrainedModel:
    """The dense model, or with the path of a state the sparse one with its masks folded in, ready to compute.

    Where the model is spread or split, each weight goes straight to its place: neither the GPUs nor the processes ever
    hold a whole copy. One line says what lies where.

    Args:
        dtype: a key of DTYPES; None keeps the checkpoint's own.
        device: of this process.

    Raises:
        UserError: as `load_for_inference`, or the model cannot be placed so.
    """
    if not (placement.device_map or placement.tensor_parallel):
        return load_for_inference(model, dtype, state, trust_remote_code).to(device)
    config = load_config(model, trust_remote_code)
    if algorithm := quantization_algorithm(config, model):
        raise UserError(
            f"'{model}' is quantized ({algorithm}) and is read on one device only; drop --device_map and "
            "--tensor_parallel, or give the unquantized model"
        )
    if placement.tensor_parallel:
        check_tensor_parallel(config, device)
    wanted = torch_dtype(dtype) if dtype else "auto"
    with contextlib.ExitStack() as stack:
        options = placing_options(placement, stack)
        with whole_tied_head(empty_model(config, trust_remote_code=trust_remote_code)):
            if state:
                loaded = load_sparse(model, wanted, state, trust_remote_code, options)
            else:
                loaded = load_model(model, wanted, trust_remote_code, placing=options)
        weakref.finalize(loaded, stack.pop_all().close)  # the model reads a folder of offloaded layers while it lives
    if is_main_process():
        print(describe_placement(loaded, placement), flush=True)
    return loaded


def placing_options(placement: Placement, stack: contextlib.ExitStack) -> dict[str, Any]:
    """What `from_pretrained` takes for a placement; closing `stack` removes the temporary folder for layers on disk."""
    if placement.tensor_parallel:
        return {"tp_plan": "auto"}
    folder = placement.offload_folder or str(stack.enter_context(scratch_folder(prefix="hf-sparsity.offload.")))
    return {"device_map": placement.device_map, "max_memory": placement.max_memory, "offload_folder": folder}


@contextlib.contextmanager
def whole_tied_head(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, tensor parallelism leaves an output head whole that is tied to embeddings that are left whole.

    Some releases of transformers 5 do not split the embeddings but have a plan for the head. Each process would compute
    all logits, and gathering them would repeat every token as many times as there are processes.
    """
    cls: Any = type(model)
    plan, head, embeddings = getattr(cls, "_tp_plan", None), model.get_output_embeddings(), model.get_input_embeddings()
    if plan and head is not None and head.weight is embeddings.weight:
        names = {id(module): name for name, module in model.named_modules()}
        if names[id(embeddings)] not in (getattr(model, "_tp_plan", None) or {}):
            cls._tp_plan = {name: style for name, style in plan.items() if name != names[id(head)]}
    try:
        yield
    finally:
        if plan:
            cls._tp_plan = plan


def load_sparse(
    model: str, dtype: torch.dtype | str, path: str | Path, trust_remote_code: bool, placing: dict[str, Any]
) -> PreTrainedModel:
    """The model with the weights of a modelopt state, placed by `from_pretrained` as `placing` says.

    The state has all weights, so the dense ones are not read. They come from the memory-mapped file; pruned weights are
    zero in it, and matrices of which that is not true are masked in memory first.
    """
    config = load_config(model, trust_remote_code)
    weights = load_state(path)["model_state_dict"]
    empty = empty_model(load_config(model, trust_remote_code), trust_remote_code=trust_remote_code)
    check_state_fits(weights, empty, path)
    config.get_text_config().vocab_size = empty.get_input_embeddings().weight.shape[0]
    if dtype == "auto":
        dtype = config.dtype or next(iter(weights.values())).dtype
    create: Any = type(empty).from_pretrained
    try:
        loaded = create(None, config=config, state_dict=folded_weights(weights), dtype=dtype, **placing)
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # the last: transformers 4 with weights on disk
        raise UserError(
            f"cannot place the weights of {path}: {first_line(error)}; write the model with export_hf.py and evaluate "
            "its folder"
        ) from error
    loaded.generation_config = own_generation_config(model) or loaded.generation_config
    return loaded.eval()


def own_generation_config(model: str) -> Any:
    """The generation settings that belong to a checkpoint, or None; a model made from tensors does not read them."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return None


# ------------------------------------------------------------------------------------------------- checks and reports


def check_tensor_parallel(config: PretrainedConfig, device: torch.device) -> None:
    """Check that transformers can split this model over the processes.

    Raises:
        UserError: it has no plan for the architecture, sizes that do not divide, or another device in mind.
    """
    import transformers

    processes = int(os.environ["WORLD_SIZE"])
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise UserError(
            f"transformers {transformers.__version__} has no tensor-parallel plan for models of type "
            f"'{text.model_type}'; use --device_map auto"
        )
    if device.type == "cpu" and torch.cuda.is_available():
        raise UserError("--tensor_parallel splits over the GPUs where there are some; drop --device cpu")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        size = getattr(text, name, None)
        if isinstance(size, int) and size % processes:
            raise UserError(
                f"--tensor_parallel cannot split the model's {name} {size} over {processes} processes; "
                "use a number that divides it"
            )


def describe_placement(model: PreTrainedModel, placement: Placement) -> str:
    """One line that says which share of the weights lies where, and what is slow."""
    if placement.tensor_parallel:
        return f"weights split over {os.environ['WORLD_SIZE']} processes by tensor parallelism"
    only = "cpu" if model.device.type == "cpu" else model.device.index
    places = getattr(model, "hf_device_map", None) or {"": only}
    bytes_on: dict[str, int] = {}
    for name, weight in model.named_parameters():
        prefix = max((key for key in places if key in ("", name) or name.startswith(f"{key}.")), key=len)
        place = places[prefix]
        label = f"GPU {place}" if isinstance(place, int) else {"cpu": "CPU memory"}.get(str(place), str(place))
        bytes_on[label] = bytes_on.get(label, 0) + weight.nbytes
    total = sum(bytes_on.values())
    shares = ", ".join(f"{size / total:.0%} on {label}" for label, size in bytes_on.items())
    offloaded = "disk" in bytes_on or (len(bytes_on) > 1 and "CPU memory" in bytes_on)
    slow = "; those off the GPUs are moved in every forward pass, which is slow" if offloaded else ""
    return f"weights: {shares}{slow}"


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs; weights of layers that are moved there for each pass say nothing about it."""
    places = getattr(model, "hf_device_map", None) or {}
    computing = [place for place in places.values() if place not in ("cpu", "disk")]
    if not places:
        return model.device
    return torch.device(computing[0] if computing else "cpu")
