"""The small run that --verify-parallelism trains: what is kept, what is folded, and that there always is one."""

from __future__ import annotations

import math
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_commands import ALL

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError, fields_of
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.presets import PRESETS
from megatron_moe.parallel.expert import choice_of
from megatron_moe.training.verify.shrink import DEGREES, MOST_PROCESSES, NO_DEGREES, fold, lines, shrink

BASE = "--num-layers 16 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --mock-data --train-iters 10"


def run_of(flags: str):
    return parse_args(shlex.split(flags)).run


def test_every_number_of_the_parallel_config_is_known_as_a_degree_or_as_none():
    numbers = {s.name for s in fields_of(ParallelConfig) if s.kind in (int, float)}
    assert numbers == set(DEGREES) | set(NO_DEGREES), "say in training/verify/shrink.py what becomes of a new axis"


def test_sixty_four_ranks_fold_to_two_of_everything():
    run = run_of(f"{BASE} --num-experts 64 --topk 2 --moe-expert-parallel-size 16 --tensor-model-parallel-size 4 --bf16 "
                 "--micro-batch-size 4 --global-batch-size 512 --disable-moe-token-dropping")  # fmt: skip
    (small,) = fold(run, 64)
    assert small.world_size == 4 and small.run.parallel.tensor_model_parallel_size == 2
    assert small.run.moe.moe_expert_parallel_size == 2 and small.run.moe.num_experts == (4,)
    assert {"TP 4 -> 2", "EP 16 -> 2", "data ranks 16 -> 2"} <= set(small.folded)
    assert small.run.training.params_dtype == "float64" and not small.run.training.bf16
    assert small.run.num_microbatches(4) == 2, "a run that accumulates is shown as one that accumulates"
    said = "\n".join(lines(small))
    assert all(word in said for word in ("num-layers 16 -> 2", "hidden-size 1024 -> 32", "bfloat16 -> float64", "auto -> reference"))
    assert small.not_compared == ()


def test_a_pyramid_keeps_two_degrees():
    run = run_of(f"{BASE} --num-experts 8 16 32 64 --moe-expert-parallel-size 64")
    (small,) = fold(run, 64)
    degrees = [small.run.moe.expert_parallel_degree(n) for n in small.run.moe.num_experts]
    experts = small.run.moe.num_experts
    assert degrees == [2, 4, 4, 4] and list(experts) == sorted(set(experts)) and small.world_size == 4
    assert {"EP 8 -> 2", "EP 16 -> 4", "EP 64 -> 4"} <= set(small.folded)


def test_a_pyramid_of_one_degree_keeps_its_shape():
    (small,) = fold(run_of(f"{BASE} --num-experts 16 32 64 16 --moe-expert-parallel-size 8"), 32)
    first, second, third = small.run.moe.num_experts
    assert first < second < third and small.run.expert_degrees() == [2]


def test_degrees_stay_where_the_ranks_are_here():
    run = run_of(f"{BASE} --num-experts 8 32 --topk 4 --moe-expert-parallel-size 16 --tensor-model-parallel-size 8 --num-key-value-heads 8")
    small = shrink(run, 32)
    assert small.world_size == 32 and small.folded == () and small.run.parallel == run.parallel
    assert small.run.expert_degrees() == run.expert_degrees() == [8, 16]
    assert small.run.model.num_attention_heads % 8 == small.run.model.key_value_heads % 8 == 0


@pytest.mark.parametrize("flags", [
    "--mlp-type residual", "--moe-shared-expert-intermediate-size 512 --moe-shared-expert-gate", "--moe-latent-size 256",
    "--zero-stage 3", "--recompute-granularity full", "--optimizer sgd", "--clip-grad 0.3", "--moe-expert-lr-mult 0.3", "--swiglu",
    "--moe-router-enable-expert-bias --moe-router-score-function sigmoid --disable-moe-top2-2nd-expert-sampling", "--hidden-dropout 0.2",
    "--moe-token-dispatcher allgather", "--moe-pad-expert-input-to-capacity", "--moe-seq-loss-coeff 0.1 --moe-global-loss-coeff 0.1",
    "--optimizer muon", "--expert-tensor-parallel-size 2", "--num-distributed-optimizer-instances 2", "--moe-overlap-chunks 4",
    "--cross-entropy-loss-chunk-size 4096", "--moe-layer-recompute", "--context-parallel-size 2",
    "--untie-embeddings-and-output-weights", "--position-embedding-type rope", "--normalization RMSNorm", "--moe-router-policy hash",
    "--qk-layernorm --qk-layernorm-scope hidden", "--add-qkv-bias --disable-bias-linear", "--moe-first-k-dense-replace 3",
    "--window-size 512 --window-attn-skip-freq 4", "--softmax-type learnable", "--position-embedding-type rope --rotary-percent 0.25 --rotary-interleaved",
    "--position-embedding-type rope --rope-scaling-type yarn --rope-scaling-factor 4 --rope-mscale-all-dim 1",
    "--multi-latent-attention --q-lora-rank 256 --position-embedding-type rope --kv-lora-rank 128 --qk-head-dim 64 --qk-pos-emb-head-dim 32 "
    "--v-head-dim 64",
])  # fmt: skip
def test_a_switch_of_the_run_is_a_switch_of_the_small_one(flags):
    """All of them at once would hide one that is lost, so one at a time."""
    run = run_of(f"{BASE} --num-experts 8 --topk 2 --moe-expert-parallel-size 4 {flags}")
    (small,) = fold(run, 8)
    plain = run_of(f"{BASE} --num-experts 8 --topk 2 --moe-expert-parallel-size 4")
    switched = {(g, n) for g, group in run.to_dict().items() for n, v in group.items() if v != plain.to_dict()[g][n]}
    assert switched
    for group, name in switched:
        value, default = getattr(getattr(small.run, group), name), getattr(getattr(fold(plain, 8)[0].run, group), name)
        assert value != default, f"{name} is {value} as if it had not been given"


