"""Test that training learns, repeats itself to the bit, survives kills and agrees over processes."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import PGD
from bitquorum.conversion import Policy
from bitquorum.data import Augment, ImageSet
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Evaluation
from bitquorum.files import load_tensors, read_jsonl, save_tensors
from bitquorum.interface import DataError, InputError, NoEffectWarning
from bitquorum.objective import (
    ConditionalMI,
    EnsembleCrossEntropy,
    FeatureMI,
    InputGradient,
    MemberCrossEntropy,
    Objective,
    OutputMI,
    Step,
    Term,
    Trades,
)
from bitquorum.quantizers import Deterministic
from bitquorum.train import DivergedError, Progress, Trainer

TRAINER = Trainer(
    epochs=3,
    batch_size=16,
    lr=0.05,
    ema=0.9,
    clip=5.0,
    augment=Augment(crop=1, brightness=0.1, cutmix=0.3),
    precision="float32",
    calibration=32,
    log_every=2,
)
OBJECTIVE = Objective(
    terms=(
        MemberCrossEntropy(),
        EnsembleCrossEntropy(),
        FeatureMI(weight=0.1, warmup=0.3),
        ConditionalMI(weight=0.1),
        InputGradient(),
    )
)


def toy(count: int = 64, classes: int = 3) -> ImageSet:
    """Return noisy copies of one random pattern per class."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, 1, 6, 6, generator=generator)
    labels = torch.arange(count) % classes
    noise = torch.randn(count, 1, 6, 6, generator=generator)
    return ImageSet(
        name="toy",
        split="train",
        images=(255 * (patterns[labels] + 0.15 * noise).clamp(0, 1)).to(torch.uint8),
        labels=labels,
        classes=tuple(map(str, range(classes))),
        index=torch.arange(count),
    )


def members(*, norm: bool = True, bits: int = 3) -> Ensemble:
    with rng.torch_seed(5):
        networks = [
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.BatchNorm2d(4) if norm else nn.Identity(),
                nn.ReLU(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(36, 3),
            )
            for _ in range(2)
        ]
    return Ensemble.build(networks, [Policy(weight_bits=bits, activation_bits=bits)] * 2)


Rows = list[dict[str, Any]]


def logger(rows: Rows) -> Callable[[Progress], None]:
    return lambda progress: rows.append({"step": progress.step, **progress.values})


def fit(trainer: Trainer = TRAINER, objective: Objective = OBJECTIVE, **options: Any) -> tuple[dict[str, Tensor], Rows]:
    rows: Rows = []
    ensemble = trainer(members(), toy(), objective, report=logger(rows), **options)
    return ensemble.state_dict(), rows


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, Tensor], Rows]:
    return fit()


# Learning and repeating


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adamw", "adam"])
def test_the_loss_falls_and_the_images_are_learned(optimizer: Any):
    rows: Rows = []
    lr = {"sgd": 0.1, "muon": 0.05}.get(optimizer, 0.04)
    trainer = Trainer(epochs=8, batch_size=16, optimizer=optimizer, lr=lr, precision="float32", log_every=4)
    data = toy()
    ensemble = trainer(members(), data, Objective(), report=logger(rows))
    assert [row["step"] for row in rows] == list(range(4, 33, 4))
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    batch = data.batch(torch.arange(len(data)))
    with rng.draw(0, batch.examples), torch.no_grad():
        right = ensemble.predict(ensemble(batch.images))[0] == batch.labels
    assert right.float().mean() > 0.95
    assert not ensemble.training


