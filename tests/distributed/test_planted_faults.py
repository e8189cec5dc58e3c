"""Negative controls: with one ingredient left out, a parity test must turn red. A check that cannot fail proves nothing.

Each fault is planted in the workers of one row of `test_parallel_equals_single.LAYOUTS`, and the test of that row is called: it must
fail. The table also names the quantity that sees the fault, and by how much at least, so that no fault is found by luck.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distributed import attention_layouts, multi_token_layouts, parity
from distributed import test_parallel_equals_single as rows
from megatron_moe.data.batch import look_ahead
from megatron_moe.moe.layer import moe_layers

pytestmark = pytest.mark.distributed

# ---------------------------------------------------------------- gradients that are not summed, or summed too often


@contextmanager
def fsdp_averages():
    """FSDP's own division: dense gradients world times too small, experts by another factor."""
    with mock.patch.object(FSDPModule, "set_gradient_divide_factor"), mock.patch.object(FSDPModule, "set_force_sum_reduction_for_comms"):
        yield


@contextmanager
def forced_sum_dropped():
    """FSDP then multiplies while it sums, which gloo refuses."""
    with mock.patch.object(FSDPModule, "set_force_sum_reduction_for_comms"):
        yield


@contextmanager
def expert_gradients_divided_by_ep():
    """The factor of frameworks that average over all data ranks, where nothing was averaged."""
    from megatron_moe.moe.experts import Experts

    original = FSDPModule.set_gradient_divide_factor

    def set_factor(self, factor):
        original(self, 2 * factor if isinstance(self, Experts) else factor)

    with mock.patch.object(FSDPModule, "set_gradient_divide_factor", set_factor):
        yield


@contextmanager
def gate_not_declared_partial():
    """`to_local()` as it comes: gradients of the tensor-parallel ranks, each of its own tokens, pass for one and the same."""

    def plain(weight):
        return weight.to_local() if isinstance(weight, DTensor) else weight

    with mock.patch("megatron_moe.moe.gate.local_weight", plain):
        yield


@contextmanager
def latent_projection_not_declared_partial():
    """The same for the projections around latent experts."""

    def plain(weight):
        return weight.to_local() if isinstance(weight, DTensor) else weight

    with mock.patch("megatron_moe.moe.latent.local_weight", plain):
        yield


@contextmanager
def router_gradient_not_summed_over_tp():
    """The gate stays a plain parameter, which each tensor-parallel rank trains on its own tokens."""
    with mock.patch("megatron_moe.parallel.tensor.replicate_parameter"):
        yield


@contextmanager
def norms_not_declared_partial():
    """Under sequence parallelism every rank trains norms, coefficients and positions on its own run of the tokens."""

    def plain(weight):
        return weight.to_local() if isinstance(weight, DTensor) else weight

    with mock.patch("megatron_moe.parallel.replicated.local_weight", plain):
        yield


@contextmanager
def mean_squares_of_own_heads():
    """A norm over all heads that looks at those of its rank, as if they were all."""
    from megatron_moe.parallel import heads

    ranks = dist.get_world_size()
    with mock.patch.object(heads._Sum, "apply", lambda x, group: x * ranks):
        yield


@contextmanager
def mean_squares_whose_gradient_is_not_summed():
    from megatron_moe.parallel import heads

    with mock.patch.object(heads._Sum, "backward", staticmethod(lambda ctx, grad: (grad.clone(), None))):
        yield


@contextmanager
def windows_seen_by_the_first_chunk_alone():
    from megatron_moe.parallel import context

    right = context.visible
    with mock.patch.object(context, "visible", lambda c, first, queries, window: right(c, first, queries, None if first else window)):
        yield


@contextmanager
def sinks_of_the_first_heads():
    """Every rank takes the logits that belong to the heads of the first one."""

    def first(sinks):
        return sinks.full_tensor()[: sinks.to_local().shape[0]] if isinstance(sinks, DTensor) else sinks

    with mock.patch("megatron_moe.model.attention.local_weight", first):
        yield


@contextmanager
def narrow_vectors_learn_from_own_heads():
    """The gradient of what all heads come out of, declared whole where it is a part of a sum."""

    def plain(weight):
        return weight.to_local() if isinstance(weight, DTensor) else weight

    with mock.patch("megatron_moe.parallel.heads.local_weight", plain):
        yield


@contextmanager
def shared_heads_of_one_rank():
    """The key/value heads that several ranks share learn from the queries of one of them."""

    def plain(weight):
        return weight.to_local() if isinstance(weight, DTensor) else weight

    with mock.patch("megatron_moe.parallel.heads.local_weight", plain):
        yield


@contextmanager
def key_gradients_of_own_queries():
    """The gradients of the gathered keys and values are cut, and not summed over the context-parallel ranks."""

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group, ctx.rows = group, x.shape[0]
            out = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
            dist.all_gather(out, x.contiguous(), group=group)
            return torch.cat(out)

        @staticmethod
        def backward(ctx, grad):
            first = dist.get_rank(ctx.group) * ctx.rows
            return grad[first : first + ctx.rows], None

    with mock.patch("megatron_moe.parallel.context.all_gather_rows", Gather.apply):
        yield


@contextmanager
def gradients_of_one_copy_of_a_head():
    """Of keys that several queries share, the copy of the first one."""
    from megatron_moe.parallel import ring

    def first(kernel, *, query, key, value, **rest):
        heads = query.shape[1]
        grad_q, *grads = kernel(query=query, key=ring.repeat_heads(key, heads), value=ring.repeat_heads(value, heads), **rest)
        return grad_q, *(g.unflatten(1, (key.shape[1], -1))[:, :, 0] for g in grads)

    with mock.patch.object(ring, "_of_repeated_heads", first):
        yield


