r"""Measure what a stochastic quantizer costs beside a clip, a plain quantizer and a peer's fake quantizer.

    python benchmarks/quantizer.py --threads 2 --json metrics.json

Every contender maps one activation of the given shape to its grid. Three passes are timed:

- `forward`: without gradients.
- `backward`: forward, then the gradient with respect to the input.
- `double`: forward, the gradient with a graph, and the gradient of that, as an input-gradient penalty needs it.

All contenders of a pass are timed in turn within one repetition, in a new random order each time, so that a disturbance
meets all of them. A ratio is the median over the repetitions of the ratio inside one repetition; times and ratios come
with their quartiles. The first call of each contender (compilation, caches) is not counted, but printed for compiled
kernels.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitquorum
from bitquorum import kernels
from bitquorum.environment import environment
from bitquorum.quantizers import Deterministic, Logistic, Quantizer

PASSES = ("forward", "backward", "double")
REFERENCES = ("hardtanh", "deterministic", "brevitas QuantReLU")
HIGH = 3.0


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Name a function of the activation, with the kernels it runs on."""

    name: str
    function: Callable[[Tensor], Tensor]
    mode: kernels.Mode = "eager"


def ours(bits: int) -> Iterator[Contender]:
    """Yield the clip, the deterministic quantizer and the stochastic one on either kind of kernels."""
    yield Contender(name="hardtanh", function=nn.Hardtanh(0.0, HIGH))
    yield Contender(name="deterministic", function=Quantizer(bits, high=HIGH, law=Deterministic()))
    stochastic = Quantizer(bits, high=HIGH, law=Logistic())
    yield Contender(name="SQ eager", function=stochastic)
    if kernels.compiler_available():
        yield Contender(name="SQ compiled", function=stochastic, mode="compiled")


def brevitas(bits: int) -> Iterator[Contender]:
    """Yield the peer's fake quantizers with a scale that is a parameter, on the same range; none if not installed."""
    try:
        from brevitas.nn import QuantIdentity, QuantReLU  # pyright: ignore[reportMissingImports]
        from brevitas.quant import (  # pyright: ignore[reportMissingImports]
            Int8ActPerTensorFloatMinMaxInit,
            Uint8ActPerTensorFloatMaxInit,
        )
    except ImportError:
        return
    relu = QuantReLU(act_quant=Uint8ActPerTensorFloatMaxInit, bit_width=bits, max_val=HIGH)
    yield Contender(name="brevitas QuantReLU", function=relu)
    if bits > 1:  # its signed grid of one bit has a single level
        identity = QuantIdentity(act_quant=Int8ActPerTensorFloatMinMaxInit, bit_width=bits, min_val=-HIGH, max_val=HIGH)
        yield Contender(name="brevitas QuantIdentity", function=identity)


def run(contender: Contender, kind: str, x: Tensor, weight: Tensor) -> None:
    """Run one pass once."""
    if kind == "forward":
        with torch.no_grad():
            contender.function(x)
        return
    out = contender.function(x)
    (gradient,) = torch.autograd.grad(out, x, weight, create_graph=kind == "double")
    if kind == "double":
        torch.autograd.grad(gradient, (x, weight), weight.detach(), allow_unused=True)


def seconds(contender: Contender, kind: str, x: Tensor, weight: Tensor) -> float:
    with kernels.use(contender.mode):
        start = time.perf_counter()
        run(contender, kind, x, weight)
        return time.perf_counter() - start


def measure(contenders: list[Contender], kind: str, x: Tensor, weight: Tensor, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every repetition, by contender, in the order of the repetitions."""
    for contender in contenders:
        first = seconds(contender, kind, x, weight)
        if contender.mode == "compiled":
            print(f"  first {kind} pass of {contender.name}: {first:.1f} s", file=sys.stderr)
        seconds(contender, kind, x, weight)
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        for contender in shuffle.sample(contenders, len(contenders)):
            times[contender.name].append(seconds(contender, kind, x, weight))
    gc.enable()
    return times


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def rows(bits: int, kind: str, times: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    for name, values in times.items():
        ratios = {
            f"over {reference}": summary([a / b for a, b in zip(values, times[reference], strict=True)])
            for reference in REFERENCES
            if reference in times and reference != name
        }
        yield {
            "pass": kind,
            "bits": bits,
            "contender": name,
            "milliseconds": {**summary([1e3 * value for value in values]), "least": round(1e3 * min(values), 4)},
            "ratios": ratios,
        }


def cell(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return "-".rjust(20)
    text = f"{value['median']:.{digits}f} [{value['quartile_1']:.{digits}f}, {value['quartile_3']:.{digits}f}]"
    return text.rjust(20)


def header(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["environment"]["versions"].items())
    settings = result["settings"]
    return (
        f"{versions}\n{result['environment']['cpu']['model']}, {settings['threads']} threads, float32 "
        f"{settings['shape']}, {settings['law']}, n = {settings['repeats']} repetitions; median [quartiles]\n"
        + f"{'pass':9}{'bits':>4}  {'contender':24}{'milliseconds':>20}"
        + "".join(f"{'/ ' + name:>20}" for name in REFERENCES)
    )


def line(row: dict[str, Any]) -> str:
    cells = [cell(row["ratios"].get(f"over {reference}"), 2) for reference in REFERENCES]
    return f"{row['pass']:9}{row['bits']:>4}  {row['contender']:24}{cell(row['milliseconds'], 1)}{''.join(cells)}"


def peer_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("brevitas")
    except PackageNotFoundError:
        return "not installed"


def load() -> float | None:
    """Return the mean number of running processes over a minute: one core's worth each, this one's threads included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a stochastic quantizer costs.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--shape", type=int, nargs="+", default=[128, 64, 32, 32])
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = (torch.rand(options.shape) * 1.2 * HIGH - 0.1 * HIGH).requires_grad_()  # a twelfth lies outside at either end
    weight = torch.randn(options.shape).requires_grad_()
    info = environment()
    info["versions"] |= {"bitquorum": bitquorum.__version__, "brevitas": peer_version()}
    info["load"] = {"before": load()}
    settings = {"shape": options.shape, "high": HIGH, "law": str(Logistic()), "dtype": "float32"}
    settings |= {"threads": options.threads, "repeats": options.repeats}
    result = {"environment": info, "settings": settings, "rows": []}
    print(header(result))
    for bits in options.bits:
        contenders = [*ours(bits), *brevitas(bits)]
        for kind in PASSES:
            for row in rows(bits, kind, measure(contenders, kind, x, weight, options.repeats)):
                result["rows"].append(row)
                print(line(row), flush=True)
            if peer_version() == "not installed":
                print(f"{kind:9}{bits:>4}  brevitas: not installed")
        info["load"]["after"] = load()
        if options.json:  # written after each number of bits, so that an interrupted run leaves what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"load of the machine before and after: {info['load']['before']}, {info['load']['after']}")


if __name__ == "__main__":
    main()
