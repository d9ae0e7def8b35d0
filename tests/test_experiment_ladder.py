"""Test that the ladder of a stored run is kept whole, resumes to the same end and states what was judged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitquorum import peers, rng
from bitquorum.attacks import FGSM, PGD, Attack, RandomNoise, Transfer
from bitquorum.config import Experiment, parse
from bitquorum.evaluate import Climb, Ladder, SequentialTest
from bitquorum.evaluate.climbs import read_climb
from bitquorum.evaluate.selfchecks import CHECKS
from bitquorum.experiment import (
    climb_run,
    create,
    ladder_rows,
    ladder_times,
    ladders,
    restore_ensemble,
    train,
    usual_epsilons,
    verdicts,
)
from bitquorum.experiment import ladder as module
from bitquorum.files import load_tensors, read_jsonl, save_tensors
from bitquorum.interface import ConfigError, DataError, Listener
from bitquorum.report import bracket, ladder_seconds, rungs
from bitquorum.store import Run

pytestmark = pytest.mark.long

TABLE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": 60},
    "trainer": {"epochs": 1, "batch_size": 20, "lr": 0.05, "calibration": 10},
    "evaluation": {
        "epsilons": ["4/255", "16/255", "32/255"],
        "examples": 10,
        "draws": 2,
        "attacks": [{"type": "fgsm"}],
    },
    "arms": [
        {"name": "plain", "network": {"type": "linear"}},
        {
            "name": "sq",
            "network": {"type": "digitsnet", "width": 4},
            "members": [{"weight_bits": 4, "activation_bits": 2}, {"weight_bits": 2, "activation_bits": 4}],
        },
    ],
}
LADDER = Ladder(
    name="tiny",
    claim=PGD(steps=3, eot=2),
    rungs=(FGSM(), Transfer(source="mean", attack=FGSM()), Transfer(source="*", attack=FGSM()), RandomNoise(tries=2)),
    epsilons=(16 / 255, 32 / 255),
    examples=20,
    draws=6,
    check_images=0,
    survivors=SequentialTest(least=4, most=8),
)


class StopError(Exception):
    """End the work in the middle."""


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return parse(TABLE)


@pytest.fixture(scope="module")
def trained(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(experiment, tmp_path_factory.mktemp("ladder"))


@pytest.fixture(scope="module")
def climbed(trained: Run) -> Run:
    climb_run(trained, LADDER)
    return trained


@pytest.fixture
def copied(climbed: Run, tmp_path: Path) -> Run:
    return Run(path=Path(shutil.copytree(climbed.path, tmp_path / climbed.path.name)))


def states(stored: Run) -> dict[str, dict[str, torch.Tensor]]:
    found = sorted(stored.path.glob("ladders/*/*/climb@*.safetensors"))
    return {f"{path.parent.name}/{path.name}": load_tensors(path)[0] for path in found}


def test_a_ladder_is_stored_with_steps_outcomes_images_and_verdicts(climbed: Run):
    (folder,) = climbed.path.glob("ladders/*")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    files = ("climb@0.062745.safetensors", "climb@0.125490.safetensors", "seconds.jsonl", "verdicts.jsonl")
    assert names == {"ladder.toml", "metrics.jsonl", *(f"{arm}/{file}" for arm in ("plain", "sq") for file in files)}
    assert ladders(climbed) == [LADDER]
    tensors, facts = load_tensors(folder / "sq" / "climb@0.125490.safetensors")
    assert tensors["images"].shape == (20, 1, 8, 8)
    assert tensors["correct"].shape == (6, 20)
    assert [step["rung"] for step in json.loads(facts["steps"])][:3] == ["clean", "EOT-PGD-3x2", "FGSM"]


def test_rows_state_the_bracket_and_every_rung(climbed: Run):
    rows = ladder_rows(climbed, LADDER)
    sq = [row for row in rows if row["arm"] == "sq" and row["epsilon"] == 32 / 255]
    (worst,) = (row for row in sq if row["attack"] == "worst" and row["name"] == "accuracy")
    (claim,) = (row for row in sq if row["attack"] == "claim: EOT-PGD-3x2")
    (tries,) = (row for row in sq if row["name"] == "worst of 5 tries")
    steps = [row for row in sq if row["name"] == "left"]
    assert [row["attack"] for row in steps] == [
        "clean",
        "EOT-PGD-3x2",
        "FGSM",
        "from mean: FGSM",
        "from plain: FGSM",
        "random noise 2x8",
    ]
    assert (worst["images"], worst["draws"], worst["members"]) == (20, 6, "w4a2 w2a4")
    assert worst["value"] == steps[-1]["value"]
    assert tries["value"] <= worst["value"] <= claim["value"] + 0.1
    assert sum(row["worst_by"] for row in steps) == 20
    assert steps[1]["forward"] == 6
    assert (steps[3]["kind"], steps[5]["kind"]) == ("transfer", "gradient-free")


def test_the_stored_images_are_judged_as_stored(climbed: Run, experiment: Experiment):
    arm = experiment.arms[1]
    model = restore_ensemble(experiment, arm, climbed).eval()
    (path,) = climbed.path.glob("ladders/*/sq/climb@0.125490.safetensors")
    tensors, _ = load_tensors(path)
    seeds = [rng.derive(rng.derive(LADDER.seed, "judge"), "draw", draw, 0) for draw in range(LADDER.draws)]
    with torch.no_grad(), rng.draw(seeds, tensors["examples"]):
        again = model.predict(model(tensors["images"])) == tensors["labels"]
    assert torch.equal(again, tensors["correct"].bool())


def test_again_computes_nothing(copied: Run, monkeypatch: pytest.MonkeyPatch):
    before = {path: path.read_bytes() for path in copied.path.rglob("*") if path.is_file()}
    monkeypatch.setattr(Attack, "__call__", None)
    monkeypatch.setattr(module, "load", None)
    assert climb_run(copied, LADDER) == ladder_rows(copied, LADDER)
    assert {path: path.read_bytes() for path in copied.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("at", [3, 13])
def test_interrupted_work_resumes_to_the_same_end(
    at: int, experiment: Experiment, climbed: Run, copied: Run, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(copied.path / "ladders")
    count = 0
    write = module.write_climb

    def stop(path: Path, climb: Climb, *more: Any, **facts: Any) -> None:
        nonlocal count
        write(path, climb, *more, **facts)
        count += 1
        if count == at:
            raise StopError

    monkeypatch.setattr(module, "write_climb", stop)
    with pytest.raises(StopError):
        climb_run(copied, LADDER)
    monkeypatch.setattr(module, "write_climb", write)
    (folder,) = copied.path.glob("ladders/*")
    finished = {path.parent.name for path in folder.glob("*/verdicts.jsonl")}
    assert (
        {row["arm"] for row in module._collect(folder, experiment, LADDER)}
        == finished
        == ({"plain"} if at > 12 else set())
    )
    rows = climb_run(copied, LADDER)
    assert rows == ladder_rows(climbed, LADDER)
    for name, tensors in states(climbed).items():
        for key, value in tensors.items():
            assert torch.equal(states(copied)[name][key], value), (name, key)


def test_a_ladder_that_no_arm_began_is_none(copied: Run):
    before = ladders(copied)
    folder = copied.path / "ladders" / "0123456789ab"
    folder.mkdir()
    (folder / "ladder.toml").write_text("epsilons = [16.0]")
    assert ladders(copied) == before


def test_a_climb_of_an_earlier_version_goes_on(climbed: Run, tmp_path: Path):
    path = next(climbed.path.glob("ladders/*/sq/climb@*.safetensors"))
    tensors, facts = load_tensors(path)
    del tensors["second"]
    save_tensors(tmp_path / "climb.safetensors", tensors, facts)
    climb, _ = read_climb(tmp_path / "climb.safetensors")
    assert bool((climb.second == -1).all()), "every version is looked at anew"
    assert torch.equal(climb.rate, read_climb(path)[0].rate)


def test_a_climb_of_other_weights_is_refused(climbed: Run, copied: Run):
    weights = copied.path / "arms" / "sq" / "weights.safetensors"
    tensors, facts = load_tensors(weights)
    name = next(name for name, value in tensors.items() if value.dim() == 4)
    save_tensors(weights, tensors | {name: 1.01 * tensors[name]}, facts)
    path = next(copied.path.glob("ladders/*/sq/climb@*.safetensors"))
    (path.parent / "verdicts.jsonl").unlink()
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"expected the climb of this model .* got that of another"):
        climb_run(copied, LADDER)
    assert path.read_bytes() == before


def test_an_arm_named_like_a_copy_without_noise_is_a_source_all_the_same(tmp_path: Path):
    table = {**TABLE, "arms": [{**arm, "name": name} for arm, name in zip(TABLE["arms"], ("float", "sq"), strict=True)]}
    stored = train(parse(table), tmp_path)
    rows = climb_run(stored, replace(LADDER, rungs=LADDER.rungs[:3], check_images=0), arms=["sq"])
    assert "from arm float: FGSM" in [row["attack"] for row in rows]


def test_a_climb_on_other_images_is_refused(climbed: Run, copied: Run):
    path = next(copied.path.glob("ladders/*/sq/climb@*.safetensors"))
    tensors, facts = load_tensors(path)
    save_tensors(path, tensors | {"examples": tensors["examples"].flip(0)}, facts)
    (path.parent / "verdicts.jsonl").unlink()
    with pytest.raises(DataError, match=r"on these .* images at .*climb@.*, got one on others; remove it"):
        climb_run(copied, LADDER, arms=["sq"])


def test_one_arm_at_a_time_ends_in_the_same_rows(climbed: Run, copied: Run):
    shutil.rmtree(copied.path / "ladders")
    assert {row["arm"] for row in climb_run(copied, LADDER, arms=["sq"])} == {"sq"}
    assert climb_run(copied, LADDER, arms=["plain"]) == ladder_rows(climbed, LADDER)
    with pytest.raises(DataError, match="expected an arm among plain, sq, got 'other'"):
        climb_run(copied, LADDER, arms=["other"])


@pytest.mark.parametrize("pays", [True, False])
def test_automatic_precision_is_stored_as_what_it_was(copied: Run, monkeypatch: pytest.MonkeyPatch, pays: bool):
    monkeypatch.setattr("bitquorum.evaluate.ladder.bfloat16_pays", lambda device: pays)
    rows = climb_run(copied, replace(LADDER, precision="auto"), arms=["plain"])
    settled = replace(LADDER, precision="bfloat16" if pays else None)
    assert settled in ladders(copied)
    assert all(found.precision != "auto" for found in ladders(copied))
    assert rows == ladder_rows(copied, settled)


def test_arms_that_were_climbed_apart_are_collected_without_being_climbed(climbed: Run, copied: Run):
    (path,) = copied.path.glob("ladders/*/metrics.jsonl")
    path.unlink()
    environment = (copied.path / "environment.json").read_bytes()
    assert climb_run(copied, LADDER) == ladder_rows(climbed, LADDER)
    assert ladder_rows(copied, LADDER) == ladder_rows(climbed, LADDER)
    assert (copied.path / "environment.json").read_bytes() == environment


def test_progress_states_rungs_and_cost(trained: Run, tmp_path: Path):
    copy = Run(path=Path(shutil.copytree(trained.path, tmp_path / trained.path.name)))
    plan = replace(LADDER, rungs=(FGSM(),), epsilons=(16 / 255,), check_images=4)
    heard: list[str] = []

    class Ear(Listener):
        def begin(self, task: str, total: int) -> None:
            heard.append(task)

        def advance(self, done: int, note: str = "") -> None:
            heard.append(f"{done} {note}")

    climb_run(copy, plan, arms=["sq"], listener=Ear())
    assert heard[:3] == ["ladder sq", "0 batches, up to 7 + 7 passes an image", "1 of 1 batches, EOT-PGD-3x2"]
    assert "self-checks sq" in heard
    assert heard[heard.index("self-checks sq") + 1] == f"0 of {len(CHECKS)}, {next(iter(CHECKS))}"
    rows = verdicts(copy, plan)
    assert {(row["arm"], row["epsilon"]) for row in rows} == {("sq", 16 / 255)}
    assert len(rows) > 3
    assert all(row["reason"] for row in rows)
    undecided = [(row["name"], row["passed"]) for row in rows if not isinstance(row["passed"], bool)]
    assert undecided == [("self-test", None)], "the noise of so coarse a network hides its points, and nothing else"


@pytest.fixture
def idle_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every peer return the images as they were."""

    def answer(name: str, model: Any, images: torch.Tensor, labels: torch.Tensor, **options: Any) -> peers.Opinion:
        return peers.Opinion(name=name, version="9.9", images=images, claimed=0.125, seconds=1.0, outside=0)

    monkeypatch.setattr(module, "second_opinion", answer)
    monkeypatch.setattr(module, "check_peer", lambda *_: None)


