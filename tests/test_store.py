"""Test that a run folder survives kills, corruption and a second process."""

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitquorum import environment as module
from bitquorum import files as store
from bitquorum.environment import environment
from bitquorum.files import (
    append_jsonl,
    atomic_write,
    extended,
    load_tensors,
    read_jsonl,
    save_tensors,
    truncate_jsonl,
)
from bitquorum.interface import BitquorumError, DataError, InputError
from bitquorum.registry import digest
from bitquorum.store import Run

ROWS = [{"step": step, "name": "lösung\n", "value": step / 3} for step in range(4)]


def test_atomic_write_replaces_a_file_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "deep" / "file"
    atomic_write(path, "ä\r\n")
    assert path.read_bytes() == "ä\r\n".encode()
    atomic_write(str(path), b"\x00new")
    assert path.read_bytes() == b"\x00new"

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "newer")
    assert path.read_bytes() == b"\x00new"
    assert os.listdir(path.parent) == ["file"]


def test_rows_come_back(tmp_path: Path):
    path = tmp_path / "a" / "metrics.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, ROWS[:1])
    append_jsonl(path, iter(ROWS[1:]))
    append_jsonl(path, [])
    assert read_jsonl(path) == ROWS


@pytest.mark.parametrize("cut", range(1, 50))
def test_a_kill_loses_at_most_the_last_row(tmp_path: Path, cut: int):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, ROWS)
    size = path.stat().st_size
    os.truncate(path, size - cut)
    kept = ROWS if cut == 1 else ROWS[:3]
    assert read_jsonl(path) == kept
    append_jsonl(path, ROWS[3:])
    assert read_jsonl(path) == [*kept, ROWS[3]]


def test_a_corrupt_line_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    deep = f'{{"a": 1}}\n{{"a": {"[" * 100_000}\n'
    for bad in (deep, '{"a": 1}\n{"a": \n{"a": 3}\n', '{"a": 1}\n[1]\n', '{"a": 1}\n\n{"a": 2}\n'):
        path.write_text(bad)
        with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl"):
            read_jsonl(path)
    path.write_bytes(b'{"a": 1}\n\xff\xfe\n')
    with pytest.raises(DataError, match="line 2"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("column", "text", "wanted"),
    [
        ("arm", "5", "text"),
        ("attack", "null", "text"),
        ("epsilon", '"5/255"', "a number"),
        ("value", '"x"', "a number or null"),
        ("value", "true", "a number or null"),
        ("low", "null", "a number"),
        ("alone_value_high", "[1]", "a number"),
        ("passed", '"yes"', "true, false or null"),
        ("fpr", "0.5", "a list"),
        ("pair_matrix", "{}", "a list or null"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path: Path, column: str, text: str, wanted: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"{column}_of": {text}}}\n{{"{column}": {text}}}\n')
    with pytest.raises(DataError, match=rf"expected {wanted} as '{column}' in line 2 of .*metrics\.jsonl, got"):
        read_jsonl(path)


def test_numbers_may_be_whole_and_some_results_null(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"value": None, "passed": None, "pair_mi_low": None}, {"value": 1, "epsilon": 0, "passed": True}]
    append_jsonl(path, rows)
    assert read_jsonl(path) == rows


def test_a_missing_column_is_named_when_it_is_asked_for(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"a": 1}, {"b": 2}])
    _, row = read_jsonl(path)
    for asked in (row, extended(row, c=3), copy.deepcopy(row)):
        assert asked["b"] == 2
        assert asked.get("a") is None
        with pytest.raises(DataError, match=r"expected the column 'a' in line 2 of .*metrics\.jsonl, got only b"):
            asked["a"]


def test_a_bad_row_leaves_the_file_alone(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, ROWS)
    for value in (float("nan"), {1, 2}, torch.ones(1)):
        with pytest.raises(InputError, match="expected rows"):
            append_jsonl(path, [{"a": 1}, {"value": value}])
    assert read_jsonl(path) == ROWS


def test_truncate_keeps_the_first_rows(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, ROWS[:2])
    start = path.read_bytes()
    append_jsonl(path, ROWS[2:])
    path.write_bytes(path.read_bytes() + b'{"cut')
    truncate_jsonl(path, 2)
    assert path.read_bytes() == start
    with pytest.raises(DataError, match=r"at least 3 rows in .*, got 2"):
        truncate_jsonl(path, 3)
    with pytest.raises(InputError, match="at least 0"):
        truncate_jsonl(path, -1)
    truncate_jsonl(path, 0)
    assert read_jsonl(path) == []
    truncate_jsonl(tmp_path / "missing", 0)
    assert not (tmp_path / "missing").exists()


