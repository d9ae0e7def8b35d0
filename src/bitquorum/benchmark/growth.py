"""Show how cost grows with members, bits, draws and images, one at a time."""

from collections.abc import Iterator
from dataclasses import replace

from bitquorum.benchmark.attack import attack_on_noise
from bitquorum.benchmark.timing import Contender, Sizes, Workload
from bitquorum.benchmark.training import training_step
from bitquorum.quantizers import Logistic, SmoothRounding


def growth(sizes: Sizes) -> Iterator[Workload]:
    """Yield a training step with penalty by members, bits and batch, and an attack by draws a step."""

    def step(name: str, changed: Sizes, *, logistic: bool = False, members: int = 1) -> Contender:
        law = Logistic() if logistic else SmoothRounding()
        return training_step(name, changed, law, penalty=True, members=members)

    members = tuple(step(f"M = {count}", sizes, members=count) for count in sizes.members)
    yield Workload(name="growth with members", contenders=members)
    bits = tuple(step(f"{count} bits, Logistic", replace(sizes, bits=count), logistic=True) for count in (2, 3, 4, 8))
    yield Workload(name="growth with bits", contenders=bits)
    batches = sorted({max(2, sizes.batch // part) for part in (8, 4, 2, 1)})
    images = tuple(step(f"batches of {count}", replace(sizes, batch=count)) for count in batches)
    yield Workload(name="growth with the batch", contenders=images)
    few = replace(sizes, batch=max(2, sizes.batch // 4))
    draws = tuple(attack_on_noise(f"PGD-{few.steps}, EOT {count}", few, eot=count) for count in (1, 2, 4, 8))
    yield Workload(name="growth with draws", contenders=draws)
