"""Hold every estimator of `bitquorum.information` against laws whose mutual information is known."""

import importlib.util
import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from sklearn.metrics import mutual_info_score

from bitquorum import information as info
from bitquorum import registry
from bitquorum.information import critics, estimator
from bitquorum.interface import BitquorumError, InputError
from bitquorum.testing import check_estimator

ROOT = Path(__file__).resolve().parents[1]
REJECTED = (InputError, TypeCheckError)
QUICK: dict[str, Any] = {"hidden": 16, "steps": 60, "batch": 128, "rate": 1e-2}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def codes(table):
    def sample(count, chance):
        cells = table.flatten().multinomial(count, replacement=True, generator=chance)
        return cells // table.shape[1], cells % table.shape[1]

    return sample


def gaussians(bits, width_a=1, width_b=1):
    return lambda count, chance: info.correlated_gaussians(bits, width_a, width_b, samples=count, generator=chance)


def clusters(count, chance):
    """Draw two variables of four far clusters each that share one fair bit: all marginals are uniform."""
    shared, first, second = torch.randint(2, (3, count), generator=chance)
    return 100.0 * (2 * shared + first)[:, None], 100.0 * (2 * shared + second)[:, None]


def gate(rule, a=2, b=2):
    """Tabulate a label that is a function of two fair and independent variables."""
    labels = [[rule(i, j) for j in range(b)] for i in range(a)]
    joint = torch.zeros(max(map(max, labels)) + 1, a, b, dtype=torch.float64)
    for i, row in enumerate(labels):
        for j, label in enumerate(row):
            joint[label, i, j] = 1 / (a * b)
    return joint


def random_tables(seed, *shape, dims):
    x = torch.rand(shape, generator=generator(seed), dtype=torch.float64) ** 3
    return x / x.sum(tuple(range(-dims, 0)), keepdim=True)


# The contract of every estimator


