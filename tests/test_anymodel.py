"""Test that any module can be evaluated, and that the evaluation adapts to what the module is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitquorum.attacks import PGD, Square, Transfer
from bitquorum.data import load
from bitquorum.ensemble import Ensemble, MajorityVote
from bitquorum.evaluate import Evaluation, Ladder, Report, evaluate_model, ladder
from bitquorum.evaluate.selfchecks import CHECKS
from bitquorum.foreign import wrap
from bitquorum.interface import ConfigError, DataError, InputError, Listener, Printed
from bitquorum.museum.exhibits import Wrapped, crossmax, network, rounding

LADDER = Ladder(
    name="test",
    claim=PGD(steps=10, eot=2),
    rungs=(Transfer(source="*", attack=PGD(steps=10, loss="margin")), Square(queries=10)),
    draws=10,
    check_images=0,
)
EPSILON = 0.125


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    batch = load("digits", "test").take(50).batch(torch.arange(50))
    return batch.images, batch.labels


def evaluate(model: nn.Module, digits: tuple[Tensor, Tensor], **options) -> Report:
    return evaluate_model(model, *digits, **{"epsilon": EPSILON, "ladder": LADDER, **options})


def rungs(report: Report) -> list[str]:
    return [step.rung for step in report.climb.steps]


def test_a_plain_module_is_attacked_by_its_gradients_and_from_a_relaxed_copy(digits: tuple[Tensor, Tensor]):
    report = evaluate(network(0), digits)
    assert rungs(report) == ["clean", "PGD-10", "from relaxed copy: PGD-10 margin", "Square-20 kept values mean-loss"]
    assert report.findings == ()
    assert report.seconds > 0
    assert report.climb.worst.value < report.climb.clean.value - 0.2
    text = str(report)
    assert "claim as worded" in text
    assert "worst case over the ladder" in text
    assert f"{report.climb.worst.images} images, 10 draws" in text


def test_a_module_without_gradients_is_seen_with_relaxed_ones(digits: tuple[Tensor, Tensor]):
    plain = evaluate(network(0), digits).climb.worst.value
    report = evaluate(Wrapped([network(0)], image=rounding()).eval(), digits)
    assert [finding.name for finding in report.findings] == ["zero-gradient"]
    assert report.climb.worst.value <= plain + 0.04
    assert "found: 100 % of the images have no gradient" in str(report)


@pytest.mark.long
def test_a_module_with_misleading_gradients_is_climbed_by_both(digits: tuple[Tensor, Tensor]):
    report = evaluate(Wrapped([network(0), network(1), network(2)], combine=crossmax).eval(), digits)
    assert [finding.name for finding in report.findings] == ["masked-gradient"]
    assert "from own gradient: PGD-10" in rungs(report)
    assert "from relaxed copy: PGD-10 margin" not in rungs(report)


@pytest.mark.long
def test_a_random_module_gives_the_same_report_again_and_leaves_the_generator_alone(digits: tuple[Tensor, Tensor]):
    noisy = nn.Sequential(nn.Dropout(0.1).train(), network(0))
    noisy.training = False
    state = torch.get_rng_state()
    first, second = (evaluate(noisy, digits) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.climb.steps == second.climb.steps
    assert torch.equal(first.climb.correct, second.climb.correct)
    assert [finding.name for finding in first.findings] == ["random"]
    assert evaluate(noisy, digits, seed=1).climb.steps != first.climb.steps


def test_modules_that_the_attacker_holds_are_sources(digits: tuple[Tensor, Tensor]):
    report = evaluate(network(0), digits, sources={"sister": network(1)})
    assert "from sister: PGD-10 margin" in rungs(report)


def test_a_wrapped_model_is_not_inspected_again(digits: tuple[Tensor, Tensor]):
    model = wrap(network(0), *digits)
    report = evaluate(model, digits)
    assert report.climb.steps == evaluate(network(0), digits).climb.steps


def test_l2_and_names_of_ladders(digits: tuple[Tensor, Tensor]):
    report = evaluate(network(0), digits, ladder=replace(LADDER), norm="l2", epsilon=0.5)
    moved = (report.climb.images - digits[0]).flatten(1).norm(dim=1)
    assert float(moved.max()) <= 0.5 + 1e-5
    assert "Square-20 kept values mean-loss" not in rungs(report)
    with pytest.raises(ConfigError, match="expected a ladder among quick, standard, full, got 'quik'; did you mean"):
        evaluate(network(0), digits, ladder="quik")


class Stop(Listener):
    """Interrupt when a rung is done, as its user might."""

    def __init__(self, rung: str) -> None:
        self.rung, self.heard = rung, []

    def advance(self, done: int, note: str = "") -> None:
        self.heard.append(note)
        if note.endswith(self.rung):
            raise KeyboardInterrupt


def test_a_kept_climb_goes_on_where_it_was_interrupted(digits: tuple[Tensor, Tensor], tmp_path: Path):
    file, stop = tmp_path / "climb.safetensors", Stop("Square-20 kept values mean-loss")
    with pytest.raises(KeyboardInterrupt):
        evaluate(network(0), digits, kept=file, listener=stop)
    assert len(stop.heard) == 3
    rest = Stop("nothing")
    report = evaluate(network(0), digits, kept=file, listener=rest)
    assert rest.heard == ["of 1 batches, Square-20 kept values mean-loss"]
    whole = evaluate(network(0), digits)
    assert report.climb.steps == whole.climb.steps
    assert torch.equal(report.climb.images, whole.climb.images)
    assert torch.equal(report.climb.correct, whole.climb.correct)
    again = Stop("nothing")
    assert evaluate(network(0), digits, kept=str(file), listener=again).climb.steps == whole.climb.steps
    assert again.heard == []


def test_a_kept_climb_serves_its_own_model_images_and_ladder_alone(digits: tuple[Tensor, Tensor], tmp_path: Path):
    file = tmp_path / "climb.safetensors"
    short = replace(LADDER, rungs=())
    evaluate(network(0), digits, ladder=short, kept=file)
    before, (images, labels) = file.read_bytes(), digits
    for model, data, options in (
        (network(1), digits, {}),
        (network(0), (images.flip(0), labels), {}),
        (network(0), (images, labels.roll(1)), {}),
        (network(0), digits, {"epsilon": 0.1}),
        (network(0), digits, {"seed": 1}),
        (network(0), digits, {"ladder": LADDER}),
        (network(0), digits, {"sources": {"sister": network(1)}}),
    ):
        with pytest.raises(DataError, match=r"expected the climb of this model .* got that of another; choose another"):
            evaluate(model, data, **{"ladder": short, "kept": file, **options})
        assert file.read_bytes() == before


def test_a_kept_climb_serves_its_own_settings_alone(digits: tuple[Tensor, Tensor], tmp_path: Path):
    file, short = tmp_path / "climb.safetensors", replace(LADDER, rungs=())
    evaluate(Ensemble([network(0)]).eval(), digits, ladder=short, kept=file)
    for options in ({"passes": 2}, {"aggregation": MajorityVote()}, {"mirrored": True}, {"shift": 1}):
        with pytest.raises(DataError, match="got that of another; choose another"):
            evaluate(Ensemble([network(0)], **options).eval(), digits, ladder=short, kept=file)
    evaluate(Ensemble([network(0)]).eval(), digits, ladder=short, kept=file)


def test_a_file_that_cannot_be_written_is_refused_before_the_climb(digits: tuple[Tensor, Tensor], tmp_path: Path):
    (tmp_path / "file").write_text("")
    heard = Stop("nothing")
    with pytest.raises(InputError, match=r"expected a file that can be written at .*climb, got: .+"):
        evaluate(network(0), digits, kept=tmp_path / "file" / "climb", listener=heard)
    assert heard.heard == []


def test_progress_within_a_batch_is_told_in_passes(digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ladder, "_PACE", 0.0)
    heard = Stop("nothing")
    evaluate(network(0), digits, ladder=replace(LADDER, rungs=(), batch_size=30), listener=heard)
    passes = [f", {count} forward passes an image into the next" for count in range(1, 11)]
    of = "of 2 batches, PGD-10"
    assert heard.heard == [of + more for more in (*passes, "", *passes, "")]


def test_progress_is_printed_to_standard_error(digits: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]):
    evaluate(network(0), digits, ladder=replace(LADDER, rungs=(), check_images=4), listener=Printed())
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[:2] == [
        "ladder test: 1 of 1 batches, PGD-10",
        f"self-checks: 0 of {len(CHECKS)}, self-test",
    ]


class Failing(nn.Module):
    """Return the scores of a network, which are no numbers for images that are brighter than any clean one."""

    def __init__(self, brightest: float) -> None:
        super().__init__()
        self.network, self.brightest = network(0), brightest

    def forward(self, images: Tensor) -> Tensor:
        room = self.brightest - images.flatten(1).mean(1, keepdim=True)
        return self.network(images) + 0 * room.sqrt()


def test_what_is_no_number_is_no_right_answer(digits: tuple[Tensor, Tensor]):
    images, labels = digits
    model = Failing(float(images.flatten(1).mean(1).max()) + 1e-3).eval()
    bright = (images + EPSILON).clamp(max=1)
    assert bool(model(bright).isnan().all(-1).any())
    for judged in (wrap(model, images, labels), Ensemble([model]).eval()):
        clean, attacked = (judged.predict(judged(x))[0] for x in (images, bright))
        assert torch.equal(clean, model(images).argmax(-1))
        assert torch.equal(attacked == -1, model(bright).isnan().any(-1))
    report = evaluate(model, digits)
    assert report.climb.worst.value <= evaluate(network(0), digits).climb.worst.value


def test_inference_mode_is_refused_and_no_grad_is_not(digits: tuple[Tensor, Tensor]):
    """Every gradient would be zero there, and the model would look as if it had none."""
    images, labels = digits
    ensemble, message = Ensemble([network(0)]).eval(), "outside of torch.inference_mode"
    data = load("digits", "test").take(5)
    with torch.inference_mode():
        inside = images.clone()
        for call in (
            lambda: evaluate(network(0), digits),
            lambda: wrap(network(0), images),
            lambda: PGD(steps=2)(ensemble, images, labels, epsilon=EPSILON),
            lambda: Evaluation(attacks=(PGD(steps=2),), epsilons=(EPSILON,), draws=1)(ensemble, data),
        ):
            with pytest.raises(InputError, match=message):
                call()
    with pytest.raises(InputError, match=message):
        evaluate(network(0), (inside, labels))
    with torch.no_grad():
        found = PGD(steps=2)(ensemble, images, labels, epsilon=EPSILON).images
    assert torch.equal(found, PGD(steps=2)(ensemble, images, labels, epsilon=EPSILON).images)


def test_a_plain_module_is_told_how_to_become_a_model(digits: tuple[Tensor, Tensor]):
    images, labels = digits
    with pytest.raises(InputError, match=r"got \(50, 10\); make a plain module one by `bitquorum.wrap"):
        PGD(steps=2)(network(0), images, labels, epsilon=EPSILON)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (2 * images, labels), r"images in \[0, 1\]"),
        (lambda images, labels: (images * float("nan"), labels), "finite"),
        (lambda images, labels: (images, labels + 5), "labels from 0 to 9, the model's classes"),
        (lambda images, labels: (images, labels - 1), "labels from 0 to 9, the model's classes"),
        (lambda images, labels: (images[:0], labels[:0]), "at least one image, got none"),
    ],
)
def test_bad_inputs_are_one_clear_error(change, message: str, digits: tuple[Tensor, Tensor]):
    for model in (network(0), Ensemble([network(0)]).eval()):
        with pytest.raises(InputError, match=message):
            evaluate(model, change(*digits))
