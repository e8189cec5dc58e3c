"""What stands beside the experts and around them, written out: residual, plain sum, shared experts, latent widths; flags and checks."""
# T tokens, B batch, S sequence, D hidden

import pytest
import torch
import torch.nn.functional as F

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.training import TrainingConfig
from megatron_moe.model.core import Context
from megatron_moe.model.flops import flops_per_token, parameter_counts
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import initialize_parameters
from megatron_moe.moe.layer import MoELayer, moe_layers
from megatron_moe.moe.tokens import NO_INFO
from megatron_moe.parallel.recompute import apply_recompute
from megatron_moe.training.pretrain import kind_of_experts
from megatron_moe.utils.random import token_keys

B, S, D, VOCAB = 2, 6, 16, 30
EXACT = {"rtol": 0, "atol": 1e-12}
KINDS = {
    "residual": {"mlp_type": "residual"},
    "plain sum": {"mlp_type": "residual", "moe_residual_combine": "sum"},
    "shared": {"moe_shared_expert_intermediate_size": 10},
    "gated shared": {"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_gate": True},
    "latent": {"moe_latent_size": 6, "moe_ffn_hidden_size": 5},
    "latent and shared": {"moe_latent_size": 6, "moe_shared_expert_intermediate_size": 10},
}


def recomputed_by(granularity):
    return TrainingConfig(recompute_granularity=granularity).recomputed_modules


def model_config(**changes):
    return ModelConfig(num_layers=2, hidden_size=D, num_attention_heads=2, ffn_hidden_size=24, max_position_embeddings=8,
                       hidden_dropout=0.0, attention_dropout=0.0, make_vocab_size_divisible_by=16, **changes)  # fmt: skip


def build(model=None, **moe):
    config = MoEConfig(num_experts=(4,), **({"moe_token_dropping": False, "moe_loss_coeff": 0.01, "topk": 2} | moe))
    gpt = GPT(model or model_config(), config, VOCAB).double()
    initialize_parameters(gpt, 3, 0.4, 2)
    return gpt


def mlp(module, h):
    """GELU, or what the module says."""
    return module.fc2(F.gelu(module.fc1(h)))


def feed_forward(block, h_TD):
    """The second half of a block without its residual connection, as the papers write it."""
    y_TD = block.moe(h_TD)
    if block.coefficient is not None:
        logits = h_TD @ block.coefficient.weight.t() + block.coefficient.bias
        c = logits.exp() / logits.exp().sum(-1, keepdim=True)
        return c[:, :1] * y_TD + c[:, 1:] * mlp(block.mlp, h_TD)
    if block.mlp is not None:
        return y_TD + mlp(block.mlp, h_TD)
    if block.shared_expert is not None:
        gate = 1.0
        if block.shared_expert_gate is not None:
            gate = 1 / (1 + torch.exp(-h_TD @ block.shared_expert_gate.weight.t()))
        return y_TD + gate * mlp(block.shared_expert, h_TD)
    return y_TD


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_block_adds_up_experts_and_branch_as_the_formula_says(kind):
    block = build(**KINDS[kind]).eval().layers["2"]
    x = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    context = Context(torch.arange(S).expand(B, S), None, None, None)
    after_attention = block.attend(x, context.of_layer(2))
    h_TD = block.mlp_norm(after_attention).flatten(0, 1)
    expected = after_attention + feed_forward(block, h_TD).view(B, S, D)
    torch.testing.assert_close(block(x, context), expected, **EXACT)


