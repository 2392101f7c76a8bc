"""A tiny model of every architecture that transformers maps to causal language modeling or to text from images, and
what `split` says of it.

    python tests/architectures.py > tests/architectures.txt

A configuration is made small by the names of its fields, which architectures share. `OF_ARCHITECTURE` has what further
belongs together in some of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

from distil_kernels.hf import CausalLM, split

MOST_PARAMETERS = 2_000_000

BY_VALUE: list[tuple[Any, str]] = [
    (260, """vocab_size decoder_vocab_size vocab_size_per_layer_input shape_vocab_size
        pronunciation_vocab_size audio_vocab_size mel_vocab_size"""),
    (32, """hidden_size d_model n_embd dim embed_dim embedding_size embedding_dim emb_dim dim_model_base out_hidden_size
        text_hidden_size attention_hidden_size hidden_size_global lru_width projection_dim output_dim vision_output_dim
        projector_input_dim projector_output_dim encoder_hidden_size input_embedding_size output_embedding_size
        backbone_hidden_size image_text_hidden_size decoder_hidden_size pronunciation_embed_dim shape_embed_dim
        projector_hidden_size vision_hidden_size patch_embed_hidden_size latent_query_num projection_hidden_size
        projection_hidden_dim merged_hidden_size nemo_conv_channels ext_pw_out_channel
        depthwise_separable_out_channel"""),
    (256, "unpadded_vocab_size"),
    (48, """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size d_ff dim_ff dff
        feed_forward_size moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mlp_dim
        dense_intermediate_size intermediate_size_mlp shared_experts_intermediate_size
        moe_shared_expert_intermediate_size d_inner alignment_intermediate_size projection_intermediate_size
        share_expert_dim moe_hidden_size"""),
    (2, """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_decoder_layers
        num_encoder_layers num_global_layers decoder_num_layers layers resampler_depth"""),
    (4, """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads linear_num_key_heads
        swa_num_attention_heads num_sliding_attention_heads attention_heads mamba_n_heads mamba_num_heads
        resampler_n_heads conf_num_attention_heads index_n_heads"""),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads"),
    (8, """head_dim d_kv dim_head attention_head_size v_head_dim linear_key_head_dim linear_value_head_dim
        global_head_dim swa_head_dim d_head qk_head_dim kv_lora_rank q_lora_rank index_head_dim attention_head_dim
        mamba_head_dim mamba_d_state state_size ssm_state_size linear_head_dim"""),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts qk_nope_head_dim qk_rope_head_dim rotary_dim"),
    (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k top_k_experts"),
    (1, "n_group topk_group num_expert_group n_groups mamba_n_groups"),
    (64, """max_position_embeddings n_positions max_target_positions model_max_length max_seq_len n_ctx codebook_size
        ngram_vocab_size_base encoder_hash_byte_group_vocab num_embeddings"""),
    (28, "image_size crop_size"),
    (14, "patch_size"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    (None, "layer_types mlp_layer_types"),
    # What some default to 1 or to nothing.
    (0.3, "logit_scale logits_scaling lm_head_multiplier output_multiplier logits_mup_width_multiplier"),
    (5.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
]  # fmt: skip
SMALL = {name: value for value, names in BY_VALUE for name in names.split()}

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MULTIMODAL_ROPE = {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}}
LATENT_ATTENTION = {"num_key_value_heads": 4}
TWO_ROPES = {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
NO_LAYER_INPUT = {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "axk2": LATENT_ATTENTION,
    "cohere_compass": {"text_config": TWO_ROPES},
    "cohere_compass_text": TWO_ROPES,
    "cosmos3_edge": MULTIMODAL_ROPE,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v32": LATENT_ATTENTION,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {**LATENT_ATTENTION, "per_layer_config": {}},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None,
    },
    "gemma4_assistant": NO_LAYER_INPUT,
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32, "patch_size": 4}
    },
    "glm46v": MULTIMODAL_ROPE,
    "glm4v": MULTIMODAL_ROPE,
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
    },
    "glm5_next": {"text_config": LATENT_ATTENTION},
    "glm_moe_dsa": LATENT_ATTENTION,
    "glm_ocr": MULTIMODAL_ROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**ROPE, "xdrope_section": [1, 1, 1, 1]}}},
    "hy_v4_vl": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"vision_config": {"intermediate_size": 128}},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "mistral_large4": {"text_config": LATENT_ATTENTION},
    "paddleocr_vl": MULTIMODAL_ROPE,
    "qwen2_5_omni_thinker": MULTIMODAL_ROPE,
    "qwen2_5_vl": MULTIMODAL_ROPE,
    "qwen2_vl": MULTIMODAL_ROPE,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "num_buckets": 4,
    },
    "step3p7": {"text_config": {"sliding_window": 4}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layer_types": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def architectures() -> dict[str, str]:
    """Returns the configuration's name for each model class of the two mappings; of several the one for text."""
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    pairs = [(name, each) for mapping in mappings for name, each in mapping.items()]
    pairs = [(name, each) for name, classes in pairs for each in ((classes,) if isinstance(classes, str) else classes)]
    named = {each: name for name, each in reversed(pairs)}
    return named | {each: name for name, each in pairs if name.endswith("_text")}


