r"""Write a model as an ordinary Hugging Face folder: masks folded into the weights, nothing of modelopt left.

    python export_hf.py --model_dir meta-llama/Llama-2-7b-hf --dtype fp16 \
        --modelopt_restore_path saved_models/finetuned/finetuned_modelopt_state.pth --output_dir exported \
        --figures "dense=ppl_dense.json" --figures "sparse=ppl_sparse.json" --figures "sparse=rouge_sparse.json"

The folder opens with plain transformers. Its config.json has no sparsity_config: servers either need none or refuse it.
Weights are read from the memory-mapped state and written shard by shard: memory holds a shard or two, never the model.
Without --modelopt_restore_path the dense model is exported.

    python export_hf.py --model_dir meta-llama/Llama-2-7b-hf --dtype fp16 --quantization fp8 --calib_data calib.jsonl \
        --modelopt_restore_path saved_models/finetuned/finetuned_modelopt_state.pth --output_dir exported-fp8

With --quantization modelopt quantizes the linear layers of the decoder to 8 bits, and every pruned weight is checked to
be zero in the files. This takes the memory of the whole model. Servers open such a folder (docs/deployment.md), plain
transformers do not; eval.py and eval_ppl.py compute it with the rounding of its format.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsity.devices import DTYPES
from sparsity.errors import UserError
from sparsity.export.formats import CALIBRATED, FORMATS
from utils import (
    Parser,
    add_device_options,
    add_model_option,
    add_remote_code_option,
    check_at_least,
    parse_pairs,
    run_cli,
)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    source = parser.add_argument_group("model")
    add_model_option(source, "dense model, from which the state was made: folder or hub id")
    source.add_argument("--modelopt_restore_path", metavar="STATE", help="sparse state from hf_pts.py or finetune.py")
    add_remote_code_option(source)
    target = parser.add_argument_group("exported folder")
    target.add_argument("--output_dir", required=True, help="folder to create")
    target.add_argument("--overwrite", action="store_true", help="replace --output_dir if it exists")
    target.add_argument("--dtype", choices=DTYPES, help="precision of the weights (by default the state's own)")
    target.add_argument("--max_shard_size", default="5GB", help="most bytes in one file")
    quantization = parser.add_argument_group("quantization")
    quantization.add_argument(
        "--quantization",
        choices=FORMATS,
        help="int8: 8-bit integers for weights (one scale per row) and inputs (one per layer); int8_sq: the same with "
        "SmoothQuant; int8_wo: weights only; fp8: float8 with one scale per matrix and per layer; fp8_pc_pt: float8 "
        "with one scale per row and per token",
    )
    quantization.add_argument(
        *("--calib_data", "--dataset"),
        nargs="+",
        metavar="SOURCE[=WEIGHT]",
        help="plain text: files, folders or hub data sets NAME:CONFIG:SPLIT; int8, int8_sq and fp8 need it",
    )
    quantization.add_argument("--calib_size", type=int, default=128, help="number of calibration sequences")
    quantization.add_argument("--model_max_length", type=int, default=1024, help="tokens per calibration sequence")
    quantization.add_argument("--seed", type=int, default=0, help="order in which calibration texts are drawn")
    add_device_options(quantization)
    card = parser.add_argument_group("model card")
    card.add_argument(
        "--figures",
        action="append",
        default=[],
        metavar="LABEL=FILE",
        help="measured figures: JSON of eval.py or eval_ppl.py, with a label such as dense or sparse; repeatable",
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the options before anything is loaded."""
    check_at_least(args, 1, "calib_size")
    check_at_least(args, 2, "model_max_length")
    if args.quantization in CALIBRATED and not args.calib_data:
        raise UserError(f"--quantization {args.quantization} needs calibration text; give it with --calib_data SOURCE")
    if args.calib_data and args.quantization not in CALIBRATED:
        raise UserError(f"--calib_data is only for --quantization {', '.join(CALIBRATED)}; drop it")