INDEPENDENT = info.independent_error_joint(0.7, 10)
CONTRACTS: dict[str, tuple[info.Estimator, Any, float, dict[str, Any]]] = {
    "plug-in": (info.PlugIn(correction="none"), codes(INDEPENDENT), 0.737, {"tolerance": 0.07}),
    "miller-madow": (info.PlugIn(), codes(INDEPENDENT), 0.737, {"tolerance": 0.02}),
    "jackknife": (info.PlugIn(correction="jackknife"), codes(INDEPENDENT), 0.737, {"repeats": 60}),
    "shrinkage": (info.Shrinkage(), codes(INDEPENDENT), 0.737, {"tolerance": 0.03}),
    "nsb": (info.NSB(), codes(INDEPENDENT), 0.737, {"tolerance": 0.03}),
    "nsb-small": (info.NSB(), codes(info.binary_symmetric_channel(0.11)), 0.5, {"repeats": 60, "tolerance": 0.005}),
    "ksg": (info.KSG(), gaussians(1.0), 1.0, {"samples": 500, "repeats": 24, "tolerance": 0.01}),
    "ksg-wide": (info.KSG(neighbours=5), gaussians(0.0, 2, 3), 0.0, {"samples": 300}),
    "renyi": (info.RenyiMI(bandwidth=1.0), clusters, 1.0, {"samples": 200, "tolerance": 0.02}),
    "renyi-1.01": (info.RenyiMI(alpha=1.01, bandwidth=1.0), clusters, 1.0, {"samples": 100, "tolerance": 0.05}),
    "info-nce": (info.InfoNCE(**QUICK), gaussians(1.0), 1.0, {"samples": 200, "repeats": 6}),
    "smile": (info.SMILE(**QUICK), gaussians(0.5), 0.5, {"samples": 200, "repeats": 6, "tolerance": 0.25}),
    "club": (info.CLUB(**QUICK), gaussians(1.0), 1.0, {"samples": 200, "repeats": 6}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CONTRACTS)
def test_estimators_keep_the_contract(name: str):
    subject, sample, information, options = CONTRACTS[name]
    check_estimator(subject, sample, information, **options)


def test_every_estimator_has_a_contract_test():
    assert set(registry.registered(estimator.Estimator).values()) >= {type(case[0]) for case in CONTRACTS.values()}
    ours = {cls for cls in registry.registered(estimator.Estimator).values() if cls.__module__.startswith("bitquorum")}
    assert ours == {type(case[0]) for case in CONTRACTS.values()}


def test_estimates_have_intervals():
    estimate = info.Estimate(value=1.0, standard_error=0.1, samples=10)
    assert estimate.interval() == pytest.approx((0.804, 1.196), abs=1e-3)
    assert estimate.interval(0.5) == pytest.approx((1 - 0.0674, 1 + 0.0674), abs=1e-3)
    with pytest.raises(InputError, match=r"confidence in \(0, 1\), got 1.0"):
        estimate.interval(1.0)


# Codes


def dense(a, b):
    counts = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    return counts.index_put((a, b), torch.ones((), dtype=torch.float64), accumulate=True)


def test_the_plug_in_is_that_of_scikit_learn():
    a, b = codes(INDEPENDENT)(200, generator(0))
    expected = mutual_info_score(a.numpy(), b.numpy()) / math.log(2)
    assert info.PlugIn(correction="none")(a, b).value == pytest.approx(expected)


def test_the_jackknife_on_codes_is_that_of_one_hot_tables():
    a, b = codes(random_tables(0, 3, 4, dims=2))(80, generator(1))
    hot = torch.nn.functional.one_hot(a * 4 + b, 12).double().view(-1, 3, 4)
    by_tables = info.jackknife(hot, info.mutual_information)
    by_counts = info.PlugIn(correction="jackknife")(a - 9, 5 * b)
    assert by_counts.value == pytest.approx(by_tables.value, abs=1e-9)
    assert by_counts.standard_error == pytest.approx(by_tables.standard_error, abs=1e-9)


def test_shrinkage_is_the_information_of_the_shrunk_table():
    a, b = codes(INDEPENDENT)(150, generator(0))
    counts = dense(a, b)
    p = counts / counts.sum()
    weight = (1 - p.square().sum()) / (149 * (p - 1 / p.numel()).square().sum())
    assert 0 < weight < 1
    expected = info.mutual_information(weight / p.numel() + (1 - weight) * p).item()
    assert info.Shrinkage()(a, b).value == pytest.approx(expected, abs=1e-12)


def test_shrinkage_and_nsb_of_few_and_constant_samples():
    one = torch.tensor([3])
    same, other = torch.zeros(50, dtype=torch.int64), torch.arange(50) % 5
    for subject in (info.Shrinkage(), info.NSB()):
        assert subject(one, one).value == pytest.approx(0, abs=1e-9)
        assert subject(same, other).value == pytest.approx(0, abs=1e-9)
        a, b = codes(INDEPENDENT)(200, generator(0))
        assert subject(a * 7 - 3, 100 - b).value == pytest.approx(subject(a, b).value, abs=1e-12)
        assert subject(b, a).value == pytest.approx(subject(a, b).value, abs=1e-12)


def test_nsb_of_two_cells_is_the_integral_over_the_prior():
    """Compare with a plain sum over a fine grid in the mean entropy, where the prior is flat."""
    counts, cells = torch.tensor([7.0, 2.0, 1.0], dtype=torch.float64), 5
    beta = torch.logspace(-7, 5, 200_001, dtype=torch.float64)
    digamma, lgamma = torch.special.digamma, torch.lgamma
    prior_entropy = digamma(cells * beta + 1) - digamma(beta + 1)
    steps = prior_entropy.diff()
    full = torch.cat([counts, torch.zeros(2, dtype=torch.float64)])[:, None]
    log_evidence = lgamma(cells * beta) - lgamma(10 + cells * beta) + (lgamma(full + beta) - lgamma(beta)).sum(0)
    share = (full + beta) / (10 + cells * beta)
    entropy = digamma(10 + cells * beta + 1) - (share * digamma(full + beta + 1)).sum(0)
    weights = log_evidence.exp()
    middle = (weights[1:] + weights[:-1]) / 2 * steps
    expected = (middle * (entropy[1:] + entropy[:-1]) / 2).sum() / middle.sum() / math.log(2)
    from bitquorum.information.undersampled import _entropy

    assert _entropy(counts, cells) == pytest.approx(expected.item(), abs=1e-4)


def test_nsb_is_better_than_miller_madow_where_votes_are_few():
    drawn = [codes(INDEPENDENT)(100, generator(seed)) for seed in range(30)]
    bias = {
        type(subject).__name__: fmean(subject(a, b).value for a, b in drawn) - 0.737
        for subject in (info.PlugIn(), info.NSB())
    }
    assert abs(bias["NSB"]) < bias["PlugIn"] / 3


def test_conditional_is_the_mean_within_labels():
    table = random_tables(3, 3, 4, 4, dims=3)
    cells = table.flatten().multinomial(600, replacement=True, generator=generator(0))
    y, a, b = cells // 16, cells // 4 % 4, cells % 4
    estimate = info.conditional(info.PlugIn(correction="none"), a, b, y)
    hot = torch.nn.functional.one_hot(cells, 48).double().view(-1, 3, 4, 4)
    assert estimate.value == pytest.approx(info.conditional_mutual_information(hot.mean(0)).item(), abs=1e-9)
    assert estimate.standard_error == pytest.approx(
        info.jackknife(hot, info.conditional_mutual_information).standard_error, rel=0.1
    )
    with pytest.raises(REJECTED):
        info.conditional(info.PlugIn(), a, b, y[:-1])
    with pytest.raises(REJECTED):
        info.conditional(info.PlugIn(), a, b, y.float())


# The jackknife


def test_the_jackknife_of_the_mean_of_squares_is_unbiased_and_exact():
    x = torch.randn(40, 3, generator=generator(0), dtype=torch.float64)
    found = info.jackknife(x, lambda table: table.square().sum(-1))
    expected = (x.mean(0).square() - x.var(0) / 40).sum().item()
    assert found.value == pytest.approx(expected, abs=1e-12)
    linear = info.jackknife(x, lambda table: table[..., 0])
    assert linear.value == pytest.approx(x[:, 0].mean().item(), abs=1e-12)
    assert linear.standard_error == pytest.approx(x[:, 0].std().item() / math.sqrt(40), abs=1e-12)


def test_the_jackknife_corrects_pooled_votes_and_knows_its_error():
    channel = info.symmetric_channel(0.7, 4) * 4
    truth = info.independent_error_information(0.7, 4)
    plain, corrected = [], []
    for seed in range(200):
        chance = generator(seed)
        rows = channel[torch.randint(4, (100,), generator=chance)]
        first, second = (
            torch.eye(4, dtype=torch.float64)[rows.multinomial(3, True, generator=chance)].mean(1) for _ in range(2)
        )
        joint = first[:, :, None] * second[:, None, :]
        plain.append(info.mutual_information(joint.mean(0)).item())
        corrected.append(info.jackknife(joint, info.mutual_information))
    values = [estimate.value for estimate in corrected]
    error = stdev(values) / math.sqrt(200)
    assert fmean(plain) > truth + 5 * error
    assert fmean(values) == pytest.approx(truth, abs=4 * error)
    assert fmean(estimate.standard_error for estimate in corrected) == pytest.approx(stdev(values), rel=0.2)


def test_the_jackknife_takes_tables_of_any_shape_in_slices(monkeypatch: pytest.MonkeyPatch):
    from bitquorum.information import resample

    x = random_tables(0, 30, 2, 3, 4, dims=3)
    whole = info.jackknife(x, info.conditional_mutual_information)
    monkeypatch.setattr(resample, "_ENTRIES", 50)
    sliced = info.jackknife(x, info.conditional_mutual_information)
    assert sliced.value == pytest.approx(whole.value, abs=1e-12)
    assert sliced.standard_error == pytest.approx(whole.standard_error, abs=1e-12)


def test_the_jackknife_refuses_what_it_cannot_measure():
    x = torch.rand(5, 3)
    for call in (
        lambda: info.jackknife(x[:1], lambda t: t.sum(-1)),
        lambda: info.jackknife(torch.ones(5, 3).long(), lambda t: t.sum(-1)),
        lambda: info.jackknife(x, lambda t: t),
        lambda: info.jackknife(x, lambda t: t.sum(-1) * math.nan),
    ):
        with pytest.raises(REJECTED):
            call()


# Tables of several variables


def test_multivariate_quantities_of_copies_and_parity():
    copies = torch.zeros(2, 2, 2, dtype=torch.float64)
    copies[0, 0, 0] = copies[1, 1, 1] = 0.5
    parity = gate(lambda a, b: a ^ b)
    both = torch.stack([copies, parity])
    assert info.total_correlation(both, variables=3).tolist() == pytest.approx([2, 1])
    assert info.dual_total_correlation(both, variables=3).tolist() == pytest.approx([1, 2])
    assert info.interaction_information(both, variables=3).tolist() == pytest.approx([-1, 1])


def test_multivariate_quantities_of_two_variables_are_the_information():
    tables = random_tables(0, 5, 3, 4, dims=2)
    expected = info.mutual_information(tables)
    for quantity in (info.total_correlation, info.dual_total_correlation, info.interaction_information):
        assert torch.allclose(quantity(tables, variables=2), expected, atol=1e-12)


def test_multivariate_identities():
    tables = random_tables(1, 6, 2, 3, 4, dims=3)
    interaction = info.interaction_information(tables, variables=3)
    conditional = info.conditional_mutual_information(tables)
    assert torch.allclose(interaction, conditional - info.mutual_information(tables.sum(1)), atol=1e-12)
    gap = info.total_correlation(tables, variables=3) - info.dual_total_correlation(tables, variables=3)
    assert torch.allclose(gap, -interaction, atol=1e-12)
    four = random_tables(2, 2, 3, 2, 3, dims=4)
    given = sum(
        float(mass) * info.interaction_information(part / mass)
        for part, mass in ((four[..., k], four[..., k].sum()) for k in range(3))
    )
    expected = given - info.interaction_information(four.sum(-1))
    assert info.interaction_information(four).item() == pytest.approx(float(expected), abs=1e-12)


def test_multivariate_quantities_are_differentiable_and_refuse_bad_tables():
    logits = torch.randn(2, 2, 3, 2, generator=generator(0), dtype=torch.float64).requires_grad_()
    for quantity in (info.total_correlation, info.dual_total_correlation, info.interaction_information):
        assert torch.autograd.gradcheck(
            lambda x, quantity=quantity: quantity(x.flatten(1).softmax(-1).view_as(x), variables=3), logits
        )
        for bad, count in ((torch.ones(2, 2), 2), (torch.eye(2) / 2, 3), (torch.eye(2) / 2, 1), (torch.eye(2), None)):
            with pytest.raises(REJECTED):
                quantity(bad, variables=count)


def test_bald_and_channel_rate_are_the_information_of_source_and_outcome():
    views = torch.randn(4, 3, 5, generator=generator(0), dtype=torch.float64).softmax(-1)
    expected = info.mutual_information(views.transpose(0, 1) / 4)
    assert torch.allclose(info.bald(views), expected, atol=1e-12)
    assert info.bald(views[:, 0]).item() == pytest.approx(expected[0].item())
    assert info.channel_rate(views[:, 1]).item() == pytest.approx(expected[1].item())
    assert info.bald(views[:1]).tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    with pytest.raises(REJECTED):
        info.bald(views * 2)
    with pytest.raises(REJECTED):
        info.channel_rate(views[0, 0])


def test_independent_error_bits_are_those_of_the_table():
    accuracy = torch.tensor([[0.0, 0.1, 0.5], [0.9, 0.99, 1.0]], dtype=torch.float64)
    other = accuracy.flip(1)
    for classes in (2, 3, 10):
        found = info.independent_error_bits(accuracy, other, classes)
        for place in range(6):
            rates = accuracy.flatten()[place].item(), other.flatten()[place].item()
            table = info.independent_error_joint(rates[0], classes, other=rates[1])
            assert found.flatten()[place].item() == pytest.approx(info.mutual_information(table).item(), abs=1e-12)
    for bad in (accuracy + 0.1, accuracy - 0.1, accuracy * math.nan):
        with pytest.raises(REJECTED):
            info.independent_error_bits(bad, other, 10)
    with pytest.raises(REJECTED):
        info.independent_error_bits(accuracy, other, 1)


# The decomposition


def both_bits(first, second):
    """Tabulate the copy of a shared bit beside a gate of two bits that each member has for itself."""
    joint = torch.zeros(4, 4, 4, dtype=torch.float64)
    for shared in range(2):
        for i in range(2):
            for j in range(2):
                joint[2 * shared + (i ^ j), 2 * shared + i, 2 * shared + j] += 1 / 8
    return joint if first == second else joint.transpose(1, 2)


REDUNDANT = torch.zeros(2, 2, 2, dtype=torch.float64)
REDUNDANT[0, 0, 0] = REDUNDANT[1, 1, 1] = 0.5
GATES = {  # redundancy, unique to A, unique to B, synergy; Bertschinger et al., 2014, and Griffith and Koch, 2014
    "and": (gate(lambda a, b: a & b), (0.3113, 0, 0, 0.5)),
    "xor": (gate(lambda a, b: a ^ b), (0, 0, 0, 1)),
    "copy": (gate(lambda a, b: 2 * a + b), (0, 1, 1, 0)),
    "sum": (gate(lambda a, b: a + b), (0.5, 0, 0, 1)),
    "rdn": (REDUNDANT, (1, 0, 0, 0)),
    "unq": (gate(lambda a, b: b), (0, 0, 1, 0)),
    "rdn-xor": (both_bits(0, 0), (1, 0, 0, 1)),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_have_the_published_decomposition(name: str):
    joint, expected = GATES[name]
    parts = info.decompose(joint)
    assert (parts.redundancy, parts.unique_a, parts.unique_b, parts.synergy) == pytest.approx(expected, abs=1e-4)
    assert 0 <= parts.gap <= 1e-6


@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 2, 4), (5, 5, 5), (10, 10, 10)])
def test_the_four_parts_add_up_and_are_not_negative(shape: tuple[int, int, int]):
    joint = random_tables(1, *shape, dims=3)
    parts = info.decompose(joint, tolerance=1e-7)
    whole, first, second = (
        info.mutual_information(table).item() for table in (joint.flatten(1), joint.sum(2), joint.sum(1))
    )
    assert parts.redundancy + parts.unique_a == pytest.approx(first, abs=1e-12)
    assert parts.redundancy + parts.unique_b == pytest.approx(second, abs=1e-12)
    assert parts.redundancy + parts.unique_a + parts.unique_b + parts.synergy == pytest.approx(whole, abs=1e-12)
    assert min(parts.redundancy, parts.unique_a, parts.unique_b, parts.synergy) > -1e-6
    swapped = info.decompose(joint.transpose(1, 2), tolerance=1e-7)
    assert (swapped.unique_b, swapped.redundancy) == pytest.approx((parts.unique_a, parts.redundancy), abs=2e-7)


