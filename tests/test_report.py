"""Test that tables lay rows out as they are, without computing or inventing anything."""

import ast
import random
from pathlib import Path
from typing import Any

import pytest

import bitquorum
from bitquorum.report import (
    Table,
    bracket,
    comparison,
    environments,
    ladder_seconds,
    museum_table,
    peer_seconds,
    peer_table,
    rungs,
)
from bitquorum.report.tables import epsilon_label


def row(arm: str, attack: str, epsilon: float, value: float, **more: Any) -> dict[str, Any]:
    facts = {"members": "fp", "low": value - 0.1, "high": value + 0.1, "images": 200, "draws": 20}
    return {"arm": arm, "attack": attack, "epsilon": epsilon, "value": value} | facts | more


ROWS = [
    row("plain", "clean", 0.0, 0.9, low=0.85, high=0.9349),
    row("plain", "PGD-20", 8 / 255, 0.25),
    row("plain", "worst", 8 / 255, 0.2),
    row("plain", "PGD-20", 2 / 255, 0.5),
    row("plain", "worst", 2 / 255, 0.45),
    row("noisy", "clean", 0.0, 0.8, members="w4a4 w3a3"),
    row("noisy", "PGD-20", 2 / 255, 0.6, members="w4a4 w3a3"),
    row("noisy", "worst", 2 / 255, 0.55, members="w4a4 w3a3"),
]


def test_attacks_run_down_and_arms_side_by_side():
    table = comparison(ROWS)
    assert table.header == ("epsilon", "attack", "plain", "noisy")
    assert table.rows == (
        ("", "members", "fp", "w4a4 w3a3"),
        ("0", "clean", "90.0 [85, 93]", "80.0 [70, 90]"),
        ("2/255", "PGD-20", "50.0 [40, 60]", "60.0 [50, 70]"),
        ("2/255", "worst", "45.0 [35, 55]", "55.0 [45, 65]"),
        ("8/255", "PGD-20", "25.0 [15, 35]", "-"),
        ("8/255", "worst", "20.0 [10, 30]", "-"),
    )


def test_bounds_get_a_decimal_when_there_are_images_enough_for_it():
    (few,) = comparison([row("a", "clean", 0.0, 0.5, low=0.4567, high=0.5433, images=999)]).rows[1:]
    (many,) = comparison([row("a", "clean", 0.0, 0.5, low=0.4567, high=0.5433, images=1000)]).rows[1:]
    assert (few[2], many[2]) == ("50.0 [46, 54]", "50.0 [45.7, 54.3]")


def test_the_worst_case_closes_each_epsilon_whatever_the_order_of_the_rows():
    for seed in range(20):
        shuffled = random.Random(seed).sample(ROWS, len(ROWS))
        body = comparison(shuffled).rows[1:]
        assert [line[0] for line in body] == ["0", "2/255", "2/255", "8/255", "8/255"]
        assert [line[1] for line in body][2::2] == ["worst"] * 2


def test_columns_keep_the_order_in_which_the_arms_were_run():
    assert comparison(ROWS[::-1]).header[2:] == ("noisy", "plain")


def test_the_note_states_images_draws_and_intervals():
    note = comparison(ROWS).note
    assert "200 test images and 20 fresh draws" in note
    assert "95 % intervals" in note
    mixed = comparison([*ROWS, row("third", "clean", 0.0, 0.5, images=50, draws=1)]).note
    assert "50 or 200 test images and 1 or 20 fresh draws" in mixed


def test_rows_are_left_as_they_were():
    before = [dict(item) for item in ROWS]
    comparison(ROWS)
    assert before == ROWS


def test_markdown():
    table = Table(header=("a", "bc"), rows=(("1", "2 [3, 4]"), ("-", "")), note="unseen")
    assert table.markdown() == "| a | bc |\n|---|---|\n| 1 | 2 [3, 4] |\n| - |  |"
    assert comparison(ROWS).markdown().splitlines()[3] == "| 0 | clean | 90.0 [85, 93] | 80.0 [70, 90] |"


@pytest.mark.parametrize(
    ("epsilon", "label"),
    [
        (1 / 255, "1/255"),
        (8 / 255, "8/255"),
        (1.0, "255/255"),
        (0.1, "0.1"),
        (0.0314, "0.0314"),
        (0.5 / 255, "0.00196078"),
    ],
)
def test_epsilons_are_written_as_in_the_field(epsilon: float, label: str):
    assert epsilon_label(epsilon) == label


def session(seconds: float, model: str = "a CPU", devices: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "cpu": {"model": model},
        "cuda": {"devices": [{"name": name} for name in devices]},
        "threads": {"intra_op": 2},
        "versions": {"torch": "2.6", "bitquorum": "0.1.0"},
    }


