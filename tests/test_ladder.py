"""Test the ladder where the worst case is known: linear models, noise of known law, attacks of known strength."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import APGD, ARC, FGSM, PGD, SPSA, APGDTargeted, Attack, Kind, RandomNoise, Square
from bitquorum.conversion import Policy, calibrate
from bitquorum.data import load
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Arena, Climb, Examples, Ladder, SequentialTest, interval, ladder_named
from bitquorum.interface import Cost, InputError
from bitquorum.quantizers import Deterministic, Surrogate
from bitquorum.registry import decode, encode

pytestmark = pytest.mark.long


def examples_of(count: int, pixels: int = 12, classes: int = 2) -> Examples:
    images = 0.2 + 0.6 * torch.rand(count, pixels)
    return Examples(images=images, labels=torch.arange(count) % classes, index=torch.arange(count) + 7)


def linear(classes: int = 2, pixels: int = 12) -> Ensemble:
    return Ensemble([nn.Linear(pixels, classes)]).eval().requires_grad_(False)


def random_network() -> Ensemble:
    policy = Policy(weight_bits=2, activation_bits=2)
    network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 2))
    return Ensemble.build([network, network], [policy, policy]).eval().requires_grad_(False)


def ladder(*rungs: Attack, **options) -> Ladder:
    few = SequentialTest(least=4, most=12)
    options = {"epsilons": (0.05,), "draws": 20, "batch_size": 16, "survivors": few, **options}
    return Ladder(name="test", claim=PGD(steps=5, eot=2), rungs=rungs, **options)


@dataclass(frozen=True, kw_only=True)
class Idle(Attack):
    """Return the images as they are, and say on whom it was let loose."""

    kind: ClassVar[Kind] = "gradient-free"
    met: ClassVar[list[list[int]]] = []

    @property
    def label(self) -> str:
        return "idle"

    def _run(self, problem):
        self.met.append(problem.examples.tolist())
        return problem.images.clone()


def test_a_radius_beyond_the_image_is_refused_at_once():
    with pytest.raises(InputError, match=r"at most 1 in the maximum norm, .* got \(0\.1, 16\.0\); write 8/255"):
        ladder(epsilons=(0.1, 16.0))
    assert ladder(norm="l2", epsilons=(0.1, 16.0)).epsilons == (0.1, 16.0)


def test_the_worst_case_of_a_linear_model_is_its_robust_accuracy():
    model, examples, epsilon = linear(), examples_of(60), 0.05
    weight, bias = model.members[0].weight, model.members[0].bias
    difference = (weight[0] - weight[1], bias[0] - bias[1])
    sign = 1 - 2.0 * examples.labels
    margin = sign * (examples.images @ difference[0] + difference[1])
    known = margin > epsilon * difference[0].abs().sum()
    climb = ladder(FGSM(), APGD(steps=5))(model, examples, epsilon=epsilon)
    assert 0 < known.sum() < 60
    assert torch.equal(climb.standing, known)
    assert torch.equal(climb.correct, known.expand(20, -1))
    assert torch.equal(climb.claim, climb.correct)
    assert climb.worst.value == pytest.approx(float(known.float().mean()))
    assert climb.worst_of(5) == pytest.approx(climb.worst.value)


def test_steps_say_what_was_met_and_broken():
    model, examples = linear(), examples_of(60)
    right = model.predict(model(examples.images))[0] == examples.labels
    Idle.met.clear()
    climb = ladder(Idle())(model, examples, epsilon=0.05)
    clean, claim, idle = climb.steps
    assert (clean.attacked, clean.broke, clean.cost) == (0, int((~right).sum()), Cost())
    assert (claim.attacked, claim.kind) == (60, "white-box")
    assert claim.broke == int((right & ~climb.standing).sum())
    assert claim.alone == climb.claimed
    assert (idle.attacked, idle.broke, idle.kind, idle.alone) == (int(climb.standing.sum()), 0, "gradient-free", None)
    assert sorted(example for met in Idle.met for example in met) == examples.index[climb.standing].tolist()
    assert claim.largest == pytest.approx(0.05, abs=1e-6)
    assert set(climb.broken_by.tolist()) == {0, 1}


def test_everywhere_lets_every_rung_meet_every_image():
    model, examples = linear(), examples_of(30)
    climb = ladder(FGSM(), everywhere=True)(model, examples, epsilon=0.05)
    assert [step.attacked for step in climb.steps[1:]] == [30, 30]
    assert climb.steps[2].alone is not None
    assert climb.steps[2].alone.value >= climb.worst.value


def test_the_stated_accuracy_is_that_of_draws_nobody_saw():
    model, examples = random_network(), examples_of(40)
    rungs = (APGD(steps=10, eot=4), PGD(steps=5, eot=4, loss="margin"))
    climb = ladder(*rungs, draws=50, survivors=SequentialTest())(model, examples, epsilon=0.1)
    with torch.no_grad(), rng.draw(list(range(10_000, 10_200)), examples.index):
        fresh = model.predict(model(climb.images)) == examples.labels
    unseen = interval(fresh)
    assert climb.worst.low <= unseen.value <= climb.worst.high
    assert abs(climb.worst.value - unseen.value) < 4 * 0.5 / (40 * 50) ** 0.5
    assert climb.worst.value <= climb.claimed.value + 0.01


def test_attacks_and_choices_never_meet_the_judges_draws():
    """The judges' draws are those that judge anew what a climb left; whatever else was asked met others."""
    model, examples = random_network(), examples_of(8)
    seen: dict[str, set[int]] = {"attack": set(), "other": set()}

    class Watched(nn.Module):
        stochastic, passes = True, 1

        def forward(self, images: Tensor) -> Tensor:
            ambient = rng.current()
            assert ambient is not None
            seen["attack" if images.requires_grad else "other"].update(ambient.seeds)
            return model(images)

        def predict(self, logits: Tensor) -> Tensor:
            return model.predict(logits)

    watched = Watched()
    climbed = ladder(PGD(steps=3, eot=2), APGD(steps=3, eot=2), draws=6)
    climb = climbed(watched, examples, epsilon=0.1)
    attacked, asked = seen["attack"], set(seen["other"])
    seen["other"].clear()
    arena = Arena(model=watched, shown=watched, examples=examples, ladder=climbed, sources={})
    assert torch.equal(arena.judge(climb.images, torch.arange(8)), climb.correct)
    judges = set(seen["other"])
    assert len(judges) == 6
    assert judges < asked
    assert not judges & attacked
    seen["other"].clear()
    arena.score(climb.images, torch.arange(8))
    assert seen["other"]
    assert not judges & seen["other"]
    assert not attacked & seen["other"]


