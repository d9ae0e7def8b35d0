"""Run ensembles with separate and with shared weights, and aggregate hand-made logits."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from bitquorum import rng, zoo
from bitquorum.conversion import Policy, convert, quantizers
from bitquorum.ensemble import (
    Aggregation,
    EmpirVote,
    Ensemble,
    MajorityVote,
    MeanLogits,
    MeanProbability,
    classifier,
    mean_log_probability,
    share_weights,
    votes,
)
from bitquorum.interface import InputError
from bitquorum.layers import QuantLayer
from bitquorum.quantizers import Deterministic, StochasticRounding
from bitquorum.registry import decode, encode, registered

NOISELESS = Policy(weight_law=Deterministic(), activation_law=Deterministic())
ANY_RULE: Any = Aggregation
AGGREGATIONS = {name: rule() for name, rule in registered(ANY_RULE).items()}


def network(seed=0, norm="batch") -> Any:
    with rng.torch_seed(seed):
        return zoo.DigitsNet(width=4, norm=norm)(classes=3, shape=(1, 8, 8)).double().eval()


MIXED = (Policy(weight_bits=2), Policy(weight_bits=4), None)


def build(policies=MIXED, **options) -> Any:
    return Ensemble.build([network(seed) for seed in range(len(policies))], policies, **options)


def images(count=5):
    return rng.uniform(6, torch.arange(count), 64).view(count, 1, 8, 8).double()


def run(model, x, seeds: Any = 0, examples=None) -> Any:
    with rng.draw(seeds, examples), torch.no_grad():
        return model(x)


def logits_of(*probabilities):
    """Return logits [1, members, 1, classes] of the members' probabilities."""
    return torch.tensor(probabilities).log()[None, :, None]


def choices(*classes, count=4, strength=1.0):
    """Return logits [1, members, 1, classes] of members that prefer the given classes."""
    return strength * nn.functional.one_hot(torch.tensor(classes), count).float()[None, :, None]


# Members


def test_logits_have_draws_members_examples_and_classes():
    ensemble, x = build(), images()
    assert run(ensemble, x, [1, 2]).shape == (2, 3, 5, 3)
    with torch.no_grad():
        assert ensemble(x).shape == (1, 3, 5, 3)
        assert not torch.equal(ensemble(x), ensemble(x))


def test_each_draw_and_member_stands_for_itself():
    ensemble, x = build(), images()
    index = torch.tensor([8, 3, 1, 7, 2])
    both = run(ensemble, x, [1, 2], index)
    for row, seed in enumerate([1, 2]):
        assert torch.allclose(both[row], run(ensemble, x, seed, index)[0], atol=1e-9)
        for place, member in enumerate(ensemble.members):
            assert torch.allclose(both[row, place], run(member, x, seed, index), atol=1e-9)
    assert torch.equal(both[0, 2], both[1, 2])  # full precision
    assert torch.equal(both[0, 2], network(2)(x))
    assert not torch.equal(both[0, 0], both[1, 0])


