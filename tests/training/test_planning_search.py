"""What the search calls valid is what the configuration allows, all of it; more memory never loses a layout; time has its terms."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import words_of
from megatron_moe.config.run import FIELDS, RunConfig
from megatron_moe.model.flops import flops_per_token
from megatron_moe.training.planning.layout import SETTINGS, Layout, of_run
from megatron_moe.training.planning.machines import MACHINES, Assumptions
from megatron_moe.training.planning.memory import memory
from megatron_moe.training.planning.search import DOES_NOT_FIT, MICRO_BATCHES, Judge, axis_of, pinned, search, space_of, valid_layouts
from megatron_moe.training.planning.time import _seconds_per_token, step_time

SMALL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --num-experts 2 4 --mock-data "
    "--train-iters 2 --global-batch-size 8 --make-vocab-size-divisible-by 4"
)
H100, DEFAULTS = replace(MACHINES["h100-sxm"], devices_per_node=4), Assumptions()


def run_of(flags: str) -> RunConfig:
    return parse_args(flags.split()).run


def brute_force(run: RunConfig, devices: int, most_tp: int) -> set[Layout]:
    """Every combination of every axis is asked whole."""
    powers = [d for d in range(1, devices + 1) if devices % d == 0]
    found = set()
    for tp, cp, pp, ep, etp in itertools.product(powers, repeat=5):
        if (
            tp > most_tp
            or etp > most_tp
            or devices % (tp * cp * pp)
            or (devices // pp % (ep * etp) and (ep > devices // pp or etp > devices // pp))
        ):
            continue
        virtuals = [None, *(v for v in (1, 2) if pp > 1 and v < max(4 // pp, 1))] if SETTINGS["virtual"] in FIELDS else [None]
        for sp, v, zero, b, how in itertools.product({False, tp > 1}, virtuals, range(4), MICRO_BATCHES, (None, "selective", "full")):
            data, in_node = devices // (pp * tp), max(most_tp // tp, 1)
            parts = {1, data // in_node} if zero and data > in_node and data % in_node == 0 else {1}
            for replicas in parts if SETTINGS["replicas"] in FIELDS else {1}:
                layout = Layout(devices, tp, sp, cp, pp, v, ep, etp, zero, replicas, b, how)
                if not layout.problems(run):
                    found.add(layout)
    return found


def test_valid_layouts_are_those_that_the_configuration_allows():
    run = pinned(run_of(SMALL), 4)
    space = space_of(run, replace(H100, devices_per_node=2), 4)
    listed = list(valid_layouts(run, space, Judge(run)))
    assert len(listed) == len(set(listed)) > 100
    assert set(listed) == brute_force(run, 4, 2)


def test_every_layout_of_a_larger_search_is_valid_and_its_flags_say_so():
    """Also where the command has a layout of its own, which the flags must undo."""
    command = SMALL + " --tensor-model-parallel-size 2 --checkpoint-activations --zero-stage 3 --gradient-accumulation-steps 2"
    run = run_of(command)
    found = search(run, 64, H100, 8, Assumptions(), top=40)
    assert len(found.best) == 40
    assert [p.time.total for p in found.best] == sorted(p.time.total for p in found.best)
    laid = pinned(run, 8)
    for p in found.best:
        assert list(p.layout.applied(laid).world_problems(8)) == []
        words = [*command.split(), *p.layout.flags(replace(run, training=replace(run.training, global_batch_size=8)))]
        again = parse_args([*words, "--dry-run", "--dry-run-world-size", "8"])
        assert of_run(again.run, 8) == p.layout
        assert again.not_yet == list(again.run.world_problems(8)) == []


def test_more_memory_never_loses_a_layout_and_less_says_what_is_missing():
    fitting, run = [], run_of(SMALL)
    for memory_gb in (1e-4, 2e-3, 4e-3, 8e-3, 1.0):
        found = search(run, 64, replace(H100, memory_gb=memory_gb), 4, Assumptions(), top=10_000)
        fitting.append({p.layout for p in found.best})
        assert found.fitting == len(found.best) == found.valid - found.left_out[DOES_NOT_FIT]
        assert found.tried == found.valid + found.left_out.total() - found.left_out[DOES_NOT_FIT]
    assert fitting[0] == set()
    assert len(fitting[1]) < len(fitting[-1])
    assert all(less <= more for less, more in itertools.pairwise(fitting))


def test_reasons_are_counted():
    run = run_of(SMALL.replace("--global-batch-size 8", "--global-batch-size 6"))
    found = search(run, 64, replace(H100, devices_per_node=2), 4, Assumptions(), top=1)
    assert any("--global-batch-size must be divisible by" in why for why in found.left_out)


def test_fixed_axes_stay_as_the_command_has_them():
    run = run_of(SMALL + " --tensor-model-parallel-size 2 --zero-stage 3")
    found = search(run, 64, H100, 4, Assumptions(), top=1000, fixed=frozenset({"tp", "zero"}))
    assert {(p.layout.tp, p.layout.zero) for p in found.best} == {(2, 3)}
    assert axis_of("--zero-stage") == axis_of("zero") == axis_of("zero_stage") == "zero"
    assert axis_of("expert-model-parallel-size") == "ep"
    assert axis_of("learning-rate") is None


@pytest.mark.parametrize("axis", ["zero", "ep", "micro_batch", "recompute"])
def test_memory_goes_the_way_that_an_axis_is_for(axis):
    run = pinned(run_of(SMALL), 4)
    of = lambda **values: memory(run, Layout(4, **values), 64, 8)  # noqa: E731
    if axis == "zero":
        sharded = [of(zero=z) for z in range(4)]
        assert sharded[0].optimizer == pytest.approx(4 * sharded[1].optimizer, rel=0.01)  # two rows do not divide by four
        assert sharded[1].parameters == sharded[2].parameters == sharded[3].parameters
        assert sharded[3].gathered < sharded[2].gathered
    elif axis == "ep":
        assert of(ep=4, zero=0).parameters < of(ep=2, zero=0).parameters < of(zero=0).parameters
    elif axis == "micro_batch":
        one, two = of(), of(micro_batch=2)
        assert two.activations == 2 * one.activations
    else:
        assert of(recompute="full").activations < of(recompute="selective").activations < of().activations


def test_a_pipeline_rank_holds_the_micro_batches_that_its_schedule_lets_in():
    from megatron_moe.training.planning.memory import in_flight

    assert [in_flight(Layout(4, pp=4), 8, 8, rank) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight(Layout(4, pp=4), 2, 8, 0) == 2
    # two parts of a rank: 2 (4 - 1) + 4 + 1 = 11 halves
    assert in_flight(Layout(4, pp=4, virtual=1), 8, 8, 0) == 5.5
    assert Layout(2, pp=2, virtual=2).layers_of_rank(8, 0) == [1, 2, 5, 6]
    assert [Layout(4, pp=4).layers_of_rank(10, r) for r in range(4)] == [[1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


def test_time_of_one_device_is_that_of_its_flops():
    run = pinned(run_of(SMALL), 1)
    exact = Assumptions(matmul_efficiency=1.0, attention_efficiency=1.0, load_skew=1.0)
    seconds = _seconds_per_token(run, Layout(1), 64, H100, exact)
    assert seconds == pytest.approx(flops_per_token(run.model, run.moe, 32, 64) / (H100.peak_tflops * 1e12))


def test_every_term_of_the_time_answers_to_what_it_is_about():
    run = pinned(run_of(SMALL), 8)

    def of(machine=H100, assumed=DEFAULTS, **values):
        return step_time(run, Layout(8, **values), 64, 8, machine, assumed)

    slow_network, slow_memory = replace(H100, intra_node_bandwidth=1.0, inter_node_bandwidth=0.1), replace(H100, memory_bandwidth=100)
    alone = of(zero=0)
    assert alone.tp == alone.ep == alone.cp == alone.bubble == alone.p2p == 0
    assert of(slow_network, tp=2).tp > of(tp=2).tp > 0
    assert of(slow_network, ep=4).ep > of(ep=4).ep > of(ep=2).ep > 0
    assert of(slow_network, cp=2).cp > of(cp=2).cp > 0
    assert of(pp=2).bubble > 0 < of(pp=2).p2p
    assert of(pp=2, virtual=1).bubble == pytest.approx(of(pp=2).bubble / 2)
    assert of(slow_network, zero=3).dp > of(slow_network, zero=1).dp
    assert of(slow_memory).optimizer > of().optimizer
    assert of(slow_memory).elementwise > of().elementwise
    assert of(assumed=Assumptions(launch_us=50)).host > of(assumed=Assumptions(launch_us=1)).host
    assert of(recompute="full").compute > of(recompute="selective").compute > of().compute
    assert of(assumed=Assumptions(load_skew=2.0), ep=4).ep == pytest.approx(2 * of(assumed=Assumptions(load_skew=1.0), ep=4).ep, rel=0.5)
    assert of(slow_network, ep=8).bound in ("ep", "dp")


def test_words_of_every_axis_come_back():
    layout = Layout(8, tp=2, ep=2, zero=3, micro_batch=2, recompute="full")
    run = pinned(run_of(SMALL), 8)
    words = layout.flags(run)
    assert words_of(FIELDS["moe_expert_parallel_size"], 2) == words[words.index("--moe-expert-parallel-size") :][:2]
    assert of_run(run_of(f"{SMALL} {' '.join(words)}"), 8) == layout