def test_alternating_projections_find_the_least_information_of_the_decomposition():
    joint = random_tables(4, 3, 3, 3, dims=3)
    least = info.mutual_information(joint.flatten(1)).item() - info.decompose(joint).synergy
    first, second, pair = joint.sum(2), joint.sum(1), torch.ones(3, 3, dtype=torch.float64) / 9
    for _ in range(200):  # alternating projections: slow and near, and another algorithm than ours
        law = pair.expand(3, 3, 3)
        for _ in range(20):
            law = law * (first / law.sum(2))[:, :, None]
            law = law * (second / law.sum(1))[:, None, :]
        pair = law.sum(0)
    found = info.mutual_information(law.flatten(1) / law.sum()).item()
    assert found == pytest.approx(least, abs=1e-3)


def test_members_that_err_independently_have_redundancy_and_the_worse_has_nothing_unique():
    first, second = info.symmetric_channel(0.9, 4), info.symmetric_channel(0.7, 4)
    parts = info.decompose(4 * first[:, :, None] * second[:, None, :])
    assert parts.unique_b == pytest.approx(0, abs=1e-5)
    assert parts.unique_a > 0.3
    assert parts.redundancy == pytest.approx(info.mutual_information(second).item(), abs=1e-5)
    assert parts.synergy > 0.05