@pytest.mark.parametrize("training", [False, True])
def test_draws_share_what_comes_before_the_first_noise(training):
    network = zoo.DigitsNet(width=4, norm="batch")(classes=3, shape=(1, 8, 8)).double()
    ensemble = Ensemble.build([network], [Policy(weight_bits=2)]).train(training)
    (member,) = ensemble.members
    rows, x = {}, torch.rand(5, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    member[0].register_forward_hook(lambda *call: rows.update(image=len(call[-1])))
    member[-1].register_forward_hook(lambda *call: rows.update(logits=len(call[-1])))
    with rng.draw([1, 2, 3]):
        together = ensemble(x)
    assert rows == {"image": 15 if training else 5, "logits": 15}
    if training:  # where one draw's norm layers would see another batch
        return
    apart = []
    for seed in (1, 2, 3):
        with rng.draw(seed):
            apart.append(ensemble(x)[0])
    torch.testing.assert_close(together, torch.stack(apart))
    slopes = torch.linspace(-1, 1, together.numel(), dtype=torch.float64).view_as(together)
    gradients = [torch.autograd.grad((y * slopes).sum(), x)[0] for y in (together, torch.stack(apart))]
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(*gradients)


def test_draws_that_differ_from_the_image_on_share_nothing():
    network = zoo.DigitsNet(width=4)(classes=3, shape=(1, 8, 8))
    ensemble = Ensemble.build([network], [Policy(image_bits=2)]).eval()
    rows = []
    for module in ensemble.modules():
        if isinstance(module, nn.Conv2d | QuantLayer):
            module.register_forward_hook(lambda *call: rows.append(len(call[-1])))
    run(ensemble, torch.rand(5, 1, 8, 8), [1, 2])
    assert set(rows) == {10}


def test_a_first_noise_that_is_used_again_repeats_the_batch_once():
    shared = nn.ReLU()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), shared, nn.Linear(6, 6), shared, nn.Linear(6, 3)).double()
    ensemble = Ensemble.build([network], [Policy(weight_bits=None)]).eval()
    index = torch.tensor([8, 3, 1, 7, 2])
    both = run(ensemble, images(), [1, 2], index)
    assert both.shape == (2, 1, 5, 3)
    for row, seed in enumerate([1, 2]):
        assert torch.allclose(both[row], run(ensemble, images(), seed, index)[0], atol=1e-9)


def test_hooks_of_a_member_see_every_draw():
    ensemble, seen = build(), []
    ensemble.members[0].register_forward_hook(lambda *call: seen.append(len(call[-1])))
    run(ensemble, images(), [1, 2, 3])
    assert seen == [15]


@pytest.mark.long
def test_threads_may_share_an_ensemble():
    ensemble = build()
    expected = [run(ensemble, images(), [seed, seed + 1]) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda task: run(ensemble, images(), [task % 4, task % 4 + 1]), range(80)))
    for task, logits in enumerate(found):
        assert torch.equal(logits, expected[task % 4])


def test_members_of_one_network_draw_differently():
    ensemble = Ensemble.build([network()] * 2, [Policy()] * 2)
    addresses = [quantizer.address for _, quantizer in quantizers(ensemble)]
    assert len(set(addresses)) == len(addresses)
    assert all(address.startswith("members.") for address in addresses)
    found = run(ensemble, images(), 3)[0]
    assert not torch.equal(found[0], found[1])


def test_noise_of_two_members_does_not_correlate():
    policy = Policy(activation_bits=8, activation_law=StochasticRounding())
    ensemble = Ensemble([convert(nn.Sequential(nn.ReLU()), policy) for _ in range(2)])
    first, second = run(ensemble, torch.full((200, 50), 1.5 / 255 + 1.0), 0)[0]
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 5 / 100


def test_an_ensemble_survives_pickle_copy_and_state():
    ensemble, x = build(shared=True), images()
    other = build(shared=True)
    other.load_state_dict(ensemble.state_dict())
    for twin in (pickle.loads(pickle.dumps(ensemble)), copy.deepcopy(ensemble), other):
        assert torch.equal(run(twin, x, [4, 5]), run(ensemble, x, [4, 5]))


def test_separate_members_have_nothing_in_common():
    ensemble = build()
    pointers = [{p.data_ptr() for p in member.parameters()} for member in ensemble.members]
    assert not set.intersection(*pointers)


