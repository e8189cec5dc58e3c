"""Steps whose rows had no room, without the kernels: what is repeated, what is kept, and what is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.training import pretrain
from megatron_moe.training.room import MOST_REPEATS, Repeat, Room

pytestmark = pytest.mark.distributed


class Wants:
    """An exchange that wants so many rows, work by work."""

    def __init__(self, *rows: int):
        self.rows, self.capacity = list(rows), 100

    def overflow(self) -> int:
        wanted = self.rows.pop(0) if len(self.rows) > 1 else self.rows[0]
        return wanted if wanted > self.capacity else 0

    def grow(self, rows: int) -> None:
        self.capacity = max(self.capacity, rows)


def repeated(*rows: int) -> tuple[list[float], list[Repeat], float]:
    """Draws of every work, repeats, and the gradient that is left."""
    weight = torch.nn.Parameter(torch.ones(()))
    room, draws = Room([Wants(*rows)], torch.device("cpu")), []

    def work() -> torch.Tensor:
        draws.append(float(torch.rand(())))
        weight.grad = torch.ones(()) + (0 if weight.grad is None else weight.grad)
        return weight.detach()

    room.until_it_fits(work, torch.optim.SGD([weight], 0.1))
    return draws, room.of_step, float(weight.grad)


def test_a_step_is_repeated_from_the_same_draws_and_without_its_first_gradients():
    ((draws, repeats, gradient),) = run_distributed(repeated, 1, 150, 200, 200)
    assert len(draws) == 3 and len(set(draws)) == 1 and gradient == 1
    assert repeats == [Repeat(150, 100, 165), Repeat(200, 165, 220)]


def test_a_step_that_fits_is_done_once():
    ((draws, repeats, gradient),) = run_distributed(repeated, 1, 100)
    assert (len(draws), repeats, gradient) == (1, [], 1)


def one_rank_wants(rank: int) -> int:
    """How often this rank worked, of which `rank` alone had too many rows."""
    works = []
    exchanges = [Wants(*((150, 100) if torch.distributed.get_rank() == rank else (100,)))]
    Room(exchanges, torch.device("cpu")).until_it_fits(lambda: works.append(1) or torch.zeros(()), torch.optim.SGD([torch.zeros(1)], 0.1))
    return len(works)


def test_all_ranks_repeat_a_step_that_one_of_them_must():
    assert run_distributed(one_rank_wants, 2, 1) == [2, 2]


def without_end() -> str:
    with pytest.raises(RuntimeError) as caught:
        repeated(*(10**n for n in range(3, 3 + 2 * MOST_REPEATS)))
    return str(caught.value)


def test_there_is_an_end_to_repeating():
    assert "did not fit 8 times" in run_distributed(without_end, 1)[0]


def test_every_repeat_is_logged_and_counted(caplog):
    events = []
    room = SimpleNamespace(of_step=[Repeat(150, 100, 165)], repeats=3)
    tracker = SimpleNamespace(event=lambda name, **values: events.append((name, values)))
    pretrain.tell_repeats(SimpleNamespace(room=room, progress=SimpleNamespace(iteration=7), tracker=tracker))
    assert events == [("repeat", {"iteration": 7, "rows": 150, "room": 100, "new_room": 165, "repeats": 3})]
    pretrain.tell_repeats(SimpleNamespace(room=None))
    assert len(events) == 1
