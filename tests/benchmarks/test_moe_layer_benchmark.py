"""The benchmark of one MoE layer: that it runs, that tokens go where a case wants them, and that unequal work is not compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import moe_layer
from benchmarks.moe_layer import FLOOR, ONE_GEMM, OURS, REFERENCE, Case, Made, Options, floor, ours_and_limits, prescribed
from benchmarks.recorded_routing import RECORDED, TOKENS

SMALL = {"tokens": 64, "hidden": 32, "inner": 48}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_floor_computes_what_the_layer_does_with_all_gradients_of_the_experts(activation):
    made = Made(Case(8, 2, activation, "fp32", "zipf", **SMALL))
    y, (dx, _, *weights) = floor(made)
    y_ours, experts = made.layer(made.x_TD), made.layer.experts
    torch.testing.assert_close(y, y_ours, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(y_ours, [p for p in (experts.w1, experts.w2, experts.w_gate) if p is not None], made.upstream_TD)
    for theirs, own in zip([w for w in weights if w is not None], ours):
        torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-6)
    assert dx.shape == made.x_TD.shape


@pytest.mark.parametrize("experts", [8, 64, 256])
@pytest.mark.parametrize("routing", ["balanced", "zipf", "recorded"])
def test_tokens_go_to_different_experts_as_the_case_wants(experts, routing):
    ids = prescribed(Case(experts, 2, "gelu", "fp32", routing))
    assert ids.shape == (moe_layer.T, 2)
    assert (ids[:, 0] != ids[:, 1]).all()
    counts = torch.bincount(ids.flatten(), minlength=experts)
    assert len(counts) == experts
    if routing == "balanced":
        assert counts.max() - counts.min() <= 1
    else:
        assert counts.max() > 1.5 * counts.float().mean()


def test_what_was_recorded_is_whole():
    found = np.load(RECORDED)
    assert {name: found[name].shape for name in found} == {str(E): (TOKENS, 2) for E in (8, 64, 256)}


def test_it_runs_and_names_every_system_and_the_bar(tmp_path):
    options = Options(quick=True, num_experts=(8,), topk=(2,), activation=("gelu",), dtype=("fp32",), routing=("zipf",), peers=False)
    report = moe_layer.run(options)
    (case,) = report.samples
    assert set(report.samples[case]) == {OURS, REFERENCE, FLOOR, ONE_GEMM}
    assert "the bar is 1.06" in report.tables[0]
    assert report.skipped.keys() == moe_layer.PEERS.keys()
    assert max(report.figures[case]["largest_difference_to_ours"].values()) < 1e-5


def test_a_system_that_computes_something_else_is_not_compared():
    made = Made(Case(8, 2, "gelu", "fp32", "balanced", **SMALL))
    assert moe_layer.difference(made, FLOOR, ours_and_limits(made)[FLOOR]) < 1e-5
    with pytest.raises(AssertionError, match="differs by"):
        moe_layer.difference(made, "theirs", lambda: made.y_TD * 1.01)
