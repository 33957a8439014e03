"""Writes docs/api.md from the signatures and docstrings of what ``torch_fp8.__all__`` names: ``make docs``."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch_fp8 as fp8

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
ROOMS = ("swap", "recipe", "layers", "scaling", "observe", "tuning", "checkpoints")  # what is not here comes after
HEAD = """\
# What torch_fp8 offers

Written by `make docs` from the docstrings. `import torch_fp8 as fp8` brings all of it. Callbacks for trainers are in
`torch_fp8.integrations`; the ops, `torch.ops.torch_fp8.*`, are listed in `csrc/register.cpp`, and the C++ interface is
`#include <torch_fp8/torch_fp8.h>`.
"""
WIDTH = 100  # of a signature in one line


def page() -> str:
    sections: dict[str, list[str]] = defaultdict(list)
    for name in fp8.__all__:
        sections[_place(name)[0].partition(".")[0]].append(name)
    contents, parts = "", ""
    for room in sorted(sections, key=lambda room: ROOMS.index(room) if room in ROOMS else len(ROOMS)):
        names = sorted(sections[room], key=_place)
        items = (f"* {_link(name)}: {_first_sentence(name)}\n" for name in names)
        contents += f"\n**{_title(room)}**\n\n" + "".join(items)
        parts += f"\n## {_title(room)}\n" + "".join(_entry(name) for name in names)
    return HEAD + contents + parts


def _link(name: str) -> str:
    """GitHub knows a heading by its name in small letters, and of two that are then alike counts the second."""
    anchor = name.lower()
    return f"[`{name}`](#{anchor + '-1' if name != anchor and anchor in fp8.__all__ else anchor})"


def _title(room: str) -> str:
    if not room:
        return "This installation"
    doc = inspect.getdoc(sys.modules[f"torch_fp8.{room}"]) or room
    return _markdown(doc.split("\n")[0].split(". ")[0].rstrip("."))


def _place(name: str) -> tuple[str, int]:
    """The module below torch_fp8 that defines a name, and the line there: what belongs together stands together. "" is
    the package itself."""
    for module in [name for name in sys.modules if name.startswith("torch_fp8.") and not name.endswith("._C")]:
        source = inspect.getsource(sys.modules[module]) if hasattr(sys.modules[module], name) else ""
        if found := re.search(rf"^(class|def) {name}\b", source, re.MULTILINE):
            return module.partition(".")[2], source.count("\n", 0, found.start())
    return "", 0


def _doc(name: str) -> str:
    thing = getattr(fp8, name)
    if callable(thing):
        doc = inspect.getdoc(thing)
    else:  # a value has a comment "#: ..." above it
        found = re.search(rf"((?:#: .*\n)+){name} = ", inspect.getsource(fp8))
        doc = found and found[1].replace("#: ", "").strip()
    if not doc:
        raise SystemExit(f"torch_fp8: {name} is in __all__ and has no docstring; write one")
    return doc


def _first_sentence(name: str) -> str:
    paragraph = _doc(name).split("\n\n")[0].replace("\n", " ")
    sentence = paragraph.split(". ")[0]
    return _markdown((sentence if len(sentence) < 120 else sentence.split(": ")[0]).rstrip("."))


def _entry(name: str) -> str:
    thing = getattr(fp8, name)
    lines = [f"\n### {name}\n"]
    parameters: list[str] = []
    if callable(thing):
        lines += ["```python", _signature(f"fp8.{name}", thing), "```", ""]
        parameters = list(inspect.signature(thing).parameters)
    lines.append(_text(_doc(name), parameters))
    if inspect.isclass(thing):
        members = [_member(key, value) for key, value in vars(thing).items() if not key.startswith("_")]
        lines += ["\nAttributes and methods:\n", *filter(None, members)] if any(members) else []
    return "\n".join(lines) + "\n"


def _member(name: str, member: Any) -> str:
    if not (inspect.isfunction(member) or isinstance(member, property)) or not member.__doc__:
        return ""
    call = name if isinstance(member, property) else _signature(name, member, skip_self=True)
    return f"* `{call}`: " + _markdown(inspect.getdoc(member) or "").replace("\n", "\n  ").replace("  \n", "\n")


def _signature(name: str, thing: Any, skip_self: bool = False) -> str:
    signature = inspect.signature(thing)
    parameters = list(signature.parameters.values())[skip_self:]
    shown: list[str] = []
    named_only = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not named_only:
            shown, named_only = [*shown, "*"], True
        shown.append(str(parameter.replace(annotation=_Bare(parameter.annotation))).replace("'", '"'))
    result = "" if inspect.isclass(thing) or skip_self else f" -> {_Bare(signature.return_annotation)!r}"
    line = f"{name}({', '.join(shown)}){result}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){result}"


class _Bare:
    """An annotation that prints as it stands in the source."""

    def __init__(self, annotation: Any) -> None:
        self.text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text.replace("typing.", "")


def _text(doc: str, parameters: list[str]) -> str:
    """A docstring as Markdown; "name: ..." at the beginning of a line, of a parameter, becomes an item of a list."""
    lines: list[str] = []
    within = False  # an item
    for line in doc.split("\n"):
        names, colon, rest = line.partition(": ")
        if colon and set(names.split(", ")) <= set(parameters):
            if not within and lines and lines[-1]:
                lines.append("")
            lines.append("* " + ", ".join(f"`{name}`" for name in names.split(", ")) + ": " + _markdown(rest))
            within = True
        else:
            within = within and bool(line)
            lines.append("  " + _markdown(line.strip()) if within else _markdown(line))
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """From reStructuredText's marks to Markdown's; stars outside of code are no emphasis."""
    text = re.sub(r":(?:func|class):`(?:torch_fp8\.)?(\w+)`", lambda found: _link(found[1]), text)
    parts = re.split(r"(``.*?``)", text)
    parts[::2] = [re.sub(r"\*\*(?=\S)", r"\\*\\*", part) for part in parts[::2]]
    return "".join(parts).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
