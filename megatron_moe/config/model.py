"""What the network is: widths, depth, positions, norms, activations, initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, flag


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
    normalization: Literal["LayerNorm", "RMSNorm"] = flag("LayerNorm", "normalisation layer")
    layernorm_epsilon: float = flag(1e-5, "epsilon inside the normalisation", names=("norm-epsilon",), above=0)
    activation_func: Literal["gelu", "relu", "squared_relu", "swiglu"] = flag(
        "gelu", "activation of the MLP and the experts; squared_relu: max(x, 0)^2 (arXiv 2109.08668); swiglu: silu(gate) times value, with "
        "a matrix more (arXiv 2002.05202)")  # fmt: skip
    swiglu: bool = flag(False, "same as --activation-func swiglu")
    squared_relu: bool = flag(False, "same as --activation-func squared_relu")
    add_bias_linear: bool = flag(True, "bias vectors in the linear layers", negative=("disable-bias-linear",))
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

    def __post_init__(self) -> None:
        if self.use_rotary_position_embeddings:
            object.__setattr__(self, "position_embedding_type", "rope")
        checked(self)

    def problems(self) -> Iterator[str]:
        heads, groups = self.num_attention_heads, self.key_value_heads
        if self.kv_channels is None and self.hidden_size % heads:
            yield (f"--hidden-size ({self.hidden_size}) must be divisible by --num-attention-heads ({heads}), "
                   f"or give --kv-channels")  # fmt: skip
        if heads % groups:
            yield (f"--num-attention-heads ({heads}) must be divisible by --num-key-value-heads ({groups}); "
                   f"use one of {divisors(heads)}")  # fmt: skip
        asked = {a for a in (self.activation_func, *self._activation_switches()) if a != "gelu"}
        if len(asked) > 1:
            yield f"the activation is asked to be {' and '.join(sorted(asked))}; keep one of --activation-func, --swiglu and --squared-relu"
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            yield f"rotary positions need an even head width, not {self.head_dim}; change --kv-channels or the number of heads"

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

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

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding: `vocab_size` rounded up, the same under every layout."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending, for error messages that name the legal values."""
    small = [d for d in range(1, min(math.isqrt(n), 10**6) + 1) if n % d == 0]  # bounded: a mistyped number must not hang
    return sorted({*small, *(n // d for d in small)})
