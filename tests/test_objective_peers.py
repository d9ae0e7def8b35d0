"""Test the terms of peer defences against closed forms and hand-made members."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitquorum import registry, rng
from bitquorum.conversion import Policy, calibrate
from bitquorum.ensemble import Ensemble, Outputs
from bitquorum.interface import InputError
from bitquorum.layers import QuantLayer
from bitquorum.objective import ADP, DVERGE, GAL, PARL, TRS, Objective, Orthogonality, Reduce, Step, Term
from bitquorum.objective.distill import distill, partners, weighted_outputs

TERMS = [ADP(), GAL(), TRS(), PARL(), DVERGE(steps=2), Orthogonality()]
NAMES = ["adp", "gal", "trs", "parl", "dverge", "orthogonality"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(ensemble: Ensemble, images: Tensor, labels: Tensor, *, seed: int = 3, examples: Tensor | None = None) -> Step:
    return Step(
        ensemble=ensemble,
        images=images,
        labels=labels,
        examples=torch.arange(len(images)) if examples is None else examples,
        progress=1.0,
        seed=seed,
        memory={},
        reduce=Reduce(),
    )


def linear(weights: Sequence[Tensor]) -> Ensemble:
    members = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        members.append(nn.Sequential(nn.Flatten(), layer))
    return Ensemble(members)


def spoken(logits: Tensor, labels: Tensor) -> Step:
    """Return a step whose members have said the given logits `[draw, member, batch, classes]`."""
    said = step(linear([torch.eye(2)]), torch.zeros(len(labels), 2), labels)
    said.__dict__["outputs"] = Outputs(parts=logits.unbind(1), features=())  # where the cached property keeps it
    return said


def small(*, members: int = 2, norm: bool = False) -> Ensemble:
    with rng.torch_seed(0):
        networks = [
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.BatchNorm2d(4) if norm else nn.Identity(),
                nn.GELU(),
                nn.Conv2d(4, 3, 3, stride=2),
                nn.GELU(),
                nn.Flatten(),
                nn.Linear(12, 3),
            )
            for _ in range(members)
        ]
    policies = [Policy(weight_bits=4, activation_bits=4), Policy(weight_bits=None, activation_bits=3), None]
    ensemble = Ensemble.build(networks, policies[:members])
    with rng.draw(0):
        for member in ensemble.members:
            calibrate(member, batch(64)[0])
    return ensemble


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return uniform(1, count, 1, 6, 6).float(), torch.arange(count) % 3


# ADP

ONE_TWO = torch.tensor([[[0.5, 0.25, 0.25]], [[0.25, 0.25, 0.5]]], dtype=torch.float64).log()[None]


def test_adp_by_hand():
    """The mean is (3, 2, 3)/8; behind class 0 the wrong classes are (1, 1) and (1, 2), at a squared cosine of 0.9."""
    entropy = -(0.75 * math.log(0.375) + 0.25 * math.log(0.25))
    diversity = math.log((1 + 1e-6) ** 2 - 0.9)
    for alpha, beta in ((2.0, 0.5), (1.0, 0.0), (0.0, 1.0)):
        got = ADP(alpha=alpha, beta=beta)(spoken(ONE_TWO, torch.tensor([0])))
        assert got.item() == pytest.approx(-(alpha * entropy + beta * diversity), rel=1e-12)


def test_adp_is_a_mean_over_draws_and_examples():
    logits, labels = normal(0, 2, 3, 4, 5), torch.tensor([0, 4, 2, 1])
    parts = [
        ADP()(spoken(logits[t : t + 1, :, n : n + 1], labels[n : n + 1])).item() for t in range(2) for n in range(4)
    ]
    assert ADP()(spoken(logits, labels)).item() == pytest.approx(sum(parts) / 8, rel=1e-12)


def test_adp_survives_sure_members():
    """The diversity does not depend on the true class's logit, even where all other probabilities underflow."""
    logits, labels = normal(1, 1, 2, 3, 4).float(), torch.tensor([0, 1, 2])
    sure = (logits + 1e3 * functional.one_hot(labels, 4)).requires_grad_()
    value = ADP(alpha=0.0)(spoken(sure, labels))
    assert value.item() == pytest.approx(ADP(alpha=0.0)(spoken(logits, labels)).item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(value, sure)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 1e-3


def test_adp_pushes_the_wrong_classes_apart():
    logits = torch.tensor([[[[3.0, 1.0, 0.9, 0.0]], [[3.0, 0.9, 1.0, 0.0]]]]).requires_grad_()

    def cosine(given: Tensor) -> float:
        p = given.detach().softmax(-1)[0, :, 0, 1:]
        return float(functional.cosine_similarity(p[0], p[1], dim=0))

    (gradient,) = torch.autograd.grad(ADP(alpha=0.0)(spoken(logits, torch.tensor([0]))), logits)
    assert gradient[..., 0].abs().max() == 0
    assert bool((gradient[0, 0, 0, 1:3].sign() == torch.tensor([-1, 1])).all())
    assert bool((gradient[0, 1, 0, 1:3].sign() == torch.tensor([1, -1])).all())
    assert cosine(logits - 0.01 * gradient) < cosine(logits) - 1e-3


def test_adp_of_a_singular_gram_matrix_and_of_one_member():
    two_classes = normal(2, 1, 2, 3, 2)
    got = ADP(alpha=0.0, beta=1.0)(spoken(two_classes, torch.tensor([0, 1, 1])))
    assert got.item() == pytest.approx(-math.log(2e-6), rel=1e-6)
    one = ADP(alpha=1.0, beta=1.0)(spoken(ONE_TWO[:, :1], torch.tensor([0])))
    assert one.item() == pytest.approx(-1.5 * math.log(2) - math.log(1 + 1e-6), rel=1e-12)


# Input gradients

CORNER = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 1.0, 0.5, 3.0]], dtype=torch.float64)
ACROSS = torch.tensor([[0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)  # W_0 - W_1 at a right angle


def gradient_step(weights: Sequence[Tensor], count: int = 5) -> Step:
    images = uniform(3, count, 1, 2, 2).requires_grad_()
    return step(linear(weights), images, torch.arange(count) % len(weights[0]))


@pytest.mark.parametrize(
    ("other", "cosine"), [(3 * CORNER, 1.0), (-CORNER, -1.0), (CORNER.flip(0), -1.0), (ACROSS, 0.0)]
)
def test_the_agreement_of_two_linear_members(other: Tensor, cosine: float):
    """With two classes the gradient is that of the difference of both rows, times a factor that hits no angle."""
    said = gradient_step([CORNER, other])
    assert GAL()(said).item() == pytest.approx(cosine, abs=1e-9)
    assert TRS(similarity=7.0, smoothness=0.0)(said).item() == pytest.approx(7 * abs(cosine), abs=1e-9)


def test_the_agreement_of_three_linear_members():
    said = gradient_step([CORNER, -CORNER, ACROSS])
    assert GAL()(said).item() == pytest.approx(math.log(math.exp(-1) + 2), abs=1e-9)
    assert TRS(similarity=6.0, smoothness=0.0)(said).item() == pytest.approx(2.0, abs=1e-9)


def test_smoothness_of_a_logistic_model():
    """A logistic model with v = W_1 - W_0 has the gradient (sigmoid(v x) - y) v."""
    said = gradient_step([CORNER])
    v = CORNER[1] - CORNER[0]
    miss = (said.images.detach().flatten(1) @ v).sigmoid() - said.labels
    known = 2 * miss.square().mean() * v.square().sum()
    assert TRS(similarity=9.0, smoothness=1.5)(said).item() == pytest.approx(1.5 * known.item(), rel=1e-12)


@pytest.mark.parametrize("term", [GAL(), TRS()])
def test_second_derivatives_against_the_closed_form(term: Term):
    """Members of three classes have the gradient W^T (p - e_y), which is differentiated here in W by hand."""
    weights = [normal(seed, 3, 4) for seed in (4, 5, 6)]
    said = gradient_step(weights)
    got = torch.autograd.grad(term(said), list(said.ensemble.parameters()))
    leaves = [weight.clone().requires_grad_() for weight in weights]
    x, y = said.images.detach().flatten(1), functional.one_hot(said.labels, 3)
    g = [((x @ w.T).softmax(-1) - y) @ w for w in leaves]
    cosines = torch.stack([functional.cosine_similarity(g[i], g[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    value = cosines.exp().sum(0).log().mean()
    if isinstance(term, TRS):
        value = 40.0 * cosines.abs().mean() + 2.5 * 2 * torch.stack(g).square().sum(-1).mean()
    for mine, known in zip(got, torch.autograd.grad(value, leaves), strict=True):
        torch.testing.assert_close(mine, known)


@pytest.mark.parametrize(("term", "known"), [(GAL(), 0.0), (TRS(smoothness=0.0), 0.0)])
def test_members_without_a_gradient_agree_in_nothing(term: Term, known: float):
    said = gradient_step([CORNER, torch.zeros_like(CORNER)])
    value = term(said)
    assert value.item() == known
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, list(said.ensemble.parameters())))


# Gradients of layers

LAYER = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 1.0, 0.5, 3.0]], dtype=torch.float64)
ASKEW = torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [-3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)


def deep(members: Sequence[Sequence[Tensor]], *, bend: type[nn.Module] = nn.Identity, count: int = 5) -> Step:
    """Return a step of members of the given layers and one more, for the logits."""
    networks = []
    for seed, weights in enumerate(members):
        parts: list[nn.Module] = [nn.Flatten()]
        for weight in (*weights, normal(20 + seed, 3, len(weights[-1]))):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            layer.weight.data.copy_(weight)
            parts += [layer, bend()]
        networks.append(nn.Sequential(*parts))
    return step(Ensemble(networks), uniform(3, count, 1, 2, 2).requires_grad_(), torch.arange(count) % 3)


@pytest.mark.parametrize(
    ("other", "cosine"),
    [(LAYER, 1.0), (5 * LAYER.flip(0), 1.0), (-2 * LAYER, -1.0), (ASKEW, 0.0), (torch.zeros_like(LAYER), 0.0)],
)
def test_parl_of_linear_members_is_the_cosine_of_summed_rows(other: Tensor, cosine: float):
    """Outputs of LAYER sum to (1, -1, 1, 3) x and those of ASKEW, three of them, to (1, 1, 0, 0) x."""
    assert PARL()(deep([[LAYER], [other]])).item() == pytest.approx(cosine, abs=1e-9)


def test_parl_sums_over_pairs():
    said = deep([[LAYER], [-LAYER], [ASKEW]])
    assert PARL()(said).item() == pytest.approx(-1.0, abs=1e-9)


def test_parl_averages_over_the_layers_that_all_members_have():
    """Behind the first layer the rows (1, 0) and (-1, 0) leave the first row of LAYER and its opposite."""
    first, last = [torch.tensor([[sign, 0.0]], dtype=torch.float64) for sign in (1.0, -1.0)]
    members = [[LAYER, first], [LAYER, last]]
    assert PARL(layers=1)(deep(members)).item() == pytest.approx(1.0, abs=1e-9)
    assert PARL()(deep(members)).item() == pytest.approx(0.0, abs=1e-9)
    assert PARL()(deep([*members[:1], [LAYER]])).item() == pytest.approx(1.0, abs=1e-9)


def test_parl_against_the_closed_form_and_its_derivatives():
    """The second layer of W' tanh(W x) has the gradient (1 W' * (1 - tanh^2)) W, the first 1 W."""
    weights = [(normal(seed, 3, 4), normal(seed + 10, 2, 3)) for seed in (4, 5, 6)]
    said = deep(weights, bend=nn.Tanh)
    value = PARL()(said)
    trained = [p for member in said.ensemble.members for p in list(member.parameters())[:2]]
    got = torch.autograd.grad(value, trained)
    leaves = [weight.clone().requires_grad_() for pair in weights for weight in pair]
    x = said.images.detach().flatten(1)
    first = [w.sum(0).expand(5, 4) for w in leaves[::2]]
    second = [(v.sum(0) * (1 - (x @ w.T).tanh() ** 2)) @ w for w, v in zip(leaves[::2], leaves[1::2], strict=True)]
    known = torch.stack(
        [functional.cosine_similarity(g[i], g[j]) for g in (first, second) for i, j in ((0, 1), (0, 2), (1, 2))]
    )
    known = known.sum(0).mean() / 2
    torch.testing.assert_close(value, known)
    for mine, other in zip(got, torch.autograd.grad(known, leaves), strict=True):
        torch.testing.assert_close(mine, other)


def test_parl_of_a_convolution_on_grey_images_is_a_product_of_signs():
    """On a torus each pixel meets every weight of the kernels once."""
    with rng.torch_seed(0):
        convolutions = [nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular") for _ in range(2)]
        networks = [nn.Sequential(layer, nn.Flatten(), nn.Linear(108, 3)) for layer in convolutions]
    images, labels = batch()
    sign = float(torch.stack([layer.weight.detach().sum() for layer in convolutions]).sign().prod())
    for turn in (1, -1):
        convolutions[0].weight.data *= turn
        value = PARL()(step(Ensemble(networks), images.clone().requires_grad_(), labels))
        assert value.item() == pytest.approx(turn * sign, abs=1e-5)


def test_parl_wants_a_layer_before_the_logits():
    with pytest.raises(InputError, match=r"a layer before its logits, got Sequential"):
        PARL()(gradient_step([CORNER, CORNER]))


# DVERGE


def test_partners_form_one_cycle_keyed_by_example():
    images, labels = uniform(7, 8, 4), torch.zeros(8, dtype=torch.int64)
    examples = torch.tensor([5, 3, 8, 1, 90, 7, 0, 2])
    said = step(linear([CORNER]), images, labels, examples=examples)
    chosen = partners(said)
    place, seen = 0, []
    for _ in range(8):
        place = int(chosen[place])
        seen.append(place)
    assert sorted(seen) == list(range(8))
    assert place == 0
    mixed = torch.tensor([4, 0, 7, 2, 1, 6, 5, 3])
    again = partners(step(linear([CORNER]), images, labels, examples=examples[mixed]))
    assert torch.equal(examples[mixed][again], examples[chosen][mixed])
    assert not torch.equal(partners(step(linear([CORNER]), images, labels, examples=examples, seed=4)), chosen)
    assert partners(step(linear([CORNER]), images[:1], labels[:1])).tolist() == [0]


def by_hand(weight: Tensor, images: Tensor, targets: Tensor, term: DVERGE) -> Tensor:
    """Return the distilled images of a linear member: the gradient of |W (x' - t)|^2 is 2 W^T W (x' - t)."""
    x = images
    for _ in range(term.steps):
        x = x - term.step_size * ((x - targets) @ weight.T @ weight).sign()
        x = torch.minimum(torch.maximum(x, images - term.epsilon), images + term.epsilon).clamp(0, 1)
    return x


@pytest.mark.parametrize("term", [DVERGE(), DVERGE(epsilon=0.3, step_size=0.11, steps=4), DVERGE(epsilon=0.0)])
def test_dverge_of_linear_members(term: DVERGE):
    weights = [normal(seed, 3, 6) for seed in (8, 9, 10)]
    images, labels = uniform(11, 5, 6), torch.tensor([0, 1, 2, 0, 1])
    said = step(linear(weights), images, labels)
    distilled = [by_hand(w, images, images[partners(said)], term) for w in weights]
    known = sum(
        functional.cross_entropy(distilled[j] @ weights[i].T, labels) for i in range(3) for j in range(3) if i != j
    )
    torch.testing.assert_close(term(said), known)
    for weight, member, expected in zip(weights, said.ensemble.members, distilled, strict=True):
        with said.attacked():
            got = distill(said, member, epsilon=term.epsilon, step_size=term.step_size, steps=term.steps)
        torch.testing.assert_close(got, expected)
        before, after = [((x - images[partners(said)]) @ weight.T).square().sum() for x in (images, got)]
        assert bool(after < 0.9 * before) if term.epsilon else torch.equal(got, images)


def distance(member: nn.Module, said: Step, images: Tensor, layer: int) -> Tensor:
    with rng.draw(said.seed, said.examples), torch.no_grad():
        target = weighted_outputs(member, said.images[partners(said)])[layer]
        return (weighted_outputs(member, images)[layer] - target).flatten(1).square().sum(1)


def test_distillation_brings_features_nearer_within_the_ball_at_every_layer():
    ensemble, (images, labels) = small(members=3).eval(), batch()
    falls: set[int] = set()
    for seed in range(4):
        said = step(ensemble, images, labels, seed=seed)
        layer = rng.derive(seed, "dverge", "layer") * 3 // 2**62
        for member in ensemble.members:
            with said.attacked():
                got = distill(said, member, epsilon=0.07, step_size=0.007, steps=10)
            assert float((got - images).abs().max()) <= 0.07 + 1e-6
            assert float((got - images).abs().max()) > 0.05
            assert float(got.min()) >= 0
            assert float(got.max()) <= 1
            assert not got.requires_grad
            before, after = [float(distance(member, said, x, layer).sum()) for x in (images, got)]
            assert after < 0.9 * before
        falls.add(layer)
    assert falls == {0, 1, 2}


@pytest.mark.parametrize("term", [DVERGE(steps=3), PARL()])
def test_noise_is_drawn_from_the_step_alone(term: Term):
    (images, labels), said = batch(), []
    for seed in (3, 3, 4):
        ensemble = small(norm=True).train()
        state = torch.get_rng_state()
        batched = images.clone().requires_grad_(term.needs_image_gradient)
        value = term(step(ensemble, batched, labels, seed=seed))
        value.backward()
        assert torch.equal(torch.get_rng_state(), state)
        said.append((value.detach(), [p.grad for p in ensemble.parameters() if p.grad is not None]))
    assert torch.equal(said[0][0], said[1][0])
    assert all(torch.equal(a, b) for a, b in zip(said[0][1], said[1][1], strict=True))
    assert not torch.equal(said[0][0], said[2][0])


class Failing(nn.Module):
    """Fail in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.last(images.flatten(1))
        if not self.training:
            raise RuntimeError("failed under distillation")
        return logits


def facts_of(ensemble: Ensemble) -> tuple[list[bool], list[bool], int]:
    hooks = sum(len(module._forward_hooks) for module in ensemble.modules())
    return [m.training for m in ensemble.modules()], [p.requires_grad for p in ensemble.parameters()], hooks


def test_dverge_leaves_modes_gradients_hooks_and_images_as_they_were():
    images, labels = batch()
    images.requires_grad_()  # as another term may ask
    ensemble = small(members=3, norm=True).train()
    norms = [module for module in ensemble.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].eval()
    next(ensemble.parameters()).requires_grad_(False)
    before = facts_of(ensemble)
    DVERGE(steps=2)(step(ensemble, images, labels)).backward()
    assert facts_of(ensemble) == before
    assert images.grad is None
    assert all(p.grad is not None for p in ensemble.parameters() if p.requires_grad)
    batches = [norm.num_batches_tracked for norm in norms]
    assert [int(count) for count in batches if count is not None] == [0, 2, 2]  # those of the two other members
    failing = Ensemble([Failing(), Failing()]).train()
    before = facts_of(failing)
    with pytest.raises(RuntimeError, match="failed under distillation"):
        DVERGE()(step(failing, images, labels))
    assert facts_of(failing) == before


def test_dverge_wants_a_weighted_layer():
    images, labels = batch()
    silent = Ensemble([nn.Sequential(nn.AvgPool2d((6, 2)), nn.Flatten()) for _ in range(2)])
    with pytest.raises(InputError, match=r"a layer among Linear.*Sequential"):
        DVERGE()(step(silent, images, labels))


def test_weighted_outputs_are_those_of_execution():
    """A quantized layer counts once, a layer that is called twice counts twice, one that is not called not at all."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.twice = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.twice(self.twice(x)))

    odd = Odd()
    x = uniform(12, 2, 4).float()
    once = odd.twice(x)
    for got, known in zip(weighted_outputs(odd, x), (once, odd.twice(once), odd(x)), strict=True):
        assert torch.equal(got, known)
    assert len(weighted_outputs(small().members[0], batch()[0])) == 3


# Orthogonality


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2)])
def test_orthogonality_of_known_matrices(shape: tuple[int, int]):
    """An orthonormal matrix has none, twice of it 9/2 for each singular value, the lesser side counts."""
    basis = torch.linalg.qr(normal(13, 5, 5))[0][: shape[0], : shape[1]]
    basis = torch.linalg.qr(basis if shape[0] >= shape[1] else basis.mT)[0]
    basis = basis if shape[0] >= shape[1] else basis.mT
    images, labels = uniform(14, 2, shape[1]), torch.zeros(2, dtype=torch.int64)
    for factor, known in ((1.0, 0.0), (2.0, 4.5), (0.0, 0.5)):
        got = Orthogonality()(step(linear([factor * basis]), images, labels))
        assert got.item() == pytest.approx(known * min(shape), abs=1e-12)


