"""Test that arms of a run are compared image by image, on the same numbers, and that the rows are kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitquorum.config import parse
from bitquorum.evaluate import Ladder
from bitquorum.evaluate.compare import difference
from bitquorum.evaluate.presets import quick
from bitquorum.experiment import compare_run, create, differences, publish_run
from bitquorum.experiment.ladder import ladder_folder
from bitquorum.experiment.runs import evaluation_folder, experiment_of
from bitquorum.files import save_tensors, write_jsonl
from bitquorum.interface import DataError
from bitquorum.registry import encode, to_toml
from bitquorum.report import difference_table
from bitquorum.store import Run

TABLE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": 60},
    "trainer": {"epochs": 1},
    "evaluation": {"epsilons": ["5/255"], "examples": 40, "draws": 4, "attacks": [{"type": "fgsm"}, {"type": "pgd"}]},
    "arms": [{"name": name, "network": {"type": "linear"}} for name in ("base", "better", "twin")],
}
RIGHT = {"base": 0.4, "better": 0.9, "twin": 0.4}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create(parse(TABLE), tmp_path)


def answers(arm: str, attack: str) -> Tensor:
    """Return which draws of which images are right; `twin` answers as `base` does."""
    seed = 2 * (arm == "better") + (attack == "PGD")
    return torch.rand(4, 40, generator=torch.Generator().manual_seed(seed)) < RIGHT[arm]


def evaluate(run: Run, *, arms: tuple[str, ...] = ("base", "better", "twin"), complete: bool = True) -> Path:
    folder = evaluation_folder(run, experiment_of(run).evaluation)
    for arm in arms:
        for attack, epsilon in (("clean", 0.0), ("FGSM", 5 / 255), ("PGD", 5 / 255)):
            facts = {"attack": attack, "epsilon": repr(epsilon), "forward": "1", "backward": "1", "largest": "0.01"}
            save_tensors(
                folder / arm / f"{attack}.safetensors", {"correct": answers(arm, attack).to(torch.uint8)}, facts
            )
    if complete:
        write_jsonl(folder / "metrics.jsonl", [{"arm": arm} for arm in arms])
    return folder


def climb(run: Run, ladder: Ladder, arm: str, *, done: bool = True) -> None:
    folder = ladder_folder(run, ladder)
    (folder / arm).mkdir(parents=True)
    (folder / "ladder.toml").write_text(to_toml(encode(ladder)))
    flags = {name: answers(arm, name).to(torch.uint8) for name in ("correct", "claim")}
    whole = {name: torch.zeros(40, dtype=torch.int64) for name in ("broken_by", "examples")}
    state = whole | {name: torch.zeros(40) for name in ("images", "rate", "standing")}
    save_tensors(folder / arm / "climb@0.019608.safetensors", flags | state, {"epsilon": repr(5 / 255), "steps": "[]"})
    if done:
        write_jsonl(folder / arm / "verdicts.jsonl", [])


def test_every_number_of_an_evaluation_is_compared_to_the_first_arm(run: Run):
    folder = evaluate(run)
    (rows,) = compare_run(run)
    assert {(row["attack"], row["epsilon"]) for row in rows} == {
        ("clean", 0.0),
        *((attack, 5 / 255) for attack in ("FGSM", "PGD", "worst")),
    }
    assert {(row["arm"], row["reference"], row["images"]) for row in rows} == {
        ("better", "base", 40),
        ("twin", "base", 40),
    }
    found = {(row["arm"], row["attack"]): row for row in rows}
    pair = [answers(arm, "PGD").float().mean(0)[None] for arm in ("better", "base")]
    expected = difference(*pair)
    row = found["better", "PGD"]
    assert (row["value"], row["low"], row["high"], row["p"]) == (
        expected.value,
        expected.low,
        expected.high,
        expected.p,
    )
    assert row["adjusted_p"] == min(1.0, 2 * expected.p), "two arms are compared, and this is the smaller p"
    worst = [
        torch.stack([answers(arm, attack).float().mean(0) for attack in ("FGSM", "PGD")]).amin(0)
        for arm in ("better", "base")
    ]
    assert found["better", "worst"]["value"] == pytest.approx(float((worst[0] - worst[1]).mean()), abs=1e-6)
    assert found["twin", "PGD"]["value"] == 0.0
    assert found["twin", "PGD"]["p"] == 1.0
    assert (folder / "differences.jsonl").exists()


def test_rows_of_another_reference_are_kept_and_those_of_the_same_replaced(run: Run):
    evaluate(run)
    (first,) = compare_run(run)
    (second,) = compare_run(run, reference="twin")
    compare_run(run)
    (stored,) = differences(run)
    assert sorted(stored, key=str) == sorted([*first, *second], key=str)
    assert {row["reference"] for row in second} == {"twin"}
    opposite = {row["attack"]: row["value"] for row in second if row["arm"] == "better"}
    assert opposite == {row["attack"]: row["value"] for row in first if row["arm"] == "better"}


def test_a_ladder_is_compared_where_both_arms_are_climbed_to_the_end(run: Run):
    ladder = quick()
    climb(run, ladder, "base")
    climb(run, ladder, "better")
    climb(run, ladder, "twin", done=False)
    (rows,) = compare_run(run)
    assert [(row["arm"], row["attack"], row["epsilon"]) for row in rows] == [
        ("better", "claim", 5 / 255),
        ("better", "worst", 5 / 255),
    ]


def test_a_ladder_in_another_norm_names_it(run: Run):
    ladder = replace(quick(), norm="l2")
    for arm in ("base", "better"):
        climb(run, ladder, arm)
    (rows,) = compare_run(run)
    assert {row["norm"] for row in rows} == {"l2"}
    assert difference_table(rows).header[2:] == ("claim L2 0.0196078", "worst L2 0.0196078")


def test_a_table_has_a_line_for_each_pair_and_a_column_for_each_number(run: Run):
    evaluate(run)
    table = difference_table(compare_run(run)[0])
    assert table.header[:3] == ("arm", "minus", "clean")
    assert table.header[-1] == "worst 5/255"
    assert [row[:2] for row in table.rows] == [("better", "base"), ("twin", "base")]
    assert table.rows[0][-1].endswith("*")
    assert table.rows[0][-1].startswith("+")
    assert table.rows[1][-1] == "+0.0 [-9, +9]"
    assert "40 test images" in table.note


def test_an_interrupted_evaluation_is_not_compared(run: Run):
    evaluate(run, complete=False)
    with pytest.raises(DataError, match="expected an evaluation or a ladder of 'base' and of another arm"):
        compare_run(run)


def test_an_unknown_arm_is_refused(run: Run):
    evaluate(run)
    with pytest.raises(DataError, match="expected an arm among base, better, twin, got 'best'"):
        compare_run(run, reference="best")


def test_a_single_arm_has_nothing_to_be_compared_to(run: Run):
    evaluate(run, arms=("base",))
    with pytest.raises(DataError, match="of another arm"):
        compare_run(run)


@pytest.fixture
def later(tmp_path: Path) -> Run:
    """Return a run of another seed, of which one arm answers as `better` does."""
    return create(parse({**TABLE, "name": "later", "seed": 1}), tmp_path)


def test_an_arm_is_compared_to_one_of_another_run_as_to_one_of_its_own(run: Run, later: Run):
    evaluate(run)
    evaluate(later)
    climb(run, quick(), "base")
    climb(later, quick(), "better")
    within, *_ = compare_run(run)
    evaluated, climbed = compare_run(later, reference="base", other=run)
    name = f"base of {run.path.name}"
    assert {(row["arm"], row["reference"]) for row in evaluated} == {(arm, name) for arm in ("base", "better", "twin")}
    for row in within:
        (same,) = (r for r in evaluated if (r["arm"], r["attack"]) == (row["arm"], row["attack"]))
        assert {**same, "reference": "base", "adjusted_p": 0} == {**row, "adjusted_p": 0}
    assert [(row["arm"], row["attack"]) for row in climbed] == [("better", "claim"), ("better", "worst")]
    assert differences(later) == [evaluated, climbed]
    assert differences(run) == [within], "the other run is only read"


def test_a_published_run_is_compared_as_the_run_itself(run: Run, later: Run, tmp_path: Path):
    evaluate(run)
    evaluate(later)
    climb(run, quick(), "base")
    climb(later, quick(), "better")
    publish_run(run, tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*.safetensors"))
    assert not list(run.path.rglob("outcomes.jsonl")), "the run itself is only read"
    expected = compare_run(later, other=run)
    found = compare_run(later, other=Run.open(tmp_path / "results"))
    for rows, others in zip(found, expected, strict=True):
        assert rows == [{**row, "reference": "base of results"} for row in others]
    publish_run(Run.open(tmp_path / "results"), tmp_path / "again")
    assert compare_run(Run.open(tmp_path / "again")) == compare_run(run)


def test_runs_of_other_settings_or_data_are_not_compared(run: Run, later: Run, tmp_path: Path):
    evaluate(run)
    with pytest.raises(DataError, match=r"an evaluation or a ladder that .* holds of 'base' .* with the same settings"):
        compare_run(later, other=run)
    climb(run, quick(), "base")
    climb(later, replace(quick(), examples=30), "base")
    with pytest.raises(DataError, match="with the same settings"):
        compare_run(later, other=run)
    elsewhere = create(parse({**TABLE, "data": {"name": "cifar10"}}), tmp_path)
    evaluate(elsewhere)
    with pytest.raises(DataError, match="expected two runs of one data set, got 'cifar10' and 'digits'"):
        compare_run(elsewhere, other=run)


def test_corrupt_outcomes_are_one_message(run: Run, later: Run, tmp_path: Path):
    evaluate(run)
    evaluate(later)
    publish_run(run, tmp_path / "results")
    (path,) = (tmp_path / "results").rglob("outcomes.jsonl")
    row = {"arm": "base", "attack": "PGD", "epsilon": 0.1, "draws": 4}
    write_jsonl(path, [row])
    with pytest.raises(DataError, match=r"how many draws of each image are right at .*, got: 'right'; restore"):
        compare_run(later, other=Run.open(tmp_path / "results"))
    for right in ([1, 5], [1, -1], [[1, 2]], [1, [2]], ["1"], "1", 3, None, [None]):
        write_jsonl(path, [{**row, "right": right}])
        with pytest.raises(DataError, match=r"how many draws of each image are right at .*; restore"):
            compare_run(later, other=Run.open(tmp_path / "results"))
