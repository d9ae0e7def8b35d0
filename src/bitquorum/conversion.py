"""Turn any float network into a quantized one, and back."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from bitquorum.interface import InputError, Method, NoEffectWarning, SharedNoiseWarning
from bitquorum.layers import WEIGHTED, Noise, QuantActivation, QuantImage, QuantLayer
from bitquorum.quantizers import Grid, Law, Logistic, Quantizer


@dataclass(frozen=True, kw_only=True)
class Conversion(Method, ABC):
    """Make the network that is deployed out of a float one: quantized, noisy, or both."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Return the precision in short, for tables."""

    @abstractmethod
    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a converted copy of `network`."""


def _check_bits(*bits: int | None) -> None:
    for count in bits:
        if count is not None:
            Quantizer(count)  # refuses bits that it does not have


@final
@dataclass(frozen=True, kw_only=True)
class Override(Method):
    """Set the bits of the layers whose qualified name matches a pattern; `None` leaves that part in float.

    Attributes:
        pattern: A shell pattern such as `stage1.*`, or `first` or `last` for the outermost weighted layers.
        weight_bits: Bits of the weights of matching layers.
        activation_bits: Bits of matching activations.
    """

    pattern: str
    weight_bits: int | None = None
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        _check_bits(self.weight_bits, self.activation_bits)


@final
@dataclass(frozen=True, kw_only=True)
class Policy(Conversion):
    """Say which parts of a network are quantized, and how.

    Attributes:
        weight_bits: Bits of the weights, per output channel on a symmetric grid; `None` for float.
        activation_bits: Bits of the activations, per tensor; `None` for float.
        weight_law: Noise law of the weights, drawn once per forward pass.
        activation_law: Noise law of the activations, drawn per element.
        image_bits: Bits of the image on [0, 1]; `None` leaves it as it is.
        image_law: Noise law of the image.
        learned: Whether ranges are trained: of weights and activations, of `weights` alone, or of none. Ranges of
            activations that are not trained are those of the calibration.
        per_channel: Whether weights have one range per output channel.
        overrides: Exceptions; the last match wins.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 4
    weight_law: Law = field(default_factory=Logistic)
    activation_law: Law = field(default_factory=Logistic)
    image_bits: int | None = None
    image_law: Law = field(default_factory=Logistic)
    learned: bool | Literal["weights"] = True
    per_channel: bool = True
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        if self.learned not in (True, False, "weights"):
            raise InputError(f"expected learned among true, false and 'weights', got {self.learned!r}")
        _check_bits(self.weight_bits, self.activation_bits, self.image_bits)

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a quantized copy of `network`, as `convert(network, self)` does; a plain copy for a float policy."""
        return copy.deepcopy(network) if self.is_float else convert(network, self)

    @property
    def is_float(self) -> bool:
        """Whether the policy leaves a network in full precision."""
        return (self.weight_bits, self.activation_bits, self.image_bits, self.overrides) == (
            None,
            None,
            None,
            (),
        )

    @property
    def label(self) -> str:
        """The precision in short: `w4a3` for 4-bit weights and 3-bit activations, `fp` for full precision."""
        if self.is_float:
            return "fp"
        image = f"i{self.image_bits}" if self.image_bits else ""
        return f"w{self.weight_bits or 32}a{self.activation_bits or 32}{image}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Say how to quantize the output of an activation: the grid, a first guess of its range, and who clips."""

    grid: Grid
    low: float = 0.0
    high: float = 3.0
    absorbed: bool = False


_Rule = Callable[[nn.Module], Rule]
ACTIVATIONS: dict[type[nn.Module], _Rule] = {
    nn.ReLU: lambda _: Rule(grid="one-sided", absorbed=True),
    nn.ReLU6: lambda _: Rule(grid="one-sided", high=6.0, absorbed=True),
    nn.Hardtanh: lambda m: Rule(grid="two-sided", low=_number(m, "min_val"), high=_number(m, "max_val"), absorbed=True),
    nn.Sigmoid: lambda _: Rule(grid="one-sided", high=1.0),
    nn.Hardsigmoid: lambda _: Rule(grid="one-sided", high=1.0),
    nn.Softplus: lambda _: Rule(grid="one-sided"),
    nn.Tanh: lambda _: Rule(grid="symmetric", high=1.0),
    nn.GELU: lambda _: Rule(grid="two-sided", low=-0.17),
    nn.SiLU: lambda _: Rule(grid="two-sided", low=-0.28),
    nn.Mish: lambda _: Rule(grid="two-sided", low=-0.31),
    nn.Hardswish: lambda _: Rule(grid="two-sided", low=-0.375),
    nn.ELU: lambda _: Rule(grid="two-sided", low=-1.0),
    nn.SELU: lambda _: Rule(grid="two-sided", low=-1.76),
    nn.LeakyReLU: lambda _: Rule(grid="two-sided", low=-0.5),
    nn.PReLU: lambda _: Rule(grid="two-sided", low=-0.5),
}


