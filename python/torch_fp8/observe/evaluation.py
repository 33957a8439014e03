"""What FP8 does to a language model's predictions, against the same model in BF16 on the same tokens.

    with torch.no_grad():
        pairs = [compare(bf16(ids), frozen(ids), ids) for ids in windows]    # one window's logits at a time
    print(Report.of(pairs, documents))

Perplexity alone hides much: errors of both signs cancel in it. So every report has the divergence between the two
distributions, token by token, beside it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

CONFIDENT = 1.0  # nats between BF16's first and second choice

_ROWS = 128  # of logits at a time: temporaries of 128 x vocabulary float32


@dataclass
class Pairs:
    """One entry for each predicted token, on the CPU."""

    nll: Tensor  # float64, nats: the baseline's negative log-likelihood of the true token
    other_nll: Tensor  # float64
    kld: Tensor  # float64, nats: KL(baseline || other) over the whole vocabulary
    agree: Tensor  # bool: both have the same first choice
    margin: Tensor  # float32, nats: the baseline's first choice over its second

    @classmethod
    def cat(cls, pairs: Iterable[Pairs]) -> Pairs:
        pairs = list(pairs)
        return cls(*(torch.cat([getattr(p, field.name) for p in pairs]) for field in fields(cls)))


def compare(baseline: Tensor, other: Tensor, ids: Tensor) -> Pairs:
    """Logits (tokens, vocabulary) of two models for one window, whose token ids are ids (tokens,): each row predicts
    the token after it, so tokens - 1 predictions are compared. Log-softmax in float32, sums over the vocabulary in
    float64. Raises ValueError where the sizes do not fit."""
    if baseline.shape != other.shape or baseline.dim() != 2 or ids.shape != baseline.shape[:1]:
        raise ValueError(
            "torch_fp8: compare takes two tensors of logits (tokens, vocabulary) and ids (tokens,), got "
            f"{tuple(baseline.shape)}, {tuple(other.shape)} and {tuple(ids.shape)}; give one window without a batch"
        )
    rows = zip(baseline[:-1].split(_ROWS), other[:-1].split(_ROWS), ids[1:].split(_ROWS))
    return Pairs.cat(_compare(*chunk) for chunk in rows)


def _compare(baseline: Tensor, other: Tensor, targets: Tensor) -> Pairs:
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (baseline, other))
    nll, other_nll = (-log.gather(-1, targets[:, None])[:, 0].double() for log in (log_p, log_q))
    # Where p underflows to 0 it adds nothing, even if q's logarithm is -inf.
    terms = torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0)
    first, second = log_p.topk(2).values.unbind(-1)
    pairs = nll, other_nll, terms.sum(-1, dtype=torch.float64), log_p.argmax(-1) == log_q.argmax(-1), first - second
    return Pairs(*(entry.cpu() for entry in pairs))


@dataclass(frozen=True)
class Report:
    """One arm against the baseline."""

    tokens: int
    perplexity: float  # of the arm
    ppl_ratio: float  # over the baseline's
    ppl_low: float  # 95 % interval of the ratio: paired bootstrap over documents
    ppl_high: float
    kld_mean: float  # nats
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1: float  # share of tokens whose first choice is the same
    confident_disagreement: float  # share that differs, of the tokens where the baseline's margin is above CONFIDENT
    rms_dp: float  # root mean square of the change in the true token's probability

    @classmethod
    def of(cls, windows: Sequence[Pairs], documents: Sequence[int], draws: int = 10_000, seed: int = 0) -> Report:
        """windows: what compare gave; documents: which document each window is of."""
        if not windows or len(windows) != len(documents):
            raise ValueError(
                f"torch_fp8: Report.of takes windows and one document number for each, got {len(windows)} and "
                f"{len(documents)}"
            )
        all_ = Pairs.cat(windows)
        delta: dict[int, float] = {}
        counts: dict[int, int] = {}
        for pairs, document in zip(windows, documents):
            delta[document] = delta.get(document, 0.0) + float((pairs.other_nll - pairs.nll).sum())
            counts[document] = counts.get(document, 0) + len(pairs.nll)
        low, high = bootstrap(list(delta.values()), list(counts.values()), draws, seed)
        confident = all_.margin > CONFIDENT
        kld = all_.kld.sort().values
        return cls(
            tokens=len(kld),
            perplexity=math.exp(all_.other_nll.mean()),
            ppl_ratio=math.exp((all_.other_nll - all_.nll).mean()),
            ppl_low=low,
            ppl_high=high,
            kld_mean=float(kld.mean()),
            kld_median=_quantile(kld, 0.5),
            kld_p99=_quantile(kld, 0.99),
            kld_p999=_quantile(kld, 0.999),
            kld_max=float(kld[-1]),
            top1=float(all_.agree.double().mean()),
            confident_disagreement=float((~all_.agree[confident]).double().mean()),  # NaN where none is confident
            rms_dp=float(((-all_.other_nll).exp() - (-all_.nll).exp()).square().mean().sqrt()),
        )


def bootstrap(delta: Sequence[float], counts: Sequence[int], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a perplexity ratio. delta: for each document the sum over its tokens of other minus baseline
    NLL; counts: its tokens. Documents are drawn with replacement, both arms' sums together; the same seed gives the
    same interval. NaN for one document, of which nothing can be learnt about others."""
    if len(delta) < 2:
        return math.nan, math.nan
    sums, tokens = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (delta, counts))
    generator = torch.Generator("cpu").manual_seed(seed)
    parts = []
    for start in range(0, draws, 1000):
        size = (min(1000, draws - start), len(delta))
        drawn = torch.randint(len(delta), size, generator=generator, dtype=torch.int64, device="cpu")
        parts.append(sums[drawn].sum(1) / tokens[drawn].sum(1))
    means = torch.cat(parts).sort().values
    return math.exp(_quantile(means, 0.025)), math.exp(_quantile(means, 0.975))


