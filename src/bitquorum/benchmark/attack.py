"""Compare PGD with its bare forward and backward passes, and with other libraries where they are installed."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bitquorum import kernels, rng
from bitquorum.attacks import PGD
from bitquorum.benchmark.timing import Contender, Sizes, Workload, fastest
from bitquorum.conversion import Policy
from bitquorum.ensemble import Ensemble
from bitquorum.zoo import SmallResNet

_EPSILON = 5 / 255


def attack(sizes: Sizes) -> Iterator[Workload]:
    """Yield PGD on a float network, which every library can attack, and PGD with EOT on an SQ network."""
    network, images, labels, examples = _task(sizes)
    alone = Ensemble([network]).to(sizes.device).eval().requires_grad_(False)
    bare = Contender(name="bare passes", run=partial(_bare, network, images, labels, sizes.steps))
    ours = Contender(name="PGD", run=_ours(alone, images, labels, PGD(steps=sizes.steps)))
    yield Workload(
        name=f"PGD-{sizes.steps}, float", contenders=(bare, ours, *_peers(network, images, labels, sizes.steps))
    )
    noisy = _noisy(network, sizes)

    def passes() -> None:
        with kernels.use(fastest(sizes.device)), rng.draw([1, 2, 3, 4], examples):
            _bare(lambda x: noisy(x).flatten(0, 2), images, labels.repeat(4), sizes.steps)

    yield Workload(
        name=f"PGD-{sizes.steps}, SQ, EOT 4",
        contenders=(Contender(name="bare passes", run=passes), attack_on_noise("PGD", sizes, eot=4)),
    )


def attack_on_noise(name: str, sizes: Sizes, *, eot: int) -> Contender:
    """Return PGD with so many draws a step on an SQ network."""
    network, images, labels, _ = _task(sizes)
    return Contender(name=name, run=_ours(_noisy(network, sizes), images, labels, PGD(steps=sizes.steps, eot=eot)))


def _task(sizes: Sizes) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return a network, images, labels and the examples' numbers."""
    with rng.torch_seed(0):
        network = SmallResNet(widths=sizes.widths, activation="relu")(classes=10, shape=(3, 32, 32))
    examples = torch.arange(sizes.batch, device=sizes.device)
    images = rng.uniform(0, examples, 3 * 32 * 32).view(-1, 3, 32, 32)
    return network.to(sizes.device), images, examples % 10, examples


def _noisy(network: nn.Module, sizes: Sizes) -> Ensemble:
    policy = Policy(weight_bits=sizes.bits, activation_bits=sizes.bits)
    return Ensemble.build([network], [policy]).to(sizes.device).eval().requires_grad_(False)


def _bare(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, steps: int) -> None:
    """Take the passes of an attack, and nothing else."""
    for _ in range(steps):
        x = images.detach().requires_grad_()
        torch.autograd.grad(nn.functional.cross_entropy(network(x), labels, reduction="sum"), x)


def _ours(ensemble: Ensemble, images: Tensor, labels: Tensor, chosen: PGD) -> Callable[[], object]:
    def run() -> None:
        with kernels.use(fastest(str(images.device))):
            chosen(ensemble, images, labels, epsilon=_EPSILON)

    return run


def _peers(network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Iterator[Contender]:
    try:
        from adv_lib.attacks import pgd_linf  # pyright: ignore[reportMissingImports]

        yield Contender(
            name="adv-lib pgd_linf",
            run=lambda: pgd_linf(network, images, labels, ε=_EPSILON, steps=steps),
        )
    except ImportError:
        pass
    try:
        import torchattacks  # pyright: ignore[reportMissingImports]

        theirs = torchattacks.PGD(network, eps=_EPSILON, alpha=2.5 * _EPSILON / steps, steps=steps)
        yield Contender(name="torchattacks PGD", run=lambda: theirs(images, labels))
    except ImportError:
        pass
