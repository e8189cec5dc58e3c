"""Experts that stay on the disk compute what experts in memory compute, in the room that they are given."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from live_bytes import LiveBytes
from small_models import ROPE_GQA_SWIGLU, all_logits, random_tokens, small_run
from test_inference_loading import prepared, save_small_model

from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.rows import RowReader
from megatron_moe.checkpoint.state import model_state
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate
from megatron_moe.inference.layout import Layout
from megatron_moe.inference.load import load_for_inference
from megatron_moe.inference.offload import ExpertCache
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.checkpoints import Progress, describe

GREEDY = SamplingConfig(greedy=True)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [49, 0, 12]]
SHARED = {
    "mlp_type": "standard", "moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True, "moe_latent_size": 10,
    "moe_ffn_hidden_size": 20, "activation_func": "relu",
}  # fmt: skip


def expert_bytes(model) -> int:
    """Of one; all are of a size here."""
    (size,) = {sum(p[0].nbytes for p in moe.experts.parameters()) for moe in moe_layers(model)}
    return size


@pytest.mark.parametrize("kind", [{}, ROPE_GQA_SWIGLU | {"add_bias_linear": True}, SHARED])
def test_a_quarter_of_the_experts_in_memory_gives_the_same_tokens(tmp_path, kind):
    """Pyramid, residual and shared experts, biases, SwiGLU, latent."""
    save_small_model(tmp_path, **kind)
    whole = load_for_inference(tmp_path).model
    one, total = expert_bytes(whole), sum(moe.num_experts for moe in moe_layers(whole))
    assert total == 12
    loaded = load_for_inference(tmp_path, expert_cache_bytes=total // 4 * one)
    assert not any("experts" in name for name, _ in loaded.model.named_parameters())
    tokens = random_tokens(2, 16)
    torch.testing.assert_close(all_logits(loaded.model, tokens), all_logits(whole, tokens), rtol=1e-10, atol=1e-10)
    assert generate(loaded.model, PROMPTS, 12, GREEDY) == generate(whole, PROMPTS, 12, GREEDY)
    cache = loaded.expert_cache
    assert cache.peak == cache.limit == 3 * one
    assert cache.total == 12 * one
    assert cache.hits > 0
    assert cache.bytes_read == cache.misses * one
    assert f"{cache.hits} in memory" in cache.report()


def test_room_for_one_expert_is_enough_and_for_less_is_refused_with_the_least(tmp_path):
    save_small_model(tmp_path)
    whole = load_for_inference(tmp_path).model
    one = expert_bytes(whole)
    loaded = load_for_inference(tmp_path, expert_cache_bytes=one)
    assert generate(loaded.model, PROMPTS, 5, GREEDY) == generate(whole, PROMPTS, 5, GREEDY)
    assert loaded.expert_cache.peak == one
    with pytest.raises(ValueError, match=rf"\({one - 1} bytes\) has no room for one expert, .* {one} bytes; give at least 0\.0000"):
        load_for_inference(tmp_path, expert_cache_bytes=one - 1)
    save_small_model(tmp_path / "dense", num_experts=(1,), mlp_type="standard")
    with pytest.raises(ValueError, match="this model has none"):
        load_for_inference(tmp_path / "dense", expert_cache_bytes=one)


def test_room_for_all_reads_each_expert_once(tmp_path):
    save_small_model(tmp_path)
    loaded = load_for_inference(tmp_path, expert_cache_bytes=10**9)
    for _ in range(3):
        generate(loaded.model, PROMPTS, 6, GREEDY)
    cache = loaded.expert_cache
    assert cache.misses <= 12
    assert cache.peak == cache.bytes_read <= cache.total


def test_the_experts_in_memory_are_never_more_than_the_limit(tmp_path):
    """By what torch allocates: two layers of 32 experts, of which each has 64 times the bytes of a token's inner vector."""
    save_small_model(tmp_path, num_experts=(32,), ffn_hidden_size=512, mlp_type="standard", num_layers=4)
    whole = load_for_inference(tmp_path).model
    one = expert_bytes(whole)
    loaded = load_for_inference(tmp_path, expert_cache_bytes=16 * one)
    with LiveBytes() as live:
        generate(loaded.model, PROMPTS[1:2], 12, GREEDY)
    assert loaded.expert_cache.misses > 16
    assert 16 * one <= live.peak < 17 * one  # below one more: activations and the cache of keys and values
    with LiveBytes() as dense:
        generate(whole, PROMPTS[1:2], 12, GREEDY)
    assert dense.peak < one


