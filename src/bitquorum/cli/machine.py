"""Say what this machine has and how fast it is, and put data sets on it."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bitquorum.cli.printing import print_rows, print_table
from bitquorum.cli.shared import DataRoot, Device, app, bars, data_app, device_named, out


@app.command()
def doctor(data: DataRoot = None) -> None:
    """Print versions, devices, low-precision support and the data sets found here."""
    import torch

    from bitquorum import kernels
    from bitquorum.data import available
    from bitquorum.environment import environment

    facts = environment()
    cpu = facts["cpu"]
    rows = [(name, str(version)) for name, version in facts["versions"].items()]
    rows += [
        ("platform", facts["platform"]),
        ("CPU", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, {cpu['capability']}"),
        ("threads", str(facts["threads"]["intra_op"])),
        ("AMX", "yes" if cpu["amx_bf16"] else "no"),
        ("bfloat16 on CPU", "pays" if kernels.bfloat16_pays(torch.device("cpu")) else "does not pay; float32 is used"),
        ("compiled kernels", "yes" if kernels.compiler_available() else "no C++ compiler found; eager is used"),
        ("CUDA", ", ".join(device["name"] for device in facts["cuda"]["devices"]) or "none"),
    ]
    for name, listing in available(data).items():
        rows.append((f"data: {name}", listing.where or f"missing; bitquorum data get {name}"))
    print_rows(("what", "found"), rows)


@app.command()
def benchmark(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Which to run, of `quantizer`, `training`, `attack`, `growth`, `memory`, `startup`; all."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    repeats: Annotated[int, typer.Option(help="Repetitions of each workload.")] = 11,
    precision: Annotated[str, typer.Option(help="Of the training step: `float32` or `bfloat16`.")] = "float32",
    small: Annotated[bool, typer.Option("--small", help="Small tensors, for a glance.")] = False,
    to: Annotated[Path | None, typer.Option(help="Also store rows and environment in this folder.")] = None,
    device: Device = "cpu",
) -> None:
    """Time the hot paths beside what they are built on and beside installed peers: ratios with their spread.

    Example: `bitquorum benchmark quantizer training --precision bfloat16 --to results/benchmark-training`.
    """
    from dataclasses import replace

    import torch

    from bitquorum.benchmark import WORKLOADS, Sizes, measure
    from bitquorum.environment import environment
    from bitquorum.files import atomic_write, write_jsonl
    from bitquorum.interface import ConfigError
    from bitquorum.registry import nearest
    from bitquorum.report import benchmark_table

    for name in names or []:
        if name not in WORKLOADS:
            raise ConfigError(f"expected names among {', '.join(WORKLOADS)}, got {name!r}; {nearest(name, WORKLOADS)}")
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"expected a precision of float32 or bfloat16, got {precision!r}")
    if min(threads, repeats - 1) < 1:
        raise ConfigError(f"expected at least 1 thread and 2 repeats, got {threads} and {repeats}")
    torch.set_num_threads(threads)
    sizes = Sizes.small() if small else Sizes()
    sizes = replace(sizes, precision=precision, device=device_named(device), threads=threads)
    rows = []
    with bars() as listener:
        for name in names or WORKLOADS:
            for workload in WORKLOADS[name](sizes):
                listener.begin(workload.name, 0)
                rows += measure(workload, repeats=repeats)
    print_table(benchmark_table(rows))
    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
        write_jsonl(to / "metrics.jsonl", rows)
        atomic_write(to / "environment.json", json.dumps(environment(), indent=1) + "\n")
        out.print(f"The rows lie in [bold]{escape(str(to))}[/bold]", soft_wrap=True)


@data_app.command("list")
def data_list(data: DataRoot = None) -> None:
    """List the known data sets, their size and where they lie."""
    from bitquorum.data import available

    rows = []
    for name, listing in available(data).items():
        shape, count = " x ".join(map(str, listing.shape)), f"{listing.train:,} + {listing.test:,}"
        rows.append((name, shape, count, listing.where or f"missing; bitquorum data get {name}"))
    print_rows(("name", "shape", "train + test", "where"), rows)
    out.print("Also: folder:PATH (class folders of images) and parquet:PATH (a Hugging Face data set).")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="Name of a data set, such as cifar10.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A local archive or folder with the published files, instead of a download."),
    ] = None,
    data: DataRoot = None,
) -> None:
    """Download a data set's published files, with resume and checksums, or take them from this machine."""
    from bitquorum.data import get

    with bars() as listener:
        where = get(name, source=source, root=data, progress=listener.bytes if source is None else None)
    out.print(f"{escape(name)} lies in [bold]{escape(str(where))}[/bold]", soft_wrap=True)
