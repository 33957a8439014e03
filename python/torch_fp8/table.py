"""Rows of cells as text: for a terminal, for a notebook, and in Markdown, from where they are read again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape


def plain(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns that line up, two spaces apart. right: the columns whose cells end and not begin together."""
    lines = [head, *rows]
    widths = _widths(lines)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]], *, aligned: bool = False) -> str:
    """A table of Markdown. aligned: with columns that line up, to be read in a terminal too."""
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, *rows)]  # a bar alone ends a cell
    if aligned:
        widths = _widths(lines)
        lines = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    else:
        rule = "| " + " | ".join("---" for _ in head) + " |"
    first, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([first, rule, *others])


def html(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def read_markdown(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page, a row of each as {head: cell}, without the stars of bold type."""
    tables: list[list[dict[str, str]]] = []
    head: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        cells = [cell.strip().replace("**", "").replace(r"\|", "|") for cell in cells]
        if head is None:
            head = cells
            tables.append([])
        elif cells[0].strip("-:"):  # not the rule below the head
            tables[-1].append(dict(zip(head, cells)))
    return tables


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines)]