def test_tensors_come_back(tmp_path: Path):
    base = torch.arange(12, dtype=torch.float64).view(3, 4)
    tensors = {
        "strided": base.T,
        "part": base[1:, ::2],
        "tied": base,
        "again": base,
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "codes": torch.tensor([0, 255], dtype=torch.uint8),
        "flag": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "weight": torch.nn.Parameter(torch.ones(2)),
        "channels": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    path = tmp_path / "a" / "w.safetensors"
    save_tensors(path, tensors, {"b": "2", "a": "ä"})
    loaded, metadata = load_tensors(path)
    assert metadata == {"a": "ä", "b": "2"}
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()
    loaded["tied"].zero_()
    assert torch.equal(load_tensors(path)[0]["tied"], base)
    save_tensors(path, {})
    assert load_tensors(path) == ({}, {})


def test_equal_tensors_give_equal_files(tmp_path: Path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int64), "ö": torch.ones(1)}
    metadata = {f"key{i}": "ü" * i for i in range(8)}
    files = set()
    for _ in range(8):
        save_tensors(tmp_path / "w", tensors, metadata)
        files.add((tmp_path / "w").read_bytes())
        tensors = dict(reversed(tensors.items()))
        metadata = dict(reversed(metadata.items()))
    assert len(files) == 1


def test_tensors_that_no_file_can_hold_are_refused(tmp_path: Path):
    for tensors in ({"__metadata__": torch.ones(1)}, {"a": torch.ones(1).to_sparse()}):
        with pytest.raises(InputError, match="expected dense tensors"):
            save_tensors(tmp_path / "w", tensors)
    assert not (tmp_path / "w").exists()


def test_bad_tensor_files_are_refused(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(DataError, match=r"expected a safetensors file at .*, got no file"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(100)})
    content = path.read_bytes()
    for bad in (b"", b"nonsense", content[:-1], content[:20], b"\xff" * 64):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="got a corrupt one"):
            load_tensors(path)


def test_environment_is_json_without_names_of_this_machine():
    found = environment()
    text = json.dumps(found, allow_nan=False)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["memory"] is None or found["memory"] > 2**20
    assert set(found["cpu"]) >= {"model", "cores", "amx_tile", "amx_bf16", "avx512_bf16"}
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert str(Path.cwd()) not in text


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_environment_knows_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    clean = environment()["git"]
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert environment()["git"] == {"revision": clean["revision"], "dirty": True}
    monkeypatch.setattr(module, "_HOME", tmp_path)
    assert environment()["program"] is None, "a program that git does not track, as one that is installed below it"
    (tmp_path / "environment.py").write_text("")
    git("add", "environment.py")
    git("commit", "-q", "-a", "-m", "b")
    monkeypatch.chdir(tmp_path.parent)
    found = environment()
    assert found["git"] is None
    assert found["program"] == {"revision": found["program"]["revision"], "dirty": False}
    assert found["program"]["revision"] != clean["revision"]
    monkeypatch.chdir(tmp_path)
    assert environment()["git"] == found["program"]
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None
    assert environment()["program"] is None


CONFIG = {"seed": 1, "arms": [{"name": "a", "scale": 0.25}], "law": {"type": "logistic"}}


def test_the_same_config_finds_the_same_run(tmp_path: Path):
    run = Run.create(tmp_path, "digits", CONFIG)
    assert run.path == tmp_path / f"digits-{digest(CONFIG)}"
    assert run.config() == CONFIG
    stamp = (run.path / "config.toml").stat().st_mtime_ns
    assert Run.create(str(tmp_path), "digits", dict(reversed(CONFIG.items()))) == run
    assert (run.path / "config.toml").stat().st_mtime_ns == stamp
    assert Run.create(tmp_path, "digits", {**CONFIG, "seed": 2}) != run
    assert Run.create(tmp_path, "digits", {"t": (1, 2)}) == Run.create(tmp_path, "digits", {"t": [1, 2]})
    assert Run.open(run.path) == run == Run.open(str(run.path))


def test_a_foreign_config_is_refused(tmp_path: Path):
    run = Run.create(tmp_path, "digits", CONFIG)
    (run.path / "config.toml").write_text("seed = 2\n")
    with pytest.raises(DataError, match="got another one"):
        Run.create(tmp_path, "digits", CONFIG)
    (run.path / "config.toml").write_text("seed = ")
    with pytest.raises(DataError, match="expected a TOML file"):
        run.config()
    with pytest.raises(DataError, match="bitquorum list"):
        Run.open(tmp_path)
    for name in ("", "..", "a/b", "-a", ".a"):
        with pytest.raises(InputError, match="expected a run name"):
            Run.create(tmp_path, name, CONFIG)