def test_the_decomposition_takes_empty_labels_and_values_and_refuses_bad_tables():
    joint = torch.nn.functional.pad(GATES["and"][0], (0, 1, 1, 0, 0, 2))
    parts = info.decompose(joint.float())
    assert (parts.redundancy, parts.synergy) == pytest.approx((0.3113, 0.5), abs=1e-4)
    for call in (
        lambda: info.decompose(joint * 2),
        lambda: info.decompose(joint[0]),
        lambda: info.decompose(joint, tolerance=0.0),
    ):
        with pytest.raises(REJECTED):
            call()
    with pytest.raises(BitquorumError, match="gap of at most"):
        info.decompose(joint, tolerance=1e-18)


# Features


def test_ksg_ignores_what_leaves_information_alone():
    a, b = info.correlated_gaussians(1.0, 2, 2, samples=400, generator=generator(0))
    value = info.KSG()(a, b).value
    assert info.KSG()(100 + 7 * a, -b.flip(1)).value == pytest.approx(value)
    assert info.KSG()(b, a).value == pytest.approx(value)
    assert info.KSG()(torch.cat([a, torch.ones(400, 1)], 1), b).value == pytest.approx(value)
    assert info.KSG()(a.view(400, 1, 2), b).value == pytest.approx(value)
    assert info.KSG()(a[:, 0], b[:, 0]).samples == 400


