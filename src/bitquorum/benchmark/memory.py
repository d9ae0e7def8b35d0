"""Measure the peak memory of an evaluation, in a process of its own."""

from collections.abc import Callable, Iterator
from functools import partial

from bitquorum.benchmark.timing import Contender, Sizes, Workload, run_apart

_CODE = """
import torch
from bitquorum import Ensemble, Policy
from bitquorum.attacks import PGD
from bitquorum.data import ImageSet
from bitquorum.evaluate import Evaluation
from bitquorum.zoo import ResNet18

torch.manual_seed(0)
torch.set_num_threads({threads})
networks = [ResNet18(width={width})(classes=10, shape=(3, 32, 32)) for _ in range(3)]
ensemble = Ensemble.build(networks, [Policy(weight_bits={bits}, activation_bits={bits})] * 3).eval()
labels = torch.arange({batch}) % 10
images = torch.randint(0, 256, ({batch}, 3, 32, 32), dtype=torch.uint8)
data = ImageSet(
    name="noise", split="test", images=images, labels=labels, classes=tuple("0123456789"), index=torch.arange({batch})
)
attacks = (PGD(steps=1, eot=20),) if {attacked} else ()
evaluation = Evaluation(epsilons=(5 / 255,), attacks=attacks, examples={batch}, draws=20, batch_size={batch})
evaluation(ensemble, data)
"""


def memory(sizes: Sizes) -> Iterator[Workload]:
    """Yield the evaluation of three ResNet-18 under 20 draws, clean and attacked with 20 draws a step."""
    width = 64 if sizes.widths[0] > 4 else sizes.widths[0]
    name = "3 x ResNet-18, 20 draws,"

    def run(batch: int, *, attacked: bool) -> Callable[[], object]:
        code = _CODE.format(width=width, bits=sizes.bits, batch=batch, threads=sizes.threads, attacked=attacked)
        return partial(run_apart, code)

    many, few = min(sizes.batch, 50), min(sizes.batch, 10)
    yield Workload(
        name="memory",
        contenders=(
            Contender(name="import torch", run=partial(run_apart, "import torch"), apart=True),
            Contender(name=f"{name} clean, batches of {many}", run=run(many, attacked=False), apart=True),
            Contender(name=f"{name} attacked, batches of {few}", run=run(few, attacked=True), apart=True),
        ),
        warmup=0,
        most=2,
    )
