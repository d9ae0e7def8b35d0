"""Hold `bitquorum.information` against laws whose entropy and mutual information are known."""

import copy
import dataclasses
import math
import pickle
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.autograd import gradcheck

from bitquorum import information as info
from bitquorum.interface import InputError, Method

REJECTED = (InputError, TypeCheckError)  # the shape checks of the annotations, where the tests switch them on
ACCURACIES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BETWEEN_MEMBERS = (3.32, 2.55, 2.02, 1.26, 0.737, 0.393, 0.180, 0.064, 0.014, 0.001, 0.0)
WITH_LABEL = (3.32, 2.88, 2.54, 1.97, 1.49, 1.08, 0.737, 0.449, 0.222, 0.064, 0.0)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_tables(seed, *shape, dims=2):
    x = torch.rand(shape, generator=generator(seed), dtype=torch.float64) ** 3
    return x / x.sum(tuple(range(-dims, 0)), keepdim=True)


def predictions(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).softmax(-1)


def features(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def ratio_form(joint):
    """Compute MI by the textbook sum over cells with mass, in plain Python."""
    rows, columns = joint.sum(1).tolist(), joint.sum(0).tolist()
    return sum(
        p * math.log2(p / (rows[i] * columns[j]))
        for i, row in enumerate(joint.tolist())
        for j, p in enumerate(row)
        if p > 0
    )


def samples(joint, count, seed):
    cells = joint.flatten().multinomial(count, replacement=True, generator=generator(seed))
    return cells // joint.shape[1], cells % joint.shape[1]


# Tables


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_entropy_of_known_laws(dtype):
    laws = torch.tensor([[0.25] * 4, [0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]], dtype=dtype)
    assert info.entropy(laws).tolist() == pytest.approx([2.0, 1.75, 0.0], abs=1e-6)
    assert info.entropy(laws.T, dim=0).tolist() == pytest.approx([2.0, 1.75, 0.0], abs=1e-6)


def test_entropy_over_several_dimensions():
    assert info.entropy(torch.full((3, 2, 4), 0.125), dim=(1, 2)).tolist() == pytest.approx([3.0] * 3)


def test_mutual_information_equals_the_sum_over_cells():
    tables = random_tables(0, 5, 3, 4)
    tables[0, 1, 2] = 0
    tables[0] /= tables[0].sum()
    expected = [ratio_form(table) for table in tables]
    assert info.mutual_information(tables).tolist() == pytest.approx(expected, abs=1e-12)


def test_mutual_information_of_independent_and_identical_variables():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    assert info.mutual_information(torch.outer(p, p)).item() == pytest.approx(0, abs=1e-12)
    assert info.mutual_information(p.diag()).item() == pytest.approx(info.entropy(p).item(), abs=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.11, 0.3, 0.5, 0.9, 1.0])
def test_binary_symmetric_channel(p):
    flips = sum(-q * math.log2(q) for q in (p, 1 - p) if q > 0)
    assert info.mutual_information(info.binary_symmetric_channel(p)).item() == pytest.approx(1 - flips, abs=1e-12)


def test_conditional_mutual_information_is_the_mean_over_classes():
    joint = random_tables(1, 2, 4, 3, 5, dims=3)
    joint[:, 2] = 0
    joint /= joint.sum((-3, -2, -1), keepdim=True)
    weights = joint.sum((-2, -1))
    inside = [0, 1, 3]
    per_class = info.mutual_information(joint[:, inside] / weights[:, inside, None, None])
    expected = (weights[:, inside] * per_class).sum(-1)
    assert torch.allclose(info.conditional_mutual_information(joint), expected, atol=1e-12)


def test_parity_has_information_only_given_the_third_bit():
    parity = torch.zeros(2, 2, 2)
    for a in range(2):
        for b in range(2):
            parity[a ^ b, a, b] = 0.25
    assert info.conditional_mutual_information(parity).item() == pytest.approx(1)
    assert info.mutual_information(parity.sum(0)).item() == pytest.approx(0)


