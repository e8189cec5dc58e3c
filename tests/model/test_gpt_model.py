"""The model as a whole: names, counts, initial weights, what a logit may depend on, padding, tying, recomputation."""
# B batch, S sequence, D hidden

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.training import TrainingConfig
from megatron_moe.model.core import Context
from megatron_moe.model.flops import parameter_counts
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import build_on_meta, initialize_parameters
from megatron_moe.model.loss import mask_padding, token_losses
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.parallel.recompute import apply_recompute
from megatron_moe.utils.random import Purpose, dropout, stream, token_keys

B, S, VOCAB = 2, 12, 50
EXACT = {"rtol": 0, "atol": 1e-10}


def recomputed_by(granularity):
    return TrainingConfig(recompute_granularity=granularity).recomputed_modules


def config(**changes):
    settings = {
        "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24, "max_position_embeddings": 32,
        "make_vocab_size_divisible_by": 16, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return ModelConfig(**(settings | changes))


def experts(num_experts=(4,), **changes):
    return MoEConfig(num_experts=num_experts, **({"moe_token_dropping": False, "moe_loss_coeff": 0.01} | changes))


def build(model=None, moe=None, vocab=VOCAB, seed=3, std=0.3, dtype=torch.float64):
    """A model with weights large enough that every part of it shows in the output."""
    model = model or config()
    gpt = GPT(model, moe or MoEConfig(), vocab).to(dtype)
    initialize_parameters(gpt, seed, std, model.num_layers)
    return gpt


def batch(length=S, vocab=VOCAB, seed=0):
    tokens = torch.randint(0, vocab, (B, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], torch.arange(length).expand(B, length), tokens[:, 1:]


ROPE = {"position_embedding_type": "rope"}
MODERN = {
    "swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False, "num_key_value_heads": 2,
    "untie_embeddings_and_output_weights": True, **ROPE,
}  # fmt: skip
RESIDUAL = {"mlp_type": "residual"}


# ---------------------------------------------------------------- names and counts


def test_parameter_names_are_the_documented_ones():
    names = {n for n, _ in build(config(swiglu=True), experts(**RESIDUAL)).named_parameters()}
    attention = {f"attn.{p}_proj.{w}" for p in ("q", "k", "v", "out") for w in ("weight", "bias")}
    norms = {f"{n}.{w}" for n in ("attn_norm", "mlp_norm") for w in ("weight", "bias")}
    mlp = {f"mlp.{p}.{w}" for p in ("fc1", "fc_gate", "fc2") for w in ("weight", "bias")}
    moe = {"moe.gate.weight", *(f"moe.experts.{w}" for w in ("w1", "w_gate", "w2", "b1", "b_gate", "b2"))}
    coefficient = {"coefficient.weight", "coefficient.bias"}
    assert names == {
        "embedding.weight", "position_embedding.weight", "norm.weight", "norm.bias",
        *(f"layers.1.{n}" for n in attention | norms | mlp),
        *(f"layers.2.{n}" for n in attention | norms | mlp | moe | coefficient),
    }  # fmt: skip


def test_the_modern_variant_has_no_biases_no_positions_and_a_head():
    names = {n for n, _ in build(config(**MODERN), experts()).named_parameters()}
    assert not any(n.endswith(("bias", ".b1", ".b2", ".b_gate")) for n in names)
    assert "position_embedding.weight" not in names
    assert "head.weight" in names


@settings(max_examples=80, deadline=None)
@given(
    heads=st.sampled_from([(4, None), (4, 2), (4, 1), (6, 3)]),
    kv_channels=st.sampled_from([None, 6]),
    layers=st.sampled_from([2, 4]),
    flags=st.fixed_dictionaries({
        "activation_func": st.sampled_from(["gelu", "relu", "swiglu"]), "add_bias_linear": st.booleans(), "untie_embeddings_and_output_weights": st.booleans(),
        "normalization": st.sampled_from(["LayerNorm", "RMSNorm"]), "ffn_hidden_size": st.sampled_from([None, 20]),
        "position_embedding_type": st.sampled_from(["learned_absolute", "rope"]),
        "make_vocab_size_divisible_by": st.sampled_from([1, 16, 128]),
    }),
    moe=st.fixed_dictionaries({
        "num_experts": st.sampled_from([(1,), (2,), (4,), (2, 4), (1, 3)]),
        "topk": st.sampled_from([1, 2]), "expert_interval": st.sampled_from([1, 2]),
        "moe_ffn_hidden_size": st.sampled_from([None, 7]), "moe_latent_size": st.sampled_from([None, 10]),
    }),
    beside=st.sampled_from([
        {}, {"mlp_type": "residual"}, {"mlp_type": "residual", "moe_residual_combine": "sum"},
        {"moe_shared_expert_intermediate_size": 9}, {"moe_shared_expert_intermediate_size": 9, "moe_shared_expert_gate": True},
    ]),
    vocab=st.integers(1, 70),
)  # fmt: skip
def test_parameter_counts_equal_those_of_the_built_model(heads, kv_channels, layers, flags, moe, beside, vocab):
    model = ModelConfig(
        num_layers=layers, hidden_size=24, num_attention_heads=heads[0], num_key_value_heads=heads[1], kv_channels=kv_channels, **flags
    )
    if layers // moe["expert_interval"] % len(moe["num_experts"]):
        moe = moe | {"num_experts": moe["num_experts"][:1]}
    moe_config = MoEConfig(**moe, **beside)
    gpt = build_on_meta(lambda: GPT(model, moe_config, vocab), torch.float32)
    counts = parameter_counts(model, moe_config, vocab)
    assert counts.total == sum(p.numel() for p in gpt.parameters())
    idle = sum(p[0].numel() * (len(p) - moe["topk"]) for m in moe_layers(gpt) for p in m.experts.parameters())
    assert counts.active == counts.total - idle
    for block, layer in zip(gpt.layers.values(), counts.per_layer):
        assert layer.total == sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        {"qk_layernorm": True, "num_key_value_heads": 2}, {"qk_layernorm": True, "qk_layernorm_scope": "hidden", "num_key_value_heads": 2},
        {"add_qkv_bias": True, "num_key_value_heads": 1}, {"softmax_type": "learnable", "window_size": 3},
        *({"multi_latent_attention": True, "q_lora_rank": narrow, "kv_lora_rank": 7, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5,
           "position_embedding_type": "rope"} for narrow in (None, 9)),
    ],
)  # fmt: skip
def test_parameter_counts_of_kinds_of_attention_equal_those_of_the_built_model(kind, has_bias, normalization):
    model = ModelConfig(num_layers=2, hidden_size=24, num_attention_heads=4, normalization=normalization, add_bias_linear=has_bias, **kind)
    gpt = build_on_meta(lambda: GPT(model, MoEConfig(), 30), torch.float32)
    assert parameter_counts(model, MoEConfig(), 30).total == sum(p.numel() for p in gpt.parameters())


