"""The model of a run in one process: to look at its parameters, or to fill them from a checkpoint."""

from __future__ import annotations

import dataclasses

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import build_on_meta, store_in_half
from megatron_moe.moe.layer import moe_layers


def build_plain(run: RunConfig, vocab_size: int) -> GPT:
    """The model of a run without memory and without parallelism. Dropless: a token's fate must not depend on its neighbours."""
    moe = dataclasses.replace(run.moe, moe_token_dropping=False, moe_pad_expert_input_to_capacity=False)
    dtype = torch.float64 if run.training.params_dtype == "float64" else torch.float32
    model = build_on_meta(lambda: GPT(run.model, moe, vocab_size), dtype)
    if run.training.fp16_master_weights_and_grads:
        store_in_half(model)
    for layer in moe_layers(model):
        layer.experts.use_reference = run.training.moe_kernels == "reference"
    return model
