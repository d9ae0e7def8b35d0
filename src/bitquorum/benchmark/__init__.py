"""Time the hot paths beside what they are built on, and beside installed peers: ratios with their spread.

| file | holds |
|---|---|
| `timing` | contenders, timed in turn and compared within each repetition |
| `quantizer` | a quantized activation beside a clip and other quantizers |
| `training` | the step of a training |
| `attack` | PGD beside its bare passes and other libraries |
| `growth` | what a member, a bit, a draw or an image more costs |
| `memory` | the peak memory of an evaluation |
| `startup` | `import bitquorum` and `bitquorum --help` beside `import torch` |
"""

from collections.abc import Callable, Iterator

from bitquorum.benchmark.attack import attack
from bitquorum.benchmark.growth import growth
from bitquorum.benchmark.memory import memory
from bitquorum.benchmark.quantizer import quantizer
from bitquorum.benchmark.startup import startup
from bitquorum.benchmark.timing import Contender, Sizes, Workload, measure
from bitquorum.benchmark.training import training

WORKLOADS: dict[str, Callable[[Sizes], Iterator[Workload]]] = {
    "quantizer": quantizer,
    "training": training,
    "attack": attack,
    "growth": growth,
    "memory": memory,
    "startup": startup,
}
"""Name -> the workloads of one kind; each is built when its turn comes."""

__all__ = [
    "WORKLOADS",
    "Contender",
    "Sizes",
    "Workload",
    "attack",
    "growth",
    "measure",
    "memory",
    "quantizer",
    "startup",
    "training",
]