def tiny_model(model_class: str, config_name: str, **changes: Any) -> Any:
    """Returns a random model.

    Raises:
        Exception: of any kind, where the fields do not fit together or make a large model.
    """
    build = getattr(transformers, model_class)
    config = tiny_config(CONFIG_MAPPING[config_name], {**OF_ARCHITECTURE.get(config_name, {}), **changes})
    if type(config) is not build.config_class:
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        num_parameters = sum(weight.numel() for weight in build(config).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"{num_parameters} parameters")
    torch.manual_seed(0)
    return build(config).eval()


def tiny_config(config_class: type, changes: dict[str, Any]) -> Any:
    """Returns a small configuration; a change of an inner one is a dict."""
    names = set(inspect.signature(config_class).parameters)
    settings = {name: value for name, value in SMALL.items() if name in names} | changes
    inner = {name: each for name, each in _inner_configs(config_class) if name in names}
    return config_class(**settings | {name: tiny_config(each, changes.get(name, {})) for name, each in inner.items()})


def _inner_configs(config_class: Any) -> Iterator[tuple[str, type]]:
    """Yields name and class of each configuration in one of this class."""
    for name, spec in (getattr(config_class, "sub_configs_defaults", None) or {}).items():
        named = CONFIG_MAPPING[spec.model_type] if getattr(spec, "model_type", None) else spec
        each = getattr(named, "config_class", named)
        if isinstance(each, type) and issubclass(each, PretrainedConfig) and each is not PretrainedConfig:
            yield name, each
    try:
        default = config_class()
    except Exception:  # an inner configuration has to be given
        return
    yield from ((name, type(each)) for name, each in vars(default).items() if isinstance(each, PretrainedConfig))


def outcome(model_class: str, config_name: str) -> str:
    """Returns one line: how `split` works on a tiny model, or why it does not."""
    try:
        model = tiny_model(model_class, config_name)
    except Exception as error:
        return "not built: " + _one_line(error)
    try:
        parts = split(model)
    except ValueError as error:
        return "refused: " + _one_line(error).removeprefix(f"[split] {model_class} ")
    sharpen(parts)
    error = difference(parts, input_ids=torch.tensor([[7, 8, 9, 11, 50], [12, 13, 7, 14, 15]]))
    if not error < 1e-4:
        return f"wrong logits, by {error:.1e} of the largest"
    scale = "" if parts.logit_scale == 1.0 else f", scale {parts.logit_scale:.4g}"
    softcap = "" if parts.logit_softcap == float("inf") else f", softcap {parts.logit_softcap:.4g}"
    bias = "" if parts.bias is None else ", bias"
    rows = f", {parts.vocab_size} rows" if parts.vocab_size < parts.weight.shape[0] else ""
    return f"works by {type(parts.body).__name__}{bias}{rows}{scale}{softcap}"


@torch.no_grad()
def sharpen(parts: CausalLM) -> None:
    """Gives the head weights, and a bias, that softcaps bend."""
    nn.init.normal_(parts.weight, std=3.0)
    if parts.bias is not None:
        nn.init.normal_(parts.bias, std=3.0)


@torch.no_grad()
def difference(parts: CausalLM, **inputs: Any) -> float:
    """Returns the largest difference from the model's own logits, relative to the largest of those."""
    logits = parts.model(**inputs, **parts.cached(None)).logits
    ours = parts.logits(parts.hidden(**inputs))
    return float((ours - logits).abs().max() / logits.abs().max()) if ours.shape == logits.shape else float("inf")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(f"# By `python tests/architectures.py` with transformers {transformers.__version__}")
    for model_class, config_name in sorted(architectures().items()):
        print(f"{model_class}: {outcome(model_class, config_name)}", flush=True)
