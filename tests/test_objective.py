"""Test every term against a closed form, a known law or finite differences."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final, get_args

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import FGSM, PGD, Attack
from bitquorum.conversion import Policy, convert
from bitquorum.ensemble import Ensemble
from bitquorum.information import (
    conditional_mutual_information,
    mutual_information,
    pairwise_class_joints,
    pairwise_joints,
    renyi_mutual_information,
)
from bitquorum.interface import InputError
from bitquorum.layers import QuantActivation
from bitquorum.objective import (
    Adversarial,
    ConditionalMI,
    Distillation,
    EnsembleCrossEntropy,
    FeatureMI,
    InputGradient,
    LinearizedLoss,
    MemberCrossEntropy,
    Objective,
    OutputMI,
    Reduce,
    Step,
    Term,
    Trades,
)
from bitquorum.objective.robustness import Norm, Of
from bitquorum.objective.term import cross_entropy
from bitquorum.quantizers import Deterministic, Logistic, Quantizer
from bitquorum.zoo import BatchNorm


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def step(ensemble: Ensemble, images: Tensor, labels: Tensor, **options: object) -> Step:
    facts = {"progress": 1.0, "seed": 3, "memory": {}, "reduce": Reduce()}
    examples = torch.arange(len(images))
    return Step(ensemble=ensemble, images=images, labels=labels, examples=examples, **{**facts, **options})


class Part(nn.Module):
    """Return one part of the pixels, then an identity layer: the logits, and the features, are what is given."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.part = slice(start, start + width)
        self.last = nn.Linear(width, width, bias=False)
        self.last.weight.data.copy_(torch.eye(width))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images[:, self.part])


def given(logits: Sequence[Tensor], labels: Tensor, **options: object) -> Step:
    """Return a step whose members say the given logits."""
    width = logits[0].shape[1]
    ensemble = Ensemble([Part(index * width, width) for index in range(len(logits))])
    return step(ensemble, torch.cat(list(logits), 1), labels, **options)


def linear(weights: Sequence[Tensor]) -> Ensemble:
    members = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        members.append(nn.Sequential(nn.Flatten(), layer))
    return Ensemble(members)


ONE_TWO = [torch.log(torch.tensor([[0.5, 0.25, 0.25]])), torch.log(torch.tensor([[0.25, 0.25, 0.5]]))]


# Cross-entropies


def test_cross_entropies_by_hand():
    said = given(ONE_TWO, torch.tensor([0]))
    assert MemberCrossEntropy()(said).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert EnsembleCrossEntropy()(said).item() == pytest.approx(-math.log(0.375))
    smooth = MemberCrossEntropy(smoothing=0.3)(said).item()
    uniform_part = (math.log(2) + 2 * math.log(4)) / 3
    assert smooth == pytest.approx(0.7 * (math.log(2) + math.log(4)) / 2 + 0.3 * uniform_part)
    assert torch.stack(said.member_losses).tolist() == [[pytest.approx(math.log(2))], [pytest.approx(math.log(4))]]


def test_cross_entropies_against_torch():
    logits, labels = normal(0, 2, 3, 5, 4), torch.tensor([0, 1, 2, 3, 3])
    for smoothing in (0.0, 0.2):
        got = cross_entropy(logits, labels, smoothing)
        for t in range(2):
            for m in range(3):
                known = nn.functional.cross_entropy(logits[t, m], labels, reduction="none", label_smoothing=smoothing)
                torch.testing.assert_close(got[t, m], known)
    probabilities = logits[0].softmax(-1).mean(0)
    known = nn.functional.nll_loss(probabilities.log(), labels)
    torch.testing.assert_close(EnsembleCrossEntropy()(given(list(logits[0]), labels)), known)