def _number(module: nn.Module, name: str) -> float:
    return float(getattr(module, name))


def convert(network: nn.Module, policy: Policy) -> nn.Module:
    """Return a copy of `network` with quantized weights, activations and, if asked, image.

    Layers of exactly the types in `layers.WEIGHTED` and activations of exactly the types in `ACTIVATIONS` are replaced;
    normalization layers and everything else stay in float, functions such as `F.relu` too, which are no modules. A
    module that the network calls several times in one pass gets the same noise each time: give each use its own
    instance where that matters.

    Args:
        network: A float network; it is not changed.
        policy: What to quantize and how.

    Raises:
        InputError: if the network is quantized already, or an override matches nothing.

    Warns:
        NoEffectWarning: if nothing was quantized; if other modules keep weights in float that no override leaves so
            (those of an attention, of a transposed convolution, of a subclass of a known layer); if there are layers
            but no activations that are modules, so that those between the layers may be functions; or if the weights of
            a layer are all zero: they have no range.

    Examples:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> quantized = convert(network, Policy(weight_bits=4, activation_bits=2))
        >>> [type(module).__name__ for module in quantized]
        ['QuantLayer', 'QuantActivation', 'QuantLayer']
    """
    bits = _Bits(network, policy)
    image = None if policy.image_bits is None else Quantizer(policy.image_bits, law=policy.image_law)
    found = rebuild(
        network, lambda name, module: _quantized(module, name, bits, policy), conversion=policy, image=image
    )
    kept = [name or type(module).__name__ for name, module in network.named_modules() if _keeps(module, name, bits)]
    bits.check_all_used()
    if kept and any(True for _ in quantizers(found)):
        warnings.warn(
            f"these modules keep their weights in float: {', '.join(kept)}; types that are quantized are "
            f"{', '.join(cls.__name__ for cls in WEIGHTED)}, and no subclasses of them. Build the network of these, or "
            "leave the others in float by an override, which says nothing then",
            NoEffectWarning,
            stacklevel=2,
        )
    if policy.activation_bits is not None and len(bits.weighted) > 1 and not any(map(_is_activation, found.modules())):
        warnings.warn(
            f"no activation of the {len(bits.weighted)} layers is in low bits: none is a module of a type that is "
            f"quantized ({', '.join(cls.__name__ for cls in ACTIVATIONS)}); have modules such as nn.ReLU in the place "
            "of functions such as F.relu, or set activation_bits to none",
            NoEffectWarning,
            stacklevel=2,
        )
    return found


def _keeps(module: nn.Module, name: str, bits: "_Bits") -> bool:
    """Return whether a module has weights that `convert` does not know and that the policy would have in low bits."""
    if type(module) in WEIGHTED or isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return False
    weights = any("weight" in key and value.dim() > 1 for key, value in module.named_parameters(recurse=False))
    return (weights or is_parametrized(module)) and bits.of(name, weights=True) is not None


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, QuantActivation) or type(module) in ACTIVATIONS  # the latter where an override leaves it


def rebuild(
    network: nn.Module,
    replace: Callable[[str, nn.Module], nn.Module | None],
    *,
    conversion: Conversion,
    image: Quantizer | None = None,
) -> nn.Module:
    """Return a copy of a float network with other modules in the place of some, in their mode and with addresses.

    Args:
        network: A float network; it is not changed.
        replace: Returns what takes the place of a module of the copy, given its qualified name, or `None`.
        conversion: Named in the warning.
        image: Quantizer of the image, if any.

    Raises:
        InputError: if the network is quantized or noisy already, is TorchScript, has lazy weights, a hook makes the
            weight of one of its layers, or what is replaced has hooks.

    Warns:
        NoEffectWarning: if nothing was replaced and the image is left alone, or if a layer's weights are all zero:
            their range is a point then, and training cannot move them.
    """
    _check_float(network)
    place, network = _place(network), copy.deepcopy(network)
    replaced: dict[int, nn.Module] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        new = replaced.get(id(module)) or replace(name, module)
        if new is None:
            continue
        _check_unhooked(name, module)
        replaced[id(module)] = new.train(module.training)
        if not name:
            network = new
            break
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, new)
    if image is not None:
        network = QuantImage(image, network)
    elif not replaced:
        warnings.warn(
            f"the conversion changed nothing: no part of the network falls under {conversion!r}; types known are "
            + ", ".join(cls.__name__ for cls in (*WEIGHTED, *ACTIVATIONS)),
            NoEffectWarning,
            stacklevel=3,
        )
    for name, module in network.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's fast path in evaluation would pass by what was replaced
        if isinstance(module, Quantizer | Noise):
            module.to(*place)
        if isinstance(module, QuantLayer) and isinstance(module.quantizer, Quantizer) and not module.layer.weight.any():
            warnings.warn(
                f"{name or 'the layer'}: the weights are all zero, so that training cannot move them once they are "
                "quantized; initialize them, or leave the layer in float by an override",
                NoEffectWarning,
                stacklevel=3,
            )
    set_addresses(network)
    return network


