import csv
import io
import json
import shutil
from dataclasses import replace

import pytest
import torch

from bitquorum.baselines import FloatEnsemble, LowBit, Setting, SqMi, Vanilla
from bitquorum.bench import Place, bench, is_bench, read_suite, stored_suite, summary
from bitquorum.bench import entry as bench_entry
from bitquorum.bench import pools as bench_pools
from bitquorum.bench import run as bench_run
from bitquorum.bench.entry import CELLS, entry_folder, work
from bitquorum.bench.suite import Entry, Suite
from bitquorum.bench.summary import summarize
from bitquorum.config import presets
from bitquorum.files import read_jsonl
from bitquorum.interface import ConfigError, DataError, InputError
from bitquorum.registry import decode, digest, encode
from bitquorum.report import bench_csv, bench_files, bench_table, bench_tables, write_page
from bitquorum.store import Run
from bitquorum.train import Trainer
from bitquorum.zoo import DigitsNet

pytestmark = pytest.mark.long


def small(**changes) -> Suite:
    suite = Suite(
        name="tiny",
        setting=Setting(network=DigitsNet(width=4), trainer=Trainer(epochs=1, batch_size=256), epsilon=0.1, members=2),
        baselines=(Vanilla(), LowBit()),
        reference="vanilla",
        ladder="quick",
        examples=20,
        draws=5,
        calibration=100,
    )
    return replace(suite, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    stored, rows = bench(small(), Place(root=root))
    return root, stored, rows


def test_rows_hold_what_the_table_needs(done):
    _, stored, rows = done
    assert [row["title"] for row in rows] == ["vanilla", "low-bit"]
    for row in rows:
        assert 0 <= row["worst"]["value"] <= row["claim"]["value"] <= 1
        assert row["worst"]["low"] <= row["worst"]["value"] <= row["worst"]["high"]
        assert (row["images"], row["seeds"], row["ladder"]) == (20, [0], "quick")
    assert rows[0]["bit_operations"] > 20 * rows[1]["bit_operations"]
    assert rows[0]["macs"] == rows[1]["macs"]
    assert "difference" not in rows[0]
    assert set(rows[1]["difference"]) == {"value", "low", "high", "p", "adjusted_p"}
    assert read_jsonl(stored.path / "metrics.jsonl") == rows == summary(stored)
    assert is_bench(stored)
    assert stored_suite(stored) == small()


def test_the_page_of_experiments_refuses_a_suite(done, tmp_path):
    _, stored, _ = done
    with pytest.raises(InputError, match="expected runs of experiments for the page, got a suite"):
        write_page([stored], tmp_path / "page.html")


def test_accuracies_are_those_of_the_stored_climb(done):
    root, _, rows = done
    entry = small().entries()[1]
    (path,) = entry_folder(entry, root).glob("*/climb@*.safetensors")
    from bitquorum.evaluate.climbs import read_climb

    climb, examples = read_climb(path)
    assert rows[1]["worst"]["value"] == pytest.approx(climb.worst.value, abs=1e-4)
    assert rows[1]["clean"]["value"] == pytest.approx(climb.clean.value, abs=1e-4)
    row = json.loads((entry_folder(entry, root) / "row.json").read_text())
    assert row["examples"] == examples.tolist()
    assert row["checks"] > 0


def test_a_second_call_computes_nothing(done, monkeypatch):
    root, stored, rows = done

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(bench_run, "serial", fail)
    again, same = bench(small(), Place(root=root))
    assert (again.path, same) == (stored.path, rows)


def test_another_suite_takes_entries_that_it_shares(done, monkeypatch):
    root, _, rows = done
    computed = []

    def note(tasks, place):
        computed.extend(task for task in tasks if isinstance(task, Entry))
        return iter(())

    monkeypatch.setattr(bench_run, "serial", note)
    other = small(name="other", baselines=(LowBit(), LowBit(name="two", bits=2)), reference="")
    _, found = bench(other, Place(root=root))
    assert [entry.title for entry in computed] == ["two"]
    assert [row["title"] for row in found] == ["low-bit"]
    assert found[0]["worst"] == rows[1]["worst"]


def test_a_changed_entry_has_another_key():
    entry = small().entries()[0]
    for change in ({"examples": 21}, {"draws": 6}, {"seeds": (1,)}, {"sources": ()}, {"calibration": 120}):
        assert digest(small(**change).entries()[0]) != digest(entry)
    assert small(examples=21).entries()[0].experiment == entry.experiment  # the training is the same
    assert decode(Entry, encode(entry)) == entry


def test_published_rows_are_known(done, tmp_path, monkeypatch):
    _, stored, rows = done
    stored.publish(tmp_path / "published")
    assert not list((tmp_path / "published").rglob("*.safetensors"))
    monkeypatch.setattr(bench_run, "serial", lambda *_: pytest.fail("computed"))
    _, found = bench(small(), Place(root=tmp_path / "runs"), known=[tmp_path / "published"])
    assert found == rows
    changed = small(draws=6)
    monkeypatch.setattr(bench_run, "serial", lambda *_: iter(()))
    assert bench(changed, Place(root=tmp_path / "runs"), known=[tmp_path / "published"])[1] == []


def test_known_rows_that_are_not_there_are_missed_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"expected folders of published suites, which hold `entries`, got .*results"):
        bench(small(), Place(root=tmp_path / "runs"), known=[tmp_path / "results"])
    assert not (tmp_path / "runs").exists()


