"""Experts of transformers in all the layouts it has, tiny."""

import importlib
import os

import torch
from torch import nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

HIDDEN, INNER, EXPERTS = 64, 48, 4

# Where the class is, its name, and what its config is called and has.
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER, "hidden_act": "silu"}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CLASSES = {
    "mixtral": "MixtralExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3": "DeepseekV3Experts",
    "olmoe": "OlmoeExperts",
    "granitemoe": "GraniteMoeExperts",
    "jamba": "JambaExperts",
    "gpt_oss": "GptOssExperts",  # interleaved, transposed, with biases and a gate of its own
    "llama4": "Llama4TextExperts",  # transposed; its rows come sorted
    "aria": "AriaExperts",  # transposed
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",  # transposed, with biases, not interleaved
    "nemotron_h": "NemotronHExperts",  # no gate
    "muse_spark": "MuseSparkExperts",  # a norm behind
    "deepseek_v4": "DeepseekV4Experts",  # clamped
    "step3p7": "Step3p7Experts",  # says nothing of itself
}


class Config:
    """What an experts class reads of a config."""

    _experts_implementation = "eager"
    post_norm_eps, swiglu_alpha, swiglu_limit, moe_latent_size, mlp_hidden_act = 1e-5, 1.7, 2.0, None, "relu2"
    moe_hidden_size = HIDDEN

    def __init__(self):
        self.__dict__.update(_SIZES, **dict.fromkeys(_COUNTS, EXPERTS))


def experts(model_type, dtype=torch.float32, device="cpu"):
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    made = getattr(module, CLASSES[model_type])(Config())
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(device, dtype).eval()


def routing(tokens, choices=2, device="cpu", experts=EXPERTS):
    """Different experts for each token, and their weights."""
    index = torch.rand(tokens, experts, device=device).topk(choices, -1).indices
    return index, torch.rand(tokens, choices, device=device)


def inputs(model_type, tokens, dtype=torch.float32, device="cpu"):
    if model_type == "llama4":
        return (torch.randn(tokens * EXPERTS, HIDDEN, device=device, dtype=dtype),)
    index, weights = routing(tokens, device=device)
    return torch.randn(tokens, HIDDEN, device=device, dtype=dtype), index, weights.to(dtype)
