"""Compare a quantized activation with a clip, with torch's fake quantizer under noise, and with a peer's."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bitquorum import kernels, rng
from bitquorum.benchmark.timing import Contender, Sizes, Workload, fastest, kept_bytes, recorded
from bitquorum.quantizers import Deterministic, Logistic, Quantizer, SmoothRounding

_HIGH = 3.0
_Function = Callable[[Tensor], Tensor]


def quantizer(sizes: Sizes) -> Iterator[Workload]:
    """Yield three passes over one activation.

    - `forward`: without gradients.
    - `backward`: forward, then the gradient with respect to the input, and to the range where that is learned.
    - `double`: forward, the gradient with a graph, and the gradient of that, as an input-gradient penalty needs it.

    On CUDA each comes again as a CUDA graph, without peers: what the kernels take where the host is not waited for.
    """
    generator = torch.Generator().manual_seed(0)
    # A twelfth lies outside of the range at either end.
    x = torch.rand(sizes.shape, generator=generator) * 1.2 * _HIGH - 0.1 * _HIGH
    weight = torch.randn(sizes.shape, generator=generator)
    x, weight = (tensor.to(sizes.device).requires_grad_() for tensor in (x, weight))
    functions = dict(_functions(sizes.bits, sizes.device))
    kept = {label: kept_bytes(partial(function, x)) for label, function in functions.items()}
    for name in ("forward", "backward", "double"):
        contenders = tuple(
            Contender(
                name=label,
                run=partial(_pass, name, function, x, weight),
                kept=None if name == "forward" else kept[label],
            )
            for label, function in functions.items()
        )
        yield Workload(name=f"quantizer, {name}", contenders=contenders)
        if torch.device(sizes.device).type == "cuda":
            graphs = tuple(
                Contender(name=label, run=recorded(partial(_pass, name, function, x, weight)))
                for label, function in functions.items()
                if label == "hardtanh" or (label.startswith("SQ ") and not label.endswith("plain"))
            )
            yield Workload(name=f"quantizer, {name}, recorded", contenders=graphs)


def _pass(kind: str, function: _Function, x: Tensor, weight: Tensor) -> None:
    if kind == "forward":
        with torch.no_grad():
            function(x)
        return
    learned = function.parameters() if isinstance(function, nn.Module) else ()
    gradient, *_ = torch.autograd.grad(function(x), (x, *learned), weight, create_graph=kind == "double")
    if kind == "double":
        torch.autograd.grad(gradient, (x, weight), weight.detach(), allow_unused=True)


def _functions(bits: int, device: str) -> Iterator[tuple[str, _Function]]:
    yield "hardtanh", nn.Hardtanh(0.0, _HIGH)
    nearest = Quantizer(bits, high=_HIGH, law=Deterministic()).to(device)
    yield "round to nearest", nearest
    compiled = fastest(device) == "compiled"
    if compiled:
        yield "round to nearest, compiled", partial(_ours, nearest, "compiled")
    for law in (Logistic(), SmoothRounding()):
        found = Quantizer(bits, high=_HIGH, law=law).to(device)
        yield f"SQ {type(law).__name__}, plain", partial(_ours, found, "eager")
        if compiled:
            yield f"SQ {type(law).__name__}", partial(_ours, found, "compiled")
    if compiled:
        yield "SQ Logistic, learned range", _Learned(Quantizer(bits, high=_HIGH, learned=True).to(device))
    yield "torch fake_quantize with noise", partial(_fake, bits)
    yield from _brevitas(bits, device)
    yield from _torchao(bits)


def _ours(quantize: Quantizer, mode: kernels.Mode, x: Tensor) -> Tensor:
    with kernels.use(mode), rng.draw(0):
        return quantize(x)


class _Learned(nn.Module):
    """Run a quantizer in compiled code, as a module: a pass asks for the gradients of its parameters too."""

    def __init__(self, quantize: Quantizer) -> None:
        super().__init__()
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        return _ours(self.quantize, "compiled", x)


def _fake(bits: int, x: Tensor) -> Tensor:
    top = 2**bits - 1
    return torch.fake_quantize_per_tensor_affine(_noisy(bits, x), _HIGH / top, 0, 0, top)


def _noisy(bits: int, x: Tensor) -> Tensor:
    """Return the input plus logistic noise of the variance that SQ's has, by torch's own generator."""
    return x + torch.empty_like(x).uniform_().logit_().mul_(Logistic().scale * _HIGH / (2**bits - 1))


def _brevitas(bits: int, device: str) -> Iterator[tuple[str, _Function]]:
    """Yield the peer's fake quantizer with a scale that is a parameter, with noise; nothing where it is missing."""
    try:
        from brevitas.nn import QuantReLU  # pyright: ignore[reportMissingImports]
        from brevitas.quant import Uint8ActPerTensorFloatMaxInit  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    relu = QuantReLU(act_quant=Uint8ActPerTensorFloatMaxInit, bit_width=bits, max_val=_HIGH).to(device)
    yield "Brevitas QuantReLU with noise", lambda x: relu(_noisy(bits, x))


def _torchao(bits: int) -> Iterator[tuple[str, _Function]]:
    """Yield the peer's fake quantizer of activations, with a scale for each row, with noise; nothing if missing."""
    try:
        from torchao.quantization.qat import (  # pyright: ignore[reportMissingImports]
            IntxFakeQuantizeConfig,
            IntxFakeQuantizer,
        )
    except ImportError:
        return
    config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), "per_token", is_symmetric=False)
    fake = IntxFakeQuantizer(config)
    yield "torchao IntxFakeQuantizer with noise", lambda x: fake(_noisy(bits, x))
