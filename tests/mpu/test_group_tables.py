"""Group tables against the ones published for Megatron and DeepSpeed, and what must hold for every layout."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.mpu.groups import dense_groups, expert_groups, expert_tensor_groups

SIXTEEN = [*range(16)]


def test_tp_is_fastest_then_dp_then_pp():
    assert dense_groups(8, tp=2, pp=2) == {
        "pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "cp": [[r] for r in range(8)],
        "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
    }


def test_cp_lies_between_tp_and_dp():
    groups = dense_groups(8, tp=2, cp=2)
    assert groups["cp"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups["dp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_pipeline_stride_is_the_world_over_pp():
    assert dense_groups(16, tp=2, pp=4)["pp"][:3] == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14]]


def test_megatrons_example_of_sixteen_ranks_with_tp_2():
    groups = dense_groups(16, tp=2)
    assert groups["tp"] == [[r, r + 1] for r in range(0, 16, 2)]
    assert groups["dp"] == [SIXTEEN[0::2], SIXTEEN[1::2]]


# ---------------------------------------------------------------- experts not tensor-parallel


def test_ep_2_of_16_ranks_takes_neighbours():
    ep, edp = expert_groups(16, 2)
    assert ep == [[r, r + 1] for r in range(0, 16, 2)]
    assert edp == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]


def test_data_before_expert_makes_expert_data_ranks_neighbours():
    ep, edp = expert_groups(8, 4, data_before_expert=True)
    assert edp == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert ep == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_ep_spans_tensor_parallel_ranks_without_expert_tp():
    dense = dense_groups(8, tp=2)
    assert dense["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert dense["dp"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    ep, edp = expert_groups(8, 4, tp=2)
    assert ep == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert edp == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_the_tutorials_example_of_four_ranks():
    assert expert_groups(4, 2) == ([[0, 1], [2, 3]], [[0, 2], [1, 3]])


def test_ep_may_exceed_dp_without_expert_tp():
    ep, edp = expert_groups(8, 8, tp=4)
    assert ep == [[*range(8)]]
    assert edp == [[r] for r in range(8)]


def test_pipeline_stages_have_expert_groups_of_their_own():
    ep, edp = expert_groups(8, 2, pp=2)
    assert ep == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert edp == [[0, 2], [1, 3], [4, 6], [5, 7]]


# ---------------------------------------------------------------- experts tensor-parallel


def test_expert_tp_cuts_ep_groups_out_of_dp_groups():
    ep, edp = expert_groups(16, 4, tp=2, expert_tensor_parallel=True)
    assert dense_groups(16, tp=2)["dp"] == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    assert ep == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert edp == [[0, 8], [2, 10], [4, 12], [6, 14], [1, 9], [3, 11], [5, 13], [7, 15]]


def test_slices_need_not_be_as_many_as_tensor_parallel_ranks():
    assert expert_tensor_groups(8, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    ep, edp = expert_groups(8, 2, tp=4, etp=2)
    assert ep == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert edp == [[0, 4], [2, 6], [1, 5], [3, 7]]
    ep, edp = expert_groups(8, 1, tp=2, etp=4)
    assert edp == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert expert_groups(16, 4, tp=2, etp=2) == expert_groups(16, 4, tp=2, expert_tensor_parallel=True)


def test_slices_of_two_stages_stay_apart():
    ep, edp = expert_groups(8, 2, pp=2, etp=2)
    assert ep == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert edp == [[r] for r in (0, 2, 1, 3, 4, 6, 5, 7)]


def test_expert_tp_size_is_the_tensor_parallel_size():
    assert expert_groups(16, 4, tp=2, etp=2, expert_tensor_parallel=True) == expert_groups(16, 4, tp=2, expert_tensor_parallel=True)
    with pytest.raises(ValueError, match=r"--expert-tensor-parallel-size \(4\) must equal --tensor-model-parallel-size \(2\)"):
        expert_groups(16, 4, tp=2, etp=4, expert_tensor_parallel=True)


# ---------------------------------------------------------------- refusals


def test_a_world_that_does_not_divide_names_the_legal_products():
    with pytest.raises(ValueError, match=r"ranks \(6\).*--tensor-model-parallel-size \(4\) = 4; make the product one of 1, 2, 3, 6"):
        dense_groups(6, tp=4)


def test_an_ep_degree_that_does_not_divide_the_stage_names_the_legal_ones():
    with pytest.raises(ValueError, match=r"stage \(8\).*--moe-expert-parallel-size \(3\); use one of 1, 2, 4, 8"):
        expert_groups(16, 3, pp=2)


def test_expert_tp_wants_ep_to_divide_dp():
    with pytest.raises(ValueError, match=r"data-parallel size \(2\).*\(4\); use one of 1, 2"):
        expert_groups(8, 4, tp=4, expert_tensor_parallel=True)


def test_slices_that_do_not_divide_the_stage_name_the_legal_ones():
    with pytest.raises(ValueError, match=r"stage \(8\).*--expert-tensor-parallel-size \(3\); use one of 1, 2, 4, 8"):
        expert_tensor_groups(16, 3, pp=2)
    with pytest.raises(
        ValueError, match=r"stage over the expert-tensor-parallel degree \(2\) \(4\).*--moe-expert-parallel-size \(8\); use one of 1, 2, 4"
    ):
        expert_groups(8, 8, etp=2)


def test_degrees_below_one_are_refused():
    with pytest.raises(ValueError, match="--context-parallel-size must be at least 1, not 0"):
        dense_groups(8, cp=0)
    with pytest.raises(ValueError, match="expert-parallel degree must be at least 1"):
        expert_groups(8, 0)


# ---------------------------------------------------------------- every layout

degrees = st.sampled_from([1, 2, 3, 4])


def is_partition(groups, world):
    return sorted(r for g in groups for r in g) == [*range(world)]


@given(degrees, degrees, degrees, degrees)
def test_every_axis_cuts_the_world_into_disjoint_ascending_groups(tp, pp, cp, dp):
    world = tp * pp * cp * dp
    groups = dense_groups(world, tp, pp, cp)
    for axis, size in {"tp": tp, "pp": pp, "cp": cp, "dp": dp}.items():
        assert is_partition(groups[axis], world)
        assert all(len(g) == size and g == sorted(g) for g in groups[axis])


@given(*[st.sampled_from([1, 2, 3])] * 5, st.booleans())
def test_an_ep_an_edp_and_an_etp_group_share_one_rank_at_most(tp, pp, ep, edp, etp, data_before_expert):
    world = ep * edp * pp * tp * etp
    eps, edps = expert_groups(world, ep, tp=tp, pp=pp, etp=etp, data_before_expert=data_before_expert)
    etps = expert_tensor_groups(world, etp, pp)
    for groups in (eps, edps, etps):
        assert is_partition(groups, world)
    assert all(len(g) == ep for g in eps) and all(len(g) == etp for g in etps)
    assert all(len(set(a) & set(b)) <= 1 for x, y in ((eps, edps), (eps, etps), (edps, etps)) for a in x for b in y)
    stage = world // pp
    assert all(len({r // stage for r in g}) == 1 for g in eps + edps + etps)


@given(degrees, degrees, degrees, degrees, st.booleans())
def test_expert_tp_is_etp_of_the_tensor_parallel_size(tp, pp, ep, edp, data_before_expert):
    world = ep * edp * pp * tp
    there = expert_groups(world, ep, tp=tp, pp=pp, expert_tensor_parallel=True, data_before_expert=data_before_expert)
    assert there == expert_groups(world, ep, tp=tp, pp=pp, etp=tp, data_before_expert=data_before_expert)