def test_dense_layers_know_nothing_of_shared_experts():
    for kind in KINDS.values():
        dense = build(**kind).layers["1"]
        assert (dense.shared_expert, dense.shared_expert_gate, dense.coefficient, dense.moe) == (None, None, None, None)
        assert dense.mlp.fc1.out_features == 24


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dropping", [True, False], ids=["dropping", "dropless"])
def test_latent_experts_equal_the_layer_in_their_width_between_two_projections(k, dropping):
    """The router sees the whole token; a dropped one comes back as exactly zero."""
    moe = {"num_experts": (4,), "topk": k, "moe_token_dropping": dropping, "moe_train_capacity_factor": 0.25, "moe_min_capacity": 0,
           "moe_rts": False, "moe_loss_coeff": 0.0}  # fmt: skip
    torch.manual_seed(0)
    latent = MoELayer(1, 4, D, 12, MoEConfig(**moe, moe_latent_size=6)).double()
    inner = MoELayer(1, 4, 6, 12, MoEConfig(**moe)).double()
    with torch.no_grad():
        for p in latent.parameters():
            p.normal_(0, 0.5)
    inner.experts = latent.experts
    x = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    y = latent(x)
    routing, limits = latent.route(x, NO_INFO)
    z_TL = inner.compute(
        x @ latent.latent_down.weight.t(), routing.ids_TK, routing.weights_TK, inner.dispatcher.plan(routing.ids_TK, limits)
    )
    expected = z_TL @ latent.latent_up.weight.t()
    torch.testing.assert_close(y, expected, **EXACT)
    gone = (routing.ids_TK < 0).all(1)
    assert gone.any() == dropping
    assert not y[gone].any()
    wrt = [x, *latent.parameters()]
    for a, b in zip(torch.autograd.grad(y.square().sum(), wrt), torch.autograd.grad(expected.square().sum(), wrt)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_travels_to_latent_experts_is_as_narrow_as_they_are():
    layer = moe_layers(build(moe_latent_size=6))[0]
    widths = []
    layer.experts.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    layer(torch.randn(5, D, dtype=torch.float64))
    assert widths == [6]
    assert layer.experts.w1.shape == (4, 6, 24)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu", "swiglu"])
def test_gradients_with_full_recomputation_are_bit_equal(kind, activation):
    model = ModelConfig(num_layers=2, hidden_size=D, num_attention_heads=2, ffn_hidden_size=24, max_position_embeddings=8,
                        make_vocab_size_divisible_by=16, hidden_dropout=0.2, activation_func=activation)  # fmt: skip
    grads = []
    for recompute in (False, True):
        gpt = build(model, **KINDS[kind])
        if recompute:
            apply_recompute(gpt, recomputed_by("full"))
        tokens = torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(0))
        keys = token_keys(1, 2, torch.arange(B), S)
        gpt(tokens, torch.arange(S).expand(B, S), tokens, None, keys).mean().backward()
        grads.append([p.grad for p in gpt.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert all(g.any() for g in grads[0])


def test_the_dense_branches_are_recomputed_and_a_plain_layer_is_not():
    for kind, finished_twice in ((KINDS["shared"], True), (KINDS["plain sum"], True), ({}, False)):
        gpt = build(**kind)
        apply_recompute(gpt, recomputed_by("full"))
        block, runs = gpt.layers["2"], []
        block.run_mlp = lambda function, *args, runs=runs: runs.append(function.__name__) or function(*args)
        tokens = torch.zeros(B, S, dtype=torch.int64)
        gpt(tokens, torch.arange(S).expand(B, S), tokens)
        assert runs == (["finish"] if finished_twice else [])


# ---------------------------------------------------------------- counts


def test_parameters_and_flops_of_every_kind_by_hand():
    model, mlp_params, base = model_config(), 16 * 24 + 24 + 24 * 16 + 16, {"num_experts": (4,), "topk": 2}
    plain_counts = parameter_counts(model, MoEConfig(**base), VOCAB).per_layer[1]
    plain_flops = flops_per_token(model, MoEConfig(**base), S, VOCAB)

    def extra(**moe):
        config = MoEConfig(**base, **moe)
        layer = parameter_counts(model, config, VOCAB).per_layer[1]
        flops = flops_per_token(model, config, S, VOCAB) - plain_flops
        return layer.total - plain_counts.total, layer.active - plain_counts.active, flops / 6

    assert extra(mlp_type="residual") == (mlp_params + 34, mlp_params + 34, 2 * 16 * 24 + 2 * 16)
    assert extra(mlp_type="residual", moe_residual_combine="sum") == (mlp_params, mlp_params, 2 * 16 * 24)
    shared = 16 * 10 + 10 + 10 * 16 + 16
    assert extra(moe_shared_expert_intermediate_size=10) == (shared, shared, 2 * 16 * 10)
    gated = extra(moe_shared_expert_intermediate_size=10, moe_shared_expert_gate=True)
    assert gated == (shared + 16, shared + 16, 2 * 16 * 10 + 16)
    narrow = 16 * 5 + 5 + 5 * 16 + 16
    assert extra(moe_ffn_hidden_size=5) == (4 * (narrow - mlp_params), 2 * (narrow - mlp_params), 2 * 2 * 16 * (5 - 24))
    latent = 6 * 24 + 24 + 24 * 6 + 6
    projections = 2 * 16 * 6
    assert extra(moe_latent_size=6) == (
        4 * (latent - mlp_params) + projections, 2 * (latent - mlp_params) + projections, 2 * 2 * (6 - 16) * 24 + projections,
    )  # fmt: skip


# ---------------------------------------------------------------- flags


def run_of(flags: str):
    return parse_args(f"--preset tiny --mock-data --train-iters 2 {flags}".split()).run


def test_each_spelling_of_an_activation_reaches_model_and_experts():
    for flags, name in (("", "gelu"), ("--swiglu", "swiglu"), ("--squared-relu", "squared_relu"), ("--activation-func relu", "relu"),
                        ("--activation-func swiglu --swiglu", "swiglu"), ("--squared_relu", "squared_relu")):  # fmt: skip
        model = run_of(f"{flags} --num-experts 4").model
        assert model.activation == name
        gpt = GPT(model, MoEConfig(num_experts=(4,)), VOCAB)
        assert {m.activation for m in gpt.modules() if hasattr(m, "activation")} == {name}
        assert all((m.experts.w_gate is not None) == (name == "swiglu") for m in moe_layers(gpt))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--swiglu --squared-relu", "asked to be squared_relu and swiglu; keep one of"),
        ("--swiglu --activation-func relu", "asked to be relu and swiglu; keep one of"),
        ("--mlp-type residual --moe-shared-expert-intermediate-size 8", r"intermediate-size \(8\) both put a dense MLP beside"),
        ("--moe-shared-expert-gate", "needs a shared expert; give --moe-shared-expert-intermediate-size"),
        ("--mlp-type standard --moe-residual-combine sum", "is about the MLP of --mlp-type residual; add that"),
        ("--moe-pad-expert-input-to-capacity --moe-token-dispatcher allgather", "use alltoall or auto"),
        ("--moe-shared-expert-intermediate-size 7 --tensor-model-parallel-size 2", r"size \(7\) must be divisible .*use 6 or TP 1, 7"),
        ("--moe-latent-size 0", "must be at least 1, not 0"),
        ("--moe-ffn-hidden-size 0", "must be at least 1, not 0"),
        ("--moe-shared-expert-intermediate-size 0", "must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_with_what_to_change(flags, message):
    with pytest.raises(ConfigError, match=message):
        run_of(f"--num-experts 4 {flags}")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--squared-relu", {"activation_func"}),
        ("--mlp-type residual --moe-residual-combine sum", {"mlp_type", "moe_residual_combine"}),
        ("--moe-ffn-hidden-size 20", {"moe_ffn_hidden_size"}),
        ("--moe-shared-expert-intermediate-size 8", {"moe_shared_expert_intermediate_size"}),
        (
            "--moe-shared-expert-intermediate-size 8 --moe-shared-expert-gate",
            {"moe_shared_expert_intermediate_size", "moe_shared_expert_gate"},
        ),
        ("--moe-latent-size 8", {"moe_latent_size"}),
        ("--moe-pad-expert-input-to-capacity", set()),
    ],
)
def test_checkpoints_of_other_weights_are_another_architecture_and_older_ones_still_fit(flags, names):
    plain, other = (run_of(f"--num-experts 4 --mlp-type standard {f}").architecture(VOCAB) for f in ("", flags))
    assert {n for n in plain | other if plain.get(n) != other.get(n)} == names
    assert (
        not {"activation_func", "squared_relu", *(n for n in plain if n.startswith("moe_"))} & plain.keys()
    )  # as it was before these flags


def test_an_expert_width_equal_to_the_default_is_no_other_architecture():
    width = run_of("--num-experts 4").model.ffn_size
    assert run_of(f"--num-experts 4 --moe-ffn-hidden-size {width}").architecture(VOCAB) == run_of("--num-experts 4").architecture(VOCAB)


def test_the_log_names_the_kind_of_experts():
    assert kind_of_experts(run_of("--num-experts 4 --mlp-type standard --ffn-hidden-size 64")) == "width 64"
    flags = "--num-experts 4 --mlp-type standard --moe-ffn-hidden-size 20 --moe-latent-size 8 --moe-shared-expert-intermediate-size 10"
    assert kind_of_experts(run_of(f"{flags} --moe-shared-expert-gate")) == "width 20, latent 8, gated shared expert of width 10"
    residual = "--num-experts 4 --mlp-type residual --ffn-hidden-size 64 --moe-residual-combine"
    assert kind_of_experts(run_of(f"{residual} sum")) == "width 64, residual (sum)"
    assert kind_of_experts(run_of(f"{residual} coefficient")) == "width 64, residual (coefficient)"


def test_initial_weights_that_write_to_the_stream_are_smaller():
    gpt = build(moe_latent_size=6, moe_shared_expert_intermediate_size=100)
    block, std = gpt.layers["2"], 0.4
    assert block.moe.latent_down.weight.std().item() == pytest.approx(std, rel=0.2)
    assert block.moe.latent_up.weight.std().item() == pytest.approx(std / 2, rel=0.25)  # 2 layers: sqrt(4)
    assert block.shared_expert.fc2.weight.std().item() == pytest.approx(std / 2, rel=0.1)
