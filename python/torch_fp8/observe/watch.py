"""A watch over a run: an alarm where an activation leaves its healthy growth, which arXiv 2505.20524 finds to come long
before the loss diverges; and, if wanted, 16 bits for a while where that happens (a controller as in arXiv 2606.00539).
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn, optim

from ..checks import check, check_model, is_count, is_int
from ..files import StrPath, as_path
from ..layers.mlp import Look
from ..layers.scaled import Scaled, scaled_modules
from .activations import METRICS, Activations, Reading, in_training_forward
from .points import Points, clean, unwrapped
from .trend import Trend, are_numbers
from .watch_png import draw


@dataclass(frozen=True)
class Alarm:
    """A series left its trend."""

    step: int
    tokens: int
    metric: str  # as in a reading: "kurtosis/qkv/layers.3.attention"
    layer: str  # the decoder layer, or what else the metric is of; "" is the model
    value: float
    expected: float | None  # the most that the trend has
    sigmas: float  # by so many it is above that

    def __str__(self) -> str:
        than = (
            "" if self.expected is None else f", {self.sigmas:.1f} sigma above its trend (at most {self.expected:.4g})"
        )
        where = f"{self.metric} is {self.value:.4g}{than}"
        return f"step {self.step}, {self.tokens:,} tokens: {where}; layer {self.layer or '(the model)'}"


def watch(
    model: nn.Module,
    every: int = 50,
    *,
    metrics: Sequence[str] = ("kurtosis/qkv",),
    tokens: int | None = None,
    points: Points | None = None,
    in_a_row: int = 3,
    sigmas: float = 6.0,
    action: Literal["16bit"] | None = None,
    hold: int = 200,
    at_most: int = 2,
    tau: float = 10.0,
    writer: Any = None,
    log: StrPath | None = None,
    on_alarm: Callable[[Alarm], None] | None = None,
) -> Watch:
    """Measure ``model`` as :func:`activations` does, and raise an alarm where a metric leaves its healthy growth: a
    warning, or a call of ``on_alarm``, with the layer and the metric. The result is a :class:`Watch`.

    Healthy is what grows no faster than tokens do ("sub-linear to logarithmic", arXiv 2505.20524). An alarm is raised
    when ``in_a_row`` samples are ``sigmas`` above that growth, continued from the lowest value / tokens that was seen,
    and above all that the series had until then; or are not finite. Sigma is the series' own noise in log(value), at
    least 0.15: with the default an alarm is a rise to 2.5 times what is healthy, at least. Of the first ten samples
    only those that are not finite raise one. Of a loss, which falls, the trend is the lowest level so far, and sigma at
    least 0.05: an alarm is a rise to 1.35 times that, at least. By ``tests/test_trend.py`` 0 of 200 synthetic healthy
    series raise an alarm (logarithms, powers up to 0.6, logarithms that begin late with up to twice the slope of the
    level before, noise of 1 to 30 %, cooldowns), and 9 of 300 diverging ones do not (exponential, a power of 2 to 4, a
    step to 4 to 100 times).

    metrics: which series are watched, by name ("kurtosis", "kurtosis/qkv", "rms/block", "grad_norm", "loss") or by
        pattern of the whole tag ("kurtosis/*/layers.3*"); all that ``activations`` has but mean and outliers, which
        may be 0 or negative. The default is what the paper speaks of. It sees features that grow beyond the others, not
        what grows as a whole, such as attention's logits or activations under a learning rate that is too high:
        "rms/qkv" sees that, and told of most divergences of ``docs/fog.md``, where kurtosis told of few. It raises
        an alarm in healthy runs too where no norm stands before attention (OLMo 2): there q, k and v grow faster than
        tokens while the learning rate warms up. The others may jump in a healthy run, as an FFN learns to switch
        features on; then they raise an alarm too.
    tokens: of an optimizer step, over all micro-batches and ranks. None: counted in sampled steps where the model looks
        them up in its embedding (the one with most look-ups in a step), on this rank; steps between have as many.
        ``note`` tells others. Give them where a GradScaler skips steps: tokens of skipped ones are counted with the
        next sampled one's, and taken for those of each step after it.
    points, tau, writer: as of :func:`activations`.
    action: "16bit": the FP8 layers and attentions of the decoder layer that raised the alarm compute in 16 bits for
        ``hold`` steps, at most ``at_most`` layers at once, those that are furthest out first; a layer that is out still
        when a place becomes free has its turn then. After that they are in FP8 again, scaled by their own amaxes at
        first, and raise an alarm again if they are out still. Closing the watch undoes it. A compiled model compiles
        anew at either change, and a captured CUDA graph does not see it. Each rank acts by its own alarms, so
        that ranks may hold different layers.
    log: a file to which every sample, alarm and action is appended at once, as a JSON object a line; what is there
        stays. ``torch_fp8.observe.watch.read_log`` reads it. Where log or writer raise OSError in training (a full
        disk), a warning says so once, and training goes on without it.

    ``state_dict`` and ``load_state_dict`` carry the watch over a checkpoint, actions under way too.

    Raises ValueError where a metric or point matches nothing, tokens cannot be counted, or the model has no FP8 layer
    for the action; all before anything changes. RuntimeError before the first optimizer step if no token was seen."""
    return Watch(
        model, every, metrics=metrics, tokens=tokens, points=points, in_a_row=in_a_row, sigmas=sigmas, action=action,
        hold=hold, at_most=at_most, tau=tau, writer=writer, log=log, on_alarm=on_alarm,
    )  # fmt: skip


class Watch(Activations):
    """What :func:`watch` gives. ``readings`` grows with each sample, of which all but the last keep what a picture is
    drawn of (the log has everything), ``alarms`` with each alarm (a dataclass of step, tokens, metric, layer, value,
    expected and sigmas); ``in_16_bits`` has the layers that are held, and until which step."""

    def __init__(
        self, model: nn.Module, every: int = 50, *, metrics: Sequence[str] = ("kurtosis/qkv",),
        tokens: int | None = None, points: Points | None = None, in_a_row: int = 3, sigmas: float = 6.0,
        action: str | None = None, hold: int = 200, at_most: int = 2, tau: float = 10.0, writer: Any = None,
        log: StrPath | None = None, on_alarm: Callable[[Alarm], None] | None = None,
    ) -> None:  # fmt: skip
        check_model(model)
        check(tokens is None or is_int(tokens, 1, 2**62), "tokens", "a positive number, of one optimizer step", tokens)
        check(are_numbers([sigmas]) and sigmas > 0, "sigmas", "a positive number", sigmas)
        check(action in (None, "16bit"), "action", 'None or "16bit"', action)
        for name, value in (("in_a_row", in_a_row), ("hold", hold), ("at_most", at_most)):
            check(is_int(value, 1, 2**62), name, "a positive number", value)
        check(on_alarm is None or callable(on_alarm), "on_alarm", "a function of an Alarm", on_alarm)
        check(log is None or isinstance(log, str | os.PathLike), "log", "a path", log)
        named = isinstance(metrics, str) or (isinstance(metrics, Sequence) and all(isinstance(m, str) for m in metrics))
        check(named, "metrics", "names of metrics", metrics)
        if tokens is None and not _embeddings_of(model):
            raise ValueError(
                f"torch_fp8: the tokens of {type(model).__name__} cannot be counted, since it has no nn.Embedding that "
                "looks them up; give tokens=, the number of one optimizer step"
            )
        if action is not None and not scaled_modules(model):
            raise ValueError(
                f"torch_fp8: {type(model).__name__} has no FP8 layer that could compute in 16 bits; torch_fp8.convert "
                "it first, or watch it with action=None"
            )
        self.in_a_row, self.sigmas, self.action, self.hold, self.at_most = in_a_row, sigmas, action, hold, at_most
        self._unseen_is_said = False
        self.metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        self.alarms: list[Alarm] = []
        self.in_16_bits: dict[str, int] = {}
        self.tokens = 0  # seen so far
        self._given, self._of_step = tokens, tokens
        self._seen: dict[int, tuple[int, int]] = {}  # of each table in this step: its width, and how many it looked up
        self._told: dict[str, float | Tensor] = {}
        self._trends: dict[str, Trend] = {}
        self._held: dict[str, list[str]] = {}  # the modules of each layer that is held
        self._log, self._on_alarm = log, on_alarm
        super().__init__(model, every, points=points, tau=tau, writer=writer)

    def _check(self, model: nn.Module) -> None:
        available = [f"{metric}/{tag}" for tag in self._tags for metric in _GROWING]
        available += ["loss", "grad_norm", *(f"grad_norm/{clean(name)}" for name, _ in model.named_parameters())]
        available += ["sharpness"] if self._sees_sharpness else []
        if not self.metrics:
            raise ValueError(
                f"torch_fp8: metrics must name a metric to watch, such as 'kurtosis', got {self.metrics!r}"
            )
        for metric in self.metrics:
            if not any(_matches(metric, tag) for tag in available):
                heads = dict.fromkeys(
                    "/".join(tag.split("/")[:2]) if "norm" not in tag else "grad_norm" for tag in available
                )
                raise ValueError(
                    f"torch_fp8: {type(model).__name__} has no metric {metric!r} that can be watched; it has "
                    f"{', '.join(heads)}"
                )
        where = None if self._log is None else os.path.dirname(os.path.abspath(self._log))
        if where is not None and not os.path.isdir(where):
            raise ValueError(f"torch_fp8: the folder of log={str(self._log)!r} does not exist; make it first")
        try:
            self._append({"event": "begin", "step": 0})
        except OSError as error:
            raise ValueError(
                f"torch_fp8: log={str(self._log)!r} cannot be written: {error.strerror or error}; give another file"
            ) from error

    def close(self) -> None:
        """Sample no more, and let every layer that is held in 16 bits be in FP8 again."""
        super().close()
        for layer in list(self._held):
            self._release(layer)

    def note(
        self, *, loss: float | Tensor | None = None, grad_norm: float | Tensor | None = None, tokens: int | None = None
    ) -> None:
        """What the watch cannot see of the optimizer step that comes next: its loss, the norm of its gradients before
        clipping, its number of tokens. May be called in every step, or in any."""
        check(tokens is None or is_count(tokens), "tokens", "a number", tokens)
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            is_one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real | None)
            check(is_one, name, "a number or a tensor of one", value)
        given = {"loss": loss, "grad_norm": grad_norm, "tokens": tokens}
        self._told |= {name: value for name, value in given.items() if value is not None}

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def _hang(self, model: nn.Module) -> Iterator[Any]:
        yield from super()._hang(model)
        self._seen.clear()
        for i, table in enumerate(_embeddings_of(model) if self._given is None else ()):
            look = Look(in_training_forward, self._counter(i, getattr(table, "embedding_dim", 0)))
            yield table.register_forward_pre_hook(look, with_kwargs=True)

    def _counter(self, i: int, width: int) -> Callable[[Any], None]:
        def see(ids: Any) -> None:
            if isinstance(ids, Tensor) and ids.numel():
                self._seen[i] = width, self._seen.get(i, (width, 0))[1] + ids.numel()

        return see

    def _before_step(self, model: nn.Module, optimizer: optim.Optimizer) -> None:
        super()._before_step(model, optimizer)
        if self._given is None and self._seen:
            # Positions are looked up once for all sequences, and biases between positions are narrower.
            self._of_step = max(self._seen.values())[1]
        if self._of_step is None and "tokens" not in self._told and self._has_begun():
            raise RuntimeError(
                f"torch_fp8: no tokens were seen in this step of {type(model).__name__}: its embedding was not called; "
                "give torch_fp8.watch tokens=, the number of one optimizer step, or tell it by note(tokens=...)"
            )

    def _tokens_of_step(self) -> int:
        told = self._told.get("tokens", self._of_step)
        return int(told) if told is not None else 0

    def _tokens_so_far(self) -> int:
        return self.tokens + self._tokens_of_step()

    def _values(self) -> dict[str, float]:
        told = {name: float(value) for name, value in self._told.items() if name != "tokens"}
        return {**super()._values(), **told}

    def _new_reading(self, reading: Reading) -> None:
        if self.readings:  # a long run has thousands
            self.readings[-1] = self._for_pictures(self.readings[-1])
        super()._new_reading(reading)
        self._write(step=reading.step, tokens=reading.tokens, **reading.values)
        self._say_what_is_unseen(reading)
        self._judge(reading)

    def _say_what_is_unseen(self, reading: Reading) -> None:
        """A metric may be one that the model could have, but has not: a loss that its forward does not return, the
        gradient of a parameter that is frozen."""
        unseen = [metric for metric in self.metrics if not any(_matches(metric, tag) for tag in reading.values)]
        if unseen and not self._unseen_is_said:
            warnings.warn(
                f"torch_fp8: the first sample has nothing of {', '.join(map(repr, unseen))}, which is watched: "
                "a loss must be what the model returns, or be told by note(loss=...), and a gradient's parameter be "
                "trained",
                stacklevel=2,
            )
        self._unseen_is_said = True

    def _after_step(self) -> None:
        self.tokens += self._tokens_of_step()
        self._told.clear()
        for layer in [layer for layer, until in self.in_16_bits.items() if self.step + 1 >= until]:
            self._release(layer)
        for layer, names in self._held.items():  # what was converted anew meanwhile is held too
            new = self._fp8_of(layer)
            self._keep_in_16_bits(layer, [*names, *(name for name in new if name not in names)], self.in_16_bits[layer])

    # ---- alarms ------------------------------------------------------------------------------------------------------

    def _judge(self, reading: Reading) -> None:
        assert reading.tokens is not None
        new = []
        for tag, value in reading.values.items():
            if value <= 0 or not reading.tokens or not any(_matches(metric, tag) for metric in self.metrics):
                continue
            if tag.partition("/")[0] not in (*_GROWING, "loss", "grad_norm", "sharpness"):
                continue
            trend = self._trends.setdefault(tag, _trend_of(tag))
            trend.add(reading.tokens, value, self.sigmas)
            if trend.beyond == self.in_a_row:
                layer = self._layer_of(tag)
                new.append(Alarm(reading.step, reading.tokens, tag, layer, value, trend.expected, trend.excess))
        new.sort(key=lambda alarm: -alarm.sigmas)
        self.alarms += new
        for alarm in new:
            self._write(event="alarm", **asdict(alarm))
        if self.action is not None:
            self._act()
        for alarm in new:
            if self._on_alarm is None:
                warnings.warn(f"torch_fp8: {alarm}", stacklevel=2)
            else:
                self._on_alarm(alarm)

    def _layer_of(self, tag: str) -> str:
        """The decoder layer that a series is of, or the module that it names where there is none."""
        metric, _, rest = tag.partition("/")
        name = rest if metric == "grad_norm" else rest.partition("/")[2]
        blocks = [of.partition("/")[2] for of in self._tags if of.startswith("block/")]
        return next((block for block in blocks if f"{name}.".startswith(f"{block}.")), name)

    # ---- 16 bits for a while -----------------------------------------------------------------------------------------

    def _act(self) -> None:
        """Give the free places to the layers that are furthest out."""
        out: dict[str, float] = {}
        for tag, trend in self._trends.items():
            if trend.beyond >= self.in_a_row and (layer := self._layer_of(tag)):
                out[layer] = max(out.get(layer, 0.0), trend.excess)
        for layer in sorted(out, key=lambda layer: -out[layer]):
            if len(self._held) >= self.at_most:
                return
            if layer not in self._held and (names := self._fp8_of(layer)):
                self._keep_in_16_bits(layer, names, self.step + 1 + self.hold)
                self._write(event="16bit", step=self.step, layer=layer, until=self.in_16_bits[layer])

    def _fp8_of(self, layer: str) -> list[str]:
        """The modules of a layer that compute in FP8 now."""
        model = self._model()
        modules = scaled_modules(model) if model is not None else {}
        return [
            name for name, module in modules.items() if f"{clean(name)}.".startswith(f"{layer}.") and module.fp8_enabled
        ]

    def _keep_in_16_bits(self, layer: str, names: list[str], until: int) -> None:
        self._held[layer], self.in_16_bits[layer] = names, until
        for module in self._modules(names):
            module.fp8_enabled = False

    def _release(self, layer: str) -> None:
        """Its scales begin anew, since what they know is old; so does the count of points that are out."""
        for module in self._modules(self._held.pop(layer)):
            module.fp8_enabled = True
            module.reset_scaling()
        del self.in_16_bits[layer]
        for tag, trend in self._trends.items():
            if self._layer_of(tag) == layer:
                trend.beyond = 0
        self._write(event="fp8", step=self.step, layer=layer)

    def _modules(self, names: Sequence[str]) -> list[Scaled]:
        model = self._model()
        found = scaled_modules(model) if model is not None else {}
        return [found[name] for name in names if name in found]  # others were reverted, or frozen

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the watch knows, in numbers, strings, lists and dicts."""
        return {
            "step": self.step, "tokens": self.tokens, "of_step": self._of_step,
            "trends": {tag: trend.state_dict() for tag, trend in self._trends.items()},
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "held": {layer: {"modules": names, "until": self.in_16_bits[layer]} for layer, names in self._held.items()},
            "readings": [list(self._for_pictures(reading)) for reading in self.readings],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, actions under way too. Raises ValueError, with the watch as it was, for
        what is no such state, or has layers that this model has not. Layers that the state has not begin anew."""
        wanted = {"step", "tokens", "of_step", "trends", "alarms", "held", "readings"}
        if not isinstance(state, Mapping) or set(state) != wanted:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"torch_fp8: a watch's state has {sorted(wanted)}, got {got}")
        if (part := _part_that_is_none(state)) is not None:
            raise ValueError(
                f"torch_fp8: a watch's state has {part!r} as state_dict gave it, got {state[part]!r:.200}; the file is "
                "damaged, or of another version"
            )
        model = self._model()
        ours = set() if model is None else set(scaled_modules(model))
        points = {f"{metric}/{tag}" for metric in _GROWING for tag in self._tags}
        others = [tag for tag in state["trends"] if tag.split("/")[0] in _GROWING and tag not in points]
        others += [name for held in state["held"].values() for name in held["modules"] if name not in ours]
        if others:
            raise ValueError(
                f"torch_fp8: the state is of a model with {others[0]}, which this one has not; load it into a watch of "
                "a model that was built and converted alike"
            )
        for names in self._held.values():  # with the scales that they have: they may have been loaded just now
            for module in self._modules(names):
                module.fp8_enabled = True
        self._held, self.in_16_bits = {}, {}
        self._end()
        left = self.step
        self.step, self.tokens, self._of_step = state["step"], state["tokens"], self._given or state["of_step"]
        self._trends = {}
        for tag, of_trend in state["trends"].items():
            self._trends[tag] = _trend_of(tag)
            self._trends[tag].load_state_dict(of_trend)
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        self.readings = [Reading(step, tokens, dict(values)) for step, tokens, values in state["readings"]]
        for layer, held in state["held"].items():
            self._keep_in_16_bits(layer, list(held["modules"]), held["until"])
        self._write(event="resume", step=self.step, left=left)
        if self.step % self.every == 0:
            self._begin()

    def _for_pictures(self, reading: Reading) -> Reading:
        return reading._replace(values={tag: value for tag, value in reading.values.items() if self._is_kept(tag)})

    def _is_kept(self, tag: str) -> bool:
        """What a picture is drawn of."""
        return (
            tag in ("loss", "grad_norm")
            or tag.startswith("kurtosis/")
            or any(_matches(metric, tag) for metric in self.metrics)
        )

    def _write(self, **line: Any) -> None:
        self._or_give_up("_log", lambda: self._append(line))

    def _append(self, line: Mapping[str, Any]) -> None:
        """One line, in one write, so that a kill leaves whole lines; what another one tore is ended first."""
        if self._log is None:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        with open(self._log, "ab+") as file:
            torn = False
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write(b"\n" * torn + json.dumps(finite, allow_nan=False).encode() + b"\n")

    def save_png(self, path: StrPath) -> None:
        """Kurtosis and what else is watched over tokens, a line a layer, with the alarms; below them loss and gradient
        norm, as far as they are known. Needs matplotlib."""
        if not self.readings:
            raise RuntimeError("torch_fp8: nothing to draw: no step was sampled yet")
        tags = dict.fromkeys(tag for reading in self.readings for tag in reading.values)
        draw(path, self.readings, self.alarms, [tag for tag in tags if "/" in tag and self._is_kept(tag)])


def read_log(path: StrPath) -> list[dict[str, Any]]:
    """The lines of a watch's log, of one run: what a run wrote after the checkpoint from which it was resumed, or to
    which it was rolled back, is left out, as are runs that began before the last one, and half a line that a kill
    left. Raises ValueError for a whole line that no watch has written."""
    before: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(as_path(path).read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        event = line.get("event") if isinstance(line, dict) else None
        counts = ("step", "left") if event == "resume" else ("step",)
        if not isinstance(line, dict) or not all(is_count(line.get(count)) for count in counts):
            raise ValueError(
                f"torch_fp8: {path} must be the log of a watch, but line {number} is {text[:40]!r}; give another file"
            )
        if event == "begin":
            before, lines = lines or before, []
        elif event == "resume":  # rolled back, or where the run has begun again just before
            rolled_back = line["step"] <= line["left"]
            lines = [old for old in (lines if rolled_back else before) if old["step"] < line["step"]]
        else:
            lines.append(line)
    return lines


_GROWING = tuple(metric for metric in METRICS if metric not in ("mean", "outliers"))


def _part_that_is_none(state: Mapping[str, Any]) -> str | None:
    """The key of a watch's state under which there is something else."""

    def has(value: Any, keys: Iterable[str]) -> bool:
        return isinstance(value, Mapping) and set(value) == set(keys)

    def all_of(values: Any, kind: type, is_one: Callable[[Any], bool]) -> bool:
        each = values.values() if isinstance(values, Mapping) else values
        return isinstance(values, kind) and all(is_one(value) for value in each)

    def are_names(values: Iterable[Any]) -> bool:
        return all(isinstance(name, str) for name in values)

    def is_held(value: Any) -> bool:
        return (
            has(value, ("modules", "until"))
            and isinstance(value["modules"], list)
            and are_names(value["modules"])
            and is_count(value["until"])
        )

    def is_reading(value: Any) -> bool:
        if not isinstance(value, list | tuple) or len(value) != 3 or not isinstance(value[2], Mapping):
            return False
        step, tokens, values = value
        counted = is_count(step) and (tokens is None or is_count(tokens))
        return counted and are_names(values) and are_numbers([*values.values()])

    def is_alarm(value: Any) -> bool:
        if not has(value, Alarm.__dataclass_fields__):
            return False
        counted = all(is_count(value[key]) for key in ("step", "tokens"))
        sizes = [value["value"], value["sigmas"], *([] if value["expected"] is None else [value["expected"]])]
        return counted and are_names([value["metric"], value["layer"]]) and are_numbers(sizes)

    is_good = {
        "step": is_count(state["step"]),
        "tokens": is_count(state["tokens"]),
        "of_step": state["of_step"] is None or is_count(state["of_step"]),
        "trends": all_of(state["trends"], Mapping, Trend.is_state) and are_names(state["trends"]),
        "alarms": all_of(state["alarms"], list, is_alarm),
        "held": all_of(state["held"], Mapping, is_held) and are_names(state["held"]),
        "readings": all_of(state["readings"], list, is_reading),
    }
    return next((part for part, good in is_good.items() if not good), None)


def _trend_of(tag: str) -> Trend:
    return Trend(falls=tag == "loss")


def _matches(metric: str, tag: str) -> bool:
    return tag == metric or tag.startswith(f"{metric}/") or fnmatch.fnmatchcase(tag, metric)


def _embeddings_of(model: nn.Module) -> list[nn.Module]:
    """What looks tokens up: as transformers' models say, else any of the embeddings."""
    inner: Any = unwrapped(model)
    try:
        found = inner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    tables: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [found] if isinstance(found, nn.Module) else tables
