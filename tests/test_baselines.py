"""Test that every baseline builds, trains and is what its paper says."""

import importlib
import re
from dataclasses import replace

import pytest
import torch

from bitquorum import objective, randomized, rng
from bitquorum.attacks import PGD
from bitquorum.baselines import (
    DVERGE,
    PARL,
    TRS,
    Baseline,
    DefensiveQuantization,
    Empir,
    FgsmRs,
    FloatEnsemble,
    GaussianControl,
    InputGradient,
    LowBit,
    LowBitEnsemble,
    Mi,
    ParametricNoise,
    PgdAt,
    RandomPrecision,
    SelfEnsemble,
    Setting,
    Sq,
    SqMi,
    Trades,
    Vanilla,
)
from bitquorum.config import Arm
from bitquorum.conversion import is_stochastic
from bitquorum.data import ImageSet, load
from bitquorum.dorefa import Dorefa, Pact
from bitquorum.ensemble import EmpirVote, Ensemble, MeanProbability
from bitquorum.interface import ConfigError, InputError
from bitquorum.objective import Step
from bitquorum.quantizers import Deterministic, Logistic
from bitquorum.registry import decode, encode, registered
from bitquorum.train import Trainer
from bitquorum.zoo import DigitsNet, Linear, SmallResNet

SETTING = Setting(
    network=DigitsNet(width=4), trainer=Trainer(epochs=1, batch_size=16, calibration=16, log_every=1), epsilon=0.1
)
BASELINES = registered(Baseline)
ADVERSARIAL = {"pgd-at", "trades", "fgsm-rs", "dverge"}
STOCHASTIC = {
    *("activation-pruning", "gaussian-control", "parametric-noise", "random-precision", "self-ensemble"),
    *("sq", "sq-mi"),
}
ENSEMBLES = {
    *("adp", "dverge", "empir", "float-ensemble", "gal", "gaussian-control", "low-bit-ensemble", "mi"),
    *("parl", "trs"),
    *("sq", "sq-mi"),
}
VARIANTS = (
    *(cls() for cls in BASELINES.values()),
    LowBit(name="dorefa", bits=3, scheme="dorefa"),
    LowBit(name="pact", bits=3, scheme="pact"),
    Empir(name="empir-mnist", precisions=((2, 4), (2, 4))),
    ParametricNoise(name="pni-at", adversarial_training=True),
    RandomPrecision(name="rpt", bits=(4, 6), adversarial_training=True, epsilon=8 / 255),
    SqMi(name="sq-mi-gradient", gradient=1.0),
)
by_title = pytest.mark.parametrize("baseline", VARIANTS, ids=lambda baseline: baseline.title)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load("digits", "train").take(32)


def build(arm: Arm) -> Ensemble:
    networks = [arm.network(classes=10, shape=(1, 8, 8)) for _ in arm.members]
    return Ensemble.build(networks, arm.members, shared=arm.shared, aggregation=arm.aggregation, passes=arm.passes)


def term_of(arm: Arm, kind: type[objective.Term]) -> objective.Term:
    (found,) = [term for term in arm.objective.terms if isinstance(term, kind)]
    return found


@by_title
def test_a_baseline_and_its_arm_come_back_from_their_tables(baseline: Baseline):
    assert decode(Baseline, encode(baseline)) == baseline
    arm = baseline(Setting())
    assert decode(Arm, encode(arm)) == arm
    assert arm.name == baseline.title
    assert arm.trainer == Setting().trainer


@pytest.mark.long
@by_title
def test_a_baseline_trains_two_steps_and_predicts(baseline: Baseline, digits: ImageSet):
    arm = baseline(SETTING)
    ensemble = build(arm)
    before = {name: value.clone() for name, value in ensemble.named_parameters()}
    losses: list[float] = []
    assert arm.trainer is not None
    arm.trainer(ensemble, digits, arm.objective, report=lambda progress: losses.append(progress.values["loss"]))
    assert len(losses) == 2
    assert torch.tensor(losses).isfinite().all()
    moved = [name for name, value in ensemble.named_parameters() if not torch.equal(value, before[name])]
    assert {name.split(".")[1] for name in moved} == {str(index) for index in range(len(arm.members))}
    batch = digits.batch(torch.arange(8))
    with torch.no_grad(), rng.draw(list(range(arm.passes)), batch.examples):
        predicted = ensemble.predict(ensemble(batch.images))
    assert predicted.shape == (1, 8)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_a_file_a_paper_and_a_docstring_of_its_own(name: str):
    cls = BASELINES[name]
    module = importlib.import_module(cls.__module__)
    assert cls.__module__ == f"bitquorum.baselines.{name.replace('-', '_')}"
    assert re.fullmatch(r".*, \d{4}, https://\S+", cls.paper)
    assert module.__doc__ is not None
    assert len(module.__doc__) > 200
    assert f"`{name.replace('-', '_')}`" in (importlib.import_module("bitquorum.baselines").__doc__ or "")


