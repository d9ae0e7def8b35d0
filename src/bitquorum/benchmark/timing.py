"""Time contenders in turn, in a new random order each time, and compare them within each repetition.

A disturbance of the machine then meets all of them, so that ratios hold where times do not.
"""

import gc
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitquorum import kernels
from bitquorum.interface import InputError


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Say how large the workloads are.

    Attributes:
        shape: Of the activation that is quantized.
        bits: Of weights and activations.
        widths: Channels of the three stages of the network that is trained and attacked.
        batch: Images of a step.
        members: Numbers of members whose training step is timed.
        steps: Steps of an attack.
        precision: Arithmetic of the training step, `float32` or `bfloat16`.
        device: Where to compute.
        threads: Of torch, for workloads that start processes of their own.
    """

    shape: tuple[int, ...] = (128, 64, 32, 32)
    bits: int = 4
    widths: tuple[int, int, int] = (32, 64, 128)
    batch: int = 128
    members: tuple[int, ...] = (1, 2, 3)
    steps: int = 10
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 2

    @classmethod
    def small(cls) -> "Sizes":
        """Return sizes for a glance, or a test: ratios are then those of small tensors."""
        return cls(shape=(8, 8, 16, 16), widths=(4, 4, 8), batch=8, members=(1, 2), steps=3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contender:
    """Name something to time.

    Attributes:
        name: For tables.
        run: Does it once.
        kept: Bytes kept for the backward pass, where that is measured.
        apart: Whether `run` is a process of its own and returns its peak memory in bytes.
    """

    name: str
    run: Callable[[], object]
    kept: int | None = None
    apart: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """Hold what is compared; the first contender is the reference of the ratios.

    Attributes:
        name: For tables.
        contenders: At least one.
        warmup: Calls of each that are not counted (compilation, caches).
        most: The largest number of repetitions, where one takes long.
    """

    name: str
    contenders: tuple[Contender, ...]
    warmup: int = 2
    most: int | None = None


def measure(workload: Workload, *, repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return a row for each contender: milliseconds, and the ratio to the reference, as median and quartiles.

    Args:
        workload: What to time.
        repeats: Number of repetitions, at least 2.
        seed: Of the order within each repetition.
    """
    if repeats < 2:
        raise InputError(f"expected at least 2 repetitions, got {repeats}")
    repeats = min(repeats, workload.most or repeats)
    for contender in workload.contenders:
        for _ in range(workload.warmup):
            _seconds(contender)
    times: list[list[float]] = [[] for _ in workload.contenders]
    peaks: dict[str, list[Any]] = {contender.name: [] for contender in workload.contenders if contender.apart}
    shuffle = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for index in shuffle.sample(range(len(times)), len(times)):
                contender = workload.contenders[index]
                seconds, result = _seconds(contender)
                times[index].append(seconds)
                if contender.apart:
                    peaks[contender.name].append(result)
    finally:
        gc.enable()
    reference = workload.contenders[0]
    return [
        {
            "workload": workload.name,
            "contender": contender.name,
            "reference": reference.name,
            "repeats": repeats,
            "milliseconds": _summary([1e3 * value for value in values]),
            "ratio": _summary([a / b for a, b in zip(values, times[0], strict=True)]),
            "kept": contender.kept / reference.kept if contender.kept and reference.kept else None,
            **({"peak_bytes": max(peaks[contender.name])} if contender.apart else {}),
        }
        for contender, values in zip(workload.contenders, times, strict=True)
    ]


def fastest(device: str) -> kernels.Mode:
    """Return `compiled` where kernels can be compiled for a device, else `eager`."""
    return "compiled" if kernels.compiler_available(torch.device(device).type) else "eager"


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """Return a function that runs something as a CUDA graph, recorded at the first call after three plain runs."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs.append(graph)
        graphs[0].replay()

    return replay


def kept_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass; equal memory counts once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = run()
    del held
    return sum(kept.values())


_PRELUDE = """
import atexit, sys
def _peak(place=sys.argv[1]):
    try:
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(place, "w") as file:
        file.write(str(peak))
atexit.register(_peak)
"""


def run_apart(code: str) -> int:
    """Run Python code in a process of its own and return the peak of its resident memory in bytes.

    Raises:
        InputError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "peak"
        done = subprocess.run(
            [sys.executable, "-c", _PRELUDE + code, str(place)], stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise InputError(f"expected the process to end well, got exit code {done.returncode}; its error is above")
        return int(place.read_text())


def _seconds(contender: Contender) -> tuple[float, object]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = contender.run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}
