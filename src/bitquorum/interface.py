"""Define the errors, warnings, value types and protocols that the other modules share."""

import sys
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


class BitquorumError(Exception):
    """Report a failure that its user can mend; the command line prints it and exits with code 2."""


class InputError(BitquorumError, ValueError):
    """Report a bad value: the message says what was expected, what came and what to do."""


class ConfigError(InputError):
    """Report a bad experiment file, preset or option."""


class DataError(InputError):
    """Report a data set whose files are corrupt or hold what they should not."""


class MissingDataError(DataError):
    """Report a data set that is not on this machine."""


class GradientMaskingWarning(UserWarning):
    """Warn of noise so narrow that the gradient of the mean vanishes between two thresholds."""


class NoEffectWarning(UserWarning):
    """Warn of a call that changed nothing, or not all that it was to change."""


class SharedNoiseWarning(UserWarning):
    """Warn of a quantizer that a network asks several times in one pass: one range and one noise serve all of them."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Mark a method: a frozen, keyword-only dataclass that is called and is its own configuration.

    A method owns no tensor. Its fields hold numbers, strings, booleans, `None`, other methods and tuples of these, so
    that `registry.encode` and `registry.decode` turn it into a TOML table and back.
    """


@runtime_checkable
class Model(Protocol):
    """Describe what an attack sees: a callable from images to logits, random only through `rng.draw`.

    Inside `rng.draw(seeds, examples)` the leading dimension of the result runs over the seeds and equal calls return
    equal results. Images lie in [0, 1].
    """

    def __call__(self, images: Float[Tensor, "batch *image"], /) -> Float[Tensor, "draw member batch classes"]:
        """Return the logits of every member under every ambient draw."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Count passes over one image: a forward and a backward pass of the whole model under one draw count as one."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Return the sum of both counts."""
        return Cost(forward=self.forward + other.forward, backward=self.backward + other.backward)


class Listener:
    """Hear of the progress of long work; this one stays silent."""

    def begin(self, task: str, total: int) -> None:
        """Hear that a task of `total` units begins."""

    def advance(self, done: int, note: str = "") -> None:
        """Hear how many units of the present task are done."""

    def end(self) -> None:
        """Hear that the present task is done."""


class Printed(Listener):
    """Print what is heard of progress, a line each, to standard error."""

    def __init__(self) -> None:
        self.task, self.of = "", ""

    def begin(self, task: str, total: int) -> None:
        """Note the name of a task."""
        self.task, self.of = task, f"/{total}" if total else ""

    def advance(self, done: int, note: str = "") -> None:
        """Print a line."""
        print(f"{self.task}: {done}{self.of} {note}", file=sys.stderr, flush=True)
