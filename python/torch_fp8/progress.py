"""Progress bars: good manners, not a reason to ask every user for tqdm. They keep silent where nobody watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def bar(items: Iterable[T] = (), **options: Any) -> Any:
    """tqdm's bar over ``items``, or, where tqdm is not installed, what can stand in its place. options: tqdm's, and for
    a bar that is moved by ``update`` its ``total``."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _NoBar(items)
    return tqdm(None if "total" in options else items, disable=None, **options)


class _NoBar(Generic[T]):
    def __init__(self, items: Iterable[T]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __enter__(self) -> _NoBar[T]:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: int) -> None:
        pass