def test_interaction_identity():
    joint = random_tables(2, 20, 4, 3, 3, dims=3)  # [y, a, b]
    a, b = info.mutual_information(joint.sum(-1)), info.mutual_information(joint.sum(-2))
    both = info.mutual_information(joint.flatten(-2))
    between = info.mutual_information(joint.sum(-3))
    conditional = info.conditional_mutual_information(joint)
    assert torch.allclose(both, a + b - between + conditional, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 2**31),
    st.floats(0.1, 30),
)
def test_two_members_that_know_the_label_share_information(shape, seed, sharpness):
    joint = (features(seed, *shape) * sharpness).flatten().softmax(0).view(shape)  # [y, a, b]
    shared = info.mutual_information(joint.sum(0))
    a, b = info.mutual_information(joint.sum(2)), info.mutual_information(joint.sum(1))
    assert shared >= a + b - info.entropy(joint.sum((1, 2))) - 1e-9
    assert info.conditional_mutual_information(joint) >= -1e-9
    assert shared >= -1e-9


# Laws


@pytest.mark.parametrize(
    ("accuracy", "between", "label"), list(zip(ACCURACIES, BETWEEN_MEMBERS, WITH_LABEL, strict=True))
)
def test_independent_errors_have_the_printed_information(accuracy, between, label):
    tolerance = 0.0051 if between > 1 else 0.00051
    assert info.independent_error_information(accuracy, 10) == pytest.approx(between, abs=tolerance)
    channel = info.symmetric_channel(accuracy, 10)
    tolerance = 0.0051 if label > 1 else 0.00051
    assert info.mutual_information(channel).item() == pytest.approx(label, abs=tolerance)


def test_independent_errors_of_unequal_members_share_less_than_those_of_the_better():
    joint = info.independent_error_joint(0.9, 10, other=0.6)
    assert joint.sum().item() == pytest.approx(1)
    shared = info.independent_error_information(0.9, 10, other=0.6)
    assert shared == pytest.approx(ratio_form(joint), abs=1e-12)
    assert info.independent_error_information(0.6, 10) < shared < info.independent_error_information(0.9, 10)
    perfect = info.independent_error_information(1.0, 10, other=0.6)
    assert perfect == pytest.approx(info.mutual_information(info.symmetric_channel(0.6, 10)).item())


@pytest.mark.parametrize(("accuracy", "classes"), [(-0.1, 10), (1.1, 10), (math.nan, 10), (0.5, 1)])
def test_laws_refuse_values_out_of_range(accuracy, classes):
    with pytest.raises(InputError, match="expected"):
        info.symmetric_channel(accuracy, classes)


# Joints


def test_soft_joint_of_one_hot_predictions_is_the_table_of_counts():
    a, b = torch.randint(4, (100,), generator=generator(0)), torch.randint(3, (100,), generator=generator(1))
    hot = info.soft_joint(torch.eye(4)[a], torch.eye(3)[b])
    counts = torch.zeros(4, 3)
    for i, j in zip(a.tolist(), b.tolist(), strict=True):
        counts[i, j] += 1
    assert torch.allclose(hot, counts / 100)


def test_soft_joint_takes_leading_dimensions():
    p, q = predictions(0, 2, 7, 4), predictions(1, 2, 7, 3)
    assert torch.allclose(info.soft_joint(p, q)[1], info.soft_joint(p[1], q[1]))


def test_class_joint_splits_the_soft_joint_by_label():
    p, q = predictions(0, 30, 4), predictions(1, 30, 3)
    labels = torch.randint(4, (30,), generator=generator(2))
    joint = info.class_joint(p, q, labels, 5)
    assert joint.shape == (5, 4, 3)
    assert joint.sum().item() == pytest.approx(1)
    assert torch.allclose(joint.sum(0), info.soft_joint(p, q))
    chosen = labels == 2
    assert torch.allclose(joint[2], info.soft_joint(p[chosen], q[chosen]) * chosen.sum() / 30)
    assert joint[4].abs().sum() == 0