def _save_sharded(directory, values, flags):
    run = small_run(**values, **flags)
    model = build_parallel_model(run, 50, build_parallel_mesh(run, "cpu"), torch.device("cpu"))
    CheckpointManager(directory, dist.group.WORLD).save(7, model_state(model), describe(prepared(run), Progress(7)))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, {"expert_tensor_parallel_size": 2, "zero_stage": 3}),  # stacks cut along the inner width
        pytest.param(2, {"moe_expert_parallel_size": 2, "zero_stage": 1}, marks=pytest.mark.matrix),
        pytest.param(4, {"moe_expert_parallel_size": 2, "zero_stage": 3}, marks=pytest.mark.matrix),
        pytest.param(4, {"zero_stage": 3, "num_experts": (2, 8)}, marks=pytest.mark.matrix),  # fewer experts than ranks: along another dim
    ],
)
def test_any_layout_may_have_written_the_experts(tmp_path, world, flags):
    run_distributed(_save_sharded, world, str(tmp_path), ROPE_GQA_SWIGLU | {"add_bias_linear": True}, flags)
    whole = load_for_inference(tmp_path).model
    loaded = load_for_inference(tmp_path, expert_cache_bytes=3 * expert_bytes(whole))
    assert torch.equal(all_logits(loaded.model, random_tokens(2, 9)), all_logits(whole, random_tokens(2, 9)))


def _answers(directory, limit):
    loaded = load_for_inference(directory, layout=Layout(1, 2, dist.group.WORLD), expert_cache_bytes=limit)
    return generate(loaded.model, PROMPTS, 8, GREEDY), loaded.expert_cache.peak, loaded.expert_cache.total


@pytest.mark.distributed
def test_expert_parallel_ranks_keep_their_own(tmp_path):
    save_small_model(tmp_path)
    whole = load_for_inference(tmp_path).model
    one, alone = expert_bytes(whole), generate(whole, PROMPTS, 8, GREEDY)
    assert run_distributed(_answers, 2, str(tmp_path), 2 * one) == [(alone, 2 * one, 6 * one)] * 2


def test_each_row_is_the_row_of_the_tensor(tmp_path):
    model = save_small_model(tmp_path)
    reader, state = RowReader(tmp_path / "iter_0000010"), model_state(model)
    for name in ("model.layers.4.moe.experts.w1", "model.layers.4.moe.experts.b2", "model.layers.2.mlp.fc1.weight"):
        for row in (0, len(state[name]) - 1):
            out = torch.full_like(state[name][row], -1.0)
            assert reader.read(name, row, out) == out.nbytes
            assert torch.equal(out, state[name][row])


def test_files_that_are_cut_off_or_hold_something_else_are_named(tmp_path):
    save_small_model(tmp_path)
    directory = tmp_path / "iter_0000010"
    loaded = load_for_inference(tmp_path, expert_cache_bytes=10**9)
    shard = next(directory.glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 3])  # behind our back: it has been verified
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*cut off"):
        generate(loaded.model, PROMPTS, 5, GREEDY)
    shard.write_bytes(content)
    name = "model.layers.4.moe.experts.w1"
    with pytest.raises(CheckpointError, match="has 1536 numbers, and the files 0"):
        RowReader(directory).read(name, 8, torch.empty(32, 48, dtype=torch.float64))
    shutil.copy(shard, tmp_path / "copy")
    shard.write_bytes(b"\0" * len(content))
    with pytest.raises(CheckpointError, match="damaged or not a tensor"):
        RowReader(directory).read(name, 0, torch.empty(32, 48, dtype=torch.float64))


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    save_small_model(tmp_path)
    from megatron_moe.inference import load

    build = load.build_plain
    monkeypatch.setattr(load, "build_plain", lambda run, vocab_size: build(small_run(ffn_hidden_size=64), vocab_size))
    with pytest.raises(CheckpointError, match=r"shape    model.layers.1.mlp.fc1"):
        load_for_inference(tmp_path, expert_cache_bytes=10**9)


def test_the_layer_that_has_most_gives_way():
    cache = ExpertCache(limit=3 * 8)

    def use(layer, expert):
        hits = cache.hits
        cache.get((layer, expert), 8, lambda: {"w1": torch.zeros(1, dtype=torch.float64)})
        return cache.hits > hits

    # every token walks through both layers; layer 2 has a favourite, layer 1 three in turn
    for token in range(6):
        use(1, token % 3)
        assert use(2, 0) == (token > 0)
    assert ((1, 2) in cache, (1, 1) in cache, (1, 0) in cache) == (True, True, False)
    assert cache.used == 24
