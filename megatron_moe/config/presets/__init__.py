"""Named settings: `--preset NAME` sets these fields, everything on the command line overrides them."""

from __future__ import annotations

from megatron_moe.config.presets.deepspeed_moe import DEEPSPEED_MOE
from megatron_moe.config.presets.gpt2 import GPT2
from megatron_moe.config.presets.preset import GPT2_VOCAB_SIZE, Preset
from megatron_moe.config.presets.sparse import SPARSE

PRESETS: dict[str, Preset] = DEEPSPEED_MOE | GPT2 | SPARSE

__all__ = ["GPT2_VOCAB_SIZE", "PRESETS", "Preset"]