def test_mixed_images_have_two_labels():
    logits, labels, others = [normal(0, 5, 4), normal(1, 5, 4)], torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1] * 5)
    share = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    soft = share[:, None] * nn.functional.one_hot(labels, 4) + (1 - share)[:, None] * nn.functional.one_hot(others, 4)
    said = given(logits, labels, mixed=(others, share))
    for smoothing in (0.0, 0.2):
        wide = torch.cat([nn.functional.cross_entropy(z, soft, label_smoothing=smoothing)[None] for z in logits])
        torch.testing.assert_close(MemberCrossEntropy(smoothing=smoothing)(said), wide.mean())
    mean = torch.stack(logits).softmax(-1).mean(0).log()
    torch.testing.assert_close(EnsembleCrossEntropy()(said), nn.functional.cross_entropy(mean, soft))
    for losses, z in zip(said.member_losses, logits, strict=True):
        torch.testing.assert_close(losses, nn.functional.cross_entropy(z, soft, reduction="none"))
    for of in ("member", "ensemble"):
        images = torch.cat(logits, 1).requires_grad_()
        penalty = InputGradient(of=of)(replace(said, images=images))
        leaf = images.detach().requires_grad_()
        both = torch.stack(leaf.split(4, 1)).log_softmax(-1)
        losses = [logp for logp in both] if of == "member" else [both.exp().mean(0).log()]
        loss = sum(nn.functional.cross_entropy(logp, soft, reduction="sum") for logp in losses)
        (gradient,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(penalty, gradient.abs().sum(1).mean() / len(losses))


def test_distillation_is_the_divergence_from_the_mean_of_the_others():
    logits, labels, tau = [normal(seed, 6, 4) for seed in (1, 2, 3)], torch.zeros(6, dtype=torch.long), 2.0
    leaves = [z.clone().requires_grad_() for z in logits]
    p = torch.stack([(z / tau).softmax(-1) for z in leaves])
    known = torch.stack(
        [
            nn.functional.kl_div(p[m].log(), p[[k for k in range(3) if k != m]].mean(0).detach(), reduction="batchmean")
            for m in range(3)
        ]
    ).mean()
    images = torch.cat(logits, 1).requires_grad_()
    said = replace(given(logits, labels), images=images)
    value = Distillation(temperature=tau)(said)
    torch.testing.assert_close(value, tau**2 * known)
    gradients = torch.autograd.grad(tau**2 * known, leaves)
    torch.testing.assert_close(torch.autograd.grad(value, images)[0], torch.cat(gradients, 1))
    assert Distillation()(given([logits[0]] * 3, labels)).item() == pytest.approx(0, abs=1e-6)
    assert Distillation()(given(logits[:1], labels)).item() == 0
    with pytest.raises(InputError, match="expected a temperature above 0, got 0"):
        Distillation(temperature=0.0)


# Mutual information


def one_hot(codes: Tensor, classes: int) -> Tensor:
    """Return logits that are certain to float rounding."""
    return 100.0 * nn.functional.one_hot(codes, classes).float()


def grid(classes: int, labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return every (a, b, y) once: a law under which all three are independent."""
    a, b, y = torch.cartesian_prod(torch.arange(classes), torch.arange(classes), torch.arange(labels)).T
    return a, b, y


def test_mutual_information_of_known_laws():
    a, b, y = grid(4, 4)
    independent = given([one_hot(a, 4), one_hot(b, 4)], y)
    identical = given([one_hot(a, 4), one_hot(a, 4)], y)
    accurate = given([one_hot(y, 4), one_hot(y, 4)], y)
    for said, plain, conditional in ((independent, 0, 0), (identical, 2, 2), (accurate, 2, 0)):
        assert OutputMI(decay=0.0)(said).item() == pytest.approx(plain, abs=1e-5)
        assert ConditionalMI(decay=0.0)(said).item() == pytest.approx(conditional, abs=1e-5)
    assert FeatureMI()(independent).item() == pytest.approx(0, abs=0.05)
    assert FeatureMI()(identical).item() > 0.3


def test_terms_are_means_over_pairs_of_the_information_functions():
    logits, labels = [normal(seed, 40, 4) for seed in (1, 2, 3)], torch.arange(40) % 4
    said = given(logits, labels)
    p = torch.stack(logits).softmax(-1)
    torch.testing.assert_close(OutputMI()(said), mutual_information(pairwise_joints(p)).mean())
    known = conditional_mutual_information(pairwise_class_joints(p, labels)).mean()
    torch.testing.assert_close(ConditionalMI()(said), known)
    for alpha in (2.0, 1.01):
        values = [renyi_mutual_information(logits[i], logits[j], alpha) for i, j in ((0, 1), (0, 2), (1, 2))]
        torch.testing.assert_close(FeatureMI(alpha=alpha)(said), torch.stack(values).mean())


@pytest.mark.parametrize("term", [OutputMI(), ConditionalMI(), FeatureMI()])
def test_one_member_has_no_pair(term: Term):
    assert term(given([normal(4, 5, 3)], torch.arange(5) % 3)).item() == 0


@pytest.mark.parametrize("term", [OutputMI(decay=0.75), ConditionalMI(decay=0.75)])
def test_the_moving_joint_has_the_value_of_the_past_and_the_gradient_of_the_batch(term: Term):
    labels, memory = torch.arange(30) % 3, {}
    batches = [[normal(seed, 30, 3), normal(seed + 50, 30, 3)] for seed in range(3)]

    def joint(logits: Sequence[Tensor]) -> Tensor:
        p = torch.stack(list(logits)).softmax(-1)
        return pairwise_joints(p) if isinstance(term, OutputMI) else pairwise_class_joints(p, labels)

    def information(table: Tensor) -> Tensor:
        measure = mutual_information if isinstance(term, OutputMI) else conditional_mutual_information
        return measure(table).mean()

    average = joint(batches[0])
    for number, batch in enumerate(batches):
        if number:
            average = 0.75 * average + 0.25 * joint(batch)
        leaves = [logits.clone().requires_grad_() for logits in batch]
        value = term(given(leaves, labels, memory=memory))
        torch.testing.assert_close(value, information(average))
        table = average.clone().requires_grad_()
        (slope,) = torch.autograd.grad(information(table), table)
        known = torch.autograd.grad((joint(leaves) * slope).sum(), leaves)
        got = torch.autograd.grad(value, leaves)
        torch.testing.assert_close(got, known)
    assert [key for key, value in memory.items() if not value.requires_grad] == [f"{type(term).__name__}.joint"]


class WithAnother(Reduce):
    """Average with a second process, whose tensor is known."""

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def __call__(self, x: Tensor) -> Tensor:
        assert not x.requires_grad
        return (x + self.other) / 2


def test_the_joint_is_that_of_all_processes():
    batch, other = [normal(5, 30, 3), normal(6, 30, 3)], pairwise_joints(normal(7, 2, 30, 3).softmax(-1))
    leaves = [logits.requires_grad_() for logits in batch]
    value = OutputMI()(given(leaves, torch.arange(30) % 3, reduce=WithAnother(other)))
    both = (pairwise_joints(torch.stack(batch).softmax(-1)) + other) / 2
    torch.testing.assert_close(value, mutual_information(both).mean())
    assert all(bool(g.abs().sum() > 0) for g in torch.autograd.grad(value, leaves))


def test_minimizing_conditional_information_decorrelates_errors():
    """Start from two equal members; descent must end near independence given the class."""
    labels = torch.arange(60) % 3
    logits = [normal(8, 60, 3), normal(8, 60, 3) + 0.1 * normal(9, 60, 3)]
    leaves = [z.requires_grad_() for z in logits]
    term = ConditionalMI(decay=0.0)
    before = term(given(leaves, labels)).item()
    for _ in range(30):
        gradients = torch.autograd.grad(term(given(leaves, labels)), leaves)
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.sub_(100 * gradient)
    assert term(given(leaves, labels)).item() < 0.5 * before


# The sum


@final
@dataclass(frozen=True, kw_only=True)
class Forbidden(Term):
    """Fail when computed."""

    weight: float = 0.0

    def __call__(self, step: Step) -> Tensor:
        raise AssertionError("a term of weight zero was computed")


def test_the_sum_and_its_parts():
    said = given([normal(10, 8, 3), normal(11, 8, 3)], torch.arange(8) % 3)
    terms = (
        MemberCrossEntropy(weight=2.0),
        EnsembleCrossEntropy(weight=-0.5),
        FeatureMI(weight=3.0, warmup=0.5),
        Forbidden(),
    )
    total, values = Objective(terms=terms)(said)
    assert list(values) == ["MemberCrossEntropy", "EnsembleCrossEntropy", "FeatureMI"]
    parts = [float(values[type(term).__name__]) for term in terms[:3]]
    assert total.item() == pytest.approx(2 * parts[0] - 0.5 * parts[1] + 3 * parts[2])
    assert parts == [pytest.approx(term(said).item()) for term in terms[:3]]
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in values.values())


def test_warmup_rises_linearly_from_nothing():
    term = FeatureMI(weight=-4.0, warmup=0.5)
    assert [term.weight_at(progress) for progress in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)] == [0, -1, -2, -4, -4, -4]
    assert [FeatureMI(weight=2.0).weight_at(progress) for progress in (0.0, 1.0)] == [2, 2]
    late = FeatureMI(weight=4.0, warmup=0.25, after=0.5)
    assert [late.weight_at(progress) for progress in (0.0, 0.4, 0.5, 0.625, 0.75, 1.0)] == [0, 0, 0, 2, 4, 4]
    assert [FeatureMI(weight=4.0, after=0.5).weight_at(progress) for progress in (0.4, 0.5)] == [0, 4]
    late = Objective(terms=(MemberCrossEntropy(), Forbidden(weight=1.0, warmup=0.5)))
    said = given([normal(12, 4, 3)], torch.arange(4) % 3, progress=0.0)
    assert list(late(said)[1]) == ["MemberCrossEntropy"]
    with pytest.raises(AssertionError):
        late(given([normal(12, 4, 3)], torch.arange(4) % 3, progress=0.01))


def test_the_image_gradient_is_asked_for_by_the_terms():
    assert not Objective().needs_image_gradient
    assert Objective(terms=(MemberCrossEntropy(), InputGradient())).needs_image_gradient


def test_refusals():
    with pytest.raises(InputError, match=r"each term once.*MemberCrossEntropy"):
        Objective(terms=(MemberCrossEntropy(), EnsembleCrossEntropy(), MemberCrossEntropy(weight=2.0)))
    with pytest.raises(InputError, match="at least one term"):
        Objective(terms=())
    for warmup in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="warmup"):
            MemberCrossEntropy(warmup=warmup)
    for after in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="after"):
            MemberCrossEntropy(after=after)
    for smoothing in (-0.1, 1.0):
        with pytest.raises(InputError, match="smoothing"):
            MemberCrossEntropy(smoothing=smoothing)
    for decay in (-0.1, 1.0):
        with pytest.raises(InputError, match="decay"):
            OutputMI(decay=decay)


# The step


def noisy_members(seed: int = 0) -> Ensemble:
    with rng.torch_seed(seed):
        networks = [
            nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
            for _ in range(2)
        ]
    return Ensemble.build(networks, [Policy(weight_bits=3, activation_bits=2), Policy(weight_bits=None)])


def test_a_step_answers_once_and_under_its_own_draw():
    images, labels = uniform(13, 7, 6), torch.arange(7) % 3
    ensemble = noisy_members().eval()
    first, again = step(ensemble, images, labels), step(ensemble, images, labels)
    assert first.outputs is first.outputs
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(first.respond(images), first.logits)
    assert not torch.equal(step(ensemble, images, labels, seed=4).logits, first.logits)
    with rng.draw(3, torch.arange(7)):
        assert torch.equal(ensemble(images), first.logits)


@pytest.mark.parametrize(("given_dtype", "dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_logits_are_in_float32_or_wider(given_dtype: torch.dtype, dtype: torch.dtype):
    images = uniform(14, 2, 6).to(given_dtype)
    said = step(linear([normal(15, 3, 6).to(given_dtype)]), images, torch.tensor([0, 1]))
    assert said.logits.dtype == said.respond(images).dtype == dtype


# Input gradients


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_input_gradient_of_linear_softmax_models(norm: Norm):
    """The gradient of a member's cross-entropy is W^T (p - e_y); that of the ensemble is weighted by p_m(y)."""
    weights = [normal(16, 3, 8).double(), normal(17, 3, 8).double()]
    x, labels = uniform(18, 5, 1, 2, 4).double().requires_grad_(), torch.tensor([0, 1, 2, 0, 1])
    said = step(linear(weights), x, labels)
    order = 1 if norm == "l1" else 2
    p = [(x.detach().flatten(1) @ w.T).softmax(-1) for w in weights]
    y = nn.functional.one_hot(labels, 3).double()
    gradients = [(q - y) @ w for q, w in zip(p, weights, strict=True)]
    members = torch.stack([g.norm(p=order, dim=1).mean() for g in gradients]).mean()
    torch.testing.assert_close(InputGradient(norm=norm)(said), members)
    true = torch.stack([(q * y).sum(1) for q in p])
    mixed = (torch.stack(gradients) * (true / true.sum(0))[:, :, None]).sum(0)
    got = InputGradient(norm=norm, of="ensemble")(step(linear(weights), x, labels))
    torch.testing.assert_close(got, mixed.norm(p=order, dim=1).mean())


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("of", get_args(Of))
def test_margins_draws_and_quotients_of_linear_models(norm: Norm, of: Of):
    weights = [normal(16, 3, 8).double(), normal(17, 3, 8).double()]
    x, labels = uniform(18, 5, 1, 2, 4).double().requires_grad_(), torch.tensor([0, 1, 2, 0, 1])
    said, order = step(linear(weights), x, labels), 1 if norm == "l1" else 2
    exact = InputGradient(norm=norm, of=of)(said)
    torch.testing.assert_close(InputGradient(norm=norm, of=of, draws=3)(said), exact)
    torch.testing.assert_close(InputGradient(norm=norm, of=of, difference=1e-6)(said), exact, rtol=1e-4, atol=1e-5)
    if of == "member":  # the margin of a linear model is linear: its gradient is a difference of two rows
        z = [x.detach().flatten(1) @ w.T for w in weights]
        rows = [(w[q.scatter(1, labels[:, None], -9e9).argmax(1)] - w[labels]) for q, w in zip(z, weights, strict=True)]
        expected = torch.stack([row.norm(p=order, dim=1).mean() for row in rows]).mean()
        for difference in (None, 1e-4):
            term = InputGradient(norm=norm, loss="margin", difference=difference)
            torch.testing.assert_close(term(said), expected, rtol=1e-5, atol=1e-6)


def test_a_quotient_that_would_measure_something_else_is_refused():
    with pytest.raises(InputError, match="expected either a difference or held statistics"):
        InputGradient(difference=1e-3, statistics="held")
    for bad in (math.nan, math.inf, 0.0):
        with pytest.raises(InputError, match="finite difference above 0"):
            InputGradient(difference=bad)
    network = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)).double()
    said = step(Ensemble([network]), uniform(20, 4, 6).double().requires_grad_(), torch.tensor([0, 1, 2, 1]))
    with pytest.raises(InputError, match="expected a network without dropout"):
        InputGradient(difference=1e-3)(said)
    assert InputGradient()(said).item() > 0
    network.eval()
    assert InputGradient(difference=1e-3)(said).item() > 0