@contextmanager
def log_sums_of_one_block():
    """The backward's probabilities are those among the rank's own keys."""
    from megatron_moe.parallel import ring

    original = ring.ring_attention

    def own(group, kernel, q, k, v):
        out, _, *rest = original(group, kernel, q, k, v)
        return out, kernel(q, k, v, is_causal=True)[1], *rest

    with mock.patch.object(ring, "ring_attention", own):
        yield


@contextmanager
def replicas_not_summed():
    """Hybrid sharding whose parts never hear of each other."""
    from megatron_moe.mpu import mesh

    with mock.patch.object(mesh, "_of_fsdp", lambda of, axis, zero_stage: of[f"{axis}_shard"]):
        yield


@contextmanager
def gather_backward_sums():
    """The gradient of the gathered tokens reduce-scattered instead of sliced: TP times too large."""
    from megatron_moe.parallel import tensor

    def backward(ctx, grad):
        return grad[tensor._bounds(ctx.tokens, ctx.group)] * dist.get_world_size(ctx.group), None, None

    with mock.patch.object(tensor._Gather, "backward", staticmethod(backward)):
        yield


@contextmanager
def only_the_last_microbatch_counts():
    """What the microbatches before have accumulated is thrown away."""
    from megatron_moe.training import step

    original = step.sync_gradients

    def sync(model, zero_stage, is_last_microbatch):
        for p in model.parameters():
            p.grad = None
        original(model, zero_stage, is_last_microbatch)

    with mock.patch.object(step, "sync_gradients", sync):
        yield


@contextmanager
def one_gradient_is_nan():
    """NaN compares false with everything, so it must be looked for."""
    original = parity.forward_backward

    def forward_backward(model, *args):
        loss = original(model, *args)
        if dist.get_rank() == 1:
            next(model.parameters()).grad.to_local().fill_(float("nan"))
        return loss

    with mock.patch.object(parity, "forward_backward", forward_backward):
        yield


# ---------------------------------------------------------------- losses and their weights


@contextmanager
def auxiliary_loss_counted_twice():
    """Attached in two places of the graph."""
    from megatron_moe.moe import layer

    class Twice:
        once = layer.AttachLoss

        @classmethod
        def apply(cls, carrier, extra):
            return cls.once.apply(cls.once.apply(carrier, extra), extra)

    with mock.patch.object(layer, "AttachLoss", Twice):
        yield


@contextmanager
def auxiliary_loss_of_each_rank():
    """Weighted by the tokens of one data rank instead of those of the global batch."""
    from megatron_moe.mpu.mesh import ParallelMesh

    original = parity.forward_backward

    def forward_backward(*args):
        with mock.patch.object(ParallelMesh, "size", return_value=1):
            return original(*args)

    with mock.patch.object(parity, "forward_backward", forward_backward):
        yield


@contextmanager
def counts_not_shared():
    """The balance loss of each tensor-parallel slice instead of the microbatch's."""
    with mock.patch("megatron_moe.parallel.apply.share_counts"):
        yield


@contextmanager
def batch_counts_not_summed():
    """The global-batch loss of each data rank's own tokens."""
    from megatron_moe.parallel.expert import GroupReducer

    with mock.patch.object(GroupReducer, "over_batch", GroupReducer.over_microbatch):
        yield


@contextmanager
def batch_counts_of_this_microbatch_alone():
    """The micro-batches of the step before are forgotten."""
    from megatron_moe.moe.layer import MoELayer

    original = MoELayer.decide

    def decide(self, *args):
        return original(self, *args[:-1], args[-1] * 0)

    with mock.patch.object(MoELayer, "decide", decide):
        yield


@contextmanager
def batch_counts_kept_from_step_to_step():
    from megatron_moe.moe.layer import MoELayer

    original = MoELayer.begin_step

    def begin_step(self, loss_weight):
        kept = self.batch_counts_E
        original(self, loss_weight)
        self.batch_counts_E = kept

    with mock.patch.object(MoELayer, "begin_step", begin_step):
        yield


@contextmanager
def sequences_counted_from_each_slice():
    """A tensor-parallel rank takes its first token for the first of the micro-batch."""
    from megatron_moe.moe.tokens import TokenInfo

    original = TokenInfo.of
    with mock.patch.object(TokenInfo, "of", lambda self, *args: dataclasses.replace(original(self, *args), places_T=None)):
        yield


@contextmanager
def warmup_applied_twice():
    from megatron_moe.moe.layer import MoELayer

    original = MoELayer.begin_step

    def begin_step(self, loss_weight):
        original(self, loss_weight * min(loss_weight * parity.SEQUENCES * parity.LENGTH, 1.0))

    with mock.patch.object(MoELayer, "begin_step", begin_step):
        yield


@contextmanager
def token_count_not_summed():
    """Each rank divides by its own unmasked tokens: a mean of means."""

    def count(microbatches, mesh):
        return sum(b.loss_mask.sum(dtype=torch.float64) for b in microbatches) * mesh.size("dp")

    with mock.patch.object(parity, "count_loss_tokens", count):
        yield


# ---------------------------------------------------------------- what travels, what is replayed, what is the same


@contextmanager
def queries_taken_for_the_first():
    """The mask of a chunk that begins somewhere in the sequence as if it began at its start."""
    from megatron_moe.parallel import context

    original = context.visible
    with mock.patch.object(context, "visible", lambda *args: original(*args).tril()):
        yield