@pytest.mark.long
def test_one_seed_gives_one_result(uninterrupted: tuple[dict[str, Tensor], Rows]):
    state = torch.random.get_rng_state()
    weights, rows = fit()
    assert identical(weights, uninterrupted[0])
    assert rows == uninterrupted[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    other, other_rows = fit(seed=1)
    assert not identical(other, weights)
    assert other_rows != rows


def test_reports(uninterrupted: tuple[dict[str, Tensor], Rows]):
    _, rows = uninterrupted
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    names = {"step", "loss", "lr", *(type(term).__name__ for term in OBJECTIVE.terms)}
    assert [set(row) for row in rows] == [names] * 6
    seen: list[Progress] = []
    replace(TRAINER, epochs=1, log_every=3)(members(), toy(), OBJECTIVE, report=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(3, 4), (4, 4)]
    assert seen[0].seconds_left > 0
    assert seen[1].seconds_left == 0


def test_a_reported_number_is_the_mean_over_the_steps_that_computed_it():
    """The first step of a warm-up has weight zero, so its term is computed from the second step on."""
    objective = Objective(terms=(MemberCrossEntropy(), FeatureMI(weight=0.1, warmup=0.5)))
    trainer = replace(TRAINER, epochs=1)
    _, each = fit(replace(trainer, log_every=1), objective)
    _, pairs = fit(trainer, objective)
    assert "FeatureMI" not in each[0]
    assert pairs[0]["FeatureMI"] == each[1]["FeatureMI"]
    for name in ("loss", "MemberCrossEntropy", "lr"):
        assert pairs[0][name] == pytest.approx((each[0][name] + each[1][name]) / 2)


def test_a_step_in_which_every_term_waits_changes_nothing():
    objective = Objective(terms=(FeatureMI(warmup=1.0),))
    trainer = replace(TRAINER, epochs=1, ema=0.0, calibration=0, weight_decay=0.0)
    before = {name: value.clone() for name, value in members().state_dict().items()}
    after: list[dict[str, Tensor]] = []
    ensemble = members()

    def look(_: Progress) -> None:
        after.append({name: value.clone() for name, value in ensemble.state_dict().items()})

    replace(trainer, log_every=1)(ensemble, toy(), objective, report=look)
    assert identical(after[0], before)
    assert not identical(after[1], before)


# Interruption


class InterruptionError(Exception):
    """Stop a training from outside."""


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adamw"])
@pytest.mark.parametrize("stop", [4, 7])
def test_an_interrupted_training_resumes_to_the_same_bits(tmp_path: Path, stop: int, optimizer: Any):
    trainer = replace(TRAINER, checkpoint_seconds=0.0, log_every=1, optimizer=optimizer)
    whole, rows = fit(trainer)
    path, kept = tmp_path / "deep" / "checkpoint.safetensors", []

    def interrupt(progress: Progress) -> None:
        if progress.step == stop:
            raise InterruptionError
        logger(kept)(progress)

    with pytest.raises(InterruptionError):
        trainer(members(), toy(), OBJECTIVE, checkpoint=path, report=interrupt)
    assert len(kept) == stop - 1
    with rng.torch_seed(stop):  # other first weights: all must come from the checkpoint
        ensemble = members()
        for parameter in ensemble.parameters():
            parameter.data.normal_()
    trainer(ensemble, toy(), OBJECTIVE, checkpoint=path, report=logger(kept))
    assert identical(ensemble.state_dict(), whole)
    assert kept == rows


@pytest.mark.long
def test_dropout_is_resumed_to_the_same_bits_and_leaves_the_generator_alone(tmp_path: Path):
    def network() -> Ensemble:
        ensemble = members()
        ensemble.members[0].insert(5, nn.Dropout(0.5))
        return ensemble

    trainer = replace(TRAINER, checkpoint_seconds=0.0, log_every=1)
    state = torch.get_rng_state()
    whole = trainer(network(), toy(), OBJECTIVE).state_dict()
    assert torch.equal(torch.get_rng_state(), state)

    def interrupt(progress: Progress) -> None:
        if progress.step == 5:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        trainer(network(), toy(), OBJECTIVE, checkpoint=tmp_path / "checkpoint", report=interrupt)
    torch.rand(7)
    ensemble = network()
    trainer(ensemble, toy(), OBJECTIVE, checkpoint=tmp_path / "checkpoint")
    assert identical(ensemble.state_dict(), whole)
    assert not identical(trainer(network(), toy(), OBJECTIVE, seed=1).state_dict(), whole)


def test_a_checkpoint_of_other_settings_images_or_objective_is_refused(tmp_path: Path):
    path = tmp_path / "checkpoint"
    TRAINER(members(), toy(), OBJECTIVE, checkpoint=str(path), seed=np.int64(1))
    before = path.read_bytes()
    other = Objective(terms=(MemberCrossEntropy(),))
    for trainer, data, objective in (
        (replace(TRAINER, lr=0.01), toy(), OBJECTIVE),
        (TRAINER, replace(toy(), labels=toy().labels.flip(0)), OBJECTIVE),
        (TRAINER, toy(), other),
    ):
        with pytest.raises(InputError, match=r"expected a checkpoint of this training, got one with other settings"):
            trainer(members(), data, objective, checkpoint=path, seed=1)
        assert path.read_bytes() == before
    told = replace(TRAINER, log_every=1, checkpoint_seconds=5.0)  # what changes no result may change
    assert identical(told(members(), toy(), OBJECTIVE, checkpoint=path, seed=1).state_dict(), load(path))


def test_a_checkpoint_of_other_quantizers_or_widths_is_refused(tmp_path: Path):
    def made(policy: Policy, classes: int = 3) -> Ensemble:
        with rng.torch_seed(0):
            layers = nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, classes)
        return Ensemble.build([nn.Sequential(*layers)], [policy])

    path, four = tmp_path / "checkpoint", Policy(weight_bits=4, activation_bits=4)
    TRAINER(made(four), toy(), OBJECTIVE, checkpoint=path)
    for policy in (replace(four, weight_bits=2), replace(four, activation_law=Deterministic())):
        with pytest.raises(InputError, match="other quantizers"):
            TRAINER(made(policy), toy(), OBJECTIVE, checkpoint=path)
    wider = made(four, classes=4)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(DataError, match="weights of other names or shapes"):
        TRAINER(wider, toy(), OBJECTIVE, checkpoint=path)
    assert identical(wider.state_dict(), before)


