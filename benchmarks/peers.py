r"""Compare single attacks with those of AutoAttack and adv-lib at equal budget on a float network: an oracle.

    pip install pyautoattack --no-deps && python benchmarks/peers.py --json metrics.json

Each pair attacks the museum's float network on the 500 test digits. Without noise the libraries should break the same
images, up to those whose margin is a matter of random starts. adv-lib is asked where it is installed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bitquorum.attacks import APGD, FAB, APGDTargeted, Attack, Square
from bitquorum.data import load
from bitquorum.environment import environment
from bitquorum.foreign import Wrapped, wrap
from bitquorum.interface import ConfigError
from bitquorum.museum.exhibits import EPSILON, network
from bitquorum.peers import Scores, second_opinion

OURS: dict[str, Attack] = {
    "apgd-ce": APGD(steps=100),
    "apgd-dlr": APGD(steps=100, loss="dlr"),
    "apgd-t": APGDTargeted(steps=100, loss="dlr", targets=9),
    "fab-t": FAB(steps=100),
    "square": Square(queries=5000, fresh=False, pooling="mean-loss"),
}
ADV_LIB = {"apgd-ce": "adv-lib-apgd-ce", "apgd-dlr": "adv-lib-apgd-dlr", "apgd-t": "adv-lib-apgd-targeted"}


def autoattack(name: str, model: Wrapped, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return the images of one of AutoAttack's attacks, with one restart."""
    from pyautoattack import AutoAttack  # pyright: ignore[reportMissingImports]

    attack = AutoAttack(Scores(model).eval(), version="custom", attacks=[name], eps=EPSILON, seed=seed)
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    attack.apgd_targeted.n_restarts = 1
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 9
    return attack.run_standard_evaluation(images, labels, batch_size=250)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write rows and environment here")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    test = load("digits", "test")
    batch = test.batch(torch.arange(len(test)))
    images, labels = batch.images, batch.labels
    model = wrap(network(0), images, labels)
    if not isinstance(model, Wrapped):
        raise TypeError("expected a wrapped module")

    def right(found: Tensor) -> Tensor:
        with torch.no_grad():
            return model.predict(model(found.clamp(images - EPSILON, images + EPSILON).clamp(0, 1)))[0] == labels

    rows = []
    for name, ours in OURS.items():
        for seed in range(arguments.seeds):
            calls: dict[str, Callable[[], Tensor]] = {
                "bitquorum": lambda ours=ours, seed=seed: (
                    ours(model, images, labels, epsilon=EPSILON, seed=seed).images
                ),
                "autoattack": lambda name=name, seed=seed: autoattack(name, model, images, labels, seed),
            }
            if peer := ADV_LIB.get(name):
                calls["adv-lib"] = lambda peer=peer, seed=seed: (
                    second_opinion(peer, model, images, labels, epsilon=EPSILON, seed=seed).images
                )
            for library, call in calls.items():
                started = time.perf_counter()
                try:
                    left = right(call())
                except ConfigError as error:
                    print(f"{name}: left out {library}: {error}", file=sys.stderr)
                    continue
                seconds = time.perf_counter() - started
                row = {"attack": name, "library": library, "seed": seed, "images": len(labels), "epsilon": EPSILON}
                row |= {"accuracy": float(left.float().mean()), "seconds": round(seconds, 2)}
                rows.append(row)
                print(f"{name:9} {library:11} seed {seed}: {100 * row['accuracy']:.1f} %, {seconds:.1f} s", flush=True)
    if arguments.json:
        text = json.dumps({"environment": environment(), "rows": rows}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