def test_the_quotient_trains_what_the_exact_penalty_trains():
    with rng.torch_seed(5):
        network = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 3)).double()
    ensemble = Ensemble([network, copy.deepcopy(network)])
    said = step(ensemble, uniform(20, 4, 6).double().requires_grad_(), torch.tensor([0, 1, 2, 1]))
    found = [
        torch.autograd.grad(InputGradient(difference=difference)(said), network[0].weight, retain_graph=True)[0]
        for difference in (None, 1e-6)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("term", [InputGradient, LinearizedLoss])
def test_a_share_of_the_steps_carries_the_whole_penalty(term):
    weights = [normal(16, 3, 8).double()]
    x, labels = uniform(18, 5, 1, 2, 4).double().requires_grad_(), torch.tensor([0, 1, 2, 0, 1])

    def value(share: float | None, seed: int) -> float:
        return term(share=share)(step(linear(weights), x, labels, seed=seed)).item()

    exact = value(None, 0)
    values = [value(0.25, seed) for seed in range(400)]
    assert {round(found / exact, 6) for found in values} == {0.0, 4.0}
    assert sum(values) / 400 / exact == pytest.approx(1, abs=0.35)
    assert term().capturable
    assert not term(share=0.25).capturable
    with pytest.raises(InputError, match=r"share of the steps in \(0, 1\]"):
        term(share=0.0)


def test_the_penalty_over_draws_is_that_of_their_mean_loss():
    ensemble = noisy_members().double()
    x, labels = uniform(21, 4, 6).double().requires_grad_(), torch.tensor([0, 1, 2, 1])
    said = step(ensemble, x, labels)
    with rng.draw(rng.derive_many(said.seed, 3, "penalty"), said.examples):
        loss = cross_entropy(ensemble(x), labels).mean(0)
    expected = torch.stack([torch.autograd.grad(part.sum(), x, retain_graph=True)[0].abs().sum() / 4 for part in loss])
    torch.testing.assert_close(InputGradient(draws=3)(said), expected.mean())


class Smooth(nn.Module):
    """Stand in for a quantizer near one input: the drawn value there, plus the move of the closed-form mean."""

    def __init__(self, quantizer: Quantizer, at: Tensor, value: Tensor) -> None:
        super().__init__()
        self.quantizer, self.offset = quantizer, value - quantizer.mean(at).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.offset + self.quantizer.mean(x)


@pytest.mark.long
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("of", ["member", "ensemble"])
@pytest.mark.parametrize("bits", [2, 4])
def test_penalty_through_stochastic_activations_against_finite_differences(norm: Norm, of: Of, bits: int):
    with rng.torch_seed(bits):
        networks = [
            nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2)
        ]
    policy = Policy(weight_bits=None, activation_bits=bits, activation_law=Logistic(), learned=False)
    ensemble = Ensemble.build(networks, [policy] * 2).double()
    x, labels = uniform(19, 4, 5).double(), torch.tensor([0, 1, 2, 1])
    term = InputGradient(norm=norm, of=of)
    penalty = term(step(ensemble, x.clone().requires_grad_(), labels))
    weights = [p for p in ensemble.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(penalty, weights, allow_unused=True)

    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    layers = [m for m in ensemble.modules() if isinstance(m, QuantActivation)]
    hooks = [
        layer.register_forward_hook(lambda m, args, out: seen.update({m: (args[0].detach(), out.detach())}))
        for layer in layers
    ]
    step(ensemble, x, labels).outputs  # noqa: B018
    for hook in hooks:
        hook.remove()
    for member in ensemble.members:
        for name, layer in list(member.named_children()):
            if isinstance(layer, QuantActivation):
                setattr(member, name, Smooth(layer.quantizer, *seen[layer]))

    def smooth_penalty() -> float:
        return term(step(ensemble, x.clone().requires_grad_(), labels)).item()

    assert smooth_penalty() == pytest.approx(penalty.item(), rel=1e-12)
    generator = torch.Generator().manual_seed(bits)
    for parameter, gradient in zip(weights, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        h, values = 1e-5, []
        for sign in (1, -2, 1):
            parameter.data.add_(sign * h * direction)
            values.append(smooth_penalty())
        slope = (values[0] - values[1]) / (2 * h)
        got = 0.0 if gradient is None else float((gradient * direction).sum())
        assert got == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_a_staircase_has_no_curvature_to_train_by_but_the_mean_has():
    """With straight-through gradients the penalty sees no second derivative of the activation."""
    images = uniform(20, 6, 5)
    with rng.torch_seed(1):
        network = nn.Sequential(nn.Linear(5, 6, bias=True), nn.ReLU(), nn.Linear(6, 1))
    slopes = []
    for law in (Deterministic(), Logistic()):
        policy = Policy(weight_bits=None, activation_bits=2, activation_law=law, learned=False)
        quantized = convert(network, policy)
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(quantized(x).sum(), x, create_graph=True)
        bias = quantized.get_parameter("0.bias")
        slope = torch.autograd.grad(gradient.square().sum(), bias, allow_unused=True)[0]
        slopes.append(0.0 if slope is None else float(slope.abs().sum()))
    assert slopes[0] == 0
    assert slopes[1] > 1e-3


@pytest.mark.parametrize(("name", "value"), [("norm", "linf"), ("of", "members")])
def test_input_gradient_refuses_unknown_choices(name: str, value: str):
    term = InputGradient()
    object.__setattr__(term, name, value)  # past the run-time check of annotations, which users do not have
    with pytest.raises(InputError, match="norm l1 or l2"):
        term.__post_init__()


def test_the_linearized_loss_is_that_under_attack_where_the_log_odds_are_linear():
    """With two classes the log-odds of a linear model are linear, and one step along the sign is the worst attack."""
    weights = [normal(16, 2, 8).double(), normal(17, 2, 8).double()]
    x, labels = (uniform(18, 5, 1, 2, 4).double() / 2 + 0.25).requires_grad_(), torch.tensor([0, 1, 1, 0, 1])
    epsilon, attacked = 0.1, []
    for w in weights:
        worst = x.detach().flatten(1) + epsilon * (w[1 - labels] - w[labels]).sign()
        attacked.append(nn.functional.cross_entropy(worst @ w.T, labels))
    said = step(linear(weights), x, labels)
    loss, _ = Objective(terms=(MemberCrossEntropy(), LinearizedLoss(epsilon=epsilon, warmup=0.0)))(said)
    torch.testing.assert_close(loss, torch.stack(attacked).mean())


def test_terms_under_attack_know_both_labels_of_mixed_images():
    weights = [normal(16, 3, 8).double(), normal(17, 3, 8).double()]
    x, labels = (uniform(18, 5, 1, 2, 4).double() / 2 + 0.25).requires_grad_(), torch.tensor([0, 1, 2, 0, 1])
    others, share = (labels + 1) % 3, torch.linspace(0, 1, 5).double()
    own = step(linear(weights), x, labels)
    mixed = replace(own, mixed=(others, share))
    term = LinearizedLoss(epsilon=0.1)
    rows = [slice(row, row + 1) for row in range(5)]
    alone = [step(linear(weights), x.detach()[row].requires_grad_(), y[row]) for y in (labels, others) for row in rows]
    first, second = torch.stack([term(said) for said in alone]).split(5)
    torch.testing.assert_close(term(mixed), (share * first + (1 - share) * second).mean())
    margin = InputGradient(loss="margin")
    slopes = []
    for w in weights:
        logits = x.detach().flatten(1) @ w.T
        best = [w[logits.scatter(1, y[:, None], -math.inf).argmax(1)] - w[y] for y in (labels, others)]
        slopes.append(share[:, None] * best[0] + (1 - share)[:, None] * best[1])
    torch.testing.assert_close(margin(mixed), torch.stack(slopes).abs().sum(-1).mean())
    attack = PGD(steps=3)
    found = attack(linear(weights), x.detach(), labels, epsilon=0.1, examples=own.examples, seed=own.seed).images
    expected = replace(mixed, images=found).member_losses
    torch.testing.assert_close(Adversarial(attack=attack, epsilon=0.1)(mixed), torch.stack(expected).mean())


def test_a_small_linearized_rise_is_the_input_gradient_penalty():
    weights = [normal(16, 3, 8).double(), normal(17, 3, 8).double()]
    x, labels = uniform(18, 5, 1, 2, 4).double().requires_grad_(), torch.tensor([0, 1, 2, 0, 1])
    said = step(linear(weights), x, labels)
    rise = LinearizedLoss(epsilon=1e-7)(said) / 1e-7
    torch.testing.assert_close(rise, InputGradient()(said), rtol=1e-5, atol=0.0)


def test_the_linearized_rise_stays_where_the_gradient_of_cross_entropy_has_vanished():
    weight = 30 * normal(16, 3, 8).double()  # so sure that 1 - p is below 1e-9, and steep
    x = uniform(18, 64, 1, 2, 4).double()
    z = x.flatten(1) @ weight.T
    sure = (z.softmax(1).max(1).values > 1 - 1e-9).nonzero()[:, 0]
    assert len(sure) > 4
    said = step(linear([weight]), x[sure].requires_grad_(), z.argmax(1)[sure])
    assert InputGradient()(said) < 1e-4
    assert LinearizedLoss(epsilon=0.3)(said) > 1


@pytest.mark.parametrize("epsilon", [0.0, -0.1, math.inf, math.nan])
def test_the_linearized_loss_refuses_a_radius_of_nothing(epsilon: float):
    with pytest.raises(InputError, match="epsilon above 0"):
        LinearizedLoss(epsilon=epsilon)


class Normed(nn.Module):
    """Normalize, bend and read out images of two channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.readout = norm, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(nn.functional.softplus(self.norm(x)).flatten(1))


@pytest.mark.parametrize("term", [LinearizedLoss(statistics="held"), InputGradient(statistics="held")])
def test_held_statistics_tell_the_gradient_that_the_trained_network_has(term: Term):
    torch.manual_seed(0)
    images, labels = 3 * uniform(1, 6, 2, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    ensemble = Ensemble([Normed(BatchNorm(2, momentum=1.0))])
    held = term(step(ensemble, images.requires_grad_(), labels))
    through = replace(term, statistics=None)(step(ensemble, images, labels))
    (member,) = ensemble.members
    count = images.numel() // 2
    member.get_submodule("norm").get_buffer("running_var").mul_((count - 1) / count)
    fixed = replace(term, statistics=None)(step(ensemble.eval(), images, labels))
    torch.testing.assert_close(held, fixed)
    assert abs(through - fixed) > 0.01 * fixed


def test_statistics_that_cannot_be_held_are_refused():
    images, labels = uniform(1, 6, 2, 2, 2).requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 2])
    said = step(Ensemble([Normed(nn.BatchNorm2d(2))]), images, labels)
    with pytest.raises(InputError, match=r"expected norm layers whose statistics can be held .* got BatchNorm2d"):
        LinearizedLoss(statistics="held")(said)
    for term in (LinearizedLoss(), InputGradient()):
        object.__setattr__(term, "statistics", "kept")  # past the run-time check of annotations
        with pytest.raises(InputError, match="expected statistics held"):
            term.__post_init__()


# Adversarial training


def test_adversarial_term_on_a_linear_model():
    weight = normal(21, 2, 6)
    x, labels, epsilon = uniform(22, 5, 6), torch.tensor([0, 1, 0, 1, 1]), 0.1
    worst = (x + epsilon * (weight[1 - labels] - weight[labels]).sign()).clamp(0, 1)
    known = nn.functional.cross_entropy(worst @ weight.T, labels)
    for attack in (FGSM(), PGD(steps=10)):
        term = Adversarial(attack=attack, epsilon=epsilon)
        torch.testing.assert_close(term(step(linear([weight]), x, labels)), known)


def test_trades_on_a_linear_model():
    """KL(p(x) || p(x')) grows on both sides of x, so the attack ends at one of two known corners."""
    weight, epsilon = normal(23, 2, 6), 0.1
    x, labels = uniform(24, 5, 6), torch.tensor([0, 1, 0, 1, 1])
    p = (x @ weight.T).softmax(-1)

    def kl(corner: Tensor) -> Tensor:
        q = (corner @ weight.T).log_softmax(-1)
        return (p * (p.log() - q)).sum(-1)

    rise = epsilon * (weight[0] - weight[1]).sign()
    corners = torch.stack([kl((x + rise).clamp(0, 1)), kl((x - rise).clamp(0, 1))])
    for n in range(5):
        term = Trades(epsilon=epsilon, attack=PGD(steps=20))
        got = term(step(linear([weight]), x[n : n + 1], labels[n : n + 1]))
        assert float((corners[:, n] - got).detach().abs().min()) < 1e-5
    attack = PGD(steps=20, restarts=8, selection=1)
    best = Trades(epsilon=epsilon, attack=attack)(step(linear([weight]), x, labels))
    torch.testing.assert_close(best, corners.amax(0).mean(), rtol=1e-4, atol=1e-6)


def test_trades_of_no_perturbation_is_nothing():
    x, labels = uniform(26, 5, 6), torch.arange(5) % 3
    said = step(linear([normal(25, 3, 6)]), x, labels)
    assert Trades(epsilon=0.0)(said).item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_trades_reaches_both_outputs():
    """At a fixed x' the derivative of KL(p || q) in the weights has a part through p and one through q."""
    weight, epsilon = normal(25, 2, 6), 0.1
    x, labels = uniform(26, 1, 6), torch.tensor([0])
    said = step(linear([weight]), x, labels)
    value = Trades(epsilon=epsilon, attack=PGD(steps=20))(said)
    (got,) = torch.autograd.grad(value, list(said.ensemble.parameters()))
    w = weight.clone().requires_grad_()
    rise = epsilon * (weight[0] - weight[1]).sign()
    candidates = []
    for corner in (x + rise, x - rise):
        p, q = (x @ w.T).softmax(-1), (corner.clamp(0, 1) @ w.T).log_softmax(-1)
        candidates.append(torch.autograd.grad((p * (p.log() - q)).sum(), w)[0])
    assert min(float((got - known).abs().max()) for known in candidates) < 1e-5


class Failing(nn.Module):
    """Fail in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("failed under attack")
        return self.last(images)


def facts_of(ensemble: Ensemble) -> tuple[list[bool], list[bool]]:
    modes = [module.training for module in ensemble.modules()]
    return modes, [parameter.requires_grad for parameter in ensemble.parameters()]


@pytest.mark.parametrize("term", [Adversarial(attack=FGSM()), Trades(attack=PGD(steps=2))])
def test_attacked_ensembles_keep_their_modes_and_gradients(term: Term):
    ensemble = noisy_members().train()
    ensemble.get_submodule("members.0.2").eval()  # a frozen normalization layer
    next(ensemble.parameters()).requires_grad_(False)
    before = facts_of(ensemble)
    x, labels = uniform(27, 6, 6), torch.arange(6) % 3
    value = term(step(ensemble, x, labels))
    assert facts_of(ensemble) == before
    value.backward()
    assert all(p.grad is not None for p in ensemble.parameters() if p.requires_grad)
    failing = step(Ensemble([Failing()]).train(), x, labels)
    with pytest.raises(RuntimeError, match="failed under attack"):
        term(failing)
    assert facts_of(failing.ensemble) == ([True] * 4, [True] * 2)


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=2, eot=2)])
def test_an_attack_in_training_leaves_running_statistics_to_the_batches(attack: Attack):
    ensemble = noisy_members().train()
    x, labels = uniform(28, 6, 6), torch.arange(6) % 3
    said = step(ensemble, x, labels)
    with said.attacked() as target:
        assert not target.training
        attack(target, x, labels, epsilon=0.1)
    assert int(ensemble.get_buffer("members.0.2.num_batches_tracked")) == 0
    assert said.logits.requires_grad
    assert int(ensemble.get_buffer("members.0.2.num_batches_tracked")) == 1
