"""One group's buffers for the fused all-to-all, and the order in which its kernels run.

Buffers that all ranks reach, of which a rank holds R rows (`capacity`) whatever the number of layers and micro-batches in flight:

    received  [R, H], [R]    push writes rows (and their weights) here; land copies them out
    staged    [R, H], [R]    results (and gradients of weights) for others, which pull reads
    counts    [2, ranks, E]  int32, by turns
    signals   [4, ranks]     int32 epochs

Rows are copied out of `received` because the backward of the experts needs them: a buffer per layer and micro-batch in flight would
have to be numbered in the same way on all ranks, and who frees it is autograd's garbage. The copy reads and writes the rows once.

Nobody overwrites what another still reads. A push needs that all ranks have landed the push before: the meeting of a plan or of a pull
says so. A pull needs that all ranks have ended the pull before: the meeting of a plan or at the end of a push says so. Where none was
between, the ranks meet once more. This is a matter of the order of calls, which is the same on all ranks.

How large R is:

    exact    the host reads how many rows there are, once per plan, and R grows when it must
    static   R is `factor` times an even share; more rows than R set `needed`, rows beyond R are left out, and the caller repeats its work
             after `grow`
    worst    R is what can come at most
"""
# T tokens here, K experts per token, H row width, R rows that fit here, E experts, e experts here

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_moe.kernels.fused.memory import Memory
from megatron_moe.kernels.jit import power_of_two

Policy = Literal["exact", "static", "worst"]

CHANNELS = ("counts", "sent", "staged", "free")
SPINS = 2**30  # of a wait: minutes, and then an error
ROUND_UP = 128  # rows
TILE = 4096  # elements of the tables that a program of `plan` holds
BLOCKS = 128  # programs of `plan`


@dataclass
class RowMap:
    """Where each assignment's row lies, and which rows are whose here. Fits any number of pushes and pulls."""

    owner_TK: Tensor  # int32, a token's choices by ascending expert: the rank, -1 for none
    row_TK: Tensor  # int32: the row there
    choice_TK: Tensor  # int32: which of the token's choices it is
    start_e: Tensor  # int32: first row of each expert here
    filled_e: Tensor  # int32: the row behind its last
    ends_e: Tensor  # int32: the same with padding
    info: Tensor  # int32 [4]: rows here, most rows of any rank, rows of this rank for others, rows of others here
    rows: int  # length of the row tensors