def test_no_rung_makes_the_worst_case_milder_and_each_image_keeps_its_best_version():
    model, examples = random_network(), examples_of(40)
    versions: list[Tensor] = []
    climb = ladder(FGSM(), PGD(steps=10, eot=4), APGD(steps=5, eot=2))(
        model, examples, epsilon=0.1, on_step=lambda climb: versions.append(climb.images.clone())
    )
    accuracies = []
    for images in versions:
        with torch.no_grad(), rng.draw(list(range(20_000, 20_200)), examples.index):
            accuracies.append(float((model.predict(model(images)) == examples.labels).float().mean()))
    assert len(accuracies) == 4
    assert all(after <= before + 0.005 for before, after in pairwise(accuracies))
    moved = (climb.images - examples.images).abs().amax(1)
    assert bool((moved[climb.broken_by == 0] == 0).all())
    assert bool((moved <= 0.1 + 1e-6).all())


class Rare(nn.Module):
    """Be right on grey images, and wrong on one draw of ten where they were changed."""

    stochastic, passes = True, 1

    def forward(self, images: Tensor) -> Tensor:
        ambient = rng.current()
        assert ambient is not None
        assert ambient.examples is not None
        u = torch.stack([rng.uniform(seed, ambient.examples, 1)[:, 0] for seed in ambient.seeds])
        wrong = ((images - 0.5).abs().amax(1) > 0.01) & (u < 0.1)
        return torch.stack([~wrong, wrong], -1).float()[:, None] + 0 * images.sum()

    def predict(self, logits: Tensor) -> Tensor:
        return logits[:, 0].argmax(-1)


