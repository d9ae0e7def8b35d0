"""Describe what a result depends on besides its config: versions, hardware, threads and git revision."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

_HOME = Path(__file__).parent
_CPU_FLAGS = ("amx_tile", "amx_bf16", "avx512_bf16")


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its config: versions, hardware, threads and git revision.

    Memory is in bytes. Of the CPU's flags those are kept that change low-precision arithmetic. There are no
    host names, users or paths in it. `git` is of the working folder, `program` of the folder that this code came from:
    `None` where git does not track it.

    Examples:
        >>> sorted(environment())
        ['cpu', 'cuda', 'deterministic', 'git', 'memory', 'platform', 'program', 'threads', 'versions']
    """
    info = _cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "bitquorum": _version(),
        },
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "model": info.get("model name", "") or platform.processor() or "unknown",
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            **{flag: flag in flags for flag in _CPU_FLAGS},
        },
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "memory": _memory(),
        "cuda": _cuda(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "git": _git(Path()),
        "program": _git(_HOME) if _git_output(_HOME, "ls-files", "environment.py") else None,
    }


def usable_cores() -> int:
    """Return the number of cores that this process may use, where the system tells, or else that of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version() -> str:
    try:
        return version("bitquorum")
    except PackageNotFoundError:
        return "unknown"


def _cpu_info() -> dict[str, str]:
    """Return the first block of /proc/cpuinfo, empty where there is none."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cuda() -> dict[str, Any]:
    """Return the CUDA version of torch and the devices, memory in bytes."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    devices = [{"name": d.name, "memory": d.total_memory, "capability": f"{d.major}.{d.minor}"} for d in found]
    return {"version": torch.version.cuda, "devices": devices}


def _git(folder: Path) -> dict[str, Any] | None:
    """Return the revision of a folder and whether a tracked file of its repository differs from it."""
    revision = _git_output(folder, "rev-parse", "HEAD")
    if not revision:
        return None
    changes = _git_output(folder, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _git_output(folder: Path, *arguments: str) -> str | None:
    try:
        # Without optional locks, looking never disturbs a git command that runs beside it.
        command = ["git", "--no-optional-locks", *arguments]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
