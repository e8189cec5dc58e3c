"""Token dispatch: bring each routed row to the rank that owns its expert, and the results back.

A dispatcher is an object handed to the layer; all of them have one interface and one row order:

  plan(ids_TK, limits) -> plan                             counts, splits, order: no gradient, never recomputed
  through(experts, x_TD, ids_TK, weights_TK, plan) -> y_TD      to the experts and back

`through` is, in all but one of them, these two with the experts between them:

  dispatch(x_TD, ids_TK, weights_TK, plan=None) -> rows_RD, offsets_e, row_weights_R, plan
  combine(rows_RD, plan) -> y_TD                           plain sum of a token's rows

Rows arrive sorted by (expert, source rank, token, choice); offsets_e (int32) are the ends of the experts' rows. ids of -1
(dropped) belong to no expert.

    base.py            the interface, and all experts here
    alltoall.py        each row to its expert's rank, in exact sizes
    hierarchical.py    in two exchanges: each token once to a node that has experts of it, then its rows within the node
    overlap.py         either of these in chunks of tokens: one travels while the experts compute another
    allgather.py       all tokens to all ranks, which take the rows of their experts
    fused.py           kernels write each row into the memory of its expert's rank
    padded.py          as many rows as the capacity to every expert
    slices.py          expert tensor parallelism, for all of them: experts that are cut over several ranks
    choose.py          which one a layer gets, and why

Where the number of rows is not known without asking the device, there are as many as there can be at most: those behind the
last expert's are spare (`plan.has_spare_rows`). They have weight 0; the experts owe zeros for them, and zero gradients. Only the
all-to-alls ask - once per layer, for the sizes they must know on the host - and have no spare rows. Padded, it need not ask: then
zero rows of weight 0 stand behind each rank's rows of an expert, up to its capacity.

`plan.sent_bytes`, known once rows have travelled: what this rank sends to others for them, in a forward and in its backward;
`plan.far_bytes`: of these, those to ranks of other nodes; None where it is not known which ranks share a node.

Worked example, 4 experts on 2 ranks, k = 1: rank 0 routes tokens a b c to experts 2 0 2, rank 1 routes d e to 0 3.
Rank 0 owns experts 0 and 1 and receives [b, d], offsets [2, 2]; rank 1 receives [a, c, e], offsets [2, 3].

Letters of all files: T tokens here, K experts per token, A assignments (T*K), R rows to compute here, E experts, e experts here,
P ranks with other experts, S ranks with slices of the same experts, C parts of the tokens (or the capacity).
"""

from megatron_moe.moe.dispatch.allgather import AllGatherDispatcher
from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.base import Limits, LocalDispatcher
from megatron_moe.moe.dispatch.choose import build_dispatcher, choose, room
from megatron_moe.moe.dispatch.hierarchical import HierarchicalDispatcher
from megatron_moe.moe.dispatch.overlap import OverlappedDispatcher
from megatron_moe.moe.dispatch.padded import PaddedDispatcher

__all__ = [
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "HierarchicalDispatcher",
    "Limits",
    "LocalDispatcher",
    "OverlappedDispatcher",
    "PaddedDispatcher",
    "build_dispatcher",
    "choose",
    "room",
]