def test_bad_ensembles_are_refused():
    with pytest.raises(InputError, match="at least one member"):
        Ensemble([])
    with pytest.raises(InputError, match="at least one pass"):
        Ensemble([nn.Linear(2, 2)], passes=0)
    with pytest.raises(InputError, match="one network for each policy, got 1 networks and 2 policies"):
        Ensemble.build([network()], [None, None])
    for place in (2, -3):
        with pytest.raises(InputError, match=f"the place of one of 2 members, got {place}"):
            EmpirVote(full_precision=place)(torch.zeros(1, 2, 1, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_without_probabilities_are_no_answer(value):
    logits = torch.zeros(2, 1, 3, 3)
    logits[0, 0, 1, :2] = value
    logits[1, 0, 2] = -math.inf
    logits[1, 0, 0, 0] = -math.inf  # one class that cannot be: an answer
    model = Ensemble([nn.Identity()])
    assert model.predict(logits).tolist() == [[0, 2 if value < 0 else -1, 0], [1, 0, -1]]


# Shared weights


def test_gradients_of_all_members_reach_the_one_weight():
    ensemble = build(shared=True)
    weights = [layer(member).weight for member in ensemble.members]
    assert weights[0] is weights[1] is weights[2]
    with rng.draw(1):
        losses = ensemble(images()).square().mean((0, 2, 3))
    single = [torch.autograd.grad(loss, weights[0], retain_graph=True)[0] for loss in losses]
    assert all(gradient.any() for gradient in single)
    losses.sum().backward()
    assert torch.allclose(weights[0].grad, torch.stack(single).sum(0), atol=1e-12)
    stepped = weights[0].detach().clone()
    torch.optim.SGD(ensemble.parameters(), lr=0.1).step()
    assert not torch.equal(weights[2], stepped)


def layer(member) -> Any:
    inner = member.conv1
    return inner.layer if isinstance(inner, QuantLayer) else inner


def test_shared_members_keep_their_own_ranges_and_norms():
    ensemble = build(shared=True)
    first, second, full = ensemble.members
    assert first.norm1.weight is not second.norm1.weight
    assert first.norm1.running_mean is not full.norm1.running_mean
    assert first.conv1.quantizer.log_step is not second.conv1.quantizer.log_step
    assert first.conv1.layer.weight is second.conv1.layer.weight
    names = [name for name, _ in ensemble.named_parameters() if name.endswith("conv2.weight")]
    assert len(names) + sum("conv2.layer.weight" in name for name, _ in ensemble.named_parameters()) == 1


def test_ranges_are_fitted_to_the_weights_that_are_shared():
    ensemble = build(shared=True)
    alone: Any = convert(network(0), Policy(weight_bits=4))
    for name in ("conv1", "conv2", "classifier"):
        found = ensemble.members[1].get_submodule(name).quantizer
        assert torch.equal(found.log_step, alone.get_submodule(name).quantizer.log_step)


def test_shared_biases_and_what_stays_apart():
    members: Any = [network(0, norm="none"), convert(network(1, norm="none"), Policy())]
    share_weights(members)
    assert members[0].conv1.bias is members[1].conv1.layer.bias
    assert members[0].classifier.weight is members[1].classifier.layer.weight


def test_sharing_survives_a_copy_and_a_change_of_type():
    ensemble = copy.deepcopy(build(shared=True)).float()
    first, second, full = ensemble.members
    assert first.conv1.layer.weight is second.conv1.layer.weight is full.conv1.weight
    assert full.conv1.weight.dtype == torch.float32


def test_different_architectures_cannot_share():
    other = zoo.DigitsNet(width=6)(classes=3, shape=(1, 8, 8))
    with pytest.raises(InputError, match="members of one architecture"):
        Ensemble.build([network().float(), other], [Policy(), Policy()], shared=True)


# Features


@pytest.mark.parametrize("seeds", [1, [1, 2, 3]])
def test_features_are_what_the_classifier_sees(seeds):
    ensemble = build((Policy(), NOISELESS, None))
    x = images()
    outputs = run(ensemble.outputs, x, seeds)
    draws = 1 if isinstance(seeds, int) else len(seeds)
    assert torch.equal(outputs.logits, run(ensemble, x, seeds))
    assert len(outputs.features) == 3
    for place, (member, features) in enumerate(zip(ensemble.members, outputs.features, strict=True)):
        assert features.shape == (draws * 5, 16)
        head = classifier(member)
        logits = run(head, features, seeds).unflatten(0, (draws, -1))
        assert torch.allclose(logits, outputs.logits[:, place], atol=1e-9)
    assert torch.equal(outputs.features[2][:5], network(2)[:-1](x))
    assert not any(module._forward_pre_hooks for module in ensemble.modules())


def test_features_carry_gradients():
    ensemble = build((Policy(), None))
    with rng.draw(0):
        features = ensemble.outputs(images()).features
    for member, z in zip(ensemble.members, features, strict=True):
        (gradient,) = torch.autograd.grad(z.square().sum(), layer(member).weight)
        assert gradient.any()


# Mirror images


@pytest.mark.parametrize("seeds", [1, [1, 2, 3]])
def test_a_mirrored_ensemble_answers_to_the_mirror_image_as_well(seeds):
    plain, mirrored = build().eval(), build(mirrored=True).eval()
    mirrored.load_state_dict(plain.state_dict())
    x = images()
    answers = run(mirrored, x, seeds)
    assert torch.equal(answers[:, :3], run(plain, x, seeds))
    assert torch.equal(answers[:, 3:], run(plain, x.flip(-1), seeds))
    assert answers.shape[1] == mirrored.answers == 6
    outputs = run(mirrored.outputs, x, seeds)
    assert torch.equal(outputs.logits, answers)
    for place, of in ((0, x), (3, x.flip(-1))):
        for member, features in enumerate(run(plain.outputs, of, seeds).features):
            assert torch.equal(outputs.features[place + member], features)


def test_a_mirrored_ensemble_says_the_same_of_an_image_and_its_mirror_image():
    x = images(60)
    plain = Ensemble.build([network()], [NOISELESS]).eval()
    ensemble = Ensemble.build([network()], [NOISELESS], mirrored=True).eval()
    one, other = (ensemble.aggregation(run(ensemble, look)) for look in (x, x.flip(-1)))
    torch.testing.assert_close(one, other)
    assert not torch.allclose(run(plain, x), run(plain, x.flip(-1)))
    look = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ensemble(look)[0, 1, :, 0].sum(), look)
    assert gradient.any(), "an attack sees the second look"


def moved(x: torch.Tensor) -> torch.Tensor:
    """Return the images one pixel down and to the right, as cutting a place out of padded ones makes them."""
    return nn.functional.pad(x, (1, 1, 1, 1))[:, :, : x.shape[2], : x.shape[3]]


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_shifted_ensemble_answers_to_every_look_moved_as_well(mirrored):
    plain, shifted = build(mirrored=mirrored).eval(), build(mirrored=mirrored, shift=1).eval()
    shifted.load_state_dict(plain.state_dict())
    x = images()
    looks = [x, x.flip(-1)] if mirrored else [x]
    looks += [moved(look) for look in looks]
    found = shifted.looks(x)
    assert all(map(torch.equal, found, looks))
    assert len(found) == len(looks)
    answers = run(shifted, x, [1, 2])
    single = build().eval()
    single.load_state_dict(plain.state_dict())
    assert torch.equal(answers, torch.cat([run(single, look, [1, 2]) for look in looks], 1))
    assert answers.shape[1] == shifted.answers == 3 * len(looks)
    assert torch.equal(run(shifted.outputs, x, [1, 2]).logits, answers)
    look = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(shifted(look)[0, -1, :, 0].sum(), look)
    assert gradient.any(), "an attack sees the last look"


def test_training_sees_images_as_they_are():
    for ensemble, looks in ((build(mirrored=True), 2), (build(shift=1), 2), (build(mirrored=True, shift=2), 4)):
        ensemble.train()
        assert run(ensemble, images()).shape[1] == ensemble.answers == 3
        assert copy.deepcopy(ensemble).eval().answers == 3 * looks
        assert len(run(ensemble.outputs, images()).features) == 3


def test_what_is_no_image_has_no_second_look():
    for ensemble in (Ensemble([nn.Linear(2, 2)], mirrored=True), Ensemble([nn.Linear(2, 2)], shift=1)):
        with pytest.raises(
            InputError, match=r"expected images \[batch, channels, height, width\] of a mirrored or shift"
        ):
            ensemble.eval()(torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"larger than its shift of 4, got \[1, 1, 9, 4\]"):
        build(shift=4).eval()(torch.zeros(1, 1, 9, 4))
    with pytest.raises(InputError, match="shift of at least 0 pixels, got -1"):
        build(shift=-1)


def test_the_classifier_is_the_last_linear_layer():
    member = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert classifier(member) is member[2]
    quantized: Any = convert(member, Policy())
    assert classifier(quantized) is quantized[2]
    with pytest.raises(InputError, match="expected a member with a linear layer"):
        classifier(nn.Sequential(nn.Conv2d(1, 1, 1)))


# Aggregation


@pytest.mark.parametrize("rule", AGGREGATIONS.values(), ids=AGGREGATIONS)
def test_every_aggregation_keeps_its_contract(rule):
    logits = torch.randn(4, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    scores = rule(logits)
    assert scores.shape == (6, 5)
    assert scores.dtype == torch.float64
    assert torch.equal(rule(logits), scores)
    assert pickle.loads(pickle.dumps(rule)) == rule == decode(Aggregation, encode(rule))
    assert torch.allclose(rule(logits[torch.randperm(4)]), scores)  # draws have no order
    assert torch.allclose(rule(logits[:, :, [3, 0]]), scores[[3, 0]])
    same = rule(logits[:1, :1].expand(4, 3, -1, -1))
    assert torch.equal(same.argmax(-1), logits[0, 0].argmax(-1))
    if rule.differentiable:
        (gradient,) = torch.autograd.grad(scores.square().sum(), logits)
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


def test_mean_probability_and_mean_logits():
    logits = logits_of([0.7, 0.2, 0.1], [0.1, 0.3, 0.6])
    assert MeanProbability()(logits)[0].exp().tolist() == pytest.approx([0.4, 0.25, 0.35])
    root = [math.sqrt(a * b) for a, b in ((0.7, 0.1), (0.2, 0.3), (0.1, 0.6))]
    assert MeanLogits()(logits)[0].exp().tolist() == pytest.approx([value / sum(root) for value in root])


def test_mean_probability_is_stable_and_exact_for_one_view():
    logits = torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]])
    assert mean_log_probability(logits)[0].tolist() == pytest.approx([-math.log(2)] * 2)
    assert torch.equal(mean_log_probability(logits[:1]), logits[0].log_softmax(-1))


