"""Show smooth derivatives of operations that have none or hide them, without changing a value.

Inside `relaxed(module)` every torch function that the module calls returns what it always returns, with another
backward pass (BPDA: Athalye et al., 2018, https://arxiv.org/abs/1802.00420, section 4.1):

- `round`, `floor`, `ceil`, `trunc`: the derivative of the identity; `sign`: that of `tanh`.
- A comparison of values that carry a gradient, `a > b` say, becomes a tensor of ones and zeros with the derivative of
  the sigmoid of (a - b) / width, and so do functions of such masks: `&`, `|`, `~`, `where`, `masked_fill`, views.
  Where a function of ones and zeros would return something else than of booleans, it gets booleans, without a
  derivative.
- A cast to integers and back: the derivative of the identity.
- `detach`, `data` and code below `no_grad`: the derivative of the identity.
- `argmax` that ends in `one_hot` or in a scatter of ones: the derivative of the softmax.
- `softmax`: the derivative of a softmax whose two largest arguments lie at most one apart.
- `median` and `kthvalue`: the derivative of the mean over the dimension.
- `x - x.amax(dim, keepdim=True)`, and the same with `max`: the maximum is held constant.

Operations inside quantizers of ours stay as they are: they choose their backward pass themselves (`Surrogate`). A
custom `autograd.Function` keeps its backward pass, whatever that is; only attacks without gradients see through
it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from bitquorum.quantizers import Quantizer

_STEPS: Final = frozenset({"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"})
_COMPARISONS: Final = {"gt": 1.0, "ge": 1.0, "greater": 1.0, "greater_equal": 1.0, "__gt__": 1.0, "__ge__": 1.0} | {
    name: -1.0 for name in ("lt", "le", "less", "less_equal", "__lt__", "__le__")
}
_CASTS: Final = frozenset({"to", "type", "byte", "char", "short", "int", "long", "half", "bfloat16", "float", "double"})
_LEAVES: Final = frozenset({"numpy", "__array__", "tolist", "item", "__float__", "__int__", "__bool__", "__index__"})
_IN_PLACE: Final = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__iand__", "__ior__", "__ixor__"})
_SAME_INDEX: Final = frozenset({"unsqueeze", "squeeze", "to", "long", "clone", "contiguous", "expand", "__getitem__"})


@contextmanager
def relaxed(module: nn.Module, *, width: float = 0.1) -> Iterator[None]:
    """Run a module with relaxed derivatives inside the block.

    Args:
        module: Its quantizers of ours are left alone.
        width: Of the sigmoid in place of a comparison, in units of what is compared.
    """
    mode = _Relaxation(width)
    handles = []
    for inner in module.modules():
        if isinstance(inner, Quantizer):
            handles.append(inner.register_forward_pre_hook(mode.pause))
            handles.append(inner.register_forward_hook(mode.resume, always_call=True))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Relaxation(TorchFunctionMode):
    """Replace the backward pass of the functions that the module's text names."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width, self.paused = width, 0

    def pause(self, *_: Any) -> None:
        self.paused += 1

    def resume(self, *_: Any) -> None:
        self.paused -= 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = _name(func)
        if name in ("_set_grad_enabled", "set_grad_enabled") and args and not args[0]:
            return None  # no_grad: what it encloses keeps its derivative
        if name in ("detach", "detach_", "data") and args:
            return args[0].clone() if name == "detach" else args[0]
        if name in _LEAVES:
            return func(*(_plain(value) for value in args), **kwargs)
        with torch.enable_grad():
            return self._call(name, func, args, kwargs)

    def _call(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(_is_mask(value) for value in _flat((*args, *kwargs.values()))):
            result = _of_masks(name, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            return result
        return self._replace(name, result, args[0], args, kwargs)

    def _replace(self, name: str, result: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        other = args[1] if len(args) > 1 else kwargs.get("other")
        if name in _COMPARISONS and (_carries(x) or _carries(other)):
            difference = torch.sub(x, other) * (_COMPARISONS[name] / self.width)  # type: ignore[arg-type]
            return _as_mask(_with_gradient_of(result.to(difference.dtype), difference.sigmoid()))
        if not _carries(x):
            return self._index(name, result, x, args)
        if name in _STEPS:
            return _with_gradient_of(result, x.tanh() if name in ("sign", "sgn") else x)
        if name == "argmax":
            dim = cast(int | None, args[1] if len(args) > 1 else kwargs.get("dim"))
            return result if dim is None else _mark(result, x, dim)
        if name in ("amax", "max") and not isinstance(other, Tensor):
            _values(result)._top_of = x  # type: ignore[union-attr]
        if name in ("sub", "__sub__", "subtract") and len(args) > 1 and getattr(args[1], "_top_of", None) is x:
            return _with_gradient_of(result, x)
        if name == "softmax":
            return _unsaturated(result, x, cast(int | None, args[1] if len(args) > 1 else kwargs.get("dim")))
        if name in ("median", "kthvalue", "nanmedian"):
            return _of_middle(name, result, x, args, kwargs)
        if name in _CASTS and isinstance(result, Tensor) and not result.is_floating_point():
            result._smooth = x  # type: ignore[attr-defined]
        return self._index(name, result, x, args)

    def _index(self, name: str, result: Any, x: Tensor, args: tuple[Any, ...]) -> Any:
        """Carry derivatives along with integers: the softmax with an argmax, the value with what was cut off it."""
        smooth = getattr(x, "_smooth", None)
        if smooth is not None and name in _CASTS and result.is_floating_point():
            return _with_gradient_of(result, smooth.to(result.dtype))
        soft = _soft(x)
        if soft is not None and name == "one_hot":
            return _with_gradient_of(result.to(soft.dtype), soft) if result.shape == soft.shape else result
        if soft is not None and name in _SAME_INDEX and isinstance(result, Tensor) and not result.is_floating_point():
            result._soft = soft  # type: ignore[attr-defined]
            return result
        if name in ("scatter", "scatter_", "scatter_add", "scatter_add_") and len(args) > 2:
            soft = _soft(args[2])
            if soft is not None and soft.shape == result.shape and result.is_floating_point():
                return result + (soft - soft.detach())
        return result


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return (resolve_name(func) or "").split(".")[-2]
    return name


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


def _soft(value: Any) -> Tensor | None:
    return getattr(value, "_soft", None)


def _as_mask(value: Tensor) -> Tensor:
    value._mask = True  # type: ignore[attr-defined]
    return value


def _is_mask(value: Any) -> bool:
    return getattr(value, "_mask", False)


def _of_masks(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a function of booleans returns, with a derivative where ones and zeros in their place give the same.

    What is boolean then remains a mask.
    """
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    plain = None if in_place else func(*_booleans(args), **_booleans(kwargs))
    if func == Tensor.where:
        func, args = torch.where, (args[1], args[0], *args[2:])
    try:
        result = _MASKED.get(name, func)(*args, **kwargs)
    except (TypeError, RuntimeError, IndexError):
        return func(*_booleans(args), **_booleans(kwargs)) if in_place else plain
    return result if in_place else _agreed(result, plain)


def _agreed(result: Any, plain: Any) -> Any:
    """Return a result where it has the values of the plain one, as a mask where that is boolean; else the plain one."""
    if type(plain) is tuple and isinstance(result, tuple) and len(result) == len(plain):
        return tuple(_agreed(*pair) for pair in zip(result, plain, strict=True))
    if not (isinstance(result, Tensor) and isinstance(plain, Tensor) and result.shape == plain.shape):
        return plain
    if not torch.equal(result.detach().to(plain.dtype), plain.detach()):
        return plain
    if plain.dtype is not torch.bool:
        return result.view_as(result) if _is_mask(result) else result  # `.float()` of a mask is that mask
    return _as_mask(result) if result.is_floating_point() else plain


def _where(mask: Any, one: Any, other: Any) -> Any:
    if not _is_mask(mask):
        return torch.where(mask, one, other)
    first, second = (torch.as_tensor(value).detach() + 0.0 for value in (one, other))
    slope = (first - second).nan_to_num(0.0, 0.0, 0.0)  # of what is infinite there is none
    return torch.where(mask.detach().bool(), one, other) + (mask - mask.detach()) * slope


def _filled(x: Any, mask: Any, value: Any) -> Any:
    return _where(mask, value, x)


def _both(one: Any, other: Any) -> Tensor:
    return one * other


def _either(one: Any, other: Any) -> Tensor:
    return one + other - one * other


def _neither(mask: Tensor) -> Tensor:
    return 1 - mask


_MASKED: Final[dict[str, Callable[..., Any]]] = {
    "where": _where,
    "masked_fill": _filled,
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__", "__rand__"), _both),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__", "__ror__"), _either),
    **dict.fromkeys(("logical_not", "bitwise_not", "__invert__"), _neither),
}


def _flat(args: Any) -> Iterator[Any]:
    for value in args:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _booleans(values: Any) -> Any:
    """Return arguments with booleans in the place of masks."""
    if isinstance(values, dict):
        return {key: _booleans(value) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return tuple(_booleans(value) for value in values)
    return values.detach().bool() if _is_mask(values) else values


def _plain(value: Any) -> Any:
    """Return a value without a derivative, as what leaves torch has it."""
    return _booleans(value).detach() if isinstance(value, Tensor) else value


def _with_gradient_of(value: Tensor, smooth: Tensor) -> Tensor:
    """Return the value bit for bit, with the derivative of another one where that is finite."""
    return value.detach() + (smooth - smooth.detach()).nan_to_num(0.0)


def _mark(index: Tensor, scores: Tensor, dim: int) -> Tensor:
    index._soft = scores.movedim(dim, -1).softmax(-1)  # type: ignore[attr-defined]
    return index


def _values(result: Any) -> Any:
    return result if isinstance(result, Tensor) else result.values


def _unsaturated(result: Tensor, x: Tensor, dim: int | None) -> Tensor:
    if dim is None:  # as torch chooses it where a caller does not
        dim = 0 if x.dim() in (0, 1, 3) else 1
    top = x.detach().topk(min(2, x.shape[dim]), dim).values
    spread = (top.select(dim, 0) - top.select(dim, -1)).nan_to_num(1.0, 1.0, 1.0).clamp(min=1.0).unsqueeze(dim)
    return _with_gradient_of(result, (x / spread).softmax(dim).to(result.dtype))


def _of_middle(name: str, result: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an order statistic with the derivative of the mean."""
    place = 2 if name == "kthvalue" else 1
    dim = args[place] if len(args) > place else kwargs.get("dim", -1 if name == "kthvalue" else None)
    keep = args[place + 1] if len(args) > place + 1 else kwargs.get("keepdim", False)
    if isinstance(result, Tensor):
        return _with_gradient_of(result, x.nanmean())
    values = _with_gradient_of(result.values, x.nanmean(dim, keepdim=keep))
    return type(result)((values, result.indices))