def test_an_attack_that_rarely_fools_takes_the_place_of_the_clean_image():
    """Most of its versions are right on the first draws, as clean ones are: further draws must tell."""
    count = 200
    examples = Examples(images=torch.full((count, 4), 0.5), labels=torch.zeros(count).long(), index=torch.arange(count))
    climb = ladder(Idle())(Rare(), examples, epsilon=0.1)
    assert climb.clean.value == 1
    assert climb.claimed.value == pytest.approx(0.9, abs=0.02)
    assert climb.worst.value < 0.945


def test_attacks_in_half_precision_leave_images_and_judgment_in_single():
    model, examples = random_network(), examples_of(30)
    seen: set[torch.dtype] = set()
    model.members[0].register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    rungs = APGD(steps=5, eot=2)
    half = ladder(rungs, precision="bfloat16")(model, examples, epsilon=0.1)
    assert seen == {torch.bfloat16, torch.float32}
    assert half.images.dtype == torch.float32
    assert bool(((half.images - examples.images).abs() <= 0.1 + 1e-6).all())
    assert bool(((half.images >= 0) & (half.images <= 1)).all())
    with torch.no_grad(), rng.draw([rng.derive(rng.derive(0, "judge"), "draw", 0, 0)], examples.index):
        right = model.predict(model(half.images))[0] == examples.labels
    assert torch.equal(right, half.correct[0])
    seen.clear()
    whole = ladder(rungs)(model, examples, epsilon=0.1)
    assert seen == {torch.float32}
    assert half.clean == whole.clean