def test_pairwise_joints_stack_the_pairs_in_order():
    members = predictions(3, 4, 25, 3)
    labels = torch.randint(3, (25,), generator=generator(4), dtype=torch.int32)
    assert info.pairs(4) == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    joints = info.pairwise_joints(members)
    by_class = info.pairwise_class_joints(members, labels)
    assert info.pairwise_class_joints(members, labels, classes=7).shape == (6, 7, 3, 3)
    for index, (i, j) in enumerate(info.pairs(4)):
        assert torch.allclose(joints[index], info.soft_joint(members[i], members[j]))
        assert torch.allclose(by_class[index], info.class_joint(members[i], members[j], labels, 3))


def test_joints_are_float32_under_autocast_and_for_half_precision():
    p = predictions(0, 2, 64, 10)
    exact = info.pairwise_joints(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = info.pairwise_joints(p.float())
    half = info.pairwise_joints(p.bfloat16())
    assert under.dtype == half.dtype == torch.float32
    assert torch.allclose(under.double(), exact, atol=1e-7)
    assert torch.allclose(half.double(), exact, atol=1e-3)


def test_moving_joint_has_the_averaged_value_and_the_gradient_of_the_batch_at_that_value():
    previous, batch = random_tables(0, 3, 3), random_tables(1, 3, 3).requires_grad_()
    joint = info.moving(previous.clone().requires_grad_(), batch, 0.9)
    assert torch.allclose(joint, 0.9 * previous + 0.1 * batch, atol=1e-15)
    (gradient,) = torch.autograd.grad(info.mutual_information(joint), batch)
    here = joint.detach().requires_grad_()
    (expected,) = torch.autograd.grad(info.mutual_information(here), here)
    assert torch.allclose(gradient, expected)


def test_moving_joint_starts_with_the_batch_and_converges_to_the_mean():
    table = random_tables(0, 3, 3)
    assert info.moving(None, table, 0.9) is table
    joint = info.moving(None, random_tables(1, 3, 3), 0.5)
    for _ in range(60):
        joint = info.moving(joint, table, 0.5)
    assert torch.allclose(joint, table, atol=1e-15)


# Bias and the plug-in on samples


def test_bias_figures():
    assert info.plug_in_bias(10, 10, 128) == pytest.approx(0.46, abs=0.005)
    assert info.plug_in_bias(10, 10, 1000) == pytest.approx(0.058, abs=0.0005)
    assert info.plug_in_bias(10, 10, 10000) == pytest.approx(0.006, abs=0.0005)


def test_bias_of_occupied_cells():
    counts = torch.tensor([[3, 0, 1], [0, 0, 0], [2, 0, 2]])
    assert info.occupied_bias(counts) == pytest.approx(info.plug_in_bias(2, 2, 8))
    # A diagonal table: MI is the entropy, whose plug-in is too low by (K - 1) / (2 N ln 2).
    assert info.occupied_bias(torch.eye(4).int() * 5) == pytest.approx(-3 / (2 * 20 * math.log(2)))


@pytest.mark.parametrize("correction", ["none", "miller-madow"])
def test_plug_in_is_the_information_of_the_table_of_counts(correction):
    a, b = samples(random_tables(5, 3, 4), 200, 0)
    counts = torch.zeros(3, 4, dtype=torch.int64).index_put((a, b), torch.tensor(1), accumulate=True)
    expected = info.mutual_information(counts.double() / 200).item()
    expected -= info.occupied_bias(counts) if correction != "none" else 0
    estimate = info.PlugIn(correction=correction)(a * 7 - 3, 100 - b)  # any integers name the codes
    assert estimate.value == pytest.approx(expected, abs=1e-12)
    assert estimate.samples == 200


@pytest.mark.long
@pytest.mark.parametrize("law", ["dependent", "channel", "independent"])
def test_plug_in_is_unbiased_after_correction_and_knows_its_standard_error(law):
    joint = {
        "dependent": torch.tensor([[12, 2, 2, 4], [1, 9, 3, 2], [2, 1, 1, 11]], dtype=torch.float64) / 50,
        "channel": info.symmetric_channel(0.7, 4),
        "independent": torch.full((4, 4), 1 / 16, dtype=torch.float64),
    }[law]
    truth, count, runs = info.mutual_information(joint).item(), 500, 2000
    drawn = [samples(joint, count, seed) for seed in range(runs)]
    corrected = [info.PlugIn()(a, b) for a, b in drawn]
    plain = fmean(info.PlugIn(correction="none")(a, b).value for a, b in drawn)
    spread = stdev(estimate.value for estimate in corrected)
    error = spread / math.sqrt(runs)
    bias = info.plug_in_bias(joint.shape[0], joint.shape[1], count)
    assert bias > 8 * error  # so that the two checks below tell the corrections apart
    assert fmean(estimate.value for estimate in corrected) == pytest.approx(truth, abs=4 * error)
    assert plain - truth == pytest.approx(bias, abs=4 * error)
    claimed = math.sqrt(fmean(estimate.standard_error**2 for estimate in corrected))
    # A standard deviation of `runs` normal values is itself off by 1 / sqrt(2 runs), here 1.6 %.
    low, high = (0.92, 1.12) if law != "independent" else (1.2, 1.65)
    assert low < claimed / spread < high


def test_plug_in_of_a_constant_and_of_itself():
    a = torch.arange(8).repeat(10)
    assert info.PlugIn()(a, torch.zeros_like(a)).value == pytest.approx(0, abs=1e-12)
    same = info.PlugIn(correction="none")(a, a)
    assert (same.value, same.standard_error) == pytest.approx((3, 0), abs=1e-12)


def test_plug_in_takes_many_different_codes():
    a = torch.arange(50_000)
    assert info.PlugIn(correction="none")(a, a).value == pytest.approx(math.log2(50_000))


@pytest.mark.parametrize("estimator", [info.PlugIn(), info.PlugIn(correction="none")])
def test_estimator_contract(estimator: info.PlugIn):
    assert issubclass(type(estimator), Method)
    assert estimator.unit == "bits"
    assert estimator.bound in ("plug-in", "lower", "upper")
    assert pickle.loads(pickle.dumps(estimator)) == copy.deepcopy(estimator) == estimator
    field = dataclasses.fields(estimator)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(estimator, field, "none")
    a, b = samples(random_tables(7, 3, 3), 100, 0)
    assert estimator(a, b) == estimator(a, b)
    shuffle = torch.randperm(100, generator=generator(0))
    assert estimator(a[shuffle], b[shuffle]).value == pytest.approx(estimator(a, b).value)
    assert estimator(b, a).value == pytest.approx(estimator(a, b).value)


def test_estimator_is_abstract():
    constructor: type = info.Estimator
    with pytest.raises(TypeError, match="abstract"):
        constructor()


# Matrix-based Rényi


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.01, 2.0, 5.0])
@pytest.mark.parametrize("bandwidth", ["median", "silverman", 1.0])
def test_identical_points_have_no_entropy(alpha, bandwidth):
    for dtype in (torch.float32, torch.float64):
        points = torch.tensor([[100.1, -7.3, 0.7]], dtype=dtype).repeat(9, 1)
        value = info.renyi_entropy(info.gram(points, bandwidth), alpha)
        assert value.item() == pytest.approx(0, abs=2e-3 if alpha < 1 else 1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.01, 2.0, 5.0])
