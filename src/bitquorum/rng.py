r"""Draw noise that is a function of (seed, address, example, element) and of nothing else.

A stochastic module asks for noise by its *address*, the qualified name that `convert` or `Ensemble` gave it. Inside

    with draw(seed, examples=index):
        logits = network(images)

the network is a deterministic function: equal calls give equal outputs, two addresses get independent noise, and the
noise of an example does not depend on its place in the batch, on the batch size or on the number of processes.
Outside a draw every call takes a fresh seed from torch's global generator.

Several seeds at once, `draw([s_1, ..., s_T])`, give a batch that holds T copies of the examples, seed by seed.

The generator is counter-based. A 64-bit key is derived from (seed, address, example); element number `i` of that
example gets two rounds of a 32-bit integer mixing function over `i`, the first keyed by the lower half of the key, the
second by the upper half. The mixing function is the three-shift, two-multiply one that Wellons, *Prospecting for hash
functions*, 2018, found by search (shifts 16, 15, 15; multipliers 0x21f0aaad, 0xd35a2d97). All of it is integer
arithmetic, so CPU and CUDA give the same bits. It is no cryptographic generator: an attacker who knows outputs could
find the seed, which the threat model forbids by decree, not by strength.
"""

import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import SupportsIndex, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import kernels
from bitquorum.interface import InputError

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """Hold the seeds of the ambient draw and the identities of the examples in the batch."""

    seeds: tuple[int, ...]
    examples: Int[Tensor, "batch"] | None = None


_CURRENT: ContextVar[Draw | None] = ContextVar("bitquorum_draw", default=None)


@contextmanager
def draw(
    seeds: SupportsIndex | Sequence[SupportsIndex], examples: Int[Tensor, "batch"] | None = None
) -> Iterator[Draw]:
    """Make every stochastic module inside the block a deterministic function of `seeds` and `examples`.

    Args:
        seeds: One seed, or T seeds for T draws in one batch, laid out seed by seed.
        examples: Integer identity of each example of the batch, such as its index in the data set. Without it the
            examples are numbered by their place in the batch.

    Examples:
        >>> x = torch.zeros(2, 3)
        >>> with draw(7):
        ...     bool((uniform_like(x, "a") == uniform_like(x, "a")).all())
        True
    """
    try:
        chosen = (operator.index(cast(SupportsIndex, seeds)),)
    except TypeError:
        chosen = tuple(operator.index(seed) for seed in cast(Sequence[SupportsIndex], seeds))
    if not chosen:
        raise InputError("expected at least one seed for a draw, got none")
    token = _CURRENT.set(Draw(seeds=chosen, examples=examples))
    try:
        yield _CURRENT.get()  # type: ignore[misc]
    finally:
        _CURRENT.reset(token)


def current() -> Draw | None:
    """Return the ambient draw, or `None` outside of one."""
    return _CURRENT.get()


def derive(seed: int, *path: int | str) -> int:
    """Return a child seed in [0, 2**62) that depends on `seed` and on every element of `path`.

    Examples:
        >>> derive(0, "epoch", 3) == derive(0, "epoch", 3) != derive(0, "epoch", 4)
        True
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def derive_many(seed: int, count: int, *path: int | str) -> list[int]:
    """Return `count` different child seeds; the first n do not depend on `count`."""
    return [derive(seed, *path, index) for index in range(count)]


def uniform_like(x: Float[Tensor, "rows *rest"], address: str) -> Float[Tensor, "rows *rest"]:
    """Return noise in (0, 1) for a batch of activations; rows are (seed, example) pairs, seed by seed.

    In half precision the largest numbers round to 1.

    Args:
        x: A tensor whose first dimension runs over the examples (T copies of them under T seeds).
        address: Name of the module that draws.

    Raises:
        InputError: if the first dimension is not the number of seeds times the number of examples.
    """
    keys = row_keys(x, address)
    return kernels.uniform(keys, x.shape[1:].numel()).view_as(x).to(x.dtype)


def row_keys(x: Float[Tensor, "rows *rest"], address: str) -> Int[Tensor, "rows"]:
    """Return the 64-bit key of every row of a batch; `kernels.uniform` and `kernels.draw` make noise of it.

    Arguments and errors are those of `uniform_like`.
    """
    rows = x.shape[0]
    ambient = current() or Draw(seeds=(fresh_seed(),))
    count = len(ambient.seeds)
    if rows % count or (ambient.examples is not None and ambient.examples.shape[0] * count != rows):
        examples = "any number of" if ambient.examples is None else str(ambient.examples.shape[0])
        raise InputError(
            f"{address or 'a quantizer'}: expected a batch of {count} seeds x {examples} examples, got {rows} rows; "
            "keep the batch in the first dimension inside the network"
        )
    index = ambient.examples if ambient.examples is not None else torch.arange(rows // count)
    return _example_keys(ambient.seeds, address, index.to(x.device))


def uniform_per_draw(x: Float[Tensor, "*shape"], address: str) -> Float[Tensor, "draw *shape"]:
    """Return noise in (0, 1) as `uniform_like` does, for a parameter: a tensor like `x` for each ambient seed."""
    ambient = current() or Draw(seeds=(fresh_seed(),))
    keys = torch.tensor([_signed(derive(seed, "parameter", address)) for seed in ambient.seeds], device=x.device)
    return kernels.uniform(kernels.mix64(keys), x.numel()).view(len(keys), *x.shape).to(x.dtype)


def uniform(
    seed: int, examples: Int[Tensor, "batch"], count: int, *, address: str = ""
) -> Float[Tensor, "batch count"]:
    """Return `count` numbers in (0, 1) for each example, without an ambient draw (augmentation, random starts)."""
    return kernels.uniform(_example_keys((seed,), address, examples), count)


def fresh_seed() -> int:
    """Return a seed from torch's global generator."""
    return int(torch.randint(1 << 62, ()).item())


@lru_cache(maxsize=4096)
def _stream(seed: int, address: str) -> int:
    return _signed(derive(seed, "address", address))


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _example_keys(seeds: tuple[int, ...], address: str, examples: Int[Tensor, "batch"]) -> Int[Tensor, "rows"]:
    return kernels.keys(examples.long(), _streams(seeds, address, examples.device)).flatten()


def _streams(seeds: tuple[int, ...], address: str, device: torch.device) -> Int[Tensor, "two seeds"]:
    """Return the two numbers that stand for each seed at an address."""
    numbers = [_stream(seed, name) for name in (address, address + "\x1f") for seed in seeds]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # nothing of the host may be in a record
        return torch.stack([torch.full((), number, device=device) for number in numbers]).view(2, -1)
    return torch.tensor(numbers).view(2, -1).to(device, non_blocking=True)


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them afterwards (weight initialization, dropout)."""
    with torch_seeds() as set_seed:
        set_seed(seed)
        yield


@contextmanager
def torch_seeds() -> Iterator[Callable[[int], None]]:
    """Give the block a function that seeds torch's global generators, and restore them afterwards.

    They are seeded one by one: `torch.manual_seed` writes down a traceback for devices that are not there.
    """
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    states = [generator.get_state() for generator in generators]

    def set_seed(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    try:
        yield set_seed
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