@pytest.mark.parametrize("name", BASELINES)
def test_what_a_baseline_is(name: str):
    baseline = BASELINES[name]()
    arm = baseline(SETTING)
    assert baseline.adversarial == (name in ADVERSARIAL)
    assert is_stochastic(build(arm)) == (name in STOCHASTIC)
    assert len(arm.members) == (3 if name in ENSEMBLES else 1)
    assert len(baseline(replace(SETTING, members=5)).members) == (5 if name in ENSEMBLES else 1)


def test_adversarial_training_on_request_is_told():
    assert ParametricNoise(adversarial_training=True).adversarial
    assert RandomPrecision(adversarial_training=True).adversarial


def test_a_row_is_named_by_its_type_or_as_told():
    assert PgdAt().title == "pgd-at"
    assert SqMi(name="mine")(SETTING).name == "mine"


@pytest.mark.parametrize("members", [1, 4])
def test_members_trained_apart_get_their_own_gradient_in_full(members: int, digits: ImageSet):
    setting = replace(SETTING, members=members)
    arm = FloatEnsemble()(setting)
    batch = digits.batch(torch.arange(8))
    ensemble = build(arm)
    single = Ensemble([ensemble.members[0]])

    def gradient(of: Ensemble, terms: objective.Objective) -> torch.Tensor:
        step = Step(
            ensemble=of, images=batch.images, labels=batch.labels, examples=batch.examples, progress=0.0, seed=0,
            memory={}, reduce=objective.Reduce(),
        )  # fmt: skip
        weight = of.members[0].get_submodule("classifier").weight
        return torch.autograd.grad(terms(step)[0], weight)[0]

    alone = gradient(single, Vanilla()(setting).objective)
    torch.testing.assert_close(gradient(ensemble, arm.objective), alone)


def test_empir_has_two_low_precision_members_with_quantized_images_and_a_float_one_that_breaks_ties():
    arm = Empir()(SETTING)
    assert arm.members[:2] == (
        Dorefa(weight_bits=4, activation_bits=2, first=True), Dorefa(weight_bits=2, activation_bits=2, first=True)
    )  # fmt: skip
    assert arm.precision == "w4a2 w2a2 fp"
    assert arm.aggregation == EmpirVote(full_precision=-1)
    assert term_of(arm, objective.MemberCrossEntropy).weight == 3
    assert VARIANTS[-4](SETTING).precision == "w2a4 w2a4 fp"
    assert Empir()(replace(SETTING, members=1)).precision == "fp"


@pytest.mark.parametrize(("scheme", "kind"), [("dorefa", Dorefa), ("pact", Pact)])
def test_low_bit_has_the_bits_and_scheme_that_it_is_given(scheme: str, kind: type):
    (member,) = LowBit(bits=3, scheme=scheme)(SETTING).members
    assert isinstance(member, kind)
    assert member.label == "w3a3"


def test_low_bit_is_lsq_of_four_bits():
    (member,) = LowBit()(SETTING).members
    assert member.label == "w4a4"
    assert member.learned
    assert {member.weight_law, member.activation_law} == {Deterministic()}
    with pytest.raises(ConfigError, match="scheme: expected one of 'lsq', 'dorefa', 'pact', got 'hawq'"):
        decode(Baseline, {"type": "low-bit", "scheme": "hawq"})


def test_networks_get_the_activation_that_a_defence_needs():
    smooth = replace(SETTING, network=SmallResNet(activation="silu"))
    assert InputGradient()(SETTING).network == DigitsNet(width=4, activation="gelu")
    assert InputGradient()(smooth).network == smooth.network
    assert InputGradient()(replace(SETTING, network=Linear())).network == Linear()
    assert LowBit(scheme="pact")(smooth).network == SmallResNet(activation="relu")
    assert LowBit()(smooth).network == smooth.network


@pytest.mark.parametrize(("baseline", "steps", "step_size"), [(PgdAt, 7, 0.25), (FgsmRs, 1, 1.25), (Trades, 10, 0.25)])
def test_adversarial_training_follows_the_radius_of_the_setting(baseline: type, steps: int, step_size: float):
    for given, expected in ((None, 0.1), (0.2, 0.2)):
        term = baseline(epsilon=given)(SETTING).objective.terms[-1]
        assert term.epsilon == expected
        assert term.attack == PGD(steps=steps, step_size=step_size)
    with pytest.raises(InputError, match="expected epsilon in"):
        baseline(epsilon=0.0)


