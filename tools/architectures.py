"""Tries every causal language model of transformers, tiny, and writes docs/architectures.md: ``python
tools/architectures.py [NAME ...]``."""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch_fp8 as fp8
import transformers
from torch_fp8.checkpoints import CheckpointError
from torch_fp8.layers.frozen import frozen_layers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

# Small values for what configs call their sizes; each is taken by the configs that have it.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "n_embed": 64, "emb_dim": 64,
    "embed_dim": 64, "word_embed_proj_dim": 64, "embedding_size": 64, "hidden_dim": 64,
    "intermediate_size": 128, "n_inner": 128, "ffn_dim": 128, "d_ff": 128, "ffn_hidden_size": 128,
    "decoder_ffn_dim": 128, "encoder_ffn_dim": 128, "feed_forward_proj_dim": 128, "dim_ff": 128,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1, "moe_k": 2, "moe_topk": 2,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 32,
}  # fmt: skip