def test_ksg_counts_in_slices(monkeypatch: pytest.MonkeyPatch):
    from bitquorum.information import neighbours

    a, b = info.correlated_gaussians(1.0, 2, 2, samples=100, generator=generator(0))
    whole = info.KSG()(a, b)
    monkeypatch.setattr(neighbours, "_ENTRIES", 700)
    assert info.KSG()(a, b).value == pytest.approx(whole.value)


def test_ksg_is_the_formula_by_hand():
    a, b = info.correlated_gaussians(1.0, 1, 1, samples=30, generator=generator(0))
    a, b = ((x - x.mean()) / x.std(correction=0) for x in (a, b))

    def digamma(x):
        return torch.special.digamma(torch.tensor(float(x), dtype=torch.float64)).item()

    total = 0.0
    for i in range(30):
        gaps = [max(abs(float(a[i] - a[j])), abs(float(b[i] - b[j]))) for j in range(30) if j != i]
        radius = sorted(gaps)[1]
        near = [sum(abs(float(x[i] - x[j])) < radius for j in range(30) if j != i) for x in (a, b)]
        total += digamma(near[0] + 1) + digamma(near[1] + 1)
    expected = (digamma(2) + digamma(30) - total / 30) / math.log(2)
    assert info.KSG(neighbours=2)(a, b).value == pytest.approx(expected)


