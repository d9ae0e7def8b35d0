"""Test EMPIR's own attacks where gradient and vote are known, its presets, and every figure of its page."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import Attack, EmpirAttack
from bitquorum.attacks.empir import Source, mean_of_agreeing
from bitquorum.config import read
from bitquorum.dorefa import Dorefa
from bitquorum.ensemble import EmpirVote, Ensemble
from bitquorum.files import read_jsonl
from bitquorum.interface import Cost, InputError
from bitquorum.registry import decode, encode
from bitquorum.testing import check_attack
from bitquorum.zoo import CIFARconv, MNISTconv

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "empir.md"
FGSM = EmpirAttack(steps=1, step_size=None, random_start=False)
BIM = EmpirAttack(gradient_of="full-precision", random_start=False)
PGD = EmpirAttack()
PUBLISHED = {
    ("cifar10", "baseline"): {"clean": 74.54, "FGSM": 10.28, "BIM-40": 11.97, "PGD-40": 10.69},
    ("cifar10", "empir"): {"clean": 72.56, "FGSM": 20.45, "BIM-40": 24.59, "PGD-40": 13.55},
    ("mnist", "baseline"): {"clean": 98.87, "FGSM": 14.32, "BIM-40": 0.9, "PGD-40": 0.77},
    ("mnist", "empir"): {"clean": 98.89, "FGSM": 67.06, "BIM-40": 18.61, "PGD-40": 17.51},
}
"""In percent, of the authors' README (https://github.com/sancharisen/EMPIR, revision 7cbcbde)."""


def members(*weights: list[list[float]]) -> Ensemble:
    """Return an ensemble of linear members, one for each matrix [classes, pixels], the last in full precision."""
    layers = []
    for weight in weights:
        layer = nn.Linear(len(weight[0]), len(weight), bias=False)
        layer.weight.data.copy_(torch.tensor(weight))
        layers.append(layer)
    return Ensemble(layers, aggregation=EmpirVote())