@contextmanager
def keys_of_the_first_run():
    """Under sequence parallelism every rank draws what the first one draws."""
    from megatron_moe.parallel.sequence import RunOfTokens

    original = RunOfTokens.__call__

    def call(self, context):
        self.rank = 0
        return original(self, context)

    with mock.patch.object(RunOfTokens, "__call__", call):
        yield


@contextmanager
def chunks_that_are_neighbours():
    """Places as if a context-parallel rank had one run of the sequence instead of two chunks."""
    from megatron_moe.parallel.context import ZigzagPlaces

    original = ZigzagPlaces.__init__

    def init(self, group):
        original(self, group)
        self.chunks = 2 * dist.get_rank(group), 2 * dist.get_rank(group) + 1

    with mock.patch.object(ZigzagPlaces, "__init__", init):
        yield


@contextmanager
def tokens_counted_as_if_all_were_here():
    """Each context-parallel rank takes its tokens for the first ones of the micro-batch."""
    from megatron_moe.model.core import Context

    original = Context.token_info

    def token_info(self, batch, length, most_tokens):
        return dataclasses.replace(original(self, batch, length, most_tokens), places_T=None)

    with mock.patch.object(Context, "token_info", token_info):
        yield


@contextmanager
def gate_weight_lost_on_the_way():
    """Rows arrive with the weights of other rows."""
    from megatron_moe.moe.dispatch import AllToAllDispatcher

    original = AllToAllDispatcher.arrive

    def arrive(self, *args):
        rows, weights = original(self, *args)
        return rows, weights.flip(0)

    with mock.patch.object(AllToAllDispatcher, "arrive", arrive):
        yield


@contextmanager
def padded_rows_by_rank():
    """Rows from several ranks stay as they came, and half of an expert's rows go to another one."""
    from megatron_moe.moe.dispatch import PaddedDispatcher

    with mock.patch.object(PaddedDispatcher, "_to_experts", lambda self, rows, plan: self._exchange(rows)):
        yield


@contextmanager
def modules_drawn_by_local_number():
    """Every rank begins to count its experts at zero."""
    from megatron_moe.moe.module_experts import ModuleExperts

    original = ModuleExperts.draw
    with mock.patch.object(ModuleExperts, "draw", lambda self, name, seed, expert: original(self, name, seed, expert % 2)):
        yield


@contextmanager
def modules_without_gate_weight():
    """What comes out of them is added as it is."""
    from megatron_moe.moe.module_experts import ModuleExperts

    original = ModuleExperts.forward

    def forward(self, x, offsets, weights, *rest):
        return original(self, x, offsets, torch.ones_like(weights), *rest)

    with mock.patch.object(ModuleExperts, "forward", forward):
        yield


@contextmanager
def replay_draws_anew():
    """Recomputation draws other numbers than the forward did, as with a generator whose state nobody puts back."""
    from megatron_moe.utils import random

    original, drawn = random.uniform, set()

    def uniform(keys, stream_id, features, first_feature=0):
        draw = (stream_id, first_feature, hash(tuple(keys.flatten().tolist())))
        is_replay = draw in drawn
        drawn.add(draw)
        return original(keys + 1 if is_replay else keys, stream_id, features, first_feature)

    with mock.patch.object(random, "uniform", uniform):
        yield


@contextmanager
def routing_recomputed():
    """The whole MoE layer is recomputed: it routes, and counts, a second time."""
    from megatron_moe.moe.layer import MoELayer
    from megatron_moe.parallel.recompute import recomputed

    original = MoELayer.forward

    def forward(self, *args):
        return recomputed(functools.partial(original, self), *args)

    with mock.patch.object(MoELayer, "forward", forward):
        yield


@contextmanager
def replicas_start_apart():
    """Ranks that hold the same parameters draw them from different seeds."""
    from megatron_moe.model import init

    original = init.named_generator
    with mock.patch.object(init, "named_generator", lambda seed, name: original(seed + dist.get_rank(), name)):
        yield


# ---------------------------------------------------------------- experts that are cut, and ways that have several legs


@contextmanager
def expert_gradients_multiplied_by_etp():
    """Parts are summed by an all-reduce whose backward sums once more."""
    from megatron_moe.moe.dispatch.slices import Slices

    original = Slices.sum

    def summed(self, *args):
        y = original(self, *args)
        return y * self.size - y.detach() * (self.size - 1)

    with mock.patch.object(Slices, "sum", summed):
        yield


@contextmanager
def output_bias_of_every_slice():
    """Each slice adds the whole bias."""
    from megatron_moe.moe.experts import Experts

    with mock.patch.object(Experts, "cut_into"):
        yield


