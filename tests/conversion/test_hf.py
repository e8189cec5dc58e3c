"""Folders of transformers without transformers: a Mixtral written by hand, there and back; and folders that are not to be trusted."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.hf_models import edit, read_all
from conversion.small import VALUES, convert, native_tensors, save_small
from megatron_moe.checkpoint.files import read_manifest
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion import hf
from megatron_moe.conversion.hf.choice import choose, forward_settings
from megatron_moe.conversion.journal import Journal
from megatron_moe.conversion.source import Selection
from megatron_moe.inference.load import load_for_inference

V, D, F, E, H, G, LAYERS = 70, 16, 24, 4, 4, 2, 2
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS,
    "num_attention_heads": H, "num_key_value_heads": G, "num_local_experts": E, "num_experts_per_tok": 2, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 64, "vocab_size": V, "tie_word_embeddings": False,
    "sliding_window": None, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.0.dev0",
}  # fmt: skip


def mixtral_tensors() -> dict[str, torch.Tensor]:
    """Names and shapes as mistralai/Mixtral-8x7B-v0.1 has them."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}input_layernorm.weight": (D,), f"{layer}post_attention_layernorm.weight": (D,)}
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (D if x in "qo" else D // H * G, D) for x in "qkvo"}
        shapes[f"{layer}block_sparse_moe.gate.weight"] = (E, D)
        for e in range(E):
            shapes |= {f"{layer}block_sparse_moe.experts.{e}.{w}.weight": (D, F) if w == "w2" else (F, D) for w in ("w1", "w2", "w3")}
    generator = torch.Generator().manual_seed(3)
    return {name: (0.3 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}


def write_folder(directory, tensors, files=2):
    """Cut into files with an index, as large models are."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    names = sorted(tensors)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        mine = names[i::files]  # the experts of a layer lie in both
        save_file({n: tensors[n].contiguous() for n in mine}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_tokenizer(directory, words=V):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = {"<unk>": 0, "</s>": 1} | {chr(0x4E00 + i): i for i in range(2, words)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("hf") / "mixtral", mixtral_tensors())
    write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "mixtral")


def test_a_mixtral_written_by_hand_there_and_back(original, tmp_path, capsys):
    """Every weight where the names of Mistral's files say, and the same bits in the folder that comes back."""
    code, out, err = convert(capsys, "hf", "native", original, tmp_path / "run", "--verify")
    assert code == 0, err
    assert f"{len(mixtral_tensors())} tensors of mixtral in 2 files are" in err
    ours, theirs = native_tensors(tmp_path / "run" / "iter_0000000"), mixtral_tensors()
    expert = "model.layers.1.block_sparse_moe.experts.3."
    assert torch.equal(ours["model.layers.2.moe.experts.w_gate"][3], theirs[expert + "w1.weight"].float().T)
    assert torch.equal(ours["model.layers.2.moe.experts.w2"][3], theirs[expert + "w2.weight"].float().T)
    assert torch.equal(ours["model.layers.2.moe.experts.w1"][3], theirs[expert + "w3.weight"].float().T)
    assert torch.equal(ours["model.layers.1.attn.k_proj.weight"], theirs["model.layers.0.self_attn.k_proj.weight"].float())
    embedding = ours["model.embedding.weight"]
    assert embedding.shape == (128, D) and not embedding[V:].any()  # padded, with zeros
    code, out, err = convert(capsys, "native", "hf", tmp_path / "run", tmp_path / "back", "--verify", "--max-shard-size", "5KB")
    assert code == 0, err
    assert "rounded to bfloat16" in out and "equal in every bit" in out  # and it is exact: these were bfloat16
    after = read_all(tmp_path / "back")
    assert after.keys() == theirs.keys()
    assert all(after[n].dtype == torch.bfloat16 and torch.equal(after[n], theirs[n]) for n in theirs)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: config[k] for k in CONFIG if k not in ("transformers_version", "bos_token_id", "eos_token_id")} == {
        k: v for k, v in CONFIG.items() if k not in ("transformers_version", "bos_token_id", "eos_token_id")
    }
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert len(list((tmp_path / "back").glob("model-*"))) > 3


def test_the_folder_trains_and_answers_as_a_run_does(original, tmp_path, capsys):
    assert convert(capsys, "hf", "native", original, tmp_path / "run", "--make-vocab-size-divisible-by", "1")[0] == 0
    meta = read_manifest(tmp_path / "run" / "iter_0000000").meta
    run = RunConfig.from_dict(meta["config"])
    assert (run.training.bf16, run.moe.topk, run.moe.normalize, run.moe.moe_token_dropping) == (True, 2, "chosen", False)
    assert (run.model.rotary_base, run.model.key_value_heads, meta["vocab_size"], meta["eod"]) == (1e6, G, V, 1)
    loaded = load_for_inference(tmp_path / "run")
    assert loaded.model.embedding.weight.shape == (V, D)
    assert loaded.tokenizer.encode(chr(0x4E05)) == [5]


def test_fused_experts_and_a_missing_prefix_are_read_as_well(original, tmp_path, capsys):
    """What transformers has in memory, and writes with save_original_format=False; and GPT-2 as openai-community has it."""
    tensors = mixtral_tensors()
    fused = {n: t for n, t in tensors.items() if "block_sparse_moe" not in n}
    for i in range(LAYERS):
        old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        each = {w: torch.stack([tensors[f"{old}experts.{e}.{w}.weight"] for e in range(E)]) for w in ("w1", "w2", "w3")}
        fused |= {f"{new}gate.weight": tensors[f"{old}gate.weight"], f"{new}experts.down_proj": each["w2"]}
        fused[f"{new}experts.gate_up_proj"] = torch.cat([each["w1"], each["w3"]], dim=1)
    folder = write_folder(tmp_path / "fused", fused, files=1)
    for directory, name in ((original, "a"), (folder, "b")):
        code, _, err = convert(capsys, "hf", "native", directory, tmp_path / name)
        assert code == 0, err
    a, b = (native_tensors(tmp_path / name / "iter_0000000") for name in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_gpt2_without_its_prefix_and_with_its_masks(tmp_path, capsys):
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 10, "layer_norm_epsilon": 1e-5}
    shapes = {"wte.weight": (10, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for name, shape in (
        ("attn.c_attn", (8, 24)),
        ("attn.c_proj", (8, 8)),
        ("mlp.c_fc", (8, 32)),
        ("mlp.c_proj", (32, 8)),
        ("ln_1", (8,)),
        ("ln_2", (8,)),
    ):
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[-1:]}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    save_file(tensors | masks, tmp_path / "gpt2" / "model.safetensors")
    code, _, err = convert(capsys, "hf", "native", tmp_path / "gpt2", tmp_path / "run")
    assert code == 0, err
    assert "1 tensors are not needed and ignored: h.0.attn.bias" in err
    ours = native_tensors(tmp_path / "run" / "iter_0000000")
    assert torch.equal(ours["model.layers.1.attn.v_proj.weight"], tensors["h.0.attn.c_attn.weight"][:, 16:].T)
    assert torch.equal(ours["model.layers.1.attn.k_proj.bias"], tensors["h.0.attn.c_attn.bias"][8:16])
    assert convert(capsys, "native", "hf", tmp_path / "run", tmp_path / "back", "--verify")[0] == 0
    assert all(torch.equal(t, read_all(tmp_path / "back")[f"transformer.{n}"]) for n, t in tensors.items())


def test_an_interrupted_export_does_not_write_finished_shards_anew(original, tmp_path, capsys, monkeypatch):
    assert convert(capsys, "hf", "native", original, tmp_path / "run")[0] == 0
    command = ("native", "hf", tmp_path / "run", tmp_path / "out", "--max-shard-size", "6KB", "--verify")
    plain, done = Journal.finish, []

    def finish(self, name, *args):
        plain(self, name, *args)
        done.append(name)
        if len(done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", finish)
        assert convert(capsys, *command)[0] == 130
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("model-*")}
    assert sorted(kept) == done
    code, out, err = convert(capsys, *command)
    assert code == 0, err
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == kept
    assert not (tmp_path / "out" / "journal.jsonl").exists() and not (tmp_path / "out" / "lock").exists()


# ---------------------------------------------------------------- what a target cannot say

DENSE = {"num_experts": (1,), "mlp_type": "standard"}
AS_MIXTRAL = {
    "num_experts": (4,), "mlp_type": "standard", "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
    "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "topk": 2, "moe_token_dropping": False,
}  # fmt: skip
AS_DEEPSEEK = {
    "multi_latent_attention": True, "layernorm_epsilon": 1e-6, "rotary_interleaved": True, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "moe_top2_2nd_expert_sampling": False, "moe_first_k_dense_replace": 1, "expert_interval": 1,
    "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
REFUSALS = {
    "capacity": ({"moe_token_dropping": True}, "the capacity of the experts"),
    "expert bias": ({"moe_router_enable_expert_bias": True, "moe_top2_2nd_expert_sampling": False}, "the bias of the experts"),
    "residual": ({"mlp_type": "residual"}, "the dense MLP beside the experts"),
    "biases": ({"add_bias_linear": True}, "the bias vectors of the linear layers"),
    "positions": ({"position_embedding_type": "learned_absolute"}, "the learned positions"),
    "further tokens": ({"mtp_num_layers": 1}, "the modules that predict further tokens"),
    "shared expert": ({"moe_shared_expert_intermediate_size": 8}, "the shared expert"),
}  # fmt: skip
IMPOSSIBLE = {
    "pyramid": ({"num_experts": (2, 4)}, "--num-experts is 2 4 here, and 4 in all layers in a mixtral"),
    "norm": ({"normalization": "LayerNorm"}, "--normalization is LayerNorm here, and RMSNorm in a mixtral"),
    "activation": ({"swiglu": False}, "--activation-func is gelu here, and swiglu in a mixtral"),
    "latent": ({"moe_latent_size": 8}, "--moe-latent-size is 8 here, and None in a mixtral"),
    "scores": ({"moe_router_score_function": "sigmoid"}, "--moe-router-score-function is sigmoid here"),
    "policy": ({"moe_router_policy": "hash"}, "--moe-router-policy is hash here, and topk in a mixtral"),
    "weights": ({"moe_router_normalize": "none"}, "--moe-router-normalize is none here, and chosen in a mixtral"),
    "window of some layers": ({"window_size": 4, "window_attn_skip_freq": (1, 0)}, "--window-size is 4 None here, and None in all layers in a mixtral"),
    "partial rotation": ({"rotary_percent": 0.5, "kv_channels": 16}, "--rotary-percent is 0.5 here"),
    "sinks": ({"softmax_type": "learnable"}, "--softmax-type is learnable here"),
    "scale": ({"moe_router_topk_scaling_factor": 2.5}, "--moe-router-topk-scaling-factor is 2.5 here, and 1.0 in a mixtral"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_mixtral_cannot_hold_is_refused_or_listed(case, tmp_path, capsys):
    changes, sentence = REFUSALS[case]
    run = save_small(tmp_path / "run", **AS_MIXTRAL | changes)
    command = ("native", "hf", run, tmp_path / "out", "--hf-model-type", "mixtral", "--verify")
    code, _, err = convert(capsys, *command)
    assert (code, f"--to hf cannot hold {sentence}" in err, "--allow-lossy leaves it out" in err) == (2, True, True), err
    code, out, err = convert(capsys, *command, "--allow-lossy")
    assert (code, f"lost: {sentence}" in err) == (0, True), err
    if case != "capacity":
        assert "tensors are left out: model." in err
        # the bias is zero in the beginning, and the modules are behind the logits
        assert ("apart, by what was left out" in out) == (case not in ("expert bias", "further tokens"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mixtral"


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_even_be_left_out_is_named(case):
    changes, sentence = IMPOSSIBLE[case]
    run = RunConfig.from_values(VALUES | AS_MIXTRAL | changes)
    with pytest.raises(ConfigError, match="this model cannot be a mixtral: ") as refused:
        choose(run, 64, "mixtral")
    assert sentence in str(refused.value)


def test_the_architecture_follows_from_the_model():
    for changes, expected in (
        ({"qk_layernorm": True}, "qwen3_moe"), ({"qk_layernorm": True, "qk_layernorm_scope": "hidden"}, "olmoe"),
        (DENSE | {"add_qkv_bias": True}, "qwen2"), (DENSE | {"qk_layernorm": True}, "qwen3"), (DENSE | {"window_size": 4}, "mistral"),
        (AS_DEEPSEEK, "deepseek_v3"), ({}, "mixtral"), (DENSE, "llama"), (DENSE | {"add_bias_linear": True}, "llama"),
        ({"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True, "expert_interval": 2}, "qwen2_moe"),
    ):  # fmt: skip
        choice = choose(RunConfig.from_values(VALUES | AS_MIXTRAL | changes), 64)
        assert (choice.family.model_type, choice.losses) == (expected, [])
    gpt2 = VALUES | DENSE | {"activation_func": "gelu_tanh"}
    assert choose(RunConfig.from_values(gpt2), 64).family.model_type == "gpt2"


def test_every_setting_of_the_forward_pass_is_compared():
    """A setting that `forward_settings` forgot would be lost without a word: each one that changes the logits changes the result."""
    run = RunConfig.from_values(VALUES | AS_MIXTRAL)
    for changes, _ in [*REFUSALS.values(), *IMPOSSIBLE.values()]:
        other = RunConfig.from_values(VALUES | AS_MIXTRAL | changes)
        assert forward_settings(other) != forward_settings(run) or changes == REFUSALS["capacity"][0], changes
    assert choose(run, 64, "mixtral").losses == []


# ---------------------------------------------------------------- damage and malice


def index_says(folder, **changes):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= changes
    path.write_text(json.dumps(content))


def shard(folder, number=1):
    return folder / f"model-{number:05d}-of-00002.safetensors"


def change_shard(folder, change, number=1):
    tensors = load_file(shard(folder, number))
    change(tensors)
    save_file(tensors, shard(folder, number), metadata={"format": "pt"})


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


Q = "model.layers.0.self_attn.q_proj.weight"
IN_1 = sorted(mixtral_tensors())[0]
MALICE = {
    "outside": (lambda f: index_says(f, x="../../etc/passwd"), "refers to '../../etc/passwd', outside the directory"),
    "absolute": (lambda f: index_says(f, x="/etc/passwd"), "refers to '/etc/passwd', outside the directory"),
    "missing shard": (lambda f: shard(f, 2).unlink(), "model-00002-of-00002.safetensors: missing"),
    "cut shard": (lambda f: os.truncate(shard(f), 3000), "model-00001-of-00002.safetensors: cut off or damaged"),
    "huge header": (lambda f: huge_header(shard(f)), "model-00001-of-00002.safetensors: cut off or damaged"),
    "no header": (lambda f: shard(f).write_bytes(b"\x08"), "model-00001-of-00002.safetensors: cut off or damaged"),
    "index of a list": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), "not an index with a weight_map"),
    "twice": (lambda f: change_shard(f, lambda t: t.update({sorted(mixtral_tensors())[1]: torch.zeros(1)})), "and again in"),
    "of another model": (lambda f: change_shard(f, lambda t: t.update({n: torch.zeros(3, 3) for n in t if "q_proj" in n or "w2" in n})),
                         "[3, 3] in the file, and config.json makes it ["),
    "integers": (lambda f: change_shard(f, lambda t: t.update({IN_1: t[IN_1].to(torch.int8)})), f"{IN_1}: int8; weights are float32"),
    "fp8": (lambda f: change_shard(f, lambda t: t.update({IN_1: t[IN_1].to(torch.float8_e4m3fn)})), "has tensors of type F8_E4M3"),
    "extra": (lambda f: (change_shard(f, lambda t: t.update({"backdoor": torch.zeros(2)})), index_says(f, backdoor=shard(f).name)),
              "backdoor: not a tensor of this model"),
    "lost tensor": (lambda f: edit(f / "config.json", num_hidden_layers=3), "model.layers.2.self_attn.q_proj.weight: missing"),
    "no such model": (lambda f: edit(f / "config.json", model_type="bert"), "model_type 'bert' is not known; known are gpt2, llama"),
    "model_type of a list": (lambda f: edit(f / "config.json", model_type=["mixtral"]), "is not known; known are"),
    "text for a number": (lambda f: edit(f / "config.json", hidden_size="16"), 'hidden_size must be a whole number from 1 to'),
    "negative": (lambda f: edit(f / "config.json", num_attention_heads=-4), "num_attention_heads must be a whole number from 1 to"),
    "true for a number": (lambda f: edit(f / "config.json", num_local_experts=True), "num_local_experts must be a whole number from 1"),
    "more layers than tensors": (lambda f: edit(f / "config.json", num_hidden_layers=10_000), "10000 layers, and there are"),
    "more experts than tensors": (lambda f: edit(f / "config.json", num_local_experts=10_000), "10000 experts, and there are"),
    "enormous": (lambda f: edit(f / "config.json", hidden_size=1 << 80), "hidden_size must be a whole number"),
    "infinite": (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("1000000.0", "1e999")), "a finite number"),
    "not divisible": (lambda f: edit(f / "config.json", num_key_value_heads=3), "--num-attention-heads (4) must be divisible by"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "fp8"}), "the weights are quantised"),
    "another activation": (lambda f: edit(f / "config.json", hidden_act="gelu"), 'hidden_act must be "silu", not "gelu"'),
    "strange rope": (lambda f: edit(f / "config.json", rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type is 'dynamic'"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json: holds a list, not an object"),
    "cut configuration": (lambda f: os.truncate(f / "config.json", 30), "config.json: cut off or damaged"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: cut off or damaged"),
    "tokenizer too large": (lambda f: write_tokenizer(f, V + 5), f"the tokenizer has {V + 5} tokens, and config.json gives the model {V} rows"),
    "pickles": (lambda f: [p.rename(f / "pytorch_model.bin") for p in sorted(f.glob("model*"))], "pickled weights (pytorch_model.bin"),
    "nothing": (lambda f: [p.unlink() for p in sorted(f.glob("model*"))], "no weights (looked for model.safetensors"),
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize("case", MALICE)
def test_a_folder_that_is_not_to_be_trusted_is_refused_by_name(case, folder, tmp_path, capsys):
    change, message = MALICE[case]
    change(folder)
    code, out, err = convert(capsys, "hf", "native", folder, tmp_path / "out")
    assert (code, out) == (2, ""), err
    assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixtral"]


def test_a_tied_copy_must_be_the_same(folder, tmp_path, capsys):
    edit(folder / "config.json", tie_word_embeddings=True)
    code, _, err = convert(capsys, "hf", "native", folder, tmp_path / "out")
    assert (code, "ties the output layer to the embedding, and lm_head.weight is another matrix" in err) == (2, True), err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.fault
def test_faults_in_the_map_are_seen_by_verify(original, tmp_path, capsys, monkeypatch):
    """The gate and the value matrix of the experts swapped, on the way out alone."""
    assert convert(capsys, "hf", "native", original, tmp_path / "run")[0] == 0
    plain = hf.folder.uncut
    monkeypatch.setattr(hf.folder, "uncut", lambda tensor, *place: plain(tensor.flip(0), *place))
    code, _, err = convert(capsys, "native", "hf", tmp_path / "run", tmp_path / "out", "--verify")
    assert (code, "values   model.layers.1.moe.experts.w1" in err) == (1, True)


def test_a_selection_reads_each_tensor_once(original):
    source = hf.open_source(original)
    selection = Selection(source, source.tensors)
    names = [name for name, _ in selection.read(list(source.tensors))]
    assert names == list(source.tensors) and set(selection.reads.values()) == {1}