def test_settings_that_no_checkpoint_can_hold_are_refused_before_the_first_step(tmp_path: Path):
    code = """
import sys
from pathlib import Path
import numpy as np
import torch
from bitquorum.data import load
from bitquorum.ensemble import Ensemble
from bitquorum.interface import ConfigError
from bitquorum.objective import MemberCrossEntropy, Objective
from bitquorum.train import Trainer

data, objective, folder = load("digits", "train").take(64), Objective(terms=(MemberCrossEntropy(),)), Path(sys.argv[1])

for numbers in ({"batch_size": np.int64(32)}, {"batch_size": 32, "lr": np.float32(0.125)}, {"batch_size": 32}):
    ensemble = Ensemble([torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))])
    trainer = Trainer(epochs=1, **numbers)
    try:
        trainer(ensemble, data, objective, checkpoint=folder / "checkpoint", report=lambda _: print("step"))
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert first.startswith("batch_size: expected an integer, got np.int64(32)")
    assert second.startswith("lr: expected a finite number, got np.float32(0.125)")
    assert last == "step"


def load(path: Path) -> dict[str, Tensor]:
    """Return the averaged weights of a checkpoint."""
    tensors, _ = load_tensors(path)
    return {name.removeprefix("average."): value for name, value in tensors.items() if name.startswith("average.")}


@pytest.mark.parametrize("order", ["mixed", "by class"])
def test_calibration_sees_every_class(order: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []
    monkeypatch.setattr("bitquorum.train.calibrate", lambda _, images: seen.append(images))
    data = toy()
    chosen = data if order == "mixed" else data.select(data.labels.argsort(stable=True))
    replace(TRAINER, epochs=0, calibration=6)(members(), chosen, OBJECTIVE)
    shown = {int(data.labels[row]) for image in seen[0] for row in range(64) if torch.equal(image, float_of(data)[row])}
    assert shown == {0, 1, 2}
    assert order == "by class" or torch.equal(seen[0], float_of(data)[:6])


def float_of(data: ImageSet) -> Tensor:
    """Return all images as networks see them."""
    return data.batch(torch.arange(len(data))).images


def test_a_report_across_an_interruption_counts_every_step(
    tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], Rows]
):
    """Stop between two reports, so that the checkpoint holds half of a mean."""
    trainer, path, rows = replace(TRAINER, checkpoint_seconds=0.0), tmp_path / "checkpoint", []
    saves = 0

    def save(*args: Any) -> None:
        nonlocal saves
        save_tensors(*args)
        saves += 1
        if saves == 5:
            raise InterruptionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitquorum.train.save_tensors", save)
        with pytest.raises(InterruptionError):
            trainer(members(), toy(), OBJECTIVE, checkpoint=path, report=logger(rows))
    assert [row["step"] for row in rows] == [2, 4]
    ensemble = trainer(members(), toy(), OBJECTIVE, checkpoint=path, report=logger(rows))
    assert rows == uninterrupted[1]
    assert identical(ensemble.state_dict(), uninterrupted[0])


def test_a_finished_training_is_not_run_again(tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], Rows]):
    path = tmp_path / "checkpoint"
    weights, _ = fit(checkpoint=path)
    content = path.read_bytes()
    again, rows = fit(checkpoint=path)
    assert rows == []
    assert identical(again, weights)
    assert identical(again, uninterrupted[0])
    assert path.read_bytes() == content


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path):
    path, trainer = tmp_path / "checkpoint", replace(TRAINER, epochs=1)
    fit(trainer, checkpoint=path, seed=1)
    with pytest.raises(InputError, match=r"of 4 steps with seed 2, got 4 steps with seed 1.*begin anew"):
        fit(trainer, checkpoint=path, seed=2)
    with pytest.raises(InputError, match="of 8 steps with seed 1, got 4 steps"):
        fit(replace(trainer, epochs=2), checkpoint=path, seed=1)


SCRIPT = """
import importlib.util, json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("case", sys.argv[1])
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)
case.{function}(*sys.argv[2:])
"""


def launch(function: str, *arguments: object, prefix: tuple[str, ...] = ()) -> list[str]:
    """Return the command that calls a function of this file in a new interpreter."""
    return [sys.executable, *prefix, "-c", SCRIPT.format(function=function), __file__, *map(str, arguments)]


def train_slowly(folder: str) -> None:
    """Train with a checkpoint after every step and a pause in every report, until killed."""
    path = Path(folder)

    def report(progress: Progress) -> None:
        with (path / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"step": progress.step, **progress.values}) + "\n")
        time.sleep(0.2 if progress.step >= 4 else 0)

    trainer = replace(TRAINER, checkpoint_seconds=0.0)
    trainer(members(), toy(), OBJECTIVE, checkpoint=path / "checkpoint", report=report)


@pytest.mark.long
def test_a_killed_process_resumes_to_the_same_bytes(tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], Rows]):
    log = tmp_path / "rows.jsonl"
    process = subprocess.Popen(launch("train_slowly", tmp_path))
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(read_jsonl(log)) >= 3:
                break
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -9
    _, metadata = load_tensors(tmp_path / "checkpoint")
    assert 4 <= json.loads(metadata["state"])["step"] < 12
    rows = read_jsonl(log)
    ensemble = TRAINER(members(), toy(), OBJECTIVE, checkpoint=tmp_path / "checkpoint", report=logger(rows))
    weights, known = uninterrupted
    for name, state in (("resumed", ensemble.state_dict()), ("whole", weights)):
        save_tensors(tmp_path / name, state)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    last = {row["step"]: row for row in rows}  # a row written after the last checkpoint comes twice, and equal
    assert list(last.values()) == known
    assert all(row == last[row["step"]] for row in rows)


# Averaging, schedules, decay


def test_the_average_of_the_weights():
    trainer = replace(TRAINER, epochs=1, log_every=1)
    plain = replace(trainer, ema=0.0)
    history: list[dict[str, Tensor]] = []
    ensemble = members()

    def look(_: Progress) -> None:
        history.append({name: value.clone() for name, value in ensemble.state_dict().items()})

    plain(ensemble, toy(), OBJECTIVE, report=look)
    assert identical(ensemble.state_dict(), history[-1])
    first = members()
    replace(trainer, epochs=1, lr=1e-30, weight_decay=0.0, ema=0.0)(first, toy(), OBJECTIVE)  # calibration alone
    averaged = trainer(members(), toy(), OBJECTIVE).state_dict()
    for name, value in first.named_parameters():
        average = value.detach().clone()
        for step, state in enumerate(history, start=1):
            decay = min(0.9, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * state[name]
        torch.testing.assert_close(averaged[name], average, rtol=1e-5, atol=1e-6)
    name = "members.0.1.num_batches_tracked"
    assert averaged[name] == history[-1][name]


def test_mixed_images_reach_the_objective_with_both_labels():
    seen: list[Step] = []

    @dataclass(frozen=True, kw_only=True)
    class Spy(Term):
        def __call__(self, step: Step) -> Tensor:
            seen.append(step)
            return step.logits.sum()

    data = toy()
    flat = replace(data, images=data.labels.float().view(-1, 1, 1, 1).expand(-1, 1, 6, 6).div(2).contiguous())
    trainer = replace(TRAINER, epochs=2, augment=Augment(cutmix=1.0))
    trainer(members(), flat, Objective(terms=(Spy(weight=1e-6),)))
    assert len(seen) == 8
    for step in seen:
        assert step.mixed is not None
        others, share = step.mixed
        mean = share * step.labels / 2 + (1 - share) * others / 2
        torch.testing.assert_close(step.images.mean((1, 2, 3)), mean)
    assert len({tuple(step.mixed[1].tolist()) for step in seen if step.mixed}) == 8
    fit(replace(TRAINER, augment=Augment()), Objective(terms=(Spy(weight=1e-6),)))
    assert seen[-1].mixed is None


def test_schedules_at_their_ends():
    onecycle = Trainer(lr=2.0, warmup=0.25)
    assert [onecycle.lr_at(at) for at in (0.0, 0.25, 1.0)] == pytest.approx([0.08, 2.0, 0.002])
    assert onecycle.lr_at(0.125) == pytest.approx(1.04)
    assert onecycle.lr_at(0.625) == pytest.approx(1.001)
    assert Trainer(lr=2.0, warmup=0.0).lr_at(0.0) == 2.0
    cosine = Trainer(lr=2.0, schedule="cosine")
    assert [cosine.lr_at(at) for at in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 1.0, 0.0])
    constant = Trainer(lr=2.0, schedule="constant")
    assert [constant.lr_at(at) for at in (0.0, 0.5, 1.0)] == [2.0, 2.0, 2.0]
    rising = [onecycle.lr_at(at / 100) for at in range(101)]
    assert rising.index(max(rising)) == 25
    assert sorted(rising[:26]) == rising[:26]
    assert sorted(rising[25:], reverse=True) == rising[25:]


def test_the_schedule_reaches_the_optimizer():
    _, rows = fit(replace(TRAINER, log_every=1))
    assert [row["lr"] for row in rows] == pytest.approx([TRAINER.lr_at(step / 12) for step in range(12)])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_layer_weights_decay(optimizer: Any):
    """Under a loss of weight 1e-30 nothing moves but by decay."""
    ensemble = members()
    for parameter in ensemble.parameters():
        parameter.data.add_(0.5)
    before = {name: value.clone() for name, value in ensemble.named_parameters()}
    trainer = Trainer(
        epochs=1,
        batch_size=16,
        lr=0.1,
        schedule="constant",
        optimizer=optimizer,
        weight_decay=0.1,
        precision="float32",
        calibration=0,
    )
    quiet = Objective(terms=(MemberCrossEntropy(weight=1e-30),))
    trainer(ensemble, toy(), quiet)
    decayed = set()
    for name, value in ensemble.named_parameters():
        ratio = value.detach() / before[name].detach()
        if float(ratio.mean()) < 0.99:
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
            decayed.add(name)
        else:
            torch.testing.assert_close(value, before[name])
    layers = {f"members.{m}.{place}.layer.weight" for m in (0, 1) for place in (0, 5)}
    assert decayed == layers
    if optimizer == "adamw":
        weight = "members.0.0.layer.weight"
        torch.testing.assert_close(ensemble.get_parameter(weight), before[weight] * (1 - 0.1 * 0.1) ** 4)


def test_clipping_bounds_the_step():
    trainer = replace(TRAINER, epochs=1, batch_size=64, ema=0.0, weight_decay=0.0, schedule="constant", calibration=0)
    start = {name: value.clone() for name, value in members().named_parameters()}
    moves = []
    for clip in (0.01, 0.02):
        after = dict(replace(trainer, clip=clip)(members(), toy(), Objective()).named_parameters())
        moves.append(math.sqrt(sum(float((after[n] - start[n]).detach().square().sum()) for n in start)))
    assert moves[0] == pytest.approx(0.05 * 1.9 * 0.01, rel=1e-3)  # one Nesterov step of momentum 0.9
    assert moves[1] == pytest.approx(0.05 * 1.9 * 0.02, rel=1e-3)


def test_calibration_sets_the_ranges_and_can_be_left_out():
    trainer = replace(TRAINER, epochs=1, lr=1e-30, weight_decay=0.0, ema=0.0)
    name = "members.0.2.quantizer.log_step"
    guess = members().state_dict()[name]
    left = replace(trainer, calibration=0)(members(), toy(), Objective()).state_dict()[name]
    fitted = trainer(members(), toy(), Objective()).state_dict()[name]
    assert torch.equal(left, guess)
    assert abs(float(fitted - guess)) > 0.1


# Other devices' arithmetic, other terms


@pytest.mark.long
def test_bfloat16_keeps_float32_weights_and_learns(uninterrupted: tuple[dict[str, Tensor], Rows]):
    weights, rows = fit(replace(TRAINER, precision="bfloat16"))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    assert not identical(weights, uninterrupted[0])
    assert rows[0]["loss"] == pytest.approx(uninterrupted[1][0]["loss"], rel=0.1)
    assert rows[-1]["loss"] < rows[0]["loss"]
    again, _ = fit(replace(TRAINER, precision="bfloat16"))
    assert identical(again, weights)


def test_layouts_agree():
    one = replace(TRAINER, epochs=1, channels_last=False)
    weights, _ = fit(one)
    others, _ = fit(replace(one, channels_last=True))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_network_of_narrow_strided_convolutions_trains_where_the_library_has_avx2_alone():
    """Trained channels last, this ends by a signal: the library writes past its memory."""
    code = """
