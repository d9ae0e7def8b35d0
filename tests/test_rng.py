"""Hold the generator against its definition in plain Python, against chance, and against the batch."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquorum import rng
from bitquorum.interface import InputError

SEEDS = st.integers(-(2**62), 2**62)
MASK64, MASK32 = 2**64 - 1, 2**32 - 1


def test_seeds_are_any_whole_numbers():
    seen = []
    for seed in (7, np.int64(7), torch.tensor(7), [7], [np.int64(7)]):
        with rng.draw(seed) as ambient:
            seen.append(ambient.seeds)
    assert seen == [(7,)] * 5
    with pytest.raises(TypeError), rng.draw([7.5]):  # type: ignore[list-item]
        pass


def mix64(x):
    """Splitmix64: Steele, Lea, Flood, 2014."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def mix32(x):
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & MASK32
    return x ^ (x >> 15)


def child(seed, *path):
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def element(key, i):
    return ((mix32(mix32((i + (key & MASK32)) & MASK32) ^ (key >> 32)) >> 9) + 0.5) / 2**23


def example_key(seed, address, example):
    inner = mix64((example + child(seed, "address", address)) & MASK64)
    return mix64(inner ^ child(seed, "address", address + "\x1f"))


def noise(seed, address="a", examples=(0,), count=1):
    return rng.uniform(seed, torch.tensor(examples), count, address=address)


def assert_uniform(u):
    """Check mean, variance, 64 bins and the lag-one correlation of a sequence of numbers in (0, 1)."""
    u = u.double().flatten()
    n = len(u)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    chi_square = float((torch.histc(u, 64, 0, 1) - n / 64).square().sum() / (n / 64))
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    assert_uncorrelated(u[1:], u[:-1])