def _quantile(ordered: Tensor, q: float) -> float:
    """The smallest entry that at least a share q of all does not exceed; torch.quantile refuses large tensors."""
    return float(ordered[max(0, math.ceil(q * len(ordered)) - 1)])


@dataclass(frozen=True)
class Flips:
    """Multiple-choice answers of two arms. A changed answer counts even where the accuracy stays."""

    items: int
    accuracy: float  # of the other arm
    changed: float  # share of items with another choice
    lost: int  # right in the baseline, wrong in the other
    won: int
    p: float  # McNemar's exact test on lost against won

    @classmethod
    def of(cls, baseline: Tensor, other: Tensor, answers: Tensor) -> Flips:
        """Scores (items, choices), the highest is chosen; answers (items,) the right choices."""
        before, after = baseline.argmax(-1), other.argmax(-1)
        lost = int(((before == answers) & (after != answers)).sum())
        won = int(((before != answers) & (after == answers)).sum())
        tail = sum(math.comb(lost + won, i) for i in range(min(lost, won) + 1)) / 2 ** (lost + won)
        return cls(
            items=len(answers),
            accuracy=float((after == answers).double().mean()),
            changed=float((before != after).double().mean()),
            lost=lost,
            won=won,
            p=min(1.0, 2 * tail),
        )


def sqnr(reference: Tensor, x: Tensor) -> float:
    """Signal to quantisation noise in dB: 20 log10(|reference| / |reference - x|); inf where they are equal."""
    reference, x = reference.double(), x.double()
    noise = float((reference - x).norm())
    return 20 * math.log10(float(reference.norm()) / noise) if noise else math.inf


def layer_sqnr(
    model: nn.Module, reference: nn.Module, layers: Iterable[str], run: Callable[[], object]
) -> dict[str, float]:
    """The SQNR in dB of each named layer's output against the layer of that name in reference, both given the input
    that the layer of model sees during run(): what a layer does by itself, not what reaches it from those before."""
    found: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        twin = reference.get_submodule(name)

        def compare_outputs(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            found[name] = sqnr(twin(*args), y)

        return compare_outputs

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer: to freeze while the original stays what it is."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
