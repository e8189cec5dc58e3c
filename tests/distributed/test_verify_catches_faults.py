"""--verify-parallelism against itself: right layouts pass, and each of the faults that a layout can have is seen and named.

A fault is planted while the layout trains, and not while the one device does. The table says what must be named first, so that no
fault is found by luck, or by a change of the last digit.
"""

from __future__ import annotations

import re
import shlex
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from distributed import test_planted_faults as planted
from megatron_moe.arguments import parse_args
from megatron_moe.parallel.apply import build_parallel_mesh
from megatron_moe.training import step
from megatron_moe.training.verify import ranks
from megatron_moe.training.verify.compare import Verdict, report
from megatron_moe.training.verify.shrink import shrink

pytestmark = pytest.mark.distributed

# A user's command: sizes that no test would have, bf16, dropout, dropping or not.
BASE = (
    "--num-layers 8 --hidden-size 512 --num-attention-heads 8 --seq-length 256 --max-position-embeddings 256 --micro-batch-size 4 "
    "--global-batch-size 64 --mock-data --train-iters 100 --bf16 --lr 1e-3 --weight-decay 0.1 --moe-loss-coeff 0.01"
)
PYRAMID = "--num-experts 2 2 8 8 --topk 2 --disable-moe-token-dropping --mlp-type residual --hidden-dropout 0.1 --attention-dropout 0.1"
EP2, TP2 = "--moe-expert-parallel-size 2", "--tensor-model-parallel-size 2"
BIAS = "--num-experts 8 --topk 2 --moe-router-enable-expert-bias --disable-moe-top2-2nd-expert-sampling --disable-moe-token-dropping"

HONEST = [  # world, flags
    (1, f"{PYRAMID}"),
    (2, f"{PYRAMID} {EP2} --zero-stage 0 --moe-expert-lr-mult 0.3 --moe-expert-wd-mult 2"),
    (2, f"{PYRAMID} {TP2} --zero-stage 2 --recompute-granularity full --moe-global-loss-coeff 0.3 --moe-seq-loss-coeff 0.2"),
    (2, f"--num-experts 4 --topk 1 {EP2} --moe-train-capacity-factor 0.6 --optimizer sgd --moe-global-loss-coeff 0.3"),  # drops
    (2, f"--num-experts 8 --moe-router-policy expert_choice --topk 2 {TP2} {EP2} --moe-pad-expert-input-to-capacity"),
    (2, f"--num-experts 4 --topk 2 --mos --load-teacher there --num-experts-teacher 8 --num-layers-teacher 12 {EP2} --kd-temp 2"),
    (4, f"{PYRAMID} {TP2} --moe-expert-parallel-size 4 --zero-stage 3 --recompute-granularity full"),
    (4, f"{BIAS} {TP2} {EP2} --swiglu --normalization RMSNorm --position-embedding-type rope --num-key-value-heads 4 --moe-latent-size 96"),
    (4, f"--num-experts 4 --topk 1 --moe-noisy-gate-policy Jitter {TP2} {EP2} --moe-shared-expert-intermediate-size 64 --zero-stage 2"),
    (2, f"{PYRAMID} {TP2} --sequence-parallel {EP2} --zero-stage 3"),
    (2, f"{PYRAMID} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 --optimizer muon"),
    (2, f"{PYRAMID} {TP2} --enable-expert-tensor-parallelism --cross-entropy-loss-chunk-size 8192 --fp16-master-weights-and-grads --fp16 --no-bf16"),
    (4, f"{PYRAMID} --context-parallel-size 2 {EP2} --moe-overlap-chunks 2 --num-distributed-optimizer-instances 2 --zero-stage 2"),
    (4, f"{PYRAMID} --pipeline-model-parallel-size 2 {TP2} --sequence-parallel --pipeline-schedule zero-bubble --zero-stage 2"),
]  # fmt: skip


@contextmanager
def during_the_step(name, wrapped):
    """`wrapped(original)` in the place of a function of training/step.py."""
    with mock.patch.object(step, name, wrapped(getattr(step, name))):
        yield


