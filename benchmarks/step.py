r"""Measure what a training step costs: float or low-bit, with and without the input-gradient penalty, M members.

    python benchmarks/step.py --threads 2 --json results/benchmark-step/metrics.json

A step is the objective of one batch of random images and its backward pass; no data, no optimizer. All contenders are
timed in turn within one repetition, in a new random order each time, so that a disturbance meets all of them. A ratio
is the median over the repetitions of the ratio to one float network's plain step inside one repetition; times and
ratios come with their quartiles. The first three steps of each contender (compilation, caches) are not counted.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import bitquorum
from bitquorum import kernels
from bitquorum.conversion import Policy
from bitquorum.ensemble import Ensemble
from bitquorum.environment import environment
from bitquorum.objective import InputGradient, MemberCrossEntropy, Objective, Reduce, Step
from bitquorum.quantizers import Deterministic, Law, Logistic, SmoothRounding
from bitquorum.zoo import SmallResNet

REFERENCE = "float"


def policy(law: Law) -> Policy:
    return Policy(weight_law=Deterministic(), activation_law=law, learned="weights")


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Return a timed step for each name."""
    chosen: dict[str, tuple[int, Law | None, bool, kernels.Mode]] = {
        REFERENCE: (1, None, False, "compiled"),
        "float, plain kernels": (1, None, False, "eager"),
        "float with penalty": (1, None, True, "compiled"),
        "logistic w4a4": (1, Logistic(), False, "compiled"),
        "smooth rounding w4a4": (1, SmoothRounding(), False, "compiled"),
        "smooth rounding w4a4, plain kernels": (1, SmoothRounding(), False, "eager"),
        "logistic w4a4 with penalty": (1, Logistic(), True, "compiled"),
        "smooth rounding w4a4 with penalty": (1, SmoothRounding(), True, "compiled"),
        "smooth rounding w4a4 with penalty, plain kernels": (1, SmoothRounding(), True, "eager"),
        "smooth rounding w4a4, 2 members": (2, SmoothRounding(), False, "compiled"),
        "smooth rounding w4a4, 3 members": (3, SmoothRounding(), False, "compiled"),
        "smooth rounding w4a4 with penalty, 2 members": (2, SmoothRounding(), True, "compiled"),
        "smooth rounding w4a4 with penalty, 3 members": (3, SmoothRounding(), True, "compiled"),
    }
    return {name: timed(options, *choice) for name, choice in chosen.items()}


def timed(
    options: argparse.Namespace, members: int, law: Law | None, penalty: bool, mode: kernels.Mode
) -> Callable[[], float]:
    networks = [
        SmallResNet(widths=tuple(options.widths), activation="relu")(classes=10, shape=(3, 32, 32))
        for _ in range(members)
    ]
    policies = [policy(law) if law else None] * members
    ensemble = Ensemble.build(networks, policies).to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    objective = Objective(terms=(MemberCrossEntropy(), *((InputGradient(warmup=0.0),) if penalty else ())))
    labels, examples = torch.arange(options.batch) % 10, torch.arange(options.batch)
    low = options.precision == "bfloat16"

    def step() -> float:
        images = torch.rand(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        images.requires_grad_(penalty)
        with kernels.use(mode):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
                loss, _ = objective(
                    Step(
                        ensemble=ensemble,
                        images=images,
                        labels=labels,
                        examples=examples,
                        progress=1.0,
                        seed=0,
                        memory={},
                        reduce=Reduce(),
                    )
                )
            loss.backward()
            took = time.perf_counter() - start
        ensemble.zero_grad(set_to_none=True)
        return took

    return step


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def measure(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        for name in shuffle.sample(list(steps), len(steps)):
            times[name].append(steps[name]())
    gc.enable()
    return times


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a training step costs.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--widths", type=int, nargs=3, default=[32, 64, 128])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    info = environment()
    info["versions"] |= {"bitquorum": bitquorum.__version__}
    times = measure(contenders(options), options.repeats)
    reference = times[REFERENCE]
    rows: list[dict[str, Any]] = []
    print(f"{info['cpu']['model']}, {options.threads} threads, {options.precision}, n = {options.repeats}")
    for name, values in times.items():
        ratio = summary([a / b for a, b in zip(values, reference, strict=True)])
        row = {"contender": name, "milliseconds": summary([1e3 * v for v in values]), f"over {REFERENCE}": ratio}
        rows.append(row)
        took = row["milliseconds"]["median"]
        print(f"{name:50}{took:9.0f} ms {ratio['median']:7.2f} [{ratio['quartile_1']:.2f}, {ratio['quartile_3']:.2f}]")
    if options.json:
        settings = {key: getattr(options, key) for key in ("threads", "repeats", "batch", "widths", "precision")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": info, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
