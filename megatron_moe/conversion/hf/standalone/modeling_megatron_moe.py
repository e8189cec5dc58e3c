"""A GPT with mixture-of-experts layers that were trained with megatron_moe: plain PyTorch, with a cache of keys and values.

Attention, then an MLP, experts, or both, each with a norm before it and added to the stream. Experts may differ in number from layer to
layer (Pyramid-MoE), have a dense MLP beside them (Residual-MoE, arXiv 2201.05596) or a shared expert, and work in a narrower width. Nothing
is dropped and nothing is drawn: this is the model in evaluation.
"""
# B batch, S new tokens, K all tokens, D hidden, H query heads, G key/value heads, h head width, T tokens (B*S), E experts, F inner width

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_megatron_moe import MegatronMoEConfig


def build_norm(config, width=None):
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(width or config.hidden_size, eps=config.norm_eps)


def activate(name, h, gate):
    if name == "swiglu":
        return F.silu(gate) * h
    if name == "squared_relu":
        return F.relu(h).square()
    return F.relu(h) if name == "relu" else F.gelu(h, approximate="tanh" if name == "gelu_tanh" else "none")


def rotate(x_BHSh, positions_BS, base):
    """Pairs (x[i], x[i + h/2]) by position * base^(-2i/h)."""
    half = x_BHSh.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x_BHSh.device, dtype=torch.float32) / half)
    angle = positions_BS[:, None, :, None] * frequency
    a, b = x_BHSh.float().chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1).to(x_BHSh.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        D, self.head_dim, self.layer_index = config.hidden_size, config.head_dim, layer_index
        q_width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        has_bias = config.use_bias or config.qkv_bias
        self.rotary_base = config.rotary_base if config.position_embedding_type == "rope" else None
        self.q_proj = nn.Linear(D, q_width, bias=has_bias)
        self.k_proj = nn.Linear(D, kv_width, bias=has_bias)
        self.v_proj = nn.Linear(D, kv_width, bias=has_bias)
        self.out_proj = nn.Linear(q_width, D, bias=config.use_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            widths = (self.head_dim, self.head_dim) if self.qk_norm == "head" else (q_width, kv_width)
            self.q_norm, self.k_norm = (build_norm(config, width) for width in widths)

    def forward(self, x_BSD, positions_BS, mask, cache):
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.qk_norm == "hidden":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_base is not None:
            q, k = rotate(q, positions_BS, self.rotary_base), rotate(k, positions_BS, self.rotary_base)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        y_BHSh = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y_BHSh.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.hidden_size, width, bias=config.use_bias)
        self.fc_gate = nn.Linear(config.hidden_size, width, bias=config.use_bias) if config.activation == "swiglu" else None
        self.fc2 = nn.Linear(width, config.hidden_size, bias=config.use_bias)

    def forward(self, x):
        return self.fc2(activate(self.activation, self.fc1(x), None if self.fc_gate is None else self.fc_gate(x)))


class Gate(nn.Module):
    """Experts and gate weights of each token. float32: close scores must not tie."""

    def __init__(self, config, num_experts):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32) if config.expert_bias else None)

    def forward(self, x_TD):
        c = self.config
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.softmax(-1) if c.score_function == "softmax" else logits_TE.sigmoid()
        ranks_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
        if c.n_group:
            ranks_TE = self.of_best_groups(ranks_TE)
        ids_TK = ranks_TE.topk(c.num_experts_per_tok, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if c.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).eps)
        return ids_TK, weights_TK * c.routed_scaling_factor

    def of_best_groups(self, ranks_TE):
        """-inf outside of a token's best groups; a group counts as much as its `group_best` best experts together."""
        c = self.config
        by_group = ranks_TE.unflatten(1, (c.n_group, -1))
        group_TN = by_group.topk(c.group_best, dim=-1).values.sum(-1)
        keep_TN = torch.zeros_like(group_TN, dtype=torch.bool).scatter(1, group_TN.topk(c.topk_group, dim=-1).indices, True)
        return by_group.masked_fill(~keep_TN[..., None], float("-inf")).flatten(1)


class Experts(nn.Module):
    """Stacked weights; the gate weight is applied between the two products."""

    def __init__(self, config, num_experts):
        super().__init__()
        D, width, bias, is_gated = (
            config.latent_size or config.hidden_size,
            config.moe_intermediate_size,
            config.use_bias,
            config.activation == "swiglu",
        )
        self.activation = config.activation
        self.w1 = nn.Parameter(torch.empty(num_experts, D, width))
        self.w_gate = nn.Parameter(torch.empty(num_experts, D, width)) if is_gated else None
        self.w2 = nn.Parameter(torch.empty(num_experts, width, D))
        self.b1 = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.b_gate = nn.Parameter(torch.empty(num_experts, width)) if bias and is_gated else None
        self.b2 = nn.Parameter(torch.empty(num_experts, D)) if bias else None

    def forward(self, x_TD, ids_TK, weights_TK):
        y_TD = torch.zeros_like(x_TD)
        for e in ids_TK.unique().tolist():
            token_R, choice_R = (ids_TK == e).nonzero(as_tuple=True)
            x_RD, w_R1 = x_TD[token_R], weights_TK[token_R, choice_R, None].to(x_TD.dtype)
            gate = None if self.w_gate is None else self.linear(x_RD, self.w_gate, self.b_gate, e)
            h_RF = activate(self.activation, self.linear(x_RD, self.w1, self.b1, e), gate) * w_R1
            out_RD = h_RF @ self.w2[e]
            y_TD = y_TD.index_add(0, token_R, out_RD if self.b2 is None else out_RD + w_R1 * self.b2[e])
        return y_TD

    @staticmethod
    def linear(x, w, b, e):
        return x @ w[e] if b is None else x @ w[e] + b[e]