def test_renyi_is_the_function_with_the_error_of_a_jackknife():
    a, b = info.correlated_gaussians(1.0, 2, 3, samples=120, generator=generator(0))
    for alpha in (1.01, 2.0):
        estimate = info.RenyiMI(alpha=alpha, bandwidth=1.5)(a, b)
        assert estimate.value == pytest.approx(info.renyi_mutual_information(a, b, alpha, 1.5).item())
        kept = [torch.arange(120) != place for place in range(120)]
        left = torch.tensor([info.renyi_mutual_information(a[k], b[k], alpha, 1.5).item() for k in kept])
        error = math.sqrt(119 / 120 * float((left - left.mean()).square().sum()))
        assert estimate.standard_error == pytest.approx(error, rel=0.1)


def test_critics_are_not_fooled_by_samples_they_were_trained_on():
    a, b = (torch.randn(200, 10, generator=generator(seed)) for seed in range(2))
    for subject in (info.InfoNCE(**QUICK), info.SMILE(**QUICK)):
        assert subject(a, b).value < 0.1


def test_info_nce_is_capped_by_the_number_of_samples():
    x = torch.randn(100, 3, generator=generator(0))
    assert 2.0 < info.InfoNCE(hidden=32, steps=200, rate=1e-2)(x, x).value <= math.log2(50)


