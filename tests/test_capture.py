"""Test which steps may be recorded, that a recorded one is a plain one, and that weights may be tensors."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bitquorum import capture
from bitquorum.benchmark.timing import Sizes, recorded
from bitquorum.benchmark.training import training_step
from bitquorum.capture import fits_capture
from bitquorum.conversion import Policy
from bitquorum.data import ImageSet
from bitquorum.ensemble import Ensemble
from bitquorum.objective import FeatureMI, InputGradient, MemberCrossEntropy, Objective, Reduce, Step
from bitquorum.quantizers import Deterministic, Logistic, SmoothRounding
from bitquorum.randomized import RandomPrecision
from bitquorum.train import Progress, Trainer
from bitquorum.zoo import SmallResNet

QUIET = Policy(weight_bits=4, activation_bits=4, weight_law=Deterministic())
TERMS = (MemberCrossEntropy(), InputGradient(warmup=0.5))


def ensemble(policy: Policy = QUIET) -> Ensemble:
    """Return two equal members with noise in their activations."""
    torch.manual_seed(0)
    network = SmallResNet(widths=(4, 4, 8))(classes=3, shape=(3, 8, 8))
    return Ensemble.build([network, network], [policy, policy])


def images(count: int = 64) -> ImageSet:
    """Return noise with labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 3, 8, 8, generator=generator)
    return ImageSet(
        images=pixels,
        labels=torch.arange(count) % 3,
        classes=("a", "b", "c"),
        index=torch.arange(count),
        name="noise",
        split="train",
    )


def test_only_steps_that_are_the_same_kernels_are_recorded():
    cuda, objective = torch.device("cuda"), Objective(terms=TERMS)
    assert fits_capture(ensemble(), objective, cuda)
    assert not fits_capture(ensemble(), objective, torch.device("cpu"))
    noisy = Policy(weight_bits=4, activation_bits=4)
    assert not fits_capture(ensemble(noisy), objective, cuda), "noise of weights is keyed by the seed alone"
    learned = replace(QUIET, activation_law=Logistic(learned=True))
    assert not fits_capture(ensemble(learned), objective, cuda), "the width of a sum follows a learned noise scale"
    network = SmallResNet(widths=(4, 4, 8))(classes=3, shape=(3, 8, 8))
    switched = Ensemble.build([network], [RandomPrecision()])
    assert not fits_capture(switched, Objective(terms=(MemberCrossEntropy(),)), cuda), "so is the choice of a network"
    assert not fits_capture(ensemble(), Objective(terms=(*TERMS, FeatureMI())), cuda)
    assert not fits_capture(ensemble(), Objective(terms=(InputGradient(share=0.5),)), cuda)


class Own(nn.Module):
    """Draw in a way that nobody knows."""

    stochastic = True


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.Dropout2d(0.5), Own()])
def test_chance_that_a_record_would_repeat_is_not_recorded(module: nn.Module):
    model, objective = ensemble(), Objective(terms=TERMS)
    assert fits_capture(model, objective, torch.device("cuda"))
    model.members[0].add_module("more", module)
    assert not fits_capture(model, objective, torch.device("cuda"))


def test_weights_that_are_tensors_give_the_same_loss_and_gradients():
    objective, found = Objective(terms=TERMS), []
    for weights in (None, [torch.tensor(weight) for weight in objective.weights_at(0.25)]):
        model, batch = ensemble().train(), images().batch(torch.arange(8))
        step = Step(
            ensemble=model,
            images=batch.images.requires_grad_(),
            labels=batch.labels,
            examples=batch.examples,
            progress=0.25,
            seed=1,
            memory={},
            reduce=Reduce(),
        )
        loss, _ = objective(step, weights)
        loss.backward()
        found.append((loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)))
    torch.testing.assert_close(found[0], found[1])


def test_a_recorded_step_reads_its_batch_from_one_place(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU the record itself is left out: every call runs plainly, on the memory that a record would read."""
    without_record(monkeypatch)
    seen: list[tuple[int, float]] = []

    def body(tensors, weights):  # type: ignore[no-untyped-def]
        pixels, labels, examples = tensors
        seen.append((pixels.data_ptr(), float(weights[1])))
        return pixels.sum() + labels.sum() + examples.sum(), {}

    step = capture.CapturedStep(body, [])
    for number in range(3):
        batch = images().batch(torch.arange(number, number + 4))
        value, _ = step((batch.images, batch.labels, batch.examples), [1.0, 0.1 * number])
        assert float(value) == pytest.approx(float(batch.images.sum() + batch.labels.sum() + batch.examples.sum()))
    assert len({place for place, _ in seen}) == 1
    assert [weight for _, weight in seen] == pytest.approx([0.0, 0.1, 0.2])


def test_the_benchmark_of_a_recorded_step_runs(monkeypatch: pytest.MonkeyPatch):
    without_record(monkeypatch)
    sizes = Sizes(widths=(4, 4, 8), batch=4)
    step = training_step("recorded", sizes, SmoothRounding(), penalty=True, members=2, mode="eager", recorded=True)
    for _ in range(2):
        step.run()


def test_a_recorded_contender_runs_plainly_once_and_is_then_replayed(monkeypatch: pytest.MonkeyPatch):
    without_record(monkeypatch)
    replays: list[str] = []

    class Graph:
        def replay(self) -> None:
            replays.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: _Stream())
    calls: list[int] = []
    run = recorded(lambda: calls.append(1))
    run()
    run()
    assert len(calls) == 4
    assert replays == ["replay"] * 2


def without_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every call of a captured step run plainly, without CUDA."""
    monkeypatch.setattr(capture, "WARMUP", 10**9)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)


class _Stream:
    def wait_stream(self, other: object) -> None:
        """Do nothing."""

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *error: object) -> None:
        """Do nothing."""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs CUDA")
def test_a_recorded_training_is_the_plain_one(monkeypatch: pytest.MonkeyPatch):
    found: list[list[float]] = []
    for warmup in (3, 10**9):
        monkeypatch.setattr(capture, "WARMUP", warmup)
        losses: list[float] = []
        trainer = Trainer(epochs=3, batch_size=16, lr=0.05, ema=0.9, precision="float32", log_every=1, calibration=32)

        def keep(progress: Progress, losses: list[float] = losses) -> None:
            losses.append(progress.values["loss"])

        trainer(ensemble(), images(), Objective(terms=TERMS), report=keep, device="cuda")
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
