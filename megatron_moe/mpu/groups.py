"""Which ranks form which group: pure tables, no torch, no communication. The same on every rank.

Ranks are laid out as (pp, dp, cp, tp), tp fastest: rank = ((p * dp + d) * cp + c) * tp + t, Megatron's order.
Worked example, world 8, tp 2, pp 2 (so dp 2):
    tp [0,1] [2,3] [4,5] [6,7]    dp [0,2] [1,3] [4,6] [5,7]    pp [0,4] [1,5] [2,6] [3,7]

Experts live on the same ranks folded another way. EP: ranks that together hold all experts of a layer once.
EDP (expert data parallel): ranks that hold the same experts. ETP: neighbours that share each expert, as slices.
"""

from __future__ import annotations

from megatron_moe.config.model import divisors

Groups = list[list[int]]


def dense_groups(world: int, tp: int = 1, pp: int = 1, cp: int = 1) -> dict[str, Groups]:
    """Groups of each axis, keyed pp, dp, cp, tp; groups and the ranks inside them ascend."""
    dp = _data_parallel_size(world, tp, pp, cp)
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
    groups, stride = {}, world
    for axis, size in sizes.items():
        stride //= size
        groups[axis] = [[first + i * stride for i in range(size)] for first in range(world) if first // stride % size == 0]
    return groups


def expert_groups(
    world: int,
    ep: int,
    *,
    tp: int = 1,
    pp: int = 1,
    etp: int = 1,
    expert_tensor_parallel: bool = False,
    data_before_expert: bool = False,
) -> tuple[Groups, Groups]:
    """(EP groups, EDP groups), DeepSpeed's two ways and what lies between them.

    A stage is cut into blocks of `ep * etp` consecutive ranks, which hold the experts of a layer once and may span TP ranks, so that
    EP may exceed DP. In a block, each `etp` neighbours share the same experts, and the ranks with equal numbers among them are an EP
    group. `data_before_expert` makes the EDP ranks the nearer ones instead. `expert_tensor_parallel` says ETP = TP: every TP rank
    holds its slice of each expert, and EP groups are cut out of the DP groups.
    """
    if ep < 1:
        raise ValueError(f"the expert-parallel degree must be at least 1, not {ep}")
    if expert_tensor_parallel:
        if etp not in (1, tp):
            raise ValueError(f"--expert-tensor-parallel-size ({etp}) must equal --tensor-model-parallel-size ({tp}), or leave it out")
        etp = tp
    _data_parallel_size(world, tp, pp, 1)
    pools = _expert_pools(world, pp, etp)
    size = len(pools[0])
    if size % ep:
        what = "data-parallel size" if etp == tp > 1 else "number of ranks of a pipeline stage"
        over = f" over the expert-tensor-parallel degree ({etp})" if etp not in (1, tp) else ""
        raise ValueError(
            f"the {what}{over} ({size}) must be divisible by --moe-expert-parallel-size ({ep}); use one of {_one_of(size)} "
            f"or start another number of ranks"
        )
    consecutive, strided = [], []
    block = size // ep if data_before_expert else ep
    for pool in pools:
        consecutive += [pool[i : i + block] for i in range(0, size, block)]
        strided += [pool[i::block] for i in range(block)]
    return (strided, consecutive) if data_before_expert else (consecutive, strided)


def expert_tensor_groups(world: int, etp: int, pp: int = 1) -> Groups:
    """Ranks that share each expert: neighbours, whatever the expert-parallel degree is."""
    _expert_pools(world, pp, etp)
    return [list(range(first, first + etp)) for first in range(0, world, etp)]


def _expert_pools(world: int, pp: int, etp: int) -> Groups:
    """Ranks of a stage that hold the same slice of experts."""
    stage = world // pp
    if etp < 1 or stage % etp:
        raise ValueError(
            f"the number of ranks of a pipeline stage ({stage}) must be divisible by --expert-tensor-parallel-size ({etp}); "
            f"use one of {_one_of(stage)}"
        )
    return [list(range(first + number, first + stage, etp)) for first in range(0, world, stage) for number in range(etp)]


def hybrid_groups(pools: Groups, replicas: int) -> tuple[Groups, Groups]:
    """(shard groups, replicate groups) of hybrid sharding: each pool of data ranks in `replicas` equal parts of ranks that follow each
    other, and the ranks that have the same place in all parts. Two replicas of [0,1,2,3]: shard [0,1] [2,3], replicate [0,2] [1,3]."""
    shard, replicate = [], []
    for pool in pools:
        size = len(pool) // replicas
        shard += [pool[i : i + size] for i in range(0, len(pool), size)]
        replicate += [pool[i::size] for i in range(size)]
    return shard, replicate


def _data_parallel_size(world: int, tp: int, pp: int, cp: int) -> int:
    flags = {
        "--tensor-model-parallel-size": tp, "--pipeline-model-parallel-size": pp, "--context-parallel-size": cp,
    }  # fmt: skip
    for name, size in flags.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    if world % (tp * pp * cp):
        given = " x ".join(f"{name} ({size})" for name, size in flags.items() if size > 1)
        raise ValueError(
            f"the number of ranks ({world}) must be divisible by {given} = {tp * pp * cp}; make the product one of "
            f"{_one_of(world)} or start another number of ranks"
        )
    return world // (tp * pp * cp)


def _one_of(n: int) -> str:
    return ", ".join(map(str, divisors(n)))
