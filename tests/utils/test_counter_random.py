"""The counter hash: its bits against big integers, its draws against what uniform draws must be, its streams apart."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.utils.random import Purpose, drawn_keys, dropout, gumbel, layer_keys, mix, named_generator, stream, token_keys, uniform

BITS = (1 << 64) - 1
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
int64 = st.integers(-(1 << 63), (1 << 63) - 1)


def big_mix(x):
    """splitmix64's finaliser on unsigned Python integers."""
    x &= BITS
    x = ((x ^ (x >> 30)) * MIX1) & BITS
    x = ((x ^ (x >> 27)) * MIX2) & BITS
    return x ^ (x >> 31)


def big_key(seed, iteration, sample, position):
    base = int.from_bytes(hashlib.sha256(f"{seed}/{iteration}".encode()).digest()[:8], "little")
    return big_mix(big_mix(sample * GOLDEN + base) + (position + 1) * GOLDEN)


def big_uniform(key, stream_id, feature):
    return (big_mix(big_mix(key + (stream_id + 1) * GOLDEN) + (feature + 1) * MIX1) >> 40) / 2**24


def keys(samples=4, length=64, seed=1, iteration=2):
    return token_keys(seed, iteration, torch.arange(samples), length)


def test_mix_is_splitmix64():
    """The first outputs of splitmix64 from state 0 (its reference implementation)."""
    states = torch.tensor([GOLDEN - (1 << 64), 2 * GOLDEN & BITS])
    assert [v & BITS for v in mix(states).tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@settings(max_examples=100, deadline=None)
@given(st.lists(int64, min_size=1, max_size=8))
def test_products_wrap_around_as_unsigned_64_bit_integers_do(values):
    assert [v & BITS for v in mix(torch.tensor(values)).tolist()] == [big_mix(v) for v in values]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, (1 << 63) - 1), st.integers(0, 200), st.integers(0, 50))
def test_keys_and_draws_equal_big_integer_arithmetic(seed, iteration, sample, layer, feature):
    got = token_keys(seed, iteration, torch.tensor([sample]), 3)
    assert [k & BITS for k in got[0].tolist()] == [big_key(seed, iteration, sample, p) for p in range(3)]
    for purpose in (Purpose.ATTENTION_DROPOUT, Purpose.TOKEN_SELECTION):
        draws = uniform(got, stream(layer, purpose), feature + 1)
        expected = [big_uniform(big_key(seed, iteration, sample, p), stream(layer, purpose), feature) for p in range(3)]
        assert draws[0, :, feature].tolist() == expected


def test_layer_keys_draw_from_layer_zero_what_the_layer_draws_itself():
    for layer in (0, 1, 57):
        for purpose in Purpose:
            assert torch.equal(uniform(layer_keys(keys(), layer), purpose, 5), uniform(keys(), stream(layer, purpose), 5))


