"""Compose the ladders that `bitquorum evaluate RUN --ladder` names: quick, standard and full."""

from bitquorum.attacks import (
    APGD,
    ARC,
    DIVA,
    FAB,
    FGSM,
    MORA,
    NES,
    PGD,
    SPSA,
    APGDTargeted,
    Attack,
    RandomNoise,
    Square,
    Transfer,
)
from bitquorum.evaluate.ladder import Ladder
from bitquorum.interface import ConfigError
from bitquorum.quantizers import Surrogate
from bitquorum.registry import nearest

STRAIGHT = Surrogate(backward="straight-through")
WIDE = Surrogate(backward="mean", width=2.0)
WIDER = Surrogate(backward="mean", width=4.0)
GUMBEL = Surrogate(backward="gumbel", temperature=0.5)


def quick() -> Ladder:
    """Return a ladder for development: every kind of rung.

    An image that stands to the end costs about 1,700 passes, forward and backward ones together, under noise and with
    three members and sources; about 1,300 without noise.
    """
    return Ladder(
        name="quick",
        claim=PGD(steps=20, eot=5),
        rungs=(
            PGD(steps=15, eot=5, loss="margin", pooling="mean-probability", momentum=0.75),
            APGD(steps=15, eot=5, loss="dlr"),
            APGDTargeted(steps=8, eot=8, targets=5, loss="margin", pooling="mean-probability", selection=8),
            Transfer(source="mean", attack=PGD(steps=10, loss="margin")),
            Transfer(source="*", attack=PGD(steps=10, loss="margin")),
            Square(queries=40, eot=4),
            RandomNoise(tries=4, draws=4),
        ),
        examples=200,
        draws=20,
        check_images=16,
    )


def standard() -> Ladder:
    """Return the ladder to quote.

    An image that stands to the end costs about 4,900 passes, forward and backward ones together, under noise and with
    three members and sources; about 2,500 without noise. Most images fall early.
    """
    return Ladder(
        name="standard",
        claim=PGD(steps=20, eot=10),
        rungs=(
            FGSM(),
            PGD(steps=20, eot=10, loss="margin", pooling="mean-probability", momentum=0.75),
            PGD(steps=10, eot=10, loss="scaled-cross-entropy", pooling="mean-logits"),
            PGD(steps=10, eot=10, loss="margin", surrogate=STRAIGHT),
            PGD(steps=10, eot=10, loss="margin", surrogate=WIDE),
            PGD(steps=10, eot=10, pooling="least-member-loss"),
            APGD(steps=20, eot=10, loss="dlr"),
            APGDTargeted(steps=12, eot=8, targets=5, loss="margin", pooling="mean-probability"),
            ARC(steps=5, eot=4),
            MORA(steps=10, eot=8),
            FAB(steps=10, eot=4, targets=5),
            *_transfers(PGD(steps=20, loss="margin")),
            Square(queries=50, eot=4),
            SPSA(steps=5, directions=8, eot=2),
            RandomNoise(tries=8, draws=8),
        ),
    )


def full() -> Ladder:
    """Return every rung of the evaluation standard, at budgets for a GPU and for results that are published.

    An image that stands to the end costs about 80,000 passes under noise, 35,000 without.
    """
    return Ladder(
        name="full",
        claim=PGD(steps=40, eot=10),
        rungs=(
            FGSM(),
            PGD(steps=20),
            PGD(steps=100, restarts=2),
            *(PGD(steps=40, eot=eot) for eot in (5, 20, 50)),
            PGD(steps=40, eot=20, pooling="mean-probability"),
            PGD(steps=40, eot=20, loss="margin", pooling="mean-probability", momentum=0.75),
            PGD(steps=40, eot=20, loss="margin", pooling="mean-logits", common=True),
            *_poolings(),
            *(PGD(steps=20, eot=20, loss="margin", surrogate=choice) for choice in (STRAIGHT, WIDE, WIDER, GUMBEL)),
            PGD(steps=20, eot=20, loss="scaled-cross-entropy", pooling="mean-logits"),
            ARC(steps=20, eot=10),
            MORA(steps=40, eot=10),
            APGD(steps=100, eot=20),
            APGD(steps=100, eot=20, loss="dlr"),
            APGDTargeted(steps=50, eot=20),
            FAB(steps=30, eot=10, targets=9),
            *_transfers(APGD(steps=50, loss="margin")),
            DIVA(steps=20, eot=10),
            Square(queries=1000, eot=10),
            SPSA(steps=20, directions=32, eot=2),
            NES(steps=20, directions=32, eot=2),
            RandomNoise(tries=50, draws=10),
        ),
        examples=1000,
        draws=100,
        check_images=64,
    )


LADDERS = {"quick": quick, "standard": standard, "full": full}


def ladder_named(name: str) -> Ladder:
    """Return the ladder of a name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in LADDERS:
        raise ConfigError(f"expected a ladder among {', '.join(LADDERS)}, got {name!r}; {nearest(name, LADDERS)}")
    return LADDERS[name]()


def _transfers(attack: Attack) -> list[Attack]:
    return [Transfer(source=source, attack=attack) for source in ("nearest", "mean", "float", "*")]


def _poolings() -> list[Attack]:
    return [
        PGD(steps=20, eot=20, pooling=pooling) for pooling in ("mean-logits", "mean-member-loss", "least-member-loss")
    ]