def test_votes_count_draws_and_members():
    logits = torch.cat([choices(0, 1, 1), choices(3, 1, 0)])
    assert votes(logits)[0].tolist() == [2, 3, 0, 1]


def test_a_majority_overrules_confidence_and_ties_go_to_the_mean_probability():
    logits = choices(0, 0, 1)
    logits[0, 2] *= 50
    assert MajorityVote()(logits).argmax() == 0
    assert MeanProbability()(logits).argmax() == 1
    tied = choices(0, 0, 1, 1, 2)
    tied[0, 3] *= 50
    assert MajorityVote()(tied).argmax() == 1


@pytest.mark.parametrize(
    ("picks", "expected"),
    [
        ((0, 0, 1), 0),  # a majority against full precision
        ((2, 2, 2), 2),
        ((0, 1, 2), 2),  # three ways: full precision decides
        ((0, 2, 2), 2),
        ((0, 0, 1, 1, 2), 2),  # a tie for the first place, without the full-precision member's class
        ((0, 0, 1, 1, 1), 1),
        ((0, 0, 1, 1, 0), 0),
        ((1, 0), 0),
    ],
)
def test_empir_breaks_ties_by_full_precision(picks, expected):
    assert EmpirVote()(choices(*picks)).argmax() == expected
    reversed_order = choices(*reversed(picks))
    assert EmpirVote(full_precision=0)(reversed_order).argmax() == expected