def test_orthogonality_has_the_gradient_of_either_side():
    weight = normal(15, 2, 5)
    said = step(linear([weight]), uniform(14, 2, 5), torch.zeros(2, dtype=torch.int64))
    (got,) = torch.autograd.grad(Orthogonality()(said), list(said.ensemble.parameters()))
    leaf = weight.clone().requires_grad_()
    wide = (leaf.T @ leaf - torch.eye(5)).square().sum() / 2
    torch.testing.assert_close(got, torch.autograd.grad(wide, leaf)[0])


def test_orthogonality_sums_over_layers_and_members_and_counts_shared_weights_once():
    images, labels = batch()

    def known(ensemble: Ensemble) -> float:
        weights = [p.detach().double().flatten(1) for name, p in ensemble.named_parameters() if name.endswith("weight")]
        grams = [w @ w.T if len(w) <= w.shape[1] else w.T @ w for w in weights]
        return sum(float((gram - torch.eye(len(gram))).square().sum()) / 2 for gram in grams)

    apart = small()
    assert sum(isinstance(module, QuantLayer) for module in apart.modules()) == 3
    assert Orthogonality()(step(apart, images, labels)).item() == pytest.approx(known(apart), rel=1e-5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    shared = Ensemble.build([network] * 2, [Policy(weight_bits=3), Policy(weight_bits=4)], shared=True)
    one = Ensemble([network])
    values = [Orthogonality()(step(ensemble, images, labels)).item() for ensemble in (shared, one)]
    assert values[0] == values[1] == pytest.approx(known(one), rel=1e-5)
    assert Orthogonality()(step(Ensemble([nn.Flatten()]), images, labels)).item() == 0


# All of them


@pytest.mark.parametrize("term", [GAL(), PARL(), DVERGE()])
def test_pairs_of_a_single_member_are_none(term: Term):
    images, labels = batch()
    value = term(step(small(members=1), images.requires_grad_(), labels))
    assert value.shape == ()
    assert value.item() == 0


@pytest.mark.parametrize("term", TERMS, ids=NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_terms_repeat_themselves_and_train_quantized_members(term: Term, autocast: bool):
    (images, labels), runs = batch(), []
    for _ in range(2):
        ensemble = small(members=3, norm=True).train()
        batched = images.clone().requires_grad_(term.needs_image_gradient)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, values = Objective(terms=(term,))(step(ensemble, batched, labels))
        loss.backward()
        weights = [p.grad for name, p in ensemble.named_parameters() if name.endswith("0.weight") or ".0.layer" in name]
        assert loss.dtype == torch.float32
        runs.append((values[type(term).__name__], [g for g in weights if g is not None]))
    assert len(runs[0][1]) >= 3
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in runs[0][1])
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("term", [ADP(), Orthogonality()])
def test_products_are_taken_in_full_precision_under_autocast(term: Term):
    said = spoken(normal(16, 1, 3, 4, 5).float(), torch.tensor([0, 1, 2, 3]))
    weight = next(iter(said.ensemble.parameters()))
    weight.data.copy_(torch.tensor([[1.001, 0.03], [0.7, 0.1]]))
    plain = term(said)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(term(said), plain)


@pytest.mark.parametrize(("term", "name"), list(zip(TERMS, NAMES, strict=True)), ids=NAMES)
def test_tables_of_terms(term: Term, name: str):
    table = registry.encode(term)
    assert table["type"] == name
    assert registry.decode(Term, table) == term
    assert registry.decode(Term, {"type": name, "weight": 0.25}).weight == 0.25


def test_defaults_are_those_of_the_papers():
    assert (ADP().weight, ADP().alpha, ADP().beta) == (1.0, 2.0, 0.5)
    assert GAL().weight == 0.5
    assert (TRS().weight, TRS().similarity, TRS().smoothness) == (1.0, 40.0, 2.5)
    assert (PARL().weight, PARL().layers) == (0.25, 5)
    assert (DVERGE().weight, DVERGE().epsilon, DVERGE().step_size, DVERGE().steps) == (1.0, 0.07, 0.007, 10)
    assert [term.needs_image_gradient for term in TERMS] == [False, True, True, True, False, False]


@pytest.mark.parametrize(
    ("cls", "name", "values"),
    [
        (ADP, "alpha", (-0.1, math.nan, math.inf)),
        (ADP, "beta", (-0.1, math.nan)),
        (TRS, "similarity", (-1.0, math.nan)),
        (TRS, "smoothness", (-1.0, math.inf)),
        (PARL, "layers", (0, -1)),
        (DVERGE, "epsilon", (-0.1, 1.1, math.nan)),
        (DVERGE, "step_size", (0.0, -0.1, math.nan)),
        (DVERGE, "steps", (0, -1)),
        (GAL, "warmup", (1.1,)),
    ],
)
def test_refusals(cls: type[Term], name: str, values: tuple[float, ...]):
    for value in values:
        with pytest.raises(InputError, match=name.rstrip("s")):
            cls(**{name: value})
