"""How sharp the loss is around the logits of a sequence's last token, which arXiv 2405.18710 watches in training of
reduced precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sharpness(logits: Tensor, targets: Tensor, epsilon: float = 1e-3) -> Tensor:
    """100 * (max f(z + y) - f(z)) / (1 + f(z)) of each row: f is the cross-entropy of logits z (..., vocabulary) and
    the target (...) int64, y goes over the box |y_i| <= epsilon * (|z_i| + 1). Float32 (...) on the logits' device.

    The form is that of arXiv 1609.04836, of logits in the place of parameters. f falls in the target's logit and grows
    in every other, so its maximum is in the box's corner y_i = -epsilon * (|z_i| + 1) for the target, + for the others:
    one more cross-entropy and no search. A logit of -inf, as of a masked vocabulary, stays what it is. Raises
    ValueError where the shapes do not fit or epsilon is negative."""
    if logits.dim() < 1 or logits.shape[:-1] != targets.shape or not epsilon >= 0:
        raise ValueError(
            "torch_fp8: sharpness takes logits (..., vocabulary), targets (...) and epsilon >= 0, got "
            f"{list(logits.shape)}, {list(targets.shape)} and {epsilon!r}"
        )
    z = logits.detach().to(torch.float32)
    room = (epsilon * (z.abs() + 1)).masked_fill(z == -torch.inf, 0.0)
    is_target = F.one_hot(targets, z.shape[-1]).to(torch.bool)
    at, worst = (_cross_entropy(y, targets) for y in (z, torch.where(is_target, z - room, z + room)))
    return 100 * (worst - at) / (1 + at)


def _cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    return torch.logsumexp(z, -1) - z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