def test_empir_sums_votes_over_draws():
    logits = torch.cat([choices(0, 1, 2), choices(0, 1, 1), choices(1, 0, 2)])
    assert votes(logits)[0].tolist() == [3, 4, 2, 0]
    assert EmpirVote()(logits).argmax() == 1
    tied = torch.cat([choices(0, 1, 2), choices(0, 1, 3)])
    tied[1, 2] *= 3
    assert EmpirVote()(tied).argmax() == 3  # the full-precision member's mean probability over draws


def test_a_prediction_consumes_its_passes():
    ensemble = Ensemble([nn.Linear(2, 2)], aggregation=MeanProbability(), passes=2)
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])[:, None, None]
    assert ensemble.predict(logits).tolist() == [[0], [1]]
    ensemble = Ensemble([nn.Linear(2, 2)])
    assert ensemble.predict(logits).tolist() == [[0], [1], [1], [0]]


def test_more_passes_agree_more_often():
    ensemble = build((Policy(weight_bits=1, activation_bits=1),) * 2, passes=1)
    x = images(40)
    logits = run(ensemble, x, list(range(64)))
    spread = []
    for passes in (1, 16):
        ensemble.passes = passes
        predicted = ensemble.predict(logits)
        spread.append((predicted != predicted.mode(0).values).double().mean())
    assert spread[1] < 0.7 * spread[0]


