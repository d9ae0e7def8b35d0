"""Test that the ladder brings every broken defence down to its twin, and that the exhibits are what they say."""

from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from bitquorum.data import Batch, load
from bitquorum.evaluate import Report, evaluate_model, ladder_named
from bitquorum.interface import ConfigError
from bitquorum.museum import EPSILON, NAMES, Exhibit, Museum, exhibits, museum_rows, visit
from bitquorum.museum.exhibits import crossmax, pruning, rounding, stochastic_rounding, thermometer, vote, winners
from bitquorum.report import museum_table

pytestmark = pytest.mark.long
GRANTED = 0.02
RANDOM = ("stochastic-rounding", "additive-noise", "activation-pruning", "random-precision")


@pytest.fixture(scope="module")
def batch() -> Batch:
    test = load("digits", "test").take(200)
    return test.batch(torch.arange(200))


@pytest.fixture(scope="module")
def twins(batch: Batch) -> dict[str, float]:
    """Return the robust accuracy of every twin, each evaluated once."""
    found: dict[int, float] = {}
    left = {}
    for exhibit in exhibits():
        key = len(exhibit.twin.networks) + (10 if exhibit.name == "stochastic-rounding" else 0)
        if key not in found:
            found[key] = ladder(exhibit.twin, batch).climb.worst.value
        left[exhibit.name] = found[key]
    return left


def ladder(model: torch.nn.Module, batch: Batch, name: str = "standard", seed: int = 0) -> Report:
    chosen = replace(ladder_named(name), check_images=0, seed=seed)
    return evaluate_model(model, batch.images, batch.labels, epsilon=EPSILON, ladder=chosen)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "crossmax"])  # which needs `standard`: slow
def test_the_quick_ladder_brings_exhibits_down_to_their_twins(name: str, batch: Batch, twins: dict[str, float]):
    (exhibit,) = exhibits([name])
    report = ladder(exhibit.defended, batch, "quick")
    assert (report.climb.worst_of(5) < report.climb.worst.value) == (name in RANDOM)
    assert report.climb.clean.value > 0.9
    assert 0.2 < twins[name] < 0.5
    # Under noise the worst case has a standard deviation of half a point over seeds, and a CPU's rounding acts as
    # another one: one seed of `activation-pruning` lies at 39.6 %, where four have a mean of 39.1.
    again = [ladder(exhibit.defended, batch, "quick", seed) for seed in (1, 2)] if name in RANDOM else []
    assert mean(one.climb.worst.value for one in (report, *again)) <= twins[name] + GRANTED, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_so_does_the_standard_ladder(name: str, batch: Batch, twins: dict[str, float]):
    (exhibit,) = exhibits([name])
    assert ladder(exhibit.defended, batch).climb.worst.value <= twins[name] + GRANTED


def test_exhibits_are_defended_where_they_say_and_their_twins_are_not(batch: Batch):
    images = (0.9 * batch.images + 0.03).clamp(0, 1)  # off the steps of the digits
    for exhibit in exhibits():
        assert isinstance(exhibit, Exhibit)
        defended, twin = exhibit.defended(images), exhibit.twin(images)
        assert defended.shape == twin.shape == (200, 10)
        assert not torch.equal(defended, twin) or exhibit.name == "gradient-killer"
        assert exhibit.source


def test_operations_are_those_of_their_papers():
    x = torch.linspace(0, 1, 101)
    assert torch.equal(thermometer(4)(x).unique(), torch.tensor([0, 0.25, 0.5, 0.75, 1.0]))
    assert len(rounding(5)(x).unique()) == 5
    draws = torch.stack([stochastic_rounding(0.25)(x) for _ in range(4000)])
    assert set(draws.unique().tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert torch.allclose(draws.mean(0), x, atol=5 * 0.125 / 4000**0.5)
    units = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert torch.equal(winners(0.5)(units), torch.tensor([[0.0, 0.9, 0.0, 0.7]]))
    kept = torch.stack([pruning()(units) for _ in range(4000)])
    assert torch.allclose(kept.mean(0), units, atol=0.06), "pruning is unbiased"
    logits = torch.tensor([[[3.0, 0.0, 1.0]], [[0.0, 2.0, 1.0]], [[0.0, 2.0, 1.0]]])
    assert int(vote(logits).argmax()) == 1
    scores = torch.tensor([[0.0, -3.0, -2.0], [-2.0, 0.0, -1.0], [-2.0, 0.0, -1.0]])
    expected = (scores - scores.amax(0)).median(0).values
    assert torch.allclose(crossmax(logits)[0], expected)


def test_a_visit_is_stored_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = Museum(exhibits=("gradient-killer", "huge-logits"), images=20, ladder="quick")
    stored, rows = visit(plan, tmp_path)
    assert [(row["exhibit"], row["who"]) for row in rows] == [
        ("gradient-killer", "twin"),
        ("gradient-killer", "defended"),
        ("huge-logits", "twin"),
        ("huge-logits", "defended"),
    ]
    assert rows[1]["findings"] == ["zero-gradient"]
    assert rows == museum_rows(stored)
    (stored.path / "exhibits" / "huge-logits.jsonl").unlink()
    again = visit(plan, tmp_path)[1]
    drop = {"seconds", "seconds_with_checks"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in again] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows
    ]
    monkeypatch.setattr("bitquorum.museum.run.evaluate_model", None)
    assert visit(plan, tmp_path)[1] == again
    (stored.path / "metrics.jsonl").unlink()  # as after a kill before the last step
    assert visit(plan, tmp_path)[1] == again
    changed = replace(ladder_named("quick"), draws=7)
    monkeypatch.setattr("bitquorum.museum.run.ladder_named", lambda _: changed)
    with pytest.raises(TypeError, match="not callable"):
        visit(plan, tmp_path)  # by rungs that are others now: to be evaluated anew
    table = museum_table(again)
    assert [row[0] for row in table.rows] == ["gradient-killer", "huge-logits"]
    assert "20 digits at 0.125" in table.note


def test_unknown_exhibits_and_missing_peers_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"expected an exhibit among .*, got 'crosmax'; did you mean"):
        Museum(exhibits=("crosmax",))
    with pytest.raises(ConfigError, match="expected a peer among"):
        visit(Museum(also=("autoatack",)), tmp_path)
    assert not list(tmp_path.iterdir())
