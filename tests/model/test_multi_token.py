"""Multi-token prediction against a loop over places, finite differences, and what it must not change."""
# B batch, S sequence, D hidden, N modules, M = 1 + N predictions

import pytest
import torch
import torch.nn.functional as F
from test_gpt_model import MODERN, batch, build, config, experts

from megatron_moe.arguments import parse_args
from megatron_moe.data.batch import Batch, look_ahead
from megatron_moe.model.attention import Context
from megatron_moe.model.flops import flops_per_token, layer_flops, logit_flops, parameter_counts
from megatron_moe.model.loss import of_predictions, share_of_step, weighted_sum
from megatron_moe.moe.layer import moe_layers
from megatron_moe.utils.random import token_keys

EXACT = {"rtol": 0, "atol": 1e-10}
MODELS = {
    "tied": (config(mtp_num_layers=2), experts((4,), topk=2)),
    "untied": (config(mtp_num_layers=3, **MODERN), experts((4,), topk=2, expert_interval=1)),
    "dense": (config(mtp_num_layers=1, normalization="RMSNorm"), None),
}


def a_batch(segments=None, positions=None, mask=None) -> Batch:
    tokens, places, labels = batch()
    mask = torch.ones(tokens.shape) if mask is None else mask
    return Batch(tokens, labels, mask, places if positions is None else positions, segments, torch.arange(len(tokens)))


def norm(module, x):
    """By its formula."""
    if isinstance(module, torch.nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def losses_place_by_place(gpt, text):
    """-log p of token i + 1 + n at place i of module n, for one text [S + 1]; a place sees nothing but the places up to it."""
    length, losses = len(text) - 1, {}
    places = torch.arange(length)[None]
    h_SD = gpt.embed(text[None, :-1], Context(places))
    for block in gpt.layers.values():
        h_SD = block(h_SD, Context(places))
    h_SD = norm(gpt.norm, h_SD[0])
    matrix = (gpt.embedding if gpt.head is None else gpt.head).weight
    for n, module in enumerate(gpt.mtp.values(), start=1):
        merged, out = [], []
        for i in range(length):
            if i + n > length:
                break
            vector = gpt.embedding.weight[text[i + n]]
            both = torch.cat([norm(module.embedding_norm, vector), norm(module.hidden_norm, h_SD[i])])
            merged.append(torch.stack([row @ both for row in module.proj.weight]))
            seen = module.block(torch.stack(merged)[None], Context(places[:, : i + 1]))
            out.append(norm(module.norm, seen[0, -1]))
            if i + n + 1 <= length:
                losses[n, i] = -(matrix[: gpt.vocab_size] @ out[-1]).log_softmax(0)[text[i + 1 + n]]
        h_SD = torch.stack(out)
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_every_module_predicts_what_a_loop_over_places_says(name):
    gpt, b = build(*MODELS[name]), a_batch()
    ahead = look_ahead(b, len(gpt.mtp))
    with torch.no_grad():
        losses_BMS = gpt(b.tokens, b.position_ids, ahead.labels)
        torch.testing.assert_close(losses_BMS[:, 0], gpt(b.tokens, b.position_ids, b.labels), **EXACT)
        for s, (tokens, labels) in enumerate(zip(b.tokens, b.labels)):
            expected = losses_place_by_place(gpt, torch.cat([tokens, labels[-1:]]))
            counted = {(n, i) for n, i in ahead.loss_mask[s].nonzero().tolist() if n}
            assert counted == set(expected)
            for (n, i), loss in expected.items():
                torch.testing.assert_close(losses_BMS[s, n, i], loss, **EXACT)


def test_losses_beside_logits_and_in_chunks_are_the_same():
    gpt, b = build(*MODELS["tied"]), a_batch()
    labels = look_ahead(b, 2).labels
    with torch.no_grad():
        whole = gpt(b.tokens, b.position_ids, labels)
        further, logits = gpt(b.tokens, b.position_ids, labels, with_logits=True)
        torch.testing.assert_close(further, whole[:, 1:], **EXACT)
        torch.testing.assert_close(logits, gpt(b.tokens, b.position_ids), **EXACT)
        gpt.loss_chunk_size = 8
        torch.testing.assert_close(gpt(b.tokens, b.position_ids, labels), whole, **EXACT)


def objective(gpt, b, divisor):
    losses = gpt(b.tokens, b.position_ids, b.labels, b.segment_ids)
    return weighted_sum(gpt.config, share_of_step(losses, b.loss_mask, divisor))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_parameter_are_those_of_finite_differences(name):
    gpt = build(*MODELS[name]).eval()  # no auxiliary loss, which is no part of the objective
    with torch.no_grad():
        for moe in moe_layers(gpt):
            moe.gate.weight.mul_(20.0)  # no choice changes within the step
    b = look_ahead(a_batch(mask=(torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) > 0.3).float()), len(gpt.mtp))
    divisor = of_predictions(b.loss_mask.double())
    objective(gpt, b, divisor).backward()
    generator, eps = torch.Generator().manual_seed(4), 1e-6
    for parameter_name, p in gpt.named_parameters():
        way = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * eps * way)
                sides.append(objective(gpt, b, divisor))
                p.sub_(sign * eps * way)
        slope, expected = (sides[0] - sides[1]) / (2 * eps), (p.grad * way).sum()
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=parameter_name: f"{n}: {m}")


