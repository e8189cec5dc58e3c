"""What the network is: widths, depth, positions, norms, activations, initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, fields_of, flag, layer_pattern

# Settings that do something only beside another one: the switch, and whether it is on.
_SETTINGS_OF = {
    "--qk-layernorm": (("qk_layernorm_scope",), lambda m: m.qk_layernorm),
    "--window-size": (("window_attn_skip_freq",), lambda m: m.window_size is not None),
    "--position-embedding-type rope": (("rotary_percent", "rotary_interleaved"), lambda m: m.has_rope),
    "--rope-scaling-type linear, llama3 or yarn": (("rope_scaling_factor",), lambda m: m.rope_scaling_type != "none"),
    "--rope-scaling-type llama3 or yarn": (
        ("rope_original_max_position_embeddings",), lambda m: m.rope_scaling_type in ("llama3", "yarn")),
    "--rope-scaling-type llama3": (("rope_low_freq_factor", "rope_high_freq_factor"), lambda m: m.rope_scaling_type == "llama3"),
    "--rope-scaling-type yarn": (
        ("rope_beta_fast", "rope_beta_slow", "rope_mscale", "rope_mscale_all_dim", "rope_yarn_truncate"),
        lambda m: m.rope_scaling_type == "yarn"),
    "--multi-latent-attention": (
        ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"), lambda m: m.multi_latent_attention),
    "--mtp-num-layers": (("mtp_loss_scaling_factor",), lambda m: m.mtp_num_layers > 0),
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Model architecture."""

    num_layers: int = flag(12, "transformer layers", minimum=1)
    hidden_size: int = flag(768, "width of the residual stream", minimum=1)
    num_attention_heads: int = flag(12, "query heads", minimum=1)
    num_key_value_heads: int | None = flag(
        None, "key/value heads of grouped-query attention; every group of heads/kv-heads queries shares one",
        names=("num-query-groups",), minimum=1)  # fmt: skip
    kv_channels: int | None = flag(None, "width of one head; hidden size / heads when not given", minimum=1)
    ffn_hidden_size: int | None = flag(
        None, "inner width of the MLP and of each expert; 4 x hidden size, with --swiglu 8/3 x hidden size rounded down to 64",
        minimum=1)  # fmt: skip
    max_position_embeddings: int = flag(1024, "longest sequence the positions allow", minimum=1)
    position_embedding_type: Literal["learned_absolute", "rope"] = flag(
        "learned_absolute", "learned position vectors, or rotary positions in the attention"
    )
    use_rotary_position_embeddings: bool = flag(False, "same as --position-embedding-type rope")
    rotary_base: float = flag(
        10000.0, "base of the rotary frequencies (theta)", names=("rope-theta", "rotary-position-embeddings-theta"), above=0
    )
    rotary_percent: float = flag(1.0, "share of a head's channels that is rotated; the others carry no position", above=0, maximum=1)
    rotary_interleaved: bool = flag(
        False, "pairs that are rotated are neighbours (GPT-J, DeepSeek) instead of half the width apart (GPT-NeoX, Llama)"
    )
    rope_scaling_type: Literal["none", "linear", "llama3", "yarn"] = flag(
        "none", "make rotary positions reach further: linear divides all frequencies (arXiv 2306.15595), llama3 the slow ones (Llama 3.1), yarn "
        "the slow ones by a ramp, with sharper attention (arXiv 2309.00071)")  # fmt: skip
    rope_scaling_factor: float = flag(1.0, "how many times further", names=("rotary-scaling-factor",), minimum=1)
    rope_original_max_position_embeddings: int | None = flag(
        None, "length before scaling, by which llama3 and yarn tell slow frequencies from fast ones; --max-position-embeddings when not given",
        names=("original-max-position-embeddings",), minimum=1)  # fmt: skip
    rope_low_freq_factor: float = flag(1.0, "llama3: frequencies with fewer turns in the original length are divided", above=0)
    rope_high_freq_factor: float = flag(4.0, "llama3: frequencies with more turns stay; those between are blended", above=0)
    rope_beta_fast: float = flag(32.0, "yarn: frequencies with more turns in the original length stay", names=("beta-fast",), above=0)
    rope_beta_slow: float = flag(1.0, "yarn: frequencies with fewer turns are divided", names=("beta-slow",), above=0)
    rope_mscale: float = flag(
        1.0,
        "yarn: m of the factor 0.1 m ln(scaling factor) + 1 on rotated queries and keys; 1 is the paper's",
        names=("mscale",),
        minimum=0,
    )
    rope_mscale_all_dim: float = flag(
        0.0, "yarn: the same m for all channels: the square of its factor multiplies the scores, and rotated channels are divided by it "
        "(DeepSeek)", names=("mscale-all-dim",), minimum=0)  # fmt: skip
    rope_yarn_truncate: bool = flag(True, "yarn: the ramp begins and ends at whole channels; gpt-oss has it between them")
    qk_layernorm: bool = flag(False, "normalise queries and keys before they are rotated (arXiv 2010.04245)")
    qk_layernorm_scope: Literal["head", "hidden"] = flag(
        "head", "each head by itself, with one weight for all (Qwen3), or all heads together, with a weight for every channel (OLMoE)"
    )
    window_size: int | None = flag(
        None, "sliding window: a token sees itself and this many tokens less one before it (transformers' sliding_window; Megatron's "
        "--window-size L,0 is L + 1 here)", minimum=1)  # fmt: skip
    window_attn_skip_freq: tuple[int, ...] | None = flag(
        None, "layers without the window: one number N makes every N-th layer full, a list has 1 for each layer with the window and 0 for "
        "each without, also as ([1]*3+[0])*2; none when not given", parse=layer_pattern, metavar="N")  # fmt: skip
    softmax_type: Literal["vanilla", "learnable"] = flag(
        "vanilla", "learnable: a logit per head takes part in the softmax of attention and has no value (attention sinks, gpt-oss)"
    )
    multi_latent_attention: bool = flag(
        False, "keys and values of all heads come out of one narrow vector per token (MLA, arXiv 2405.04434)"
    )
    q_lora_rank: int | None = flag(
        None, "MLA: width of the narrow vector of queries; without one they come from the hidden state", minimum=1
    )
    kv_lora_rank: int = flag(512, "MLA: width of the narrow vector of keys and values", minimum=1)
    qk_head_dim: int = flag(128, "MLA: channels of a query and key that carry no position", minimum=1)
    qk_pos_emb_head_dim: int = flag(64, "MLA: channels beside them that are rotated; those of the keys are one for all heads", minimum=2)
    v_head_dim: int = flag(128, "MLA: channels of a value", minimum=1)
    normalization: Literal["LayerNorm", "RMSNorm"] = flag("LayerNorm", "normalisation layer")
    layernorm_epsilon: float = flag(1e-5, "epsilon inside the normalisation", names=("norm-epsilon",), above=0)
    activation_func: Literal["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"] = flag(
        "gelu", "activation of the MLP and the experts; gelu_tanh: GPT-2's approximation; squared_relu: max(x, 0)^2 (arXiv 2109.08668); "
        "swiglu: silu(gate) times value, with a matrix more (arXiv 2002.05202)")  # fmt: skip
    swiglu: bool = flag(False, "same as --activation-func swiglu")
    squared_relu: bool = flag(False, "same as --activation-func squared_relu")
    add_bias_linear: bool = flag(True, "bias vectors in the linear layers", negative=("disable-bias-linear",))
    add_qkv_bias: bool = flag(False, "bias vectors in the projections of queries, keys and values, whatever the others have (Qwen2)")
    untie_embeddings_and_output_weights: bool = flag(False, "give the output layer a weight of its own")
    hidden_dropout: float = flag(0.1, "dropout on the output of attention and MLP", minimum=0, maximum=0.999)
    attention_dropout: float = flag(
        0.1, "dropout on attention probabilities (takes the explicit, slower attention)", minimum=0, maximum=0.999
    )
    init_method_std: float = flag(0.02, "standard deviation of the initial weights; larger models want a smaller one", above=0)
    make_vocab_size_divisible_by: int = flag(
        128, "pad the vocabulary to a multiple of this; never depends on the parallel layout", minimum=1
    )
    vocab_size: int | None = flag(None, "vocabulary before padding; the tokenizer's when not given", minimum=1)
    mtp_num_layers: int = flag(
        0, "multi-token prediction: this many modules behind the last layer, each of which predicts one token further ahead while training "
        "(DeepSeek-V3, arXiv 2412.19437 section 2.2); evaluation and generation leave them out", minimum=0)  # fmt: skip
    mtp_loss_scaling_factor: float = flag(0.1, "weight of the mean of the losses of --mtp-num-layers modules", minimum=0)

    def __post_init__(self) -> None:
        if self.use_rotary_position_embeddings:
            object.__setattr__(self, "position_embedding_type", "rope")
        if isinstance(self.window_attn_skip_freq, int):
            object.__setattr__(self, "window_attn_skip_freq", (self.window_attn_skip_freq,))
        checked(self)

    def problems(self) -> Iterator[str]:
        heads, groups = self.num_attention_heads, self.key_value_heads
        if self.kv_channels is None and self.hidden_size % heads and not self.multi_latent_attention:
            yield (f"--hidden-size ({self.hidden_size}) must be divisible by --num-attention-heads ({heads}), "
                   f"or give --kv-channels")  # fmt: skip
        if heads % groups:
            yield (f"--num-attention-heads ({heads}) must be divisible by --num-key-value-heads ({groups}); "
                   f"use one of {divisors(heads)}")  # fmt: skip
        asked = {a for a in (self.activation_func, *self._activation_switches()) if a != "gelu"}
        if len(asked) > 1:
            yield f"the activation is asked to be {' and '.join(sorted(asked))}; keep one of --activation-func, --swiglu and --squared-relu"
        yield from self._rope_problems()
        yield from self._latent_problems()
        pattern = self.window_attn_skip_freq
        if pattern is not None and len(pattern) == 1 and pattern[0] < 1:
            yield f"--window-attn-skip-freq ({pattern[0]}) must be at least 1: every N-th layer is without the window"
        elif pattern is not None and len(pattern) > 1 and (len(pattern) != self.num_layers or set(pattern) - {0, 1}):
            yield (f"--window-attn-skip-freq with more than one number has a 0 or 1 for each of the {self.num_layers} layers, not "
                   f"{' '.join(map(str, pattern))} ({len(pattern)} numbers)")  # fmt: skip

    def _rope_problems(self) -> Iterator[str]:
        kind = self.rope_scaling_type
        if (
            self.has_rope
            and not self.multi_latent_attention
            and (self.rotary_width(self.head_dim) % 2 or not self.rotary_width(self.head_dim))
        ):
            part = "" if self.rotary_percent == 1 else f" x --rotary-percent ({self.rotary_percent:g}) = {self.rotary_width(self.head_dim)}"
            yield (f"rotary positions need an even number of channels, not {self.head_dim}{part}; change --kv-channels, the number of heads"
                   f"{' or the share' if part else ''}")  # fmt: skip
        if kind != "none" and not self.has_rope:
            yield f"--rope-scaling-type {kind} is about rotary positions; add --position-embedding-type rope, or drop it"
        if kind == "llama3" and self.rope_low_freq_factor >= self.rope_high_freq_factor:
            yield (f"--rope-low-freq-factor ({self.rope_low_freq_factor:g}) must be less than --rope-high-freq-factor "
                   f"({self.rope_high_freq_factor:g})")  # fmt: skip
        if kind == "yarn" and self.rope_beta_slow >= self.rope_beta_fast:
            yield f"--rope-beta-slow ({self.rope_beta_slow:g}) must be less than --rope-beta-fast ({self.rope_beta_fast:g})"
        if kind == "yarn" and self.rotary_base <= 1:
            yield f"--rope-scaling-type yarn needs frequencies that fall: --rotary-base above 1, not {self.rotary_base:g}"

    def _latent_problems(self) -> Iterator[str]:
        if not self.multi_latent_attention:
            return
        if self.has_rope and self.qk_pos_emb_head_dim % 2:
            yield f"rotary positions need an even number of channels, not {self.qk_pos_emb_head_dim}; change --qk-pos-emb-head-dim"
        for name, instead in (
            ("num_key_value_heads", "every head has keys and values of its own"),
            ("kv_channels", "give --qk-head-dim, --qk-pos-emb-head-dim and --v-head-dim"),
            ("qk_layernorm", "its narrow vectors are normalised"),
            ("add_qkv_bias", "add --add-bias-linear for biases everywhere"),
            ("rotary_percent", "give --qk-pos-emb-head-dim"),
        ):
            if getattr(self, name) != _default(name):
                yield f"--{name.replace('_', '-')} has no meaning with --multi-latent-attention: {instead}; drop it"

    @property
    def idle(self) -> dict[str, str]:
        """Settings that were changed and have no effect: option -> what it is a setting of."""
        out = {}
        for switch, (names, is_on) in _SETTINGS_OF.items():
            if not is_on(self):
                out |= {f"--{name.replace('_', '-')}": switch for name in names if getattr(self, name) != _default(name)}
        return out

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def qk_width(self) -> int:
        """Channels of a head that queries and keys meet in."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def v_width(self) -> int:
        """Channels of a head's values."""
        return self.v_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def has_rope(self) -> bool:
        return self.position_embedding_type == "rope"

    def rotary_width(self, head_width: int) -> int:
        """Channels that are rotated, of so many."""
        return int(head_width * self.rotary_percent)

    @property
    def rope_original_length(self) -> int:
        return self.rope_original_max_position_embeddings or self.max_position_embeddings

    def window_of(self, layer: int) -> int | None:
        """Window of a layer (from 1), None where it sees all tokens before. Example: skip frequency 4: layers 4, 8, ... see all. Blocks of
        multi-token prediction, which are numbered on from the last layer, are like that one."""
        pattern, layer = self.window_attn_skip_freq, min(layer, self.num_layers)
        if self.window_size is None or pattern is None:
            return self.window_size
        layer = min(layer, self.num_layers)  # a module of multi-token prediction has what the last layer has
        has_window = layer % pattern[0] != 0 if len(pattern) == 1 else pattern[layer - 1] == 1
        return self.window_size if has_window else None

    def _activation_switches(self) -> list[str]:
        return [name for name, is_on in (("swiglu", self.swiglu), ("squared_relu", self.squared_relu)) if is_on]

    @property
    def activation(self) -> str:
        """Of the MLP and the experts, whichever flag named it."""
        return next(iter(self._activation_switches()), self.activation_func)

    @property
    def ffn_size(self) -> int:
        """Inner width of the dense MLP, and of experts that have none of their own (Megatron's defaults)."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation != "swiglu":
            return 4 * self.hidden_size
        return max(8 * self.hidden_size // 3 // 64 * 64, 64)

    @property
    def is_tied(self) -> bool:
        return not self.untie_embeddings_and_output_weights

    @property
    def embeds_at_end(self) -> bool:
        """Whether the last pipeline stage needs the vectors of tokens too: for its logits, or for what multi-token prediction reads."""
        return self.is_tied or self.mtp_num_layers > 0

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding: `vocab_size` rounded up, the same under every layout."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple


def _default(name: str) -> object:
    return next(s.default for s in fields_of(ModelConfig) if s.name == name)


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending, for error messages that name the legal values."""
    small = [d for d in range(1, min(math.isqrt(n), 10**6) + 1) if n % d == 0]  # bounded: a mistyped number must not hang
    return sorted({*small, *(n // d for d in small)})