def test_every_expert_interval_th_layer_is_moe_and_pyramids_grow():
    gpt = build(config(num_layers=6), experts((2, 4, 8)))
    assert {n: b.moe.num_experts for n, b in gpt.layers.items() if b.moe is not None} == {"2": 2, "4": 4, "6": 8}
    gpt = build(config(num_layers=6), experts(expert_interval=3))
    assert [n for n, b in gpt.layers.items() if b.moe is not None] == ["3", "6"]
    assert all(b.mlp is None for b in gpt.layers.values() if b.moe is not None)
    gpt = build(config(), experts(expert_interval=1))
    assert [m.layer for m in moe_layers(gpt)] == [1, 2]  # their noise comes from the layer's number


# ---------------------------------------------------------------- initial weights


def test_initial_weights_do_not_depend_on_what_else_the_model_has():
    small, large = build(config(), experts()), build(config(num_layers=4), experts((4, 8), **RESIDUAL))
    large = dict(large.named_parameters())
    for name, p in small.named_parameters():
        if "out_proj" in name or "fc2" in name or name.endswith("experts.w2"):
            torch.testing.assert_close(p, large[name] * 2**0.5)  # scaled by depth, on purpose
        else:
            assert torch.equal(p, large[name]), name


def test_the_first_experts_of_a_larger_layer_are_those_of_a_smaller_one():
    few, many = (dict(build(moe=experts((n,))).named_parameters()) for n in (2, 8))
    for name in ("w1", "w2"):
        assert torch.equal(few[f"layers.2.moe.experts.{name}"], many[f"layers.2.moe.experts.{name}"][:2])


