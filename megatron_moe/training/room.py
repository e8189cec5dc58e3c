"""Steps that brought more rows than there was room for are done again with more of it, before the weights have moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.kernels.fused.exchange import Exchange
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.dispatch.fused import FusedDispatcher
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.pipeline import PipelinedGPT

MOST_REPEATS = 8  # of one step: each makes the room that the one before wanted, and a later layer may then want more
SPARE = 1.1  # room that is made, over what was wanted


@dataclass(frozen=True)
class Repeat:
    """Why a step was done again."""

    rows: int  # that the busiest rank wanted
    room: int  # rows that there was room for
    new_room: int


@dataclass
class Room:
    """For rows of the fused all-to-all, under --moe-fused-capacity static."""

    exchanges: list[Exchange]  # of this rank; a stage without MoE layers has none
    device: torch.device
    repeats: int = 0  # of all steps
    of_step: list[Repeat] = field(default_factory=list)

    def until_it_fits(self, work: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        """`work` makes the gradients of a step. It is done again, with the same draws, until all rows of all ranks had room. Collective;
        the host waits for the device, once."""
        self.of_step = []
        draws = _random_state(self.device)
        for _ in range(MOST_REPEATS):
            loss = work()
            wanted = [exchange.overflow() for exchange in self.exchanges]
            if not self._is_full_anywhere(any(wanted)):
                return loss
            self._grow(wanted)
            optimizer.zero_grad(set_to_none=True)
            _set_random_state(draws, self.device)
        raise RuntimeError(
            f"the rows of a step did not fit {MOST_REPEATS} times, though room was made each time ({self.of_step[-3:]}); use --moe-fused-capacity "
            "worst or exact"
        )

    def _is_full_anywhere(self, is_full: bool) -> bool:
        full = torch.tensor(int(is_full), device=self.device)
        dist.all_reduce(full, dist.ReduceOp.MAX)
        return bool(full)

    def _grow(self, wanted: list[int]) -> None:
        self.repeats += 1
        for exchange, rows in zip(self.exchanges, wanted):
            if rows:
                before = exchange.capacity
                exchange.grow(int(rows * SPARE))
                self.of_step.append(Repeat(rows, before, exchange.capacity))


def build_room(model: GPT | PipelinedGPT, device: torch.device) -> Room | None:
    """None where no rank has rows that could lack room. Collective."""
    dispatchers = [moe.dispatcher for moe in moe_layers(model) if isinstance(moe.dispatcher, FusedDispatcher)]
    exchanges = {id(d.exchange): d.exchange for d in dispatchers if d.exchange.policy != "exact"}
    room = Room(list(exchanges.values()), device)
    return room if room._is_full_anywhere(bool(exchanges)) else None


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