def test_sessions_of_work_add_up():
    text = environments([session(30), session(60)])
    assert text == "1.5 minutes on a CPU, 2 threads, torch 2.6, bitquorum 0.1.0"
    assert environments([session(6, devices=("a GPU",))]).startswith("0.1 minutes on a GPU")
    assert environments([]) == "no work recorded"


def test_every_hardware_that_worked_is_named():
    assert environments([session(60, devices=("a GPU",)), session(60)]).startswith("2.0 minutes on a GPU and a CPU,")


def test_reports_import_nothing_that_computes():
    store = {f"bitquorum.{name}" for name in ("files", "interface", "registry", "report", "store", "toml")}
    names_of_classes, curve_of_the_plane = "bitquorum.data.sources", "bitquorum.information"
    paths = sorted((Path(bitquorum.__file__).parent / "report").rglob("*.py"))
    assert {path.name for path in paths} >= {"tables.py", "curves.py", "robustness.py"}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                package, *_ = name.split(".")
                assert package != "torch" or name == "torch.Tensor", path
                module = ".".join(name.split(".")[:2])
                allowed = module in store or name.startswith((names_of_classes, curve_of_the_plane))
                assert package != "bitquorum" or allowed, f"{path} imports {name}"


def step(arm: str, number: int, attack: str, value: float, **more: Any) -> dict[str, Any]:
    facts = {"name": "left", "step": number, "kind": "white-box", "attacked": 50, "broke": 3, "worst_by": 4}
    return row(arm, attack, 8 / 255, value, **facts, forward=1200, backward=600, **more)


LADDER = [
    row("plain", "clean", 0.0, 0.9, name="accuracy"),
    row("plain", "claim: PGD-20", 8 / 255, 0.5, name="accuracy"),
    row("plain", "worst", 8 / 255, 0.4, name="accuracy"),
    {
        key: value
        for key, value in row("plain", "worst", 8 / 255, 0.3, name="worst of 5 tries").items()
        if key[0] != "l"
    },
    step("plain", 0, "clean", 0.9),
    step("plain", 1, "PGD-20", 0.5, alone_value=0.5),
    step("plain", 2, "APGD-20 dlr", 0.4),
    row("noisy", "clean", 0.0, 0.8, name="accuracy"),
    row("noisy", "claim: EOT-PGD-20x10", 8 / 255, 0.6, name="accuracy"),
    row("noisy", "worst", 8 / 255, 0.55, name="accuracy"),
    row("noisy", "autoattack-rand 0.2", 8 / 255, 0.58, name="second opinion"),
]


def test_the_bracket_sets_the_claim_above_the_worst_case_for_every_arm():
    table = bracket(LADDER)
    assert table.header == ("epsilon", "accuracy", "plain", "noisy")
    assert table.rows == (
        ("", "members", "fp", "fp"),
        ("0", "clean", "90.0 [80, 100]", "80.0 [70, 90]"),
        ("8/255", "claim as worded (PGD-20, EOT-PGD-20x10)", "50.0 [40, 60]", "60.0 [50, 70]"),
        ("8/255", "worst case over the ladder", "40.0 [30, 50]", "55.0 [45, 65]"),
        ("8/255", "worst of 5 tries", "30.0", "-"),
        ("8/255", "autoattack-rand 0.2", "-", "58.0 [48, 68]"),
    )


def test_a_ladder_in_another_norm_names_it():
    rows = [item | {"norm": "l2", "epsilon": 0.5 if item["epsilon"] else 0.0} for item in LADDER]
    assert {line[0] for line in bracket(rows).rows} == {"", "0", "L2 0.5"}
    assert "plain at L2 0.5." in rungs(rows, "plain", 0.5).note
    assert "plain at 8/255." in rungs(LADDER, "plain", 8 / 255).note


def test_rungs_show_what_each_met_broke_and_left():
    table = rungs(LADDER, "plain", 8 / 255)
    assert table.rows[1] == ("PGD-20", "white-box", "50", "3", "4", "50.0", "50.0 [40, 60]", "1,200 + 600")
    assert table.rows[2][5] == "-"


MUSEUM = [
    {"exhibit": "x", "who": "twin", "by": "ladder quick", "value": 0.3, "images": 200, "epsilon": 0.125},
    {
        "exhibit": "x",
        "who": "defended",
        "by": "ladder quick",
        "value": 0.33,
        "images": 200,
        "epsilon": 0.125,
        "clean": 0.9,
        "claim": 0.5,
        "failed_checks": ["effort", "gradients"],
    },
]
PEER = {"exhibit": "x", "who": "defended", "version": "1.2"}