def test_initial_weights_change_with_the_seed_and_differ_between_parameters():
    a, b = build(seed=1), build(seed=2)
    drawn = [p for n, p in a.named_parameters() if p.ndim == 2]
    assert not any(torch.equal(p, dict(b.named_parameters())[n]) for n, p in a.named_parameters() if p.ndim == 2)
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn)


@pytest.mark.parametrize("identical", [False, True])
def test_experts_start_different_unless_asked_for_identical_ones(identical):
    gpt = GPT(config(swiglu=True), experts(), VOCAB)
    initialize_parameters(gpt, 1, 0.02, 2, identical_experts=identical)
    for name, p in gpt.layers["2"].moe.experts.named_parameters():
        if name.startswith("w"):
            assert all(torch.equal(p[0], p[e]) == identical for e in range(1, 4)), name


def test_initial_spread_is_std_and_smaller_where_the_residual_stream_is_written():
    model = config(num_layers=8, hidden_size=64, ffn_hidden_size=256, swiglu=True)
    gpt = build(model, experts(**RESIDUAL), std=0.02)
    for name, p in gpt.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias") or ".b" in name:
            assert not p.any(), name
        elif p.numel() > 1000:
            writes = name.endswith(("out_proj.weight", "fc2.weight", "experts.w2"))
            assert p.std().item() == pytest.approx(0.02 / 4 if writes else 0.02, rel=0.1), name
            assert abs(p.mean()) < 4 * p.std() / p.numel() ** 0.5, name


@pytest.mark.parametrize("identical", [False, True])
def test_a_layer_alone_is_initialised_expert_by_expert_too(identical):
    """Its names have no prefix: experts.w1, and a gate without dots."""
    layer = GPT(config(swiglu=True), experts(), VOCAB).layers["2"].moe
    initialize_parameters(layer, 1, 0.02, 8, identical_experts=identical)
    initialize_parameters(layer.gate, 1, 0.02, 8)
    assert torch.equal(layer.experts.w1[0], layer.experts.w1[1]) == identical
    assert layer.experts.w2.std().item() == pytest.approx(0.02 / 4, rel=0.1)


def test_float64_starts_from_the_same_numbers_as_float32():
    wide, narrow = build(moe=experts()), build(moe=experts(), dtype=torch.float32)
    assert all(torch.equal(a, b.double()) for a, b in zip(wide.parameters(), narrow.parameters()))


def test_building_on_meta_takes_no_memory_and_puts_the_default_dtype_back():
    gpt = build_on_meta(lambda: GPT(config(), experts(), VOCAB), torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in gpt.parameters())
    assert torch.get_default_dtype() == torch.float32


# ---------------------------------------------------------------- what a logit may depend on


VARIANTS = {
    "learned": ({}, MoEConfig()),
    "rope": (ROPE, MoEConfig()),
    "modern": (MODERN, experts(topk=2, moe_top2_2nd_expert_sampling=False)),
    "residual": ({}, experts(**RESIDUAL)),
}


