"""Test that relaxed derivatives change no value, reach where nothing else does, and leave quantizers of ours alone."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitquorum import rng
from bitquorum.conversion import Policy, convert
from bitquorum.museum.exhibits import crossmax
from bitquorum.relax import relaxed


class Layer(nn.Module):
    """Apply a function that may use a linear layer."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear, x)


def no_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def ones(layer: nn.Module, x: Tensor) -> Tensor:
    scores = layer(x)
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1)[..., None], 1.0)


def assigned(layer: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0.2] = 0.0
    return layer(y)


def implicit(scores: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the dimension that it chooses
        return nn.Softmax()(scores)


def logged(layer: nn.Module, x: Tensor) -> Tensor:
    scores = layer(x)
    assert float(scores.detach().cpu().numpy().mean()) == pytest.approx(scores.mean().item(), abs=1e-5)
    assert (scores > 0).tolist() == [[value > 0 for value in row] for row in scores.tolist()]
    return scores


def stable_softmax(layer: nn.Module, x: Tensor) -> Tensor:
    scores = layer(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def test_what_is_infinite_keeps_its_value():
    torch.manual_seed(0)
    layer, x = Layer(lambda inner, y: stable_softmax(inner, (3 * y).round() / 3)), torch.rand(5, 6)
    leaf = x.clone().requires_grad_()
    with relaxed(layer):
        scores = layer(leaf)
        holes = torch.where(torch.arange(6) == 2, torch.nan, leaf).nanmedian(-1).values
    assert torch.equal(scores, layer(x))
    assert torch.equal(holes, x[:, [0, 1, 3, 4, 5]].median(-1).values)
    (gradient,) = torch.autograd.grad(scores[:, 0].sum() + holes.sum(), leaf)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[:, [0, 1, 3, 4, 5]] != 0).all())


HIDDEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "round": lambda layer, x: layer((x * 3).round() / 3),
    "torch.floor": lambda layer, x: layer(torch.floor(x * 3) / 3),
    "sign": lambda layer, x: layer((x - 0.5).sign()),
    "detach": lambda layer, x: layer(x.detach()),
    "data": lambda layer, x: layer(x.data),
    "no_grad": no_grad,
    "bytes": lambda layer, x: layer((x * 255).to(torch.uint8).float() / 255),
    "comparison": lambda layer, x: layer((x > 0.5).float()),
    "torch.ge": lambda layer, x: layer(torch.ge(x, 0.3).to(x.dtype)),
    "both": lambda layer, x: layer(((x > 0.2) & (x < 0.7)).float()),
    "not": lambda layer, x: layer((~(x > 0.2)).float()),
    "where": lambda layer, x: layer(torch.where(x > 0.5, torch.ones_like(x), torch.zeros_like(x))),
    "where of a view": lambda layer, x: layer(torch.where((x > 0.5)[:, :1].expand_as(x), torch.ones_like(x), -1.0)),
    "where of a tensor": lambda layer, x: layer(torch.ones_like(x).where(x > 0.5, torch.zeros_like(x))),
    "not of a view": lambda layer, x: layer((~(x > 0.5).view(-1, 6)).float()),
    "where not": lambda layer, x: layer(torch.where(~(x > 0.5), torch.ones_like(x), -1.0)),
    "where neither": lambda layer, x: layer(torch.where(~((x > 0.7) | (x < 0.2)), torch.ones_like(x), -1.0)),
    "joined masks": lambda layer, x: layer(torch.cat([x[:, :3] > 0.5, x[:, 3:] < 0.5], 1).float()),
    "parted mask": lambda layer, x: layer(torch.cat([part.float() for part in (x > 0.5).chunk(2, 1)], 1)),
    "keyword": lambda layer, x: layer(torch.gt(x, other=0.5).float()),
    "counted": lambda layer, x: layer((x > torch.linspace(0.1, 0.9, 7)[:, None, None]).sum(0).float()),
    "one_hot": lambda layer, x: F.one_hot(layer(x).argmax(-1), 4).float(),
    "scatter": ones,
    "saturated softmax": lambda layer, x: (1e4 * layer(x)).softmax(-1),
}
SHOWN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda layer, x: layer(x),
    "indexed by a mask": assigned,
    "masked_fill": lambda layer, x: layer(x.masked_fill(x < 0.3, 0.0)),
    "masked_fill of a view": lambda layer, x: layer(x.masked_fill((x < 0.3)[:, :1], 0.0)),
    "masked_fill by keyword": lambda layer, x: layer(x.masked_fill(mask=x < 0.3, value=0.0)),
    "masked_fill_": lambda layer, x: layer(x.clone().masked_fill_((x < 0.3).reshape(x.shape), 0.0)),
    "places of a mask": lambda layer, x: layer(x.index_put(torch.where(x < 0.3), torch.tensor(0.0))),
    "exclusive or": lambda layer, x: layer(x * ((x > 0.2) ^ (x > 0.7)).float()),
    "softmax without a dimension": lambda layer, x: implicit(layer(x)),
    "logged": logged,
    "infinity": lambda layer, x: layer(torch.where(x > 0.3, x, -torch.inf).softmax(-1)),
    "median": lambda layer, x: torch.stack([layer(x), layer(2 * x), layer(3 * x)]).median(0).values,
    "kthvalue": lambda layer, x: layer(x) * (layer(x) >= layer(x).kthvalue(3, dim=-1, keepdim=True).values),
}


def gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = module(leaf)
    scores = (value * torch.linspace(1, 2, value.shape[-1])).sum()
    if not scores.requires_grad:
        return value.detach(), torch.zeros_like(x)
    (found,) = torch.autograd.grad(scores, leaf, allow_unused=True)
    return value.detach(), torch.zeros_like(x) if found is None else found


@pytest.mark.parametrize("name", HIDDEN | SHOWN)
def test_values_stay_and_derivatives_are_there(name: str):
    module, x = Layer((HIDDEN | SHOWN)[name]), torch.rand(5, 6)
    before, own = gradient(module, x)
    with relaxed(module):
        value, found = gradient(module, x)
    assert torch.equal(value, before)
    assert value.dtype == before.dtype
    assert bool((found.abs().amax(1) > 0).all())
    assert bool(found.isfinite().all())
    assert bool((own == 0).all()) == (name in HIDDEN)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["round", "detach", "data", "no_grad", "bytes"])
def test_what_looks_like_the_identity_has_its_derivative(name: str):
    module, x = Layer(HIDDEN[name]), torch.rand(5, 6)
    _, smooth = gradient(module.linear, x)
    with relaxed(module):
        _, found = gradient(module, x)
    assert torch.allclose(found, smooth, rtol=1e-4)


def test_smooth_modules_keep_their_derivatives_bit_for_bit():
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4), nn.LogSoftmax(-1))
    x = torch.rand(5, 6)
    _, own = gradient(module, x)
    with relaxed(module):
        _, found = gradient(module, x)
    assert torch.equal(own, found)


def test_a_comparison_has_the_derivative_of_a_sigmoid():
    module, x = Layer(lambda _, x: (x > 0.5).float()), torch.rand(5, 6)
    with relaxed(module, width=0.2):
        _, found = gradient(module, x)
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((((y - 0.5) / 0.2).sigmoid() * torch.linspace(1, 2, 6)).sum(), y)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_the_greater_of_two_keeps_its_derivative():
    module, x = Layer(lambda _, x: x - torch.max(x, torch.full_like(x, 0.5))), torch.rand(5, 6)
    _, own = gradient(module, x)
    with relaxed(module):
        _, found = gradient(module, x)
    assert torch.equal(own, found)


def test_a_filled_mask_has_the_derivative_of_its_step():
    """Where x leaves the mask, what is in its place leaves too: x - 0.3 times the slope, which a fill alone hides."""
    x = torch.rand(5, 6)
    leaf = x.clone().requires_grad_()
    with relaxed(nn.Identity()):
        value = leaf.masked_fill(leaf < 0.3, 2.0)
    (found,) = torch.autograd.grad(value.sum(), leaf)
    step = (x - 0.3) / 0.1
    slope = -(step.sigmoid() * (-step).sigmoid()) / 0.1
    assert torch.allclose(found, (x >= 0.3).float() + slope * (2.0 - x), rtol=1e-4, atol=1e-5)


def test_an_order_statistic_after_subtracted_maxima_has_the_derivative_of_the_mean():
    logits = torch.randn(3, 5, 4, requires_grad=True)
    with relaxed(nn.Identity()):
        scores = crossmax(logits)
    assert torch.equal(scores, crossmax(logits))
    (found,) = torch.autograd.grad(scores[:, 1].sum(), logits)
    expected = torch.zeros_like(found)
    expected[:, :, 1] = 1 / 3
    assert torch.allclose(found, expected)


def test_quantizers_of_ours_choose_their_own_derivative():
    module = convert(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), Policy(weight_bits=2, activation_bits=2)
    )
    x = torch.rand(5, 6)
    with rng.draw(3):
        value, own = gradient(module, x)
    with relaxed(module), rng.draw(3):
        again, found = gradient(module, x)
    assert torch.equal(value, again)
    assert torch.equal(own, found)


def test_a_module_that_fails_leaves_nothing_behind():
    def fail(layer: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("no")

    quantized = convert(nn.Sequential(nn.Linear(6, 4)), Policy(weight_bits=2))
    module = nn.Sequential(quantized, Layer(fail))
    with pytest.raises(ValueError, match="no"), relaxed(module):
        module(torch.rand(2, 6))
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())
    assert torch.rand(2, requires_grad=True).detach().requires_grad is False
