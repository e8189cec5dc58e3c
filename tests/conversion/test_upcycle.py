"""Experts made of a dense model: the logits before training are those of the dense model, and where they cannot be, it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.state import model_state
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.upcycling import inexact_because, router_std, weight_sum
from megatron_moe.conversion.upcycle import dense_name, fill, fit_problems
from megatron_moe.model.init import initialize_parameters
from megatron_moe.model.plain import build_plain
from megatron_moe.moe.tokens import TokenInfo

VOCABULARY = 40
BASE = {
    "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32, "expert_interval": 1, "num_experts": (4,), "topk": 2,
    "max_position_embeddings": 16, "seq_length": 16, "init_method_std": 0.3, "moe_use_upcycling": True, "load": "dense",
    "moe_top2_2nd_expert_sampling": False,
}  # fmt: skip
SWIGLU = {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False}


def run_of(**values) -> RunConfig:
    return RunConfig.from_values(BASE | values)


def model_of(run: RunConfig, seed: int = 7):
    """A model whose biases and norms are not those of a new one either."""
    model = build_plain(run, VOCABULARY)
    model.to_empty(device="cpu")
    initialize_parameters(model, seed, 0.3, 1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3
    return model.eval()


class InMemory:
    """A `Source` of a model, which counts how often a tensor is read."""

    path = Path("dense")

    def __init__(self, model):
        self.state = model_state(model)
        self.tensors = {name: {"shape": list(t.shape), "dtype": "any"} for name, t in self.state.items()}
        self.read_names: list[str] = []

    def read(self, names):
        for name in names:
            self.read_names.append(name)
            yield name, self.state[name].detach().clone()


def upcycled(run: RunConfig, dense):
    source, model = InMemory(dense), build_plain(run, VOCABULARY)
    assert fit_problems(run, VOCABULARY, source) == []
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    assert fill(model, source, run) == len(model_state(model))
    assert sorted(source.read_names) == sorted(source.tensors), "every dense tensor once"
    return model.eval()


@torch.no_grad()
def logits(model):
    tokens = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(5))
    return model(tokens, torch.arange(16).expand(4, 16))


def difference(**values) -> float:
    run = run_of(**values)
    dense = model_of(run.dense())
    return float((logits(upcycled(run, dense)) - logits(dense)).abs().max())


FP64 = {"params_dtype": "float64", "moe_kernels": "reference"}
EXACT = {
    "Mixtral's": {"moe_router_normalize": "chosen", **SWIGLU},
    "DeepSpeed's top-2": {},
    "top-1, equal scores": {"topk": 1, "moe_upcycling_router_std": 0.0},
    "top-3": {"topk": 3},
    "raw weights, equal scores": {"moe_router_normalize": "none", "moe_upcycling_router_std": 0.0},
    "a scaling factor": {"moe_router_topk_scaling_factor": 2.5},
    "sigmoid scores, a bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "raw sigmoid, equal scores": {"topk": 1, "moe_router_score_function": "sigmoid", "moe_upcycling_router_std": 0.0},
    "residual, coefficient": {"mlp_type": "residual"},
    "residual, sum": {"mlp_type": "residual", "moe_residual_combine": "sum", **SWIGLU},
    "pyramid": {"num_experts": (1, 2, 4)},
    "residual pyramid, top-1": {"num_experts": (2, 4, 8), "mlp_type": "residual", "topk": 1, "moe_upcycling_router_std": 0.0},
    "a narrow shared expert": {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True},
    "a wide shared expert": {"moe_shared_expert_intermediate_size": 80, **SWIGLU},
    "hash": {"moe_router_policy": "hash", "topk": 1},
    "sinkhorn, top-1": {"moe_router_policy": "sinkhorn", "topk": 1, "moe_upcycling_router_std": 0.0},
    "expert choice, evaluation": {"moe_router_policy": "expert_choice", "moe_upcycling_router_std": 0.0},
    "two parts": {"num_experts": (8,), "moe_upcycling_granularity": 2, "moe_ffn_hidden_size": 16, "topk": 4},
    "four parts, SwiGLU": {"num_experts": (8,), "moe_upcycling_granularity": 4, "moe_ffn_hidden_size": 8, "topk": 4, **SWIGLU},
    "parts in groups": {"num_experts": (8,), "moe_upcycling_granularity": 2, "moe_ffn_hidden_size": 16, "topk": 4, "moe_router_num_groups": 2,
                        "moe_router_group_topk": 2},
    "parts, residual": {"num_experts": (4, 4, 8), "moe_upcycling_granularity": 2, "moe_ffn_hidden_size": 16, "mlp_type": "residual"},
    "dense layers between": {"expert_interval": 2, "num_layers": 4},
    "norms of q and k, sinks, windows": {"qk_layernorm": True, "softmax_type": "learnable", "window_size": 4, **SWIGLU},
    "latent attention, first layer dense": {"multi_latent_attention": True, "kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4,
                                            "v_head_dim": 8, "moe_first_k_dense_replace": 1, "position_embedding_type": "rope", **SWIGLU},
    "tied, learned positions": {"position_embedding_type": "learned_absolute", "untie_embeddings_and_output_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_first_logits_are_those_of_the_dense_model(name):
    assert inexact_because(run_of(**EXACT[name])) == []
    assert difference(**EXACT[name], **FP64) < 1e-12


BIT_EXACT = [
    "Mixtral's", "residual, coefficient", "residual, sum", "pyramid", "top-1, equal scores", "raw weights, equal scores", "raw sigmoid, equal scores",
]  # fmt: skip


@pytest.mark.parametrize("name", BIT_EXACT)
def test_equal_scores_and_a_power_of_two_make_it_bit_for_bit_in_float32(name):
    """Weights 1/k are exact then, and so is their sum. No biases: torch adds them within the product in the one and behind it in the other."""
    assert difference(**(SWIGLU | EXACT[name] | {"moe_upcycling_router_std": 0.0})) == 0.0


def test_raw_weights_are_near_and_say_so():
    raw = {"topk": 1, **FP64}
    (reason,) = inexact_because(run_of(**raw))
    assert "raw scores" in reason and "--moe-upcycling-router-std 0" in reason
    assert router_std(run_of(**raw)) == pytest.approx(0.3 / 1000)
    size = float(logits(model_of(run_of(**raw).dense())).abs().max())
    assert 1e-9 < difference(**raw) < 2e-2 * size, "nearly equal scores"
    assert difference(**raw, moe_upcycling_router_std=0.3) > 10 * difference(**raw)
    (with_k,) = inexact_because(run_of(topk=2, moe_router_normalize="none"))
    assert "--moe-router-normalize chosen" in with_k


def test_a_nearly_zero_router_chooses_as_one_of_the_usual_size():
    def chosen(**values):
        run = run_of(topk=1, **values)
        model = upcycled(run, model_of(run.dense()))
        logits(model)
        return model.layers["1"].moe.stats.counts_E.tolist()

    assert chosen() == chosen(moe_upcycling_router_std=0.3)
    assert sum(n > 0 for n in chosen()) >= 2
    assert chosen(moe_upcycling_router_std=0.0) == [64, 0, 0, 0], "ties go to the lowest"


def test_noise_and_dropping_are_not_exact_and_say_so():
    assert 1e-6 < difference(**FP64, moe_upcycling_noise_std=1e-3) < difference(**FP64, moe_upcycling_noise_std=1e-1)
    assert difference(**FP64, moe_upcycling_drop_ratio=0.5) > 1e-2
    reasons = inexact_because(run_of(moe_upcycling_noise_std=0.1, moe_upcycling_drop_ratio=0.5))
    assert ["--moe-upcycling-noise-std" in reasons[0], "--moe-upcycling-drop-ratio" in reasons[1]] == [True, True]


def test_drop_upcycling_draws_the_same_neurons_of_all_matrices_and_others_in_each_expert():
    run = run_of(moe_upcycling_drop_ratio=0.25, **{k: v for k, v in SWIGLU.items() if k != "add_bias_linear"})
    dense = model_of(run.dense())
    experts, mlp = upcycled(run, dense).layers["2"].moe.experts, dense.layers["2"].mlp
    changed = [
        (experts.w1 != mlp.fc1.weight.t()).all(1), (experts.w_gate != mlp.fc_gate.weight.t()).all(1), (experts.w2 != mlp.fc2.weight.t()).all(2),
        experts.b1 != mlp.fc1.bias, experts.b_gate != mlp.fc_gate.bias,
    ]  # fmt: skip
    assert all(torch.equal(changed[0], other) for other in changed[1:])
    assert changed[0].sum(1).tolist() == [8] * 4  # a quarter of 32
    assert len({tuple(row.tolist()) for row in changed[0]}) == 4
    assert (experts.b1[changed[0]] == 0).all() and torch.equal(experts.b2[3], mlp.fc2.bias)
    spread, mean = (float(x.detach()) for x in (mlp.fc1.weight.std(), mlp.fc1.weight.mean()))
    new = experts.w1.detach().transpose(1, 2)[changed[0]]
    assert float(new.std()) == pytest.approx(spread, rel=0.15) and abs(float(new.mean()) - mean) < 3 * spread / new.numel() ** 0.5


def test_noise_differs_between_experts_and_has_its_spread():
    run = run_of(moe_upcycling_noise_std=0.05, **FP64)
    dense = model_of(run.dense())
    moe = upcycled(run, dense).layers["1"].moe
    noise = moe.experts.w1 - dense.layers["1"].mlp.fc1.weight.t()
    assert float(noise.detach().std()) == pytest.approx(0.05, rel=0.1)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(moe.experts.b1[0], dense.layers["1"].mlp.fc1.bias)


def test_parts_of_an_mlp_are_its_neurons_in_order_and_share_their_row_of_the_router():
    run = run_of(num_experts=(4,), moe_upcycling_granularity=2, moe_ffn_hidden_size=16, **FP64)
    dense = model_of(run.dense())
    moe, mlp = upcycled(run, dense).layers["1"].moe, dense.layers["1"].mlp
    assert torch.equal(torch.cat([moe.experts.w1[2], moe.experts.w1[3]], dim=1), mlp.fc1.weight.t())
    assert torch.equal(torch.cat([moe.experts.w2[0], moe.experts.w2[1]]), 2 * mlp.fc2.weight.t())
    assert torch.equal(moe.gate.weight[0], moe.gate.weight[1]) and not torch.equal(moe.gate.weight[1], moe.gate.weight[2])


def test_the_router_is_that_of_a_new_model_where_weights_add_up():
    run = run_of(seed=7)
    new = build_plain(run, VOCABULARY)
    new.to_empty(device="cpu")
    initialize_parameters(new, 7, 0.3, 3)
    assert torch.equal(upcycled(run, model_of(run.dense())).layers["1"].moe.gate.weight, new.layers["1"].moe.gate.weight)


def test_the_sum_of_gate_weights_is_what_the_layer_computes():
    for name in ("Mixtral's", "raw weights, equal scores", "raw sigmoid, equal scores", "a scaling factor", "sinkhorn, top-1", "hash"):
        run = run_of(**EXACT[name])
        layer = upcycled(run, model_of(run.dense())).layers["1"].moe
        ids = torch.arange(8)
        routing, _ = layer.route(torch.randn(8, 16), TokenInfo(ids_T=ids))
        assert routing.weights_TK.sum(1).tolist() == pytest.approx([weight_sum(run.moe, 4)] * 8), name


# ---------------------------------------------------------------- what does not fit


def test_tensors_that_are_missing_or_left_over_are_named():
    run = run_of()
    source = InMemory(model_of(run.dense()))
    source.tensors["model.extra.weight"] = source.tensors.pop("model.layers.1.mlp.fc1.weight")
    source.tensors["model.norm.weight"] = {"shape": [17], "dtype": "float32"}
    problems = fit_problems(run, VOCABULARY, source)
    assert [line.split()[:2] for line in problems] == [
        ["missing", "layers.1.mlp.fc1.weight:"], ["unused", "extra.weight:"], ["shape", "norm.weight:"],
    ]  # fmt: skip


def test_a_tensor_of_another_shape_is_not_broadcast():
    run = run_of()
    source, model = InMemory(model_of(run.dense())), build_plain(run, VOCABULARY).to_empty(device="cpu")
    source.state["model.norm.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"norm.weight: \[1\] of the dense model, \[16\] here"):
        fill(model, source, run)


def test_names_of_the_target_lead_to_dense_ones():
    assert dense_name("layers.3.moe.experts.b_gate") == "layers.3.mlp.fc_gate.bias"
    assert dense_name("layers.3.shared_expert.fc2.weight") == "layers.3.mlp.fc2.weight"
    assert dense_name("layers.3.moe.gate.weight") is None and dense_name("layers.3.coefficient.bias") is None
    assert dense_name("layers.3.attn.q_norm.weight") == "layers.3.attn.q_norm.weight"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"load": None}, "needs a dense model: --load DIR"),
        ({"num_experts": (1,), "topk": 1}, "give --num-experts"),
        ({"moe_ffn_hidden_size": 16}, "give --moe-ffn-hidden-size 32 or --moe-upcycling-granularity 2"),
        ({"moe_upcycling_granularity": 3}, "must divide the width of the dense MLP (32)"),
        ({"moe_upcycling_granularity": 2}, "experts of width 32 are not the 2 parts of an MLP of width 32: give --moe-ffn-hidden-size 16"),
        ({"moe_upcycling_granularity": 2, "moe_ffn_hidden_size": 16, "topk": 3}, "--topk (3) must be a multiple"),
        ({"moe_upcycling_granularity": 2, "moe_ffn_hidden_size": 16, "num_experts": (5,)}, "use 4 or 6"),
        ({"moe_upcycling_granularity": 2, "moe_ffn_hidden_size": 16, "moe_router_policy": "hash"}, "does not keep the parts"),
        ({"moe_upcycling_granularity": 2, "moe_ffn_hidden_size": 16, "moe_top2_2nd_expert_sampling": True}, "tear the parts"),
        ({"moe_latent_size": 8}, "--moe-latent-size (8)"),
        ({"reset_iteration": True}, "--reset-iteration keeps the optimizer"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(values, words):
    with pytest.raises(ConfigError) as caught:
        run_of(**values)
    assert any(words in problem for problem in caught.value.problems), caught.value.problems


def test_what_has_no_effect_or_unbalances_is_said():
    said = lambda **values: "\n".join(RunConfig.from_values(BASE | values).warnings())  # noqa: E731
    assert "--moe-upcycling-noise-std has no effect without --moe-use-upcycling" in said(
        moe_use_upcycling=False, moe_upcycling_noise_std=0.1
    )
    assert "all tokens go to the 2 lowest experts of a layer, and what exceeds their capacity is dropped" in said(
        moe_upcycling_router_std=0.0
    )
    assert "upcycling is not exact" in said(moe_upcycling_noise_std=0.1)
    assert "upcycling" not in said()
