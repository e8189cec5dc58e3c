"""--load-hf DENSE --moe-use-upcycling: experts straight from a dense transformers folder, in any layout, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from conversion.test_hf import mixtral_tensors, write_folder
from distributed_pool import run_distributed
from safetensors.torch import save_file

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.training.plan import build_plan
from megatron_moe.training.preflight import prepare
from training import runs
from training.test_upcycling_run import reported, start_here

V, D, F, H, G, LAYERS = 70, 16, 24, 4, 2, 2
LLAMA = {
    "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "num_key_value_heads": G, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64, "vocab_size": V,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 8, "attention_bias": False}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": D, "n_head": H, "n_positions": 64, "vocab_size": V, "layer_norm_epsilon": 1e-5}
TRAINING = (
    "--mock-data --micro-batch-size 2 --global-batch-size 4 --seq-length 16 --lr 1e-2 --lr-warmup-iters 0 --eval-iters 0 --log-interval 1 "
    "--num-workers 0 --train-iters 1 --params-dtype float32"
)
EXPERTS = "--moe-use-upcycling --num-experts 8 --expert-interval 1 --topk 2 --moe-router-normalize chosen"
EXACT = f"{EXPERTS} --moe-upcycling-router-std 0"


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers writes them."""
    if config["model_type"] == "gpt2":
        shapes = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (64, D)}
        matrices = {
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "mlp.c_fc": (D, 4 * D),
            "mlp.c_proj": (4 * D, D),
            "ln_1": (D,),
            "ln_2": (D,),
        }
        blocks = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in matrices.items()} | {"transformer.ln_f": (D,)}
        return shapes | {f"{name}.{kind}": s if kind == "weight" else s[-1:] for name, s in blocks.items() for kind in ("weight", "bias")}
    head = config.get("head_dim", D // H)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}input_layernorm.weight": (D,), f"{layer}post_attention_layernorm.weight": (D,)}
        shapes |= {f"{layer}self_attn.{x}_proj.weight": ((H if x == "q" else G) * head, D) for x in "qkv"}
        shapes |= {f"{layer}self_attn.o_proj.weight": (D, H * head), f"{layer}mlp.down_proj.weight": (D, F)}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (F, D) for x in ("gate", "up")}
        if config["model_type"] == "qwen3":
            shapes |= {f"{layer}self_attn.{x}_norm.weight": (head,) for x in "qk"}
    return shapes


def dense_folder(directory, config=LLAMA, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes_of(config).items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llama"
    return folder, dense_folder(folder)


def start(world, folder, save, flags) -> dict[str, torch.Tensor]:
    """Of all pipeline stages together."""
    parts = run_distributed(start_here, world, f"--load-hf {folder} --save {save} {TRAINING} {flags}")
    return {name: t for part in parts for name, t in part.items()}


@pytest.mark.distributed
def test_every_expert_is_the_mlp_of_the_folder_and_the_first_logits_are_its_own(llama, tmp_path):
    folder, theirs = llama
    ours = start(1, folder, tmp_path, EXACT)
    record = reported(tmp_path)
    assert (record["difference"], record["of"], record["dense"]) == (0, "logits", str(folder))  # bit for bit
    for layer in (1, 2):
        mlp = f"model.layers.{layer - 1}.mlp."
        for name, origin in (("w1", "up_proj"), ("w_gate", "gate_proj"), ("w2", "down_proj")):
            stack = ours[f"model.layers.{layer}.moe.experts.{name}"]
            assert len(stack) == 8 and all(torch.equal(expert, theirs[f"{mlp}{origin}.weight"].T) for expert in stack)
    assert torch.equal(ours["model.layers.2.attn.v_proj.weight"], theirs["model.layers.1.self_attn.v_proj.weight"])
    assert torch.equal(ours["model.embedding.weight"][:V], theirs["model.embed_tokens.weight"])


@pytest.mark.distributed
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("world", "layout", "at_most"),
    [(2, "--moe-expert-parallel-size 2", 0), (2, "--tensor-model-parallel-size 2", 1e-5), (2, "--pipeline-model-parallel-size 2", 1e-5)],
)
def test_every_layout_starts_with_the_experts_of_one_process(world, layout, at_most, llama, tmp_path):
    expected = start(1, llama[0], tmp_path / "one", EXPERTS)
    spread = start(world, llama[0], tmp_path / "spread", f"{EXPERTS} {layout}")
    assert expected.keys() == spread.keys()
    assert [name for name in expected if not torch.equal(expected[name], spread[name])] == []
    start(world, llama[0], tmp_path / "exact", f"{EXACT} {layout}")
    assert reported(tmp_path / "exact")["difference"] <= at_most


@pytest.mark.distributed
@pytest.mark.parametrize("config", [pytest.param(QWEN3, id="qwen3"), pytest.param(GPT2, id="gpt2")])
def test_other_dense_architectures_start_with_their_own_logits(config, tmp_path):
    dense_folder(tmp_path / "folder", config)
    start(1, tmp_path / "folder", tmp_path / "run", EXACT)
    assert reported(tmp_path / "run")["difference"] <= (2e-5 if config is GPT2 else 0)  # biases are added in another order