def test_club_is_its_known_value_where_the_law_is_right():
    a, b = info.correlated_gaussians(0.5, 1, 1, samples=2000, generator=generator(0))
    estimate = info.CLUB(**QUICK)(a, b)
    assert estimate.value == pytest.approx(1 / math.log(2), abs=0.35)  # rho^2 / (1 - rho^2) = 1 nat


def test_the_terms_of_club_are_the_sum_over_pairs():
    a, b = info.correlated_gaussians(1.0, 2, 2, samples=40, generator=generator(0))
    club = info.CLUB(hidden=8)
    with torch.no_grad():
        network = club._network(2, 2)
        mean, log_variance = critics._gaussian(network, a.float())
        logs = -((b.float()[None] - mean[:, None]).square() / log_variance.exp()[:, None]).sum(-1) / 2
        expected = (logs.diagonal().mean() - logs.mean()).item()
        assert club._terms(network, a.float(), b.float()).mean().item() == pytest.approx(expected, rel=1e-4)


def test_critics_work_without_gradients_and_differ_by_seed():
    a, b = info.correlated_gaussians(1.0, 1, 1, samples=60, generator=generator(0))
    first = info.InfoNCE(**QUICK)(a, b)
    with torch.no_grad():
        assert info.InfoNCE(**QUICK)(a, b) == first
    assert info.InfoNCE(**QUICK, seed=1)(a, b) != first


def test_bad_features_and_fields_are_refused():
    x = torch.randn(30, 2, generator=generator(0))
    unknown: Any = "scott"
    for call in (
        lambda: info.KSG(neighbours=0),
        lambda: info.KSG()(x[:3], x[:3]),
        lambda: info.KSG()(x, x[:9]),
        lambda: info.KSG()(x * math.nan, x),
        lambda: info.KSG()(x.long(), x),
        lambda: info.KSG()(torch.zeros(30, 2), torch.zeros(30, 1)),
        lambda: info.RenyiMI(alpha=0.0),
        lambda: info.RenyiMI(bandwidth=unknown),
        lambda: info.RenyiMI(bandwidth=-1.0),
        lambda: info.RenyiMI()(x, x[:5]),
        lambda: info.InfoNCE(hidden=0),
        lambda: info.InfoNCE(hidden=2.5),  # type: ignore[arg-type]
        lambda: info.CLUB(rate=0.0),
        lambda: info.SMILE(clip=0.0),
        lambda: info.SMILE(clip=math.nan),
        lambda: info.CLUB()(x[:10], x[:10]),
        lambda: info.InfoNCE(batch=1),
        lambda: info.SMILE(batch=1),
        lambda: info.NSB()(x, x),
        lambda: info.Shrinkage()(x[:, 0], x[:, 0]),
        lambda: info.PlugIn(correction="jackknife")(torch.tensor([1]), torch.tensor([1])),
        lambda: info.correlated_gaussians(-1.0, 1, 1, samples=5, generator=generator(0)),
        lambda: info.correlated_gaussians(1.0, 0, 1, samples=5, generator=generator(0)),
        lambda: info.calibrate(info.KSG(), 1, 1, 100, true=()),
    ):
        with pytest.raises(REJECTED):
            call()


