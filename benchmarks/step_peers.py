"""Training steps of other libraries for benchmarks/step.py: with the weights, the batch and the settings of ours, of which nothing is kept.

Each is written as one would write it with that library: forward, loss, backward, clipping by torch, torch's fused AdamW.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.product import Training, one_rank
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.optimizer.groups import weight_decay_groups

Loss = Callable[[nn.Module, Batch], Tensor]


@contextlib.contextmanager
def their_system(library: str, variant: tuple[str, ...], compiled: bool, keeps_memory: bool, flags: str) -> Iterator[Callable[[], float]]:
    """`library`: a key of LIBRARIES; `variant`: what its function takes beside our run and weights. `keeps_memory`: with the allocator
    set as our runs on a CPU set it (utils/host_memory.py); otherwise as it comes, which is how their users run."""
    as_it_comes = mock.patch("megatron_moe.training.distributed.keep_freed_memory")
    with contextlib.nullcontext() if keeps_memory else as_it_comes, one_rank(flags) as (world, mesh):
        ours = Training(flags, world, mesh)
        whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in ours.model.named_parameters()}
        config, (batch,) = ours.config, ours.next_batches()
        size = sum(p.numel() for p in whole.values())
        del ours
        model, loss = LIBRARIES[library](config, len(whole["embedding.weight"]), whole, *variant)
        del whole
        theirs = sum(p.numel() for p in model.parameters())
        assert theirs == size, f"{library} has {theirs} parameters, ours {size}"
        yield step_of(model.train(), loss, config, batch, compiled)


def step_of(model: nn.Module, loss_of: Loss, config: RunConfig, batch: Batch, compiled: bool) -> Callable[[], float]:
    """Forward, backward, clip and AdamW; the groups and settings are ours."""
    o = config.optimizer
    groups = weight_decay_groups(model, o.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps, fused=True)
    parameters = list(model.parameters())
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.training.bf16):
            loss = loss_of(forward, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, o.clip_grad, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


# ---------------------------------------------------------------- transformers


def _of_transformers(model: nn.Module, batch: Batch) -> Tensor:
    return model(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels).loss


def mixtral_of_transformers(
    config: RunConfig, vocab_size: int, ours: dict[str, Tensor], attention: str, experts: str
) -> tuple[nn.Module, Loss]:
    import transformers

    m = config.model
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=vocab_size, hidden_size=m.hidden_size, intermediate_size=m.ffn_size, num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads, num_key_value_heads=m.key_value_heads, head_dim=m.head_dim,
        max_position_embeddings=m.max_position_embeddings, rms_norm_eps=m.layernorm_epsilon, attention_dropout=0.0,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": m.rotary_base}, bos_token_id=None,
        eos_token_id=None, num_local_experts=config.moe.num_experts[0], num_experts_per_tok=config.moe.topk, use_cache=False,
        attn_implementation=attention, experts_implementation=experts,
    ))  # fmt: skip
    model.load_state_dict(mixtral_weights(ours, m.num_layers))
    return model, _of_transformers


def mixtral_weights(ours: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Our parameters by name -> those of MixtralForCausalLM."""
    weights = {
        "lm_head.weight": ours["head.weight"],
        "model.norm.weight": ours["norm.weight"],
        "model.embed_tokens.weight": ours["embedding.weight"],
    }
    for i in range(num_layers):
        a, b = f"layers.{i + 1}.", f"model.layers.{i}."
        e = a + "moe.experts."
        weights |= {
            b + "input_layernorm.weight": ours[a + "attn_norm.weight"], b + "post_attention_layernorm.weight": ours[a + "mlp_norm.weight"],
            b + "mlp.gate.weight": ours[a + "moe.gate.weight"],
            # their stacks are transposed, with gate and value in one
            b + "mlp.experts.gate_up_proj": torch.cat([ours[e + "w_gate"], ours[e + "w1"]], dim=2).transpose(1, 2),
            b + "mlp.experts.down_proj": ours[e + "w2"].transpose(1, 2),
        }  # fmt: skip
        for x, y in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
            weights[f"{b}self_attn.{y}.weight"] = ours[f"{a}attn.{x}.weight"]
    return weights


