"""Read a Llama model out of a GGUF file: its config, its weights, its tokenizer. Only what SmolLM2's file needs.

A GGUF file is a header, key-value metadata, a table of tensors, and the tensors' bytes, all little-endian. Dimensions
stand innermost first. Quantised tensors are rows of blocks of 32 weights.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_F32, _F16, _Q4_1, _Q8_0 = 0, 1, 3, 8
_BLOCK = 32
_BYTES = {_F32: (4, 1), _F16: (2, 1), _Q4_1: (20, _BLOCK), _Q8_0: (34, _BLOCK)}  # bytes for so many weights


class GGUF:
    """metadata: the file's keys and values; tensor(name): a tensor of it, float32, dequantised."""

    def __init__(self, path: Path) -> None:
        self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        self._buffer, self._at = memoryview(self._bytes.numpy()), 0
        if bytes(self._buffer[:4]) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file")
        self._at = 4
        _version, tensors, keys = self._value(4), self._value(10), self._value(10)
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._value(_STRING)
            self.metadata[key] = self._value(self._value(4))
        self._table = {}
        for _ in range(tensors):
            name, rank = self._value(_STRING), self._value(4)
            size = [self._value(10) for _ in range(rank)][::-1]
            self._table[name] = size, self._value(4), self._value(10)
        alignment = self.metadata.get("general.alignment", 32)
        self._data = -(-self._at // alignment) * alignment

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def tensor(self, name: str) -> Tensor:
        size, kind, offset = self._table[name]
        if kind not in _BYTES:
            raise ValueError(f"{name} has GGUF type {kind}; F32, F16, Q4_1 and Q8_0 are read")
        width, weights = _BYTES[kind]
        count = torch.Size(size).numel() // weights
        begin = self._data + offset
        blocks = self._bytes[begin : begin + count * width].clone().view(count, width)  # its own, aligned memory
        return _dequantize(blocks, kind).view(size)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            length = self._value(10)
            self._at += length
            return bytes(self._buffer[self._at - length : self._at]).decode()
        if kind == _ARRAY:
            kind, length = self._value(4), self._value(10)
            return [self._value(kind) for _ in range(length)]
        (value,) = struct.unpack_from(_SCALARS[kind], self._buffer, self._at)
        self._at += struct.calcsize(_SCALARS[kind])
        return value


def _dequantize(blocks: Tensor, kind: int) -> Tensor:
    if kind in (_F32, _F16):
        return blocks.view(torch.float32 if kind == _F32 else torch.float16).float()
    step = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == _Q8_0:
        return step * blocks[:, 2:].contiguous().view(torch.int8).float()
    least, nibbles = blocks[:, 2:4].contiguous().view(torch.float16).float(), blocks[:, 4:]
    return step * torch.cat([nibbles & 15, nibbles >> 4], dim=1).float() + least


def load_model(gguf: GGUF, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = {key.removeprefix("llama."): value for key, value in gguf.metadata.items() if key.startswith("llama.")}
    vocabulary, hidden = gguf._table["token_embd.weight"][0]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=llama["attention.head_count"],
        num_key_value_heads=llama["attention.head_count_kv"],
        max_position_embeddings=llama["context_length"],
        rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
        tie_word_embeddings="output.weight" not in gguf,
        bos_token_id=gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf.metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = {name: _weight(gguf, name, config).to(device, dtype) for name in model.state_dict() if name not in tied}
    model.load_state_dict(state, strict=not tied, assign=True)
    model.tie_weights()
    # Its buffers are computed from the config and stand in no file.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _weight(gguf: GGUF, name: str, config: Any) -> Tensor:
    """The tensor that transformers calls by this name."""
    stem = name.removesuffix(".weight")
    if stem not in _NAMES:
        _, _, layer, part = stem.split(".", 3)
        return _unrotate(gguf.tensor(f"blk.{layer}.{_NAMES[part]}.weight"), part, config)
    return gguf.tensor(f"{_NAMES[stem]}.weight")


def _unrotate(weight: Tensor, part: str, config: Any) -> Tensor:
    """GGUF pairs neighbours for the rotary positions, transformers pairs the halves of a head: other orders of rows."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(part)
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape) if heads else weight


def load_tokenizer(gguf: GGUF) -> Tokenizer:
    """The byte-level BPE of the file; SmolLM's takes digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in gguf.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    kinds = gguf.metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, kinds) if kind == control])
    return tokenizer
