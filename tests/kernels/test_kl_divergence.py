"""KL(teacher || student) against sums written out, for the value and for the gradient, whole and with its columns apart."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.kernels import kl_divergence as module
from megatron_moe.kernels.kl_divergence import Ranks, kl_divergence


def by_hand(student: list[float], teacher: list[float], temperature: float) -> float:
    """One token, plain Python."""
    p, q = ([math.exp(z / temperature) for z in logits] for logits in (teacher, student))
    p, q = ([x / math.fsum(values) for x in values] for values in (p, q))
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q))


def logits(rows: int, columns: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 5), st.floats(0.3, 8), st.integers(0, 99))
def test_it_is_the_sum_written_out(rows, real, padding, temperature, seed):
    student, teacher = logits(rows, real + padding, seed), logits(rows, real + padding, seed + 1)
    found = kl_divergence(student, teacher, real, temperature)
    for row in range(rows):
        expected = by_hand(student[row, :real].tolist(), teacher[row, :real].tolist(), temperature)
        assert found[row].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3), st.floats(0.5, 4), st.integers(0, 99))
def test_its_gradient_is_that_of_autograd(rows, real, padding, temperature, seed):
    student, teacher = logits(rows, real + padding, seed).requires_grad_(), logits(rows, real + padding, seed + 1)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (found,) = torch.autograd.grad((kl_divergence(student, teacher, real, temperature) * weights).sum(), student)
    log_s, log_t = ((z[:, :real] / temperature).log_softmax(-1) for z in (student, teacher))
    (expected,) = torch.autograd.grad(((log_t.exp() * (log_t - log_s)).sum(-1) * weights).sum(), student)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert (found[:, real:] == 0).all()


def test_equal_logits_are_at_no_distance_and_have_no_gradient():
    student = logits(4, 6, 0).requires_grad_()
    divergence = kl_divergence(student, student.detach() + 5.0, 6, 2.0)  # a shift changes no probability
    divergence.sum().backward()
    assert divergence.abs().max() < 1e-14 and student.grad.abs().max() < 1e-14


def test_large_logits_neither_overflow_nor_lose_the_small_differences():
    student, teacher = torch.tensor([[1000.0, 1000.5, -2000.0]]), torch.tensor([[3000.5, 3000.0, -1.0]])
    found = kl_divergence(student, teacher, 3, 1.0)
    assert found.item() == pytest.approx(by_hand([0.0, 0.5], [0.5, 0.0], 1.0), rel=1e-5)


def test_rows_are_worked_off_in_blocks(monkeypatch):
    student, teacher = logits(7, 5, 0).requires_grad_(), logits(7, 5, 1)
    whole = kl_divergence(student, teacher, 5, 1.5)
    (gradient,) = torch.autograd.grad(whole.sum(), student)
    monkeypatch.setattr(module, "row_blocks", lambda rows, width, device: (slice(i, i + 2) for i in range(0, rows, 2)))
    blocks = kl_divergence(student, teacher, 5, 1.5)
    assert torch.equal(whole, blocks) and torch.equal(gradient, torch.autograd.grad(blocks.sum(), student)[0])


class Threads(Ranks):
    """Ranks that are threads: what they bring is combined when all are there."""

    def __init__(self, number: int):
        self.barrier, self.brought = threading.Barrier(number), []

    def maximum(self, x):
        self._combine(x, lambda xs: torch.stack(xs).amax(0))

    def sum(self, x):
        self._combine(x, lambda xs: torch.stack(xs).sum(0))

    def _combine(self, x, how):
        self.brought.append(x.clone())
        self.barrier.wait()
        result = how(self.brought)
        if self.barrier.wait() == 0:
            self.brought.clear()
        self.barrier.wait()
        x.copy_(result)


@pytest.mark.parametrize("widths", [(3, 3), (5, 1, 2), (4, 0, 2, 0)], ids=str)  # 0: all of a rank's columns are padding
def test_columns_that_are_apart_give_the_same(widths):
    total = sum(widths)
    student, teacher = logits(4, total, 0).requires_grad_(), logits(4, total, 1)
    whole = kl_divergence(student, teacher, total, 2.0)
    (gradient,) = torch.autograd.grad(whole.sum(), student)
    ranks, results = Threads(len(widths)), {}

    def work(rank: int, first: int, width: int) -> None:
        mine = torch.nn.functional.pad(student.detach()[:, first : first + width], (0, 2)).requires_grad_()
        theirs = torch.nn.functional.pad(teacher[:, first : first + width], (0, 2), value=99.0)
        found = kl_divergence(mine, theirs, width, 2.0, ranks)
        found.sum().backward()
        results[rank] = (found.detach(), mine.grad[:, :width], mine.grad[:, width:])

    threads = [threading.Thread(target=work, args=(r, sum(widths[:r]), w)) for r, w in enumerate(widths)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for rank in range(len(widths)):
        torch.testing.assert_close(results[rank][0], whole.detach(), rtol=1e-12, atol=1e-14)
        assert (results[rank][2] == 0).all()
    torch.testing.assert_close(torch.cat([results[r][1] for r in range(len(widths))], 1), gradient, rtol=1e-12, atol=1e-14)


def test_bfloat16_logits_are_summed_in_float32():
    student, teacher = logits(3, 50, 0).bfloat16().requires_grad_(), logits(3, 50, 1).bfloat16()
    found = kl_divergence(student, teacher, 50, 2.0)
    expected = kl_divergence(student.detach().double(), teacher.double(), 50, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert student.grad.dtype == torch.bfloat16