def gpt2_of_transformers(config: RunConfig, vocab_size: int, ours: dict[str, Tensor], attention: str) -> tuple[nn.Module, Loss]:
    import transformers

    m = config.model
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=m.max_position_embeddings, n_embd=m.hidden_size, n_layer=m.num_layers, n_head=m.num_attention_heads,
        n_inner=m.ffn_size, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        layer_norm_epsilon=m.layernorm_epsilon, bos_token_id=None, eos_token_id=None, attn_implementation=attention,
    ))  # fmt: skip
    weights = {"transformer.wte.weight": ours["embedding.weight"], "lm_head.weight": ours["embedding.weight"],
               "transformer.wpe.weight": ours["position_embedding.weight"]}  # fmt: skip
    named = [("transformer.ln_f", "norm", False)]
    for i in range(m.num_layers):
        a, b = f"layers.{i + 1}.", f"transformer.h.{i}."
        named += [(b + "ln_1", a + "attn_norm", False), (b + "ln_2", a + "mlp_norm", False), (b + "attn.c_proj", a + "attn.out_proj", True),
                  (b + "mlp.c_fc", a + "mlp.fc1", True), (b + "mlp.c_proj", a + "mlp.fc2", True)]  # fmt: skip
        for part in ("weight", "bias"):
            joined = torch.cat([ours[f"{a}attn.{x}_proj.{part}"] for x in "qkv"])
            weights[f"{b}attn.c_attn.{part}"] = joined.t() if part == "weight" else joined
    for theirs, name, is_transposed in named:  # their Conv1D has weights the other way round
        weights[theirs + ".weight"] = ours[name + ".weight"].t() if is_transposed else ours[name + ".weight"]
        weights[theirs + ".bias"] = ours[name + ".bias"]
    model.load_state_dict(weights)
    return model, _of_transformers


# ---------------------------------------------------------------- torchtitan


def mixtral_of_torchtitan(config: RunConfig, vocab_size: int, ours: dict[str, Tensor]) -> tuple[nn.Module, Loss]:
    """Its Qwen3 decoder without norms of queries and keys, which is a Mixtral. Experts are computed in bf16 whatever the weights are."""
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_gqa_config, make_moe_config, make_routed_experts_config, make_router_config
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock

    m, E, K = config.model, config.moe.num_experts[0], config.moe.topk
    norm = RMSNorm.Config(normalized_shape=m.hidden_size, eps=m.layernorm_epsilon)

    def block():
        return Qwen3TransformerBlock.Config(
            attention_norm=norm, ffn_norm=norm,
            attention=make_gqa_config(
                dim=m.hidden_size, n_heads=m.num_attention_heads, n_kv_heads=m.key_value_heads, head_dim=m.head_dim, wqkv_param_init={},
                wo_param_init={}, inner_attention=ScaledDotProductAttention.Config(), fuse_qkv=True,
                rope=CosSinRoPE.Config(dim=m.head_dim, max_seq_len=m.max_position_embeddings, theta=m.rotary_base),
            ),
            moe=make_moe_config(
                num_experts=E, load_balance_coeff=None,
                router=make_router_config(dim=m.hidden_size, num_experts=E, gate_param_init={}, top_k=K, score_func="softmax", route_norm=True),
                routed_experts=make_routed_experts_config(
                    dim=m.hidden_size, hidden_dim=m.ffn_size, num_experts=E, top_k=K, param_init={}, comm_backend="standard"
                ),
            ),
        )  # fmt: skip

    model = Qwen3Model.Config(
        dim=m.hidden_size, vocab_size=vocab_size, norm=norm, layers=[block() for _ in range(m.num_layers)],
        tok_embeddings=Embedding.Config(num_embeddings=vocab_size, embedding_dim=m.hidden_size),
        lm_head=Linear.Config(in_features=m.hidden_size, out_features=vocab_size),
    ).build()  # fmt: skip
    weights = {"tok_embeddings.weight": ours["embedding.weight"], "norm.weight": ours["norm.weight"], "lm_head.weight": ours["head.weight"]}
    for i in range(m.num_layers):
        a, b = f"layers.{i + 1}.", f"layers.{i}."
        inner, e = b + "moe.routed_experts.inner_experts.", a + "moe.experts."
        weights |= {
            b + "attention_norm.weight": ours[a + "attn_norm.weight"], b + "ffn_norm.weight": ours[a + "mlp_norm.weight"],
            b + "attention.wo.weight": ours[a + "attn.out_proj.weight"], b + "moe.router.gate.weight": ours[a + "moe.gate.weight"],
            inner + "w1_EFD": ours[e + "w_gate"].transpose(1, 2), inner + "w3_EFD": ours[e + "w1"].transpose(1, 2),
            inner + "w2_EDF": ours[e + "w2"].transpose(1, 2),
        }  # fmt: skip
        weights |= {f"{b}attention.qkv_linear.w{x}.weight": ours[f"{a}attn.{x}_proj.weight"] for x in "qkv"}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(n.endswith("tokens_per_expert_E") for n in missing), (missing, unexpected)

    def loss(forward: nn.Module, batch: Batch) -> Tensor:  # as its cross_entropy_loss, per token
        return F.cross_entropy(forward(batch.tokens).flatten(0, 1).float(), batch.labels.flatten())

    return model, loss


LIBRARIES: dict[str, Callable[..., tuple[nn.Module, Loss]]] = {
    "transformers mixtral": mixtral_of_transformers, "transformers gpt2": gpt2_of_transformers, "torchtitan mixtral": mixtral_of_torchtitan,
}  # fmt: skip
