"""Compare the start of the library and of its command line with that of torch, each in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from bitquorum.benchmark.timing import Contender, Sizes, Workload

_CODE = {
    "import torch": "import torch",
    "import bitquorum": "import bitquorum; bitquorum.Ensemble",
    "bitquorum --help": "import sys; from bitquorum.cli import main; sys.argv = ['bitquorum', '--help']; main()",
    "python alone": "",
}


def startup(sizes: Sizes) -> Iterator[Workload]:
    """Yield one workload; the sizes do not matter to it."""
    contenders = (Contender(name=name, run=partial(_start, code)) for name, code in _CODE.items())
    yield Workload(name="start-up", contenders=tuple(contenders), warmup=1)


def _start(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