def _check_float(network: nn.Module) -> None:
    """Refuse a network that a conversion would spoil."""
    if any(isinstance(module, Quantizer) for module in network.modules()):
        raise InputError("expected a float network, got one that is quantized already; use `restore` first")
    if any(isinstance(module, Noise) for module in network.modules()):
        raise InputError("expected a float network, got one with noise; convert the network that it was made of")
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise InputError(
            "expected a network of Python modules, got one that is compiled to TorchScript; convert the first"
        )
    if any(is_lazy(parameter) for parameter in network.parameters()):
        raise InputError("expected weights of a known shape, got lazy ones; call the network on some images first")
    for name, module in network.named_modules():
        if type(module) in WEIGHTED and "weight" in vars(module):
            raise InputError(
                f"{name or 'the network'}: expected a layer whose weight is a parameter, got one whose weight a hook "
                "makes, which a quantizer would pass by; remove the hook first, as `torch.nn.utils.prune.remove` and "
                "`remove_spectral_norm` do"
            )


def _check_unhooked(name: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise InputError(
            f"{name or 'the network'}: expected no hooks on a module that the conversion replaces, since nothing would "
            "call them; remove them, and register them on what it returns"
        )


def restore(network: nn.Module) -> nn.Module:
    """Return a float copy of a quantized network: full-precision weights, float activations, no image quantizer.

    Examples:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> restore(convert(network, Policy()))
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    network = copy.deepcopy(network)
    for name, module in reversed(list(network.named_modules(remove_duplicate=False))):  # parts before what holds them
        if isinstance(module, QuantImage):
            inner = module.network
        elif isinstance(module, QuantLayer | QuantActivation):
            inner = module.layer if isinstance(module, QuantLayer) else module.activation
        else:
            continue
        if not name:
            return inner
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, inner)
    return network


def set_addresses(root: nn.Module) -> None:
    """Give every module below `root` that draws noise, those with an `address`, its qualified name as that."""
    for name, module in root.named_modules():
        if hasattr(module, "address"):
            module.address = name  # type: ignore[assignment]


def quantizers(network: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yield every quantizer of a network with its qualified name."""
    for name, module in network.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def is_stochastic(network: nn.Module) -> bool:
    """Return whether two draws of the network can differ: whether a module in it has a true attribute `stochastic`.

    Quantizers with a noise law have it. A noise module of your own must have it too, and draw by `rng.uniform_like`.
    """
    return any(getattr(module, "stochastic", False) for module in network.modules())


def alternatives(network: nn.Module) -> list[nn.Module]:
    """Return the networks of which each draw runs one: a module's own `alternatives`, else the network alone."""
    return list(getattr(network, "alternatives", [network]))


def share_weights(members: Sequence[nn.Module]) -> None:
    """Make every member use the weights and biases of the first; normalization and ranges stay its own.

    The ranges of the weights are fitted to the weights that are now shared.

    Raises:
        InputError: if the members' weighted layers differ in number or shape.
    """
    layers = [
        [module for module in member.modules() if isinstance(module, WEIGHTED) and type(module) in WEIGHTED]
        for member in members
    ]
    for other in layers[1:]:
        shapes = [[tuple(layer.weight.shape) for layer in group] for group in (layers[0], other)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"expected members of one architecture to share weights, got shapes {shapes[0]} and {shapes[1]}"
            )
        for source, target in zip(layers[0], other, strict=True):
            for name in ("weight", "bias"):
                setattr(target, name, getattr(source, name))
    for member in members[1:]:
        for module in member.modules():
            if isinstance(module, QuantLayer):
                module.fit_range()


@torch.no_grad()
def calibrate(network: nn.Module, images: Float[Tensor, "batch *image"]) -> None:
    """Set the range of every activation quantizer from one pass over `images`, in order of execution.

    Each quantizer's range gets the least squared rounding error on what reaches it, behind the layers already
    set. The image's own range stays [0, 1]. Where draws run one of several `alternatives`, each gets a pass.

    Raises:
        InputError: if the images are bytes, as files and `ImageSet.images` hold them: their ranges would be 255 times
            those of the images that the network is to meet.

    Warns:
        SharedNoiseWarning: if a pass calls one activation several times, as networks do that hold one ReLU for many
            places: the last call sets its range.
    """
    if not images.is_floating_point():
        raise InputError(
            f"expected float images in [0, 1], got {images.dtype}; divide by 255, or take `ImageSet.batch`, which does"
        )
    calls: Counter[nn.Module] = Counter()

    def fit(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not isinstance(module, QuantActivation):
            return
        calls[module] += 1
        inner = args[0] if module.absorbed else module.activation(args[0].clone())  # it may work in place
        keep_grid = isinstance(module.activation, nn.Hardtanh | nn.ReLU6 | nn.Sigmoid | nn.Hardsigmoid | nn.Tanh)
        if not keep_grid:
            module.quantizer.fit_range(inner)

    shared: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(fit) for module in network.modules() if isinstance(module, QuantActivation)
    ]
    try:
        with _batch_statistics(network):
            for alternative in alternatives(network):
                alternative(images)
                shared += [module for module, count in calls.items() if count > 1]
                calls.clear()
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, module in network.named_modules() if module in shared]
    if names:
        warnings.warn(
            f"these activations are called several times in a pass: {', '.join(names)}; each has one range and one "
            "noise for all of its places. Give every place a module of its own before the network is converted",
            SharedNoiseWarning,
            stacklevel=2,
        )