class Answering(nn.Module):
    """Return what is asked for in place of logits."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.head, self.answer = nn.Linear(64, 3), answer

    def forward(self, images: torch.Tensor) -> Any:
        return self.answer(self.head(images.flatten(1)))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda y: {"logits": y}, "dict"),
        (lambda y: (y, y), "tuple"),
        (lambda y: y[:, 0], r"a tensor of shape \[5\]"),
        (lambda y: y[:, :, None], r"a tensor of shape \[5, 3, 1\]"),
        (lambda y: y[:3], r"a tensor of shape \[3, 3\]"),
    ],
    ids=["dict", "tuple", "one score", "an axis too many", "rows missing"],
)
def test_members_that_return_no_logits_are_refused(answer, found):
    x = images().float()
    for member in (Answering(answer), nn.Sequential(Answering(answer))):
        with pytest.raises(InputError, match=rf"expected logits \[5, classes\] from every member, got {found}"):
            Ensemble([member])(x)


def test_members_of_different_numbers_of_classes_are_refused():
    members = [nn.Sequential(nn.Flatten(), nn.Linear(64, classes)) for classes in (3, 4)]
    with pytest.raises(InputError, match=r"members of equally many classes, got \[3, 4\]"):
        Ensemble(members)(images().float())


class Twice(nn.Module):
    """Call the last linear layer twice an image, as a gate inside of a convolution network may."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.gate = nn.Conv2d(1, 3, 8), nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.convolution(images).flatten(1)
        return logits * self.gate(self.gate(logits))


def test_logits_stand_for_the_features_of_members_without_a_last_linear_layer():
    bare = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    low = Policy(activation_bits=None)
    ensemble = Ensemble.build([bare, Twice(), network().float()], [low, low, None]).eval()
    with rng.draw([1, 2], torch.arange(5)), torch.no_grad():
        outputs = ensemble.outputs(images().float())
    for place in (0, 1):
        assert torch.equal(outputs.features[place], outputs.parts[place].flatten(0, 1))
    assert outputs.features[2].shape == (10, 16)
    assert torch.equal(outputs.features[2][:5], outputs.features[2][5:])
