"""Test that a stored run is certified arm by arm, resumes, and is printed beside what attacks left."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bitquorum import cli, experiment
from bitquorum.certify import Certify
from bitquorum.config import Experiment, parse
from bitquorum.experiment import certify as module
from bitquorum.files import load_tensors, read_jsonl, save_tensors
from bitquorum.interface import ConfigError, DataError, Listener
from bitquorum.report import certificate_table
from bitquorum.store import Run

pytestmark = pytest.mark.long

TABLE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": 300},
    "trainer": {"epochs": 4, "batch_size": 20, "lr": 0.05, "calibration": 10},
    "evaluation": {
        "epsilons": ["4/255", "24/255"],
        "examples": 40,
        "draws": 4,
        "attacks": [{"type": "pgd", "steps": 4, "eot": 2}],
    },
    "arms": [
        {"name": "plain", "network": {"type": "linear"}},
        {
            "name": "sq",
            "network": {"type": "linear"},
            "members": [{"weight_bits": 4, "activation_bits": 2}, {"weight_bits": 8, "activation_bits": 4}],
            "objective": {"terms": [{"type": "interval-bound", "epsilon": "8/255"}]},
        },
    ],
}
CERTIFY = Certify(epsilons=(4 / 255, 24 / 255), examples=40, draws=4)


class StopError(Exception):
    """End the work in the middle."""


class StopAt(Listener):
    def __init__(self, count: int) -> None:
        self.count = count

    def advance(self, done: int, note: str = "") -> None:
        self.count -= 1
        if self.count == 0:
            raise StopError


@pytest.fixture(scope="module")
def config() -> Experiment:
    return parse(TABLE)


@pytest.fixture(scope="module")
def run(config: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return experiment.run(config, tmp_path_factory.mktemp("certify"))


@pytest.fixture(scope="module")
def rows(run: Run) -> list[dict[str, Any]]:
    return experiment.certify_run(run, CERTIFY)


def test_the_floor_lies_below_the_ceiling(run: Run, rows: list[dict[str, Any]]):
    found = {(row["arm"], row["statement"], row["epsilon"]): row for row in rows}
    assert len(found) == len(rows) == (1 + 2) + (1 + 4), "an arm without noise has one statement"
    rows_of_attacks = [row for row in experiment.ceilings(run) if row["attack"] == "worst"]
    ceilings = [row for row in rows_of_attacks if row["epsilon"] in CERTIFY.epsilons]
    assert [(row["arm"], row["ceiling"]) for row in ceilings] == [
        (arm, "evaluation") for arm in ("plain",) * 2 + ("sq",) * 2
    ]
    for row in ceilings:
        assert row["images"] == 40
        statement = "all" if row["arm"] == "plain" else "fresh"
        floor = found[row["arm"], statement, row["epsilon"]]
        assert floor["value"] <= row["value"] + 0.1 * (row["arm"] == "sq"), "other draws judge the attack"
        assert floor["value"] <= found[row["arm"], "clean", 0.0]["value"]
    assert found["plain", "all", 4 / 255]["value"] > 0.3
    assert found["sq", "fresh", 4 / 255]["value"] > 0.3
    exact = next(row for row in ceilings if row["arm"] == "plain")
    assert found["plain", "all", 4 / 255]["value"] == pytest.approx(exact["value"], abs=0.03), (
        "tight for a linear model"
    )


def test_flags_are_kept_with_their_images(run: Run, rows: list[dict[str, Any]]):
    folder = module.certificate_folder(run, CERTIFY)
    tensors, facts = load_tensors(folder / "sq" / "fresh@0.015686.safetensors")
    assert tensors["certified"].shape == (4, 40)
    assert tensors["examples"].shape == tensors["labels"].shape == (40,)
    assert facts["statement"] == "fresh"
    assert float(tensors["certified"].float().mean()) == pytest.approx(
        next(row["value"] for row in rows if row["arm"] == "sq" and row["statement"] == "fresh")
    )
    assert read_jsonl(folder / "metrics.jsonl") == rows


def test_a_certification_that_is_cut_ends_in_the_same_bytes_and_is_not_repeated(
    run: Run, rows: list[dict[str, Any]], config: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copied = experiment.create(config, tmp_path)
    for path in run.path.glob("arms/*/weights.safetensors"):
        save_tensors(copied.path / path.relative_to(run.path), load_tensors(path)[0])
    with pytest.raises(StopError):
        experiment.certify_run(copied, CERTIFY, listener=StopAt(5))
    assert experiment.certify_run(copied, CERTIFY) == rows
    for stored in (run, copied):
        assert (module.certificate_folder(stored, CERTIFY) / "certify.toml").exists()
    monkeypatch.setattr(module, "restored", lambda *_, **__: pytest.fail("computed again"))
    assert experiment.certify_run(copied, CERTIFY) == rows
    path = module.certificate_folder(copied, CERTIFY) / "sq" / "clean@0.000000.safetensors"
    save_tensors(path, {"other": torch.zeros(1)})
    with pytest.raises(DataError, match="expected a certificate at"):
        module.read_certificate(path)


def test_the_table_has_a_line_for_each_statement_and_ceiling(run: Run, rows: list[dict[str, Any]]):
    table = certificate_table(rows, experiment.ceilings(run))
    assert table.header == ("epsilon", "accuracy", "plain", "sq")
    assert [row[:2] for row in table.rows] == [
        ("", "members"),
        ("0", "clean"),
        *(
            (epsilon, text)
            for epsilon in ("4/255", "24/255")
            for text in (
                "certified, every draw",
                "certified, fresh draws",
                "attacked, worst of the evaluation (40 images)",
            )
        ),
    ]
    assert table.rows[3][2] == "-"
    assert "40 test images by crown-ibp" in table.note


def test_the_command_prints_the_table(run: Run):
    arguments = ["certify", str(run.path), "--epsilon", "4/255", "--device", "cpu"]
    arguments += ["--set", "examples=20", "--set", "draws=2", "--set", "bound=ibp"]
    result = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(cli.app, arguments, catch_exceptions=False)
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e\n]", "", result.output).split())
    assert result.exit_code == 0
    assert "4/255 certified,every draw" in text
    assert "attacked,worst of the" in text
    assert "20 test images by ibp" in text
    shown = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(cli.app, ["show", str(run.path)])
    assert "20 test images by ibp" in " ".join(shown.output.split())
    markdown = CliRunner().invoke(cli.app, ["show", str(run.path), "--markdown"]).output
    assert "| 4/255 | certified, every draw |" in markdown
    assert "20 test images by ibp" in markdown
    assert experiment.attacked_epsilons(run) == [4 / 255, 24 / 255]


def test_the_command_takes_decimal_radii_and_names_what_is_none(run: Run):
    arguments = ["certify", str(run.path), "--device", "cpu", "--set", "examples=20", "--set", "bound=ibp"]
    result = CliRunner().invoke(cli.app, [*arguments, "--epsilon", "0.01"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "0.01" in result.output
    with pytest.raises(ConfigError, match="got 'wide'"):
        CliRunner().invoke(cli.app, [*arguments, "--epsilon", "wide"], catch_exceptions=False)


@pytest.mark.usefixtures("rows")
def test_a_cut_config_of_a_certification_is_named(run: Run, tmp_path: Path):
    copy = Run(path=tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    for path in copy.path.glob("certificates/*/certify.toml"):
        path.write_text("epsilons = [0.1,")
    with pytest.raises(DataError, match=r"expected a TOML file at .*certify\.toml"):
        experiment.certificates(copy)
