"""Ask other attack libraries for a second opinion: they attack, our draws judge.

None of them is a dependency. Each sees the model as its own users would hand it over: a module that maps images to one
row of scores and takes a fresh draw at every call.
"""

import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.ensemble import Ensemble, mean_log_probability
from bitquorum.geometry import Norm, norm_of, project
from bitquorum.interface import BitquorumError, ConfigError, Model
from bitquorum.registry import nearest


class PeerError(BitquorumError):
    """Report a peer that fails on a model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Opinion:
    """Hold what a peer made of the images.

    Attributes:
        name: Of the attack.
        version: Of the peer.
        images: Its adversarial images, projected into the ball where they lay outside.
        claimed: The robust accuracy that the peer itself states, if it states one.
        seconds: That it took.
        outside: Number of images that lay outside of the ball or of [0, 1].
    """

    name: str
    version: str
    images: Float[Tensor, "batch *image"]
    claimed: float | None
    seconds: float
    outside: int


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Hold what a peer is given."""

    module: nn.Module
    classes: int
    images: Tensor
    labels: Tensor
    epsilon: float
    norm: Norm
    seed: int


@final
class Scores(nn.Module):
    """Present a model as a module from images to scores `[batch, classes]`, with a fresh draw at every call.

    Args:
        model: With logits `[draw, member, batch, classes]`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch classes"]:
        """Return the aggregation's scores, or the logarithm of the members' mean probability."""
        passes = getattr(self.model, "passes", 1)
        with rng.draw(rng.derive_many(rng.fresh_seed(), passes)):
            logits = self.model(images)
        if isinstance(self.model, Ensemble):
            return self.model.aggregation(logits)
        views = logits.flatten(0, 1)
        return views[0] if len(views) == 1 else mean_log_probability(views)


def second_opinion(
    name: str,
    model: Model,
    images: Float[Tensor, "batch *image"],
    labels: Int[Tensor, "batch"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    seed: int = 0,
) -> Opinion:
    """Let a peer attack the model.

    Args:
        name: One of `PEERS`.
        model: An `Ensemble`, or a wrapped module.
        images: In [0, 1].
        labels: True classes.
        epsilon: Radius.
        norm: `linf` or `l2`.
        seed: Of torch's generator and, where it takes one, of the peer.

    Raises:
        ConfigError: if the peer is unknown or not installed, or does not know the norm.
        PeerError: if it fails on this model.
    """
    check_peer(name, norm)
    call, scores = _peer(name)[0], Scores(model).eval()
    with rng.torch_seed(seed), torch.no_grad():
        classes = scores(images[:1]).shape[1]
    task = _Task(module=scores, classes=classes, images=images, labels=labels, epsilon=epsilon, norm=norm, seed=seed)
    started = time.monotonic()
    with warnings.catch_warnings(), rng.torch_seed(seed):
        warnings.simplefilter("ignore")
        try:
            found, claimed = call(task)
        except BitquorumError:
            raise
        except Exception as error:
            raise PeerError(f"expected {name} to attack the model, got {type(error).__name__}: {error}") from error
    seconds = time.monotonic() - started
    found = found.detach().to(images)
    numbers = found.flatten(1).isfinite().all(1)
    found = found.where(numbers.view(-1, *[1] * (found.dim() - 1)), images)
    outside = ~numbers | (norm_of(found - images, norm) > epsilon + 1e-5) | (found.flatten(1).amax(1) > 1 + 1e-6)
    outside |= found.flatten(1).amin(1) < -1e-6
    return Opinion(
        name=name,
        version=version_of(name),
        images=project(found, images, epsilon, norm),
        claimed=claimed,
        seconds=seconds,
        outside=int(outside.sum()),
    )


def check_peer(name: str, norm: Norm = "linf") -> None:
    """Raise `ConfigError` if a peer is unknown, not installed or without the norm: before long work, not after it."""
    _, module, distribution = _peer(name)
    _require(name, module, distribution)
    if norm != "linf" and module == "torchattacks":
        raise ConfigError(f"expected the norm linf for {name}, got {norm}; choose another peer")


def version_of(name: str) -> str:
    """Return the version of an installed peer."""
    return metadata.version(_peer(name)[2])


def _peer(name: str) -> tuple[Callable[[_Task], tuple[Tensor, float | None]], str, str]:
    if name not in PEERS:
        raise ConfigError(f"expected a peer among {', '.join(PEERS)}, got {name!r}; {nearest(name, PEERS)}")
    return PEERS[name]


def _require(name: str, module: str, distribution: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"expected {distribution} to be installed for {name}, got: {error}; try `pip install {distribution}`"
        ) from error


def _autoattack(version: str) -> Callable[[_Task], tuple[Tensor, float | None]]:
    def call(task: _Task) -> tuple[Tensor, float | None]:
        from pyautoattack import AutoAttack  # type: ignore[import-not-found]

        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state.json"
            attack = AutoAttack(
                task.module,
                version=version,  # type: ignore[arg-type]
                eps=task.epsilon,
                norm={"linf": "Linf", "l2": "L2"}[task.norm],  # type: ignore[arg-type]
                seed=task.seed,
                device=task.images.device,
            )
            few = min(9, task.classes - 1)  # wrong classes to aim at: nine, or as many as there are
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = few
            found, _ = attack.run_standard_evaluation(task.images, task.labels, batch_size=250, state_path=state)
            flags = json.loads(state.read_text())["_robust_flags"]
        return found, sum(flags) / len(flags)

    return call


def _torchattacks(name: str, **options: Any) -> Callable[[_Task], tuple[Tensor, float | None]]:
    def call(task: _Task) -> tuple[Tensor, float | None]:
        import torchattacks  # type: ignore[import-not-found]

        if name == "AutoAttack":  # as many wrong classes to aim at as AutoAttack has, and as there are
            usual: dict[str, Any] = {"seed": task.seed, "n_classes": min(10, task.classes)}
        else:
            usual = {"alpha": task.epsilon / 4}
        attack = getattr(torchattacks, name)(task.module, eps=task.epsilon, **usual, **options)
        parts = [attack(x, y) for x, y in zip(task.images.split(250), task.labels.split(250), strict=True)]
        return torch.cat(parts), None

    return call


def _adv_lib(name: str, **options: Any) -> Callable[[_Task], tuple[Tensor, float | None]]:
    def call(task: _Task) -> tuple[Tensor, float | None]:
        from adv_lib import attacks  # type: ignore[import-not-found]

        norm = {"linf": float("inf"), "l2": 2.0}[task.norm]
        parts = [
            getattr(attacks, name)(task.module, x, y, eps=task.epsilon, norm=norm, **options)
            for x, y in zip(task.images.split(250), task.labels.split(250), strict=True)
        ]
        return torch.cat(parts), None

    return call


PEERS: Final[dict[str, tuple[Callable[[_Task], tuple[Tensor, float | None]], str, str]]] = {
    "autoattack-standard": (_autoattack("standard"), "pyautoattack", "pyautoattack"),
    "autoattack-rand": (_autoattack("rand"), "pyautoattack", "pyautoattack"),
    "torchattacks-pgd": (_torchattacks("PGD", steps=20), "torchattacks", "torchattacks"),
    "torchattacks-eotpgd": (_torchattacks("EOTPGD", steps=20, eot_iter=10), "torchattacks", "torchattacks"),
    "torchattacks-autoattack": (_torchattacks("AutoAttack"), "torchattacks", "torchattacks"),
    "adv-lib-apgd-ce": (_adv_lib("apgd", loss_function="ce"), "adv_lib.attacks", "adv-lib"),
    "adv-lib-apgd-dlr": (_adv_lib("apgd"), "adv_lib.attacks", "adv-lib"),
    "adv-lib-apgd-targeted": (_adv_lib("apgd_targeted"), "adv_lib.attacks", "adv-lib"),
}