def signs(attack: Attack, model: Ensemble, x: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the direction of each pixel's change."""
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    return (attack(model, x, labels, epsilon=0.1, seed=3).images - x).sign()


# The loss


def test_only_members_that_agree_with_the_vote_are_followed():
    """Members 0 and 1 see one pixel each and say class 0; the third says class 1 and sees the last pixel alone."""
    first, second = [[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 9.0, 0.0], [0.0, 0.0, 0.0]]
    third = [[0.0, 0.0, 0.0], [0.0, 0.0, 9.0]]
    x = torch.tensor([[0.5, 0.5, 0.5]])
    assert signs(FGSM, members(first, second, third), x).tolist() == [[-1.0, -1.0, 0.0]]
    assert signs(BIM, members(first, second, third), x).tolist() == [[0.0, 0.0, 1.0]]
    assert signs(FGSM, members(first, third, second), x).tolist() == [[-1.0, -1.0, 0.0]]


def test_the_full_precision_member_stands_alone_where_all_disagree():
    rows = [[[0.0] * 3 for _ in range(3)] for _ in range(3)]
    for member in range(3):
        rows[member][member][member] = 9.0
    x = torch.full((1, 3), 0.5)
    assert signs(FGSM, members(*rows), x).tolist() == [[0.0, 0.0, -1.0]]
    logits = members(*rows)(x)
    assert torch.equal(mean_of_agreeing(logits), logits[0, 2].softmax(-1))


def test_the_loss_takes_a_mean_of_probabilities_for_logits():
    """dL/dm = softmax(m) - onehot, through the mean of the members that agree, each of whose softmax is p(1 - p)."""
    logits = torch.tensor([[[[2.0, 0.0]], [[-3.0, 1.0]], [[1.0, 0.5]]]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(PGD._criterion(torch.tensor([0]))(logits).sum(), logits)
    p = logits.detach()[0, :, 0].softmax(-1)
    m = (p[0] + p[2]) / 2
    outer = m.softmax(-1) - torch.tensor([1.0, 0.0])
    known = [p[i] * (outer - (p[i] * outer).sum()) / 2 for i in (0, 2)]
    assert torch.allclose(gradient[0, 0, 0], known[0])
    assert torch.allclose(gradient[0, 2, 0], known[1])
    assert float(gradient[0, 1].abs().max()) == 0


@pytest.mark.parametrize("source", ["agreeing", "full-precision"])
def test_a_single_member_is_attacked_by_the_cross_entropy_of_its_logits(source: Source):
    logits = torch.randn(1, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    loss = EmpirAttack(gradient_of=source)._criterion(labels)(logits)
    assert torch.equal(loss, nn.functional.cross_entropy(logits[0, 0], labels, reduction="none"))


@pytest.mark.parametrize("attack", [FGSM, BIM, PGD], ids=lambda attack: attack.label)
def test_the_label_is_what_the_victim_says_of_the_clean_image(attack: EmpirAttack):
    model = members([[9.0, 0.0], [0.0, 0.0]], [[9.0, 0.0], [0.0, 0.0]], [[0.0, 9.0], [0.0, 0.0]])
    x = torch.full((1, 2), 0.5)
    found = [attack(model, x, torch.tensor([label]), epsilon=0.1, seed=3).images for label in (0, 1)]
    assert torch.equal(*found)
    if attack is not BIM:
        assert float(found[0][0, 0]) < 0.5


def test_the_members_that_agree_are_found_anew_at_every_step():
    """The vote turns from class 0, of the first two, to class 1, which the second then shares with the third."""
    first, second = [[9.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.98]]
    third = [[0.0, 0.0], [0.0, 9.0]]
    model, x = members(first, second, third), torch.tensor([[0.5, 0.5]])
    one = EmpirAttack(steps=1, random_start=False)(model, x, torch.tensor([0]), epsilon=0.1).images
    torch.testing.assert_close(one, torch.tensor([[0.49, 0.51]]))
    with rng.draw(0):
        before, after = (model(images)[0, :, 0].argmax(-1).tolist() for images in (x, one))
    assert (before, after) == ([0, 0, 1], [0, 1, 1])
    two = EmpirAttack(steps=2, random_start=False)(model, x, torch.tensor([0]), epsilon=0.1).images
    torch.testing.assert_close(two - one, torch.tensor([[-0.01, 0.01]]))


# Steps and passes


def test_steps_have_an_absolute_length_and_end_within_the_ball():
    model, x, labels = members([[9.0], [0.0]]), torch.tensor([[0.5], [0.02]]), torch.tensor([0, 0])
    three = EmpirAttack(steps=3, random_start=False)(model, x, labels, epsilon=0.1).images
    torch.testing.assert_close(three, torch.tensor([[0.47], [0.0]]))
    for attack in (FGSM, BIM, PGD):
        found = attack(model, x, labels, epsilon=0.1).images
        torch.testing.assert_close(found, torch.tensor([[0.4], [0.0]]))


@pytest.mark.parametrize(("attack", "steps"), [(FGSM, 1), (BIM, 40), (PGD, 40)])
def test_a_pass_for_the_label_and_two_for_each_step(attack: EmpirAttack, steps: int):
    result = attack(members([[9.0], [0.0]]), torch.tensor([[0.5]]), torch.tensor([0]), epsilon=0.1)
    assert result.cost == Cost(forward=steps + 1, backward=steps)


def test_only_pgd_starts_at_random():
    model, x, labels = members([[0.0], [0.0]]), torch.full((50, 1), 0.5), torch.zeros(50, dtype=torch.int64)
    assert torch.equal(FGSM(model, x, labels, epsilon=0.1).images, x)
    assert torch.equal(BIM(model, x, labels, epsilon=0.1).images, x)
    assert float(PGD(model, x, labels, epsilon=0.1).images.std()) > 0.03


@pytest.mark.parametrize(
    "attack", [FGSM, EmpirAttack(steps=3, gradient_of="full-precision", random_start=False), EmpirAttack(steps=3)]
)
def test_keeps_the_contract(attack: EmpirAttack):
    check_attack(attack)


def test_labels_differ_and_tables_come_back():
    choices = (FGSM, BIM, PGD, EmpirAttack(steps=1), EmpirAttack(random_start=False), EmpirAttack(step_size=None))
    labels = [attack.label for attack in choices]
    assert labels[:3] == ["EMPIR FGSM", "EMPIR BIM-40", "EMPIR PGD-40"]
    assert labels[3:] == ["EMPIR PGD-1", "EMPIR BIM-40 agreeing", "EMPIR PGD-40 step=epsilon"]
    for attack in choices:
        table = encode(attack) | {"type": "empir-attack"}
        assert decode(Attack, table) == attack  # type: ignore[type-abstract]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"step_size": 0.0}, {"gradient_of": "all"}])
def test_bad_fields_are_refused(wrong: dict):
    with pytest.raises((InputError, TypeError)):  # a run-time check of types comes first and is a TypeError
        EmpirAttack(**wrong)


# The experiments


@pytest.mark.parametrize("builder", [CIFARconv(unit_norm=True, width=4), MNISTconv(unit_norm=True, width=4)])
def test_first_weights_have_unit_norm_per_output(builder: CIFARconv | MNISTconv):
    network = builder(classes=3, shape=(1, 28, 28))
    layers = [module for module in network if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers:
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    assert len(layers) >= 4


@pytest.mark.parametrize(
    ("name", "bits", "epsilon"),
    [("empir-cifar10", [(4, 2), (2, 2)], 0.1), ("empir-mnist", [(2, 4), (2, 4)], 0.3)],
)
def test_the_presets_hold_empirs_setting(name: str, bits: list[tuple[int, int]], epsilon: float):
    experiment = read(name)
    assert experiment.evaluation.attacks == (FGSM, BIM, PGD)
    assert experiment.evaluation.epsilons == (epsilon,)
    assert (experiment.evaluation.examples, experiment.data.normalize) == (0, False)
    baseline, empir = experiment.arms
    assert (baseline.precision, empir.members[-1].label) == ("fp", "fp")
    low = [Dorefa(weight_bits=weights, activation_bits=activations, first=True) for weights, activations in bits]
    assert list(empir.members[:-1]) == low
    assert empir.aggregation == EmpirVote()
    smoothing = 1 / 9 if name == "empir-cifar10" else 0.0
    for arm in experiment.arms:
        (term,) = arm.objective.terms
        assert (term.weight, getattr(term, "smoothing", None)) == (len(arm.members), smoothing)


# The page


def reproduced() -> list[list[str]]:
    """Return the table of the page: published and measured accuracies in percent, as stored rows have them."""
    table = []
    for (data, arm), published in PUBLISHED.items():
        paths = sorted((ROOT / "results" / f"empir-{data}").glob("evaluations/*/metrics.jsonl"))
        assert len(paths) == 1, f"expected one evaluation of empir-{data}, got {len(paths)}"
        rows = {row["attack"].removeprefix("EMPIR "): row for row in read_jsonl(paths[0]) if row["arm"] == arm}
        for attack, value in published.items():
            row = rows[attack]
            measured = f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            table.append([data, arm, attack, f"{value:.2f}", measured, str(row["images"])])
    return table


@pytest.mark.skipif(not PAGE.exists(), reason="nothing was measured")
def test_every_figure_of_the_page_is_a_stored_one():
    found = re.search(r"<!-- reproduced -->\n.*?\n.*?\n(.*?)<!-- end -->", PAGE.read_text(encoding="utf-8"), re.S)
    assert found, "expected a table between the markers `reproduced` and `end`"
    shown = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[1].strip().splitlines()]
    expected = reproduced()
    lines = "\n".join("| " + " | ".join(row) + " |" for row in expected)
    assert shown == expected, f"replace the rows by:\n{lines}"
