"""Random models of any causal-LM architecture of transformers in a tiny size, with a tokenizer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

TEXTS = [
    "The river rose slowly through the night, and by morning the lower fields of the valley lay under water.",
    "A committee of engineers met on Tuesday to discuss why the new bridge had been closed for a third time.",
    "Researchers trained a small network on weather records and found that it predicted frost better than rain.",
    "The library will open its reading room on Sundays, after many students had asked for longer hours.",
]
MAX_PARAMETERS = 30_000_000
WIDTH, HEADS, LAYERS, VOCABULARY = 64, 4, 4, 400

# Values and the names that configurations have for them.
NAMES: list[tuple[int, str]] = [
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (
        WIDTH,
        "hidden_size n_embd d_model word_embed_proj_dim model_dim dim_model embedding_size lru_width emb_dim "
        "attention_hidden_size linear_attn_hidden_size",
    ),
    (
        2 * WIDTH,
        "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff "
        "shared_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size",
    ),
    (WIDTH // 2, "moe_intermediate_size expert_dim moe_ffn_hidden_size"),
    (
        LAYERS,
        "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads num_linear_heads "
        "linear_num_value_heads num_local_experts num_experts n_routed_experts moe_num_experts "
        "num_experts_per_layer",
    ),
    (
        2,
        "num_key_value_heads linear_num_key_heads swa_num_key_value_heads num_key_value_heads_swa "
        "attention_num_key_value_heads num_experts_per_tok moe_top_k moe_k top_k moe_topk "
        "num_experts_per_token experts_per_token",
    ),
    (
        WIDTH // HEADS,
        "head_dim global_head_dim kv_channels attention_head_dim linear_key_head_dim v_head_dim "
        "linear_value_head_dim swa_head_dim linear_head_dim index_head_dim mamba_head_dim mamba_d_head "
        "qk_rope_head_dim qk_nope_head_dim rotary_dim kv_lora_rank q_lora_rank o_lora_rank mamba_d_state "
        "state_size time_step_rank mamba_dt_rank altup_rank laurel_rank hidden_size_per_layer_input",
    ),
    (512, "max_position_embeddings n_positions max_seq_len original_max_position_embeddings n_ctx"),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts eos_token_id pad_token_id",
    ),
    (WIDTH + 1, "sliding_window attention_window_size window_size"),
    (0, "bos_token_id"),
]
SIZES = {name: value for value, names in NAMES for name in names.split()} | {"sliding_window": 64}
KEPT_IF_NONE = ("num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SWA = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16} | {
    **{"head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16}
}
LINEAR_FULL, SLIDING_FULL = ["linear_attention", "full_attention"] * 2, ["sliding_attention", "full_attention"] * 2
LINEAR_HYBRID = ["linear_attention", "hybrid"] * 2
GEMMA4 = {"layer_types": SLIDING_FULL, "global_head_dim": 32}
# What the general sizes leave inconsistent.
EXTRA: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LINEAR_FULL, "n_group": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_n_groups": 1, "attn_layer_indices": [2]},
    "cohere_compass_text": {
        "layer_types": SLIDING_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]} for kind in SLIDING_FULL
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 2 * WIDTH},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        **{f"swa_{name}": value for name, value in SWA.items()},
        **{"num_key_value_heads": HEADS, "head_dim": 2 * WIDTH // HEADS},
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_ssm": 128},
    "gemma3": {"vision_config": {**VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    "gemma3n_text": {
        "intermediate_size": [2 * WIDTH] * LAYERS,
        "num_kv_shared_layers": 0,
        "layer_types": SLIDING_FULL,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "got_ocr2": {"vision_config": VISION},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {**ROPE, "head_dim": WIDTH // HEADS},
    "hunyuan_v1_moe": {**ROPE, "head_dim": WIDTH // HEADS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": LINEAR_FULL},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {
        "vision_config": {
            **{**VISION, "image_size": 28, "patch_size": 14, "pixel_shuffle_ratio": 0.5},
            **{"vision_output_dim": WIDTH, "projector_input_dim": WIDTH, "projector_output_dim": WIDTH},
        }
    },
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "ministral": {**ROPE, "head_dim": WIDTH // HEADS},
    "qwen3_5": {"vision_config": {**VISION, "depth": 2, "num_heads": 4, "out_hidden_size": WIDTH}},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 32],
        "feed_forward_size": 128,
        "attn_layers": ["local", "lsh"] * 2,
    },
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "ngram_vocab_size_base": 500, "split_ngram_parts": 1},
    },
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 32, "layers_block_type": LINEAR_HYBRID},
    "zamba2": {
        **{"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 32, "layers_block_type": LINEAR_HYBRID},
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(kind: type[PretrainedConfig], settings: dict[str, Any]) -> PretrainedConfig:
    """A configuration of the class `kind` with small sizes under the names that it has for them."""
    from transformers import PretrainedConfig

    extra, default = merged(EXTRA.get(kind.model_type, {}), settings), kind()
    names = {*vars(default), *inspect.signature(kind.__init__).parameters} - kind.attribute_map.keys()
    names -= vars(PretrainedConfig()).keys()  # transformers 4 has settings of generation there, such as top_k
    values = {
        name: value
        for name, value in SIZES.items()
        if name in names and (name in KEPT_IF_NONE or vars(default).get(name) is not None)
    }
    if "kv_lora_rank" in names:  # latent attention has keys and values for every head
        values["num_key_value_heads"] = HEADS
    for name in kind.sub_configs:
        if part := vars(default).get(name):
            values[name] = tiny_config(type(part), extra.pop(name, {})).to_dict()
    return kind(**{**values, **extra})


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes; those of a part, such as vision_config, are merged field by field."""
    parts = {name: {**settings.get(name, {}), **part} for name, part in changes.items() if name.endswith("_config")}
    return {**settings, **changes, **parts}


def config_of(model_type: str, **settings: Any) -> PretrainedConfig:
    """A tiny configuration; `settings` override the sizes, and single fields of parts such as vision_config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return tiny_config(CONFIG_MAPPING[model_type], settings)


def tiny_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """A random model in float32; `settings` as of `config_of`.

    Raises:
        Exception: of whatever kind, where the sizes do not suit the architecture.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(model_type, **settings)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():  # many are initialized to zero, which leaves nothing to prune
            if weight.dim() >= 2 and weight.std() < 0.01:
                weight.normal_(0, 0.02)
        model(input_ids=torch.arange(12)[None])
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens; <s> is 0, </s> is 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def save_tiny_model(model_type: str, folder: Path, **settings: Any) -> None:
    """Save a random model and its tokenizer as an ordinary folder; `settings` as of `config_of`."""
    tiny_model(model_type, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
