"""Test that benchmarks time what they say, and guard the hot paths by ratios to what they are built on."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.test_cli import call

from bitquorum import kernels
from bitquorum.benchmark import WORKLOADS, Contender, Sizes, Workload, measure
from bitquorum.benchmark.timing import kept_bytes, run_apart
from bitquorum.interface import InputError
from bitquorum.report import benchmark_table


def test_ratios_and_times_are_those_of_known_work():
    calls = {"one": 0, "three": 0}

    def sleep(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    contenders = (
        Contender(name="one", run=lambda: sleep("one", 0.01), kept=4),
        Contender(name="three", run=lambda: sleep("three", 0.03), kept=6),
    )
    one, three = measure(Workload(name="sleep", contenders=contenders, warmup=1), repeats=5)
    assert calls == {"one": 6, "three": 6}
    assert 9 < one["milliseconds"]["median"] < 25
    assert one["ratio"]["median"] == 1
    assert 1.5 < three["ratio"]["median"] < 3.5
    assert (one["kept"], three["kept"], three["reference"]) == (1.0, 1.5, "one")


def test_one_repetition_has_no_spread():
    with pytest.raises(InputError, match="at least 2 repetitions, got 1"):
        measure(Workload(name="x", contenders=(Contender(name="x", run=list),)), repeats=1)


def test_kept_bytes_count_each_memory_once():
    x = torch.ones(100, requires_grad=True)
    assert kept_bytes(lambda: x * x) == 400
    assert kept_bytes(lambda: x + 1) == 0


def test_the_peak_of_a_process_is_that_of_what_it_holds():
    code = "x = bytearray(300 << 20); x[::4096] = b'1' * len(x[::4096])"
    contenders = tuple(
        Contender(name=name, run=partial(run_apart, text), apart=True) for name, text in (("none", ""), ("much", code))
    )
    none, much = measure(Workload(name="memory", contenders=contenders, warmup=0, most=2), repeats=5)
    assert 290 << 20 < much["peak_bytes"] - none["peak_bytes"] < 320 << 20
    assert much["repeats"] == 2
    with pytest.raises(InputError, match="expected the process to end well, got exit code 3"):
        run_apart("raise SystemExit(3)")


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in ("startup", "memory")])
@pytest.mark.long
def test_every_workload_runs_on_plain_kernels(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "compiler_available", lambda device="cpu": False)
    mode = kernels.mode()
    for workload in WORKLOADS[name](Sizes.small()):
        rows = measure(workload, repeats=2)
        assert rows[0]["ratio"]["median"] == 1
        assert len({row["contender"] for row in rows}) == len(rows) >= 2
    assert kernels.mode() == mode


@pytest.mark.long
def test_the_command_prints_and_stores(tmp_path: Path):
    text = call("benchmark", "startup", "--repeats", "2", "--threads", "1", "--to", str(tmp_path))
    assert "import bitquorum" in text
    assert "Ratio: to the first of the workload" in text
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["contender"] for row in rows][:2] == ["import torch", "import bitquorum"]
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]


@pytest.mark.slow
def test_an_evaluation_of_small_networks_has_a_peak():
    sizes = replace(Sizes.small(), batch=4, threads=1)
    (workload,) = WORKLOADS["memory"](sizes)
    rows = measure(workload, repeats=2)
    assert [row["peak_bytes"] > 50 << 20 for row in rows] == [True] * 3
    table = benchmark_table(rows)
    assert table.header[-1] == "peak GiB"


# Guards: ratios within one process, with room for noise


@pytest.mark.long
def test_an_attack_is_little_more_than_its_passes():
    sizes = Sizes(widths=(8, 16, 32), batch=64, steps=3)  # of 115 ms: a smaller one times the interpreter
    rows = measure(next(WORKLOADS["attack"](sizes)), repeats=7)
    assert rows[1]["ratio"]["quartile_1"] < 1.3


@pytest.mark.slow
def test_a_member_more_costs_a_member_more():
    sizes = Sizes(widths=(4, 4, 8), batch=32, members=(1, 3))
    penalized = list(WORKLOADS["training"](sizes))[1]
    names = {contender.name: contender for contender in penalized.contenders}
    chosen = (names["SQ SmoothRounding with penalty"], names["SQ SmoothRounding with penalty, M = 3"])
    _, three = measure(Workload(name="members", contenders=chosen), repeats=5)
    assert three["ratio"]["quartile_1"] < 4.5, "a gradient of one member runs through the others"


@pytest.mark.long
def test_the_start_adds_little_to_that_of_torch():
    (workload,) = WORKLOADS["startup"](Sizes.small())
    rows = {row["contender"]: row["ratio"]["median"] for row in measure(workload, repeats=2)}
    assert rows["bitquorum --help"] < 0.8
    assert rows["import bitquorum"] < 1.6