def test_objective_is_the_next_token_and_the_factor_times_the_mean_of_the_others():
    c = config(mtp_num_layers=2, mtp_loss_scaling_factor=0.3)
    assert float(weighted_sum(c, torch.tensor([5.0, 1.0, 2.0]))) == pytest.approx(5 + 0.3 * 1.5)
    assert float(weighted_sum(config(), torch.tensor(5.0))) == 5.0
    losses, mask = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]]), torch.tensor([[[1.0, 1, 0], [0, 1, 0]]])
    assert share_of_step(losses, mask, torch.tensor([2.0, 4.0])).tolist() == [1.5, 1.25]


def test_a_loss_ahead_depends_on_no_token_of_another_document():
    gpt = build(config(mtp_num_layers=2, **MODERN), experts(expert_interval=1))
    segments = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3] * 2)
    b = look_ahead(a_batch(segments=segments), 2)
    losses = gpt(b.tokens, b.position_ids, b.labels, segments)
    embedded = []
    gpt.embedding.register_forward_hook(lambda _m, _i, out: embedded.append(out) or out.retain_grad())
    counted = (gpt(b.tokens, b.position_ids, b.labels, segments) * b.loss_mask)[:, 1:, :5]  # what is predicted from the first document
    counted.sum().backward()
    assert counted.ne(0).sum(-1).tolist() == [[4, 3]] * 2  # its last token alone is predicted on from within: to the first of the next
    assert embedded[0].grad[:, 5:].abs().max() == 0  # what the model reads
    for n in (1, 2):  # what the modules read from there on
        assert embedded[n].grad[:, :5].ne(0).any(-1).sum(-1).tolist() == [5 - n] * 2
        assert embedded[n].grad[:, 5:].abs().max() == 0
    assert torch.isfinite(losses).all()


def test_evaluation_and_generation_never_run_the_modules():
    gpt, b = build(*MODELS["tied"]), a_batch()

    def refuse(*_):
        raise AssertionError("a module of multi-token prediction ran")

    for module in gpt.mtp.values():
        module.register_forward_pre_hook(refuse)
    gpt(b.tokens, b.position_ids, b.labels)
    gpt(b.tokens, b.position_ids)
    with pytest.raises(AssertionError, match="multi-token"):
        gpt(b.tokens, b.position_ids, look_ahead(b, 2).labels)