import torch
from torch import nn
from bitquorum.conversion import Policy
from bitquorum.data import ImageSet
from bitquorum.ensemble import Ensemble
from bitquorum.objective import InputGradient, MemberCrossEntropy, Objective
from bitquorum.train import Trainer

network = nn.Sequential(
    nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 16, 1, stride=2, bias=False), nn.ReLU(), nn.Flatten(1),
    nn.Linear(16 * 16 * 16, 10),
)
images = (torch.arange(64 * 3 * 32 * 32) % 251).to(torch.uint8).view(64, 3, 32, 32)
order = torch.arange(64)
data = ImageSet(name="toy", split="train", images=images, labels=order % 10, classes=tuple("abcdefghij"), index=order)
trainer = Trainer(epochs=3, batch_size=16, lr=0.01, precision="float32")
objective = Objective(terms=(MemberCrossEntropy(), InputGradient()))
for ensemble in (Ensemble([network]), Ensemble.build([network], [Policy()])):
    trainer(ensemble, data, objective)
print("done")
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_adversarial_training_runs():
    objective = Objective(terms=(MemberCrossEntropy(), Trades(attack=PGD(steps=2, step_size=0.5), epsilon=0.05)))
    _, rows = fit(replace(TRAINER, epochs=1), objective)
    assert all(math.isfinite(row["Trades"]) and row["Trades"] > 0 for row in rows)


