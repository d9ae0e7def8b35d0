"""Test that certificates are never broken by an attack, rules of aggregation by logits; and the training for them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitquorum import data, rng
from bitquorum.attacks import PGD
from bitquorum.bounds import margins
from bitquorum.certify import Certify, holds, probability_gap
from bitquorum.conversion import Policy
from bitquorum.data import ImageSet
from bitquorum.ensemble import Aggregation, EmpirVote, Ensemble, MajorityVote, MeanLogits, MeanProbability
from bitquorum.interface import InputError
from bitquorum.objective import IntervalBound, MemberCrossEntropy, Objective, Reduce, Step
from bitquorum.quantizers import Deterministic, Gaussian, Law, Logistic, SmoothRounding, StochasticRounding
from bitquorum.train import Trainer
from bitquorum.zoo import DigitsNet

LAWS: dict[str, Law] = {
    "deterministic": Deterministic(),
    "rounding": StochasticRounding(),
    "logistic": Logistic(),
    "gaussian": Gaussian(),
    "smooth-rounding": SmoothRounding(),
}


def test_the_gap_of_probabilities_is_the_least_of_all_logits_that_keep_the_margins():
    bounds = torch.tensor([[0.0, 1.5, -0.5, 0.3]], dtype=torch.float64)
    others = torch.tensor([[False, True, True, True]])
    gap = probability_gap(bounds, others)[0]
    extra = torch.cat([torch.rand(20000, 4).square() * 40, torch.zeros(1, 4), 40 * (1 - torch.eye(4))]).double()
    logits = -(bounds + extra)
    logits[:, 0] = 0
    p = logits.softmax(-1)
    found = (p[:, :1] - p).amin(0)
    assert (found >= gap - 1e-12).all()
    assert torch.allclose(found[1:], gap[1:], atol=1e-6)


class Other(Aggregation):
    differentiable = True

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.mean((0, 1))


def test_rules_of_aggregation_on_hand_made_margins():
    def certified(rule: Aggregation, *rows: tuple[float, float]) -> bool:
        bounds = torch.tensor([[0.0, *row] for row in rows])[None, :, None]
        return bool(holds(rule, bounds, torch.tensor([0])))

    strong, weak, lost = (3.0, 3.0), (0.1, 0.1), (-1.0, 2.0)
    assert certified(MeanLogits(), strong, lost)
    assert not certified(MeanLogits(), weak, lost)
    assert certified(MeanProbability(), strong, weak)
    assert not certified(MeanProbability(), weak, lost)
    assert certified(MajorityVote(), weak, weak, lost)
    assert not certified(MajorityVote(), weak, lost)
    assert not certified(EmpirVote(), weak, lost)
    assert certified(EmpirVote(), lost, weak), "the full-precision member decides the tie"
    assert not certified(MajorityVote(), lost, lost)
    with pytest.raises(InputError, match="Other"):
        certified(Other(), strong)


@pytest.mark.parametrize("rule", [MeanLogits(), MeanProbability(), MajorityVote(), EmpirVote()], ids=type)
def test_rules_of_aggregation_are_never_broken_by_logits_that_keep_the_margins(rule: Aggregation):
    bounds = torch.randn(1, 3, 400, 4) * 2 + 1
    labels = torch.randint(4, (400,))
    bounds.scatter_(-1, labels.expand(1, 3, 400)[..., None], 0.0)
    certified = holds(rule, bounds, labels)
    assert 20 < int(certified.sum()) < 380
    for scale in (0.0, 1.0, 30.0):
        logits = -(bounds + scale * torch.rand(2, *bounds.shape[1:]).square())  # two passes
        logits.scatter_(-1, labels.expand(2, 3, 400)[..., None], 0.0)
        assert (rule(logits).argmax(-1) == labels)[certified].all()


def ensemble(law: Law, bits: int = 4) -> Ensemble:
    with rng.torch_seed(1):
        networks = [nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)) for _ in range(2)]
    policy = Policy(weight_bits=bits, activation_bits=bits, weight_law=law, activation_law=law)
    return Ensemble.build(networks, [policy, policy])


def train(term: IntervalBound | None, law: Law, bits: int = 4, *, flip: bool = False) -> Ensemble:
    terms = (MemberCrossEntropy(),) if term is None else (MemberCrossEntropy(weight=0.5), term)
    trainer = Trainer(epochs=5, batch_size=40, lr=0.05, calibration=100, augment=data.Augment(flip=flip))
    return trainer(ensemble(law, bits), data.load("digits", "train").take(600), Objective(terms=terms))


@pytest.fixture(scope="module")
def trained() -> dict[str, Ensemble]:
    return {
        "plain": train(None, Logistic()),
        "certified": train(IntervalBound(epsilon=16 / 255, ramp=0.5), Logistic()),
    }


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return data.load("digits", "test").take(40)


CERTIFY = Certify(epsilons=(2 / 255, 12 / 255), statements=("all", "fresh", "nearest"), draws=2, batch_size=25)


@pytest.mark.long
def test_training_for_bounds_raises_certified_accuracy(trained: dict[str, Ensemble], digits: ImageSet):
    def floor(name: str) -> dict[tuple[str, float], float]:
        found = CERTIFY(trained[name], digits)
        return {(part.statement, round(255 * part.epsilon)): part.accuracy().value for part in found}

    plain, certified = floor("plain"), floor("certified")
    assert certified["clean", 0] > 0.5
    assert certified["fresh", 12] > plain["fresh", 12] + 0.1
    for found in (plain, certified):
        assert found["clean", 0] >= found["fresh", 2] >= found["fresh", 12]
        assert found["fresh", 12] >= found["all", 12]


@pytest.mark.long
@pytest.mark.parametrize(("passes", "mirrored"), [(1, False), (2, False), (1, True)])
def test_an_attacker_who_knows_the_draw_breaks_no_certificate(
    trained: dict[str, Ensemble], digits: ImageSet, passes: int, *, mirrored: bool
):
    if mirrored:
        model = train(IntervalBound(epsilon=16 / 255, ramp=0.5), Logistic(), flip=True).eval().requires_grad_(False)
    else:
        model = trained["certified"].eval().requires_grad_(False)
    model.passes, model.mirrored = passes, mirrored
    batch = digits.batch(torch.arange(len(digits)))
    parts = {(part.statement, part.epsilon): part for part in CERTIFY(model, digits)}
    model.passes = 1
    epsilon = CERTIFY.epsilons[1]
    flags = parts["fresh", epsilon].certified
    assert flags.float().mean() > (0.1 if mirrored else 0.2)  # digits and their mirror images are harder to learn
    for index in range(CERTIFY.draws):
        seeds = rng.derive_many(rng.derive(CERTIFY.seed, "certify"), passes, "draw", index)

        def frozen(images: Tensor, seeds: list[int] = seeds) -> Tensor:
            with rng.draw(seeds, batch.examples):
                return model(images)

        found = PGD(steps=10)(frozen, batch.images, batch.labels, epsilon=epsilon, examples=batch.examples, seed=0)
        model.passes = passes
        right = model.predict(frozen(found.images))[0] == batch.labels
        model.passes = 1
        assert right[flags[index]].all()
        assert not right.all(), "the attack does something"


@pytest.mark.long
def test_every_draw_can_be_certified_where_rounding_is_fine(digits: ImageSet):
    model = train(IntervalBound(epsilon=4 / 255, ramp=0.5, validity="all"), StochasticRounding(), bits=8)
    certify = Certify(epsilons=(1 / 255,), draws=2)
    clean, every, fresh = certify(model, digits)
    assert clean.certified.shape == fresh.certified.shape == (2, 40)
    assert every.certified.shape == (1, 40)
    assert every.accuracy().value > 0.3
    assert (every.certified <= fresh.certified).all()
    batch = digits.batch(torch.arange(40))
    found = PGD(steps=5, eot=3)(model, batch.images, batch.labels, epsilon=1 / 255, examples=batch.examples, seed=0)
    for seed in range(10):
        with rng.draw(seed, batch.examples):
            right = model.predict(model(found.images))[0] == batch.labels
        assert right[every.certified[0]].all()


@pytest.mark.long
def test_certificates_resume_and_do_not_depend_on_batches(trained: dict[str, Ensemble], digits: ImageSet):
    heard: list[object] = []
    first = CERTIFY(trained["plain"], digits, on_certificate=heard.append)
    assert len(heard) == len(first) == 7
    again = CERTIFY(trained["plain"], digits, done=first, on_certificate=lambda part: pytest.fail("computed"))
    assert again == first
    other = Certify(**{**CERTIFY.__dict__, "batch_size": 40})(trained["plain"], digits)
    assert all(torch.equal(a.certified, b.certified) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("mirrored", [True, False])
def test_an_ensemble_that_looks_again_is_certified_by_both_looks(digits: ImageSet, *, mirrored: bool):
    with rng.torch_seed(0):
        members = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
    model = Ensemble(members, aggregation=MeanLogits(), mirrored=mirrored, shift=0 if mirrored else 1).eval()
    plain = Ensemble(members, aggregation=MeanLogits()).eval()
    images = digits.batch(torch.arange(len(digits))).images
    said = replace(digits, labels=model.predict(model(images))[0])  # so that every image is right
    certify = Certify(epsilons=(4 / 255,), statements=("all",))
    both, one = (certify(each, said)[1].certified[0] for each in (model, plain))
    looks = [
        margins(member, look.double(), said.labels, epsilon=4 / 255)
        for look in (images, images.flip(-1) if mirrored else nn.functional.pad(images, (1, -1, 1, -1)))
        for member in members
    ]
    assert torch.equal(both, holds(model.aggregation, torch.stack(looks)[None], said.labels))
    assert both.any()
    assert not both.all()
    assert not torch.equal(both, one)


def test_an_ensemble_without_noise_has_one_draw_and_one_statement(digits: ImageSet):
    model = ensemble(Deterministic())
    found = CERTIFY(model, digits)
    assert [(part.statement, len(part.certified)) for part in found] == [("clean", 1), ("all", 1), ("all", 1)]


def step(model: Ensemble, progress: float) -> Step:
    return Step(
        ensemble=model,
        images=torch.rand(6, 1, 8, 8),
        labels=torch.arange(6),
        examples=torch.arange(6),
        progress=progress,
        seed=5,
        memory={},
        reduce=Reduce(),
    )


@pytest.mark.parametrize("law", LAWS)
def test_the_term_is_the_likelihood_at_the_worst_logits_and_has_gradients(law: str):
    model = ensemble(LAWS[law])
    term = IntervalBound(epsilon=4 / 255, ramp=0.5)
    assert [term.epsilon_at(progress) for progress in (0.0, 0.25, 1.0)] == [0.0, 2 / 255, 4 / 255]
    start = step(model, 0.0)
    assert torch.allclose(term(start), torch.stack(start.member_losses).mean(), atol=1e-5), "a ball of one image"
    later = step(model, 1.0)
    value = term(later)
    worst = [
        later.respond((later.images + 4 / 255 * torch.randn_like(later.images).sign()).clamp(0, 1)) for _ in range(20)
    ]
    seen = torch.stack([-logits.log_softmax(-1)[0, :, range(6), later.labels].mean() for logits in worst])
    assert (value >= seen).all()
    value.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert sum(float(parameter.grad.abs().sum()) > 0 for parameter in model.parameters() if parameter.grad is not None)


def test_the_term_is_exact_for_a_linear_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    here = step(Ensemble([network]), 1.0)
    here = replace(here, images=0.2 + 0.6 * here.images, labels=here.labels % 5)
    weight, logits = network[1].weight, network(here.images)
    reach = (weight[None] - weight[here.labels][:, None]).abs().sum(-1)
    worst = logits + 4 / 255 * reach  # each class against the true one, at the corner that favours it
    wanted = nn.functional.cross_entropy(worst, here.labels)
    torch.testing.assert_close(IntervalBound(epsilon=4 / 255)(here), wanted, rtol=1e-5, atol=1e-6)


def test_the_term_has_gradients_through_group_norm_from_the_first_step():
    network = DigitsNet(width=4, norm="group")(classes=10, shape=(1, 8, 8))
    model = Ensemble.build([network], [Policy()])
    IntervalBound()(step(model, 0.0)).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert found
    assert all(bool(gradient.isfinite().all()) for gradient in found)


def test_a_later_pass_in_training_leaves_the_gradient_of_the_bounds_alone():
    """Batch norm moves its running mean in place, and the bounds are linear in what they read of it."""
    network = DigitsNet(width=4, norm="batch")(classes=10, shape=(1, 8, 8))
    model = Ensemble.build([network], [Policy()]).train()
    said, gradients = step(model, 1.0), []
    for later in (False, True):
        part = replace(said, ensemble=copy.deepcopy(model))
        loss = IntervalBound()(part)
        if later:
            MemberCrossEntropy()(part)
        loss.backward()
        gradients.append([parameter.grad for parameter in part.ensemble.parameters() if parameter.grad is not None])
    assert gradients[0]
    torch.testing.assert_close(*gradients)


def test_a_bad_term_is_refused():
    for wrong, words in (
        ({"epsilon": 0.0}, r"expected epsilon in \(0, 1\]"),
        ({"ramp": 2.0}, r"ramp in \[0, 1\]"),
        ({"weight": float("inf")}, "expected a finite weight, got inf"),
    ):
        with pytest.raises(InputError, match=words):
            IntervalBound(**wrong)  # type: ignore[arg-type]


def test_mixed_images_are_bounded_for_both_labels():
    model, term = ensemble(SmoothRounding()), IntervalBound(epsilon=4 / 255)
    plain = step(model, 1.0)
    others, share = torch.arange(6).roll(1), torch.linspace(0, 1, 6)
    mixed, swapped = replace(plain, mixed=(others, share)), replace(plain, labels=others)
    own, other = (torch.stack([term(replace(part, **one(part, row))) for row in range(6)]) for part in (plain, swapped))
    assert torch.allclose(term(mixed), (share * own + (1 - share) * other).mean(), atol=1e-5)


def one(part: Step, row: int) -> dict[str, Tensor]:
    """Return the fields of a step of one image."""
    return {name: getattr(part, name)[row : row + 1] for name in ("images", "labels", "examples")}


def test_a_member_that_says_no_number_may_vote_for_any_class():
    bounds = torch.tensor([[0.0, 1.0, 1.0], [0.0, torch.nan, torch.nan], [0.0, torch.nan, torch.nan]])[None, :, None]
    assert not bool(holds(MajorityVote(), bounds, torch.tensor([0])))


def test_bad_fields_of_a_certification_are_refused():
    for wrong, words in (
        ({"epsilons": ()}, "increasing epsilons"),
        ({"epsilons": (0.2, 0.1)}, "increasing epsilons"),
        ({"epsilons": (0.2, 1.1)}, r"epsilons in \(0, 1\]"),
        ({"draws": 0}, "at least one draw"),
        ({"statements": ()}, "different statements"),
    ):
        with pytest.raises(InputError, match=words):
            Certify(**wrong)  # type: ignore[arg-type]