def test_the_model_itself_starts_as_without_modules_and_draws_the_same_dropout():
    model, moe = config(hidden_dropout=0.3, mtp_num_layers=2), experts((4,), moe_noisy_gate_policy="Jitter")
    with_, without = build(model, moe), build(config(hidden_dropout=0.3), moe)
    for name, p in without.named_parameters():
        assert torch.equal(p, with_.get_parameter(name)), name
    b, keys = a_batch(), token_keys(1, 2, torch.arange(2), 12)
    losses = with_(b.tokens, b.position_ids, look_ahead(b, 2).labels, None, keys)
    torch.testing.assert_close(losses[:, 0], without(b.tokens, b.position_ids, b.labels, None, keys), **EXACT)


def test_dropout_of_what_a_module_reads_is_its_own():
    gpt = build(config(hidden_dropout=0.5, mtp_num_layers=2))
    keys, places = token_keys(1, 2, torch.arange(2), 12), torch.arange(12).expand(2, -1)
    same = torch.zeros(2, 12, dtype=torch.int64)
    contexts = [Context(places, keys_BS=keys), *(Context(places, keys_BS=keys).of_layer(2 + n) for n in (1, 2))]
    dropped = [gpt.embed_ahead(same, context) == 0 for context in contexts]
    assert all(0.3 < float(d.float().mean()) < 0.7 for d in dropped)
    assert not any(torch.equal(a, b) for a, b in ((dropped[0], dropped[1]), (dropped[1], dropped[2])))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_are_counted(name):
    model, moe = MODELS[name][0], MODELS[name][1] or experts((1,))
    gpt, counts = build(model, moe), parameter_counts(model, moe, 50)
    assert counts.mtp == sum(p.numel() for p in gpt.mtp.parameters())
    assert counts.total == sum(p.numel() for p in gpt.parameters())
    plain = config(**({} if name == "tied" else MODERN if name == "untied" else {"normalization": "RMSNorm"}))
    assert counts.active == parameter_counts(plain, moe, 50).active
    experts_of_last, n = moe.experts_per_layer(2)[-1], model.mtp_num_layers
    each = layer_flops(model, moe, experts_of_last, 12) + logit_flops(model, 50) + 3 * 2 * 2 * 16 * 16
    assert flops_per_token(model, moe, 12, 50) == flops_per_token(plain, moe, 12, 50) + n * each


def test_blocks_are_like_the_last_layer_and_numbered_on():
    gpt = build(config(num_layers=3, mtp_num_layers=2), experts((4, 8, 2), expert_interval=1))
    assert [(m.layer, m.num_experts) for m in moe_layers(gpt)] == [(1, 4), (2, 8), (3, 2), (4, 2), (5, 2)]
    assert all(b.moe is None for b in build(config(num_layers=3, mtp_num_layers=1), experts((4,))).blocks[2:])


def test_nothing_of_the_last_places_reaches_a_counted_loss():
    """At the end of a sequence tokens are made up: zeros."""
    gpt, b = build(*MODELS["tied"]), look_ahead(a_batch(), 2)
    changed = b.labels.clone()
    changed[:, 2, -2:] = 7  # of which the last place of [:, 1] is read by nobody who counts
    changed[:, 1, -1:] = 9
    with torch.no_grad():
        before, after = ((gpt(b.tokens, b.position_ids, labels) * b.loss_mask) for labels in (b.labels, changed))
    assert torch.equal(before, after)
    assert F.pad(torch.ones(2, 10), (0, 2)).equal(b.loss_mask[:, 2])


def test_the_module_of_deepseek_v3_has_the_published_size():
    """Its folder is said to hold 685B: 671B of the model and 14B of the module, token vectors and head in it once more."""
    run = parse_args(
        ["--preset", "deepseek-v3", "--mtp-num-layers", "1", "--mock-data", "--train-iters", "1", "--vocab-size", "129280"]
    ).run
    counts = parameter_counts(run.model, run.moe, 129280)
    assert counts.total - counts.mtp == pytest.approx(671e9, abs=0.5e9)
    assert counts.total + 2 * counts.head == pytest.approx(685e9, abs=0.6e9)
