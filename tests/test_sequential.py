"""Test the sequential test: its errors against the bound, its draws against a straight computation."""

import math

import pytest
import torch
from torch import Tensor

from bitquorum.evaluate.sequential import SequentialTest
from bitquorum.interface import InputError


def outcomes(probability: float, draws: int, images: int, seed: int = 0) -> Tensor:
    return torch.rand(draws, images, generator=torch.Generator().manual_seed(seed)) < probability


def run(test: SequentialTest, table: Tensor, block: int = 8):
    return test(lambda chosen, first, count: table[first : first + count, chosen], table.shape[1], block=block)


@pytest.mark.parametrize(
    ("probability", "low", "high"), [(0.0, 1, 1), (0.03, 0.735, 0.76), (0.15, 0, 0.0102), (0.6, 0, 0)]
)
def test_errors_keep_walds_bound(probability: float, low: float, high: float):
    images = 20_000
    broken = float(run(SequentialTest(), outcomes(probability, 64, images)).broken.float().mean())
    error = 4 * math.sqrt(0.01 / images)
    assert low - error <= broken <= high + error


def test_an_undecided_image_is_taken_to_stand():
    test = SequentialTest(most=20)
    assert not run(test, torch.zeros(20, 3, dtype=torch.bool)).broken.any()  # 20 wrong ones are not enough
    assert run(SequentialTest(), torch.zeros(64, 3, dtype=torch.bool)).broken.all()


def test_stops_at_the_draw_that_decides():
    test = SequentialTest(least=5)
    table = torch.zeros(64, 2, dtype=torch.bool)
    table[:, 1] = True
    tally = run(test, table, block=1)
    bound, loss = math.log(99), math.log(0.97 / 0.85)
    assert tally.draws.tolist() == [math.ceil(bound / loss), 5]
    assert tally.right.tolist() == [0, 5]
    assert tally.broken.tolist() == [True, False]


def test_the_block_changes_no_verdict_and_no_count():
    table = outcomes(0.1, 64, 300)
    one, many = run(SequentialTest(), table, block=1), run(SequentialTest(), table, block=16)
    assert torch.equal(one.broken, many.broken)
    assert torch.equal(one.draws, many.draws)
    assert torch.equal(one.right, many.right)


def test_asks_only_for_images_that_are_open():
    asked: list[int] = []
    table = torch.ones(64, 4, dtype=torch.bool)
    table[:, 3] = False

    def predict(chosen: Tensor, first: int, count: int) -> Tensor:
        asked.append(len(chosen))
        return table[first : first + count, chosen]

    SequentialTest()(predict, 4, block=8)
    assert asked == [4, 4, 1, 1, 1]


def test_the_rate_is_laplaces():
    tally = run(SequentialTest(least=16), torch.ones(64, 1, dtype=torch.bool))
    assert tally.rate.tolist() == pytest.approx([17 / 18])


@pytest.mark.parametrize(
    "wrong", [{"broken": 0.3}, {"standing": 1.0}, {"error": 0.5}, {"least": 0}, {"least": 70}, {"broken": 0.0}]
)
def test_refuses_what_decides_nothing(wrong: dict[str, float]):
    with pytest.raises(InputError, match="expected"):
        SequentialTest(**wrong)  # type: ignore[arg-type]
