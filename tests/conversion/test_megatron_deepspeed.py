"""Megatron-DeepSpeed's per-expert files, in and out: written by hand here, opened without executing anything."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from training import runs

from conversion.hf_models import read_all
from conversion.megatron_files import Plan, our_weights, same, write_files
from conversion.small import VALUES, convert, hashes, native_tensors, save_small
from megatron_moe.checkpoint.files import other_format, read_manifest
from megatron_moe.config.flags import ConfigError, fields_of
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion import megatron_deepspeed
from megatron_moe.conversion.journal import Journal
from megatron_moe.conversion.megatron_losses import EXPRESSIBLE, without_losses
from megatron_moe.conversion.megatron_losses import LOSSES as LOST
from megatron_moe.conversion.megatron_names import mp_ranks_of
from megatron_moe.conversion.source import Selection

MODERN = {
    "is_gated": True, "is_tied": False, "is_rotary": True, "has_bias": False, "norm": "rmsnorm", "groups": 2, "residual": False,
    "topk": 2, "experts": (1, 4), "num_experts": (4,),
}  # fmt: skip
PLANS = {
    "pyramid_residual": Plan(),
    "tp2_swiglu_gqa_fp16": Plan(tp=2, dtype=torch.float16, gate_dtype=torch.float32, **MODERN),
    "tp2_etp_padded": Plan(tp=2, etp=True, rows=128, multiple=64, experts=(1, 4), num_experts=(4,)),
    "etp_told_by_widths_alone": Plan(
        tp=2, etp=True, experts=(1, 2), num_experts=(2,), without=("enable_expert_tensor_parallelism",), prefix="encoder", tag="best",
        holder=SimpleNamespace, rows=128),
    "one_copy_of_an_expert": Plan(tp=2, ep=1, experts=(1, 2), num_experts=(2,), one_copy=True, holder=dict, prefix="encoder", rows=128),
    "tp4_ep1_copies": Plan(tp=4, ep=1, experts=(1, 2), num_experts=(2,), dtype=torch.bfloat16),
    "version_0": Plan(version=0, experts=(1, 2), num_experts=(2,)),
}  # fmt: skip


def old_order(plan: Plan, weights: dict) -> None:
    """Of files before version 1, three blocks of all heads: such a file is what q, k, v put together head by head would be of others."""
    for i in range(1, len(plan.experts) + 1):
        for leaf in ("weight", "bias"):
            names = [f"model.layers.{i}.attn.{p}_proj.{leaf}" for p in "qkv"]
            stored = torch.cat([weights[n].unflatten(0, (plan.heads, plan.head)) for n in names], 1).flatten(0, 1)  # as written
            for name, block in zip(names, stored.unflatten(0, (3, plan.heads * plan.head))):
                weights[name] = block.clone()


def to_native(capsys, load, save, *flags):
    return convert(capsys, "megatron-deepspeed", "native", load, save, *flags)


def to_theirs(capsys, load, save, *flags):
    return convert(capsys, "native", "megatron-deepspeed", load, save, *flags)


def content(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", [n if n.startswith(("pyr", "tp2", "etp")) else pytest.param(n, marks=pytest.mark.matrix) for n in PLANS])
def test_there_and_back_is_equal_file_by_file(name, tmp_path, capsys):
    plan = PLANS[name]
    weights = our_weights(plan)
    tag = write_files(tmp_path / "old", plan, weights)
    if plan.version == 0:
        old_order(plan, weights)
    code, _, err = to_native(capsys, tmp_path / "old", tmp_path / "run", "--verify")
    assert code == 0, err
    assert hashes(native_tensors(tmp_path / "run" / "iter_0000030")) == hashes({n: t.float() for n, t in weights.items()})
    code, out, err = to_theirs(capsys, tmp_path / "run", tmp_path / "new", "--verify")
    assert code == 0, err
    assert "equal in every bit" in out
    files = lambda d: sorted(str(p.relative_to(d)) for p in d.rglob("*") if p.is_file())  # noqa: E731
    assert files(tmp_path / "new") == files(tmp_path / "old")
    for old in sorted(tag.iterdir()):
        assert same(content(old), content(tmp_path / "new" / plan.tag / old.name), old.name) == []
    for tracker in ("latest", "latest_checkpointed_iteration.txt"):
        assert (tmp_path / "new" / tracker).read_text() == (tmp_path / "old" / tracker).read_text()


def test_another_layout_is_written_as_megatron_would_have(tmp_path, capsys):
    """TP 1 -> TP 2 with shared experts: the files are those that the loops of this test make for that layout."""
    weights = our_weights(Plan(multiple=32))
    write_files(tmp_path / "one", Plan(multiple=32), weights)
    assert to_native(capsys, tmp_path / "one", tmp_path / "run")[0] == 0
    flags = ("--target-tensor-parallel-size", "2", "--target-expert-tensor-parallel-size", "2", "--target-expert-parallel-size", "4")
    assert to_theirs(capsys, tmp_path / "run", tmp_path / "two", "--verify", *flags)[0] == 0
    tag = write_files(tmp_path / "wanted", Plan(tp=2, etp=True, ep=4, multiple=32), weights)
    assert sorted(p.name for p in tag.iterdir()) == sorted(p.name for p in (tmp_path / "two" / "global_step30").iterdir())
    for wanted in tag.iterdir():
        made, expected = content(tmp_path / "two" / "global_step30" / wanted.name), content(wanted)
        assert same(made.get("module", made), expected.get("module", expected), wanted.name) == []
    args = content(tmp_path / "two" / "global_step30" / "mp_rank_01_model_states.pt")["args"]
    assert (args.tensor_model_parallel_size, args.moe_expert_parallel_size, args.enable_expert_tensor_parallelism) == (2, 4, True)


def test_partial_rotary_positions_are_known_there(tmp_path, capsys):
    plan = Plan(is_rotary=True, experts=(1, 2), num_experts=(2,), args={"rotary_percent": 0.5, "rope_theta": 500.0})
    write_files(tmp_path / "old", plan, our_weights(plan))
    assert to_native(capsys, tmp_path / "old", tmp_path / "run", "--verify")[0] == 0
    model = read_manifest(tmp_path / "run" / "iter_0000030").meta["config"]["model"]
    assert (model["rotary_percent"], model["rotary_base"], model["position_embedding_type"]) == (0.5, 500.0, "rope")
    assert to_theirs(capsys, tmp_path / "run", tmp_path / "two", "--target-tensor-parallel-size", "2", "--verify")[0] == 0
    args = content(tmp_path / "two" / "global_step30" / MODEL)["args"]
    assert (args.rotary_percent, args.rope_theta, args.use_rotary_position_embeddings) == (0.5, 500.0, True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [({"bias_gelu_fusion": True}, "gelu_tanh"), ({"openai_gelu": True}, "gelu_tanh"), ({"onnx_safe": True}, "gelu"),
     ({"squared_relu": True, "bias_gelu_fusion": True}, "squared_relu")],
)  # fmt: skip
def test_the_activation_is_that_of_their_kernels(theirs, ours, tmp_path, capsys):
    """The kernel that adds the bias before GELU is the approximation by tanh."""
    plan = Plan(experts=(1, 2), num_experts=(2,), args=theirs)
    write_files(tmp_path / "old", plan, our_weights(plan))
    assert to_native(capsys, tmp_path / "old", tmp_path / "run")[0] == 0
    assert read_manifest(tmp_path / "run" / "iter_0000030").meta["config"]["model"]["activation_func"] == ours


def test_an_activation_of_ours_is_found_again(tmp_path, capsys):
    for name, has_bias in (("gelu_tanh", True), ("gelu_tanh", False), ("gelu", True)):
        values = {"activation_func": name, "add_bias_linear": has_bias, "with_optimizer": False}
        run = save_small(tmp_path / f"{name}_{has_bias}" / "run", **values)
        assert to_theirs(capsys, run, run.parent / "there", "--verify")[0] == 0  # the logits: both by their own configuration
        args = content(run.parent / "there" / "global_step10" / MODEL)["args"]
        assert (args.bias_gelu_fusion, args.openai_gelu) == (name == "gelu_tanh" and has_bias, name == "gelu_tanh" and not has_bias)


def test_a_run_that_is_told_to_load_such_files_says_what_to_do(two_ranks):
    assert "--from megatron-deepspeed --to native" in other_format(two_ranks)
    assert "--from megatron-deepspeed --to native" in other_format(two_ranks / "global_step30")


def test_names_of_expert_files_are_those_of_the_ranks_that_have_the_expert():
    """World rank w has tensor-parallel rank w mod T and expert-parallel rank w mod ep."""
    assert [mp_ranks_of(e, 4, 2, 2) for e in range(4)] == [[0], [0], [1], [1]]
    assert [mp_ranks_of(e, 2, 1, 2) for e in range(2)] == [[0, 1], [0, 1]]
    assert [mp_ranks_of(e, 4, 4, 2) for e in range(4)] == [[0], [1], [0], [1]]
    assert [mp_ranks_of(e, 2, 8, 1) for e in range(2)] == [[0], [0]]


def test_a_run_of_ours_is_written_with_the_keys_of_deepspeed_and_read_again(tmp_path, capsys):
    run = save_small(tmp_path / "run", num_layers=4, num_experts=(4, 8), expert_interval=2, fp16=True)
    code, _, err = to_theirs(capsys, run, tmp_path / "there", "--verify")
    assert code == 0
    assert "from float32 to float16: rounded" in err
    made = content(tmp_path / "there" / "global_step10" / "mp_rank_00_model_states.pt")
    keys = {
        "module",
        "optimizer",
        "lr_scheduler",
        "global_steps",
        "mp_world_size",
        "num_experts",
        "args",
        "iteration",
        "checkpoint_version",
    }
    assert keys <= made.keys()
    assert (made["num_experts"], made["checkpoint_version"], made["args"].num_layers) == ([4, 8], 3.0, 4)
    assert to_native(capsys, tmp_path / "there", tmp_path / "back", "--verify")[0] == 0
    before, after = native_tensors(run / "iter_0000010"), native_tensors(tmp_path / "back" / "iter_0000010")
    assert hashes(after) == hashes({name: t.half().float() for name, t in before.items() if name.startswith("model.")})


def test_a_vocabulary_padded_for_another_degree_is_cut_and_filled(tmp_path, capsys):
    """257 words: 384 rows here and at TP 1, 512 at TP 2."""
    run = save_small(tmp_path / "run")
    assert to_theirs(capsys, run, tmp_path / "two", "--verify", "--target-tensor-parallel-size", "2")[0] == 0
    tables = [
        content(tmp_path / "two" / "global_step10" / f"mp_rank_0{r}_model_states.pt")["module"]["language_model"]["embedding"][
            "word_embeddings"
        ]["weight"]
        for r in range(2)
    ]
    ours = native_tensors(run / "iter_0000010")["model.embedding.weight"]
    assert [len(t) for t in tables] == [256, 256]
    assert torch.equal(torch.cat(tables)[:384], ours)
    assert torch.equal(torch.cat(tables)[384:], ours[-1:].expand(128, -1))


def test_padding_for_a_larger_degree_is_kept_at_a_smaller_one(tmp_path, capsys):
    """50 words: 128 rows at TP 2 with a multiple of 64; at TP 1 as many, with a multiple of 128."""
    plan = PLANS["tp2_etp_padded"]
    weights = our_weights(plan)
    write_files(tmp_path / "two", plan, weights)
    assert to_native(capsys, tmp_path / "two", tmp_path / "run")[0] == 0
    assert to_theirs(capsys, tmp_path / "run", tmp_path / "one", "--verify", "--target-tensor-parallel-size", "1")[0] == 0
    made = content(tmp_path / "one" / "global_step30" / "mp_rank_00_model_states.pt")
    table = made["module"]["language_model"]["embedding"]["word_embeddings"]["weight"]
    assert torch.equal(table, weights["model.embedding.weight"])
    assert (made["args"].make_vocab_size_divisible_by, made["args"].padded_vocab_size) == (128, 128)


PLAIN = {"mlp_type": "standard", "topk": 2, "moe_top2_2nd_expert_sampling": False, "with_optimizer": False}
ROTARY = PLAIN | {"position_embedding_type": "rope"}
LOSSES = {  # settings, what is said of them, of which tensors it is
    "expert bias": (PLAIN | {"moe_router_enable_expert_bias": True}, "the bias of the experts: ", "gate.expert_bias"),
    "norms and sinks": (PLAIN | {"qk_layernorm": True, "softmax_type": "learnable"}, "the norms of queries and keys (--qk-layernorm True)",
                        "attn.q_norm.weight"),
    "further tokens": (PLAIN | {"mtp_num_layers": 1}, "the modules that predict further tokens (--mtp-num-layers 1)", "model.mtp."),
    "window": (PLAIN | {"window_size": 4, "window_attn_skip_freq": (1, 0)}, "the window: every token sees all before it (--window-size 4)", ""),
    "factor": (PLAIN | {"moe_router_topk_scaling_factor": 2.5}, "the factor of the gate weights (--moe-router-topk-scaling-factor 2.5)", ""),
    "rope scaling": (ROTARY | {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0}, "the scaling of the rotary positions", ""),
    "raw weights": (PLAIN | {"moe_router_normalize": "none"}, "the normalisation of the gate weights: over none here, over survivors there", ""),
    "sigmoid and groups": (PLAIN | {"moe_router_score_function": "sigmoid", "moe_router_num_groups": 2, "moe_router_group_topk": 2},
                           "the scores of the router", ""),
    "experts choose": (PLAIN | {"moe_router_policy": "expert_choice", "moe_top2_2nd_expert_sampling": True}, "the policy of the router", ""),
    "sum": ({"moe_residual_combine": "sum", "with_optimizer": False}, "the dense MLP beside the experts", "mlp.fc1.weight"),
    "shared expert": (PLAIN | {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True},
                      "the shared expert (--moe-shared-expert-intermediate-size 8)", "shared_expert.fc1.weight"),
    "biases of q, k, v": (PLAIN | {"add_bias_linear": False, "add_qkv_bias": True}, "the bias vectors of queries, keys", "attn.q_proj.bias"),
}  # fmt: skip
QUICK_LOSSES = ("expert bias", "norms and sinks", "window")


@pytest.mark.parametrize("name", [n if n in QUICK_LOSSES else pytest.param(n, marks=pytest.mark.matrix) for n in LOSSES])
def test_what_their_model_does_not_have_is_refused_or_left_out_and_listed(name, tmp_path, capsys):
    """Reading back gives the run without it, with every tensor that was not named."""
    values, sentence, lost = LOSSES[name]
    run = save_small(tmp_path / "run", **values)
    code, _, err = to_theirs(capsys, run, tmp_path / "there")
    assert (code, f"--to megatron-deepspeed cannot hold {sentence}" in err, "--allow-lossy leaves it out" in err) == (2, True, True), err
    assert not (tmp_path / "there").exists()
    code, out, err = to_theirs(capsys, run, tmp_path / "there", "--allow-lossy", "--verify")
    assert (code, f"lost: {sentence}" in err) == (0, True), err
    assert ("tensors are left out: model." in err, lost in err) == (bool(lost), True)
    # the bias is zero in the beginning; the modules are behind the logits, and experts choose in training alone
    assert ("apart, by what was left out" in out) == (name not in ("expert bias", "further tokens")), out
    assert to_native(capsys, tmp_path / "there", tmp_path / "back", "--verify")[0] == 0
    before, after = native_tensors(run / "iter_0000010"), native_tensors(tmp_path / "back" / "iter_0000010")
    assert hashes(after) == hashes({n: before[n] for n in after})
    assert bool(before.keys() - after.keys()) == bool(lost)
    assert all(lost in n or name in ("norms and sinks", "sum", "shared expert", "biases of q, k, v") for n in before.keys() - after.keys())
    back = RunConfig.from_dict(read_manifest(tmp_path / "back" / "iter_0000010").meta["config"])
    assert without_losses(back) == (back, [])
    original = RunConfig.from_dict(read_manifest(run / "iter_0000010").meta["config"])
    without = without_losses(original)[0]
    assert back.architecture(257) == without.architecture(257)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"moe_latent_size": 8}, "--moe-latent-size 8: its experts read the whole hidden vector"),
        ({"moe_ffn_hidden_size": 20}, "--moe-ffn-hidden-size 20: its experts are as wide as the MLP (24)"),
        ({"activation_func": "relu"}, "--activation-func relu: its MLP has gelu"),
        ({"position_embedding_type": "rope", "rotary_interleaved": True}, "--rotary-interleaved True: it turns"),
        ({"moe_router_policy": "hash"}, "--moe-router-policy hash: its tokens go where a trained router sends them"),
        ({"multi_latent_attention": True, "kv_lora_rank": 8}, "--multi-latent-attention True: its attention makes keys and values"),
    ],
)
def test_what_cannot_even_be_left_out_is_refused_with_the_reason(values, reason):
    with pytest.raises(ConfigError) as refused:
        without_losses(RunConfig.from_values(VALUES | values))
    assert f"its model cannot be this one, not even with --allow-lossy: {reason}" in str(refused.value)
    assert len(refused.value.problems) == 1


def test_what_cannot_be_left_out_writes_nothing(tmp_path, capsys):
    run = save_small(tmp_path / "run", with_optimizer=False, activation_func="relu", window_size=4)
    code, _, err = to_theirs(capsys, run, tmp_path / "there", "--allow-lossy")
    assert (code, "not even with --allow-lossy: --activation-func relu" in err) == (2, True), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_every_setting_has_a_place_or_cannot_be_left_out():
    """A name that no configuration has would never be looked at."""
    known = {spec.name for group in EXPRESSIBLE for spec in fields_of(group)}
    named = {name for names in EXPRESSIBLE.values() for name in names} | {n for loss in LOST for n in (loss.switch, *loss.details)}
    assert named <= known
    run = RunConfig.from_values(VALUES)
    assert without_losses(run) == (run, [])
    idle = RunConfig.from_values(VALUES | {"window_attn_skip_freq": (2,), "rope_scaling_factor": 4.0})  # without a window, without scaling
    assert without_losses(idle) == (idle, [])


@pytest.mark.parametrize(
    ("at", "again"),
    [pytest.param(1, [1, 1, 1], marks=pytest.mark.matrix), (9, [0, 1, 1]), pytest.param(17, [0, 0, 1], marks=pytest.mark.matrix)],
)
def test_an_interrupted_conversion_does_not_write_finished_files_anew(at, again, tmp_path, capsys, monkeypatch):
    """Two layers of 8 files, then two of ranks: after the first expert, within the second layer, after the first rank. A layer with finished
    experts only is not read again, nor half a one twice."""
    run = save_small(tmp_path / "run", num_layers=2, num_experts=(4,), with_optimizer=False)
    command = (run, tmp_path / "out", "--target-tensor-parallel-size", "2")
    assert to_theirs(capsys, run, tmp_path / "whole", *command[2:])[0] == 0
    plain, done, read = Journal.finish, [], Selection.read

    def finish(self, name, *args):
        plain(self, name, *args)
        done.append(name)
        if len(done) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", finish)
        code, _, err = to_theirs(capsys, *command)
        assert (code, "the same command goes on where this one was" in err) == (130, True)
    partial = tmp_path / "out.partial"
    kept = {name: (partial / name).stat().st_mtime_ns for name in done}
    (partial / "global_step10" / MODEL.replace("00", "01")).write_bytes(b"half a file")
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(Selection, "read", lambda self, names: (seen.extend(names), read(self, names))[1])
        code, _, err = to_theirs(capsys, *command)
    assert (code, "what is finished there is not written again" in err) == (0, True), err
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == kept
    names = [*(f"model.layers.{i}.moe.experts.w1" for i in (1, 2)), "model.embedding.weight"]
    assert [seen.count(name) for name in names] == again
    files = lambda d: {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()}  # noqa: E731
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not partial.exists()


def test_a_finished_file_that_was_damaged_since_is_written_anew(tmp_path, capsys, monkeypatch):
    run = save_small(tmp_path / "run", with_optimizer=False)
    plain = Journal.finish

    def finish(self, name, *args):
        plain(self, name, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", finish)
        assert to_theirs(capsys, run, tmp_path / "out")[0] == 130
    (file,) = (tmp_path / "out.partial").rglob("layer_*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, _, err = to_theirs(capsys, run, tmp_path / "out", "--verify")
    assert code == 0, err


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _without(tag, name):
    (tag / name).unlink()


def _changed(tag, name, change):
    made = content(tag / name)
    change(made)
    torch.save(made, tag / name)


def _replace(values, name, make):
    values[name] = make(values[name])


MODEL, EXPERT = "mp_rank_00_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"
INNER = "language_model.encoder.layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.1.dense_h_to_4h.weight"
FAULTS = {
    "no expert": (lambda t: _without(t, EXPERT), f"{EXPERT}: missing"),
    "last expert": (lambda t: [p.unlink() for p in t.glob("layer_1_expert_7_*")], "the arguments say up to 8 experts"),
    "no rank": (lambda t: _without(t, "mp_rank_01_model_states.pt"), "mp_rank_01_model_states.pt: missing"),
    "no first rank": (lambda t: _without(t, MODEL), f"{MODEL}: missing"),
    "a rank too many": (lambda t: torch.save({"module": {}}, t / "mp_rank_02_model_states.pt"), "there are 2 tensor-parallel ranks only"),
    "another width": (lambda t: _changed(t, EXPERT, lambda c: _replace(c, INNER, lambda w: w[:-2].clone())), "expert 1 has [16, 22]"),
    "another layer's expert": (
        lambda t: (t / EXPERT).write_bytes((t / EXPERT.replace("layer_0", "layer_1")).read_bytes()), "is missing"),
    "an expert too many": (
        lambda t: (t / "layer_5_expert_0_mp_rank_00_model_states.pt").write_bytes((t / EXPERT).read_bytes()), "layer_5_expert_0"),
    "another count": (lambda t: _changed(t, MODEL, lambda c: setattr(c["args"], "num_layers", 10**9)), "1000000000 layers"),
    "experts by the billion": (lambda t: _changed(t, MODEL, lambda c: setattr(c["args"], "num_experts", [10**9])), "1000000000 experts"),
    "a word for a number": (lambda t: _changed(t, MODEL, lambda c: setattr(c["args"], "hidden_size", "many")), "--hidden-size"),
    "no heads": (lambda t: _changed(t, MODEL, lambda c: delattr(c["args"], "num_attention_heads")), "have no num_attention_heads"),
    "other heads": (lambda t: _changed(t, MODEL, lambda c: setattr(c["args"], "kv_channels", 8)), "query_key_value"),
    "no arguments": (lambda t: _changed(t, MODEL, lambda c: c.pop("args")), "--model-flags"),
    "a key too many": (
        lambda t: _changed(t, MODEL, lambda c: c["module"]["language_model"]["encoder"].update(extra=torch.zeros(2))), "encoder.extra"),
    "no norm": (
        lambda t: _changed(t, MODEL, lambda c: c["module"]["language_model"]["encoder"].pop("final_layernorm.bias")), "is missing"),
    "copies apart": (
        lambda t: _changed(t, MODEL, lambda c: c["module"]["language_model"]["encoder"]["final_layernorm.bias"].add_(1)), "up to 1 apart"),
    "truncated": (lambda t: (t / EXPERT).write_bytes((t / EXPERT).read_bytes()[:-100]), f"{EXPERT}: cut off, damaged"),
    "flipped": (lambda t: _flip(t / EXPERT), "CRC-32 mismatch"),
    "text": (lambda t: (t / EXPERT).write_text("hello"), f"{EXPERT}: cut off, damaged"),
    "pipeline": (lambda t: _changed(t, MODEL, lambda c: setattr(c["args"], "pipeline_model_parallel_size", 2)), "2 pipeline stages"),
    "unknown norm": (lambda t: _changed(t, MODEL, lambda c: setattr(c["args"], "apply_layernorm_1p", True)), "--apply-layernorm-1p"),
}  # fmt: skip


def _flip(path):
    with zipfile.ZipFile(path) as file:
        record = next(i for i in file.infolist() if i.filename.endswith("data/0"))
    data = bytearray(path.read_bytes())
    data[record.header_offset + 200] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    plan = Plan(tp=2, multiple=32)
    return write_files(tmp_path_factory.mktemp("theirs") / "old", plan, our_weights(plan)).parent


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_or_foreign_checkpoint_is_named_and_nothing_is_written(name, two_ranks, tmp_path, capsys):
    import shutil

    shutil.copytree(two_ranks, tmp_path / "old")
    damage, message = FAULTS[name]
    damage(tmp_path / "old" / "global_step30")
    code, _, err = to_native(capsys, tmp_path / "old", tmp_path / "run")
    assert code == 2
    assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("where", [MODEL, EXPERT])
def test_code_in_a_file_is_not_executed(where, two_ranks, tmp_path, capsys):
    import shutil

    shutil.copytree(two_ranks, tmp_path / "old")
    _changed(tmp_path / "old" / "global_step30", where, lambda c: c.update(note=Bomb(tmp_path / "executed")))
    code, _, err = to_native(capsys, tmp_path / "old", tmp_path / "run")
    assert code == 2
    assert "nothing was executed" in err
    (tmp_path / "old" / "global_step30" / where).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    assert to_native(capsys, tmp_path / "old", tmp_path / "run")[0] == 2
    assert not (tmp_path / "executed").exists()


def test_flags_of_the_training_stand_in_for_missing_arguments(tmp_path, capsys):
    plan = Plan(experts=(1, 4), num_experts=(4,))
    weights = our_weights(plan)
    tag = write_files(tmp_path / "old", plan, weights)
    _changed(tag, MODEL, lambda c: [c.pop("args"), c.pop("checkpoint_version")])
    flags = "--num-layers 2 --hidden-size 16 --num-attention-heads 4 --ffn-hidden-size 24 --num-experts 4 --mlp-type residual " \
            "--max-position-embeddings 16 --seq-length 16"  # fmt: skip
    code, _, err = to_native(capsys, tmp_path / "old", tmp_path / "run", "--model-flags", flags, "--true-vocab-size", "50", "--verify")
    assert code == 0, err
    assert "names no checkpoint_version" in err
    assert hashes(native_tensors(tmp_path / "run" / "iter_0000030")) == hashes(weights)
    assert "unknown flag --nonsense" in to_native(capsys, tmp_path / "old", tmp_path / "x", "--model-flags", "--nonsense 3")[2]


def test_optimizer_files_and_stray_experts_are_left_out_with_a_note(two_ranks, tmp_path, capsys):
    import shutil

    shutil.copytree(two_ranks, tmp_path / "old")
    tag = tmp_path / "old" / "global_step30"
    torch.save({"optimizer": {}}, tag / "expp_rank_0_mp_rank_00_optim_states.pt")
    stray = {"encoderlayers.1.mlp.deepspeed_moe.experts.deepspeed_experts.0.dense_h_to_4h.bias": torch.zeros(24)}
    _changed(tag, MODEL, lambda c: c["module"].update(stray))
    code, _, err = to_native(capsys, tmp_path / "old", tmp_path / "run")
    assert code == 0
    assert "1 files of optimizer state" in err
    assert "has 1 tensors of experts" in err
    code, _, err = to_native(capsys, tmp_path / "old", tmp_path / "x", "--include-optimizer")
    assert (code, "belong to one layout" in err) == (2, True)


def test_files_of_old_versions_have_an_expert_of_every_layer(tmp_path, capsys):
    plan = Plan(experts=(1, 4, 1, 4), num_experts=(4,))
    weights = our_weights(plan)
    tag = write_files(tmp_path / "old", plan, weights)
    for e in range(4):
        of_layers = [tag / f"layer_{n}_expert_{e}_{MODEL}" for n in range(2)]
        torch.save(content(of_layers[0]) | content(of_layers[1]), tag / f"expert_{e}_{MODEL}")
        [path.unlink() for path in of_layers]
    assert to_native(capsys, tmp_path / "old", tmp_path / "run", "--verify")[0] == 0
    assert hashes(native_tensors(tmp_path / "run" / "iter_0000030")) == hashes(weights)


def test_a_llama_of_transformers_goes_there_and_comes_back(tmp_path, capsys):
    """Without a run directory between: the same names and the same bits, whatever was padded and put together in the middle."""
    tensors = write_llama(tmp_path / "llama")
    steps = ("hf", "megatron-deepspeed", "llama", "there"), ("megatron-deepspeed", "hf", "there", "back")
    for source, target, load, save in steps:
        code, _, err = convert(capsys, source, target, tmp_path / load, tmp_path / save, "--verify")
        assert code == 0, err
    table = content(tmp_path / "there" / "global_step0" / MODEL)["module"]["language_model"]["embedding"]["word_embeddings"]["weight"]
    assert (table.dtype, len(table)) == (torch.bfloat16, 128)
    back = read_all(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(back[name].dtype == t.dtype and torch.equal(back[name], t) for name, t in tensors.items())
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("llama", "back"))
    assert {name: after[name] for name in before} == before


def write_llama(folder) -> dict:
    """Its folder by hand: 4 heads in 2 groups, 70 words."""
    V, D, F = 70, 16, 24
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5e5,
        "max_position_embeddings": 64, "vocab_size": V, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (D,), f"{at}post_attention_layernorm.weight": (D,)}
        shapes |= {f"{at}self_attn.{x}_proj.weight": (D if x in "qo" else D // 2, D) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (D, F) if x == "down" else (F, D) for x in ("gate", "up", "down")}
    tensors = {name: (0.3 * torch.randn(shape)).bfloat16() for name, shape in shapes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_numbers_too_large_for_float16_are_named(tmp_path, capsys):
    plan = Plan(experts=(1, 2), num_experts=(2,))
    weights = our_weights(plan)
    weights["model.layers.2.moe.experts.w2"][1, 3, 3] = 1e6
    write_files(tmp_path / "old", plan, weights)
    assert to_native(capsys, tmp_path / "old", tmp_path / "run")[0] == 0
    code, _, err = to_theirs(capsys, tmp_path / "run", tmp_path / "there", "--dtype", "float16")
    assert code == 2
    assert "model.layers.2.moe.experts.w2: has numbers that float16 cannot hold" in err


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    run = save_small(tmp_path / "run", with_optimizer=False)
    rooms = iter(range(5))

    def full_after_five(*_):
        if next(rooms, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full_after_five)
    code, _, err = to_theirs(capsys, run, tmp_path / "there")
    assert (code, "No space left on device" in err) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_degree_that_does_not_divide_is_refused(tmp_path, capsys):
    run = save_small(tmp_path / "run", with_optimizer=False)
    code, _, err = to_theirs(capsys, run, tmp_path / "there", "--target-tensor-parallel-size", "4", "--target-expert-parallel-size", "3")
    assert code == 2
    assert "--num-attention-heads (2) must be divisible by --target-tensor-parallel-size (4)" in err
    assert "--target-expert-parallel-size (3) and the experts of a layer (4)" in err


def in_memory(path) -> int:
    """Bytes of a mapped file that this process has touched."""
    found, is_it = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_it = line.rstrip().endswith(str(path))
        elif is_it and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_looking_reads_no_tensor(tmp_path):
    plan = Plan(experts=(1,), num_experts=(1,), rows=1 << 16)
    tag = write_files(tmp_path / "old", plan, our_weights(plan))
    source = megatron_deepspeed.open_source(tmp_path / "old")
    assert source.tensors["model.embedding.weight"]["shape"] == [1 << 16, 16]
    assert in_memory(tag / MODEL) < 1 << 19  # of 4 MB; a touched page brings its neighbours
    list(source.read(["model.embedding.weight"]))
    assert in_memory(tag / MODEL) > 3 << 20


@pytest.mark.distributed
def test_training_starts_from_the_converted_run(tmp_path, capsys):
    from distributed_pool import run_distributed

    plan = Plan(experts=(1, 4), num_experts=(4,), words=64)
    write_files(tmp_path / "old", plan, our_weights(plan))
    assert to_native(capsys, tmp_path / "old", tmp_path / "run")[0] == 0
    text = runs.write_text(tmp_path / "corpus_text_document")
    model = (
        "--num-layers 2 --hidden-size 16 --num-attention-heads 4 --ffn-hidden-size 24 --num-experts 4 --expert-interval 2 --mlp-type residual "
        "--seq-length 16 --max-position-embeddings 16 --vocab-size 64 --make-vocab-size-divisible-by 64 --hidden-dropout 0 --attention-dropout 0 --lr-warmup-iters 0"
    )
    for how, last in (("--no-load-optim", 32), ("--finetune", 2)):
        flags = f"--data-path {text} --split 80,20,0 --load {tmp_path / 'run'} --save {tmp_path / how} {model} {how} --train-iters {last}"
        result = run_distributed(runs.train_here, 1, flags)[0]
        assert result["progress"].iteration == last


def test_a_directory_that_is_none_is_refused(tmp_path):
    (tmp_path / "latest").write_text("../../etc")
    with pytest.raises(ConfigError, match="not the name of a folder beside it"):
        megatron_deepspeed.open_source(tmp_path)