def test_the_time_of_a_killed_training_is_not_known(tmp_path):
    stored = Run.create(tmp_path, "entry", {})
    stored.write_environment({"work": "train", "seconds": 2.0})
    stored.write_environment({"work": "other"})
    assert bench_entry._train_seconds(stored) == 2.0
    stored.write_environment({"work": "train", "ended": "killed"})
    assert bench_entry._train_seconds(stored) is None
    rows = summarize([_entry_row("a", 0, [1.0]), _entry_row("a", 1, [1.0], train_seconds=None)], "")
    assert rows[0]["train_seconds"] is None
    table = bench_table(rows)
    assert [row[table.header.index("train s")] for row in table.rows] == ["-"]


def test_a_mean_over_machines_names_them_all():
    rows = [_entry_row("a", 0, [1.0], threads=2), _entry_row("a", 1, [1.0])]
    assert [(row["device"], row["threads"]) for row in summarize(rows, "")] == [("cpu", "2 or 1")]
    assert [(row["device"], row["threads"]) for row in summarize(rows[1:], "")] == [("cpu", 1)]


def test_a_row_of_another_version_of_its_entry_is_neither_shown_nor_kept(done, tmp_path, monkeypatch):
    root, stored, rows = done
    monkeypatch.setattr(bench_run, "serial", lambda *_: iter(()))
    path = stored.path / "entries" / "vanilla@0.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "entry": "0" * 12, "worst": [1.0] * len(row["worst"])}))
    copy = tmp_path / stored.path.name
    shutil.copytree(stored.path, copy)
    assert bench(small(), Place(root=root))[1] == rows, "the training still holds the row of today"
    found = bench(small(), Place(root=tmp_path))[1]
    assert [row["title"] for row in found] == ["low-bit"]
    assert not (copy / "entries" / "vanilla@0.json").exists()


def test_an_error_of_any_kind_stops_its_own_row_alone(tmp_path, monkeypatch):
    tried = []

    def out_of_memory(entry, *_, **__):
        tried.append(entry.title)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench_pools, "work", out_of_memory)
    with pytest.raises(DataError, match=r"got 2 that failed, first vanilla, .* got RuntimeError: out of memory"):
        bench(small(sources=()), Place(root=tmp_path))
    assert tried == ["vanilla", "low-bit"]


def test_only_some_rows(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bench_run, "serial", lambda tasks, _: asked.extend(tasks) or iter(()))
    bench(small(seeds=(0, 1)), Place(root=tmp_path), only=["low-bit"])
    assert [(task.title, task.experiment.seed) for task in asked if isinstance(task, Entry)] == [
        ("low-bit", 0),
        ("low-bit", 1),
    ]
    with pytest.raises(ConfigError, match=r"expected a row among vanilla, low-bit, got 'lowbit'; did you mean"):
        bench(small(), Place(root=tmp_path), only=["lowbit"])


def test_a_failed_entry_is_named_after_the_others_are_done(tmp_path, monkeypatch):
    trainer = Trainer(epochs=1, batch_size=256)
    diverging = replace(small().setting, trainer=replace(trainer, batch_size=5000))
    with pytest.raises(DataError, match=r"expected every entry to be computed, got 2 that failed, first vanilla.*5000"):
        bench(small(setting=diverging, sources=()), Place(root=tmp_path))


def test_too_few_images_for_the_detector_are_refused_before_training(tmp_path):
    entry = small(examples=450, baselines=(Vanilla(),)).entries()[0]
    with pytest.raises(InputError, match=r"at least 100 test images beside those of the ladder, .* got \d+ of \d+"):
        work(entry, tmp_path)
    assert not list(tmp_path.rglob("weights.safetensors"))


def test_a_killed_entry_resumes_to_the_same_row(tmp_path, monkeypatch):
    entry = small(baselines=(Vanilla(),)).entries()[0]
    whole = work(entry, tmp_path / "whole")
    from bitquorum.bench import entry as module

    monkeypatch.setattr(module, "measure_detector", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        work(entry, tmp_path / "killed")
    monkeypatch.undo()
    assert not (entry_folder(entry, tmp_path / "killed") / "row.json").exists()
    resumed = work(entry, tmp_path / "killed")
    timed = ("train_seconds", "milliseconds", "seconds")
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ()}, "at least one baseline"),
        ({"baselines": (Vanilla(), Vanilla())}, "different titles"),
        ({"reference": "vanila"}, "did you mean 'vanilla'"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (0, 1000)}, "none of them that of the sources"),
        ({"calibration": 99}, "at least 100 held-out images"),
        ({"sources": (FloatEnsemble(), FloatEnsemble())}, "sources of different titles"),
        ({"sources": (FloatEnsemble(name="float"),)}, "expected sources of other names than nearest, mean, float"),
        ({"ladder": "standart"}, "did you mean 'standard'"),
    ],
)
def test_bad_suites_are_refused(changes, message):
    with pytest.raises((InputError, ConfigError), match=message):
        small(**changes)


