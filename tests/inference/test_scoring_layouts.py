"""A model in a layout scores what one process scores. A file of its own: the ranks import it, and need no hypothesis."""

import math

import pytest
import torch.distributed as dist
from distributed_pool import run_distributed
from test_inference_loading import save_small_model

from megatron_moe.inference.engine import Engine
from megatron_moe.inference.layout import Layout
from megatron_moe.inference.load import load_for_inference
from megatron_moe.inference.scoring import Row, score_rows

ROWS = [Row([3, 1, 4, 1, 5, 9, 2, 6], 3), Row([7, 8], 1), Row([49, 0, 12, 3], 1)]


def _scores(directory, tp, ep):
    with Engine(load_for_inference(directory, layout=Layout(tp, ep, dist.group.WORLD))) as engine:
        if engine.is_leader:
            return [engine.score(ROWS), engine.score(ROWS[:1])]
        return engine.follow()


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.matrix), pytest.param(2, 4, marks=pytest.mark.matrix)])
def test_a_layout_scores_what_one_process_scores(tmp_path, tp, ep):
    save_small_model(tmp_path)
    alone = score_rows(load_for_inference(tmp_path).model, ROWS)
    (together, first), *others = run_distributed(_scores, max(tp, ep), str(tmp_path), tp, ep)
    assert set(others) == {None}
    for a, b in zip([*alone, alone[0]], [*together, first[0]]):
        assert math.isclose(a.log_prob, b.log_prob, abs_tol=1e-10)
        assert (a.tokens, a.is_greedy) == (b.tokens, b.is_greedy)
