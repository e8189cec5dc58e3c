"""The global norm and clipping in one process against torch's; over meshes they are tested with the parallel layouts."""

import pytest
import torch
from torch import nn

from megatron_moe.optimizer.clip import SMALL, clip_gradients, gradient_norm


def parameters(dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 8, 3), (7,), (), (2, 5))]
    for p in made:
        p.grad = scale * torch.randn_like(p)
    return made


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 5.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_and_clipping_equal_torchs(dtype, max_norm):
    ours, theirs = parameters(dtype), parameters(dtype)
    norm = gradient_norm(ours, stage_ranks=1)
    clip_gradients(ours, norm, max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradients_below_the_limit_are_left_bit_for_bit():
    ours = parameters()
    before = [p.grad.clone() for p in ours]
    clip_gradients(ours, gradient_norm(ours, 1), 1e6)
    assert all(torch.equal(p.grad, b) for p, b in zip(ours, before))


def test_clipped_gradients_have_the_norm_asked_for():
    ours = parameters(torch.float64, scale=100.0)
    clip_gradients(ours, gradient_norm(ours, 1), 1.0)
    assert gradient_norm(ours, 1).item() == pytest.approx(1.0, abs=1e-6)


def test_all_gradients_one_give_the_root_of_the_number_of_parameters():
    ours = parameters()
    for p in ours:
        p.grad = torch.ones_like(p)
    assert gradient_norm(ours, 1).item() == pytest.approx(sum(p.numel() for p in ours) ** 0.5)


def test_parameters_without_a_gradient_are_passed_over():
    ours = parameters()
    norm = gradient_norm(ours[:2], 1)
    ours[2].grad = ours[3].grad = None
    assert torch.equal(gradient_norm(ours, 1), norm)
    clip_gradients(ours, norm, 0.1)
    assert ours[3].grad is None


def test_squares_are_summed_in_float32_when_gradients_are_half():
    p = nn.Parameter(torch.zeros(4096, dtype=torch.float16))
    p.grad = torch.full_like(p, 300.0)  # its square does not fit float16
    assert gradient_norm([p], 1).item() == pytest.approx(300.0 * 64)


def test_gradients_of_two_dtypes_are_clipped_by_one_factor():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    a.grad, b.grad = torch.full_like(a, 3.0), torch.full_like(b, 3.0)
    norm = gradient_norm([a, b], 1)
    clip_gradients([a, b], norm, norm.item() / 3)
    torch.testing.assert_close(a.grad, torch.ones(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(b.grad.float(), torch.ones(4), rtol=0, atol=1e-2)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    ours = parameters()
    ours[1].grad[3] = float("nan")
    assert gradient_norm(ours, 1).isnan()
    ours[1].grad[3] = float("inf")
    assert gradient_norm(ours, 1).isinf()


def test_no_gradient_at_all_is_our_own_mistake():
    with pytest.raises(AssertionError, match="no parameter has a gradient"):
        gradient_norm([nn.Parameter(torch.ones(2))], 1)


def test_the_norm_of_many_elements_is_exact():
    """torch's foreach_norm adds up millions of squares one after another, and loses a thousandth here."""
    p = nn.Parameter(torch.zeros(3_000_000))
    p.grad = torch.full_like(p, 0.1)
    assert gradient_norm([p], 1).item() == pytest.approx(0.1 * 3_000_000**0.5, rel=1e-6)


def test_small_gradients_are_put_together_by_type_and_each_counts_once():
    sizes = [0, 1, 5, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL]
    ours = [nn.Parameter(torch.empty(n, dtype=dtype)) for dtype in (torch.float64, torch.float32) for n in sizes]
    for i, p in enumerate(ours):
        p.grad = torch.full_like(p, i + 1.0)
    expected = sum(p.numel() * (i + 1.0) ** 2 for i, p in enumerate(ours)) ** 0.5
    assert gradient_norm(ours, 1).item() == pytest.approx(expected, rel=1e-7)


def test_many_small_gradients_take_few_calls():
    """One by one they took as long as seventeen passes of AdamW over them."""
    ours = [nn.Parameter(torch.ones(32)) for _ in range(500)]
    for p in ours:
        p.grad = torch.ones_like(p)
    with torch.profiler.profile() as profile:
        gradient_norm(ours, 1)
    assert sum(e.count for e in profile.key_averages() if e.key in ("aten::square", "aten::pow", "aten::sum")) < 10
