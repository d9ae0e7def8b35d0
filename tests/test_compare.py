import math

import pytest
import torch
from torch import nn

from bitquorum.conversion import Policy
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import interval
from bitquorum.evaluate.compare import difference, holm
from bitquorum.evaluate.complexity import complexity
from bitquorum.interface import InputError
from bitquorum.quantizers import Deterministic


def test_difference_of_one_seed_is_the_paired_t_test():
    scipy = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(1, 30, generator=generator), torch.rand(1, 30, generator=generator)
    found = difference(ours, theirs)
    reference = scipy.ttest_rel(ours[0].double().numpy(), theirs[0].double().numpy())
    low, high = reference.confidence_interval()
    assert found.p == pytest.approx(reference.pvalue, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_difference_of_two_images_that_disagree_has_cauchy_intervals():
    found = difference(torch.tensor([[0.5, 0.3]]), torch.zeros(1, 2))  # one degree of freedom
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(0.4 / 0.1), abs=1e-6)
    assert found.low == pytest.approx(0.4 - 12.7062 * 0.1, abs=1e-4)
    assert found.high == 1.0


def test_seeds_that_disagree_widen_the_interval():
    steady = torch.full((3, 200), 0.4)
    steady[:, ::2] = 0.6
    restless = steady + torch.tensor([[-0.3], [0.0], [0.3]])
    zero = torch.zeros(3, 200)
    narrow, wide = difference(steady, zero), difference(restless, zero)
    assert narrow.value == pytest.approx(wide.value)
    assert narrow.high - narrow.low < 0.05
    assert wide.high - wide.low > 0.8
    assert narrow.p < 1e-6 < wide.p


def test_p_values_of_no_difference_are_uniform():
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(150):
        images = torch.randn(1, 40, generator=generator) * 0.2
        seeds = torch.randn(3, 1, generator=generator) * 0.05
        d = images + seeds + torch.randn(3, 40, generator=generator) * 0.2
        found.append(difference(d, torch.zeros(3, 40)).p)
    share = sum(p < 0.05 for p in found) / len(found)
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    assert share >= 0.01


def test_equal_rates_have_no_difference_and_equal_shifts_a_sure_one():
    rates = torch.rand(2, 10, generator=torch.Generator().manual_seed(2))
    assert difference(rates, rates).p == 1.0
    shifted = difference(torch.ones(1, 5), torch.zeros(1, 5))
    assert (shifted.value, shifted.high, shifted.p) == (1.0, 1.0, 2**-4), "by the sign test"
    assert shifted.low == pytest.approx(interval(torch.ones(1, 5)).low), "as sure as five right ones of five"
    same = difference(rates, rates)
    assert (same.low, same.high) == (pytest.approx(-0.278, abs=1e-3), pytest.approx(0.278, abs=1e-3))


def test_difference_refuses_a_single_image():
    with pytest.raises(InputError, match="expected rates of the same seeds and images, at least two"):
        difference(torch.zeros(2, 1), torch.zeros(2, 1))


def test_holm_never_falls_below_the_raw_value_and_keeps_order():
    raw = [0.2, 0.001, 0.04, 0.04]
    adjusted = holm(raw)
    assert adjusted == pytest.approx([0.2, 0.004, 0.12, 0.12])
    assert holm([]) == []


def _deterministic(weight_bits, activation_bits):
    return Policy(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_law=Deterministic(),
        activation_law=Deterministic(),
        learned=False,
        per_channel=False,
    )


def test_complexity_counts_by_hand():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4 * 4, 3, bias=False)
    )
    convolution, linear = 4 * 4 * 2 * 9, 32 * 3
    plain = complexity(Ensemble([network]), (1, 4, 4))
    assert plain.macs == convolution + linear
    assert plain.bit_operations == convolution * 32 * 8 + linear * 32 * 32
    assert plain.bytes == 4 * (18 + 96)
    low = complexity(Ensemble.build([network], [_deterministic(4, 2)]), (1, 4, 4))
    assert low.macs == plain.macs
    assert low.bit_operations == convolution * 4 * 8 + linear * 4 * 2
    quantizers = 3  # each holds a step and its logarithm
    assert low.bytes == (4 * (18 + 96) + 32 * 2 * quantizers) / 8


def test_complexity_adds_members_and_passes_and_counts_shared_weights_once():
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    one = complexity(Ensemble.build([network], [_deterministic(4, 4)]), (1, 2, 4))
    two = complexity(Ensemble.build([network] * 2, [_deterministic(4, 4)] * 2, passes=3), (1, 2, 4))
    assert two.macs == 6 * one.macs
    assert two.bit_operations == 6 * one.bit_operations
    assert two.bytes == 2 * one.bytes
    shared = Ensemble.build([network] * 2, [_deterministic(4, 4), _deterministic(2, 2)], shared=True)
    assert complexity(shared, (1, 2, 4)).bytes == one.bytes + 32 * 2 * 3 / 8  # the second member's own ranges
    mirrored = complexity(Ensemble.build([network], [_deterministic(4, 4)], mirrored=True).eval(), (1, 2, 4))
    assert (mirrored.macs, mirrored.bit_operations) == (2 * one.macs, 2 * one.bit_operations)
    assert mirrored.bytes == one.bytes
    often = complexity(Ensemble.build([network], [_deterministic(4, 4)], mirrored=True, shift=1).eval(), (1, 2, 4))
    assert (often.macs, often.bytes) == (4 * one.macs, one.bytes)
