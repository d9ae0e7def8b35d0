"""Test that the pages say what is: examples run, commands exist, and no figure of a table is typed by hand."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from bitquorum import cli
from bitquorum.bench import read_suite
from bitquorum.config import parse, read
from bitquorum.files import read_jsonl
from bitquorum.report import (
    Table,
    bench_tables,
    benchmark_table,
    bracket,
    certificate_table,
    comparison,
    detectors,
    difference_table,
    ladder_seconds,
    museum_table,
    peer_seconds,
    peer_table,
    profiles,
    rejections,
    rungs,
)

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
RESULTS = re.compile(
    r"<!-- (results|differences|ladder|ladder-differences|climb-seconds|climb|rungs|certified|museum|peers|seconds|"
    r"plane|detectors|rejections|bench|costs|times): (\S+) -->\n"
    r"(.*?)<!-- end -->",
    re.S,
)


def _radius(rows: list[dict[str, Any]]) -> float:
    return next(row["epsilon"] for row in rows if row["name"] == "left")


STORED = {
    "results": ("evaluations/*/metrics.jsonl", comparison),
    "differences": ("evaluations/*/differences.jsonl", difference_table),
    "ladder": ("ladders/*/metrics.jsonl", bracket),
    "ladder-differences": ("ladders/*/differences.jsonl", difference_table),
    "climb-seconds": ("ladders/*/**/*.jsonl", ladder_seconds),
    "climb": ("ladders/*/metrics.jsonl", lambda rows: rungs(rows, rows[0]["arm"], _radius(rows))),
    "rungs": ("ladders/*/*/unfinished.jsonl", lambda rows: rungs(rows, rows[0]["arm"], rows[0]["epsilon"])),
    "certified": ("certificates/*/metrics.jsonl", certificate_table),
    "museum": ("metrics.jsonl", museum_table),
    "peers": ("metrics.jsonl", peer_table),
    "seconds": ("metrics.jsonl", peer_seconds),
    "plane": ("planes/*/metrics.jsonl", profiles),
    "detectors": ("detections/*/metrics.jsonl", detectors),
    "rejections": ("detections/*/metrics.jsonl", rejections),
    "bench": ("metrics.jsonl", lambda rows: bench_tables(rows)[0]),
    "costs": ("metrics.jsonl", lambda rows: bench_tables(rows)[1]),
    "times": ("metrics.jsonl", benchmark_table),
}
TABLES = [(page, *match) for page, text in PAGES.items() for match in RESULTS.findall(text)]


def commands() -> list[list[str]]:
    """Return the arguments of every call of `bitquorum` in a shell block, also below a launcher."""
    found = []
    for text in PAGES.values():
        for language, block in FENCE.findall(text):
            if language not in ("sh", "console"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                called = words[:1] == ["bitquorum"] or words[:1] == ["torchrun"]
                if called and "bitquorum" in words:
                    found.append(words[words.index("bitquorum") + 1 :])
    return found


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 100


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
@pytest.mark.long
def test_the_python_blocks_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for language, block in FENCE.findall(PAGES[page]):
        if language == "python":
            exec(compile(block, page, "exec"), names)


def test_the_pages_for_users_show_python():
    assert all("```python" in PAGES[page] for page in ("README.md", "docs/evaluation.md", "docs/guide.md"))


def test_the_guide_shows_an_experiment_in_toml():
    (block,) = [block for language, block in FENCE.findall(PAGES["docs/guide.md"]) if language == "toml"]
    assert parse(tomllib.loads(block)).arms


def test_the_readme_shows_the_command_line():
    assert any(arguments[:1] == ["run"] for arguments in commands())


@pytest.mark.parametrize("arguments", commands(), ids=shlex.join)
def test_every_command_of_the_pages_is_understood(arguments: list[str]):
    command = get_command(cli.app)
    context = command.make_context("bitquorum", list(arguments[:1]), resilient_parsing=True)
    name, words = arguments[0], arguments[1:]
    while hasattr(command, "get_command"):
        command = command.get_command(context, name)  # type: ignore[attr-defined]
        assert command is not None, f"bitquorum has no command {name}"
        if hasattr(command, "get_command"):
            name, *words = words
    parsed = command.make_context(name, list(words)).params
    if name == "bench":
        read_suite(_source(str(parsed["suite"])), parsed["overrides"] or [])
    if name in ("run", "train"):
        read(_source(str(parsed["source"])), parsed["overrides"] or [])


def _source(named: str) -> str:
    """Return a file of the repository, or for a file that a reader is to write the preset `digits`."""
    if not named.endswith(".toml"):
        return named
    return str(ROOT / named) if (ROOT / named).exists() else "digits"


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/research/*.toml")), ids=lambda path: path.stem)
def test_every_config_of_the_studies_is_understood(path: Path):
    assert read(path).arms


def test_every_make_target_of_the_pages_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {name for text in PAGES.values() for name in re.findall(r"(?:^|`)make ([\w-]+)", text, re.M)}
    assert named
    assert named <= targets


def test_the_readme_shows_measured_results():
    assert [table for table in TABLES if table[0] == "README.md"], "expected a table between results markers, got none"


@pytest.mark.parametrize(("page", "kind", "folder", "shown"), TABLES, ids=[f"{t[0]}:{t[1]}:{t[2]}" for t in TABLES])
def test_tables_of_results_are_what_the_stored_rows_render(page: str, kind: str, folder: str, shown: str):
    pattern, render = STORED[kind]
    paths = sorted((ROOT / folder).glob(pattern.removeprefix("ladders/*/") if "/ladders/" in folder else pattern))
    assert paths, f"{page} shows results of {folder}, which holds none"
    table = render([row for path in paths for row in read_jsonl(path)])
    assert isinstance(table, Table)
    expected = table.markdown()
    assert shown.strip() == expected, f"{page}: replace the table of {folder} by:\n{expected}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (folder / target).exists(), target
    for path in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.-]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_the_architecture_page_shows_the_layers_that_the_linter_holds():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"][0]
    held = [[name.strip() for name in layer.split("|")] for layer in table["layers"]]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", PAGES["docs/architecture.md"], re.M)
    shown = [[name.removesuffix("/") for name in re.findall(r"`([\w/]+)`", modules)] for _, modules in rows]
    assert shown == held
    assert [int(level) for level, _ in rows] == list(range(len(held), 0, -1))
