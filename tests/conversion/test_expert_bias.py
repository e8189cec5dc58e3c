"""The bias of the experts is part of a model: it goes through conversion, into generation, and is shown."""

from __future__ import annotations

from unittest import mock

import torch

from conversion import small
from megatron_moe.inference.load import load_for_inference
from megatron_moe.model.init import initialize_parameters
from megatron_moe.moe.tokens import NO_INFO
from tools import inspect_checkpoint

NAME = "model.layers.2.moe.gate.expert_bias"
BIAS = torch.tensor([0.25, -1.5, 0.003, 7.0])


def with_bias(model, *args):
    initialize_parameters(model, *args)
    model.layers["2"].moe.gate.expert_bias.copy_(BIAS)


def test_a_bias_is_converted_there_and_back_used_and_shown(tmp_path, capsys):
    with mock.patch.object(small, "initialize_parameters", with_bias):
        run = small.save_small(tmp_path / "run", topk=3, moe_router_enable_expert_bias=True, moe_router_policy="topk")
    assert small.to_safetensors(capsys, run, tmp_path / "flat")[0] == 0
    assert small.to_native(capsys, tmp_path / "flat", tmp_path / "back")[0] == 0
    back = small.native_tensors(tmp_path / "back" / "iter_0000010")[NAME]
    assert back.dtype == torch.float32 and torch.equal(back, BIAS)
    for directory in ("run", "back"):
        loaded = load_for_inference(tmp_path / directory).model
        assert torch.equal(loaded.layers["2"].moe.gate.expert_bias, BIAS)
        moe = loaded.layers["2"].moe
        assert (moe.route(torch.zeros(3, 16), NO_INFO)[0].ids_TK == torch.tensor([3, 0, 2])).all()  # by the bias alone
    inspect_checkpoint.main(["--load", str(tmp_path / "back")])
    assert ["moe.gate.expert_bias", "[4]", "float32", "16", "B"] in [line.split() for line in capsys.readouterr().out.splitlines()]
