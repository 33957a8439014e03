"""A training that was recorded once, before the redesign of the layers' insides: twenty steps give the same bits.

Everything outside of the FP8 layers is exact or rounded once (products and differences element by element), so that the
record holds on any machine. ``python tests/test_recorded.py`` writes it anew.
"""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from torch import nn

RECORD = Path(__file__).parent / "recorded.json"
RECIPES = {
    "delayed": fp8.DelayedScaling(amax_history_len=4),
    "delayed, most recent, powers of two": fp8.DelayedScaling(
        amax_compute_algo="most_recent", power_of_two=True, margin=1, fp8_format="E4M3"
    ),
    "current": fp8.CurrentScaling(power_of_two=True, grad_margin=3),
    "constant": fp8.ConstantScaling(bias=3, grad_margin=2),
}
CASES = {
    f"{recipe}, {'bias' if bias else 'no bias'}, {micro_batches} micro-batches": (recipe, bias, micro_batches)
    for recipe in RECIPES
    for bias in (False, True)
    for micro_batches in (1, 3)
}


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def train(recipe: str, bias: bool, micro_batches: int) -> dict[str, list[str] | str]:
    random = torch.Generator().manual_seed(0)
    sizes = (40, 56, 24, 24)
    layers = [fp8.Linear(i, o, bias, recipe=RECIPES[recipe], auto_update=False) for i, o in itertools.pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randint(-512, 513, parameter.shape, generator=random) / 2048).float())
    losses = []
    for _ in range(20):
        for _ in range(micro_batches):
            x = torch.randint(-256, 257, (18, sizes[0]), generator=random) / 64
            dy = torch.randint(-256, 257, (18, sizes[-1]), generator=random) / 4096
            y = model(x)
            losses.append(digest(y))
            y.backward(dy)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad * 0.0625)
                parameter.grad = None
        fp8.update_scales(model)
    return {
        "outputs": losses,
        "weights": digest(*model.parameters()),
        "slots": digest(*(layer.fp8_slots for layer in layers)),
        "histories": digest(*(layer.fp8_history for layer in layers)),
    }


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_recorded(case):
    assert train(*CASES[case]) == json.loads(RECORD.read_text())[case]


if __name__ == "__main__":
    RECORD.write_text(json.dumps({name: train(*case) for name, case in CASES.items()}, indent=1) + "\n")
