"""Randomness that does not depend on the layout: a counter hash instead of a generator.

Every draw of a step is a pure function of (seed, iteration, sample, position) - the token's key - and of what the draw is
for (a stream number: layer and purpose) and which feature or expert it concerns. So dropout, routing noise and random
token selection are equal under every parallel layout, and recomputation replays them without any saved state.

    keys_BS = token_keys(seed=1, iteration=7, sample_ids_B=batch.sample_ids, seq_length=S)
    mask_BSD = uniform(layer_keys(keys_BS, layer=3), Purpose.MLP_OUTPUT_DROPOUT, D) >= p
"""

from __future__ import annotations

import enum
import hashlib

import torch
from torch import Tensor

# Odd 64-bit constants of splitmix64 (Steele, Lea and Flood 2014), as signed integers because torch has no unsigned products.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


class Purpose(enum.IntEnum):
    """What a draw is for, so that no two draws of a layer share their numbers."""

    ATTENTION_DROPOUT = 0
    ATTENTION_OUTPUT_DROPOUT = 1
    MLP_OUTPUT_DROPOUT = 2
    EMBEDDING_DROPOUT = 3
    GATE_JITTER = 4
    GATE_SAMPLING = 5
    TOKEN_SELECTION = 6
    ASSIGNMENT = 7


def stream(layer: int, purpose: Purpose) -> int:
    return layer * 16 + int(purpose)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts arithmetically; the mask makes it logical


def mix(x: Tensor) -> Tensor:
    """int64 -> int64, every input bit reaches every output bit; products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _wrap(x: int) -> int:
    """A Python integer as signed 64 bits."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def token_keys(seed: int, iteration: int, sample_ids_B: Tensor, seq_length: int) -> Tensor:
    """int64 [B, S]: one key per token of the step."""
    base = _wrap(int.from_bytes(hashlib.sha256(f"{seed}/{iteration}".encode()).digest()[:8], "little"))
    per_sample_B = mix(sample_ids_B.to(torch.int64) * _GOLDEN + base)
    position_S = torch.arange(1, seq_length + 1, dtype=torch.int64, device=sample_ids_B.device)
    return mix(per_sample_B[:, None] + position_S * _GOLDEN)


def drawn_keys(tokens: int, device: torch.device, part: int = 0) -> Tensor:
    """int64 [T]: keys from one draw of torch's own generator, which so governs all that follows from them, and which checkpointing
    replays. For callers that know neither iteration nor samples. The keys of another `part` are others, also after an equal draw.
    """
    draw = torch.randint(1 << 62, (), dtype=torch.int64, device=device)
    number_T = torch.arange(1, tokens + 1, dtype=torch.int64, device=device) + (part << 32)
    return mix(mix(draw) + number_T * _GOLDEN)


def layer_keys(keys: Tensor, layer: int) -> Tensor:
    """Keys from which layer 0's streams draw what `layer`'s streams draw from `keys`.

    The number of the layer is in the data then, and not in the code: one compiled graph serves all layers.
    """
    return keys + layer_offset(layer)


def layer_offset(layer: int) -> int:
    return _wrap(stream(layer, Purpose(0)) * _GOLDEN)


def uniform(keys: Tensor, stream_id: int, features: int, first_feature: int = 0) -> Tensor:
    """float32 [*keys.shape, features] in [0, 1), for features first_feature .. first_feature + features - 1."""
    per_stream = mix(keys + _wrap((stream_id + 1) * _GOLDEN))
    feature = torch.arange(first_feature, first_feature + features, dtype=torch.int64, device=keys.device)
    # -~f is f + 1. A bitwise operation keeps the product out of the compiler's arithmetic on indices, which does not wrap around.
    bits = mix(per_stream[..., None] - ~feature * _MIX1)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24  # 24 bits are what a float32 holds exactly


def gumbel(keys: Tensor, stream_id: int, features: int) -> Tensor:
    """Standard Gumbel draws, float32 [*keys.shape, features]; argmax(logits + gumbel) samples from softmax(logits)."""
    u = uniform(keys, stream_id, features).clamp_min(2.0**-25)
    return -torch.log(-torch.log(u))


def dropout(x: Tensor, p: float, keys: Tensor | None, stream_id: int) -> Tensor:
    """Inverted dropout of x [*keys.shape, D]; no keys (evaluation) means none."""
    if keys is None or p == 0.0:
        return x
    keep = uniform(keys, stream_id, x.shape[-1]) >= p
    return x * keep.to(x.dtype) * (1.0 / (1.0 - p))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and a name only: initial weights are the same under every layout."""
    generator = torch.Generator("cpu")
    generator.manual_seed(named_seed(seed, name))
    return generator


def named_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") & ((1 << 63) - 1)