def test_far_points_have_the_entropy_of_their_number(alpha):
    points = 100.0 * torch.arange(16, dtype=torch.float64)[:, None]
    assert info.renyi_entropy(info.gram(points, 1.0), alpha).item() == pytest.approx(4, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_clusters_have_the_renyi_entropy_of_their_shares(alpha):
    shares = torch.tensor([4, 2, 1, 1])
    points = 100.0 * torch.arange(4, dtype=torch.float64).repeat_interleave(shares)[:, None]
    p = (shares / 8).double()
    expected = info.entropy(p) if alpha == 1 else (p**alpha).sum().log2() / (1 - alpha)
    assert info.renyi_entropy(info.gram(points, 1.0), alpha).item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_are_at_no_distance_under_the_median_rule(dtype):
    shares = torch.tensor([80, 10, 10])
    expected = -(shares / 100).square().sum().log2().item()
    for seed in range(4):
        rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        x = rows.repeat_interleave(shares, 0).requires_grad_()
        entropy = info.renyi_entropy(info.gram(x))
        assert entropy.item() == pytest.approx(expected, abs=1e-4)
        (slope,) = torch.autograd.grad(entropy, x)
        assert slope.abs().max().item() < 1


@pytest.mark.parametrize("distance", [0.09, 1e-2, 1e-4, 1e-6])
def test_orders_next_to_one_keep_their_digits(distance):
    gram = info.gram(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    truth = info.renyi_entropy(gram.double() / gram.double().trace(), 1.0).item()
    for alpha in (1 - distance, 1 + distance):
        wide = info.renyi_entropy(gram.double() / gram.double().trace(), alpha).item()
        assert wide == pytest.approx(truth, abs=3 * distance)
        assert info.renyi_entropy(gram, alpha).item() == pytest.approx(wide, abs=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 1.01, 2.0])
def test_information_of_clusters_is_that_of_their_codes(alpha):
    codes = 100.0 * torch.cartesian_prod(torch.arange(4.0), torch.arange(2.0)).double().repeat(2, 1)
    first, second = codes[:, :1], codes[:, 1:]

    def measure(a, b):
        return info.renyi_mutual_information(a, b, alpha, 1.0).item()

    assert measure(first, second) == pytest.approx(0, abs=1e-9)
    assert measure(first, first) == pytest.approx(2, abs=1e-9)
    assert measure(first, codes) == pytest.approx(2, abs=1e-9)
    assert measure(codes, second) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("bandwidth", ["median", "silverman"])
@pytest.mark.parametrize("alpha", [1.01, 2.0])
def test_information_ignores_order_rotation_shift_and_scale(bandwidth, alpha):
    a, b = features(0, 24, 3), features(1, 24, 2)
    value = info.renyi_mutual_information(a, b, alpha, bandwidth)
    order = torch.randperm(24, generator=generator(2))
    turn = torch.linalg.qr(features(3, 3, 3)).Q
    for changed, other in ((a[order], b[order]), (a @ turn, b), (a + 5, 0.01 * b)):
        assert torch.allclose(info.renyi_mutual_information(changed, other, alpha, bandwidth), value, atol=1e-10)
    assert torch.allclose(info.renyi_mutual_information(b, a, alpha, bandwidth), value)


def test_information_lies_between_zero_and_the_smaller_entropy_and_tells_copies_from_strangers():
    for seed in range(10):
        a, b = features(seed, 40, 4), features(seed + 100, 40, 4)
        grams = info.gram(a), info.gram(b)
        smaller = min(info.renyi_entropy(g).item() for g in grams)
        strange = info.gram_mutual_information(*grams).item()
        near = info.renyi_mutual_information(a, a + 0.1 * b).item()
        assert -0.05 < strange < near <= smaller + 1e-9


def test_orders_are_continuous():
    matrix = info.gram(features(4, 30, 3))
    one, two = (info.renyi_entropy(matrix, alpha).item() for alpha in (1.0, 2.0))
    assert info.renyi_entropy(matrix, 1.01).item() == pytest.approx(one, abs=0.05)
    assert info.renyi_entropy(matrix, 1 + 1e-6).item() == pytest.approx(one, abs=1e-4)
    assert info.renyi_entropy(matrix, 2 + 1e-9).item() == pytest.approx(two, abs=1e-6)
    assert 0 < two < one < math.log2(30)


def test_batched_matrices_give_the_pairs():
    grams = torch.stack([info.gram(features(seed, 12, 3)) for seed in range(3)])
    left, right = zip(*info.pairs(3), strict=True)
    for alpha in (1.01, 2.0):
        values = info.gram_mutual_information(grams[list(left)], grams[list(right)], alpha)
        expected = [info.gram_mutual_information(grams[i], grams[j], alpha).item() for i, j in info.pairs(3)]
        assert values.tolist() == pytest.approx(expected)


def test_median_rule_does_not_saturate_in_many_dimensions():
    x = features(5, 64, 512)
    off = ~torch.eye(64, dtype=torch.bool)
    assert (64 * info.gram(x)[off]).median().item() == pytest.approx(math.exp(-0.5), abs=1e-3)
    assert info.renyi_entropy(info.gram(x, "silverman")).item() == pytest.approx(6, abs=1e-6)


def test_silverman_is_the_rule_of_thumb():
    x = features(6, 50, 3)
    width = math.sqrt(x.var(0).mean().item()) * (4 / (5 * 50)) ** (1 / 7)
    assert torch.allclose(info.gram(x, "silverman"), info.gram(x, width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gram_is_normalised_in_every_precision(dtype):
    matrix = info.gram(features(7, 32, 8).to(dtype))
    assert matrix.dtype == torch.float32
    assert matrix.trace().item() == pytest.approx(1, abs=1e-6)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-6
    assert torch.allclose(matrix.double(), info.gram(features(7, 32, 8)), atol=1e-3)


def test_a_large_mean_costs_no_precision():
    x = (features(10, 32, 8) * 0.01 + 100).float()  # on the float32 grid, so that only the arithmetic differs
    for bandwidth in ("median", "silverman", 0.02):
        assert torch.allclose(info.gram(x, bandwidth).double(), info.gram(x.double(), bandwidth), rtol=1e-3, atol=0)


# Gradients


def test_gradients_of_tables():
    logits = features(0, 2, 3, 2, 4).requires_grad_()

    def tables(x):
        joint = x.flatten(1).softmax(-1).view_as(x)
        # An empty row of a class and an empty class: cells of exactly zero mass.
        joint = torch.nn.functional.pad(joint, (0, 0, 0, 1, 0, 1))
        flat = joint.flatten(1)
        return (
            info.entropy(flat),
            info.mutual_information(joint.sum(1)),
            info.conditional_mutual_information(joint),
        )

    assert gradcheck(tables, logits)
    assert torch.autograd.gradgradcheck(lambda x: tables(x)[2], logits)


def test_gradients_of_joints_with_zero_cells():
    hot = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 1, 1, 0, 2])]
    labels = torch.tensor([0, 1, 1, 0, 3])

    def terms(x):
        p = x.softmax(-1)
        members = torch.stack([p, p.flip(0), hot])
        return (
            info.mutual_information(info.pairwise_joints(members)),
            info.conditional_mutual_information(info.pairwise_class_joints(members, labels)),
        )

    assert gradcheck(terms, features(1, 5, 4).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_and_of_the_right_sign_at_zero(dtype):
    joint = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    information, total = info.mutual_information(joint), info.entropy(joint, dim=(0, 1))
    (slope,) = torch.autograd.grad(information, joint, create_graph=True)
    assert slope.isfinite().all()
    assert slope[0, 1] < 0  # mass that makes the variables disagree
    assert torch.autograd.grad(slope.square().sum(), joint)[0].isfinite().all()
    (slope,) = torch.autograd.grad(total, joint)
    assert slope.isfinite().all()
    assert slope[2, 2] > 0


def test_gradient_in_an_empty_row_is_the_one_sided_derivative():
    joint = torch.tensor([[0.3, 0.3], [0.1, 0.3], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(info.mutual_information(joint), joint)
    moved = joint.detach().clone()
    moved[2, 0] = 1e-7
    measured = (info.mutual_information(moved) - info.mutual_information(joint)) / 1e-7
    assert slope[2, 0].item() == pytest.approx(measured.item(), abs=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.01, 1.5, 2.0])
@pytest.mark.parametrize("bandwidth", ["silverman", 1.3])
def test_gradients_of_renyi_information(alpha, bandwidth):
    a, b = features(2, 6, 3).requires_grad_(), features(3, 6, 2).requires_grad_()
    assert gradcheck(lambda x, y: info.renyi_mutual_information(x, y, alpha, bandwidth), (a, b))


def test_gradient_of_the_median_rule_is_exact_where_the_rule_is_still():
    a, b = features(4, 7, 3).requires_grad_(), features(5, 7, 3)
    (slope,) = torch.autograd.grad(info.renyi_mutual_information(a, b), a)
    with torch.no_grad():
        distances = torch.pdist(a).square()
        ratio = distances.mean() / distances.median()

    def with_still_ratio(x):
        squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
        kernel = (-squared / squared.sum() * 42 * ratio / 2).exp() / 7
        return info.gram_mutual_information(kernel, info.gram(b))

    (expected,) = torch.autograd.grad(with_still_ratio(a), a)
    assert torch.allclose(slope, expected, atol=1e-10)


@pytest.mark.parametrize("bandwidth", ["median", "silverman"])
def test_gradient_has_no_part_along_the_scale(bandwidth):
    a, b = features(6, 20, 5).requires_grad_(), features(7, 20, 5)
    (slope,) = torch.autograd.grad(info.renyi_mutual_information(a, b, bandwidth=bandwidth), a)
    assert slope.abs().max() > 1e-4
    assert (slope * a).sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.01, 2.0])