def test_draws_are_in_the_half_open_unit_interval_and_uniform():
    draws = uniform(keys(32, 128), stream(5, Purpose.MLP_OUTPUT_DROPOUT), 64).double().flatten()
    n = draws.numel()
    assert 0.0 <= draws.min() < 1e-4
    assert 0.9999 < draws.max() < 1.0
    assert abs(draws.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(draws.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    expected = n / 256
    chi_square = ((torch.histc(draws, 256, 0, 1) - expected).square() / expected).sum()
    assert 255 - 4 * math.sqrt(510) < chi_square < 255 + 4 * math.sqrt(510)


CHANGES = {
    "seed": lambda: uniform(keys(seed=2), stream(1, Purpose.GATE_JITTER), 64),
    "iteration": lambda: uniform(keys(iteration=3), stream(1, Purpose.GATE_JITTER), 64),
    "layer": lambda: uniform(keys(), stream(2, Purpose.GATE_JITTER), 64),
    "purpose": lambda: uniform(keys(), stream(1, Purpose.GATE_SAMPLING), 64),
    "sample": lambda: uniform(token_keys(1, 2, torch.arange(4) + 4, 64), stream(1, Purpose.GATE_JITTER), 64),
    "position": lambda: uniform(keys().roll(1, dims=1), stream(1, Purpose.GATE_JITTER), 64),
    "feature": lambda: uniform(keys(), stream(1, Purpose.GATE_JITTER), 64, first_feature=1),
    "distant feature": lambda: uniform(keys(), stream(1, Purpose.GATE_JITTER), 64, first_feature=64),
}


@pytest.mark.parametrize("other", CHANGES.values(), ids=CHANGES.keys())
def test_draws_are_uncorrelated_when_one_thing_changes(other):
    draws = uniform(keys(), stream(1, Purpose.GATE_JITTER), 64)
    both = torch.stack([draws.flatten(), other().flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 4 / math.sqrt(draws.numel())
    assert (both[0] == both[1]).float().mean() < 1e-3


def test_neighbouring_tokens_are_uncorrelated():
    draws = uniform(keys(8, 256), stream(1, Purpose.GATE_JITTER), 8)
    for a, b in ((draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1]), (draws[..., 1:], draws[..., :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / math.sqrt(a.numel())


def test_no_two_purposes_of_any_layers_share_a_stream():
    streams = [stream(layer, purpose) for layer in range(200) for purpose in Purpose]
    assert len(set(streams)) == len(streams)


def test_keys_are_unique_over_samples_and_positions():
    assert token_keys(1, 1, torch.arange(256), 512).unique().numel() == 256 * 512


def test_a_key_depends_on_its_own_sample_and_position_only():
    whole = token_keys(1, 1, torch.tensor([7, 3, 9]), 16)
    assert torch.equal(token_keys(1, 1, torch.tensor([9, 7]), 16), whole[[2, 0]])
    assert torch.equal(token_keys(1, 1, torch.tensor([7, 3, 9]), 5), whole[:, :5])
    assert torch.equal(token_keys(1, 1, torch.tensor([7], dtype=torch.int32), 16), whole[:1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 24))
def test_an_offset_of_features_is_a_slice(first, count):
    whole = uniform(keys(2, 3), 17, 64)
    assert torch.equal(uniform(keys(2, 3), 17, count, first_feature=first), whole[..., first : first + count])


def test_gumbel_draws_sample_from_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    picks = (logits + gumbel(keys(40, 500), 3, 4)).argmax(-1).flatten()
    share = torch.bincount(picks, minlength=4) / picks.numel()
    torch.testing.assert_close(share, logits.softmax(-1), rtol=0, atol=0.012)


def test_gumbel_draws_are_finite_and_have_the_standard_moments():
    draws = gumbel(keys(32, 128), 3, 64).double()
    assert draws.isfinite().all()
    assert abs(draws.mean() - 0.5772156649) < 0.01
    assert abs(draws.var() - math.pi**2 / 6) < 0.03
    lowest = -math.log(-math.log(2.0**-25))
    assert draws.min() >= lowest - 1e-6


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation_and_drops_the_share_it_should(p):
    y = dropout(torch.ones(16, 64, 64), p, keys(16, 64), 4)
    n = y.numel()
    assert abs((y == 0).float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert abs(y.mean() - 1) < 4 * math.sqrt(p / (1 - p) / n)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])


def test_dropout_differs_between_positions_and_samples():
    kept = dropout(torch.ones(3, 5, 64), 0.5, keys(3, 5), 4) > 0
    assert kept.flatten(0, 1).unique(dim=0).shape[0] == 15


def test_dropout_scales_the_gradient_by_the_same_mask():
    x = torch.randn(2, 8, 16, requires_grad=True)
    y = dropout(x, 0.3, keys(2, 8), 4)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)


def test_no_keys_or_no_probability_means_no_dropout():
    x = torch.randn(2, 3, 4)
    assert dropout(x, 0.5, None, 0) is x
    assert dropout(x, 0.0, keys(2, 3), 0) is x


def test_dropout_keeps_the_dtype():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert dropout(torch.ones(2, 3, 4, dtype=dtype), 0.5, keys(2, 3), 0).dtype == dtype


def test_a_generator_depends_on_seed_and_name():
    def draw(seed, name):
        return torch.randn(8, generator=named_generator(seed, name))

    assert torch.equal(draw(1, "a"), draw(1, "a"))
    assert not torch.equal(draw(1, "a"), draw(1, "b"))
    assert not torch.equal(draw(1, "a"), draw(2, "a"))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    torch.randn(3, generator=named_generator(1, "a"))
    uniform(keys(), 0, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_keys_follow_torchs_seed_and_take_one_draw_of_it():
    states, found = [], []
    for seed, part in ((1, 0), (1, 0), (2, 0), (1, 1)):
        torch.manual_seed(seed)
        found.append(drawn_keys(60, torch.device("cpu"), part).tolist())
        states.append(torch.get_rng_state())
    assert found[0] == found[1]
    assert len({key for keys in found for key in keys}) == 180  # another seed, or another part, is no shift of these
    assert torch.equal(states[0], states[3])
    torch.manual_seed(1)
    first, second = (drawn_keys(5, torch.device("cpu")).tolist() for _ in range(2))
    assert first == found[0][:5]
    assert not set(first) & set(second)