@contextmanager
def _batch_statistics(network: nn.Module) -> Iterator[None]:
    """Normalize by the batch inside the block, else evaluate; leave running statistics and modes as they were."""
    state = {name: buffer.clone() for name, buffer in network.named_buffers() if "running" in name or "tracked" in name}
    modes = {module: module.training for module in network.modules()}
    for module in modes:
        module.training = getattr(module, "running_mean", None) is not None
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in network.named_buffers():
            if name in state:
                buffer.copy_(state[name])


def _place(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where the quantizers and noise of a network belong."""
    reference = next(network.parameters(), torch.empty(0))
    return reference.device, torch.promote_types(reference.dtype, torch.float32)


class _Bits:
    """Resolve the bits of each named part of a network under a policy."""

    def __init__(self, network: nn.Module, policy: Policy) -> None:
        self.weighted = [name for name, module in network.named_modules() if type(module) in WEIGHTED]
        self.ends = {"first": self.weighted[:1], "last": self.weighted[-1:]}
        self.policy = policy
        self.unused = list(policy.overrides)

    def of(self, name: str, *, weights: bool) -> int | None:
        chosen = self.policy.weight_bits if weights else self.policy.activation_bits
        for override in self.policy.overrides:
            ends = self.ends.get(override.pattern)
            matches = weights and name in ends if ends is not None else fnmatchcase(name, override.pattern)
            if matches:
                self.unused = [other for other in self.unused if other is not override]
                chosen = override.weight_bits if weights else override.activation_bits
        return chosen

    def check_all_used(self) -> None:
        if self.unused:
            raise InputError(f"expected every override to match a layer, got no match for {self.unused[0].pattern!r}")


def _quantized(module: nn.Module, name: str, bits: _Bits, policy: Policy) -> nn.Module | None:
    if isinstance(module, WEIGHTED) and type(module) in WEIGHTED:
        count = bits.of(name, weights=True)
        if count is None:
            return None
        quantizer = Quantizer(
            count,
            grid="symmetric",
            law=policy.weight_law,
            learned=policy.learned is not False,
            channels=module.weight.shape[0] if policy.per_channel else None,
            axis=0,
        )
        quantizer.fit_range(module.weight)
        return QuantLayer(module, quantizer)
    rule = ACTIVATIONS.get(type(module))
    count = bits.of(name, weights=False) if rule else None
    if rule is None or count is None:
        return None
    facts = rule(module)
    quantizer = Quantizer(
        count,
        grid=facts.grid,
        low=facts.low,
        high=facts.high,
        law=policy.activation_law,
        learned=policy.learned is True,
    )
    return QuantActivation(module, quantizer, absorbed=facts.absorbed)
