"""How a block connects its children: its forward is run on stubs, which tell which values they were given."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.frozen import FrozenLinear, frozen_layers
from ..layers.fused import INPUT, BlockFusion, Fused, FusedNorm, Step
from ..layers.linear import Layer, fp8_layers
from .computes import MODES, norm_of
from .probe import SAMPLES, Passed, Probe, Sample, Stub, close, gradients, numbers


def block_of(module: nn.Module, probe: Probe) -> BlockFusion | str | None:
    """A module that adds what two of its children make to what it was given, with norms of its own around them. A
    string says why it is none; None: it is nothing like it."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return None
    children = dict(module.named_children())
    norms, others = [], []
    for name, child in children.items():
        if isinstance(child, FusedNorm) or norm_of(child, probe) is not None:
            norms.append(name)
        elif next(child.parameters(), None) is not None or frozen_layers(child):  # which have no parameters
            others.append(name)
    if not norms or not any(fp8_layers(children[name]) or frozen_layers(children[name]) for name in others):
        return None
    if any(isinstance(children[name], nn.ModuleList | Layer | FrozenLinear) for name in others):
        return None
    if len(others) != 2:
        return f"beside norms it has {len(others)} children with parameters, and not two ({', '.join(others)})"
    if any(p is not None for p in module._parameters.values()):
        return "it has parameters of its own"
    width = next(children[norms[0]].parameters()).shape[0]
    plain: Any = type(module).plain_class if isinstance(module, Fused) else type(module)
    try:
        signature = list(inspect.signature(plain.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return "its forward has no signature"
    if not signature or signature[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, _PLAIN):
        return "its forward takes no input"
    if any(p.kind is p.VAR_POSITIONAL for p in signature):
        return "its forward takes any number of arguments"
    return _Wiring(module, probe, norms, others, width, signature).find()


_PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD

# Parameters that a block uses in no other way than to hand them on, as far as is known of names.
_HANDED_ON = ("attention_mask", "position_ids", "position_embeddings", "cache", "past_key_values", "layer_past")

_Flow = tuple[tuple[tuple[str, str, str | None, str | None], ...], tuple[str, ...]]  # of each step, and the result


class _Run(NamedTuple):
    """A run on stubs: who was called in which order, and with what."""

    output: Any
    order: list[str]
    stubs: dict[str, Stub]
    values: dict[str, Tensor]  # what the block was given and what the stubs return


class _Wiring:
    def __init__(
        self, module: nn.Module, probe: Probe, norms: list[str], others: list[str], width: int,
        signature: list[inspect.Parameter],
    ) -> None:  # fmt: skip
        self.module, self.probe, self.norms, self.others, self.width = module, probe, norms, others, width
        self.parameters = [p for p in signature if p.kind is not p.VAR_KEYWORD]
        rest = next((p.name for p in signature if p.kind is p.VAR_KEYWORD), None)
        self.takes_rest = rest is not None and not _reads(type(module).forward, rest)
        self.defaults = {p.name: p.default for p in self.parameters if p.default is not p.empty}
        self.opaque = {p.name: Passed() for p in self.parameters[1:]}
        self.rest = Passed()

    def run(
        self, given: dict[str, Any], tuples: tuple[str, ...] = (), training: bool = True,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64), sample: Sample = SAMPLES[0],
    ) -> _Run:  # fmt: skip
        names = [INPUT, *self.norms, *self.others]
        size = sample.sequences, sample.tokens, self.width
        values = {
            name: numbers(*size, seed=i, dtype=dtypes[name != INPUT], scale=sample.scale)
            for i, name in enumerate(names)
        }
        order: list[str] = []
        stubs = {name: Stub((value, None) if name in tuples else value) for name, value in values.items()}
        del stubs[INPUT]
        for name, stub in stubs.items():
            stub.note = functools.partial(order.append, name)
        keywords = {_REST: self.rest} if self.takes_rest else {}
        output = self.probe.run(self.module, stubs, {}, training, values[INPUT], **given, **keywords)
        return _Run(output, order, stubs, values)

    def find(self) -> BlockFusion | str:
        found = self._first_run()
        if isinstance(found, str):
            return found
        given, tuples, run = found
        flow = self._flow(run)
        if isinstance(flow, str):
            return flow
        steps: list[Step] = []
        for name, value, addend, keyword in flow[0]:
            step = self._step(run, given, Step(name, value, addend, keyword, (), (), (), False, name in tuples))
            if isinstance(step, str):
                return step
            steps.append(step)
        for other in self.others:  # those that may return a tuple or a tensor
            if other not in tuples and self._flow(self.run(given, (*tuples, other))) == flow:
                steps = [step._replace(first=True) if step.child == other else step for step in steps]
        handed_on = _handed_on(steps)
        fixed = tuple(name for name in self.opaque if given.get(name) is not self.opaque[name])
        ignored = tuple(name for name in self.opaque if name not in fixed and name not in handed_on)
        why = self._varies(given, tuples, flow, steps, ignored) or self._casts(given, tuples, flow)
        if why:
            return why
        positional = sum(p.kind is not p.KEYWORD_ONLY for p in self.parameters)
        names = tuple(p.name for p in self.parameters)
        return BlockFusion(names, positional, fixed, ignored, self._renamed(), tuple(steps), flow[1])

    def _first_run(self) -> tuple[dict[str, Any], tuple[str, ...], _Run] | str:
        """Arguments with which the forward runs: as many as can be are opaque; the others have their defaults."""
        reason = ""
        for fixed in ((), [name for name in self.opaque if self.defaults.get(name, 0) is None]):
            given: dict[str, Any] = {n: p for n, p in self.opaque.items() if n not in fixed or n in _HANDED_ON}
            for tuples in ((), self.others[:1], self.others[1:], self.others):
                while True:
                    run = self.run(given, tuple(tuples))
                    touched = [name for name, passed in self.opaque.items() if passed.touched]
                    for passed in self.opaque.values():
                        passed.touched = False
                    if not any(name in given and name in self.defaults for name in touched):
                        break
                    given = {name: passed for name, passed in given.items() if name not in touched}
                if not isinstance(run.output, Exception) and not touched:
                    return given, tuple(tuples), run
                error = run.output
                if isinstance(error, Exception):
                    kind = type(error).__name__
                    reason = reason or f"its forward does not run on stubs ({kind.strip('_')}: {str(error)[:80]})"
                else:
                    reason = reason or f"it does more with {touched[0]} than to hand it on"
        return reason

    def _flow(self, run: _Run) -> _Flow | str:
        """Which values went where; with the gradients that follow from it."""
        if isinstance(run.output, Exception):
            return f"its forward does not always run ({str(run.output)[:80]})"
        if not isinstance(run.output, Tensor):
            return "it returns more than one tensor"
        if sorted(run.order) != sorted(run.stubs):
            return "it does not call each of its children once"
        leaves = run.values
        values = {INPUT: leaves[INPUT]}
        parts: dict[str, tuple[str, ...]] = {INPUT: (INPUT,)}  # of which leaves a value is the sum

        def is_sum(t: Any, names: tuple[str, ...]) -> bool:
            return close(t, torch.stack([values[name] for name in names]).sum(0), 1e-12)

        def has_gradients(t: Tensor, names: tuple[str, ...]) -> bool:
            of = [part for name in names for part in parts[name]]
            found = gradients(t, list(leaves.values()))
            one = gradients(leaves[INPUT], [leaves[INPUT]])[0]
            return all(close(g, of.count(name) * one, 1e-12) for name, g in zip(leaves, found, strict=True))

        steps = []
        for name in run.order:
            args, kwargs = run.stubs[name].calls[0]
            tensors: list[tuple[str | None, Tensor]] = [(None, t) for t in args[:1] if isinstance(t, Tensor)]
            tensors += [(key, t) for key, t in kwargs.items() if isinstance(t, Tensor)]
            if len(tensors) != 1 or any(isinstance(t, Tensor) for t in args[1:]):
                return f"{name} takes other arguments than one tensor"
            keyword, given = tensors[0]
            pairs = [(a,) for a in values] + list(itertools.permutations(values, 2))
            of = next((names for names in pairs if is_sum(given, names)), None)
            if of is None:
                return f"what {name} takes is no sum of what the block has"
            if not has_gradients(given, of):
                return f"what {name} takes has another gradient than a sum"
            steps.append((name, of[0], of[1] if len(of) == 2 else None, keyword))
            if len(of) == 2:
                values[" + ".join(of)] = given
                parts[" + ".join(of)] = parts[of[0]] + parts[of[1]]
            values[name], parts[name] = leaves[name], (name,)
        for count in (2, 3):
            for result in itertools.combinations(values, count):
                if is_sum(run.output, result):
                    if has_gradients(run.output, result):
                        return tuple(steps), result
                    return "its result has another gradient than a sum"
        return "its result is not the sum of the residual and what it computed"

    def _step(self, run: _Run, given: dict[str, Any], step: Step) -> Step | str:
        """With what else the child gets, and whence."""
        args, kwargs = run.stubs[step.child].calls[0]
        others = list(enumerate(args[0 if step.keyword else 1 :])) + [
            (key, value) for key, value in kwargs.items() if key != step.keyword
        ]
        positional: list[str] = []
        passes: list[tuple[str, str]] = []
        constants: list[tuple[str, Any]] = []
        rest = False
        for key, value in others:
            source = next((name for name, passed in self.opaque.items() if passed is value), None)
            if value is self.rest and key == _REST:
                rest = True
            elif source is not None and isinstance(key, int):
                positional.append(source)
            elif source is not None and isinstance(key, str):
                passes.append((key, source))
            elif isinstance(key, str) and (value is None or isinstance(value, bool)):
                constants.append((key, value))
            else:
                return f"{step.child} gets what the block was not given"
        if positional and step.keyword:
            return f"{step.child} gets its input behind other arguments"
        return step._replace(positional=tuple(positional), passes=tuple(passes), constants=tuple(constants), rest=rest)

    def _varies(
        self, given: dict[str, Any], tuples: tuple[str, ...], flow: _Flow, steps: list[Step], ignored: tuple[str, ...]
    ) -> str:
        """Whether it computes otherwise in evaluation, or with other arguments: "" if it never does."""
        variants = [given, {name: value for name, value in given.items() if name not in self.defaults}]
        variants += [given | dict.fromkeys(ignored, value) for value in (None, True, False)]
        for variant, training in itertools.product(variants, MODES):
            run = self.run(variant, tuples, training)
            if (now := self._flow(run)) != flow:
                what = "in training and in evaluation" if variant is given else "where arguments are not given"
                why = f": {now}" if isinstance(now, str) else ""
                return f"it computes otherwise {what}{why}"
            if (child := self._who_gets_others(run, steps, variant)) is not None:
                return f"{child} gets other arguments in some calls"
        return self._varies_with_values(given, tuples, flow, steps)

    def _who_gets_others(self, run: _Run, steps: list[Step], given: dict[str, Any]) -> str | None:
        """A child that gets other arguments than its step says."""
        values = {**self.defaults, **given}
        for step in steps:
            args, kwargs = run.stubs[step.child].calls[0]
            wanted = {key: values[source] for key, source in step.passes} | dict(step.constants)
            got = {key: value for key, value in kwargs.items() if key not in (step.keyword, _REST)}
            rest = args[0 if step.keyword else 1 :]
            if (
                got.keys() != wanted.keys() or any(got[key] is not value for key, value in wanted.items())
                or len(rest) != len(step.positional)
                or any(value is not values[source] for value, source in zip(rest, step.positional, strict=True))
            ):  # fmt: skip
                return step.child
        return None

    def _varies_with_values(
        self, given: dict[str, Any], tuples: tuple[str, ...], flow: _Flow, steps: list[Step]
    ) -> str:  # fmt: skip
        """Whether it computes otherwise with other sizes or larger numbers, without gradients, in float16 where sums
        overflow, or where something that it hands on is of a kind that somebody asks for."""
        for sample in SAMPLES[1:]:
            if not _follows(self.run(given, tuples, sample=sample), flow):
                return "it computes otherwise with other sizes, or larger numbers"
        half = torch.float16
        if not _follows(self.run(given, tuples, dtypes=(half, half), sample=Sample(2, 3, 2e4, half)), flow):
            return "it computes otherwise in float16"
        with torch.no_grad():
            if not _follows(self.run(given, tuples), flow):
                return "it computes otherwise without gradients"
        value: Any
        for name in _handed_on(steps) & given.keys():
            for value in (None, False, {}, [], torch.ones(1, 1, 3, 3, dtype=torch.float64, device="cpu")):
                now = given | {name: value}
                run = self.run(now, tuples)
                if not _follows(run, flow) or self._who_gets_others(run, steps, now) is not None:
                    return f"it does more with {name} than to hand it on"
        return ""

    def _casts(self, given: dict[str, Any], tuples: tuple[str, ...], flow: _Flow) -> str:
        """Whether sums have another dtype than sums have, as under autocast: "" if they have that."""
        single, half = torch.float32, torch.bfloat16
        for dtypes in ((single, half), (half, single), (half, half)):
            run = self.run(given, tuples, dtypes=dtypes)
            if not isinstance(run.output, Tensor):
                return "its forward takes no values of two dtypes"
            of = {INPUT: dtypes[0], **dict.fromkeys(run.stubs, dtypes[1])}
            for name, value, addend, keyword in flow[0]:
                if addend is not None:
                    of[f"{value} + {addend}"] = torch.promote_types(of[value], of[addend])
                args, kwargs = run.stubs[name].calls[0]
                if (args[0] if keyword is None else kwargs[keyword]).dtype != of[
                    value if addend is None else f"{value} + {addend}"
                ]:
                    return f"it casts what {name} takes"
            if run.output.dtype != (single if single in [of[name] for name in flow[1]] else half):
                return "it casts its result"
        return ""

    def _renamed(self) -> tuple[str, ...]:
        """Keywords that a decorator of the forward may know: the strings that it closes over."""
        found: list[str] = []
        function: Any = type(self.module).forward
        while hasattr(function, "__wrapped__"):
            found += [c.cell_contents for c in function.__closure__ or () if isinstance(_content(c), str)]
            function = function.__wrapped__
        names = {p.name for p in self.parameters}
        return tuple(name for name in dict.fromkeys(found) if name not in names)


def _handed_on(steps: list[Step]) -> set[str]:
    return {source for step in steps for source in (*step.positional, *dict(step.passes).values())}


def _follows(run: _Run, flow: _Flow) -> bool:
    """Whether values go where they went, up to the rounding of their dtype."""
    values = {name: t.detach() for name, t in run.values.items()}
    tolerance = 1e-9 if run.values[INPUT].dtype is torch.float64 else 1e-2

    def is_(t: Any, expected: Tensor) -> bool:
        same = isinstance(t, Tensor) and t.shape == expected.shape and t.dtype == expected.dtype
        return same and torch.allclose(t.detach(), expected, tolerance, tolerance, equal_nan=True)

    if sorted(run.order) != sorted(run.stubs):
        return False
    for name, value, addend, keyword in flow[0]:
        args, kwargs = run.stubs[name].calls[0]
        expected = values[value] if addend is None else values[value] + values[addend]
        if addend is not None:
            values[f"{value} + {addend}"] = expected
        taken = args[0] if keyword is None else kwargs[keyword]
        if not is_(taken, expected):
            return False
    orders = itertools.permutations([values[name] for name in flow[1]])
    return any(is_(run.output, functools.reduce(torch.add, order)) for order in orders)


def _reads(function: Any, name: str) -> bool:
    """Whether a function does more with its keywords of that name than to hand them on."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not hasattr(function, "__code__"):
        return True
    code = [i for i in dis.get_instructions(function) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    for i, following in itertools.pairwise(code):
        named = i.argval if isinstance(i.argval, tuple) else (i.argval,)
        if name in named and "FAST" in i.opname and (named[-1] != name or following.opname != "DICT_MERGE"):
            return True
    return False


_REST = "_of_a_caller"  # a keyword that no forward has


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty as yet
        return None