def main() -> None:
    args = parse_args()
    check_args(args)

    # Imported once the options are known to be good: `--help` and mistakes need no torch.
    import torch

    from sparsity import modelopt_state, models
    from sparsity.devices import resolve_device, torch_dtype
    from sparsity.export import quantize, weights
    from sparsity.export.companions import source_folder, write_companions
    from sparsity.export.model_card import write_model_card
    from sparsity.files import atomic_folder
    from sparsity.inspection import inspect_path
    from sparsity.metrics import read_metrics
    from sparsity.sources import check_source, draw_sequences, parse_sources

    # Phase 1: checks, before the long work.
    target = Path(args.output_dir)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not args.overwrite):
        raise UserError(f"{target} exists already; choose another --output_dir or add --overwrite")
    figures = [(label, read_metrics(path)) for label, path in parse_pairs("--figures", args.figures)]
    sources = parse_sources(args.calib_data) if args.calib_data else []
    for text_source in sources:
        check_source(text_source)
    config = models.load_config(args.model_dir, args.trust_remote_code)
    models.refuse_quantized(config, args.model_dir)
    tokenizer = models.load_tokenizer(args.model_dir, args.trust_remote_code)  # a broken one is found here
    source = source_folder(args.model_dir)
    if args.modelopt_restore_path:
        whole = modelopt_state.load_state(args.modelopt_restore_path)
        pattern = modelopt_state.pattern_of(whole, args.modelopt_restore_path)
    else:
        dense = models.load_model(args.model_dir, trust_remote_code=args.trust_remote_code)
        whole, pattern = {"model_state_dict": dense.state_dict()}, None
    state = whole["model_state_dict"]
    # Without its weights, the model shows which tensors there are, what they are called and which of them are tied.
    model = models.load_structure(args.model_dir, args.trust_remote_code)
    modelopt_state.check_state_fits(whole, model, args.modelopt_restore_path)
    files = models.stored_tensors(args.model_dir)
    others = weights.other_parts(model, files)
    if args.quantization and others and config.get_text_config(decoder=True) is not config:
        raise UserError(f"--quantization exports text models only, and '{args.model_dir}' has other parts; drop it")
    stored = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    cast = torch_dtype(args.dtype) if args.dtype else None
    dtype_name = str(cast or stored).removeprefix("torch.")
    batches: list[torch.Tensor] = []
    device = resolve_device(args.device if args.quantization else "cpu")
    if args.calib_data:
        models.check_lengths(config, {"--model_max_length": args.model_max_length})
        drawn = draw_sequences(tokenizer, sources, args.calib_size, args.model_max_length, args.seed)
        batches = list(torch.cat(drawn).split(1))

    # Phase 2: weights, companions and the model card, in a folder that appears whole.
    masked = {name: weight.to("meta") for name, weight, _ in modelopt_state.sparse_masks(state)}
    pruned = weights.in_checkpoint_format(model, masked, files).keys()
    with atomic_folder(target) as folder:
        if args.quantization:
            dense = models.load_model(args.model_dir, cast or stored, args.trust_remote_code)
            modelopt_state.load_weights(dense, whole, args.modelopt_restore_path)
            quantized = quantize.quantize(dense, FORMATS[args.quantization], batches, device)
            settings = quantize.write_quantized(quantized, args.max_shard_size, folder)
            zeros = quantize.check_zeros(folder, model, state)
            print(f"all {zeros:,} pruned weights are 0 in the quantized files" if zeros else "no weight is pruned")
        else:
            settings = None
            weights.write_weights(model, state, cast, args.max_shard_size, folder, files, others)
        write_companions(source, model.config, dtype_name, folder, settings)
        reports = [report for report in inspect_path(folder, "$^", pattern) if report.name in pruned]
        write_model_card(folder, args.model_dir, config, dtype_name, reports, figures, settings)
        count_files = len(list(folder.glob("*.safetensors")))
    count = sum(report.fits for report in reports)
    if reports:
        print(f"{count} of {len(reports)} pruned matrices are {pattern} in the exported files")
    print(f"wrote {target}: {count_files} weight file(s), {args.quantization or dtype_name}")


if __name__ == "__main__":
    run_cli(main, "lower --max_shard_size, or with --quantization --calib_size")