class Rounded(nn.Module):
    """Err by the precision that the model is asked in."""

    passes = 1

    def __init__(self, *, half: bool, single: bool, stochastic: bool) -> None:
        super().__init__()
        self.half, self.single, self.stochastic = half, single, stochastic

    def forward(self, images: Tensor) -> Tensor:
        ambient, low = rng.current(), torch.is_autocast_enabled("cpu")
        assert ambient is not None
        wrong = torch.full((len(ambient.seeds), 1, len(images)), self.half if low else self.single)
        logits = torch.stack([~wrong, wrong], -1).float() + 0 * images.sum()
        return logits.bfloat16() if low else logits

    def predict(self, logits: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        return logits[:, 0].argmax(-1)


@pytest.mark.parametrize(
    ("half", "single", "stochastic", "broken"),
    [
        (True, False, True, False),
        (False, True, True, False),
        (True, True, True, True),
        (True, False, False, False),
        (False, True, False, True),
    ],
)
def test_no_image_is_given_up_for_a_rounding(half: bool, single: bool, stochastic: bool, broken: bool):
    """A model that errs in half precision alone stands; one that errs in single alone is attacked on, and judged so."""
    count = 20
    examples = Examples(images=torch.full((count, 4), 0.5), labels=torch.zeros(count).long(), index=torch.arange(count))
    model = Rounded(half=half, single=single, stochastic=stochastic)
    plan = ladder(Idle(), precision="bfloat16", survivors=SequentialTest())
    climb = plan(model, examples, epsilon=0.1)
    assert bool((climb.standing == (not broken)).all())
    assert climb.worst.value == 1 - single


@pytest.mark.parametrize(("pays", "precision"), [(True, "bfloat16"), (False, None)])
def test_automatic_precision_is_the_one_that_pays(
    monkeypatch: pytest.MonkeyPatch, pays: bool, precision: Literal["bfloat16"] | None
):
    monkeypatch.setattr("bitquorum.evaluate.ladder.bfloat16_pays", lambda device: pays)
    model, examples = random_network(), examples_of(30)
    seen: set[torch.dtype] = set()
    model.members[0].register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    chosen = ladder(APGD(steps=5, eot=2), precision="auto")
    assert chosen.on("cpu") == replace(chosen, precision=precision)
    climb = chosen(model, examples, epsilon=0.1)
    assert seen == ({torch.bfloat16, torch.float32} if pays else {torch.float32})
    assert torch.equal(climb.images, replace(chosen, precision=precision)(model, examples, epsilon=0.1).images)


def test_a_climb_goes_on_where_it_was_cut():
    model, examples = random_network(), examples_of(30)
    plan = ladder(FGSM(), PGD(steps=5, eot=4), APGD(steps=5, eot=2))
    whole = plan(model, examples, epsilon=0.1)
    cut: list[Climb] = []

    class KilledError(Exception): ...

    def kill(climb: Climb) -> None:
        cut.append(climb)
        if len(climb.steps) == 3:
            raise KilledError

    with pytest.raises(KilledError):
        plan(model, examples, epsilon=0.1, on_step=kill)
    again = plan(model, examples, epsilon=0.1, climb=cut[-1])
    assert again.steps == whole.steps
    for name in ("images", "rate", "second", "standing", "broken_by", "correct", "claim"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name


def test_a_climb_of_other_rungs_is_refused():
    model, examples = random_network(), examples_of(10)
    climb = ladder(FGSM(), PGD(steps=5, eot=4))(model, examples, epsilon=0.1)
    with pytest.raises(InputError, match=r"expected an interrupted climb of .*APGD.*, got one of .*FGSM"):
        ladder(APGD(steps=5, eot=2), PGD(steps=5, eot=4))(model, examples, epsilon=0.1, climb=climb)


def test_images_that_are_skipped_are_those_of_the_smaller_ladder():
    data = load("digits", "test")
    first = ladder(FGSM(), examples=40).choose(data)
    both = ladder(FGSM(), examples=100).choose(data)
    rest = ladder(FGSM(), examples=60, skip=40).choose(data)
    assert torch.equal(torch.cat([first.index, rest.index]).sort().values, both.index.sort().values)
    assert torch.bincount(rest.labels).tolist() == [6] * 10
    others = ladder(FGSM(), examples=0, skip=40).choose(data)
    assert len(others) == len(data) - 40
    assert not bool(torch.isin(others.index, first.index).any())
    for wrong in ({"skip": len(data)}, {"skip": 40, "examples": len(data) - 39}):
        with pytest.raises(InputError, match=f"expected at most {len(data)} images to skip and to take"):
            ladder(FGSM(), **wrong).choose(data)
    with pytest.raises(InputError, match="expected a number of images to skip of at least 1"):
        ladder(FGSM(), skip=0)


def test_the_second_look_at_a_version_is_kept_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    model, examples = random_network(), examples_of(30)
    looked: list[tuple[int, bytes]] = []
    look = Arena._rate

    def count(arena: Arena, version: Tensor, rows: Tensor) -> Tensor:
        looked.extend((int(row), image.numpy().tobytes()) for row, image in zip(rows, version, strict=True))
        return look(arena, version, rows)

    monkeypatch.setattr(Arena, "_rate", count)
    plan = ladder(*(RandomNoise(tries=tries, draws=2) for tries in (2, 3, 4)))  # no two of them find the same version
    climb = plan(model, examples, epsilon=0.1)
    assert len(looked) > 30
    assert len(set(looked)) == len(looked), "a version was looked at twice"
    seen = climb.second >= 0
    assert bool(seen.any())
    arena = Arena(model=model, shown=model, examples=examples, ladder=plan, sources={})
    rows = seen.nonzero()[:, 0]
    with torch.no_grad():
        assert torch.equal(look(arena, climb.images[rows], rows), climb.second[rows])


def test_a_rung_that_found_nothing_worse_needs_no_second_look():
    model, examples = random_network(), examples_of(3)
    calls: list[object] = []
    model.register_forward_hook(lambda *call: calls.append(call))
    arena = Arena(model=model, shown=model, examples=examples, ladder=ladder(), sources={})
    nobody = torch.zeros(0, dtype=torch.int64)
    assert arena._rate(examples.images[nobody], nobody).shape == (0,)
    assert not calls


def test_the_batch_size_changes_rounding_alone():
    model, examples = random_network(), examples_of(30)
    plan = ladder(PGD(steps=5, eot=4))
    one, other = (replace(plan, batch_size=size)(model, examples, epsilon=0.1) for size in (7, 30))
    assert torch.allclose(one.images, other.images, atol=1e-5)
    assert torch.equal(one.correct, other.correct)


def test_the_passes_that_are_stated_are_those_that_are_taken():
    model, examples = random_network(), examples_of(20)
    plan = ladder(FGSM(eot=3), PGD(steps=4, eot=2, restarts=2), APGD(steps=5), everywhere=True)
    climb = plan(model, examples, epsilon=0.1)
    taken = Cost()
    for step in climb.steps:
        taken = taken + step.cost
    assert plan.passes(model) == taken


@pytest.mark.parametrize("shift", [0, 1])
def test_the_passes_on_an_ensemble_that_looks_again_are_those_of_more_members(shift):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model = Ensemble([network], mirrored=True, shift=shift).eval().requires_grad_(False)
    examples = examples_of(20)
    examples = replace(examples, images=examples.images.view(20, 1, 3, 4))
    plan = ladder(PGD(steps=4, pooling="least-member-loss"), ARC(steps=3))
    climb = plan(model, examples, epsilon=0.1)
    assert sum((step.cost for step in climb.steps), Cost()) == plan.passes(model)
    assert [step.rung for step in climb.steps][2:] == ["PGD-4 least-member-loss", "ARC-3"]


def test_what_cannot_differ_on_a_model_is_left_out():
    wide = Surrogate(backward="mean", width=2.0)
    plan = ladder(PGD(steps=5), PGD(steps=5, eot=2, surrogate=wide), PGD(steps=5, eot=2, pooling="mean-logits"), FGSM())
    assert [rung.label for rung in plan.rungs_for(linear())] == ["PGD-5", "FGSM"]
    assert len(plan.rungs_for(random_network())) == 5
    law = Deterministic()
    policy = Policy(weight_bits=2, activation_bits=2, weight_law=law, activation_law=law)
    quiet = Ensemble.build([nn.Linear(12, 2)] * 2, [None, policy])
    chosen = plan.rungs_for(quiet)
    assert [rung.label for rung in chosen] == ["PGD-5", "PGD-5 mean width=2", "PGD-5 mean-logits", "FGSM"]


def test_survivors_are_decided_by_more_than_one_lucky_draw():
    class Coin(nn.Module):
        """Predict the label of the first pixel with a probability of 0.4, whatever the image."""

        passes, stochastic = 1, True

        def forward(self, images: Tensor) -> Tensor:
            ambient = rng.current()
            count = len(ambient.seeds) if ambient else 1
            noise = rng.uniform_like(images.repeat(count, 1), "coin")[:, 0].unflatten(0, (count, -1))
            right = torch.stack([noise * 0 + 1, noise * 0], -1) + 0 * images.sum(-1)[None, :, None]
            wrong = 1 - right
            return torch.where(noise[..., None] < 0.4, right, wrong)[:, None]

        def predict(self, logits: Tensor) -> Tensor:
            return logits[:, 0].argmax(-1)

    examples = Examples(images=torch.rand(200, 3), labels=torch.zeros(200, dtype=torch.int64), index=torch.arange(200))
    climb = ladder(FGSM(), draws=50, survivors=SequentialTest())(Coin(), examples, epsilon=0.1)
    assert climb.standing.all()
    assert climb.worst.value == pytest.approx(0.4, abs=4 * (0.24 / 10_000) ** 0.5)
    assert climb.worst_of(2) == pytest.approx(0.16, abs=0.02)


def test_is_its_own_config():
    plan = ladder(FGSM(), APGD(steps=5, loss="dlr"), survivors=SequentialTest(error=0.02))
    assert decode(Ladder, encode(plan)) == plan


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilons": ()}, "increasing positive epsilons"),
        ({"epsilons": (0.2, 0.1)}, "increasing positive epsilons"),
        ({"draws": 0}, "at least one draw"),
        ({"tries": 21}, "tries from 1"),
        ({"rungs": (FGSM(), FGSM())}, "different labels"),
    ],
)
def test_refuses_a_ladder_that_cannot_be_climbed(wrong: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        replace(ladder(FGSM()), **wrong)  # type: ignore[arg-type]


def test_rungs_that_meet_nobody_cost_nothing():
    model, examples = linear(), examples_of(10)
    wrong = replace(examples, labels=1 - model.predict(model(examples.images))[0])
    climb = ladder(FGSM(), APGD(steps=5), Idle())(model, wrong, epsilon=0.05)
    assert [step.attacked for step in climb.steps] == [0, 10, 0, 0, 0]
    assert all(step.cost == Cost() for step in climb.steps[2:])
    assert climb.worst.value == 0


def test_on_tiny_quantized_networks_the_ladder_finds_what_enumeration_finds():
    law = Deterministic()
    policy = Policy(weight_bits=3, activation_bits=2, weight_law=law, activation_law=law)
    ticks = torch.linspace(-1, 1, 101)
    grid = torch.cartesian_prod(ticks, ticks)
    epsilon, shares, stands, images = 0.1, [], [], 0.2 + 0.6 * torch.rand(25, 2)
    for seed in range(2):
        with rng.torch_seed(seed):
            network = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
        network[0].bias.data = -0.5 * network[0].weight.data.sum(1)
        with torch.no_grad():
            network[2].bias[1] -= network(images).diff(dim=1).median()  # half of the images in each class
        model = Ensemble.build([network, network], [policy, policy]).eval().requires_grad_(False)
        for member in model.members:
            calibrate(member, images)
        labels = model.predict(model(images))[0]
        examples = Examples(images=images, labels=labels, index=torch.arange(25))
        plan = replace(ladder_named("standard"), check_images=0, draws=5)
        stands.append(plan(model, examples, epsilon=epsilon).standing)
        pairs = zip(images, labels, strict=True)
        shares += [float((model.predict(model(x + epsilon * grid))[0] != y).float().mean()) for x, y in pairs]
    wrong, ours = torch.tensor(shares), torch.cat(stands)  # share of the ball that is adversarial
    assert 30 < int((wrong > 0).sum()) < 48
    assert bool(ours[wrong == 0].all()), "nothing breaks what cannot be broken"
    missed = wrong[(wrong > 0) & ours]
    assert bool((missed < 0.05).all()), "what is missed are pockets of less than a twentieth of the ball"
    assert len(missed) <= 5


def test_what_a_quiet_model_spares_in_draws_becomes_queries():
    rungs = (Square(queries=50, eot=4), SPSA(steps=2, directions=8, eot=2), RandomNoise(tries=8, draws=8))
    noisy, quiet = (ladder(*rungs).rungs_for(model) for model in (random_network(), linear()))
    assert [rung.label for rung in noisy[1:]] == ["Square-50x4", "SPSA-2x8x2", "random noise 8x8"]
    assert [rung.label for rung in quiet[1:]] == [
        "Square-400 kept values mean-loss",
        *("SPSA-2x16 mean-loss", "random noise 64x1 mean-loss"),
    ]
    plan = ladder(*rungs)
    assert plan.passes(linear()).forward < plan.passes(random_network()).forward + 4


def test_what_a_quiet_model_spares_in_draws_becomes_steps_of_apgd_up_to_a_hundred():
    rungs = (APGD(steps=20, eot=10, loss="dlr"), APGDTargeted(steps=12, eot=8), APGD(steps=200, eot=2, loss="margin"))
    noisy, quiet = (ladder(*rungs).rungs_for(model) for model in (random_network(), linear()))
    assert [rung.label for rung in noisy[1:]] == [rung.label for rung in rungs]
    assert [rung.label for rung in quiet[1:]] == ["APGD-100 dlr", "APGD-T-96 t9", "APGD-200 margin"]


def test_rungs_without_the_norm_are_left_out():
    plan = ladder(Square(queries=10), APGD(steps=5), norm="l2", epsilons=(0.5,))
    assert [rung.label for rung in plan.rungs_for(linear())] == ["PGD-5", "APGD-5"]
    model, examples = linear(), examples_of(30)
    climb = plan(model, examples, epsilon=0.5)
    moved = (climb.images - examples.images).norm(dim=1)
    assert float(moved.max()) <= 0.5 + 1e-5
    assert climb.steps[1].largest == pytest.approx(float(moved.max()), abs=1e-5)
    weight, bias = model.members[0].weight, model.members[0].bias
    sign = 1 - 2.0 * examples.labels
    margin = sign * (examples.images @ (weight[0] - weight[1]) + bias[0] - bias[1]) / (weight[0] - weight[1]).norm()
    inside = ((examples.images - 0.5).abs() + 0.5 / 12**0.5 < 0.5).all(1)  # where the box does not cut the step
    clear = (margin - 0.5).abs() > 0.02
    assert torch.equal(climb.standing[inside & clear], (margin > 0.5)[inside & clear])
    with pytest.raises(InputError, match="expected a claim that has the norm l2"):
        Ladder(name="t", claim=Square(queries=2), rungs=(), norm="l2")
