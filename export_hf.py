r"""Write a sparse model as an ordinary Hugging Face folder: masks folded into the weights, nothing of modelopt left.

    python export_hf.py --model_dir meta-llama/Llama-2-7b-hf --dtype fp16 \
        --modelopt_restore_path saved_models/finetuned/finetuned_modelopt_state.pth --output_dir exported \
        --figures "dense=ppl_dense.json" --figures "sparse=ppl_sparse.json" --figures "sparse=rouge_sparse.json"

The folder opens with plain transformers. Its config.json has no sparsity_config: servers either need none or refuse it.
Weights are read from the memory-mapped state and written shard by shard: memory holds a shard or two, never the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsity.devices import DTYPES
from sparsity.errors import UserError
from utils import Parser, add_remote_code_option, run_cli


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    source = parser.add_argument_group("sparse model")
    source.add_argument("--model_dir", required=True, help="dense model the state was made from: folder or hub id")
    source.add_argument("--modelopt_restore_path", required=True, metavar="STATE", help="from hf_pts.py or finetune.py")
    add_remote_code_option(source)
    target = parser.add_argument_group("exported folder")
    target.add_argument("--output_dir", required=True, help="folder to create")
    target.add_argument("--overwrite", action="store_true", help="replace --output_dir if it exists")
    target.add_argument("--dtype", choices=DTYPES, help="precision of the weights (by default the state's own)")
    target.add_argument("--max_shard_size", default="5GB", help="most bytes in one file")
    card = parser.add_argument_group("model card")
    card.add_argument(
        "--figures",
        action="append",
        default=[],
        metavar="LABEL=FILE",
        help="measured figures: JSON of eval.py or eval_ppl.py, with a label such as dense or sparse; repeatable",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()

    # Imported once the options are known to be good: `--help` and mistakes need no torch.
    from sparsity import models, states
    from sparsity.devices import torch_dtype
    from sparsity.export import weights
    from sparsity.export.companions import source_folder, write_companions
    from sparsity.export.model_card import load_figures, write_model_card
    from sparsity.matrices import inspect_path

    # Phase 1: checks, before the long work.
    target = Path(args.output_dir)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not args.overwrite):
        raise UserError(f"{target} exists already; choose another --output_dir or add --overwrite")
    figures = load_figures(args.figures)
    config = models.load_config(args.model_dir, args.trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise UserError(f"'{args.model_dir}' is quantized; give the unquantized model that the state was made from")
    models.load_tokenizer(args.model_dir, args.trust_remote_code)  # only to find a broken one before the long work
    source = source_folder(args.model_dir)
    state = states.load_state(args.modelopt_restore_path)["model_state_dict"]
    states.require_masks(state, args.modelopt_restore_path)
    # The empty model shows which tensors there are, and which of them are tied.
    model = models.empty_model(config, trust_remote_code=args.trust_remote_code)
    model.tie_weights()
    states.check_state_fits(state, model, args.modelopt_restore_path)

    # Phase 2: weights, companions and the model card, in a folder that appears whole.
    tied = weights.tied_names(model)
    names = [name for name in state if not states.is_mask(name) and name not in tied]
    masked = {name: weight.to("meta") for name, weight, _ in states.sparse_masks(state)}
    pruned = weights.in_checkpoint_format(model, masked).keys()
    stored = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    cast = torch_dtype(args.dtype) if args.dtype else None
    dtype_name = str(cast or stored).removeprefix("torch.")
    with weights.unfinished_folder(target) as folder:
        files = weights.write_weights(model, state, names, cast, args.max_shard_size, folder)
        write_companions(source, config, dtype_name, folder)
        reports = [report for report in inspect_path(folder, exclude="$^") if report.name in pruned]
        write_model_card(folder, args.model_dir, config, dtype_name, reports, figures)
    count = sum(report.is_2_4 for report in reports)
    print(f"{count} of {len(reports)} pruned matrices are 2:4 in the exported files")
    print(f"wrote {target}: {files} weight file(s), {len(names)} tensors, {dtype_name}")


if __name__ == "__main__":
    run_cli(main)
