"""Say what this machine has, and put data sets on it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bitquorum.cli.printing import print_rows
from bitquorum.cli.shared import DataRoot, app, bars, data_app, out


@app.command()
def doctor(data: DataRoot = None) -> None:
    """Print versions, devices, low-precision support and the data sets found here."""
    import torch

    from bitquorum import kernels
    from bitquorum.data import available
    from bitquorum.environment import environment
    from bitquorum.train import bfloat16_pays

    facts = environment()
    cpu = facts["cpu"]
    rows = [(name, str(version)) for name, version in facts["versions"].items()]
    rows += [
        ("platform", facts["platform"]),
        ("CPU", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, {cpu['capability']}"),
        ("threads", str(facts["threads"]["intra_op"])),
        ("AMX", "yes" if cpu["amx_bf16"] else "no"),
        ("bfloat16 on CPU", "pays" if bfloat16_pays(torch.device("cpu")) else "does not pay; float32 is used"),
        ("compiled kernels", "yes" if kernels.compiler_available() else "no C++ compiler found; eager is used"),
        ("CUDA", ", ".join(device["name"] for device in facts["cuda"]["devices"]) or "none"),
    ]
    for name, listing in available(data).items():
        rows.append((f"data: {name}", listing.where or f"missing; bitquorum data get {name}"))
    print_rows(("what", "found"), rows)


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