def test_the_museum_says_where_the_twin_is_not_reached():
    assert museum_table(MUSEUM).rows == (("x", "90.0", "50.0", "30.0", "33.0", "NOT reached", "effort, gradients"),)
    near = [MUSEUM[0], MUSEUM[1] | {"value": 0.32, "failed_checks": []}]
    assert museum_table(near).rows[0][-2:] == ("reached", "none")
    assert peer_table(MUSEUM) is None


def test_peers_are_shown_with_what_they_say_themselves():
    opinions = [
        PEER | {"by": "rand", "value": 0.5, "claimed": 0.4},
        PEER | {"by": "pgd", "value": 0.6, "claimed": None},
        PEER | {"by": "ce", "value": None, "claimed": None},
    ]
    table = peer_table(MUSEUM + opinions)
    assert table is not None
    assert table.header == ("exhibit", "ladder quick", "rand", "pgd", "ce")
    assert table.rows == (("x", "33.0", "50.0 (says 40.0)", "60.0", "fails"),)
    assert "rand 1.2, pgd 1.2, ce 1.2" in table.note


def test_what_peers_took_is_a_multiple_of_what_the_ladder_took():
    museum = [entry | {"seconds": 2.0} for entry in MUSEUM]
    opinions = [
        PEER | {"by": "rand", "value": 0.5, "claimed": 0.4, "seconds": 7.0},
        PEER | {"by": "ce", "value": None, "claimed": None, "seconds": 0.1},
    ]
    table = peer_seconds(museum + opinions)
    assert table is not None
    assert table.header == ("exhibit", "ladder quick", "rand", "ce")
    assert table.rows == (("x", "2.0", "7.0 (3.5)", "fails"),)
    assert peer_seconds(museum) is None
    at_once = peer_seconds([entry | {"seconds": 0.0} for entry in MUSEUM] + opinions)
    assert at_once is not None
    assert at_once.rows == (("x", "0.0", "7.0", "fails"),)


def test_seconds_of_a_ladder_beside_those_of_peers():
    timed = [
        {"arm": "plain", "epsilon": 0.1, "rung": "PGD", "seconds": 1.5},
        {"arm": "plain", "epsilon": 0.1, "rung": "FGSM", "seconds": 0.5},
        {"arm": "plain", "epsilon": 0.1, "peer": "rand 1", "seconds": 9.0},
        {"arm": "plain", "epsilon": 0.1, "peer": "rand 1", "seconds": 8.0},  # asked again after a kill
        {"arm": "noisy", "epsilon": 0.1, "rung": "PGD", "seconds": 4.0},
        {"arm": "twice", "epsilon": 0.1, "rung": "PGD", "seconds": 1.0},
        {"arm": "twice", "epsilon": 0.2, "rung": "PGD", "seconds": 1.0},
        {"arm": "twice", "epsilon": 0.1, "peer": "rand 1", "seconds": 3.0},
        {"arm": "twice", "epsilon": 0.2, "peer": "rand 1", "seconds": 5.0},
    ]
    assert ladder_seconds([row for row in timed if "rung" in row]) is None

    def rows(given: list[dict[str, Any]]) -> tuple[tuple[str, ...], ...]:
        table = ladder_seconds(given)
        assert table is not None
        return table.rows

    table = ladder_seconds(timed)
    assert table is not None
    assert table.header == ("arm", "ladder", "rand 1", "ladder until as low")
    assert table.rows[:2] == (("plain", "2.0", "8.0 (4.0)", "-"), ("noisy", "4.0", "-", "-"))
    assert table.rows[2:] == (("twice", "2.0", "8.0 (4.0)", "-"),)
    metrics = [
        {"arm": arm, "epsilon": epsilon, "name": name, "attack": attack, "value": value}
        for arm, epsilon, name, attack, value in (
            ("plain", 0.1, "left", "clean", 0.9),
            ("plain", 0.1, "left", "PGD", 0.4),
            ("plain", 0.1, "left", "FGSM", 0.3),
            ("plain", 0.1, "second opinion", "rand 1", 0.4),
            ("twice", 0.1, "left", "PGD", 0.2),
            ("twice", 0.1, "second opinion", "rand 1", 0.2),
            ("twice", 0.2, "left", "PGD", 0.2),
            ("twice", 0.2, "second opinion", "rand 1", 0.1),
        )
    ]
    assert [row[3] for row in rows(timed + metrics)] == ["1.5 (5.3)", "-", "-"]
    metrics[-1]["value"] = 0.2
    assert [row[3] for row in rows(metrics + timed)] == ["1.5 (5.3)", "-", "2.0 (4.0)"]
    for entry in timed:  # networks so tiny that a rung takes no tenth of a second
        entry["seconds"] = 0.0
    assert [row[2:] for row in rows(metrics + timed)] == [("0.0", "0.0"), ("-", "-"), ("0.0", "0.0")]