@contextmanager
def auxiliary_loss_scaled_by_accumulation():
    from megatron_moe.moe.layer import MoELayer

    original = MoELayer.begin_step

    def scaled(forward_backward):
        def call(model, microbatches, *rest):
            with mock.patch.object(MoELayer, "begin_step", lambda moe, weight: original(moe, weight * len(microbatches))):
                return forward_backward(model, microbatches, *rest)

        return call

    with during_the_step("forward_backward", scaled):
        yield


@contextmanager
def expert_bias_not_reduced():
    """Each rank balances the tokens that it sees."""

    def local(_):
        def move(model, *_):
            for moe in step.moe_layers(model):
                moe.gate.move_bias(moe.stats.counts_E, moe.config.moe_router_bias_update_rate)

        return move

    with during_the_step("move_expert_biases", local):
        yield


@contextmanager
def token_keys_of_the_wrong_rank():
    """Dropout drawn for sample 0, 1, ... on every rank."""

    def local(token_keys):
        return lambda seed, iteration, ids_B, length: token_keys(seed, iteration, torch.arange(len(ids_B)), length)

    with during_the_step("token_keys", local):
        yield


@contextmanager
def tokens_not_counted_over_ranks():
    def local(_):
        return lambda microbatches, mesh: sum(b.loss_mask.sum(dtype=torch.float64) for b in microbatches) * mesh.size("dp")

    with during_the_step("count_loss_tokens", local):
        yield


@contextmanager
def norm_counted_twice():
    """Every element once for each rank that has it."""
    with during_the_step("gradient_norm", lambda norm: lambda parameters, stage_ranks: norm(parameters, 1)):
        yield


@contextmanager
def clip_by_a_local_norm():
    """The norm of the step is right; what gradients are scaled by is that of the shards here."""

    def local(clip):
        def call(parameters, norm, max_norm, *rest):
            grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in parameters if p.grad is not None]
            return clip(parameters, torch.nn.utils.get_total_norm(grads), max_norm, *rest)

        return call

    with during_the_step("clip_gradients", local):
        yield


@contextmanager
def rows_of_two_experts_swapped():
    """What arrives for the first expert is given to the second one."""
    from megatron_moe.moe.dispatch import AllToAllDispatcher

    original = AllToAllDispatcher.arrive

    def arrive(self, flights, plan):
        rows, weights = original(self, flights, plan)
        first, second = plan.offsets_e[:2].tolist()
        order = torch.cat([torch.arange(first, second), torch.arange(first), torch.arange(second, len(rows))])
        return rows[order], weights[order]

    with mock.patch.object(AllToAllDispatcher, "arrive", arrive):
        yield


@contextmanager
def optimizer_skips_a_group():
    """Biases and norms are in no group."""
    from megatron_moe.optimizer import groups

    original = groups.weight_decay_groups
    with mock.patch.object(groups, "weight_decay_groups", lambda *args: [g for g in original(*args) if "no_decay" not in g["name"]]):
        yield


@contextmanager
def norms_of_one_rank_in_wrong_memory():
    """A replica that is none: nothing that rank 0 holds is wrong."""

    def damaged(zero_like):
        def move(model, *rest):
            zero_like(model, *rest)
            if dist.get_rank() == dist.get_world_size() - 1:
                parameter = model.layers["1"].attn_norm.weight
                parameter.to_local().view(torch.int64)[0] ^= 1

        return move

    with during_the_step("move_expert_biases", damaged):
        yield