@pytest.mark.parametrize(("flags", "word"), [
    ("--moe-train-capacity-factor 1.0", "who is dropped"),
    ("--moe-router-policy expert_choice --topk 2", "experts choose"),
    ("--moe-router-policy sinkhorn --disable-moe-token-dropping", "sinkhorn"),
])  # fmt: skip
def test_what_tensor_parallelism_makes_incomparable_is_named(flags, word):
    base = f"{BASE} --num-experts 8 --moe-expert-parallel-size 4"
    (small,) = fold(run_of(f"{base} {flags} --tensor-model-parallel-size 2"), 8)
    assert [n for n in small.not_compared if word in n]
    (small,) = fold(run_of(f"{base} {flags}"), 8)
    assert small.not_compared == (), "without TP a rank routes whole micro-batches, and all can be compared"


def test_all_axes_at_once_are_shown_in_two_layouts():
    flags = "--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 4 --context-parallel-size 2 --global-batch-size 64"
    first, second = fold(run_of(f"{BASE} --num-experts 8 --moe-expert-parallel-size 4 {flags}"), 128)
    assert first.world_size == second.world_size == 8
    assert {first.run.parallel.pipeline_model_parallel_size, second.run.parallel.pipeline_model_parallel_size} == {1, 2}
    assert {first.run.parallel.context_parallel_size, second.run.parallel.context_parallel_size} == {1, 2}
    assert any("PP" in note and "8 processes" in note for note in first.folded)
    assert second.run.training.seq_length % second.run.parallel.sequence_unit == 0


@pytest.mark.parametrize(("flags", "layers", "per_stage"), [
    ("--pipeline-model-parallel-size 4", 4, None),  # a layer with experts on each of the two stages
    ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1", 8, 2),  # four stages on a rank -> two
    ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 1", 4, None),
    ("--pipeline-model-parallel-size 2 --pipeline-schedule zero-bubble", 4, None),
])  # fmt: skip
def test_a_pipeline_keeps_its_schedule(flags, layers, per_stage):
    (small,) = fold(run_of(f"{BASE} --num-experts 8 --moe-expert-parallel-size 2 --micro-batch-size 1 --global-batch-size 64 {flags}"), 16)
    p = small.run.parallel
    assert (p.pipeline_model_parallel_size, small.run.model.num_layers, p.num_layers_per_virtual_pipeline_stage) == (2, layers, per_stage)
    assert small.run.num_microbatches(small.world_size) == 4
    assert p.pipeline_schedule == ("zero-bubble" if "zero" in flags else "auto")


def test_rows_that_travel_in_two_stages_still_do():
    run = run_of(f"{BASE} --num-experts 64 --moe-expert-parallel-size 16 --moe-token-dispatcher hierarchical --moe-node-size 8")
    (small,) = fold(run, 16)
    assert small.run.expert_degrees() == [4] and small.run.node_size(4) == 2 and small.run.moe.moe_token_dispatcher == "hierarchical"


def ways(run, world: int) -> set[str]:
    """How rows travel in the layers of a run."""
    experts = [n for n in run.moe.experts_per_layer(run.model.num_layers) if n > 1]
    return {choice_of(run.moe, n, run.parallel.etp, run.node_size(world)).kind for n in experts}