@pytest.mark.distributed
def test_weights_in_bfloat16_are_multiplied_in_float32(tmp_path):
    """Three experts by raw scores of a third each: times 3 would be rounded in the type of the folder."""
    theirs = dense_folder(tmp_path / "folder", LLAMA, torch.bfloat16)
    ours = start(1, tmp_path / "folder", tmp_path / "run", "--moe-use-upcycling --num-experts 3 --expert-interval 1")
    down = theirs["model.layers.0.mlp.down_proj.weight"].T.float()
    assert torch.equal(ours["model.layers.1.moe.experts.w2"][1], down * 3)
    assert not torch.equal(down * 3, (down * 3).bfloat16().float())


@pytest.mark.distributed
def test_the_run_goes_on_from_its_own_checkpoint_with_the_settings_of_the_plan(llama, tmp_path):
    flags = f"{EXPERTS} --save {tmp_path / 'run'}"
    run_distributed(runs.train_here, 1, f"--load-hf {llama[0]} {TRAINING} {flags}", "")
    settings = plan(llama[0], flags)["settings"]
    kept = {n: v for n, v in settings.items() if n != "load_hf" and not n.startswith(("moe_use_upcycling", "moe_upcycling"))}
    (tmp_path / "on.yaml").write_text(json.dumps(kept))
    on = f"--config {tmp_path / 'on.yaml'} --load {tmp_path / 'run'} --train-iters 2"
    assert run_distributed(runs.train_here, 1, on, "")[0]["progress"].iteration == 2


# ---------------------------------------------------------------- before anything starts


def plan(folder, flags):
    p = parsed(folder, f"--dry-run {flags}")
    return json.loads(json.dumps(build_plan(p.run, 2, p.given, [], p.not_yet, p.warnings)))


def parsed(folder, flags):
    return parse_args(f"--load-hf {folder} {TRAINING} {flags}".split())


def test_experts_of_the_command_are_what_is_asked_for_and_their_width_is_the_folders(llama):
    run = parsed(
        llama[0],
        "--moe-use-upcycling --num-experts 4 8 --expert-interval 1 --topk 4 --moe-upcycling-granularity 2 --moe-ffn-hidden-size 12",
    ).run
    assert run.moe.experts_per_layer(2) == (4, 8) and run.model.ffn_size == F
    assert prepare(run, 1).vocab_size == V


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{EXPERTS} --load runs/dense", "--load (runs/dense) and --load-hf ({}) are two; drop one"),
        (f"{EXPERTS} --hidden-size 32", "--hidden-size 32 on the command line contradicts {}/config.json, which makes it --hidden-size 16"),
        (f"{EXPERTS} --qk-layernorm", "--qk-layernorm is True in this command, and False in {}/config.json; drop what changes it"),
        (
            f"{EXPERTS} --moe-ffn-hidden-size 16",
            "experts of width 16 are not the whole of an MLP of width 24: give --moe-ffn-hidden-size 24",
        ),
        ("--moe-use-upcycling", "there are none here; give --num-experts"),
        ("--num-experts 8 --expert-interval 1", "drop what changes it, or add --moe-use-upcycling to make experts of the dense MLPs"),
    ],
)
def test_what_cannot_be_made_of_the_folder_is_refused(flags, message, llama):
    with pytest.raises(ConfigError) as refused:
        parsed(llama[0], flags)
    assert message.format(llama[0]) in str(refused.value)


def test_without_a_dense_model_both_ways_to_give_one_are_named():
    with pytest.raises(ConfigError, match=r"needs a dense model: --load DIR, .*, or --load-hf DIR"):
        parse_args(f"--num-layers 2 --hidden-size 16 --num-attention-heads 4 {TRAINING} {EXPERTS}".split())


def test_a_folder_with_experts_is_refused_with_what_contradicts_it(tmp_path):
    folder = write_folder(tmp_path / "mixtral", mixtral_tensors())
    with pytest.raises(ConfigError) as refused:
        parsed(folder, f"{EXPERTS} --hidden-size 32")
    text = str(refused.value)
    assert f"--load-hf {folder} has experts already (4, says config.json)" in text and "--hidden-size 32 on the command line" in text
    assert "--num-experts 8 on the command line" not in text


def test_a_dry_run_says_what_would_be_made_and_what_is_wrong_with_the_folder(llama, tmp_path):
    made = plan(llama[0], f"{EXPERTS} --moe-expert-parallel-size 2 --moe-upcycling-noise-std 0.01")
    assert made["upcycling"]["dense"] == str(llama[0]) and "--moe-upcycling-noise-std" in made["upcycling"]["inexact_because"][0]
    broken = tmp_path / "broken"
    tensors = dense_folder(broken)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: missing"):
        plan(broken, EXPERTS)
