"""Climb the ladder with any module that classifies images in [0, 1]."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitquorum.attacks import PGD, Attack, Transfer
from bitquorum.attacks.base import check_inputs
from bitquorum.evaluate.climbs import mark_of, read_climb, write_climb
from bitquorum.evaluate.ladder import Arena, Climb, Examples, Ladder, check_sources
from bitquorum.evaluate.presets import ladder_named
from bitquorum.evaluate.selfchecks import Verdict, run_checks
from bitquorum.files import atomic_write
from bitquorum.foreign import Finding, Wrapped, wrap
from bitquorum.geometry import Norm
from bitquorum.interface import InputError, Listener, Model

_OWN: Final = "own gradient"
_OUTCOMES: Final = {True: "passed", False: "FAILED", None: "not posed"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Hold what the ladder left of a model, and whether that may be believed.

    Attributes:
        climb: Steps, worst adversarial images, and which draws of them are right.
        verdicts: Of the self-checks.
        findings: What was noticed about the model, and how the evaluation adapted.
        tries: Number of tries of the worst-of accuracy.
        seconds: That the climb took in this call, without inspection and self-checks.
    """

    climb: Climb
    verdicts: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    tries: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no self-check failed; one that could not be posed has not."""
        return all(verdict.passed is not False for verdict in self.verdicts)

    def __str__(self) -> str:
        """Return the bracket, what each rung broke, findings and verdicts as text."""
        climb, worst = self.climb, self.climb.worst
        lines = [
            f"clean                       {climb.clean.text()}",
            f"claim as worded             {climb.claimed.text()}   {climb.steps[1].rung}",
            f"worst case over the ladder  {worst.text()}   {worst.images} images, {worst.draws} draws",
            f"worst of {self.tries} tries            {100 * climb.worst_of(self.tries):.1f} %",
        ]
        lines += [f"broken by {step.rung}: {step.broke} of {step.attacked}" for step in climb.steps[1:] if step.broke]
        lines += [f"found: {finding.text}" for finding in self.findings]
        lines += [f"self-check {v.name}: {_OUTCOMES[v.passed]}; {v.reason}" for v in self.verdicts]
        return "\n".join(lines)


def evaluate_model(
    model: nn.Module,
    images: Float[Tensor, "images *image"],
    labels: Int[Tensor, "images"],
    *,
    epsilon: float,
    ladder: str | Ladder = "standard",
    norm: Norm | None = None,
    sources: Mapping[str, nn.Module] | None = None,
    seed: int | None = None,
    kept: Path | str | None = None,
    listener: Listener | None = None,
) -> Report:
    """Climb the ladder with a model that is ours or anybody's.

    A foreign model is inspected first (`foreign.wrap`): one that is random, in training mode, without gradients or that
    returns probabilities is adapted to, or refused with a reason. Where its own gradients are zero, or lead less far
    than relaxed ones in a short trial, attacks see it with relaxed derivatives (`relax`), and in the latter case the
    white-box rungs are climbed once more by its own. Elsewhere a relaxed copy is a source of transfer attacks.

    Args:
        model: From images to logits `[images, classes]`; an `Ensemble` or any module.
        images: In [0, 1], on the model's device; normalization belongs into the model.
        labels: True classes.
        epsilon: Radius, in units of the image.
        ladder: `quick`, `standard`, `full`, or a ladder of your own; all given images are used.
        norm: `linf` or `l2`, in place of the ladder's.
        sources: Other modules that the attacker holds, such as members or an undefended twin, by name.
        seed: Of attacks and draws, in place of the ladder's.
        kept: File (safetensors) in which the climb is kept after every rung; the same call goes on from there.
        listener: Hears of progress, such as `Printed()`.

    Raises:
        InputError: for bad images or labels, a model that cannot be judged, a file that cannot be written, or inside of
            `torch.inference_mode`; the message says why.
        DataError: if the file is corrupt, or keeps the climb of another model, of other images or another ladder.

    Examples:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> report = evaluate_model(network, torch.rand(8, 1, 4, 4), torch.arange(8) % 3, epsilon=0.1, ladder="quick")
        >>> report.climb.worst.value <= report.climb.clean.value
        True
    """
    chosen = ladder_named(ladder) if isinstance(ladder, str) else ladder
    check_inputs(images, labels, epsilon, norm or chosen.norm)
    chosen = replace(chosen, epsilons=(epsilon,), examples=0, norm=norm or chosen.norm)
    chosen = chosen if seed is None else replace(chosen, seed=seed)
    if not len(images):
        raise InputError("expected at least one image, got none")
    check_sources(sources or ())
    wrapped = wrap(model, images, labels)
    held: dict[str, Model] = {name: wrap(source, images, labels) for name, source in (sources or {}).items()}
    examples = Examples(images=images, labels=labels, index=torch.arange(len(labels), device=labels.device))
    shown: Model = wrapped
    findings: tuple[Finding, ...] = ()
    if isinstance(wrapped, Wrapped):
        relaxed, findings = wrapped.relaxed_copy(), wrapped.findings
        masked = None if wrapped.needs_relaxing else _masked(wrapped, relaxed, examples, chosen, epsilon)
        if wrapped.needs_relaxing or masked:
            shown = relaxed
        if masked:
            findings += (masked,)
            chosen = replace(chosen, rungs=(*chosen.rungs, *_by_own_gradients(chosen)))
            held = {_OWN: wrapped, **held}
        else:
            held = {"relaxed copy": relaxed, **held}
    listener = listener or Listener()
    listener.begin(f"ladder {chosen.name}", 0)
    before, on_step = _keeping(kept, [wrapped, *held.values()], examples, chosen)
    started = time.monotonic()
    climb = chosen(
        wrapped,
        examples,
        epsilon=epsilon,
        sources=held,
        shown=shown,
        climb=before,
        on_step=on_step,
        listener=listener,
    )
    seconds = time.monotonic() - started
    listener.end()
    verdicts: list[Verdict] = []
    if chosen.check_images:
        listener.begin("self-checks", 0)
        verdicts = run_checks(wrapped, examples, chosen, climb, sources=held, shown=shown, listener=listener)
        listener.end()
    return Report(climb=climb, verdicts=tuple(verdicts), findings=findings, tries=chosen.tries, seconds=seconds)


def _keeping(
    kept: Path | str | None, models: Sequence[Model], examples: Examples, ladder: Ladder
) -> tuple[Climb | None, Callable[[Climb], None] | None]:
    """Return the climb that a file keeps, or `None`, and what keeps a later one there."""
    if kept is None:
        return None, None
    path = Path(kept)
    mark = mark_of([model for model in models if isinstance(model, nn.Module)], examples, ladder)
    before = read_climb(path, examples.images.device, mark=mark)[0] if path.exists() else None
    if before is None:  # find out now, not when hours of work are to be kept
        try:
            atomic_write(path, b"")
            path.unlink()
        except OSError as error:
            raise InputError(f"expected a file that can be written at {path}, got: {error.strerror}") from error
    return before, lambda climb: write_climb(path, climb, examples, mark=mark)


def _by_own_gradients(ladder: Ladder) -> list[Attack]:
    """Return the white-box rungs once more, as the model's own gradients lead them."""
    rungs = [rung for rung in (ladder.claim, *ladder.rungs) if rung.kind == "white-box" and not hasattr(rung, "source")]
    return [Transfer(source=_OWN, attack=rung) for rung in rungs]


def _masked(model: Wrapped, relaxed: Wrapped, examples: Examples, ladder: Ladder, epsilon: float) -> Finding | None:
    """Return a finding if a short attack with relaxed derivatives goes further than one with the model's own."""
    few = slice(0, 64)
    chosen = Examples(images=examples.images[few], labels=examples.labels[few], index=examples.index[few])
    left = []
    everyone = torch.arange(len(chosen.labels), device=chosen.labels.device)
    for shown in (model, relaxed):
        arena = Arena(model=model, shown=shown, examples=chosen, ladder=ladder, sources={})
        attack = PGD(steps=10, eot=4 if model.stochastic else 1, loss="margin", pooling="mean-probability")
        found, _ = arena.attack(attack, everyone, epsilon)
        left.append(float(arena.judge(found, everyone).float().mean()))
    if left[0] - left[1] < 0.05:
        return None
    text = (
        f"a short attack leaves {100 * left[0]:.0f} % by the model's own gradients and {100 * left[1]:.0f} % by "
        "relaxed ones; attacks see relaxed derivatives"
    )
    return Finding(name="masked-gradient", text=text)
