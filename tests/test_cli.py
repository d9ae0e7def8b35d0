"""Test what a user of the command line sees: help, tables, clear errors, exit codes and resumable runs."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from bitquorum import cli, experiment
from bitquorum.cli import printing
from bitquorum.cli.printing import print_rows, print_verdicts
from bitquorum.cli.shared import number
from bitquorum.config import parse, presets, read
from bitquorum.evaluate import Verdict
from bitquorum.files import read_jsonl
from bitquorum.interface import BitquorumError
from bitquorum.registry import encode, to_toml
from bitquorum.report import comparison
from bitquorum.store import Run

TINY = """
name = "tiny"
[data]
train = 40
[trainer]
epochs = 1
batch_size = 10
lr = 0.05
log_every = 1
calibration = 10
checkpoint_seconds = 0.0
[evaluation]
epsilons = ["8/255"]
examples = 10
draws = 2
attacks = [{ type = "fgsm" }]
[[arms]]
name = "plain"
network = { type = "linear" }
[[arms]]
name = "sq"
network = { type = "digitsnet", width = 4 }
members = [{ weight_bits = 4, activation_bits = 2 }]
"""
COMMANDS = {
    "run": "Train and attack every arm",
    "train": "Train every arm of an experiment without attacking it",
    "evaluate": "Attack a trained run",
    "plane": "Lay evaluated runs into the adversarial information plane",
    "detect": "Measure attack detectors on evaluated runs",
    "certify": "Certify trained runs",
    "report": "Write one page about stored runs",
    "bench": "Train and attack a suite of defences under one ladder",
    "museum": "Climb the ladder with broken defences",
    "compare": "Compare the arms of an attacked run image by image",
    "show": "Print the stored table of a run",
    "list": "List the stored runs, the presets or the suites",
    "publish": "Copy a run's config, metrics and environment",
    "doctor": "Print versions, devices",
    "benchmark": "Time the hot paths",
    "data list": "List the known data sets",
    "data get": "Download a data set's published files",
}
# A shell that starts the tests in the background lets its children ignore the interrupt, `nohup` the closed terminal.
LAUNCHER = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); from bitquorum.cli import main; main()"
)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.toml").write_text(TINY)
    experiment.run(read(str(folder / "tiny.toml")), folder / "runs")
    return folder / "runs"


def call(*arguments: str) -> str:
    """Return what a command prints; a failure is raised as it is."""
    result = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        cli.app, arguments, catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return " ".join(plain(result.output).split())


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e\n]", "", text)


def start(arguments: Sequence[str]) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BITQUORUM")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1"}
    command = [sys.executable, "-c", LAUNCHER, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Return the one message with which the installed command refuses its arguments."""
    monkeypatch.setattr(sys, "argv", ["bitquorum", *arguments])
    monkeypatch.setattr(cli.err, "_width", 500)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command replaces
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    lines = plain(captured.err).strip().splitlines()
    assert "Traceback" not in captured.err
    assert captured.out == ""
    (message,) = [line for line in lines if line.startswith("error: ")]
    assert lines == [message], "one message and nothing else"
    return message


def test_the_help_names_every_command():
    known = {name for name in COMMANDS if " " not in name} | {"data"}
    text = call("--help")
    assert all(re.search(rf"\b{name}\b", text) for name in known)
    assert set(get_command(cli.app).list_commands(None)) == known  # type: ignore[attr-defined, arg-type]


@pytest.mark.parametrize(("command", "purpose"), COMMANDS.items())
def test_every_command_says_what_it_does_and_what_it_takes(command: str, purpose: str):
    text = call(*command.split(), "--help")
    assert purpose in text
    assert f"bitquorum {command}" in text or f"root {command}" in text
    assert text.count("--help") >= 1