# what `auto` takes on nodes of so many ranks: two stages where enough rows of a token go to the same node
@pytest.mark.parametrize(("experts", "k", "ranks", "node", "taken"), [
    (64, 8, 32, 8, "hierarchical"), (48, 4, 24, 8, "hierarchical"), (8, 2, 4, 2, "hierarchical"), (16, 3, 8, 4, "hierarchical"),
    (8, 2, 8, 4, "alltoall"), (8, 1, 4, 2, "alltoall"), (16, 4, 4, 2, "allgather"), (64, 8, 32, 3, "alltoall"), (64, 8, 32, 32, "alltoall"),
])  # fmt: skip
def test_what_auto_takes_over_nodes_is_what_is_compared(experts, k, ranks, node, taken, monkeypatch):
    flags = f"{BASE} --num-experts {experts} --topk {k} --moe-expert-parallel-size {ranks} --global-batch-size 96"
    by_flag, by_launcher = run_of(f"{flags} --moe-node-size {node}"), run_of(flags)
    assert ways(by_flag, ranks) == {taken}
    for small in (shrink(by_flag, ranks), *fold(by_flag, ranks), *fold(by_flag, None)):
        assert ways(small.run, small.world_size) == {taken} and small.not_compared == ()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    assert ways(shrink(by_launcher, ranks).run, ranks) == {taken}


def test_windows_and_full_layers_dense_and_sparse_ones_are_all_there():
    flags = "--window-size 512 --window-attn-skip-freq 4 --moe-first-k-dense-replace 5 --expert-interval 1"
    (small,) = fold(run_of(f"{BASE} --num-experts 8 --moe-expert-parallel-size 4 {flags}"), 8)
    model, layers = small.run.model, range(1, small.run.model.num_layers + 1)
    assert {model.window_of(layer) for layer in layers} == {5, None}
    assert [n > 1 for n in small.run.moe.experts_per_layer(model.num_layers)] == [False, *[True] * (model.num_layers - 1)]
    (small,) = fold(
        run_of(f"{BASE} --num-experts 8 --moe-expert-parallel-size 4 --expert-interval 1 --window-size 512 --window-attn-skip-freq 2"), 8
    )
    assert [small.run.model.window_of(layer) for layer in (1, 2)] == [5, None] and small.run.model.num_layers == 2


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_upstream_command_has_a_small_model(name):
    run = parse_args(
        ["--dry-run", *shlex.split(ALL[name].flags)] if isinstance(ALL[name].flags, str) else ["--dry-run", *ALL[name].flags]
    ).run
    for small in fold(run, max(ALL[name].ranks, 64)):
        assert small.world_size <= MOST_PROCESSES


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_small_model(name):
    for world in (None, PRESETS[name].ranks):
        for small in fold(run_of(f"--preset {name}"), world):
            assert small.world_size <= MOST_PROCESSES and not list(small.run.world_problems(small.world_size))


@settings(max_examples=150, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]), dp=st.sampled_from([1, 2, 3, 4, 16]), ep=st.sampled_from([1, 2, 4, 8, 16]),
    experts=st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 6, 48]), min_size=1, max_size=4), k=st.integers(1, 6),
    kv=st.sampled_from([None, 1, 2, 8, 16]), pp=st.sampled_from([1, 1, 2, 4]), cp=st.sampled_from([1, 1, 2]), etp=st.sampled_from([1, 1, 2]), flags=st.lists(st.sampled_from([
        "--moe-pyramid-ep auto", "--swiglu", "--mlp-type residual", "--moe-latent-size 96", "--position-embedding-type rope", "--expert-interval 1",
        "--disable-moe-token-dropping", "--kv-channels 48", "--micro-batch-size 3", "--moe-router-num-groups 2 --moe-router-group-topk 1",
        "--mos --load-teacher here --num-experts-teacher 8 --num-layers-teacher 24", "--moe-router-policy expert_choice", "--sequence-parallel",
        "--num-layers-per-virtual-pipeline-stage 2", "--num-distributed-optimizer-instances 2", "--optimizer muon", "--fp16",
    ]), max_size=4, unique=True),
)  # fmt: skip
def test_whatever_is_valid_has_a_small_model(tp, dp, ep, experts, k, kv, pp, cp, etp, flags):
    words = (
        f"{BASE} --tensor-model-parallel-size {tp} --moe-expert-parallel-size {ep} --num-experts {' '.join(map(str, experts))} --topk {k} "
    )
    words += f"--pipeline-model-parallel-size {pp} --context-parallel-size {cp} --expert-tensor-parallel-size {etp} --global-batch-size {192 * dp} "
    words += ("" if kv is None else f"--num-key-value-heads {kv} ") + " ".join(flags)
    world = tp * dp * pp * cp
    try:
        run = run_of(words)
    except ConfigError:
        return
    if list(run.world_problems(world)):
        return
    here = shrink(run, world)
    assert here.run.expert_degrees() == run.expert_degrees() and not list(here.run.world_problems(world))
    for ranks in (world, None):
        for small in fold(run, ranks):
            assert small.world_size <= MOST_PROCESSES and not list(small.run.world_problems(small.world_size))
            degrees = [d for d in small.run.expert_degrees() if d > 1]
            assert set(degrees) <= {2, 4} and len(degrees) == min(len([d for d in run.expert_degrees() if d > 1]), 2)
            assert math.gcd(small.run.model.hidden_size, 2) == 2
