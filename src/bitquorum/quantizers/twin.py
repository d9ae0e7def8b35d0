"""Run quantized networks without their noise, for a block of code: the copies from which attacks are transferred."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

from bitquorum.interface import InputError

Twin = Literal["nearest", "mean", "float"]

_CURRENT: ContextVar[Twin | None] = ContextVar("bitquorum_twin", default=None)


@contextmanager
def twin(kind: Twin) -> Iterator[None]:
    """Make every quantizer called inside the block return a value without noise.

    Args:
        kind: `nearest`, the value rounded to the nearest level, with the straight-through gradient; `mean`, the closed
            form of E[Q(x) | x] (a quantizer without noise shows that of logistic noise); `float`, the value itself,
            clipped to the quantizer's range.
    """
    if kind not in get_args(Twin):
        raise InputError(f"expected a twin among {', '.join(get_args(Twin))}, got {kind!r}")
    token = _CURRENT.set(kind)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def ambient() -> Twin | None:
    """Return the twin of the enclosing block, if any."""
    return _CURRENT.get()
