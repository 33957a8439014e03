"""GPT-2 in plain PyTorch: learned positions, pre-LayerNorm blocks, one fused qkv, an output head tied to the tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, arange, nn
from torch.nn import functional as F

from .checks import check_counts, check_type


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int

    def __post_init__(self) -> None:
        check_counts(**vars(self))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd, got {self.n_head} and {self.n_embd}")


# Cerebras-GPT (arXiv 2304.03208, table 1): GPT-2's architecture with a vocabulary of 50,257 and a context of 2,048.
CEREBRAS = {
    "111M": Shape(10, 12, 768),
    "256M": Shape(14, 17, 1088),
    "590M": Shape(18, 12, 1536),
    "1.3B": Shape(24, 16, 2048),
    "2.7B": Shape(32, 32, 2560),
    "6.7B": Shape(32, 32, 4096),
    "13B": Shape(40, 40, 5120),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.qkv = nn.Linear(shape.n_embd, 3 * shape.n_embd)
        self.proj = nn.Linear(shape.n_embd, shape.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, n_embd), as everywhere below
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.n_head, width // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, n_head, time, width of a head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.n_embd, 4 * shape.n_embd)
        self.down = nn.Linear(4 * shape.n_embd, shape.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.n_embd)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, shape: Shape, *, vocab: int, context: int) -> None:
        super().__init__()
        check_type("shape", shape, Shape)
        check_counts(vocab=vocab, context=context)
        padded = -(-vocab // 64) * 64  # GEMMs like round sizes: GPT-2's 50257 becomes 50304
        self.tokens = nn.Embedding(padded, shape.n_embd)
        self.positions = nn.Embedding(context, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd)
        self.head = nn.Linear(shape.n_embd, padded, bias=False)
        self.head.weight = self.tokens.weight
        self._init(shape)

    def _init(self, shape: Shape) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # 2 n_layer projections add up in the residual stream; this keeps its variance from growing with depth.
                into_residual = name.endswith(("attn.proj.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.n_layer) ** 0.5 if into_residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """The mean cross-entropy, in nats a token, of ``targets`` given ``tokens``, both (batch, time) int64; without
        ``targets`` the logits (batch, time, vocabulary, padded)."""
        x = self.tokens(tokens) + self.positions(arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