@pytest.mark.usefixtures("idle_peer")
def test_the_rows_of_a_published_run_outlive_its_climbs(copied: Run, tmp_path: Path):
    rows = climb_run(copied, LADDER, also=["autoattack-rand"])
    copied.publish(tmp_path / "published")
    published = Run.open(tmp_path / "published")
    (path,) = published.path.glob("ladders/*/metrics.jsonl")
    before = path.read_bytes()
    for also in ([], ["autoattack-rand"]):
        assert climb_run(published, LADDER, also=also) == rows
        assert path.read_bytes() == before


def test_a_peer_that_fails_stops_no_arm_and_is_reported_at_the_end(copied: Run, monkeypatch: pytest.MonkeyPatch):
    def answer(name: str, *_: Any, **__: Any) -> peers.Opinion:
        raise peers.PeerError(f"expected {name} to attack the model")

    monkeypatch.setattr(module, "second_opinion", answer)
    monkeypatch.setattr(module, "check_peer", lambda *_: None)
    shutil.rmtree(copied.path / "ladders", ignore_errors=True)
    with pytest.raises(peers.PeerError, match="expected autoattack-rand to attack"):
        climb_run(copied, LADDER, also=["autoattack-rand"])
    assert {row["arm"] for row in ladder_rows(copied, LADDER)} == {"plain", "sq"}