# Calibration and the benchmark


def test_gaussians_have_the_information_asked_for():
    a, b = info.correlated_gaussians(3.0, 2, 4, samples=200_000, generator=generator(0))
    both = torch.cat([a, b], 1)
    logs = [torch.logdet(x.T.cov()).item() for x in (a, b, both)]
    assert (logs[0] + logs[1] - logs[2]) / 2 / math.log(2) == pytest.approx(3, abs=0.02)


def test_calibration_says_what_is_returned_where_how_much_is_true():
    wide = info.calibrate(info.KSG(), 20, 20, 300, true=(1.0, 6.4))
    assert wide == info.calibrate(info.KSG(), 20, 20, 300, true=(1.0, 6.4))
    assert wide.returned[1] < 6.4 / 3
    assert re.fullmatch(
        r"KSG, no bound; on Gaussians of 20 \+ 20 dimensions and 300 samples it returns "
        r"-?[\d.]+ where 1, [\d.]+ where 6.4 bits are true",
        str(wide),
    )
    lower = info.calibrate(info.InfoNCE(**QUICK), 2, 2, 60, true=(1.0,), repeats=2)
    assert str(lower).startswith("InfoNCE, lower bound; on Gaussians of 2 + 2 dimensions and 60 samples")


def benchmark():
    spec = importlib.util.spec_from_file_location("estimators", ROOT / "benchmarks" / "estimators.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = (ROOT / "docs" / "information.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"<!-- estimators: (\S+) (\w+) -->\n(.*?)<!-- end -->", PAGE, re.S)


@pytest.mark.parametrize(("folder", "family", "shown"), SHOWN, ids=[family for _, family, _ in SHOWN])
def test_tables_of_estimators_are_what_the_stored_rows_render(folder: str, family: str, shown: str):
    rows = json.loads((ROOT / folder / "metrics.json").read_text(encoding="utf-8"))["rows"]
    expected = benchmark().render(rows, family).markdown()
    assert shown.strip() == expected, f"replace the table by:\n{expected}"


def test_the_page_shows_every_family_of_the_benchmark():
    rows = json.loads((ROOT / "results/benchmark-estimators/metrics.json").read_text(encoding="utf-8"))["rows"]
    assert {family for _, family, _ in SHOWN} == {row["family"] for row in rows}
    assert all(row["seeds"] >= 5 for row in rows)


def test_the_benchmark_measures_on_laws_of_the_stated_information():
    module = benchmark()
    for table in module.tables().values():
        assert float(table.sum()) == pytest.approx(1)
    label, first, second = module.votes(0.9, 2000, 0)
    assert float((first == label[:, None]).float().mean()) == pytest.approx(0.9, abs=0.01)
    assert float((second == label[:, None]).float().mean()) == pytest.approx(0.9, abs=0.01)
    x = torch.randn(50, 3, generator=generator(0), dtype=torch.float64)
    turned = module.spirals(x)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1))
    a, b, y = module.triples(module.shared_errors(0.7, 1.0), 500, 0)
    assert torch.equal(a, b)
    assert float((a == y).float().mean()) == pytest.approx(0.7, abs=0.1)
