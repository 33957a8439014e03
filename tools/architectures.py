"""Tries every causal language model of transformers, tiny, and writes docs/architectures.md:
``python tools/architectures.py``; or tells of some: ``python tools/architectures.py llama gpt_neox``."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch_fp8 as fp8
import transformers
from torch_fp8.checkpoints.quantize import quantize_checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

MAX_PARAMETERS = 2**24

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

# What some classes want besides.
OWN: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in ("axk2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling2_text": {"unpadded_vocab_size": 90},
    "inkling2_loop_text": {"unpadded_vocab_size": 90},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds_dim": [32, 32],
                 "axial_pos_shape": [8, 8], "attention_head_size": 16, "feed_forward_size": 128},
    "zamba": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def build(model_type: str) -> Any:
    """A tiny model in bfloat16, in eval mode, no two weights alike. Raises whatever its classes do."""
    torch.manual_seed(0)
    config = tiny(transformers.CONFIG_MAPPING[model_type], **OWN.get(model_type, {}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if (count := sum(parameter.numel() for parameter in model.parameters())) > MAX_PARAMETERS:
        raise ValueError(f"{count} parameters: its config has sizes under other names")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).mul_(0.05).to(parameter.dtype))
    return model.eval().requires_grad_(False)


def tiny(kind: Any, **own: Any) -> Any:
    """A config of a class with small sizes, and small configs within it."""
    known = {*kind.default_config_fields(), *kind.__dataclass_fields__, *getattr(kind, "attribute_map", {})}
    values = {name: size for name, size in SIZES.items() if name in known}
    for name, part in getattr(kind, "sub_configs", {}).items():
        with contextlib.suppress(Exception):
            values[name] = tiny(part)
    return kind(**{**values, **own})


def logits(model: Any) -> torch.Tensor | None:
    """Of a few tokens; None where the 16-bit model takes more than tokens, or does not run on this machine."""
    ids = torch.arange(40).view(2, 20) + 3
    with contextlib.suppress(Exception), torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return out
    return None


def compare(name: str, model: Any, other: Any, expected: torch.Tensor | None) -> None:
    """Raise AssertionError unless two models have the same state, and the second the expected logits."""
    state, found = model.state_dict(), other.state_dict()
    assert state.keys() == found.keys(), f"{name}: other names, such as {sorted(state.keys() ^ found.keys())[0]}"
    for key, tensor in state.items():
        same = tensor.dtype == found[key].dtype and torch.equal(bits(tensor), bits(found[key]))
        assert same, f"{name}: {key} is another"
    got = logits(other)
    assert expected is None or (got is not None and torch.equal(got, expected)), f"{name}: other logits"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1)


def attempt(model_type: str, folder: Path) -> tuple[str, str]:
    """What became of an architecture, in a word and in a sentence: "passes", "refused", "fails", or "not built"."""
    try:
        plain = build(model_type)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}"
    try:
        plain.save_pretrained(folder / "plain")
        ours = fp8.load_pretrained(folder / "plain")
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain")
        expected = logits(plain)
        compare("16 bits", plain, ours, expected)
        try:
            fp8.freeze(ours)
        except ValueError as error:
            return "refused", str(error)
        share = fp8.summary(ours).parameters.share
        quantized = logits(ours)
        for name, save, load in (
            ("save_pretrained", lambda path: fp8.save_pretrained(ours, path), fp8.load_pretrained),
            ("transformers", ours.save_pretrained, transformers.AutoModelForCausalLM.from_pretrained),
            ("quantize", lambda path: quantize_checkpoint(folder / "plain", path), fp8.load_pretrained),
        ):
            try:
                save(folder / name)
            except ValueError as error:
                left = [path.name for path in (folder / name).glob("*")] if (folder / name).exists() else []
                assert not left, f"{name}: refused, but {left} were written"
                return "refused", str(error)
            compare(name, ours, load(folder / name), quantized)
        return "passes", f"{100 * share:.0f} % of the parameters in FP8" + (
            "" if expected is not None else "; no logits"
        )
    except fp8.CheckpointError as error:
        return "refused", str(error).replace(str(folder), "")
    except Exception as error:
        return "fails", f"{type(error).__name__}: {error}"


def main(model_types: list[str]) -> None:
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        for model_type in model_types or sorted(NAMES):
            with tempfile.TemporaryDirectory() as folder:
                word, sentence = attempt(model_type, Path(folder))
            rows.append((model_type, word, " ".join(sentence.split())[:160]))
            print(*rows[-1], sep="\t", flush=True)
    if not model_types:
        PAGE.write_text(page(rows))


def page(rows: list[tuple[str, str, str]]) -> str:
    counts = {word: sum(row[1] == word for row in rows) for word in ("passes", "refused", "fails", "not built")}
    versions = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
    table = "\n".join(f"| {name} | {word} | {sentence.replace('|', ' ')} |" for name, word, sentence in rows)
    return f"""\
# Causal language models of transformers

Written by `python tools/architectures.py` with {versions}. Each architecture that could be built tiny was saved in 16
bits; loaded by `fp8.load_pretrained`, to the bits and logits of transformers' own loading; frozen; saved by
`fp8.save_pretrained`, by its own `save_pretrained` and by `quantize`; and each of the three loaded, to the bit and
to the logits of the frozen model. What stays in 16 bits is named as ignored by the config.

{counts["passes"]} pass, {counts["refused"]} are refused by name with nothing written, {counts["fails"]} fail. Not built
here were {counts["not built"]}: configs that want more than small sizes, or packages that are not there.

| architecture | | |
| --- | --- | --- |
{table}
"""


if __name__ == "__main__":
    main(sys.argv[1:])