@pytest.mark.usefixtures("idle_peer")
def test_a_second_opinion_is_judged_on_our_draws(copied: Run):
    rows = climb_run(copied, LADDER, also=["autoattack-rand"])
    opinions = [row for row in rows if row["name"] == "second opinion"]
    assert len(opinions) == 4
    clean = {row["arm"]: row["value"] for row in rows if row["attack"] == "clean" and row["name"] == "accuracy"}
    assert all(row["value"] == clean[row["arm"]] and row["claimed"] == 0.125 for row in opinions)
    assert climb_run(copied, LADDER, also=["autoattack-rand"]) == rows
    assert any("autoattack-rand 9.9" in cell for row in bracket(rows).rows for cell in row)
    for arm in clean:
        taken = read_jsonl(module.ladder_folder(copied, LADDER) / arm / "seconds.jsonl")
        assert [row["seconds"] for row in taken if row.get("peer") == "autoattack-rand 9.9"] == [1.0, 1.0]
        assert {row["arm"] for row in taken if "rung" in row} <= {arm}
    table = ladder_seconds(rows + ladder_times(copied, LADDER))
    assert table is not None
    assert [row[0] for row in table.rows] == list(clean)
    assert all(row[2].startswith("2.0") and row[3] != "-" for row in table.rows)  # it left all that was clean


