"""A small mixture of experts made from a dense Llama-type model, to prune with benchmarks.pruning.

    python -m benchmarks.mixture demo/mixture
    python -m benchmarks.pruning --model demo/mixture --arms magnitude llmcompressor balanced balanced_read \
        --calib_size 32 --eval_size 16 --double --output benchmarks/results/experts.json

Every MLP becomes four experts: copies with noise of a fifth of the weights' standard deviation. A random router sends
each token to two of them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sparsity.files import prepare_output_dir
from sparsity.models import load_model, load_tokenizer
from utils import Parser, run_cli

EXPERTS, USED, NOISE = 4, 2, 0.2
ROUTER = 0.16  # standard deviation of the router's weights, which tells tokens well apart


@torch.no_grad()
def make_mixture(model: str, folder: Path) -> None:
    """Write a Mixtral that is made from the Llama `model`, with its tokenizer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    dense = load_model(model, torch.float32)
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    shared = {name: getattr(dense.config, name) for name in (*names.split(), "rope_parameters")}
    mixture = MixtralForCausalLM(MixtralConfig(**shared, num_local_experts=EXPERTS, num_experts_per_tok=USED))
    mixture.load_state_dict(dense.state_dict(), strict=False)  # all but the MLPs
    torch.manual_seed(0)
    for layer, source in zip(mixture.model.layers, dense.model.layers, strict=True):
        gate_up = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
        for stacked, weight in (
            (layer.mlp.experts.gate_up_proj, gate_up),
            (layer.mlp.experts.down_proj, source.mlp.down_proj.weight),
        ):
            stacked.copy_(weight + NOISE * weight.std() * torch.randn(stacked.shape))
        layer.mlp.gate.weight.normal_(0, ROUTER)
    mixture.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)


def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.mixture")
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct", help="folder of a Llama-type model")
    args = parser.parse_args()
    make_mixture(args.model, prepare_output_dir(args.folder))


if __name__ == "__main__":
    run_cli(main)
