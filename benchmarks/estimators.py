r"""Hold every estimator of mutual information against laws whose MI is known.

    OMP_NUM_THREADS=1 python benchmarks/estimators.py --json metrics.json

Three families: `codes` (pairs of integers), `votes` (several draws for an example, and MI given the label) and
`features` (continuous vectors). A row states mean, bias and spread over fresh samples, in bits, and the CPU seconds
of one estimate.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from bitquorum import information as info
from bitquorum.environment import environment
from bitquorum.information import Estimate
from bitquorum.report import Table

Row = dict[str, Any]
Pair = tuple[Tensor, Tensor]

CODES: dict[str, info.Estimator] = {
    "plug-in": info.PlugIn(correction="none"),
    "Miller-Madow": info.PlugIn(),
    "jackknife": info.PlugIn(correction="jackknife"),
    "Shrinkage": info.Shrinkage(),
    "NSB": info.NSB(),
}
FEATURES: dict[str, info.Estimator] = {
    "KSG": info.KSG(),
    "InfoNCE": info.InfoNCE(),
    "SMILE": info.SMILE(),
    "CLUB": info.CLUB(),
    "RenyiMI 2": info.RenyiMI(),
    "RenyiMI 1.01": info.RenyiMI(alpha=1.01),
}
CLASSES, DRAWS = 10, 10


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tables() -> dict[str, Tensor]:
    """Return joint tables, by the name of their law."""
    random = torch.rand(4, 4, generator=generator(0), dtype=torch.float64) ** 3
    confused = 0.8 * torch.eye(CLASSES, dtype=torch.float64)
    confused += 0.1 * (confused.roll(1, 1) + confused.roll(1, 0)) / 0.8
    return {
        **{
            f"independent errors, accuracy {accuracy}": info.independent_error_joint(accuracy, CLASSES)
            for accuracy in (0.95, 0.9, 0.7, 0.5)
        },
        "neighbouring classes confused": confused / confused.sum(),
        "copy of 10 classes": torch.eye(CLASSES, dtype=torch.float64) / CLASSES,
        "random 4 x 4": random / random.sum(),
        "binary symmetric channel, 0.11": info.binary_symmetric_channel(0.11),
    }


def codes(table: Tensor, count: int, seed: int) -> Pair:
    cells = table.flatten().multinomial(count, replacement=True, generator=generator(seed))
    return cells // table.shape[1], cells % table.shape[1]


def cubes(x: Tensor) -> Tensor:
    return x**3


def vectors(bits: float, width: int, change: Callable[[Tensor], Tensor], count: int, seed: int) -> Pair:
    a, b = info.correlated_gaussians(bits, width, width, samples=count, generator=generator(seed))
    return change(a), change(b)


def spirals(x: Tensor) -> Tensor:
    """Turn the first two coordinates by an angle that grows with their radius, which leaves MI as it is."""
    angle = 2 * x[:, :2].norm(dim=1)
    turned = torch.stack([angle.cos() * x[:, 0] - angle.sin() * x[:, 1], angle.sin() * x[:, 0] + angle.cos() * x[:, 1]])
    return torch.cat([turned.T, x[:, 2:]], 1)


def votes(accuracy: float, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the label, and the votes of 10 draws of two members that err independently of each other and anew."""
    chance = generator(seed)
    label = torch.randint(CLASSES, (count,), generator=chance)
    rows = (info.symmetric_channel(accuracy, CLASSES) * CLASSES)[label]
    first, second = (rows.multinomial(DRAWS, replacement=True, generator=chance) for _ in range(2))
    return label, first, second


def shared_errors(accuracy: float, share: float) -> Tensor:
    """Tabulate label and two members of which the second repeats the first with probability `share`."""
    channel = info.symmetric_channel(accuracy, CLASSES)
    independent = CLASSES * channel[:, :, None] * channel[:, None, :]
    return share * torch.diag_embed(channel) + (1 - share) * independent