def test_find(tmp_path: Path):
    first = Run.create(tmp_path, "digits", {"seed": 1})
    second = Run.create(tmp_path, "digits-large", {"seed": 2})
    third = Run.create(tmp_path, "cifar", {"seed": 3})
    (tmp_path / "other").mkdir()
    assert Run.listing(tmp_path) == sorted([first, second, third], key=lambda run: run.path.name)
    assert Run.listing(tmp_path / "missing") == []
    for run in (first, second, third):
        name = run.path.name
        for query in (run.path, str(run.path), name, name[-12:], name[-12:-4], name[-8:], name[:-3]):
            assert Run.find(tmp_path, query) == run
    assert Run.find(tmp_path, "digits") == first
    assert Run.find(tmp_path, "large") == second
    assert Run.find(tmp_path, "cif") == Run.find(tmp_path, "far") == third
    with pytest.raises(InputError, match=f"fits {first.path.name}, {second.path.name}") as caught:
        Run.find(tmp_path, "dig")
    assert not isinstance(caught.value, DataError)
    for query in ("", "mnist", "other", str(tmp_path)):
        with pytest.raises(DataError, match="bitquorum list"):
            Run.find(tmp_path, query)
    with pytest.raises(DataError, match="there are none yet"):
        Run.find(tmp_path / "missing", "digits")


def test_a_config_alone_gives_way_to_a_run_with_work(tmp_path: Path):
    worked, refused = (Run.create(tmp_path, "digits", {"seed": seed}) for seed in (1, 2))
    with pytest.raises(InputError, match="expected one run"):
        Run.find(tmp_path, "digits")
    worked.write_environment()
    assert Run.find(tmp_path, "digits") == worked
    assert Run.find(tmp_path, refused.path.name) == refused
    refused.write_environment()
    with pytest.raises(InputError, match="expected one run"):
        Run.find(tmp_path, "digits")


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "[{}]"])
def test_an_environment_of_other_json_is_named(tmp_path: Path, text: str):
    run = Run.create(tmp_path, "digits", CONFIG)
    (run.path / "environment.json").write_text(text)
    with pytest.raises(DataError, match=r"expected a JSON list of sessions of work at .*environment\.json"):
        run.environments()


def test_rows_without_what_they_must_hold_are_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"arm": "a", "value": 1}\n{"arm": "b"}\n')
    assert len(read_jsonl(path, ("arm",))) == 2
    with pytest.raises(DataError, match=r"expected a JSON object with arm, value in line 2"):
        read_jsonl(path, ("arm", "value"))
    path.write_text('{"arm": "a", "value": NaN}\n')
    with pytest.raises(DataError, match=r"expected a JSON object in line 1"):
        read_jsonl(path)


def test_every_session_adds_its_environment(tmp_path: Path):
    run = Run.create(tmp_path, "digits", CONFIG)
    assert run.environments() == []
    run.write_environment({"seed": 3})
    run.write_environment()
    rows = json.loads((run.path / "environment.json").read_text())
    assert rows == run.environments()
    assert [row.get("seed") for row in rows] == [3, None]
    assert rows[1] == json.loads(json.dumps(environment()))
    with pytest.raises(InputError, match="expected rows"):
        run.write_environment({"bad": float("inf")})
    for bad in ("[", "{}"):
        (run.path / "environment.json").write_text(bad)
        with pytest.raises(DataError, match="JSON list"):
            run.write_environment()


def test_folders_stay_inside_the_run(tmp_path: Path):
    run = Run.create(tmp_path, "digits", CONFIG)
    assert run.folder("attacks", "pgd").is_dir()
    assert run.folder() == run.path
    for parts in (("..",), ("/etc",), ("a", "..", "..", "b")):
        with pytest.raises(InputError, match="inside"):
            run.folder(*parts)


HOLD = """
import sys
from pathlib import Path
from bitquorum.store import Run
with Run(path=Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.long
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path):
    run = Run.create(tmp_path, "digits", CONFIG)
    with run.lock(), pytest.raises(BitquorumError, match="another process"), run.lock():
        pass
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="wait for it or end it"), run.lock():
            pass
        other.kill()
        other.wait()
        with run.lock():
            pass
    assert run.config() == CONFIG


@pytest.mark.parametrize(("kind", "kept"), [("experiment", False), ("suite", True)])
def test_a_page_with_images_of_a_run_is_not_published(tmp_path: Path, kind: str, kept: bool):
    run = Run.create(tmp_path / "runs", "shown", {"type": kind})
    (run.path / "page.html").write_text("<img>")
    run.publish(tmp_path / "published")
    assert (tmp_path / "published" / "config.toml").exists()
    assert (tmp_path / "published" / "page.html").exists() == kept
