"""Test that experiments are read completely, and that what is not understood is refused with advice."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from bitquorum.config import Arm, DataChoice, Experiment, parse, presets, read
from bitquorum.conversion import Policy
from bitquorum.interface import ConfigError, InputError
from bitquorum.objective import InputGradient, LinearizedLoss, MemberCrossEntropy
from bitquorum.quantizers import Deterministic, Gaussian, Logistic
from bitquorum.registry import decode, digest, encode, to_toml
from bitquorum.zoo import DigitsNet, Linear


def test_the_presets_are_there():
    assert set(presets()) >= {"digits", "fashion-mnist", "cifar10", "cifar10-small"}


@pytest.mark.parametrize("name", presets())
def test_every_preset_comes_back_from_its_own_text(name: str):
    experiment = read(name)
    assert experiment.name == name
    assert presets()[name].startswith("# "), "the list of presets prints the first comment"
    table = encode(experiment)
    assert tomllib.loads(to_toml(table)) == table
    again = decode(Experiment, tomllib.loads(to_toml(table)))
    assert again == experiment
    assert digest(again) == digest(experiment)


@pytest.mark.parametrize("name", [name for name in presets() if not name.startswith(("empir-", "cifar10-robust"))])
def test_every_preset_of_ours_compares_arms_that_differ(name: str):
    arms = read(name).arms
    assert len({arm.name for arm in arms}) == len(arms) >= 4
    assert len({digest(arm) for arm in arms}) == len(arms)
    assert {arm.network for arm in arms} == {arms[0].network}, "the arms compare precision and loss, not networks"
    by_name = {arm.name: arm for arm in arms}
    assert by_name["vanilla"].precision == "fp"
    assert by_name["sq-mi"].precision == by_name["low-bit"].precision
    assert all(isinstance(member.activation_law, Deterministic) for member in by_name["low-bit"].members)
    assert all(isinstance(member.activation_law, Logistic) for member in by_name["sq-mi"].members)
    assert not any(isinstance(term, InputGradient) for term in by_name["sq-mi"].objective.terms)
    (penalty,) = [term for term in by_name["sq-mi-gradient"].objective.terms if isinstance(term, InputGradient)]
    assert penalty.weight > 0


@pytest.mark.parametrize("name", [name for name in presets() if name.startswith("cifar10-robust")])
def test_the_robust_presets_keep_to_four_bits_and_to_natural_images(name: str):
    arms = {arm.name: arm for arm in read(name).arms}
    arms.pop("pgd-at", None)
    known = {"cifar10-robust-long": "held", "cifar10-robust-aligned": "shifted"}
    assert known.get(name, "sq-gradient") in arms
    for arm in arms.values():
        assert all(isinstance(member, Policy) for member in arm.members)
        bits = [(member.weight_bits, member.activation_bits) for member in arm.members]
        assert all(count is not None and count <= 4 for pair in bits for count in pair)
        linear = ("linearized", "held", "aligned", "shifted", "looks")
        smooth = LinearizedLoss if arm.name in linear else InputGradient
        assert {type(term) for term in arm.objective.terms} == {MemberCrossEntropy, smooth}


def test_the_long_robust_preset_trains_an_arm_of_the_other_for_more_epochs():
    short, long = read("cifar10-robust"), read("cifar10-robust-long")
    (arm,) = long.arms
    assert arm in short.arms
    assert long.trainer == replace(short.trainer, epochs=36)
    assert replace(long, name=short.name, trainer=short.trainer, arms=short.arms) == short


def test_the_arms_of_the_aligned_preset_are_looks_by_one_training():
    long, chosen = read("cifar10-robust-long"), read("cifar10-robust-aligned")
    aligned, *others = chosen.arms
    assert (aligned.members, aligned.objective) == (long.arms[0].members, long.arms[0].objective)
    assert chosen.trainer == replace(long.trainer, epochs=17, warmup=0.03)
    for arm in others:
        assert replace(arm, name="aligned", start=None, trainer=None, mirrored=None, shift=None) == aligned
        assert (arm.start, arm.trainer.epochs if arm.trainer else None) == ("aligned", 0)
    assert [(arm.mirrored, arm.shift) for arm in others] == [(None, 1), (True, 1)]


def test_a_stored_config_replays(tmp_path: Path):
    experiment = read("digits", ["seed=3"])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(encode(experiment)))
    assert read(str(path)) == experiment


def test_numbers_of_too_many_digits_are_refused(tmp_path: Path):
    path = tmp_path / "long.toml"
    path.write_text("seed = " + "1" * 5000)
    with pytest.raises(ConfigError, match=r"expected TOML in .*long.toml"):
        read(str(path))
    for override in ("seed=" + "1" * 5000, f"trainer.lr=1{'0' * 400}/1"):
        with pytest.raises(ConfigError, match="expected"):
            read("digits", [override])


def test_fractions_are_numbers():
    (arm,) = parse(
        {
            "name": "x",
            "evaluation": {"epsilons": ["1/255", "5/255", 0.5]},
            "arms": [{"name": "a", "objective": {"terms": [{"type": "input-gradient", "weight": "5/255"}]}}],
        }
    ).arms
    assert arm.objective.terms[0].weight == 5 / 255
    assert read("digits", ['evaluation.epsilons=["1/255", "5/255"]']).evaluation.epsilons == (1 / 255, 5 / 255)
    with pytest.raises(ConfigError, match=r"evaluation\.epsilons\.0: expected a finite number, got '5/0'"):
        read("digits", ['evaluation.epsilons=["5/0"]'])


def test_overrides_reach_every_depth_and_the_last_one_wins():
    overrides = [
        "seed=4",
        "trainer.epochs=3",
        "trainer.epochs=2",
        "arms.0.network.width=8",
        "arms.2.members.1.activation_bits=none",
        'arms.2.members.0.activation_law={type="gaussian", scale=0.4}',
        "data.name=folder:pictures",
    ]
    experiment = read("digits", overrides)
    assert (experiment.seed, experiment.trainer.epochs, experiment.data.name) == (4, 2, "folder:pictures")
    assert experiment.arms[0].network == DigitsNet(width=8)
    assert experiment.arms[2].members[1].activation_bits is None
    assert experiment.arms[2].members[0].activation_law == Gaussian(scale=0.4)
    assert experiment.arms[2].precision == "w4a4 w3a32 w4a2"
    assert experiment.arms[1] == read("digits").arms[1]


def test_every_choice_changes_the_digest():
    overrides = ["seed=1", "data.train=500", "kernels=compiled", "trainer.lr=0.2", "evaluation.draws=21", "name=x"]
    digests = {digest(read("digits", [override])) for override in overrides}
    assert len(digests | {digest(read("digits"))}) == 7
    assert digest(read("digits", ["seed=0", "trainer.epochs=12"])) == digest(read("digits"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epoch=3", r"trainer\.epoch: expected a key among .*did you mean 'epochs'\?"),
        ("trainr.epochs=3", r"trainr: expected a key among .*did you mean 'trainer'\?"),
        ("arms.0.network.type=digitnet", r"arms\.0\.network\.type: expected one of .*did you mean 'digitsnet'\?"),
        ("arms.9.name=x", r"arms: expected an index below 4, got '9'"),
        ("arms.0.shared=yes", r"arms\.0\.shared: expected true or false, got 'yes'"),
        ("trainer.epochs=many", r"trainer\.epochs: expected an integer, got 'many'"),
        (
            "trainer.epochs=0",
            r"expected at least one epoch of training in arm 'vanilla', got 0; without one it needs a",
        ),
        ("trainer.epochs=-1", r"trainer: expected batch_size and log_every of at least 1 and epochs and calibration"),
        ("trainer.optimizer=adma", r"trainer\.optimizer: expected one of .*did you mean 'adam"),
        ("kernels=fast", r"kernels: expected one of 'eager', 'compiled', got 'fast'"),
        ("data.train=-1", r"data: expected a number of training images of at least 0, got -1"),
        ("arms=[]", r"expected at least one arm and different names"),
        ("arms.1.name=vanilla", r"expected at least one arm and different names, got \['vanilla', 'vanilla'"),
        ("arms.0.name=a/b", r"arms\.0: expected an arm name of letters"),
        (
            "arms.0.start=vanilla",
            r"expected as start of arm 'vanilla' an arm before it .*\(there is none\)",
        ),
        ("arms.1.start=vanilla", r"expected as start of arm '\S+' an arm before it with its network, precisions"),
        ("arms.0.members=[]", r"arms\.0: expected at least one member in arm 'vanilla'"),
        ("epochs", r"expected an assignment, got 'epochs'; write a key and a value like trainer\.epochs=3"),
        ("evaluation.attacks=[{type='pdg'}]", r"evaluation\.attacks\.0\.type: expected one of .*did you mean 'pgd'\?"),
        ("evaluation.attacks=[{type='pgd', stpes=2}]", r"evaluation\.attacks\.0\.stpes: .*did you mean 'steps'\?"),
        ("evaluation.epsilons=[0.2, 0.1]", r"evaluation: expected increasing epsilons"),
        ("evaluation.epsilons=[0.1, 0.1000002]", r"evaluation: expected increasing epsilons .* a millionth apart"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        read("digits", [override])


def test_unknown_presets_and_bad_files_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"expected a preset or a path that ends in \.toml, got 'digit'.*'digits'"):
        read("digit")
    with pytest.raises(ConfigError, match=r"expected a TOML file at .*, got none; check the path"):
        read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="expected a TOML file at"):
        read(f"{tmp_path}/")
    path = tmp_path / "bad.toml"
    path.write_text("seed = 1\nname = ]\n")
    with pytest.raises(ConfigError, match=r"expected TOML in .*bad\.toml, got: .*line 2.*; mend that place"):
        read(str(path))
    path.write_text(f"name = {'[' * 5000}{']' * 5000}")
    with pytest.raises(ConfigError, match=r"expected TOML in .*bad\.toml, got: .*recursion.*; mend that place"):
        read(str(path))
    with pytest.raises(ConfigError, match=r"expected an integer, got '\[\["):
        read("digits", [f"seed={'[' * 5000}{']' * 5000}"])
    path.write_bytes(b"name = \xff\xfe")
    with pytest.raises(ConfigError, match="expected TOML in"):
        read(str(path))
    path.write_text("seed = 1")
    with pytest.raises(ConfigError, match="name: expected a string, got no value; add the key"):
        read(path)


@pytest.mark.parametrize("name", ["", "../x", "a b", "a/b", ".", ".."])
def test_an_arm_is_named_like_a_folder(name: str):
    with pytest.raises(InputError, match="expected an arm name"):
        Arm(name=name)


def test_precision_is_short():
    members = (Policy(weight_bits=None, activation_bits=None), Policy(weight_bits=2, activation_bits=8, image_bits=3))
    assert Arm(name="a", network=Linear(), members=members).precision == "fp w2a8i3"


def test_defaults_need_nothing():
    assert Experiment(name="x").data == DataChoice(name="digits", train=0, normalize=True)
    assert parse({"name": "x"}) == Experiment(name="x")