def test_an_unknown_peer_is_named_before_any_work(copied: Run):
    with pytest.raises(ConfigError, match="expected a peer among"):
        climb_run(copied, replace(LADDER, draws=5), also=["nobody"])
    assert ladders(copied) == [LADDER]


def test_the_usual_epsilon_is_the_middle_one_of_the_run(experiment: Experiment, tmp_path: Path):
    assert usual_epsilons(create(experiment, tmp_path)) == [16 / 255]


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_corrupt_state_is_named(content: bytes, copied: Run):
    (path,) = copied.path.glob("ladders/*/sq/climb@0.062745.safetensors")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"climb@0\.062745"):
        climb_run(copied, LADDER)


@pytest.mark.usefixtures("idle_peer")
def test_rows_of_another_norm_name_it(trained: Run, tmp_path: Path):
    shutil.copytree(trained.path, tmp_path / trained.path.name)
    plan = replace(LADDER, norm="l2", rungs=(), epsilons=(0.5,))
    rows = climb_run(Run(path=tmp_path / trained.path.name), plan, arms=["plain"], also=["autoattack-rand"])
    assert {row["norm"] for row in rows} == {"l2"}
    assert "second opinion" in {row["name"] for row in rows}
    assert ("L2 0.5", "worst case over the ladder") in [line[:2] for line in bracket(rows).rows]


def test_tables_show_what_the_rows_hold(climbed: Run):
    rows = ladder_rows(climbed, LADDER)
    table = bracket(rows)
    assert table.header == ("epsilon", "accuracy", "plain", "sq")
    assert [row[:2] for row in table.rows] == [
        ("", "members"),
        ("0", "clean"),
        ("16/255", "claim as worded (PGD-3, EOT-PGD-3x2)"),
        ("16/255", "worst case over the ladder"),
        ("16/255", "worst of 5 tries"),
        ("32/255", "claim as worded (PGD-3, EOT-PGD-3x2)"),
        ("32/255", "worst case over the ladder"),
        ("32/255", "worst of 5 tries"),
    ]
    steps = rungs(rows, "sq", 32 / 255)
    assert [row[0] for row in steps.rows][:2] == ["clean", "EOT-PGD-3x2"]
    assert steps.rows[1][2] == "20"
    assert "sq at 32/255" in steps.note
