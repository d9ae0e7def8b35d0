"""The optimizer against its definition: singular values, kept norms, SGD for the rest, the reference for the turn."""

import pytest
import torch
from torch import nn

from bitquorum.interface import InputError
from bitquorum.muon import Muon, orthogonalize, orthogonalize_all


@pytest.mark.parametrize("shape", [(8, 27), (40, 12), (6, 6)])
def test_orthogonalize_keeps_singular_vectors_and_sets_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.mT @ orthogonalize(matrix) @ right.mT
    found = turned.diagonal()
    assert (turned - torch.diag(found)).abs().max() < 1e-4
    assert (found[values > 0.05 * values.norm()] - 1).abs().max() < 0.35
    torch.testing.assert_close(orthogonalize(matrix.mT), orthogonalize(matrix).mT)


def test_matrices_of_equal_shape_are_orthogonalized_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in ((4, 6), (7, 3), (4, 6), (4, 6), (7, 3), (2, 2))]
    for matrix, turned in zip(matrices, orthogonalize_all(matrices), strict=True):
        torch.testing.assert_close(turned, orthogonalize(matrix))


def test_convolution_moves_by_the_learning_rate_as_the_matrix_of_the_reference_and_keeps_its_norm():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4, 3, 3, dtype=torch.float64))
    before = weight.detach().clone()
    matrix = nn.Parameter(before.flatten(1).float().clone())
    ours, theirs = Muon([weight], lr=0.05), torch.optim.Muon([matrix], lr=0.05, momentum=0.9, weight_decay=0.0)
    weight.grad = torch.randn_like(weight)
    matrix.grad = weight.grad.flatten(1).float()
    ours.step()
    theirs.step()
    torch.testing.assert_close(weight.norm(), before.norm())
    expected = matrix.detach().double() * before.norm() / matrix.detach().norm()
    moved = (weight.detach() - before).norm()
    assert (weight.detach().flatten(1) - expected).norm() < 0.02 * moved  # theirs iterates in bfloat16
    assert 0.5 * 0.05 * 6**0.5 < moved < 1.3 * 0.05 * 6**0.5


def test_momentum_carries_over_steps():
    weight = nn.Parameter(torch.randn(2, 2, 1, 1))
    optimizer = Muon([weight], lr=0.1, momentum=0.5)
    first, second = torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    for gradient in (first, second):
        weight.grad = gradient.view_as(weight).clone()
        optimizer.step()
    kept = optimizer.state[weight]["momentum_buffer"].view(2, 2)
    torch.testing.assert_close(kept, 0.25 * first + 0.5 * second)


def test_everything_else_steps_as_nesterov_sgd_at_twice_the_rate():
    torch.manual_seed(0)
    ours = nn.Linear(3, 2)
    theirs = nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        Muon([{"params": list(ours.parameters()), "weight_decay": 0.1}], lr=0.05),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    )
    for _ in range(4):
        x = torch.randn(5, 3)
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_parameters_without_gradients_stay_and_a_closure_is_called():
    weight, other = nn.Parameter(torch.ones(2, 2, 1, 1)), nn.Parameter(torch.ones(3))
    optimizer = Muon([weight, other])

    def closure() -> float:
        other.grad = torch.ones(3)
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert torch.equal(weight, torch.ones_like(weight))
    assert not torch.equal(other, torch.ones(3))


def test_a_gradient_of_zero_changes_nothing():
    weight = nn.Parameter(torch.ones(2, 3, 1, 1))
    weight.grad = torch.zeros_like(weight)
    Muon([weight]).step()
    torch.testing.assert_close(weight.detach(), torch.ones(2, 3, 1, 1))


def test_a_convolution_of_zeros_begins_to_move_and_keeps_its_norm_from_then_on():
    moving, still = nn.Parameter(torch.zeros(2, 3, 1, 1)), nn.Parameter(torch.ones(2, 3, 1, 1))
    optimizer, norms = Muon([moving, still], lr=0.1), []
    for _ in range(3):
        for weight in (moving, still):
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        norms.append(float(moving.detach().norm()))
    assert 0.05 < norms[0] < 0.2
    assert norms == pytest.approx([norms[0]] * 3)
    assert float(still.detach().norm()) == pytest.approx(6**0.5)


@pytest.mark.parametrize(("lr", "momentum"), [(0.0, 0.9), (-1.0, 0.9), (0.1, 1.0), (0.1, -0.1)])
def test_bad_rates_are_refused(lr, momentum):
    with pytest.raises(InputError, match="expected lr above 0 and momentum"):
        Muon([nn.Parameter(torch.ones(1))], lr=lr, momentum=momentum)