@contextmanager
def parts_of_results_not_summed():
    """What the slice here has computed passes for the result."""
    from megatron_moe.moe.dispatch.slices import Slices

    def own_part(self, rows, rows_S=None):
        sizes = [len(rows) // self.size] * self.size if rows_S is None else rows_S
        return rows.split(sizes)[self.rank]

    with mock.patch.object(Slices, "sum", own_part):
        yield


@contextmanager
def capacity_of_one_slice():
    """The gathered tokens of one slice bound the room for those of all."""
    from megatron_moe.moe.dispatch import allgather

    original = allgather.most_rows
    with mock.patch.object(allgather, "most_rows", lambda rows, *rest: original(rows, *rest) // 2):
        yield


@contextmanager
def results_of_a_node_not_summed():
    """Of a token's experts on a node only the last one's result goes back."""
    from megatron_moe.moe.dispatch import hierarchical

    def last_one(rows, row_of, number):
        return rows.new_zeros(number, rows.shape[1]).index_copy(0, row_of, rows)

    with mock.patch.object(hierarchical, "sum_rows", last_one):
        yield


@contextmanager
def parts_in_another_order():
    """The last part of the tokens travels by the plan of the first."""
    from megatron_moe.moe.dispatch.overlap import OverlappedDispatcher

    original = OverlappedDispatcher.plan

    def plan(self, *args):
        made = original(self, *args)
        return dataclasses.replace(made, parts=made.parts[::-1])

    with mock.patch.object(OverlappedDispatcher, "plan", plan):
        yield


@contextmanager
def each_part_is_a_forward_of_its_own():
    """FSDP ends the experts' backward behind the first part that it sees, and what comes after is lost or too late."""
    from megatron_moe.moe.dispatch.overlap import OverlappedDispatcher

    def through(self, experts, x, ids, weights, plan):
        return self._pipeline(weights, plan, lambda *args: experts(*args) * 1.0, x)

    with mock.patch.object(OverlappedDispatcher, "through", through):
        yield


# ---------------------------------------------------------------- what routing policies must know


@contextmanager
def bias_moved_by_the_counts_of_one_rank():
    """Each rank balances its own tokens: the biases, and soon the choices, drift apart."""
    from megatron_moe.training import step

    def move(model, mesh, found_inf=None):
        for moe in moe_layers(model):
            if moe.gate.expert_bias is not None:
                moe.gate.move_bias(moe.stats.counts_E, moe.config.moe_router_bias_update_rate)

    with mock.patch.object(step, "move_expert_biases", move), mock.patch.object(parity, "move_expert_biases", move):
        yield


@contextmanager
def words_of_the_first_slice():
    """Tensor-parallel ranks slice the tokens, and look their words up where the slice of rank 0 is."""
    from megatron_moe.moe.tokens import TokenInfo

    original = TokenInfo.of

    def of(self, part, *rest):
        ids_T = self.ids_T[: part.stop - part.start]
        return dataclasses.replace(original(self, part, *rest), ids_T=ids_T)

    with mock.patch.object(TokenInfo, "of", of):
        yield


@contextmanager
def experts_choose_up_to_twice_their_capacity():
    """More rows than the dispatchers have room for."""
    from megatron_moe.moe.policies import ExpertChoice

    original = ExpertChoice.__call__

    def choose(self, logits_TE, tokens, bias_E, capacity, training):
        return original(self, logits_TE, tokens, bias_E, capacity * 2, training)

    with mock.patch.object(ExpertChoice, "__call__", choose):
        yield


# ---------------------------------------------------------------- norm and optimizer


@contextmanager
def norm_counts_replicas():
    """Each rank's squares added up without regard to who holds the same element."""
    original = parity.gradient_norm
    with mock.patch.object(parity, "gradient_norm", lambda parameters, ranks: original(parameters, 1)):
        yield


@contextmanager
def norm_without_experts():
    """One of the meshes is left out."""
    original = parity.gradient_norm
    with mock.patch.object(parity, "gradient_norm", lambda parameters, ranks: original((p for p in parameters if p.ndim < 3), ranks)):
        yield


@contextmanager
def optimizer_of_the_parameters_before_sharding():
    """FSDP replaces parameters: an optimizer that was built before trains the ones that nobody uses any more."""

    def build(model, config):
        return torch.optim.AdamW([p.detach().clone().requires_grad_() for p in model.parameters()], lr=config.lr)

    with mock.patch.object(parity, "build_optimizer", build):
        yield


@contextmanager
def experts_at_the_common_rate():
    """Their group is made, and nothing is in it."""
    with mock.patch("megatron_moe.optimizer.groups.is_expert", return_value=False):
        yield


@contextmanager
def decay_of_the_experts_not_renewed():
    """The schedule sets one decay for all groups."""

    def set_rates(optimizer, rate, decay):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate * group["lr_mult"], decay * (group["wd_mult"] > 0)

    with mock.patch("megatron_moe.training.step.set_rates", set_rates):
        yield


# ---------------------------------------------------------------- distillation


@contextmanager
def softmax_of_the_local_vocabulary():
    """Each tensor-parallel rank normalises its own columns."""
    from megatron_moe.parallel.tensor import VocabularyRanks

    with mock.patch.object(VocabularyRanks, "maximum"), mock.patch.object(VocabularyRanks, "sum"):
        yield


@contextmanager
def divergence_of_masked_tokens():
    """The loss mask is for the language-model loss alone."""
    from megatron_moe.training.distillation import Distillation

    original = Distillation.objective

    def objective(self, student, batch, keys, divisor):
        unmasked = batch._replace(loss_mask=torch.ones_like(batch.loss_mask))
        both, lm = original(self, student, batch, keys, divisor)
        more, lm_more = original(self, student, unmasked, keys, divisor)
        return self.alpha * lm + more - self.alpha * lm_more, lm

    with mock.patch.object(Distillation, "objective", objective):
        yield


@contextmanager
def temperature_not_squared():
    """The gradient of the distance shrinks with the temperature."""
    from megatron_moe.training.distillation import Distillation

    original = Distillation.__init__

    def init(self, config, teacher):
        original(self, config, teacher)
        self.beta /= self.temperature**2

    with mock.patch.object(Distillation, "__init__", init):
        yield


@contextmanager
def padding_has_a_probability():
    """The columns of tokens that do not exist take part in the softmax of both models."""
    from megatron_moe.parallel.tensor import VocabParallelDivergences

    original = VocabParallelDivergences.__call__

    def call(self, student, teacher, vocab_size, temperature):
        return original(self, student, teacher, 1 << 30, temperature)

    with mock.patch.object(VocabParallelDivergences, "__call__", call):
        yield


# ---------------------------------------------------------------- memory and optimizers


@contextmanager
def muon_of_shards():
    """Every rank orthogonalises the rows that it has."""
    with mock.patch("megatron_moe.optimizer.muon.cuts_of", return_value=[]):
        yield


@contextmanager
def muon_of_a_stack_as_one_matrix():
    """Experts side by side are no matrix of anything."""
    from megatron_moe.optimizer import muon

    original = muon.newton_schulz

    def as_one(x_kRC, steps):
        one_RkC = original(x_kRC.transpose(0, 1).flatten(1)[None], steps)[0]
        return one_RkC.view(x_kRC.shape[1], x_kRC.shape[0], x_kRC.shape[2]).transpose(0, 1)

    with mock.patch.object(muon, "newton_schulz", as_one):
        yield


@contextmanager
def last_chunk_of_the_vocabulary_dropped():
    from megatron_moe.kernels import linear_cross_entropy as kernel

    original = kernel._chunks
    with mock.patch.object(kernel, "_chunks", lambda *args: iter([*original(*args)][:-1])):
        yield


@contextmanager
def gradient_of_the_last_hidden_states_from_own_columns():
    """Declared replicated: no rank adds what the columns of the others say."""
    from torch.distributed.tensor import Replicate

    with mock.patch("megatron_moe.parallel.tensor.Partial", Replicate):
        yield


# ---------------------------------------------------------------- pipeline


@contextmanager
def pipeline_divides_by_its_microbatches():
    """torch's default."""
    from torch.distributed.pipelining import schedules

    for_all = mock.patch.object(
        schedules._PipelineSchedule, "scale_grads", property(lambda self: True, lambda self, value: None), create=True
    )
    with for_all:
        yield


@contextmanager
def tied_gradients_stay_apart():
    """First and last stage each move the matrix by what they alone know."""
    from megatron_moe.parallel.pipeline import PipelinedGPT

    with mock.patch.object(PipelinedGPT, "_add_tied_gradients"):
        yield


@contextmanager
def norm_counts_tied_weights_twice():
    """Both stages have the gradient, and both add its squares."""
    from megatron_moe.parallel.pipeline import PipelinedGPT

    with mock.patch.object(PipelinedGPT, "counted_parameters", lambda self: self.parameters()):
        yield


def before_a_pipeline_runs(change):
    """`change(model, keys)` gives the keys that its micro-batches get."""
    from megatron_moe.parallel.pipeline import PipelinedGPT

    original = PipelinedGPT.forward_backward
    run = lambda self, batches, keys, *rest: original(self, batches, change(self, keys), *rest)  # noqa: E731
    return mock.patch.object(PipelinedGPT, "forward_backward", run)


@contextmanager
def auxiliary_losses_on_the_last_stage_alone():
    """Where the loss is."""

    def change(model, keys):
        for moe in moe_layers(model):
            moe.loss_weight *= model.has_last
        return keys

    with before_a_pipeline_runs(change):
        yield


@contextmanager
def keys_of_the_next_microbatch():
    """Stages behind the first draw from the samples that are still to come."""
    with before_a_pipeline_runs(lambda model, keys: keys if model.has_first else [*keys[1:], keys[0]]):
        yield


@contextmanager
def shapes_found_out_by_running():
    """torch runs the model on memory that nobody has written, to see what comes out."""
    from torch.distributed import pipelining

    original = pipelining.PipelineStage
    with mock.patch.object(pipelining, "PipelineStage", lambda *args, input_args, output_args, **rest: original(*args, **rest)):
        yield


# ---------------------------------------------------------------- the table

EP2, TP2 = "--moe-expert-parallel-size 2", "--tensor-model-parallel-size 2"
EP4_RECOMPUTED = "--zero-stage 3 --moe-expert-parallel-size 4 --recompute-granularity full"
LATENT = "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full"
LOSSES_EP2 = f"--zero-stage 2 {EP2}"
LOSSES_TP4 = "--zero-stage 1 --tensor-model-parallel-size 4 --moe-expert-parallel-size 4"
NOISY = "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4 --recompute-granularity full"
CUT = [  # by an all-gather, by an all-to-all, padded, with a capacity
    ("pyramid", 2, f"--zero-stage 3 {rows.ETP2}"),
    ("pyramid", 4, f"--zero-stage 3 {EP2} {rows.ETP2} {rows.ALLTOALL}"),
    ("dropping", 2, f"--zero-stage 1 {rows.ETP2} {rows.PADDED}"),
    ("dropping", 4, f"--zero-stage 2 {EP2} {rows.ETP2} {rows.ALLGATHER}"),
]
SP2 = ("pyramid", 2, f"--zero-stage 1 {TP2} --sequence-parallel {parity.DIVISIBLE}")
CP2 = ("pyramid", 2, f"--zero-stage 2 --context-parallel-size 2 {parity.DIVISIBLE}")
LOSSES_CP2 = ("losses", 4, f"--zero-stage 2 --context-parallel-size 2 {EP2} {parity.DIVISIBLE}")
NOISY_SP = ("noisy", 4, f"--zero-stage 3 {TP2} --sequence-parallel {EP2} --recompute-granularity selective {parity.DIVISIBLE}")
RING = ("ring", 2, f"--zero-stage 1 --context-parallel-size 2 --cp-comm-type p2p {parity.DIVISIBLE}")
BALANCED_CP2 = ("balanced", 2, f"--zero-stage 1 --context-parallel-size 2 {EP2} {parity.DIVISIBLE}")
HYBRID = ("pyramid", 4, "--zero-stage 1 --num-distributed-optimizer-instances 2")

# ---------------------------------------------------------------- multi-token prediction


@contextmanager
def borders_of_documents_do_not_count():
    def without_documents(batch, depths):
        return look_ahead(batch._replace(segment_ids=None, position_ids=places(batch)), depths)._replace(
            segment_ids=batch.segment_ids, position_ids=batch.position_ids
        )

    def places(batch):
        return torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)

    with mock.patch.object(parity, "look_ahead", without_documents), mock.patch("megatron_moe.training.step.look_ahead", without_documents):
        yield


@contextmanager
def one_divisor_for_all_predictions():
    """That of the next token, of which there are more."""
    count = parity.count_loss_tokens

    def of_the_next(batches, mesh):
        counts = count(batches, mesh)
        return counts[:1].expand_as(counts)

    with mock.patch.object(parity, "count_loss_tokens", of_the_next):
        yield


@contextmanager
def tokens_ahead_from_a_part_of_a_sequence():
    """Labels that are shifted behind the cut: at its edges the tokens of other ranks are missing."""
    from megatron_moe.training import step

    part_of = step.part_of

    def shifted_later(batch, keys, mesh):
        cut, keys = part_of(batch._replace(labels=batch.labels[:, 0], loss_mask=batch.loss_mask[:, 0]), keys, mesh)
        return look_ahead(cut, batch.labels.shape[1] - 1), keys

    with mock.patch.object(step, "part_of", shifted_later):
        yield


@contextmanager
def modules_draw_as_the_last_layer():
    """Dropout and noise of the blocks of multi-token prediction under the number of the model's last layer."""
    from megatron_moe.model.gpt import GPT

    original = GPT.losses_ahead

    def losses_ahead(self, *args):
        for module in self.mtp.values():
            module.block.layer = self.config.num_layers
        return original(self, *args)

    with mock.patch.object(GPT, "losses_ahead", losses_ahead):
        yield


AHEAD_SP2, AHEAD_PP2, AHEAD_CP2 = (multi_token_layouts.LAYOUTS[i] for i in (0, 8, 7))
PLANTED = [  # fault, the row that turns red, the quantity that sees it, its error at least
    (fsdp_averages, ("pyramid", 2, f"--zero-stage 1 {EP2}"), "gradient layers.1.mlp.fc1.weight", 0.4),
    (expert_gradients_divided_by_ep, ("pyramid", 4, f"--zero-stage 3 {EP2}"), "gradient layers.3.moe.experts.w1", 0.4),
    (expert_gradients_divided_by_ep, ("pyramid", 4, f"--zero-stage 0 {EP2}"), "gradient layers.2.moe.experts.b1", 0.4),
    (gate_not_declared_partial, ("pyramid", 2, f"--zero-stage 1 {TP2} {EP2}"), "gradient layers.3.moe.gate.weight", 0.05),
    (router_gradient_not_summed_over_tp, ("pyramid", 2, f"--zero-stage 1 {TP2}"), "gradient layers.2.moe.gate.weight", 0.05),
    (gather_backward_sums, ("pyramid", 2, f"--zero-stage 1 {TP2} {EP2}"), "gradient layers.3.moe.experts.w1", 0.4),
    (only_the_last_microbatch_counts, ("pyramid", 2, "--zero-stage 1"), "gradient layers.1.mlp.fc1.weight", 0.05),
    (one_gradient_is_nan, ("pyramid", 2, "--zero-stage 2"), "gradient embedding.weight", 1e300),
    (auxiliary_loss_counted_twice, ("pyramid", 2, f"--zero-stage 1 {EP2}"), "gradient layers.3.moe.gate.weight", 0.01),
    (auxiliary_loss_of_each_rank, ("pyramid", 2, f"--zero-stage 1 {EP2}"), "gradient layers.3.moe.gate.weight", 0.01),
    (counts_not_shared, ("pyramid", 2, f"--zero-stage 1 {TP2} {EP2}"), "gradient layers.3.moe.gate.weight", 1e-3),
    (batch_counts_not_summed, ("losses", 2, LOSSES_EP2), "gradient layers.3.moe.gate.weight", 1e-3),
    (batch_counts_of_this_microbatch_alone, ("losses", 2, LOSSES_EP2), "gradient layers.3.moe.gate.weight", 1e-3),
    (batch_counts_kept_from_step_to_step, ("losses", 2, LOSSES_EP2), "norm 1", 1e-6),
    (sequences_counted_from_each_slice, ("losses", 4, LOSSES_TP4), "gradient layers.3.moe.gate.weight", 1e-3),
    (counts_not_shared, ("losses", 4, LOSSES_TP4), "gradient layers.3.moe.gate.weight", 1e-3),
    (warmup_applied_twice, ("losses", 2, LOSSES_EP2), "gradient layers.3.moe.gate.weight", 1e-3),
    (
        routing_recomputed,
        ("losses", 4, "--zero-stage 1 --moe-expert-parallel-size 4 --recompute-granularity full"),
        "routing 3 in step 0",
        0.5,
    ),
    (token_count_not_summed, ("pyramid", 2, "--zero-stage 0"), "loss 0", 1e-4),
    (gate_weight_lost_on_the_way, ("pyramid", 2, f"--zero-stage 1 {EP2}"), "loss 0", 1e-6),
    (latent_projection_not_declared_partial, ("latent", 4, LATENT), "gradient layers.3.moe.latent_down.weight", 0.01),
    (latent_projection_not_declared_partial, ("latent", 4, LATENT), "gradient layers.3.moe.latent_up.weight", 0.05),
    (padded_rows_by_rank, ("dropping", 2, f"--zero-stage 1 {EP2} {rows.PADDED}"), "loss 0", 1e-6),
    (modules_drawn_by_local_number, ("modules", 4, f"--zero-stage 1 {EP2} --moe-token-dispatcher allgather"), "loss 0", 1e-6),
    (modules_without_gate_weight, ("modules", 2, f"--zero-stage 0 {TP2}"), "gradient layers.3.moe.experts.stack.scale", 1e-3),
    (expert_gradients_multiplied_by_etp, CUT[0], "gradient layers.3.moe.experts.w1", 0.9),
    (expert_gradients_multiplied_by_etp, CUT[1], "gradient layers.3.moe.experts.w1", 0.9),
    (output_bias_of_every_slice, CUT[1], "gradient layers.3.moe.experts.b2", 0.9),
    (parts_of_results_not_summed, CUT[0], "loss 0", 1e-6),
    (parts_of_results_not_summed, CUT[1], "loss 0", 1e-6),
    (parts_of_results_not_summed, CUT[2], "loss 0", 1e-6),
    (capacity_of_one_slice, CUT[3], "loss 0", 1e-6),
    (results_of_a_node_not_summed, ("modern", 4, f"--zero-stage 2 {rows.TP2} --moe-expert-parallel-size 4 {rows.NODES2}"), "loss 0", 1e-6),
    (parts_in_another_order, ("dropping", 4, "--zero-stage 2 --moe-expert-parallel-size 4 --moe-overlap-chunks 3"), "loss 0", 1e-6),
    (replay_draws_anew, ("noisy", 4, NOISY), "gradient layers.1.mlp.fc1.weight", 0.05),
    (routing_recomputed, ("pyramid", 4, EP4_RECOMPUTED), "routing 3 in step 0", 0.5),
    (replicas_start_apart, ("pyramid", 2, "--zero-stage 0"), "loss 0", 1e-3),
    (bias_moved_by_the_counts_of_one_rank, ("deepseek", 4, EP4_RECOMPUTED), "weight layers.3.moe.gate.expert_bias", 0.05),
    (words_of_the_first_slice, ("hash", 2, f"--zero-stage 1 {TP2} {EP2}"), "loss 0", 1e-6),
    (experts_choose_up_to_twice_their_capacity, ("expert_choice", 2, f"--zero-stage 1 {EP2}"), "routing 2 in step 0", 0.05),
    (norm_counts_replicas, ("pyramid", 2, f"--zero-stage 1 {TP2} {EP2}"), "ones", 0.1),
    (norm_without_experts, ("pyramid", 2, f"--zero-stage 3 {EP2}"), "norm 0", 1e-3),
    (experts_at_the_common_rate, ("rates", 2, f"--zero-stage 0 {EP2}"), "weight layers.3.moe.experts.w1", 0.01),
    (decay_of_the_experts_not_renewed, ("rates", 2, f"--zero-stage 0 {EP2}"), "weight layers.3.moe.experts.w1", 1e-3),
    (softmax_of_the_local_vocabulary, ("student", 2, f"--zero-stage 2 {TP2}"), "divergence 1", 0.01),
    (padding_has_a_probability, ("student", 2, f"--zero-stage 2 {TP2}"), "divergence 1", 1e-4),
    (divergence_of_masked_tokens, ("student", 2, f"--zero-stage 1 {EP2}"), "gradient layers.1.mlp.fc1.weight", 0.01),
    (temperature_not_squared, ("student", 2, f"--zero-stage 1 {EP2}"), "gradient layers.1.mlp.fc1.weight", 1e-3),
    (optimizer_of_the_parameters_before_sharding, ("pyramid", 2, "--zero-stage 3"), "weight layers.1.mlp.fc1.weight", 0.01),
    (muon_of_shards, ("muon", 2, "--zero-stage 3"), "weight layers.1.mlp.fc1.weight", 1e-3),
    (muon_of_shards, ("muon", 4, f"--zero-stage 3 {EP2}"), "weight layers.3.moe.experts.w1", 1e-3),
    (muon_of_a_stack_as_one_matrix, ("muon", 2, f"--zero-stage 0 {EP2}"), "weight layers.3.moe.experts.w1", 1e-3),
    (last_chunk_of_the_vocabulary_dropped, ("pyramid", 2, f"--zero-stage 1 {TP2} --cross-entropy-loss-chunk-size 24"), "loss 0", 1e-3),
    (
        gradient_of_the_last_hidden_states_from_own_columns,
        ("pyramid", 2, f"--zero-stage 1 {TP2} --cross-entropy-loss-chunk-size 24"),
        "gradient layers.1.mlp.fc1.weight",
        0.01,
    ),
    (norms_not_declared_partial, SP2, "gradient layers.1.attn_norm.weight", 0.05),
    (norms_not_declared_partial, SP2, "gradient layers.3.coefficient.weight", 0.05),
    (gate_not_declared_partial, SP2, "gradient layers.3.moe.gate.weight", 0.05),
    (keys_of_the_first_run, NOISY_SP, "loss 0", 1e-4),
    (counts_not_shared, LOSSES_CP2, "gradient layers.3.moe.gate.weight", 1e-3),
    (tokens_counted_as_if_all_were_here, LOSSES_CP2, "gradient layers.3.moe.gate.weight", 1e-3),
    (chunks_that_are_neighbours, BALANCED_CP2, "loss 0", 1e-6),
    (key_gradients_of_own_queries, CP2, "gradient layers.1.attn.k_proj.weight", 0.05),
    (queries_taken_for_the_first, CP2, "loss 0", 1e-6),
    (gradients_of_one_copy_of_a_head, RING, "gradient layers.1.attn.k_proj.weight", 0.05),
    (log_sums_of_one_block, RING, "gradient layers.1.attn.q_proj.weight", 1e-3),
    (
        shared_heads_of_one_rank,
        ("pyramid", 4, "--zero-stage 1 --tensor-model-parallel-size 4"),
        "gradient layers.1.attn.v_proj.weight",
        0.05,
    ),
    (norms_not_declared_partial, attention_layouts.MATRIX[0], "gradient layers.1.attn.q_norm.weight", 0.05),
    (mean_squares_of_own_heads, attention_layouts.QUICK[1], "loss 0", 1e-6),
    (mean_squares_whose_gradient_is_not_summed, attention_layouts.MATRIX[3], "gradient layers.1.attn.k_proj.weight", 1e-3),
    (narrow_vectors_learn_from_own_heads, attention_layouts.QUICK[2], "gradient layers.1.attn.kv_down_proj.weight", 0.05),
    (windows_seen_by_the_first_chunk_alone, attention_layouts.QUICK[4], "loss 0", 1e-6),
    (sinks_of_the_first_heads, attention_layouts.MATRIX[11], "gradient layers.1.attn.sinks", 1e-3),
    (replicas_not_summed, HYBRID, "gradient layers.1.mlp.fc1.weight", 0.1),
    (pipeline_divides_by_its_microbatches, ("pyramid", 2, rows.PP2), "gradient layers.1.mlp.fc1.weight", 0.7),
    (pipeline_divides_by_its_microbatches, ("deep", 2, rows.INTERLEAVED), "gradient layers.4.moe.gate.weight", 0.7),
    (tied_gradients_stay_apart, ("pyramid", 2, rows.PP2), "gradient embedding.weight", 0.01),
    (tied_gradients_stay_apart, ("pyramid", 4, f"--zero-stage 3 {rows.PP2} {EP2}"), "weight embedding.weight", 0.01),
    (norm_counts_tied_weights_twice, ("pyramid", 2, rows.PP2), "norm 0", 1e-3),
    (auxiliary_losses_on_the_last_stage_alone, ("pyramid", 2, rows.PP2), "gradient layers.2.moe.gate.weight", 0.01),
    (keys_of_the_next_microbatch, ("noisy", 4, f"--zero-stage 3 {rows.PP2} {TP2} {EP2} {rows.RECOMPUTE}"), "loss 0", 1e-6),
    (shapes_found_out_by_running, ("pyramid", 2, rows.PP2), "routing 3 in step 0", 0.05),
    (borders_of_documents_do_not_count, AHEAD_PP2, "further losses 0", 1e-3),
    (one_divisor_for_all_predictions, AHEAD_PP2, "further losses 0", 0.01),
    (tied_gradients_stay_apart, AHEAD_PP2, "gradient embedding.weight", 0.01),
    (tokens_ahead_from_a_part_of_a_sequence, AHEAD_CP2, "further losses 0", 1e-3),
    (modules_draw_as_the_last_layer, AHEAD_SP2, "further losses 0", 1e-6),
    (norms_not_declared_partial, AHEAD_SP2, "gradient mtp.1.proj.weight", 0.05),
]


def layout_with(fault, model: str, flags: str):
    with fault():
        return parity.layout(model, flags)


def planted(fault, row, *seen):
    marks = () if row in rows.QUICK else pytest.mark.matrix  # it is known by the row that it turns red
    return pytest.param(fault, row, *seen, marks=marks, id=f"{fault.__name__}-{row[2]}")


@pytest.mark.parametrize(("fault", "row", "seen_in", "at_least"), [planted(*p) for p in PLANTED])
def test_planted_fault_turns_a_parity_test_red(fault, row, seen_in, at_least, monkeypatch):
    assert row in rows.LAYOUTS, "the fault must be planted in a test that runs"
    monkeypatch.setattr(rows, "run_distributed", lambda layout, world, *args: run_distributed(layout_with, world, fault, *args))
    seen, errors = {}, parity.errors
    monkeypatch.setattr(parity, "errors", lambda found, expected: seen.update(errors(found, expected)) or seen)
    with pytest.raises(AssertionError, match="is off by"):
        rows.test_layout_equals_one_process_in_float64(*row)
    assert seen[seen_in] > at_least, f"{seen_in} is only {seen[seen_in]:.1e} off with {fault.__name__}"
    if fault is replay_draws_anew:
        assert seen["loss 0"] < 1e-10, "the forward must be right, or it is not the replay that is wrong"


def refusal(fault, model: str, flags: str) -> str:
    try:
        layout_with(fault, model, flags)
    except RuntimeError as error:
        return str(error)
    return ""


def test_dropped_forced_sum_ends_the_float32_rows():
    """In float64 FSDP sums in any case, so it is the rows in float32 that see this one."""
    model, world, flags = rows.FAST[0]
    assert "PREMUL_SUM" in run_distributed(refusal, world, forced_sum_dropped, model, f"{parity.FP32} {flags}")[0]