class MoELayer(nn.Module):
    def __init__(self, config, num_experts):
        super().__init__()
        self.gate = Gate(config, num_experts)
        latent, D = config.latent_size, config.hidden_size
        self.latent_down = nn.Linear(D, latent, bias=False) if latent else None
        self.latent_up = nn.Linear(latent, D, bias=False) if latent else None
        self.experts = Experts(config, num_experts)

    def forward(self, x_TD):
        ids_TK, weights_TK = self.gate(x_TD)
        y_TD = self.experts(x_TD if self.latent_down is None else self.latent_down(x_TD), ids_TK, weights_TK)
        return y_TD if self.latent_up is None else self.latent_up(y_TD)


class Block(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        num_experts, D = config.experts_per_layer[layer_index], config.hidden_size
        is_moe, shared = num_experts > 1, config.shared_expert_intermediate_size
        self.attn_norm, self.attn, self.mlp_norm = build_norm(config), Attention(config, layer_index), build_norm(config)
        self.mlp = MLP(config, config.intermediate_size) if not is_moe or config.residual else None
        self.moe = MoELayer(config, num_experts) if is_moe else None
        self.coefficient = nn.Linear(D, 2) if is_moe and config.residual == "coefficient" else None
        self.shared_expert = MLP(config, shared) if is_moe and shared else None
        self.shared_expert_gate = nn.Linear(D, 1, bias=False) if is_moe and config.shared_expert_gate else None

    def forward(self, x_BSD, positions_BS, mask, cache):
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), positions_BS, mask, cache)
        return x_BSD + self.feed_forward(self.mlp_norm(x_BSD))

    def feed_forward(self, h_BSD):
        if self.moe is None:
            return self.mlp(h_BSD)
        y_BSD = self.moe(h_BSD.flatten(0, 1)).view_as(h_BSD)
        if self.coefficient is not None:
            c_BS2 = self.coefficient(h_BSD).softmax(-1)
            y_BSD = y_BSD * c_BS2[..., :1] + self.mlp(h_BSD) * c_BS2[..., 1:]
        elif self.mlp is not None:
            y_BSD = y_BSD + self.mlp(h_BSD)
        if self.shared_expert is not None:
            shared_BSD = self.shared_expert(h_BSD)
            y_BSD = y_BSD + (shared_BSD if self.shared_expert_gate is None else shared_BSD * self.shared_expert_gate(h_BSD).sigmoid())
        return y_BSD


class MegatronMoEPreTrainedModel(PreTrainedModel):
    config_class = MegatronMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["expert_bias"]
    _supports_sdpa = True

    def _init_weights(self, module):
        std = self.config.initializer_range
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and not name.startswith("b"):
                nn.init.normal_(parameter, std=std)
            elif name == "weight":
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)
        for buffer in module.buffers(recurse=False):
            nn.init.zeros_(buffer)


class MegatronMoEModel(MegatronMoEPreTrainedModel):
    """Tokens -> hidden states behind the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        is_learned = config.position_embedding_type == "learned_absolute"
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size) if is_learned else None
        self.layers = nn.ModuleDict({str(i + 1): Block(config, i) for i in range(config.num_hidden_layers)})
        self.norm = build_norm(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def forward(self, x_BSD, positions_BS, mask, cache):
        if self.position_embedding is not None:
            x_BSD = x_BSD + self.position_embedding(positions_BS)
        for block in self.layers.values():
            x_BSD = block(x_BSD, positions_BS, mask, cache)
        return self.norm(x_BSD)


class MegatronMoEForCausalLM(MegatronMoEPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = MegatronMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
                use_cache=None, logits_to_keep=0, **kwargs):  # fmt: skip
        """labels: those of the same places; the shift is made here. -100 is ignored."""
        x_BSD = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        B, S = x_BSD.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(past, past + S, device=x_BSD.device)[None].expand(B, S)
        mask = self.visible(attention_mask, past, S, x_BSD.device)
        h_BSD = self.model(x_BSD, position_ids, mask, past_key_values if use_cache else None)
        kept = h_BSD[:, -logits_to_keep:] if isinstance(logits_to_keep, int) and logits_to_keep else h_BSD
        logits_BSV = self.lm_head(kept)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, past_key_values=past_key_values if use_cache else None)

    @staticmethod
    def visible(attention_mask, past, S, device):
        """bool [1 or B, 1, S, past + S]: not ahead, and not what is padding; a token of padding sees itself, so that no row is empty."""
        place_S, place_K = torch.arange(past, past + S, device=device), torch.arange(past + S, device=device)
        mask = (place_K[None, :] <= place_S[:, None])[None, None]
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = mask & attention_mask[:, None, None, : past + S].bool() | (place_K[None, :] == place_S[:, None])
        return mask