# Two processes


def train_in_parallel(folder: str) -> None:
    """Train as one of several processes and save the first one's weights."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rows: Rows = []
    objective = Objective(terms=(MemberCrossEntropy(), ConditionalMI(weight=0.1), InputGradient()))
    trainer = replace(TRAINER, epochs=2, batch_size=32)
    ensemble = trainer(members(norm=False), toy(), objective, report=logger(rows))
    rank = dist.get_rank()
    save_tensors(Path(folder) / f"weights{rank}", ensemble.state_dict(), {"rows": json.dumps(rows)})
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_agree_with_one(tmp_path: Path):
    """Equal weights are only possible with equal noise: a second draw of it would change every code."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(function="train_in_parallel"))
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *runner, str(script), __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    objective = Objective(terms=(MemberCrossEntropy(), ConditionalMI(weight=0.1), InputGradient()))
    trainer = replace(TRAINER, epochs=2, batch_size=32)
    alone = trainer(members(norm=False), toy(), objective).state_dict()
    other = trainer(members(norm=False), toy(), objective, seed=1).state_dict()
    first, metadata = load_tensors(tmp_path / "weights0")
    second, _ = load_tensors(tmp_path / "weights1")
    assert identical(first, second)
    assert [row["step"] for row in json.loads(metadata["rows"])] == [2, 4]
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    assert max(float((other[name] - alone[name]).abs().max()) for name in alone) > 1e-3


# Refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path, bad: float):
    ensemble = members()
    ensemble.get_parameter("members.0.5.layer.bias").data.fill_(bad)
    with pytest.raises(DivergedError, match=r"finite loss, got nan before step 2.*lower lr"):
        replace(TRAINER, calibration=0)(ensemble, toy(), Objective())


def test_a_term_that_refuses_what_diverged_weights_say_tells_of_these():
    ensemble = members()
    ensemble.get_parameter("members.0.5.layer.bias").data.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"finite logits, got NaN or infinity before step 0; lower lr"):
        replace(TRAINER, calibration=0)(ensemble, toy(), Objective(terms=(MemberCrossEntropy(), OutputMI())))


@dataclass(frozen=True, kw_only=True)
class Spoilt(Term):
    """Be finite, with a gradient that is none, from half of the training on."""

    def __call__(self, step: Step) -> Tensor:
        loss = step.member_losses[0].mean()
        if step.progress >= 0.5:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_an_update_has_spoilt_are_neither_returned_nor_saved(tmp_path: Path, epochs: int):
    """Not even by the last step, whose loss is computed before its update."""
    path = tmp_path / "checkpoint"
    trainer = replace(TRAINER, epochs=epochs, batch_size=32, checkpoint_seconds=0.0, log_every=1)
    with pytest.raises(DivergedError, match=r"finite weights, got NaN or infinity in members.* after step .*lower lr"):
        trainer(members(), toy(), Objective(terms=(Spoilt(),)), checkpoint=path)
    state, _ = load_tensors(path)
    assert all(bool(value.isfinite().all()) for name, value in state.items() if name.startswith("model."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs and calibration of at least 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"log_every": 0}, "at least 1"),
        ({"calibration": -1}, "calibration"),
        ({"lr": 0.0}, "lr > 0"),
        ({"lr": math.nan}, "lr > 0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip": -1.0}, "clip"),
        ({"ema": 1.0}, "ema"),
        ({"warmup": 1.0}, "warmup"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Trainer(**options)


@pytest.mark.parametrize("name", ["optimizer", "schedule", "precision"])
def test_unknown_choices(name: str):
    trainer = Trainer()
    object.__setattr__(trainer, name, "other")  # past the run-time check of annotations, which users do not have
    with pytest.raises(InputError, match=f"expected {name} among .*, got 'other'"):
        trainer.__post_init__()


def test_an_ensemble_without_gradients_is_refused_and_one_that_gets_them_back_is_trained():
    ensemble = members()
    few = replace(TRAINER, epochs=1)
    few(ensemble, toy(), OBJECTIVE)
    Evaluation(attacks=(), epsilons=(), examples=8, draws=1)(ensemble, toy().take(8))
    with pytest.raises(InputError, match="none has a gradient, as an evaluation leaves it; call its requires_grad_"):
        few(ensemble, toy(), OBJECTIVE)
    before = [parameter.clone() for parameter in ensemble.parameters()]
    few(ensemble.requires_grad_(), toy(), OBJECTIVE)
    assert not all(map(torch.equal, before, ensemble.parameters()))


def test_a_training_of_ranges_alone_is_warned_of():
    network = nn.Sequential(nn.Flatten(), nn.Linear(toy().shape[1] * toy().shape[2], 8), nn.ReLU(), nn.Linear(8, 3))
    ensemble = Ensemble.build([network.requires_grad_(False)], [Policy()])
    with pytest.warns(NoEffectWarning, match="no layer's weight has a gradient: the training moves ranges"):
        replace(TRAINER, epochs=1)(ensemble, toy(), Objective())


def test_too_few_logits():
    narrow = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(toy().shape[1] * toy().shape[2], 2))])
    with pytest.raises(InputError, match="expected logits of 3 classes from every member, got 2"):
        TRAINER(narrow, toy(), Objective())


def test_too_few_images():
    with pytest.raises(InputError, match="at least one batch of 65 images, got 64; lower batch_size"):
        fit(replace(TRAINER, batch_size=65))
