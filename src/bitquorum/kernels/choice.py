"""Choose between plain and compiled kernels, and call the compiled ones."""

import importlib.util
import os
import shlex
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, no_type_check

import torch
from torch import Tensor

from bitquorum.interface import InputError, NoEffectWarning

Mode = Literal["eager", "compiled"]

# By default a value made by fifty operations, or from more than four numbers, a table's entries among them, is also
# written to memory, though nobody reads it there. The noise of a draw would take minutes to compile without that limit.
_OPTIONS: dict[str, Any] = {
    "cpp.dynamic_threads": True,
    "realize_reads_threshold": 50,
    "realize_acc_reads_threshold": 50,
}
_INEXACT: dict[str, Any] = {
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one operation, rounded once
    "realize_opcount_threshold": 200,
}


class _State:
    """Hold the process-wide choice: autograd's own threads must see it, so it is no context variable."""

    mode: Mode = "eager"
    failed: frozenset[str] = frozenset()


def mode() -> Mode:
    """Return the current choice, `eager` or `compiled`."""
    return _State.mode


def use(mode: Mode) -> ExitStack:
    """Choose `eager` (plain torch) or `compiled` kernels for the whole process.

    The choice holds from the call on. Used as a context manager, the call restores the former choice at the end of the
    block. Results do not depend on it, but for rounding in the last place.

    Args:
        mode: `compiled` pays when a quantizer sees tens of millions of elements; each kernel takes some seconds to
            compile at its first use. Without a compiler it warns once and stays eager.

    Raises:
        InputError: if `mode` is neither.

    Examples:
        >>> with use("eager"):
        ...     mode()
        'eager'
    """
    if mode not in get_args(Mode):
        raise InputError(f"expected kernels among {', '.join(get_args(Mode))}, got {mode!r}")
    if mode == "compiled" and not (compiler_available("cpu") or compiler_available("cuda")):
        _warn_once(
            "kernels.use('compiled') changes nothing: no C++ compiler was found; install g++ or clang++ and the "
            "headers of Python, or name a compiler in CXX"
        )
        mode = "eager"
    stack = ExitStack()
    stack.callback(setattr, _State, "mode", _State.mode)
    _State.mode = mode
    return stack


def runs(node: Any) -> bool:
    """Return whether the backward pass that runs now needs this inner node: `autograd.grad` names its inputs."""
    return node is not None and torch._C._will_engine_execute_node(node)


@cache
def compiler_available(device: str = "cpu") -> bool:
    """Return whether kernels can be compiled for this type of device; looks for tools and compiles nothing.

    A CPU needs a C++ compiler (`CXX`, or `g++`, `clang++`, `cl` on the path) and the headers of Python; CUDA needs a
    device, Triton and a C compiler (`CC`, or `gcc`, `clang`, `cc`).
    """
    if device == "cpu":
        headers = Path(sysconfig.get_path("include"), "Python.h")
        return headers.is_file() and _on_path("CXX", "g++", "clang++", "cl")
    if device == "cuda":
        return (
            torch.cuda.is_available()
            and importlib.util.find_spec("triton") is not None
            and _on_path("CC", "gcc", "clang", "cc")
        )
    return False


def applies(z: Tensor, types: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Return whether a compiled kernel for these types may handle `z`: chosen, and not itself being traced."""
    return (
        _State.mode == "compiled"
        and z.dtype in types
        and z.numel() > 1
        and z.device.type not in _State.failed
        and compiler_available(z.device.type)
        and not torch.compiler.is_compiling()
    )


def call(kernel: Callable[..., Any], *tensors: Tensor, exact: bool = False, **constants: Hashable) -> Any:
    """Return the result of the compiled kernel, or `None`, after a warning, where the compiler failed.

    Exact ones round after each operation, as plain code does, so that a level is that level to the last bit.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        # A view would bring the shape of its base into the guards, and each new base another compilation.
        return _compile(kernel, exact, tuple(constants.items()))(*(tensor.data for tensor in tensors))
    except TorchDynamoException as error:
        device = tensors[0].device.type
        _State.failed |= {device}
        reason = " ".join(str(error).partition("Set TORCHDYNAMO")[0].split()[:40])
        _warn_once(f"the compiler failed ({reason}); the quantizers on {device} run plain torch instead")
        return None


def compute(kernel: Callable[..., Any], *tensors: Tensor, **constants: Hashable) -> Any:
    """Return the result of the compiled kernel, or of the same kernel run plainly where the compiler failed."""
    result = call(kernel, *tensors, exact=False, **constants)
    return kernel(*tensors, **constants) if result is None else result


@cache
@no_type_check
def _compile(
    kernel: Callable[..., Any], exact: bool, constants: tuple[tuple[str, Hashable], ...]
) -> Callable[..., Any]:
    named = dict(constants)

    def specialized(*tensors: Tensor) -> Any:
        return kernel(*tensors, **named)

    with warnings.catch_warnings():  # the compiler's own modules use what torch has deprecated
        warnings.simplefilter("ignore")
        importlib.import_module("torch._inductor.compile_fx")
    # Dynamo limits the recompilations of a code object: each kernel gets one of its own.
    specialized.__code__ = specialized.__code__.replace(co_name=kernel.__name__)
    return torch.compile(specialized, dynamic=True, fullgraph=True, options=_OPTIONS if exact else _OPTIONS | _INEXACT)


def _on_path(variable: str, *names: str) -> bool:
    chosen = shlex.split(os.environ.get(variable, ""))[:1]
    return any(shutil.which(name) for name in chosen or names)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, NoEffectWarning, stacklevel=3)