def test_help_is_fast_for_it_does_without_torch():
    code = (
        "import sys; from bitquorum import cli\n"
        "try: cli.app(['--help'])\nexcept SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'numpy', 'sklearn', 'pyarrow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "heavy: []" in result.stdout


def test_a_run_prints_its_table_and_where_it_lies_and_again_the_same(tiny: str, tmp_path: Path):
    folder = str(tmp_path / "runs")
    first = call("run", tiny, "--runs", folder, "--device", "cpu")
    assert "epsilon attack plain sq members fp w4a2" in first
    assert "8/255 worst" in first
    assert "10 test images and 2 fresh draws" in first
    assert f"The run lies in {folder}/tiny-" in first
    assert "minutes on" in first
    second = call("run", tiny, "--runs", folder)
    assert second == first[first.index(second[:20]) :]
    assert "train plain" not in second


def test_train_then_evaluate(tiny: str, tmp_path: Path):
    folder = str(tmp_path / "runs")
    assert "Trained; the run lies in" in call("train", tiny, "seed=1", "--runs", folder)
    assert "trained" in call("list", "--runs", folder)
    assert "Not evaluated yet" in call("show", "tiny", "--runs", folder)
    assert "Not evaluated yet" in call("show", "tiny", "--markdown", "--runs", folder)
    text = call("evaluate", "tiny", "examples=20", "draws=1", "attacks=[{type='pgd', steps=2}]", "--runs", folder)
    assert "PGD-2" in text
    assert "20 test images and 1 fresh draws" in text
    assert "Not evaluated yet" in call("show", "tiny", "--runs", folder)


@pytest.mark.long
def test_the_ladder_prints_rungs_bracket_and_verdicts_and_show_repeats_them(runs: Path, tmp_path: Path):
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    ladder = ["--ladder", "quick", "--epsilon", "32/255", "examples=10", "draws=5", "check_images=0", "--arm", "plain"]
    text = call("evaluate", "tiny", *ladder, "--runs", str(copy))
    assert "plain at 32/255" in text
    assert "claim as worded (PGD-20)" in text
    assert "worst case over the ladder" in text
    assert "The run lies in" in text
    shown = call("show", "tiny", "--runs", str(copy))
    assert "worst case over the ladder" in shown
    markdown = call("show", "tiny", "--markdown", "--runs", str(copy))
    assert "| 32/255 | worst case over the ladder |" in markdown
    call("publish", "tiny", str(tmp_path / "published"), "--runs", str(copy))
    assert list((tmp_path / "published").glob("ladders/*/metrics.jsonl"))
    assert not list((tmp_path / "published").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ladder", "tall"], "expected a ladder among quick, standard, full, got 'tall'"),
        (["--ladder", "quick", "--arm", "other"], "expected an arm among plain, sq, got 'other'"),
        (["--ladder", "quick", "--also", "nobody"], "expected a peer among"),
        (["--ladder", "quick", "--epsilon", "many"], "epsilons"),
        (["--ladder", "quick", "drwas=3"], "drwas"),
        (["--arm", "plain"], "expected --ladder beside --arm"),
    ],
)
def test_a_bad_call_of_the_ladder_is_one_message_and_leaves_the_run_alone(
    arguments: list[str],
    message: str,
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    before = sorted(runs.rglob("*"))
    assert message in refused(capsys, monkeypatch, "evaluate", "tiny", *arguments, "--runs", str(runs))
    assert sorted(runs.rglob("*")) == before


@pytest.mark.long
def test_a_failed_self_check_is_printed_in_red_and_is_exit_code_3(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def doubt(*_: object, **__: object) -> list[Verdict]:
        return [
            Verdict(name="gradients", passed=False, reason="they [lie]", facts={"zero": 1.0}),
            Verdict(name="effort", passed=True, reason="steps help"),
        ]

    monkeypatch.setattr("bitquorum.experiment.ladder.run_checks", doubt)
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    arguments = [
        "evaluate",
        "tiny",
        "--ladder",
        "quick",
        "examples=10",
        "draws=5",
        "--arm",
        "plain",
        "--runs",
        str(copy),
    ]
    result = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(cli.app, arguments)
    text = " ".join(plain(result.output).split())
    assert result.exit_code == 3
    assert "FAILED" in text
    assert "they [lie]" in text
    assert "1 self-checks failed: the attack may be weaker than it looks" in text
    assert "FAILED" in call("show", "tiny", "--runs", str(copy))
    markdown = call("show", "tiny", "--markdown", "--runs", str(copy))
    assert "| gradients | FAILED | they [lie] |" in markdown
    assert "1 self-checks failed: the attack may be weaker" in markdown


@pytest.mark.long
def test_the_museum_prints_its_table_and_show_and_list_know_it(tmp_path: Path):
    folder = str(tmp_path / "runs")
    text = call("museum", "gradient-killer", "--images", "40", "--ladder", "quick", "--runs", folder)
    assert "gradient-killer" in text
    assert "reached" in text
    assert "40 digits at 0.125" in text
    assert "the museum" in call("list", "--runs", folder)
    assert "gradient-killer" in call("show", "museum", "--runs", folder)
    assert "| gradient-killer |" in call("show", "museum", "--markdown", "--runs", folder)


def test_a_radius_is_a_decimal_number_or_a_fraction():
    assert (number("0.3"), number("5/255"), number("many")) == (0.3, "5/255", "many")


@pytest.mark.long
def test_bench_compares_defences_and_show_and_list_know_it(tmp_path: Path):
    folder = str(tmp_path / "runs")
    small = ["seeds=[0]", "ladder=quick", "examples=20", "draws=5", "sources=[]", "setting.trainer.epochs=1"]
    only = ["--only", "vanilla", "--only", "low-bit"]
    text = call("bench", "digits", *small, *only, "--runs", folder)
    assert "vs ref" in text
    assert "20 test images, 5 fresh draws and 1 seed of" in text
    (stored,) = Path(folder).glob("bench-digits-*")
    assert {path.suffix for path in stored.glob("table.*")} == {".md", ".csv", ".html"}
    assert "a suite, 2 of" in call("list", "--runs", folder)
    assert "| low-bit | w4a4 |" in call("show", "bench-digits", "--markdown", "--runs", folder)
    assert "low-bit" in call("show", "bench-digits", "--runs", folder)
    assert "cifar10-small" in call("list", "--suites")
    target = tmp_path / "published"
    call("publish", "bench-digits", str(target), "--runs", folder)
    again = call("bench", "digits", *small, *only, "--known", str(target), "--runs", str(tmp_path / "other"))
    assert "vanilla" in again
    assert not (tmp_path / "other" / "cells").exists()


def test_show_and_list_and_publish_only_read(runs: Path, tmp_path: Path):
    stored = Run.find(runs, "tiny")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert "8/255 worst" in call("show", "tiny", "--runs", str(runs))
    assert "8/255 worst" in call("show", str(stored.path), "--runs", str(tmp_path))
    assert call("list", "--runs", str(runs)).endswith(f"{stored.path.name} digits 0 complete")
    assert "Published to" in call("publish", "tiny", str(tmp_path / "out"), "--runs", str(runs))
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert call("show", str(tmp_path / "out")) == call("show", str(stored.path)).replace(
        str(stored.path), str(tmp_path / "out")
    )


def test_compare_prints_paired_differences_and_show_repeats_them(tiny: str, tmp_path: Path):
    place = ("--runs", str(tmp_path / "runs"))
    call("run", tiny, *place)
    text = call("compare", "tiny", "--to", "sq", *place)
    assert "arm plain minus sq clean" in text  # columns as rows, since one pair of arms has many columns
    assert "paired by image" in text
    assert "arm plain minus sq clean" in call("show", "tiny", *place)
    published = tmp_path / "published"
    call("publish", "tiny", str(published), *place)
    assert "arm plain sq minus plain of published plain of published clean" in call(
        "compare", "tiny", "--to", "plain", "--of", str(published), *place
    )


def test_show_prints_a_config_that_replays_and_markdown_as_it_is(runs: Path):
    result = CliRunner().invoke(cli.app, ["show", "tiny", "--config", "--runs", str(runs)])
    stored = Run.find(runs, "tiny")
    assert (
        result.output == (stored.path / "config.toml").read_text() == to_toml(encode(experiment.experiment_of(stored)))
    )
    result = CliRunner().invoke(cli.app, ["show", "tiny", "--markdown", "--runs", str(runs)])
    table, note = result.output.split("\n\n")
    lines = table.splitlines()
    assert lines[0] == "| epsilon | attack | plain | sq |"
    assert lines[1] == "|---|---|---|---|"
    assert lines[2] == "|  | members | fp | w4a2 |"
    assert [line.split(" | ")[1] for line in lines[3:]] == ["clean", "FGSM", "worst"]
    assert note == f"{comparison(experiment.results(stored)).note}\n"


def test_lists(tmp_path: Path):
    text = call("list", "--presets")
    assert all(name in text for name in presets())
    assert "Begin with: bitquorum run digits" in call("list", "--runs", str(tmp_path / "none"))
    text = call("data", "list", "--data", str(tmp_path))
    assert "digits 1 x 8 x 8 1,297 + 500 scikit-learn" in text
    assert "cifar10 3 x 32 x 32 50,000 + 10,000 missing; bitquorum data get cifar10" in text


def test_an_unreadable_run_does_not_hide_the_others(runs: Path, tmp_path: Path):
    folder = tmp_path / "runs"
    Run.find(runs, "tiny").publish(folder / "tiny-000000000000")
    older = {"older-2": 'name = "x"\nnovelty = 1\n', "older-3": 'type = "suite"\nnovelty = 1\n'}
    for name, text in {"broken-1": "name = [", **older}.items():
        (folder / name).mkdir()
        (folder / name / "config.toml").write_text(text)
    text = call("list", "--runs", str(folder))
    assert "tiny-000000000000 digits 0 complete" in text
    assert text.count("unreadable") == 3


def test_doctor_says_what_is_here(tmp_path: Path):
    text = call("doctor", "--data", str(tmp_path))
    for name in ("python", "torch", "CPU", "threads", "AMX", "bfloat16 on CPU", "compiled kernels", "CUDA"):
        assert name in text
    assert "data: digits scikit-learn" in text
    assert "data: cifar10 missing; bitquorum data get cifar10" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digit"], r"expected a preset .* got 'digit'; did you mean 'digits'\?"),
        (["run", "none.toml"], r"expected a TOML file at none\.toml, got none"),
        (["run", "digits", "trainer.epoch=1"], r"trainer\.epoch: expected a key .*did you mean 'epochs'\?"),
        (["run", "digits", "trainer.epochs=few"], r"trainer\.epochs: expected an integer, got 'few'"),
        (["run", "digits", "3"], r"expected an assignment, got '3'"),
        (["run", "digits", "name=a/b"], r"expected a run name of letters"),
        (["train", "digits", "arms.0.passes=0"], r"arms\.0: expected at least one pass per prediction, got 0"),
        (["train", "digits", "trainer.batch_size=5000"], r"expected at least one batch of 5000 images, got 1297"),
        (["run", "digits", "--device", "tpu9"], r"expected a device such as cpu.*got 'tpu9'"),
        (["run", "digits", "--device", "meta"], r"expected a device such as cpu.*got 'meta'"),
        (["run", "digits", "--device", "cuda:99"], r"expected a device of this machine, got 'cuda:99'"),
        (["run", "cifar10"], r"cifar10.*bitquorum data get cifar10"),
        (["run", "digits", "data.name=imagenet"], r"expected the name of a data set, got 'imagenet'"),
        (["bench", "digitz"], r"expected a suite or a path that ends in \.toml, got 'digitz'; did you mean 'digits'"),
        (["bench", "digits", "--only", "empri"], r"expected a row among .*got 'empri'; did you mean 'empir'"),
        (["bench", "digits", "--jobs", "0"], "expected at least one job, got 0"),
        (
            ["bench", "digits", "--jobs", "2", "--cluster", "local"],
            "got 2 jobs and 'local'",
        ),
        (["museum", "crosmax"], r"expected an exhibit among .*got 'crosmax'; did you mean 'crossmax'"),
        (["museum", "--ladder", "tall", "crossmax"], "expected a ladder among quick, standard, full, got 'tall'"),
        (["museum", "--also", "nobody"], "expected a peer among autoattack-standard"),
        (["evaluate", "digits"], r"expected the path, name or digest of a run in .*got 'digits'; there are none yet"),
        (["plane", "digits"], r"expected the path, name or digest of a run in .*got 'digits'; there are none yet"),
        (["detect", "digits", "--set", "passes=0"], r"expected at least one pass"),
        (["detect", "digits", "--set", "pases=2"], r"pases: expected a key .*did you mean 'passes'\?"),
        (["plane", "digits", "--set", "severities=[9]"], r"expected increasing severities among"),
        (["report", "digits"], r"expected the path, name or digest of a run"),
        (["show", ""], r"expected the path, name or digest of a run"),
        (["publish", "digits", "out"], r"expected the path, name or digest of a run"),
        (["data", "get", "cifar10", "--from", "missing"], r"cifar10: expected an archive or a folder, got missing"),
        (["data", "get", "cifar"], r"expected the name of a data set, got 'cifar'.*cifar10"),
        (["data", "get", "digits"], r"got 'digits', which is local"),
        (
            ["run", "digits", "trainer.epochs=1", "trainer.lr=1e9"],
            r"expected a finite loss, got .*lower lr or set clip",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITQUORUM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(cli.shared.Bars, "advance", lambda *_, **__: None)
    assert re.search(message, refused(capsys, monkeypatch, *arguments))


@pytest.mark.parametrize("size", ["2", "0", "many"])
def test_half_of_what_torchrun_sets_is_one_message(
    size: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", size)
    message = refused(capsys, monkeypatch, "train", tiny, "--runs", str(tmp_path))
    assert re.search(f"environment of torchrun, since WORLD_SIZE is '{size}', got: .*RANK", message)


def test_corrupt_files_and_foreign_folders_are_named(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    bad = tmp_path / "bad.toml"
    bad.write_text("name = [")
    assert "expected TOML in" in refused(capsys, monkeypatch, "run", str(bad))
    assert "expected a file for the page, got the folder ." in refused(
        capsys, monkeypatch, "report", str(Path("results/digits").resolve()), "--to", "."
    )
    message = refused(capsys, monkeypatch, "run", tiny, "--runs", tiny)
    assert f"expected {tiny}" in message
    folder = tmp_path / "runs"
    stored = experiment.create(read(tiny), folder)
    path = stored.path / "config.toml"
    path.write_text(path.read_text()[:-20])
    assert str(path) in refused(capsys, monkeypatch, "show", "tiny", "--runs", str(folder))
    for content in (path.read_bytes(), b"name = '\xff'"):
        path.write_bytes(content)
        assert str(path) in refused(capsys, monkeypatch, "show", str(stored.path), "--config")
    assert str(path) in refused(capsys, monkeypatch, "run", tiny, "--runs", str(folder))


@pytest.mark.parametrize("command", ["show", "report"])
@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("value", '"x"', "expected a number or null as 'value' in line 1 of"),
        ("epsilon", "{}", "expected a number as 'epsilon' in line 1 of"),
        ("images", "null", "expected a number as 'images' in line 1 of"),
        ("high", None, "expected the column 'high' in line 1 of"),
    ],
)
def test_a_spoiled_row_is_named(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    column: str,
    text: str | None,
    message: str,
):
    shutil.copytree(runs, tmp_path / "runs")
    (rows,) = (tmp_path / "runs").glob("tiny-*/evaluations/*/metrics.jsonl")
    first, *rest = rows.read_text().splitlines()
    row = {key: json.dumps(value) for key, value in json.loads(first).items() if key != column}
    row |= {column: text} if text else {}
    line = "{" + ", ".join(f'"{key}": {value}' for key, value in row.items()) + "}"
    rows.write_text("\n".join([line, *rest]) + "\n")
    assert message in refused(capsys, monkeypatch, command, "tiny", "--runs", str(tmp_path / "runs"))


def test_one_bad_run_leaves_the_list_of_the_others(runs: Path, tmp_path: Path):
    shutil.copytree(runs, tmp_path / "runs")
    (bad,) = (tmp_path / "runs").glob("tiny-*")
    shutil.copytree(bad, tmp_path / "runs" / "other-000000000000")
    (rows,) = bad.glob("evaluations/*/metrics.jsonl")
    rows.write_text("{}\n")
    text = call("list", "--runs", str(tmp_path / "runs"))
    assert f"{bad.name} ? ? unreadable" in text
    assert "other-000000000000 digits 0 complete" in text


def test_overrides_reach_what_a_file_leaves_out(tmp_path: Path):
    path = tmp_path / "short.toml"
    path.write_text('name = "short"\n')
    found = read(str(path), ["trainer.epochs=3", "trainer.augment.crop=1", "data.train=20", "evaluation.examples=20"])
    assert (found.trainer.epochs, found.trainer.augment.crop, found.data.train) == (3, 1, 20)
    assert found.evaluation.examples == 20
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(str(path)).name == "short"


def test_a_bad_call_leaves_no_run_behind(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "runs"
    for wrong in (["--device", "tpu"], ["trainer.epochs=0"]):
        refused(capsys, monkeypatch, "run", tiny, *wrong, "--runs", str(folder))
    assert not folder.exists()


def test_a_failure_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()
    assert cli._advice(BitquorumError("do this")) == "do this"
    assert cli._advice(OSError("no file named")) is None
    assert "expected room for what is written, got: No space left" in str(
        cli._advice(OSError(errno.ENOSPC, "No space left on device"))
    )
    assert "expected page.html to be" in str(cli._advice(OSError(errno.EISDIR, "a folder", ".part", None, "page.html")))


@pytest.mark.long
def test_a_locked_run_is_refused_by_another_process_and_loses_nothing(tiny: str, tmp_path: Path):
    folder = tmp_path / "runs"
    stored = experiment.create(read(tiny), folder)
    with stored.lock():
        process = start(["run", tiny, "--runs", str(folder), "--device", "cpu"])
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert re.fullmatch(r"error: expected .*tiny-.* to be free, got a run that another process works in; .*\n", err)
    assert {path.name for path in stored.path.iterdir()} == {".lock", "config.toml"}


@pytest.mark.long
def test_warnings_are_one_line_each(tiny: str, tmp_path: Path):
    narrow = "arms.1.members.0.activation_law={type='logistic', scale=0.05, floor=0.01}"
    process = start(["train", tiny, narrow, "--runs", str(tmp_path / "runs"), "--device", "cpu"])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [line for line in err.splitlines() if not line.startswith("train ")]
    assert lines
    assert all(re.fullmatch(r"warning: .+ \(GradientMaskingWarning\)", line) for line in lines)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_exits_with_130_and_the_same_command_resumes(tiny: str, tmp_path: Path, number: signal.Signals):
    folder = tmp_path / "runs"
    arguments = ["run", tiny, "trainer.epochs=10", "--runs", str(folder), "--device", "cpu"]
    stored = Run(path=folder / experiment.create(read(tiny, ["trainer.epochs=10"]), folder).path.name)
    log = stored.path / "arms" / "sq" / "train.jsonl"
    process = start(arguments)
    deadline = time.monotonic() + 120
    while len(read_jsonl(log)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"interrupted; the same command resumes. The run lies in {stored.path}"
    assert (log.parent / "checkpoint.safetensors").exists()
    assert json.loads((stored.path / "environment.json").read_text())[-1]["ended"] == "interrupted"
    before = len(read_jsonl(log))
    assert 3 <= before < 40
    text = call(*arguments)
    assert "8/255 worst" in text
    assert "train plain" not in text
    assert [row["step"] for row in read_jsonl(log)] == list(range(1, 41))
    whole = experiment.train(parse(stored.config()), tmp_path / "whole")
    for name in ("weights.safetensors", "train.jsonl"):
        assert (log.parent / name).read_bytes() == (whole.path / "arms" / "sq" / name).read_bytes()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_is_whole_in_a_file_and_folded_on_a_narrow_terminal(capsys, monkeypatch, terminal):
    row = ("EOT-PGD-20x10 momentum=0.75 margin mean-probability", "55.0 [45, 65]", "x" * 90)
    monkeypatch.delenv("COLUMNS", raising=False)
    print_rows(("rung", "left", "why"), [row])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "x" in line and "EOT" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == list(row)
    if not terminal:
        monkeypatch.setenv("COLUMNS", "60")  # which says how wide it shall be
    monkeypatch.setattr(printing, "out", Console(width=60, force_terminal=terminal, color_system=None))
    print_rows(("rung", "left", "why"), [row])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("x" in line for line in lines) > 1


def test_verdicts_say_at_which_radius(capsys):
    row = {"arm": "sq", "name": "step", "passed": True, "reason": "as it should be"}
    assert print_verdicts([row | {"epsilon": 5 / 255}, row | {"epsilon": 0.5, "norm": "l2", "passed": False}]) == 1
    shown = capsys.readouterr().out
    assert "5/255" in shown
    assert "L2 0.5" in shown
    assert "FAILED" in shown


def test_a_check_that_could_not_be_posed_has_not_failed(capsys):
    row = {"arm": "sq", "epsilon": 0.5, "name": "step", "passed": None, "reason": "hidden"}
    assert print_verdicts([row]) == 0
    shown = capsys.readouterr().out
    assert "not posed" in shown
    assert "passed" not in shown
