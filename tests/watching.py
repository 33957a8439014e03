"""Small models that are trained under a watch, for tests: soundly, and with what makes one diverge."""

import torch
import torch_fp8 as fp8

from models.gpt import GPT
from models.gpt import Shape as GptShape


def data(step, sequences=8):
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 90_000, (sequences, 1), generator=generator)
    x = starts + torch.arange(17)
    return (x * x % 31 + x % 7) % 32


def gpt(seed=0, layers=3):
    torch.manual_seed(seed)
    return GPT(GptShape(layers, 2, 32), vocab=32, context=16)


def adamw(model):
    return [torch.optim.AdamW(model.parameters(), 3e-3)]


def muon(model):
    matrices = [p for block in model.blocks for p in block.parameters() if p.dim() == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, 3e-3)]


def train(model, optimizers, steps, first=0, change=None, sequences=8):
    losses = []
    for step in range(first, first + steps):
        ids = data(step, sequences).to(next(model.parameters()).device)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if change is not None:
            with torch.no_grad():
                change(model, step)
        losses.append(loss.item())
    return losses


def outlier(begin, factor=1.04, block=1, row=70):
    """A feature of the values, of one block, that grows by construction."""

    def change(model, step):
        if step >= begin:
            model.blocks[block].attn.qkv.weight[row] *= factor

    return change


def fp8_gpt(layers=3):
    return fp8.convert(gpt(layers=layers), fp8.DelayedScaling(amax_history_len=4), tokens=None)


def in_16_bits(model):
    return {name.split(".attn")[0].split(".mlp")[0] for name, m in model.named_modules()
            if isinstance(m, fp8.Linear) and not m.fp8_enabled}  # fmt: skip


def three_steps(begin):
    """The kurtosis of each block jumps, and most in the middle."""

    def change(model, step):
        if step == begin:
            for block, factor in ((0, 10), (1, 90), (2, 40)):
                outlier(begin, factor, block)(model, step)

    return change


def resumable(log=None):
    model = fp8_gpt()
    watched = fp8.watch(
        model, every=3, in_a_row=2, action="16bit", at_most=2, hold=9, log=log, on_alarm=lambda alarm: None
    )
    return model, adamw(model), watched