@pytest.mark.parametrize(("model", "moe"), VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["fused", "explicit"])
def test_a_later_token_changes_no_earlier_logit(model, moe, dropout):
    gpt = build(config(**model, attention_dropout=dropout), moe)
    tokens, positions, _ = batch()
    keys = token_keys(1, 1, torch.arange(B), S)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = (gpt(t, positions, keys_BS=keys) for t in (tokens, changed))
    torch.testing.assert_close(before[:, :7], after[:, :7], **EXACT)
    assert ((before[:, 7:] - after[:, 7:]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize(("model", "moe"), VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["fused", "explicit"])
def test_packed_documents_equal_separate_runs(model, moe, dropout):
    gpt = build(config(**model, attention_dropout=dropout), moe)
    (a, _, _), (b, _, _) = batch(5), batch(7, seed=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(B, 12)
    segments = torch.tensor([0] * 5 + [1] * 7).expand(B, 12)
    keys = token_keys(1, 1, torch.arange(B), 12)
    packed = gpt(torch.cat([a, b], dim=1), positions, segments_BS=segments, keys_BS=keys)
    torch.testing.assert_close(packed[:, :5], gpt(a, torch.arange(5).expand(B, 5)), **EXACT)
    torch.testing.assert_close(packed[:, 5:], gpt(b, torch.arange(7).expand(B, 7)), **EXACT)


def test_residual_moe_mixes_experts_and_dense_mlp_by_a_softmax():
    block = build(moe=experts(**RESIDUAL)).layers["2"]
    x = torch.randn(B, S, 16, dtype=torch.float64)
    context = Context(torch.arange(S).expand(B, S))
    middle = x + block.attn(block.attn_norm(x), context)
    h = block.mlp_norm(middle)
    share = F.softmax(h @ block.coefficient.weight.t() + block.coefficient.bias, dim=-1)
    mixed = share[..., :1] * block.moe(h.flatten(0, 1)).view_as(h) + share[..., 1:] * block.mlp(h)
    torch.testing.assert_close(block(x, context), middle + mixed, **EXACT)


# ---------------------------------------------------------------- vocabulary


def test_padding_of_the_vocabulary_changes_no_loss_and_no_gradient():
    """50 tokens padded to 64 rows against exactly 50 rows."""
    padded, exact = build(vocab=VOCAB), build(config(make_vocab_size_divisible_by=1), vocab=VOCAB)
    assert (padded.embedding.weight.shape[0], exact.embedding.weight.shape[0]) == (64, 50)
    state = padded.state_dict()
    state["embedding.weight"] = state["embedding.weight"][:VOCAB].clone()
    exact.load_state_dict(state)
    with torch.no_grad():
        padded.embedding.weight[VOCAB:] = 1e3  # would win every softmax
    tokens, positions, labels = batch()
    losses = [gpt(tokens, positions, labels) for gpt in (padded, exact)]
    torch.testing.assert_close(*losses, **EXACT)
    for loss in losses:
        loss.sum().backward()
    torch.testing.assert_close(padded.embedding.weight.grad[:VOCAB], exact.embedding.weight.grad, **EXACT)
    assert not padded.embedding.weight.grad[VOCAB:].any()
    torch.testing.assert_close(padded.layers["1"].attn.q_proj.weight.grad, exact.layers["1"].attn.q_proj.weight.grad, **EXACT)


@pytest.mark.parametrize(("vocab", "first", "real"), [(50, 0, 6), (50, 48, 2), (50, 50, 0), (50, 64, 0), (50, 44, 6), (53, 48, 5)])
def test_padding_columns_are_masked_wherever_the_shard_begins(vocab, first, real):
    masked = mask_padding(torch.zeros(2, 6), vocab, first)
    assert (masked[:, :real] == 0).all()
    assert (masked[:, real:] == float("-inf")).all()


def test_losses_are_minus_log_probabilities_in_nats_and_at_least_float32():
    logits, labels = torch.randn(2, 3, 8), torch.tensor([[0, 1, 2], [3, 4, 5]])
    expected = -(logits[..., :6].double().softmax(-1).gather(-1, labels[..., None])[..., 0]).log()
    torch.testing.assert_close(token_losses(logits, labels, 6).double(), expected, rtol=1e-5, atol=1e-6)
    assert token_losses(logits.bfloat16(), labels, 6).dtype == torch.float32
    assert token_losses(logits.double(), labels, 6).dtype == torch.float64


def test_losses_equal_cross_entropy_of_the_logits():
    gpt, (tokens, positions, labels) = build(config(**MODERN), experts(topk=2)), batch()
    logits = gpt(tokens, positions)
    assert logits.shape == (B, S, 64)
    expected = F.cross_entropy(logits[..., :VOCAB].flatten(0, 1), labels.flatten(), reduction="none").view(B, S)
    torch.testing.assert_close(gpt(tokens, positions, labels), expected, **EXACT)


def test_a_tied_embedding_has_the_gradients_of_both_uses():
    tied, untied = build(), build(config(untie_embeddings_and_output_weights=True))
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
    tokens, positions, labels = batch()
    for gpt in (tied, untied):
        gpt(tokens, positions, labels).sum().backward()
    torch.testing.assert_close(tied.embedding.weight.grad, untied.embedding.weight.grad + untied.head.weight.grad, **EXACT)


# ---------------------------------------------------------------- recomputation

NOISY = {
    "random selection": {"moe_token_dropping": True, "moe_train_capacity_factor": 0.5},
    "jitter": {"moe_noisy_gate_policy": "Jitter"},
    "second expert": {"topk": 2},
    "residual": RESIDUAL,
}


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("moe", NOISY.values(), ids=NOISY.keys())
def test_recomputation_is_bit_equal_with_dropout_and_routing_noise_and_routes_once(granularity, moe):
    model = config(hidden_dropout=0.2, attention_dropout=0.2, swiglu=True)
    tokens, positions, labels = batch()
    keys = token_keys(1, 5, torch.arange(B), S)
    losses, gradients, statistics = [], [], []
    for recompute in (None, granularity):
        gpt = build(model, experts(**moe))
        if recompute:
            apply_recompute(gpt, recomputed_by(recompute))
        for layer in moe_layers(gpt):
            layer.loss_weight = 1.0 / (B * S)
        loss = gpt(tokens, positions, labels, keys_BS=keys)
        loss.sum().backward()
        losses.append(loss)
        gradients.append({n: p.grad for n, p in gpt.named_parameters()})
        statistics.append([layer.stats.vector(torch.device("cpu")) for layer in moe_layers(gpt)])
    assert torch.equal(*losses)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert all(torch.equal(a, b) for a, b in zip(*statistics))
    assert sum(v[:-5].sum() for v in statistics[1]) == B * S * (2 if moe.get("topk") == 2 else 1)


def test_full_recomputation_runs_the_experts_twice_and_the_gate_once():
    gpt, calls = build(moe=experts()), []
    apply_recompute(gpt, recomputed_by("full"))
    moe = gpt.layers["2"].moe
    moe.gate.register_forward_hook(lambda *_: calls.append("gate"))
    moe.experts.register_forward_hook(lambda *_: calls.append("experts"))
    gpt.layers["2"].attn.register_forward_hook(lambda *_: calls.append("attention"))
    tokens, positions, labels = batch()
    gpt(tokens, positions, labels).sum().backward()
    assert sorted(calls) == ["attention", "attention", "experts", "experts", "gate"]


def test_selective_recomputation_runs_attention_twice_and_nothing_else():
    gpt, calls = build(moe=experts()), []
    apply_recompute(gpt, recomputed_by("selective"))
    gpt.layers["2"].moe.experts.register_forward_hook(lambda *_: calls.append("experts"))
    gpt.layers["1"].mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    gpt.layers["1"].attn.register_forward_hook(lambda *_: calls.append("attention"))
    tokens, positions, labels = batch()
    gpt(tokens, positions, labels).sum().backward()
    assert sorted(calls) == ["attention", "attention", "experts", "mlp"]


@pytest.mark.parametrize(
    ("modules", "twice"),
    [
        (["moe"], {"experts"}),
        (["mlp"], {"mlp", "residual"}),
        (["core_attn", "moe"], {"attention", "experts"}),
        (["shared_experts"], {"shared"}),
    ],
    ids=lambda v: "-".join(sorted(v)),
)
def test_selective_recomputation_runs_the_named_modules_twice_and_never_the_router(modules, twice):
    shared = {"moe_shared_expert_intermediate_size": 8} if "shared" in twice else RESIDUAL
    gpt, calls = build(moe=experts(**shared)), []
    apply_recompute(gpt, TrainingConfig(recompute_granularity="selective", recompute_modules=tuple(modules)).recomputed_modules)
    dense, block = gpt.layers["1"], gpt.layers["2"]
    for name, module in {"attention": block.attn, "mlp": dense.mlp, "residual": block.mlp, "shared": block.shared_expert,
                         "experts": block.moe.experts, "gate": block.moe.gate}.items():  # fmt: skip
        if module is not None:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    tokens, positions, labels = batch()
    gpt(tokens, positions, labels).sum().backward()
    assert {name for name in calls if calls.count(name) == 2} == twice
    assert calls.count("gate") == 1


def test_moe_layer_recompute_adds_the_experts_to_whatever_is_recomputed():
    assert TrainingConfig(moe_layer_recompute=True).recomputed_modules == {"moe"}
    assert TrainingConfig(moe_layer_recompute=True, recompute_activations=True).recomputed_modules == {"core_attn", "moe"}


# ---------------------------------------------------------------- the loss in chunks of the vocabulary


@pytest.mark.parametrize("chunk", [7, 16, 49])
@pytest.mark.parametrize("is_tied", [True, False])
def test_losses_in_chunks_are_those_of_whole_logits(chunk, is_tied):
    tokens, positions, labels = batch()
    found = []
    for size in (0, chunk):
        gpt = build(config(untie_embeddings_and_output_weights=not is_tied))
        gpt.loss_chunk_size = size
        losses = gpt(tokens, positions, labels)
        (losses * torch.linspace(0, 1, losses.numel()).view_as(losses)).sum().backward()
        found.append({"losses": losses, **{n: p.grad for n, p in gpt.named_parameters()}})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, **EXACT, msg=name)


# ---------------------------------------------------------------- dropout and noise of the whole model


def test_the_loss_of_a_sample_does_not_depend_on_its_place_in_the_batch():
    gpt = build(config(hidden_dropout=0.2, attention_dropout=0.2), experts(topk=2))
    tokens, positions, labels = batch()
    samples, order = torch.tensor([4, 9]), torch.tensor([1, 0])
    losses = gpt(tokens, positions, labels, keys_BS=token_keys(1, 1, samples, S))
    swapped = gpt(tokens[order], positions, labels[order], keys_BS=token_keys(1, 1, samples[order], S))
    torch.testing.assert_close(swapped, losses[order], **EXACT)


@pytest.mark.parametrize("where", ["hidden_dropout", "attention_dropout"])
def test_each_dropout_changes_the_loss_and_changes_with_the_iteration(where):
    gpt, (tokens, positions, labels) = build(config(**{where: 0.2})), batch()
    quiet, one, again, two = (
        gpt(tokens, positions, labels, keys_BS=None if i is None else token_keys(1, i, torch.arange(B), S)) for i in (None, 1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, quiet)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("moe", [MoEConfig(), experts(), experts(**RESIDUAL)], ids=["dense", "experts", "residual"])
def test_logits_equal_the_model_written_out_with_every_dropout(moe):
    gpt, (tokens, positions, _) = build(config(hidden_dropout=0.3), moe), batch()
    keys = token_keys(1, 1, torch.arange(B), S)
    positions = positions + 3
    context = Context(positions, keys_BS=keys)

    def drop(x, layer, purpose):
        return dropout(x, 0.3, keys, stream(layer, purpose))

    x = drop(gpt.embedding.weight[tokens] + gpt.position_embedding.weight[positions], 0, Purpose.EMBEDDING_DROPOUT)
    for number, block in enumerate(gpt.layers.values(), start=1):
        x = x + drop(block.attn(block.attn_norm(x), context), number, Purpose.ATTENTION_OUTPUT_DROPOUT)
        h = block.mlp_norm(x)
        y = block.mlp(h) if block.mlp is not None else 0.0
        if block.moe is not None:
            routed = block.moe(h.flatten(0, 1), TokenInfo(keys.flatten())).view_as(h)
            share = block.coefficient(h).softmax(-1) if block.coefficient is not None else torch.ones(2).double()
            y = share[..., :1] * routed + share[..., 1:] * y
        x = x + drop(y, number, Purpose.MLP_OUTPUT_DROPOUT)
    torch.testing.assert_close(gpt(tokens, positions, keys_BS=keys), gpt.norm(x) @ gpt.embedding.weight.t(), **EXACT)