@pytest.mark.parametrize("bandwidth", ["median", "silverman", 0.5])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_gradients_are_finite_at_identical_rows(alpha, bandwidth, scale):
    some = features(8, 12, 4).float().repeat_interleave(2, 0) * scale
    every = features(8, 1, 4).float().repeat(24, 1) * scale
    for start in (some, every):
        x = start.clone().requires_grad_()
        value = info.renyi_mutual_information(x, features(9, 24, 3).float(), alpha, bandwidth)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()


# Bad input


NAN = torch.tensor([[math.nan, 0.5], [0.25, 0.25]])
BAD_TABLES = {
    "negative": torch.tensor([[0.75, -0.25], [0.25, 0.25]]),
    "unnormalised": torch.tensor([[0.5, 0.5], [0.5, 0.5]]),
    "nan": NAN,
    "infinite": torch.tensor([[math.inf, 0.0], [0.0, 0.0]]),
    "integer": torch.tensor([[1, 0], [0, 0]]),
    "empty": torch.zeros(0, 0),
}


@pytest.mark.parametrize("table", list(BAD_TABLES.values()), ids=list(BAD_TABLES))
def test_bad_tables_are_refused(table):
    with pytest.raises(REJECTED):
        info.mutual_information(table)
    with pytest.raises(REJECTED):
        info.entropy(table, dim=(0, 1))
    with pytest.raises(REJECTED):
        info.conditional_mutual_information(table[None])


