"""Test second opinions: against peers where they are installed, and the contract on stand-ins where they are not."""

import sys
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitquorum import peers, rng
from bitquorum.attacks import APGD, APGDTargeted
from bitquorum.conversion import Policy
from bitquorum.ensemble import EmpirVote, Ensemble
from bitquorum.foreign import wrap
from bitquorum.interface import ConfigError
from bitquorum.museum.exhibits import network
from bitquorum.peers import PEERS, PeerError, Scores, check_peer, second_opinion

IMAGES, LABELS = torch.rand(8, 1, 4, 4), torch.arange(8) % 3


def installed(name: str) -> bool:
    try:
        check_peer(name)
    except ConfigError:
        return False
    return True


def plain() -> nn.Module:
    with rng.torch_seed(1):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put a module in the place of torchattacks whose one attack leaves the ball."""
    module = ModuleType("torchattacks")

    class PGD:
        def __init__(self, model: nn.Module, *, eps: float, alpha: float, steps: int) -> None:
            assert (alpha, steps) == (eps / 4, 20)
            self.model, self.eps = model, eps

        def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
            assert self.model(images).shape == (len(images), 3)
            moved = images.clone()
            moved[0] -= 3 * self.eps * (moved[0] - 0.5).sign()
            return moved

    module.PGD = PGD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchattacks", module)
    monkeypatch.setattr(metadata, "version", lambda name: "9.9")
    return module


def test_a_peers_images_are_brought_back_into_the_ball_and_counted(stand_in: ModuleType):
    model = wrap(plain(), IMAGES)
    opinion = second_opinion("torchattacks-pgd", model, IMAGES, LABELS, epsilon=0.1)
    assert (opinion.name, opinion.version, opinion.claimed, opinion.outside) == ("torchattacks-pgd", "9.9", None, 1)
    assert opinion.seconds >= 0
    moved = (opinion.images - IMAGES).flatten(1).abs().amax(1)
    assert float(moved[0]) <= 0.1 + 1e-6
    assert bool((moved[1:] == 0).all())
    assert float(opinion.images.max()) <= 1


def test_a_peers_images_that_are_no_numbers_count_as_no_attack(stand_in: ModuleType):
    def call(_: Any, images: Tensor, labels: Tensor) -> Tensor:
        return images.clone().index_fill_(0, torch.tensor([1]), torch.nan)

    stand_in.PGD.__call__ = call  # type: ignore[attr-defined]
    opinion = second_opinion("torchattacks-pgd", wrap(plain(), IMAGES), IMAGES, LABELS, epsilon=0.1)
    assert opinion.outside == 1
    assert torch.equal(opinion.images, IMAGES)


def test_a_peer_that_fails_is_told_apart_from_a_failure_of_ours(stand_in: ModuleType):
    stand_in.PGD.__call__ = lambda *_: 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(PeerError, match="expected torchattacks-pgd to attack the model, got ZeroDivisionError"):
        second_opinion("torchattacks-pgd", wrap(plain(), IMAGES), IMAGES, LABELS, epsilon=0.1)


def test_a_peer_aims_at_as_many_wrong_classes_as_there_are(stand_in: ModuleType):
    class AutoAttack:
        def __init__(self, model: nn.Module, *, eps: float, seed: int, n_classes: int) -> None:
            assert (eps, seed, n_classes) == (0.1, 0, 3)

        def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
            return images

    stand_in.AutoAttack = AutoAttack  # type: ignore[attr-defined]
    assert second_opinion("torchattacks-autoattack", wrap(plain(), IMAGES), IMAGES, LABELS, epsilon=0.1).outside == 0


def test_a_peer_without_the_norm_is_refused_before_long_work(stand_in: ModuleType):
    with pytest.raises(ConfigError, match="expected the norm linf for torchattacks-pgd, got l2"):
        check_peer("torchattacks-pgd", "l2")


def test_a_peer_leaves_torchs_generator_alone(stand_in: ModuleType):
    state = torch.get_rng_state()
    second_opinion("torchattacks-pgd", wrap(plain(), IMAGES), IMAGES, LABELS, epsilon=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_there_is_named_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"expected a peer among .*; did you mean 'autoattack-rand'"):
        check_peer("autoattack-rnad")
    monkeypatch.setattr(peers, "import_module", lambda name: import_module("no_such_module_at_all"))
    with pytest.raises(ConfigError, match="try `pip install pyautoattack`"):
        second_opinion("autoattack-rand", wrap(plain(), IMAGES), IMAGES, LABELS, epsilon=0.1)


def test_peers_see_one_row_of_scores_and_fresh_draws():
    policy = Policy(weight_bits=2, activation_bits=2)
    ensemble = Ensemble.build([plain(), plain()], [policy, None]).eval()
    scores = Scores(ensemble)
    first, second = scores(IMAGES), scores(IMAGES)
    assert first.shape == (8, 3)
    assert not torch.equal(first, second)
    assert torch.allclose(first.exp().sum(-1), torch.ones(8))
    voting = Ensemble.build([plain(), plain()], [None, None], aggregation=EmpirVote()).eval()
    assert torch.equal(Scores(voting)(IMAGES), voting.aggregation(voting(IMAGES)))
    single = plain()
    assert torch.equal(Scores(wrap(single, IMAGES))(IMAGES), single(IMAGES))


@pytest.mark.parametrize("name", PEERS)
def test_an_installed_peer_attacks_a_float_network(name: str):
    if not installed(name):
        pytest.skip(f"{PEERS[name][2]} is not installed")
    from bitquorum.data import load

    batch = load("digits", "test").take(40).batch(torch.arange(40))
    model = wrap(network(0), batch.images)
    opinion = second_opinion(name, model, batch.images, batch.labels, epsilon=0.1)
    left = float((model.predict(model(opinion.images))[0] == batch.labels).float().mean())
    ours = [
        attack(model, batch.images, batch.labels, epsilon=0.1).images
        for attack in (APGD(steps=100), APGDTargeted(steps=100))
    ]
    worst = min(float((model.predict(model(x))[0] == batch.labels).float().mean()) for x in ours)
    assert opinion.outside == 0
    assert abs(left - worst) <= 0.1
    assert opinion.claimed is None or abs(opinion.claimed - left) < 0.026
