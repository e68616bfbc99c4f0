"""The sizes of small models, by their names in transformers' configs (small_models.py)."""

from typing import Any

_NAMES: dict[int, str] = {
    64: "hidden_size d_model n_embd emb_dim embed_dim dim embedding_size input_embedding_size output_embedding_size "
        "text_hidden_size projector_hidden_size out_hidden_size attention_hidden_size vision_output_dim "
        "projector_output_dim projector_input_dim backbone_hidden_size hidden_size_global mm_embed_dim audio_embed_dim "
        "output_proj_dims adapter_in_dim adapter_input_size adapter_out_dim projection_hidden_dim output_channels "
        "router_hidden_size encoder_hidden_dim lru_width nemo_conv_channels ext_pw_out_channel "
        "depthwise_separable_out_channel d_inner mamba_d_ssm hidden_dim",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_encoder_layers "
       "num_decoder_layers num_blocks conf_num_hidden_layers num_attention_heads n_head n_heads num_heads "
       "attention_heads decoder_attention_heads encoder_attention_heads num_encoder_attention_heads "
       "num_decoder_attention_heads conf_num_attention_heads num_experts n_routed_experts num_local_experts "
       "moe_num_experts n_mamba_heads linear_num_value_heads linear_num_heads zero_expert_num "
       "swa_num_attention_heads mamba_num_heads",
    2: "num_experts_per_tok linear_num_key_heads moe_topk moe_k n_shared_experts "
       "num_shared_experts moe_num_shared_experts n_group swa_num_key_value_heads hc_count hc_mult "
       "n_groups mamba_n_groups mamba_ngroups num_global_layers num_hashes o_groups first_k_dense_replace_",
    1: "topk_group num_kv_shared_layers_ first_k_dense_replace moe_layer_start_index_ num_dense_layers pretraining_tp",
    96: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dff dim_ff ffn_hidden_size n_inner "
        "intermediate_size_mlp dense_intermediate_size feed_forward_size mlp_dim shared_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size chunk_size mamba_chunk_size block_size "
        "image_size crop_size window_size local_attention attention_chunk_size rel_extent",
    16: "head_dim v_head_dim qk_nope_head_dim kv_lora_rank linear_value_head_dim linear_key_head_dim linear_head_dim "
        "index_head_dim swa_head_dim dim_head kv_channels attention_head_size mamba_d_state state_size ssm_state_size "
        "mamba_head_dim sliding_window sliding_window_size query_pre_attn_scalar laurel_rank hc_lowrank "
        "hidden_size_per_layer_input hidden_size_per_layer gated_norm_rank adapter_rank o_lora_rank d_rel "
        "attention_window_size image_seq_length num_position_embeddings position_embedding_size",
    24: "q_lora_rank index_n_heads",
    8: "qk_rope_head_dim rotary_dim index_topk mamba_n_heads mamba_d_head patch_size num_mel_bins",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length "
         "max_source_positions position_bias_max_distance original_max_position_embeddings",
    4096: "vocab_size vocab_size_per_layer_input audio_vocab_size mel_vocab_size unpadded_vocab_size",
}
SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()} | {
    "initializer_range": 0.1, "init_std": 0.1}
ALWAYS: dict[str, Any] = {"is_decoder": True}
"""Fields to set even if their default is None."""

_TWO_KINDS = ["sliding_attention", "full_attention"] * 2
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 24, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 24,
                        "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "swa_q_lora_rank": 24,
                        "swa_kv_lora_rank": 16},
    "gemma3n_text": {"layer_types": _TWO_KINDS, "num_kv_shared_layers": 2},
    "gemma4_text": {"layer_types": _TWO_KINDS, "num_kv_shared_layers": 2, "global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "reformer": {"attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (16, 48)},
    "roc_bert": {"pronunciation_vocab_size": 64, "pronunciation_embed_dim": 64, "shape_vocab_size": 64,
                 "shape_embed_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""Exceptions by the model_type of a config, of the whole model or of a part."""

LEFT_OUT: dict[str, str] = {
    "emu3": "transformers' AutoModelForCausalLM cannot load it",
    "gemma3n": "its vision tower needs the package timm; its text part is `gemma3n_text`",
    "gemma4_assistant": "drafts tokens for another model, whose states it is given",
    "gemma4_unified_assistant": "drafts tokens for another model, whose states it is given",
    "mllama": "transformers' AutoModelForCausalLM cannot load it",
    "musicgen": "reads audio in several codebooks, not text",
    "musicgen_melody": "reads audio in several codebooks, not text",
}
"""Families that cannot be tried, with the reason."""

MUST_REFUSE: dict[str, str] = {
    "blt": "reads bytes in patches by four lists of layers",
    "cpmant": "not causal",
    "hrm_text": "its layers run several times in a pass",
    "prophetnet": "not causal: predicts several tokens at once",
    "reformer": "its layers are reversible: they give two streams that are no residual stream",
    "xlm": "not causal, and has no list of layers",
    "xlnet": "not causal",
}
"""Families without a suitable residual stream; only a refusal is right."""

_PATHS = {
    "backbone.blocks": "xlstm",
    "backbone.layers": "falcon_mamba mamba mamba2",
    "bert.encoder.layer": "bert bert-generation big_bird megatron-bert",
    "biogpt.layers": "biogpt",
    "gpt_neox.layers": "gpt_neox",
    "gpt_neox_japanese.layers": "gpt_neox_japanese",
    "model.decoder.layers": "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp opt pegasus plbart "
                            "trocr whisper",
    "model.language_model.layers": "fuyu gemma3 gemma4 gemma4_unified got_ocr2 moss_transcribe_diarize",
    "roberta.encoder.layer": "camembert roberta xlm-roberta xlm-roberta-xl xmod",
    "rwkv.blocks": "rwkv",
    "transformer.blocks": "dbrx mpt",
    "transformer.h": "bloom codegen ctrl falcon gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj openai-gpt",
} | {f"{name.replace('-', '_')}.encoder.layer": name for name in (
    "data2vec-text", "electra", "ernie", "git", "rembert", "roberta-prelayernorm", "roc_bert", "roformer")}
LAYER_PATHS: dict[str, str] = {family: path for path, names in _PATHS.items() for family in names.split()}
"""Where a family keeps its decoder layers, in the whole causal LM; by default `model.layers`."""