def test_pgd_at_and_fgsm_rs_see_adversarial_images_alone_and_trades_sees_both():
    assert [type(term) for term in PgdAt()(SETTING).objective.terms] == [objective.Adversarial]
    assert [type(term) for term in FgsmRs()(SETTING).objective.terms] == [objective.Adversarial]
    assert [term.weight for term in Trades()(SETTING).objective.terms] == [1, 6]


def test_parametric_noise_weighs_clean_and_adversarial_images_equally():
    arm = ParametricNoise(adversarial_training=True)(SETTING)
    assert [term.weight for term in arm.objective.terms] == [0.5, 0.5]
    assert term_of(arm, objective.Adversarial).epsilon == 0.1


def test_input_gradient_weighs_the_l1_norm_by_the_radius():
    term = term_of(InputGradient()(SETTING), objective.InputGradient)
    assert (term.weight, term.norm) == (0.1, "l1")
    assert term_of(InputGradient(epsilon=0.3)(SETTING), objective.InputGradient).weight == 0.3


def test_sq_mi_and_its_controls_differ_in_one_thing_each():
    arms = {cls: cls()(SETTING) for cls in (LowBitEnsemble, Mi, Sq, SqMi, GaussianControl)}
    assert {arms[cls].precision for cls in (LowBitEnsemble, Mi, Sq, SqMi)} == {"w4a4 w3a3 w4a2"}
    assert arms[LowBitEnsemble].members == arms[Mi].members
    assert arms[Sq].members == arms[SqMi].members
    assert arms[LowBitEnsemble].objective == arms[Sq].objective
    assert arms[Mi].objective == arms[SqMi].objective == arms[GaussianControl].objective
    for cls, law in ((Mi, Deterministic()), (SqMi, Logistic())):
        assert {member.activation_law for member in arms[cls].members} == {law}
    for noisy, policy in zip(arms[GaussianControl].members, arms[SqMi].members, strict=True):
        assert isinstance(noisy, randomized.GaussianControl)
        assert (noisy.weight_bits, noisy.activation_bits) == (policy.weight_bits, policy.activation_bits)
        assert noisy.activation_law == policy.activation_law


def test_sq_mi_is_the_preset_and_takes_a_gradient_penalty_of_twice_the_radius():
    assert [(type(term).__name__, term.weight) for term in SqMi()(SETTING).objective.terms] == [
        ("MemberCrossEntropy", 1), ("EnsembleCrossEntropy", 1), ("FeatureMI", 0.1), ("ConditionalMI", 0.1)
    ]  # fmt: skip
    assert term_of(SqMi(gradient=1.0)(SETTING), objective.InputGradient).weight == 0.2
    with pytest.raises(InputError, match="expected a gradient penalty of at least 0"):
        SqMi(gradient=-1.0)


def test_precisions_repeat_in_turn():
    assert Sq(precisions=((4, 4), (2, 2)))(SETTING).precision == "w4a4 w2a2 w4a4"
    with pytest.raises(InputError, match="expected at least one pair"):
        Sq(precisions=())(SETTING)


def test_passes_and_weights_reach_the_arm():
    assert SelfEnsemble(passes=2)(SETTING).passes == 2
    assert SelfEnsemble()(SETTING).aggregation == MeanProbability()
    assert term_of(DefensiveQuantization(beta=0.5)(SETTING), objective.Orthogonality).weight == 0.5
    assert term_of(DVERGE(epsilon=0.1)(SETTING), objective.DVERGE).epsilon == 0.1
    assert [(type(term).__name__, term.weight) for term in PARL(weight=0.5)(SETTING).objective.terms] == [
        ("MemberCrossEntropy", 3), ("PARL", 1.5)
    ]  # fmt: skip
    assert term_of(PARL(layers=2)(SETTING), objective.PARL).layers == 2
    assert term_of(TRS()(SETTING), objective.TRS).smoothness == 2.5 / 128**2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Setting(epsilon=0.0), "expected epsilon in"),
        (lambda: Setting(members=0), "at least one member"),
        (lambda: PgdAt(steps=0), "expected at least one step and a positive step_size"),
        (lambda: FgsmRs(step_size=0.0), "expected a positive step_size"),
        (lambda: Trades(beta=0.0), "expected a positive beta"),
    ],
)
def test_bad_numbers_are_refused(make, message: str):
    with pytest.raises(InputError, match=message):
        make()