def measure(
    family: str, law: str, truth: float, name: str, count: int, calls: Sequence[Callable[[], Estimate | float]]
) -> Row:
    """Return the row of one estimator on one law, from as many samples as there are calls."""
    started = time.process_time()
    found = [call() for call in calls]
    seconds = (time.process_time() - started) / len(calls)
    values = [part.value if isinstance(part, Estimate) else part for part in found]
    errors = [part.standard_error for part in found if isinstance(part, Estimate)]
    row: Row = {"family": family, "law": law, "truth": truth, "estimator": name, "n": count, "seeds": len(calls)}
    row |= {"mean": fmean(values), "bias": fmean(values) - truth, "spread": stdev(values)}
    row |= {"standard_error": fmean(errors) if errors else None, "seconds": round(seconds, 4)}
    print(f"{law} n={count} {name}: {row['mean']:.3f} of {truth:.3f}, {row['spread']:.3f}, {seconds:.2f} s", flush=True)
    return row


def code_rows(seeds: int) -> list[Row]:
    rows = []
    for law, table in tables().items():
        truth = float(info.mutual_information(table))
        for count in (300, 1000, 5000):
            samples = [codes(table, count, seed) for seed in range(seeds)]
            for name, estimator in CODES.items():
                calls = [lambda pair=pair, estimator=estimator: estimator(*pair) for pair in samples]
                rows.append(measure("codes", law, truth, name, count, calls))
    return rows


def pooled(accuracy: float, count: int, seed: int) -> Tensor:
    """Return the table [y, a, b] of each example, from the votes of all draws of both members."""
    label, *draws = votes(accuracy, count, seed)
    eye = torch.eye(CLASSES)
    first, second = (eye[draw].mean(1) for draw in draws)
    return eye[label][:, :, None, None] * first[:, None, :, None] * second[:, None, None, :]


def vote_rows(seeds: int) -> list[Row]:
    """Return rows of several draws an example; Miller-Madow and NSB take codes, hence the first draw alone."""
    rows = []
    for accuracy in (0.9, 0.5):
        law = f"votes of {DRAWS} draws, accuracy {accuracy}"
        truth = info.independent_error_information(accuracy, CLASSES)
        for count in (300, 1000):
            drawn = [votes(accuracy, count, seed)[1:] for seed in range(seeds)]
            tables = [pooled(accuracy, count, seed).sum(1) for seed in range(seeds)]
            calls: dict[str, list[Callable[[], Estimate | float]]] = {
                "plug-in": [lambda t=t: float(info.mutual_information(t.mean(0))) for t in tables],
                "jackknife": [lambda t=t: info.jackknife(t, info.mutual_information) for t in tables],
                "Miller-Madow": [lambda d=d: info.PlugIn()(d[0][:, 0], d[1][:, 0]) for d in drawn],
                "NSB": [lambda d=d: info.NSB()(d[0][:, 0], d[1][:, 0]) for d in drawn],
            }
            rows += [measure("votes", law, truth, name, count, found) for name, found in calls.items()]
    return rows


def conditional_rows(seeds: int) -> list[Row]:
    """Return rows of the MI given the label, from one draw and from the votes of several."""
    rows = []
    for share in (0.0, 0.5):
        table = shared_errors(0.7, share)
        law = f"given the label, accuracy 0.7, {share:.0%} repeated"
        truth = abs(float(info.conditional_mutual_information(table)))
        for count in (300, 1000):
            drawn = [triples(table, count, seed) for seed in range(seeds)]
            calls: dict[str, list[Callable[[], Estimate | float]]] = {
                name: [lambda d=d, name=name: info.conditional(CODES[name], *d) for d in drawn]
                for name in ("plug-in", "Miller-Madow", "NSB")
            }
            calls["jackknife"] = [
                lambda d=d: info.jackknife(hot(*d), info.conditional_mutual_information) for d in drawn
            ]
            rows += [measure("votes", law, truth, name, count, found) for name, found in calls.items()]
    law, measured = f"given the label, votes of {DRAWS} draws, accuracy 0.7", info.conditional_mutual_information
    for count in (300, 1000):
        tables = [pooled(0.7, count, seed) for seed in range(seeds)]
        calls = {
            "plug-in": [lambda t=t: float(measured(t.mean(0))) for t in tables],
            "jackknife": [lambda t=t: info.jackknife(t, measured) for t in tables],
        }
        rows += [measure("votes", law, 0.0, name, count, found) for name, found in calls.items()]
    return rows