def assert_uncorrelated(a, b):
    pair = torch.stack([a.double().flatten(), b.double().flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(pair.shape[1])


def test_the_mixer_of_the_oracle_is_splitmix64():
    assert mix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator at seed 0


@pytest.mark.parametrize("seed", [0, 7, -3, 2**62 - 1])
@pytest.mark.parametrize("address", ["", "members.1.conv"])
def test_examples_follow_the_definition(seed, address):
    examples = (0, 5, 2**40, -2)
    expected = [[element(example_key(seed, address, e & MASK64), i) for i in range(9)] for e in examples]
    assert noise(seed, address, examples, 9).tolist() == expected


def test_long_examples_follow_the_definition_at_every_element():
    places = [0, 2**17 - 1, 2**17, 2**17 + 1, 3 * 2**17 - 1]
    found = noise(3, "long", (4, 9), 3 * 2**17)[:, places]
    assert found.tolist() == [[element(example_key(3, "long", e), i) for i in places] for e in (4, 9)]


def test_parameters_follow_the_definition():
    with rng.draw([11, 12]):
        found = rng.uniform_per_draw(torch.zeros(2, 3), "w")
    expected = [[element(mix64(child(seed, "parameter", "w")), i) for i in range(6)] for seed in (11, 12)]
    assert found.shape == (2, 2, 3)
    assert found.flatten(1).tolist() == expected


@pytest.mark.long
@pytest.mark.parametrize(
    "u",
    [
        pytest.param(lambda: noise(1, count=200_000), id="elements"),
        pytest.param(lambda: noise(2, examples=range(200_000)), id="examples"),
        pytest.param(lambda: torch.cat([noise(seed, count=4) for seed in range(1_500)], 1), id="seeds"),
        pytest.param(lambda: torch.cat([noise(3, f"layer{i}", count=4) for i in range(1_500)], 1), id="addresses"),
        pytest.param(lambda: noise(4, examples=range(512), count=512).T, id="images"),
    ],
)
def test_noise_is_uniform_along(u):
    assert_uniform(u())


def test_parameter_noise_is_uniform():
    with rng.draw(list(range(50))):
        assert_uniform(rng.uniform_per_draw(torch.zeros(2_000), "w"))


@pytest.mark.parametrize(
    "other",
    [{"seed": 6}, {"address": "b"}, {"address": "a\x1f"}, {"address": ""}, {"examples": range(1, 101)}],
    ids=["seed", "address", "separator", "no address", "example"],
)
def test_streams_do_not_correlate(other):
    first = {"seed": 5, "address": "a", "examples": range(100), "count": 1_000}
    assert_uncorrelated(noise(**first), noise(**first | other))


def test_every_bit_is_fair():
    bits = (noise(8, count=100_000)[0].double() * 2**23).long()
    for place in range(23):
        share = float(((bits >> place) & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(100_000), place


@given(seed=SEEDS, order=st.permutations(range(7)), cut=st.integers(1, 6))
@settings(max_examples=40)
def test_an_example_gets_its_noise_in_any_batch(seed, order, cut):
    x = torch.zeros(7, 2, 3)
    index = torch.tensor(order)
    with rng.draw(seed):
        whole = rng.uniform_like(x, "a")
    with rng.draw(seed, index):
        assert torch.equal(rng.uniform_like(x, "a"), whole[index])
    for part in (index[:cut], index[cut:]):
        with rng.draw(seed, part):
            assert torch.equal(rng.uniform_like(x[: len(part)], "a"), whole[part])


@given(seeds=st.lists(SEEDS, min_size=1, max_size=4), shape=st.lists(st.integers(1, 4), max_size=3))
@settings(max_examples=40)
def test_seeds_of_one_batch_equal_single_draws(seeds, shape):
    x = torch.zeros(3, *shape)
    index = torch.tensor([4, 0, 9])
    with rng.draw(seeds, index):
        rows = rng.uniform_like(x.repeat(len(seeds), *[1] * len(shape)), "a")
        parameters = rng.uniform_per_draw(x, "a")
    singles = []
    for seed, parameter in zip(seeds, parameters, strict=True):
        with rng.draw(seed, index):
            singles.append(rng.uniform_like(x, "a"))
            assert torch.equal(rng.uniform_per_draw(x, "a")[0], parameter)
    assert torch.equal(rows, torch.cat(singles))


def test_noise_does_not_depend_on_memory_layout_or_type():
    x = torch.zeros(2, 3, 4, 5)
    with rng.draw(1):
        plain = rng.uniform_like(x, "a")
        assert torch.equal(rng.uniform_like(x.to(memory_format=torch.channels_last), "a"), plain)
        assert torch.equal(rng.uniform_like(x.double(), "a"), plain.double())
        assert rng.uniform_like(x.double(), "a").dtype == torch.float64


def test_a_draw_is_deterministic_and_leaves_the_global_generator_alone():
    x = torch.zeros(4, 5)
    state = torch.get_rng_state()
    with rng.draw(1):
        assert torch.equal(rng.uniform_like(x, "a"), rng.uniform_like(x, "a"))
        assert torch.equal(rng.uniform_per_draw(x, "a"), rng.uniform_per_draw(x, "a"))
    noise(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_outside_of_a_draw_noise_is_fresh_and_follows_the_global_generator():
    x = torch.zeros(4, 5)
    first, second = rng.uniform_like(x, "a"), rng.uniform_like(x, "a")
    assert not torch.equal(first, second)
    with rng.torch_seed(3):
        first = rng.uniform_like(x, "a"), rng.uniform_per_draw(x, "a")
    with rng.torch_seed(3):
        second = rng.uniform_like(x, "a"), rng.uniform_per_draw(x, "a")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_draws_nest_and_end_with_an_exception():
    assert rng.current() is None
    with rng.draw(1) as outer:
        with rng.draw([2, 3]) as inner:
            assert rng.current() is inner
            assert inner.seeds == (2, 3)
        assert rng.current() is outer

        def fail():
            with rng.draw(4):
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert rng.current() is outer
    assert rng.current() is None


def test_bad_draws_are_refused():
    with pytest.raises(InputError, match="at least one seed"), rng.draw([]):
        pass
    with rng.draw([1, 2]), pytest.raises(InputError, match=r"conv1: expected a batch of 2 seeds .* got 5 rows"):
        rng.uniform_like(torch.zeros(5, 2), "conv1")
    with rng.draw(1, torch.arange(4)), pytest.raises(InputError, match="1 seeds x 4 examples, got 8 rows"):
        rng.uniform_like(torch.zeros(8, 2), "a")


def test_derived_seeds_are_stable_typed_and_different():
    assert rng.derive(0) == child(0)
    assert rng.derive(5, "epoch", 3) == child(5, "epoch", 3)
    assert rng.derive(0, 1) != rng.derive(0, "1")
    assert rng.derive_many(9, 3, "step") == rng.derive_many(9, 1000, "step")[:3]
    children = rng.derive_many(9, 1000, "step") + rng.derive_many(9, 1000, "draw") + rng.derive_many(10, 1000, "step")
    assert len(set(children)) == 3000
    assert all(0 <= seed < 2**62 for seed in children)


def test_torch_seed_restores_the_global_generator():
    state = torch.get_rng_state()
    with rng.torch_seed(4):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    with rng.torch_seed(4):
        assert torch.equal(torch.rand(3), first)
