"""Which dispatcher a layer gets, what is said about it, and how ranks split over nodes."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from megatron_moe.config.parallel import split_over_nodes
from megatron_moe.moe.dispatch import choose
from megatron_moe.moe.dispatch.alltoall import turned
from megatron_moe.moe.dispatch.choose import Crossing
from megatron_moe.training.planning.exchange import distinct


@pytest.mark.parametrize(
    ("kind", "k", "ep", "etp", "options", "name"),
    [
        ("auto", 2, 1, 1, {}, "local"),
        ("alltoall", 2, 1, 1, {}, "local"),
        ("auto", 2, 4, 1, {}, "alltoall"),
        ("auto", 4, 4, 1, {}, "alltoall"),  # as many rows, but room for twice of them
        ("auto", 4, 4, 1, {"capacity_factor": 1.25}, "allgather"),
        ("auto", 2, 1, 2, {}, "allgather"),  # every rank needs all rows
        ("alltoall", 2, 1, 2, {}, "alltoall"),
        ("auto", 2, 2, 2, {"capacity_factor": 1.0}, "allgather"),
        ("auto", 1, 2, 2, {"capacity_factor": 1.0}, "alltoall"),
        ("auto", 4, 4, 1, {"capacity_factor": 1.0, "chunks": 2}, "alltoall in 2 chunks"),
        ("auto", 2, 1, 2, {"chunks": 2}, "allgather"),  # no rows are exchanged between experts
        ("hierarchical", 2, 8, 1, {"nodes": 2}, "hierarchical"),
        ("hierarchical", 2, 8, 1, {"nodes": 2, "chunks": 3}, "hierarchical in 3 chunks"),
        ("hierarchical", 2, 8, 1, {}, "alltoall"),
        ("auto", 2, 8, 1, {"pad": True}, "padded"),
        ("fused", 2, 8, 1, {}, "fused"),
        ("fused", 2, 1, 1, {}, "local"),
        ("auto", 4, 8, 1, {"nodes": 2}, "hierarchical"),  # of four rows two or so go to the same node
        ("auto", 4, 8, 1, {"nodes": 2, "chunks": 2}, "hierarchical in 2 chunks"),
        ("auto", 1, 8, 1, {"nodes": 2}, "alltoall"),  # a token has one row
        ("auto", 2, 16, 1, {"nodes": 8}, "alltoall"),  # and two seldom go to one of eight
    ],
)
def test_the_choice(kind, k, ep, etp, options, name):
    assert choose(kind, 16, k, ep, etp, **options).name == name


def test_a_choice_gives_the_numbers_that_decided_it_and_obedience_no_reason():
    why = choose("auto", 16, 2, 4, 2, math.inf).why
    # of 8 ranks 7 are others; 2 of 4 owners; room for 4 ranks' tokens where half of a rank's come
    for part in (
        "16 experts, k 2, EP 4, ETP 2: alltoall",
        "3.5 times by an all-to-all",
        "7 times by an all-gather",
        "room for 4 times",
        "1.25",
    ):
        assert part in why
    assert "EP 8: alltoall" in choose("hierarchical", 16, 2, 8).why
    assert "--moe-overlap-chunks 2" in choose("auto", 16, 4, 4, chunks=2).why
    assert [choose(kind, 16, 2, 4, nodes=2).why for kind in ("alltoall", "allgather", "hierarchical")] == [""] * 3


@pytest.mark.parametrize(("experts", "k", "nodes"), [(64, 8, 4), (16, 2, 2), (16, 1, 4), (8, 8, 8), (256, 8, 32)])
def test_nodes_of_a_token_are_those_that_the_planner_counts(experts, k, nodes):
    crossing = Crossing(experts, k, nodes, 2)
    assert crossing.once == pytest.approx(distinct(nodes, experts, k, None, None) * (nodes - 1) / nodes)
    assert crossing.once <= crossing.by_row + 1e-12


def test_what_crosses_between_nodes_is_in_the_reason():
    why = choose("auto", 64, 8, 32, nodes=4).why
    for part in ("64 experts, k 8, EP 32: hierarchical", "4 nodes 6 rows", "2.74 if it crosses once", "7 then travel", "9 times as fast"):
        assert part in why
    assert "2 nodes 0.5 rows of a token cross one by one, 0.5 if" in choose("auto", 16, 1, 8, nodes=2).why


@pytest.mark.parametrize(
    ("ep", "etp", "node", "split"),
    [(8, 1, 4, (2, 4)), (8, 2, 4, (4, 2)), (4, 1, 4, (1, 4)), (4, 1, 8, (1, 4)), (2, 2, 8, (1, 2)), (4, 2, 2, (4, 1)), (4, 1, 1, (4, 1))],
)
def test_ranks_of_a_group_split_over_nodes(ep, etp, node, split):
    assert split_over_nodes(ep, etp, node) == split


@pytest.mark.parametrize(
    ("ep", "etp", "node", "legal"), [(8, 1, 3, "1, 2, 4, 8"), (4, 2, 3, "2, 4, 8"), (4, 4, 2, "4, 8, 16"), (4, 1, 6, "1, 2, 4")]
)
def test_nodes_that_would_have_different_numbers_of_ranks_are_refused(ep, etp, node, legal):
    with pytest.raises(ValueError, match=rf"ranks of a node \({node}\).*--moe-node-size to one of {legal}, or"):
        split_over_nodes(ep, etp, node)


def test_blocks_of_rows_are_turned_by_hand():
    rows = "a bc d".replace(" ", "")  # blocks (0,0) a, (0,1) bc, (1,0) d, (1,1) nothing
    assert "".join(rows[i] for i in turned(torch.tensor([[1, 2], [1, 0]]), 4, (1, 0)).tolist()) == "adbc"


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 5, 2), (4, 1, 1), (2, 3, 2, 2)])
def test_blocks_of_rows_are_turned_as_a_permuted_table(shape):
    torch.manual_seed(0)
    blocks = torch.randint(0, 4, shape)
    table, row = {}, 0
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)).tolist():
        n = int(blocks[tuple(index)])
        table[tuple(index)] = list(range(row, row + n))
        row += n
    for order in permutations(range(len(shape))):
        wanted = [r for index in sorted(table, key=lambda index: [index[dim] for dim in order]) for r in table[index]]
        assert turned(blocks, row, order).tolist() == wanted