def triples(table: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes a, b and y of a table [y, a, b]."""
    cells = table.flatten().multinomial(count, replacement=True, generator=generator(seed))
    return cells // CLASSES % CLASSES, cells % CLASSES, cells // CLASSES**2


def hot(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    cells = (y * CLASSES + a) * CLASSES + b
    return torch.nn.functional.one_hot(cells, CLASSES**3).float().view(-1, CLASSES, CLASSES, CLASSES)


def feature_rows(seeds: int) -> list[Row]:
    rows = []
    for law, bits, width, change in (
        ("Gaussian, 1 + 1", 1.0, 1, torch.clone),
        ("Gaussian, 5 + 5, independent", 0.0, 5, torch.clone),
        ("Gaussian, 5 + 5", 2.0, 5, torch.clone),
        ("its cubes, 5 + 5", 2.0, 5, cubes),
        ("its spirals, 5 + 5", 2.0, 5, spirals),
        ("Gaussian, 20 + 20", 6.43, 20, torch.clone),
    ):
        for count in (500, 2000):
            samples = [vectors(bits, width, change, count, seed) for seed in range(seeds)]
            for name, estimator in FEATURES.items():
                if name == "RenyiMI 1.01" and count > 500:
                    continue  # eigenvalues of 2,000 x 2,000 would take most of the time of the benchmark
                calls = [lambda pair=pair, estimator=estimator: estimator(*pair) for pair in samples]
                rows.append(measure("features", law, bits, name, count, calls))
    return rows


def render(rows: Sequence[Row], family: str) -> Table:
    """Lay out the rows of a family: bias and spread of tables, mean and spread of features, in bits."""
    chosen = [row for row in rows if row["family"] == family]
    names = list(dict.fromkeys(row["estimator"] for row in chosen))
    cells = {(row["law"], row["n"], row["estimator"]): row for row in chosen}
    lines = []
    for law, count in dict.fromkeys((row["law"], row["n"]) for row in chosen):
        found = [cells.get((law, count, name)) for name in names]
        truth = next(row["truth"] for row in found if row)
        shown = [_cell(row, family) if row else "-" for row in found]
        lines.append((law, f"{truth:.{2 if family == 'features' else 3}f}", f"{count:,}", *shown))
    seeds = sorted({row["seeds"] for row in chosen})
    note = f"bits; {' or '.join(map(str, seeds))} samples each"
    return Table(header=("law", "MI", "N", *names), rows=tuple(lines), note=note)


def _cell(row: Row, family: str) -> str:
    if family == "features":
        return f"{round(row['mean'], 2) + 0.0:.2f} ± {row['spread']:.2f}"
    return f"{round(row['bias'], 3) + 0.0:+.3f} ± {row['spread']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write rows and environment here")
    parser.add_argument(
        "--seeds", type=int, default=5, help="samples of a law of features; four times as many of codes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    discrete = 4 * arguments.seeds
    rows = code_rows(discrete) + vote_rows(discrete) + conditional_rows(discrete) + feature_rows(arguments.seeds)
    if arguments.json:
        text = json.dumps({"environment": environment(), "rows": rows}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    for family in ("codes", "votes", "features"):
        print(f"\n{render(rows, family).markdown()}")


if __name__ == "__main__":
    main()
