"""How the report of ``studies/fog.py`` calls architectures, arms and numbers, and how it tells runs apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from models.fog_config import ARCHITECTURES, SIZES

from .divergence import Loss

if TYPE_CHECKING:
    from .fog_results import Line

NAMES = {
    "llama3": "Llama 3", "olmo2": "OLMo 2", "op": "OP", "op-frozen-qk": "OP + frozen QK", "fog-max": "FOG-max",
    "fog-opt": "FOG-opt", "fog-flash": "FOG-flash", "fog-swiglu": "FOG-SwiGLU",
}  # fmt: skip
CHANGES = {"qk-norm": " with QK-norm", "no-qk-norm": " without QK-norm", "": ""}
ARMS = {
    "bf16": "BF16",
    "bf16-again": "BF16, the same again",
    "fp8": "FP8 linears",
    "fp8-attention": "FP8 linears and attention, as the paper",
    "default": "… own scales for q, k, v, no cold start",
    "separate": "… own scales for q, k, v",
    "warm": "… no cold start",
    "history16": "… amaxes of 16 steps",
    "e4m3": "… attention's gradients in E4M3",
    "forward": "… attention's backward in 16 bits",
}
PAPER_ARM = "fp8-attention"
OLD = " †"  # behind what is said of an old run
MARGIN = 0.25  # per cent of the loss, fixed before the runs


def architecture_name(name: str) -> str:
    plain, _, change = name.partition(":")
    return NAMES.get(plain, plain) + CHANGES[change]


def architecture_order(name: str) -> tuple[int, str]:
    plain = name.partition(":")[0]
    return (list(NAMES).index(plain) if plain in NAMES else len(NAMES), name)


def setting_order(line: Line) -> tuple[int, int, int]:
    """Small models first."""
    size, steps, tokens = line.setting
    return list(SIZES).index(size), steps, tokens


def arm_order(arm: str) -> int:
    return list(ARMS).index(arm)


def bounds_qk(name: str) -> bool:
    """Whether q and k go through a norm or a tanh."""
    plain, _, change = name.partition(":")
    return change == "qk-norm" or (change == "" and ARCHITECTURES[plain].qk != "none")


def plainly(line: Line) -> tuple[str, str, str, int]:
    """Architecture, size and length, learning rate, seed: what a reader tells runs of an arm apart by."""
    return architecture_name(line.architecture), length_words(line), f"{line.spec['lr']:g}", line.spec["seed"]


def length_words(line: Line) -> str:
    size, steps, tokens = line.setting
    return f"{size}, {steps} × {millions(tokens)} tokens"


def size_words(line: Line, among: Iterable[Line]) -> str:
    """Its size alone; its length too, where among these its architecture was trained in another length as well, at its
    size and learning rate."""
    of_its_own = [other for other in among if other.architecture == line.architecture]
    return line.setting[0] if has_one_length(line, of_its_own) else length_words(line)


def has_one_length(line: Line, among: Iterable[Line]) -> bool:
    """Whether those of its size and learning rate are all as long."""
    size, rate = line.setting[0], line.spec["lr"]
    alike = [other for other in among if (other.setting[0], other.spec["lr"]) == (size, rate)]
    return all(other.setting == line.setting for other in alike)


def told_apart(lines: Iterable[Line], *but: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """{what runs share but for these keys of their specs: the words of ``plainly``, without the seed if that is one of
    the keys}, in order. Where two have these words in common, the last word says in what else they differ."""
    count = 3 if "seed" in but else 4
    alike: dict[tuple[str, ...], dict[tuple[str, ...], Line]] = {}
    for line in sorted(lines, key=_order):
        alike.setdefault(tuple(map(str, plainly(line)[:count])), {}).setdefault(line.but_for(*but), line)
    found = {}
    for (*what, last), groups in alike.items():
        specs = [line.training for line in groups.values()]
        keys = [key for key in specs[0] if key not in but]
        keys = [key for key in keys if any(spec.get(key) != specs[0][key] for spec in specs)]
        for key, line in groups.items():
            found[key] = (*what, ", ".join([last, *(_in_words(key, line.spec.get(key)) for key in keys)]))
    return found


def sizes_in(names: Mapping[tuple[str, ...], tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Of ``told_apart``: the size of each alone; where another of its architecture has the same, all that tells them
    apart."""
    short = {key: (name, length.partition(",")[0]) for key, (name, length, _) in names.items()}
    counts = Counter(short.values())
    return {
        key: short[key][1] if counts[short[key]] == 1 else f"{length}, learning rate {rest}"
        for key, (_, length, rest) in names.items()
    }


def _order(line: Line) -> tuple[object, ...]:
    return (*architecture_order(line.architecture), *setting_order(line), line.spec["lr"], line.spec["seed"], line.pair)


def _in_words(key: str, value: object) -> str:
    if key == "every":
        return "sampled every step" if value == 1 else f"sampled every {value} steps"
    return f"{key} {value}"


def millions(count: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def span(values: Iterable[Any], words: Callable[[Any], str] = str) -> str:
    """The least and the most, or the one that all are."""
    known = sorted(values)
    return " to ".join(dict.fromkeys(map(words, (known[0], known[-1]))))


def rates_words(rates: Iterable[float]) -> str:
    known = sorted(set(rates))
    return f"learning rate{'s' * (len(known) > 1)} {listed(f'{rate:g}' for rate in known)}"


def number(loss: Loss, signed: bool = False) -> str:
    """Of a loss or a difference of two; of what nobody reads digit by digit, three digits."""
    if loss is None or not math.isfinite(loss):
        return "lost"
    sign = "+" if signed else ""
    return f"{loss:{sign}.2e}" if abs(loss) >= 1000 else f"{loss:{sign}.4f}" if signed else f"{loss:.2f}"


def three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def listed(words: Iterable[str]) -> str:
    *others, last = [*words] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def rate_words(line: Line) -> str:
    times = "" if line.rate == 1 else f", {line.rate:g} × the usual one"
    return f"learning rate {line.spec['lr']:g}{times}"
