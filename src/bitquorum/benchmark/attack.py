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
    with rng.torch_seed(0):
        network = SmallResNet(widths=sizes.widths, activation="relu")(classes=10, shape=(3, 32, 32))
    examples = torch.arange(sizes.batch, device=sizes.device)
    images, labels = rng.uniform(0, examples, 3 * 32 * 32).view(-1, 3, 32, 32), examples % 10
    alone = Ensemble([network]).to(sizes.device).eval().requires_grad_(False)
    bare = Contender(name="bare passes", run=partial(_bare, network, images, labels, sizes.steps))
    ours = Contender(name="PGD", run=_ours(alone, images, labels, PGD(steps=sizes.steps)))
    yield Workload(
        name=f"PGD-{sizes.steps}, float", contenders=(bare, ours, *_peers(network, images, labels, sizes.steps))
    )
    noisy = Ensemble.build([network], [Policy(weight_bits=sizes.bits, activation_bits=sizes.bits)])
    noisy = noisy.to(sizes.device).eval().requires_grad_(False)
    copies, seeds = images.repeat(4, 1, 1, 1), [1, 2, 3, 4]

    def passes() -> None:
        with kernels.use(fastest(sizes.device)), rng.draw(seeds, examples):
            _bare(noisy.members[0], copies, labels.repeat(4), sizes.steps)

    yield Workload(
        name=f"PGD-{sizes.steps}, SQ, EOT 4",
        contenders=(
            Contender(name="bare passes", run=passes),
            Contender(name="PGD", run=_ours(noisy, images, labels, PGD(steps=sizes.steps, eot=4))),
        ),
    )


def _bare(network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
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
