"""Expert choice and Sinkhorn look at all tokens at hand. Under tensor parallelism these are the rank's slice of the micro-batch, as
they are for capacity: TP 2 trains what one process trains that applies the policy to the two halves, one after the other.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed

from distributed import parity
from megatron_moe.moe import layer as moe_layer
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.policies import Choice, build_policy

pytestmark = pytest.mark.distributed

FLAGS = f"{parity.FP64} --disable-moe-token-dropping"
TP2 = "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2"


class Halved:
    """A policy that is asked about each half of the tokens by itself."""

    def __init__(self, config):
        self.policy = build_policy(config)
        self.keeps_capacity = self.policy.keeps_capacity

    def __call__(self, logits_TE, tokens, bias_E, capacity, training):
        half = len(logits_TE) // 2
        parts = [slice(0, half), slice(half, None)]
        of_half = None if capacity is None else capacity // 2
        choices = [self.policy(logits_TE[p], tokens.of(p, None, logits_TE), bias_E, of_half, training) for p in parts]
        return Choice(*(torch.cat([getattr(c, name) for c in choices]) for name in ("ids_TK", "scores_TE", "probs_TE")))


def halved_reference(model: str):
    capacity = MoELayer.capacity

    def of_both_halves(self, tokens):
        each = capacity(self, tokens // 2)
        return None if each is None else 2 * each

    with mock.patch.object(moe_layer, "build_policy", Halved), mock.patch.object(MoELayer, "capacity", of_both_halves):
        return parity.reference.__wrapped__(model, FLAGS)


@pytest.mark.parametrize("model", ["expert_choice", "sinkhorn"])
def test_the_tokens_at_hand_are_the_slice_of_the_rank(model):
    found = run_distributed(parity.layout, 2, model, f"{FLAGS} {TP2}")[0]
    parity.check(found, halved_reference(model), 1e-10)
    with pytest.raises(AssertionError, match="is off by"):  # and so it is another run than that of one process
        parity.check(found, parity.reference(model, FLAGS), 1e-6)