FAULTS = [  # fault, world, flags, what is named first
    (planted.expert_gradients_divided_by_ep, 2, f"{PYRAMID}", r"gradient of layers\.4\.moe\.experts\.\w+ in step 1.* 0\.5 times"),
    (planted.fsdp_averages, 2, f"{PYRAMID} {EP2} --zero-stage 0", r"gradient of norm\.bias in step 1 .* 0\.5 times"),
    (planted.router_gradient_not_summed_over_tp, 2, f"{PYRAMID} {TP2}", r"gradient of layers\.4\.moe\.gate\.weight in step 1"),
    (planted.gate_not_declared_partial, 2, f"{PYRAMID} {TP2} {EP2} --zero-stage 3", r"gradient of layers\.4\.moe\.gate\.weight in step 1"),
    (auxiliary_loss_scaled_by_accumulation, 2, f"{PYRAMID} {EP2}", r"gradient of layers\.4\.moe\.gate\.weight in step 1"),
    (planted.counts_not_shared, 2, f"{PYRAMID} {TP2} {EP2}", r"routing of layers\.2\.moe in step 1"),
    (planted.batch_counts_not_summed, 2, f"{PYRAMID} {EP2} --moe-global-loss-coeff 0.1", r"gradient of layers\.4\.moe\.gate\.weight in step 1"),
    (expert_bias_not_reduced, 2, f"{BIAS} {EP2}", r"weight of layers\.2\.moe\.gate\.expert_bias in step"),
    (token_keys_of_the_wrong_rank, 2, f"{PYRAMID} --zero-stage 3", r"routing of layers\.2\.moe in step 1"),
    (tokens_not_counted_over_ranks, 2, f"{PYRAMID} --zero-stage 2", r"loss in step 1"),
    (norm_counted_twice, 2, f"{PYRAMID} {TP2} {EP2}", r"gradient norm in step 1"),
    (clip_by_a_local_norm, 2, f"{PYRAMID} {EP2} --clip-grad 1.0", r"gradient of norm\.bias in step 1"),
    (rows_of_two_experts_swapped, 2, f"{BIAS} {EP2}", r"loss in step 1"),
    (optimizer_skips_a_group, 2, f"{PYRAMID} {EP2} --zero-stage 0", r"weight of layers\.1\.attn_norm\.weight in step 1"),
    (planted.experts_at_the_common_rate, 2, f"{PYRAMID} {EP2} --moe-expert-lr-mult 0.3", r"weight of layers\.2\.moe\.experts\.\w+ in step 1"),
    (planted.norms_not_declared_partial, 2, f"{PYRAMID} {TP2} --sequence-parallel", r"gradient of norm\.bias in step 1"),
    (planted.pipeline_divides_by_its_microbatches, 2, f"{PYRAMID} --pipeline-model-parallel-size 2", r"gradient of norm\.bias in step 1"),
    (planted.gather_backward_sums, 2, f"{PYRAMID} {TP2} {EP2}", r"gradient of layers\.4\.moe\.experts\.\w+ in step 1 .* 2 times"),
]  # fmt: skip


def verify(flags: str, fault=nullcontext) -> Verdict:
    """On the ranks of this pool, with the fault while the layout trains."""
    run = parse_args(shlex.split(f"{BASE} {flags}")).run
    train_layout = ranks.train_layout

    def faulty(*args):
        with fault():
            return train_layout(*args)

    small = shrink(run, dist.get_world_size())
    with mock.patch.object(ranks, "train_layout", faulty):
        return ranks.verify_on_ranks(small, build_parallel_mesh(small.run, "cpu"), torch.device("cpu"))


@pytest.mark.parametrize(("world", "flags"), HONEST, ids=lambda v: str(v).replace("--", "").replace(" ", "_")[:100])
def test_a_right_layout_passes(world, flags):
    for verdict in run_distributed(verify, world, flags, timeout=280):
        assert verdict.is_equal, "\n".join(report(verdict))
        assert {row.quantity for row in verdict.rows} >= {"loss", "routing", "gradient norm", "gradient", "weight"}


@pytest.mark.parametrize(("fault", "world", "flags", "named"), FAULTS, ids=[row[0].__name__ for row in FAULTS])
def test_a_wrong_layout_is_refused_and_the_first_wrong_thing_is_named(fault, world, flags, named):
    verdicts = run_distributed(verify, world, flags, fault, timeout=280)
    assert not any(v.is_equal for v in verdicts), "no rank may go on to train"
    assert re.match(named, str(verdicts[0].first)), "\n".join(report(verdicts[0]))
    assert ranks.conclusion(verdicts[0]).startswith("MISMATCH: ")


def test_a_replica_that_no_gradient_shows_is_named_with_its_rank():
    verdict = run_distributed(verify, 2, f"{PYRAMID} {TP2} {EP2}", norms_of_one_rank_in_wrong_memory)[0]
    assert not verdict.is_equal
    assert "layers.1.attn_norm.weight" in [d.name for d in verdict.drifts]
    assert "ranks 0 and 1" in str(verdict.drifts[0])
