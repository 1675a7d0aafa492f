"""Write a sparse model as an ordinary Hugging Face folder: masks folded into the weights, nothing of modelopt left.

    python export_hf.py --model_dir meta-llama/Llama-2-7b-hf --dtype fp16 \\
        --modelopt_restore_path saved_models/finetuned/finetuned_modelopt_state.pth --output_dir exported \\
        --figures "dense=ppl_dense.json" --figures "sparse=ppl_sparse.json" --figures "sparse=rouge_sparse.json"

The folder opens with plain transformers. Its config.json has no sparsity_config: servers either need none or refuse it.
Weights are read from the memory-mapped state and written shard by shard: memory holds a shard or two, never the model.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from companions import source_folder, write_companions
from model_card import load_figures, write_model_card
from model_io import (
    DTYPES,
    check_state_fits,
    empty_model,
    load_config,
    load_state,
    load_tokenizer,
    require_masks,
    sparse_masks,
)
from sparsity_check import inspect_path
from utils import UserError, first_line, prepare_output_dir, run_cli, save_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("sparse model")
    source.add_argument("--model_dir", required=True, help="dense model the state was made from: folder or hub id")
    source.add_argument("--modelopt_restore_path", required=True, metavar="STATE", help="from hf_pts.py or finetune.py")
    source.add_argument(
        "--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint"
    )
    target = parser.add_argument_group("exported folder")
    target.add_argument("--output_dir", required=True, help="folder to create")
    target.add_argument("--overwrite", action="store_true", help="replace --output_dir if it exists")
    target.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: the state's own)")
    target.add_argument("--max_shard_size", default="5GB", help="most bytes in one file (default %(default)s)")
    card = parser.add_argument_group("model card")
    card.add_argument(
        "--figures",
        action="append",
        default=[],
        metavar="LABEL=FILE",
        help="measured figures: JSON of eval.py or eval_ppl.py, with a label such as dense or sparse; repeatable",
    )
    return parser.parse_args()


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of parameters that share another one's tensor, which a checkpoint leaves out (e.g. a tied lm_head)."""
    first: dict[int, str] = {}
    names = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            names.add(name)
    return names


def folded(state: dict[str, torch.Tensor], name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """Tensor `name` as the sparse model uses it: what its mask prunes is +0.0, floats are cast to `dtype`."""
    tensor = state[name]
    mask = state.get(name.removesuffix("weight") + "_weight_mask")
    if mask is not None:
        tensor = tensor.masked_fill(~mask, 0)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if mask is not None:
        tensor = tensor + 0.0  # IEEE 754: -0.0 + 0.0 is +0.0, and nothing else changes
    return tensor.contiguous()


def in_checkpoint_format(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names and in the shapes that checkpoints of this model have on disk.

    They differ from those in memory where transformers 5 fuses weights on loading, as it does the experts of a mixture.

    Raises:
        UserError: weights that are stored fused lie in different shards.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 loads weights as they are
        return tensors
    try:
        converted = revert_weight_conversion(model, dict(tensors))
    except Exception as error:  # of many kinds, one per conversion
        reason = first_line(error)
        raise UserError(
            f"cannot restore the checkpoint's own format ({reason}); try a larger --max_shard_size"
        ) from error
    # What a conversion cuts out of one tensor shares its memory, which safetensors refuses to store.
    return {name: tensor if name in tensors else tensor.contiguous().clone() for name, tensor in converted.items()}


def write_weights(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    names: list[str],
    dtype: torch.dtype | None,
    shard_size: str,
    folder: Path,
) -> int:
    """Write safetensors shards and, if there are several, their index. Returns the number of files."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm

    def planned(tensor: torch.Tensor) -> torch.Tensor:
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=cast, device="meta")

    try:
        plan = split_torch_state_dict_into_shards(
            {name: planned(state[name]) for name in names}, max_shard_size=shard_size
        )
    except ValueError as error:
        raise UserError(f"--max_shard_size {shard_size} is not a size; write e.g. 5GB or 500MB") from error
    weight_map: dict[str, str] = {}
    for file, members in tqdm(plan.filename_to_tensors.items(), desc="shards", disable=None):
        shard = in_checkpoint_format(model, {name: folded(state, name, dtype) for name in members})
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": weight_map}
        save_json(index, folder / "model.safetensors.index.json")
    return len(plan.filename_to_tensors)


@contextlib.contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that takes its place once the block has ended without error.

    Its name is fixed, so that what a killed export left behind is cleared away by the next one.
    """
    parent = prepare_output_dir(target.parent)
    folder, old = parent / f".{target.name}.unfinished", parent / f".{target.name}.old"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        for path in folder.iterdir():
            path.chmod(0o666 & folder.stat().st_mode)  # safetensors makes files that only their owner can read
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    arguments = parse_arguments()
    target = Path(arguments.output_dir)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not arguments.overwrite):
        raise UserError(f"{target} exists already; choose another --output_dir or add --overwrite")
    figures = load_figures(arguments.figures)
    config = load_config(arguments.model_dir, arguments.trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"'{arguments.model_dir}' is quantized; give the unquantized model that the state was made from"
        )
    load_tokenizer(arguments.model_dir, arguments.trust_remote_code)  # only to find a broken one before the long work
    source = source_folder(arguments.model_dir)
    state = load_state(arguments.modelopt_restore_path)["model_state_dict"]
    require_masks(state, arguments.modelopt_restore_path)
    model = empty_model(config, trust_remote_code=arguments.trust_remote_code)  # tells the tensors, and which are tied
    model.tie_weights()
    check_state_fits(state, model, arguments.modelopt_restore_path)

    tied = tied_names(model)
    names = [name for name in state if not name.endswith("._weight_mask") and name not in tied]
    masked = {name: weight.to("meta") for name, weight, _ in sparse_masks(state)}
    pruned = in_checkpoint_format(model, masked).keys()
    stored = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    dtype = DTYPES[arguments.dtype] if arguments.dtype else stored
    dtype_name = str(dtype).removeprefix("torch.")
    with unfinished_folder(target) as folder:
        files = write_weights(model, state, names, DTYPES.get(arguments.dtype), arguments.max_shard_size, folder)
        write_companions(source, config, dtype_name, folder)
        reports = [report for report in inspect_path(folder, exclude="$^") if report.name in pruned]
        write_model_card(folder, arguments.model_dir, config, dtype_name, reports, figures)
    count = sum(report.is_2_4 for report in reports)
    print(f"{count} of {len(reports)} pruned matrices are 2:4 in the exported files")
    print(f"wrote {target}: {files} weight file(s), {len(names)} tensors, {dtype_name}")


if __name__ == "__main__":
    run_cli(main)
