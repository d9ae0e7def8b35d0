"""Compare the start of the library and of its command line with that of torch, each in a process of its own."""

from collections.abc import Iterator
from functools import partial

from bitquorum.benchmark.timing import Contender, Sizes, Workload, run_apart

_CODE = {
    "import torch": "import torch",
    "import bitquorum": "import bitquorum; bitquorum.Ensemble",
    "bitquorum --help": "import sys; from bitquorum.cli import main; sys.argv = ['bitquorum', '--help']; main()",
    "python alone": "",
}


def startup(sizes: Sizes) -> Iterator[Workload]:
    """Yield one workload; the sizes do not matter to it."""
    contenders = (Contender(name=name, run=partial(run_apart, code), apart=True) for name, code in _CODE.items())
    yield Workload(name="start-up", contenders=tuple(contenders), warmup=1)