class Exchange:
    """For layers of `num_experts` experts over the ranks of `memory`, `k` per token. `align`: every expert's rows are padded to a
    multiple of it with zeros of weight 0. `kernels`: those of triton_exchange.py, or what has the same names (cuda_exchange.py)."""

    def __init__(self, memory: Memory, num_experts: int, k: int, policy: Policy = "static", factor: float = 1.5, align: int = 1,
                 spins: int = SPINS, kernels: Any = None):  # fmt: skip
        assert num_experts % memory.ranks == 0, f"{num_experts} experts, {memory.ranks} ranks"
        self.memory, self.num_experts, self.k, self.policy, self.factor, self.align = memory, num_experts, k, policy, factor, align
        self.experts_here, self.spins, self.capacity = num_experts // memory.ranks, spins, 0
        if kernels is None:
            from megatron_moe.kernels.fused import triton_exchange as kernels  # imports triton
        self.kernels = kernels
        self.programs = 264 if memory.device.type == "cuda" else 4  # of kernels that walk over rows: two per multiprocessor of an H100
        self._counts, self._signals = (
            memory.alloc((2, memory.ranks, num_experts), torch.int32),
            memory.alloc((4, memory.ranks), torch.int32),
        )
        self._epochs, self._error, self._ticket, self.needed = (self._zeros(n) for n in (len(CHANNELS), 1, 1, 1))
        self._buffers: _Buffers | None = None
        self._is_received_free = self._is_staged_free = True

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.memory.device)

    # ------------------------------------------------------------ room

    def reserve(self, tokens: int) -> None:
        """Collective; the host waits. Room for so many tokens of the rank that has most, before the first plan."""
        most = self.memory.largest(tokens)
        even = most * self.k
        if self.policy == "worst":
            even = self.memory.ranks * most * min(self.k, self.experts_here)
        elif self.policy == "static":
            even = int(even * self.factor)
        self.grow(even + self.experts_here * (self.align - 1))

    def grow(self, rows: int) -> None:
        """Collective, when more than the capacity. What was there is lost, so between pushes and pulls only."""
        rows = -(-max(rows, 1) // ROUND_UP) * ROUND_UP
        if rows > self.capacity:
            self.capacity = rows
            self._let_go()

    def _let_go(self) -> None:
        if self._buffers is not None:
            self.memory.meet()  # others may still read them
            self._buffers = None

    def overflow(self) -> int:
        """How many rows were wanted where there was not room for all, since the last call; 0 for none. The host waits.

        Raises RuntimeError when a rank did not come to a meeting."""
        needed, error = torch.cat([self.needed, self._error]).tolist()
        self.needed.zero_()
        if error:
            channel, rank = divmod(error - 1, self.memory.ranks)
            raise RuntimeError(
                f"fused all-to-all: rank {rank} of the expert-parallel group did not come to the meeting {CHANNELS[channel]!r} "
                f"within {self.spins} looks of rank {self.memory.rank}: it has ended, or waits for something else"
            )
        return needed if needed > self.capacity else 0

    def _rows(self, width: int, dtype: torch.dtype) -> _Buffers:
        kept = self._buffers
        if kept is None or (kept.width, kept.dtype) != (width, dtype):
            self._let_go()
            self._buffers = kept = _Buffers(self.memory, self.capacity, width, dtype)
        return kept

    # ------------------------------------------------------------ plan

    def plan(self, ids_TK: Tensor, most_rows: int | None = None, policy: Policy | None = None) -> RowMap:
        """Collective. ids_TK: int64, -1 for none. most_rows: of any rank, where the caller knows."""
        m, E, here = self.memory, self.num_experts, self.experts_here
        ids_TK, tokens = ids_TK.contiguous(), len(ids_TK)
        if not self.capacity:
            self.reserve(tokens)
        is_exact = (policy or self.policy) == "exact"
        limit = 2**31 - 1 if is_exact else self.capacity
        sizes = tiles(E, self.k)
        steps = -(-max(tokens, 1) // (sizes["BT"] * BLOCKS))
        blocks = -(-max(tokens, 1) // (sizes["BT"] * steps))
        block_counts, base = self._empty(blocks, E), self._empty(E)
        start_e, filled_e, ends_e, info = (self._empty(n) for n in (here, here, here, 4))
        self.kernels.count_kernel[(blocks,)](ids_TK, block_counts, tokens, steps, E=E, **sizes)
        self.kernels.publish_kernel[(1,)](
            block_counts, self._counts.pointers, self._signals.pointers, self._epochs, self._error, base, start_e, filled_e, ends_e, info,
            self.needed, blocks, limit, m.rank, self.spins,
            WORLD=m.ranks, E=E, EL=here, EP2=sizes["EP2"], ALIGN=self.align, NB=max(TILE // sizes["EP2"], 1),
        )  # fmt: skip
        self._is_received_free = self._is_staged_free = True
        rows = self.capacity if most_rows is None else min(self.capacity, most_rows + here * (self.align - 1))
        if is_exact:
            rows, most, *_ = info.tolist()  # the one host sync
            self.grow(int(most * 1.1) if most > self.capacity else most)
        owner_TK, row_TK, choice_TK = (self._empty(tokens, self.k) for _ in range(3))
        self.kernels.place_kernel[(blocks,)](
            ids_TK, block_counts, base, owner_TK, row_TK, choice_TK, tokens, min(limit, rows) if not is_exact else limit, steps, E=E, EL=here,
            **sizes,
        )  # fmt: skip
        return RowMap(owner_TK, row_TK, choice_TK, start_e, filled_e, ends_e, info, rows)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.memory.device)

    # ------------------------------------------------------------ push and pull

    def push(self, x_TD: Tensor, weights_TK: Tensor | None, where: RowMap) -> tuple[Tensor, Tensor | None]:
        """Collective. Every token's row to the owners of its experts: (rows [R, H] by expert, their weights [R])."""
        if not self._is_received_free:
            self._meet("free")
        self.send(x_TD, weights_TK, where)
        self._is_received_free, self._is_staged_free = False, True
        return self.land(x_TD.shape[1], x_TD.dtype, weights_TK is not None, where)

    def send(self, x_TD: Tensor, weights_TK: Tensor | None, where: RowMap) -> None:
        """The first half: into everyone's `received`, which must be free, until all have ended."""
        m, b = self.memory, self._rows(x_TD.shape[1], x_TD.dtype)
        x_TD, tokens = x_TD.contiguous(), len(x_TD)
        weights = b.received_weights.tensor if weights_TK is None else weights_TK.to(b.wide).contiguous()
        self.kernels.send_kernel[(max(min(tokens, self.programs), 1),)](
            x_TD, weights, where.owner_TK, where.row_TK, where.choice_TK, b.received.pointers, b.received_weights.pointers,
            self._signals.pointers, self._epochs, self._error, self._ticket, m.rank, self.spins, tokens,
            K=self.k, WORLD=m.ranks, HAS_W=weights_TK is not None, DT=_in_triton(b.dtype), WDT=_in_triton(b.wide), **b.columns,
        )  # fmt: skip

    def land(self, width: int, dtype: torch.dtype, has_weights: bool, where: RowMap) -> tuple[Tensor, Tensor | None]:
        """The second half: what has been received, in tensors of its own."""
        b = self._rows(width, dtype)
        rows_RD = b.received.tensor.new_empty(where.rows, width)
        weights_R = b.received_weights.tensor.new_empty(where.rows) if has_weights else None
        if where.rows:
            self.kernels.land_kernel[(min(where.rows, self.programs),)](
                b.received.tensor, b.received_weights.tensor, where.start_e, where.filled_e, rows_RD,
                rows_RD if weights_R is None else weights_R, where.rows,
                EL=self.experts_here, ELP2=power_of_two(self.experts_here), HAS_W=has_weights, **b.columns,
            )  # fmt: skip
        return rows_RD, weights_R

    def pull(self, rows_RD: Tensor, scalars_R: Tensor | None, where: RowMap) -> tuple[Tensor, Tensor | None]:
        """Collective. The sum of every token's rows [T, H], and the scalars beside them [T, K], 0 for assignments of nobody."""
        assert len(rows_RD) == where.rows, f"{len(rows_RD)} rows for a map of {where.rows}"
        if not self._is_staged_free:
            self._meet("free")
        self.stage(rows_RD, scalars_R, where)
        self._meet("staged")
        found = self.gather_sum(scalars_R, where, rows_RD.shape[1], rows_RD.dtype)
        self._is_staged_free, self._is_received_free = False, True
        return found

    def stage(self, rows_RD: Tensor, scalars_R: Tensor | None, where: RowMap) -> None:
        """The first half: to `staged`, which must be free."""
        b, rows_RD = self._rows(rows_RD.shape[1], rows_RD.dtype), rows_RD.contiguous()
        scalars = b.staged_scalars.tensor if scalars_R is None else scalars_R.to(b.wide).contiguous()
        if where.rows:
            self.kernels.stage_kernel[(min(where.rows, self.programs),)](
                rows_RD, scalars, where.ends_e, b.staged.tensor, b.staged_scalars.tensor, where.rows,
                EL=self.experts_here, HAS_S=scalars_R is not None, **b.columns,
            )  # fmt: skip

    def gather_sum(self, scalars_R: Tensor | None, where: RowMap, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The second half, when all have staged: out of everyone's `staged`."""
        b, tokens = self._rows(width, dtype), len(where.owner_TK)
        out_TD = b.staged.tensor.new_empty(tokens, width)
        out_TK = None if scalars_R is None else b.staged_scalars.tensor.new_zeros(tokens, self.k)
        self.kernels.gather_sum_kernel[(max(tokens, 1), -(-width // b.columns["BH"]))](
            b.staged.pointers, b.staged_scalars.pointers, where.owner_TK, where.row_TK, where.choice_TK, out_TD,
            out_TD if out_TK is None else out_TK, tokens,
            K=self.k, HAS_S=out_TK is not None, DT=_in_triton(b.dtype), WDT=_in_triton(b.wide), **b.columns,
        )  # fmt: skip
        return out_TD, out_TK

    def _meet(self, channel: str) -> None:
        m = self.memory
        self.kernels.meet_kernel[(1,)](
            self._signals.pointers,
            self._epochs,
            self._error,
            m.rank,
            self.spins,
            WORLD=m.ranks,
            CHANNEL=CHANNELS.index(channel),
            num_warps=1,
        )


class _Buffers:
    """Rows of one width and dtype."""

    def __init__(self, memory: Memory, capacity: int, width: int, dtype: torch.dtype):
        self.width, self.dtype = width, dtype
        self.wide = torch.promote_types(dtype, torch.float32)  # of weights, and of sums
        self.received, self.staged = (memory.alloc((capacity, width), dtype) for _ in range(2))
        self.received_weights, self.staged_scalars = (memory.alloc((capacity,), self.wide) for _ in range(2))
        self.columns = {"H": width, "BH": min(power_of_two(width), 1024)}


def tiles(num_experts: int, k: int) -> dict[str, int]:
    """How the kernels of a plan cut the ids: BT tokens at a time, so that tokens x choices x experts fit in registers."""
    experts, choices = power_of_two(num_experts), power_of_two(k)
    return {"K": k, "KP2": choices, "EP2": experts, "BT": min(max(TILE // (experts * choices), 2), 64)}


def _in_triton(dtype: torch.dtype) -> Any:
    from megatron_moe.kernels.jit import tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def row_problem(width: int, dtype: torch.dtype) -> str | None:
    """Why rows like these cannot travel; None when they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"rows are of {str(dtype).removeprefix('torch.')}, and it moves float32, bfloat16 and float16"
    if width * dtype.itemsize % 16:
        step = 16 // dtype.itemsize
        nearest = " or ".join(str(n) for n in (width // step * step, -(-width // step) * step) if n)
        return f"rows of {width} x {dtype.itemsize} bytes are not a multiple of 16 bytes; the nearest width is {nearest}"
    return None