@pytest.mark.parametrize("rows", list(BAD_TABLES.values()), ids=list(BAD_TABLES))
def test_bad_predictions_are_refused(rows):
    rows = rows if rows.dtype != torch.float32 or rows.sum() != 2 else rows * 2
    labels = torch.zeros(len(rows), dtype=torch.int64)
    for call in (
        lambda: info.soft_joint(rows, rows),
        lambda: info.class_joint(rows, rows, labels, 2),
        lambda: info.pairwise_joints(torch.stack([rows, rows])),
        lambda: info.pairwise_class_joints(torch.stack([rows, rows]), labels),
    ):
        with pytest.raises(REJECTED):
            call()


def test_messages_say_what_came_and_what_to_do():
    with pytest.raises(InputError, match=r"mutual_information: expected probabilities.*sums from 2 to 2.*softmax"):
        info.mutual_information(BAD_TABLES["unnormalised"])
    with pytest.raises(InputError, match=r"minimum of -0.25"):
        info.mutual_information(BAD_TABLES["negative"])
    with pytest.raises(InputError, match=r"minimum of nan"):
        info.mutual_information(NAN)


def test_bad_shapes_are_refused():
    p, labels = predictions(0, 6, 3), torch.zeros(6, dtype=torch.int64)
    x = features(0, 6, 3)
    unknown: Any = "scott"
    for call in (
        lambda: info.mutual_information(p[0]),
        lambda: info.conditional_mutual_information(p),
        lambda: info.soft_joint(p, p[:5]),
        lambda: info.soft_joint(p[0], p[0]),
        lambda: info.class_joint(p, p[:5], labels, 3),
        lambda: info.class_joint(p, p, labels[:5], 3),
        lambda: info.class_joint(p, p, labels.float(), 3),
        lambda: info.class_joint(p, p, labels + 3, 3),
        lambda: info.class_joint(p, p, labels - 1, 3),
        lambda: info.pairwise_joints(p),
        lambda: info.pairwise_joints(p[None]),
        lambda: info.pairwise_class_joints(p[None], labels),
        lambda: info.pairs(0),
        lambda: info.moving(p, p[:5], 0.5),
        lambda: info.moving(p, p, 1.0),
        lambda: info.moving(None, p, math.nan),
        lambda: info.gram(x[0]),
        lambda: info.gram(x[:1]),
        lambda: info.gram(x.long()),
        lambda: info.gram(x * math.nan),
        lambda: info.gram(x, 0.0),
        lambda: info.gram(x, math.inf),
        lambda: info.gram(x, unknown),
        lambda: info.renyi_entropy(x),
        lambda: info.renyi_entropy(x.T @ x),
        lambda: info.renyi_entropy(info.gram(x), 0.0),
        lambda: info.renyi_entropy(info.gram(x), math.nan),
        lambda: info.renyi_entropy(info.gram(x) * math.nan),
        lambda: info.gram_mutual_information(info.gram(x), info.gram(x[:5])),
        lambda: info.renyi_mutual_information(x, x[:5]),
    ):
        with pytest.raises(REJECTED):
            call()


def test_bad_samples_and_counts_are_refused():
    codes = torch.arange(6)
    unknown: Any = "bootstrap"
    for call in (
        lambda: info.PlugIn(correction=unknown),
        lambda: info.PlugIn()(codes, codes[:5]),
        lambda: info.PlugIn()(codes[:0], codes[:0]),
        lambda: info.PlugIn()(codes.double(), codes),
        lambda: info.PlugIn()(codes.view(2, 3), codes.view(2, 3)),
        lambda: info.plug_in_bias(0, 2, 10),
        lambda: info.plug_in_bias(2, 2, 0),
        lambda: info.plug_in_bias(3, 3, 10, cells=10),
        lambda: info.plug_in_bias(3, 3, 10, cells=2),
        lambda: info.occupied_bias(torch.zeros(2, 2).int()),
        lambda: info.occupied_bias(codes),
        lambda: info.occupied_bias(torch.tensor([[1, -1], [2, 3]])),
        lambda: info.occupied_bias(torch.ones(2, 2)),
        lambda: info.Estimate(value=0.0, standard_error=-1.0, samples=3),
        lambda: info.Estimate(value=0.0, standard_error=0.0, samples=0),
    ):
        with pytest.raises(REJECTED):
            call()
