"""Test that freed memory stays with the process where the C library knows how, and that users' own settings stand."""

import os
import subprocess
import sys

import pytest

CODE = """
import resource
from bitquorum.allocator import keep_freed_memory
kept = {keep} and keep_freed_memory()
def work():
    block = bytearray(64 << 20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, **variables: str) -> tuple[bool, int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)],
        env={**plain, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


def test_what_is_freed_is_taken_again_without_page_faults():
    kept, count = faults(keep=True)
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert count < 1000 < faults(keep=False)[1]


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_set_stands(name: str):
    assert not faults(keep=True, **{name: "glibc.malloc.arena_max=2" if name == "GLIBC_TUNABLES" else "2"})[0]
