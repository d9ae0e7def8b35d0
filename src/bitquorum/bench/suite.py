"""Describe a comparison of defences: what they share, which they are, how they are attacked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

from bitquorum.baselines import Baseline, FloatEnsemble, Setting
from bitquorum.config import DataChoice, Experiment, table_of
from bitquorum.detect.detection import LEAST_CALIBRATION
from bitquorum.evaluate import Evaluation, Ladder, ladder_named
from bitquorum.evaluate.ladder import check_sources
from bitquorum.interface import ConfigError, InputError, Method
from bitquorum.registry import apply_overrides, decode, nearest


@final
@dataclass(frozen=True, kw_only=True)
class Entry(Method):
    """Describe one row under one seed: all that decides its result, and nothing else.

    Its digest is the key of the cache, so that suites share entries.

    Attributes:
        title: Name of the row.
        adversarial: Whether adversarial images enter the training.
        experiment: Of one arm.
        sources: Experiments of one arm each, whose networks the attacker holds for transfer.
        ladder: What is climbed.
        calibration: Number of held-out images that set the detector's threshold.
    """

    title: str
    adversarial: bool
    experiment: Experiment
    sources: tuple[Experiment, ...]
    ladder: Ladder
    calibration: int


@final
@dataclass(frozen=True, kw_only=True)
class Suite(Method):
    """Compare defences: the same network, data, augmentation, epochs and seeds, and the same ladder.

    Attributes:
        name: Of the suite.
        seeds: Of initial weights, order, augmentation and noise; every row is trained under each of them.
        kernels: `eager` or `compiled`; see `Experiment`.
        data: Images.
        setting: What the rows share; its epsilon is that of the ladder.
        baselines: One for each row, with different titles.
        reference: Title of the row that the others are compared with.
        sources: Defences whose networks, trained under a seed of their own, the attacker holds for transfer.
        source_seed: That seed.
        ladder: `quick`, `standard` or `full`.
        examples: Number of test images.
        draws: Number of judging draws.
        calibration: Number of held-out test images that set the detector's threshold, at least 100.
    """

    name: str
    seeds: tuple[int, ...] = (0,)
    kernels: Literal["eager", "compiled"] = "eager"
    data: DataChoice = field(default_factory=DataChoice)
    setting: Setting = field(default_factory=Setting)
    baselines: tuple[Baseline, ...]
    reference: str = ""
    sources: tuple[Baseline, ...] = (FloatEnsemble(),)
    source_seed: int = 1000
    ladder: str = "standard"
    examples: int = 500
    draws: int = 50
    calibration: int = 500

    def __post_init__(self) -> None:
        titles = self.titles
        if not titles or len(set(titles)) != len(titles):
            raise InputError(f"expected at least one baseline and different titles, got {titles}; give each a name")
        held = [source.title for source in self.sources]
        if len(set(held)) != len(held):
            raise InputError(f"expected sources of different titles, got {held}; give each a name")
        check_sources(held)
        if self.reference and self.reference not in titles:
            raise InputError(
                f"expected a reference among the rows, got {self.reference!r}; {nearest(self.reference, titles)}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or self.source_seed in self.seeds:
            raise InputError(
                f"expected at least one seed, all different and none of them that of the sources, got {self.seeds} and "
                f"{self.source_seed}"
            )
        if self.calibration < LEAST_CALIBRATION:
            raise InputError(
                f"expected at least {LEAST_CALIBRATION} held-out images for the detector, got {self.calibration}"
            )
        ladder_named(self.ladder)

    @property
    def titles(self) -> list[str]:
        """Names of the rows in order."""
        return [baseline.title for baseline in self.baselines]

    def entries(self, only: Sequence[str] = ()) -> list[Entry]:
        """Return the entries of the rows, all of them by default, seed by seed.

        Raises:
            ConfigError: if there is no row of a name.
        """
        for name in only:
            if name not in self.titles:
                raise ConfigError(
                    f"expected a row among {', '.join(self.titles)}, got {name!r}; {nearest(name, self.titles)}"
                )
        sources = tuple(self._experiment(source, self.source_seed) for source in self.sources)
        ladder = replace(
            ladder_named(self.ladder), epsilons=(self.setting.epsilon,), examples=self.examples, draws=self.draws
        )
        return [
            Entry(
                title=baseline.title,
                adversarial=baseline.adversarial,
                experiment=self._experiment(baseline, seed),
                sources=sources,
                ladder=ladder,
                calibration=self.calibration,
            )
            for seed in self.seeds
            for baseline in self.baselines
            if not only or baseline.title in only
        ]

    def _experiment(self, baseline: Baseline, seed: int) -> Experiment:
        return Experiment(
            name=baseline.title,
            seed=seed,
            kernels=self.kernels,
            data=self.data,
            trainer=self.setting.trainer,
            evaluation=Evaluation(attacks=()),  # the ladder attacks; a training is then the same for all suites
            arms=(baseline(self.setting),),
        )


def read_suite(source: str, overrides: Sequence[str] = ()) -> Suite:
    """Return the suite of a name or a TOML file's path, with dotted overrides.

    Raises:
        ConfigError: if there is no such suite or file, the file is no TOML, or a key or value is not understood.

    Examples:
        >>> read_suite("digits", ["seeds=[5]"]).seeds
        (5,)
    """
    return decode(Suite, apply_overrides(table_of(source, "suite"), list(overrides)))