def test_unknown_suite_is_refused():
    with pytest.raises(ConfigError, match=r"expected a suite or a path that ends in \.toml, got 'digit'; did you mean"):
        read_suite("digit")
    with pytest.raises(ConfigError, match="a table for Baseline"):
        read_suite("digits", ["baselines=[3]"])


@pytest.mark.parametrize("name", sorted(presets("suite")))
def test_suites_that_ship(name):
    suite = read_suite(name)
    assert suite.name == name
    assert suite.reference in suite.titles
    entries = suite.entries()
    assert len(entries) == len(suite.seeds) * len(suite.baselines)
    trainers = {entry.experiment.arms[0].trainer for entry in entries}
    assert trainers == {suite.setting.trainer}  # the same epochs, batches and augmentation for every row


def _entry_row(title, seed, worst, **more):
    row = {
        "title": title,
        "seed": seed,
        "members": "fp",
        "adversarial": False,
        "epsilon": 0.1,
        "ladder": "quick",
        "draws": 5,
        "device": "cpu",
        "threads": 1,
        "broken_by": {"a": 1},
        "failed_checks": [],
        "detector": {"statistic": "prediction-mi", "tpr5": 0.5, "auroc": 0.75},
        "bytes": 1024.0,
        "macs": 1e6,
        "bit_operations": 1e9,
        "train_seconds": 1.0,
        "milliseconds": 0.1,
        "examples": list(range(len(worst))),
        "clean": [1.0] * len(worst),
        "claim": worst,
        "worst": worst,
    }
    return row | more


def test_summary_over_seeds_by_hand():
    rows = [
        _entry_row("a", 0, [1.0, 0.0, 0.5, 0.5]),
        _entry_row("b", 0, [0.0, 0.0, 0.5, 0.5], detector={"statistic": "prediction-mi", "tpr5": None, "auroc": None}),
        _entry_row("a", 1, [1.0, 1.0, 0.5, 0.5], train_seconds=3.0, failed_checks=["eot-flat"]),
    ]
    a, b = summarize(rows, "b")
    assert a["worst"]["value"] == pytest.approx(0.625)
    assert a["worst"]["by_seed"] == [0.5, 0.75]
    assert a["seeds"] == [0, 1]
    assert a["train_seconds"] == 2.0
    assert a["failed_checks"] == ["eot-flat"]
    assert a["difference"]["value"] == pytest.approx(0.25)  # on the seed that both have
    assert a["difference"]["adjusted_p"] == a["difference"]["p"]
    assert b["detector"]["tpr5"] is None
    assert "difference" not in b


def test_tables_order_rows_and_mark_adversarial_training():
    rows = summarize(
        [
            _entry_row("weak", 0, [0.0, 0.1] * 10),
            _entry_row("trained", 0, [1.0, 1.0] * 10, adversarial=True),
            _entry_row("strong", 0, [0.9, 0.8] * 10),
        ],
        "weak",
    )
    fewer = [{**row, "seeds": [0, 1, 2][: 3 if row["adversarial"] else 1]} for row in rows]
    assert [row[0] for row in bench_table(fewer).rows] == [
        "strong (1 of 3 seeds)",
        "weak (1 of 3 seeds)",
        "trained (AT)",
    ]
    table = bench_table(rows)
    assert [row[0] for row in table.rows] == ["strong", "weak", "trained (AT)"]
    assert table.rows[0][5] == "+80.0 [+75, +85]*"
    assert table.rows[1][5] == "ref"
    assert "20 test images" in table.note
    shown, costs = bench_tables(rows)
    assert [len(part.header) for part in (shown, costs)] == [7, 7]
    read = list(csv.DictReader(io.StringIO(bench_csv(rows))))
    assert float(read[2]["worst_value"]) == pytest.approx(0.85)
    files = bench_files(rows, "t<iny")
    assert list(files) == ["table.md", "table.csv", "table.html"]
    page = files["table.html"]
    assert "t&lt;iny" in page
    assert "<script" not in page
    assert page.count('class="bar"') == 3


@pytest.mark.slow
def test_noise_rows_are_measured_on_draws(tmp_path):
    suite = small(baselines=(SqMi(),), reference="", sources=(FloatEnsemble(),), examples=10)
    row = work(suite.entries()[0], tmp_path)
    assert row["detector"]["statistic"] == "prediction-mi"
    rates = torch.tensor(row["worst"])
    assert torch.equal((rates * 5).round() / 5, rates)  # shares of five draws
    assert (tmp_path / CELLS).is_dir()
