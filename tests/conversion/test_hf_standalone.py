"""What transformers lacks: pyramids, residual layers and all else export as a folder that transformers loads without this package."""

import json
import subprocess
import sys

import pytest
import torch

from conversion.small import convert, native_tensors, save_small
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate
from megatron_moe.inference.load import load_for_inference

PYRAMID = {"num_layers": 3, "num_experts": (1, 2, 4), "mlp_type": "residual", "moe_token_dropping": False, "max_position_embeddings": 128}
KINDS = {
    "pyramid, residual": {},
    "residual sum, rope, swiglu, groups of scores": {
        "moe_residual_combine": "sum", "position_embedding_type": "rope", "swiglu": True, "normalization": "RMSNorm", "topk": 2,
        "num_experts": (1, 4, 4), "moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_group_best": 1, "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True, "moe_top2_2nd_expert_sampling": False, "untie_embeddings_and_output_weights": True,
        "num_key_value_heads": 1, "qk_layernorm": True, "moe_router_topk_scaling_factor": 1.5},
    "latent, shared, gated": {
        "mlp_type": "standard", "moe_latent_size": 8, "moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True,
        "squared_relu": True, "add_bias_linear": False, "moe_ffn_hidden_size": 20, "qk_layernorm": True, "qk_layernorm_scope": "hidden"},
    "sinkhorn": {"mlp_type": "standard", "moe_router_policy": "sinkhorn", "num_experts": (1, 2, 4)},
    "expert choice": {"mlp_type": "standard", "moe_router_policy": "expert_choice", "num_experts": (1, 4, 4), "topk": 2},
}  # fmt: skip
LOADER = """
import json, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_moe", "tools"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Refused())
import torch, transformers
folder, out = sys.argv[1:]
model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
model.eval()
tokens = torch.arange(40).view(2, 20)
with torch.no_grad():
    logits = model(input_ids=tokens).logits
    alone = model(input_ids=tokens[1:]).logits
    padded = model(input_ids=torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens[1:]], 1), position_ids=torch.arange(-3, 20).clamp(min=0)[None],
                   attention_mask=torch.tensor([[0] * 3 + [1] * 20])).logits[:, 3:]
    text = {use: model.generate(tokens[:1], max_new_tokens=64, do_sample=False, use_cache=use, pad_token_id=255)[0, 20:].tolist() for use in (True, False)}
model.train()
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
model.save_pretrained(out + "_again")
torch.save({"logits": logits, "alone": alone, "padded": padded, "text": text, "loss": loss.detach(),
            "without_gradient": [n for n, p in model.named_parameters() if p.grad is None]}, out)
assert not [n for n in sys.modules if n.split(".")[0] == "megatron_moe"]
"""


def export(kind, tmp_path, capsys):
    run = save_small(tmp_path / "run", **PYRAMID | KINDS[kind])
    code, out, err = convert(capsys, "native", "hf", run, tmp_path / "out", "--verify")
    assert code == 0, err
    assert "brings a modelling file" in out and "trust_remote_code=True" in out and "equal in every bit" in out
    return run


@pytest.mark.parametrize(
    "kind", [k if k in ("pyramid, residual", "sinkhorn") else pytest.param(k, marks=pytest.mark.matrix) for k in KINDS]
)
def test_the_folder_comes_back_bit_by_bit(kind, tmp_path, capsys):
    run = export(kind, tmp_path, capsys)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.py")) == ["configuration_megatron_moe.py", "modeling_megatron_moe.py"]
    words = [line for p in (tmp_path / "out").glob("*.py") for line in p.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert {w.split()[1].partition(".")[0] for w in words} <= {"torch", "transformers", ""}
    code, _, err = convert(capsys, "hf", "native", tmp_path / "out", tmp_path / "back")
    assert code == 0, err
    before, after = native_tensors(run / "iter_0000010"), native_tensors(tmp_path / "back" / "iter_0000000")
    vocab = json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    for name, tensor in after.items():
        rows = vocab if name in ("model.embedding.weight", "model.head.weight") else None
        assert torch.equal(tensor[:rows] if rows else tensor, before[name][:rows] if rows else before[name]), name
    assert after.keys() == {name for name in before if name.startswith("model.")}


def test_what_it_cannot_say_is_named_with_the_nearest_architecture(tmp_path, capsys):
    run = save_small(tmp_path / "run", **PYRAMID | {"moe_router_policy": "hash", "mlp_type": "residual"})
    code, _, err = convert(capsys, "native", "hf", run, tmp_path / "out")
    assert (code, "--moe-router-policy is hash here, and topk in a megatron_moe_gpt" in err) == (2, True), err
    run = save_small(tmp_path / "dropping", **PYRAMID | {"moe_token_dropping": True})
    code, _, err = convert(capsys, "native", "hf", run, tmp_path / "out")
    assert (code, "cannot hold the capacity of the experts" in err) == (2, True), err
    assert convert(capsys, "native", "hf", run, tmp_path / "out", "--allow-lossy", "--verify")[0] == 0


@pytest.mark.parametrize("kind", [k if k == "pyramid, residual" else pytest.param(k, marks=pytest.mark.matrix) for k in KINDS])
def test_transformers_loads_it_where_this_package_cannot_be_imported(kind, tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    run = export(kind, tmp_path, capsys)
    (tmp_path / "loader.py").write_text(LOADER)
    command = [sys.executable, "-I", str(tmp_path / "loader.py"), str(tmp_path / "out"), str(tmp_path / "found.pt")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    ours = load_for_inference(run)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = ours.model(tokens, torch.arange(20).expand(2, 20))[..., : ours.vocab_size]
    assert logits.abs().max() > 1
    for name, expected in (("logits", logits), ("alone", logits[1:]), ("padded", logits[1:])):
        assert (found[name] - expected).abs().max() < 1e-4, name
    text = generate(ours.model, tokens[:1].tolist(), 64, SamplingConfig(greedy=True))[0]
    assert found["text"][True] == found["text"][False] == text
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(found["loss"] - expected) < 1e-4
    assert all("expert" in name or "moe" in name for name in found["without_gradient"])
    assert (tmp_path / "found.pt_again" / "modeling_megatron_moe.py").exists()
