"""Settings of attention on the command line: what is refused, what is warned about, which checkpoints fit."""

import pytest

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig

TINY = "--preset tiny --mock-data --train-iters 2"
RING = "--context-parallel-size 2 --cp-comm-type p2p --seq-length 128"
MLA = "--multi-latent-attention --position-embedding-type rope --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 8"


def parsed(flags: str):
    return parse_args(f"{TINY} {flags}".split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--window-size 16", "kernels without a window, and --window-size is 16"),
        ("--softmax-type learnable", "know of no sinks"),
        (f"{MLA} --qk-head-dim 12", "a multiple of 8, not 20; change --qk-head-dim"),
    ],
)
def test_a_ring_of_keys_refuses_what_its_kernels_cannot_do(flags, said):
    with pytest.raises(ConfigError, match=said) as refused:
        parsed(f"{flags} {RING}")
    assert "all_gather" in str(refused.value)
    assert parsed(f"{flags} {RING.replace('p2p', 'all_gather')}").run.parallel.context_parallel_size == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--qk-layernorm-scope hidden", "--qk-layernorm-scope has no effect: it is a setting of --qk-layernorm"),
        ("--window-attn-skip-freq 2", "--window-attn-skip-freq has no effect: it is a setting of --window-size"),
        ("--rotary-percent 0.5", "--rotary-percent has no effect: it is a setting of --position-embedding-type rope"),
        (
            "--rope-beta-fast 16 --position-embedding-type rope",
            "--rope-beta-fast has no effect: it is a setting of --rope-scaling-type yarn",
        ),
        ("--kv-lora-rank 64", "--kv-lora-rank has no effect: it is a setting of --multi-latent-attention"),
        ("--add-qkv-bias", "--add-qkv-bias has no effect with biases in all linear layers"),
        ("--num-experts 1 --moe-first-k-dense-replace 1", "--moe-first-k-dense-replace (1) has no effect: all layers are dense"),
    ],
)
def test_a_setting_without_its_switch_is_warned_about(flags, said):
    assert any(said in warning for warning in parsed(flags).warnings)


@pytest.mark.parametrize(
    ("given", "pattern"),
    [("4", (4,)), ("1 0 1 1", (1, 0, 1, 1)), ("[1,0,1,1]", (1, 0, 1, 1)), ("[1]*3+[0]", (1, 1, 1, 0)), ("([0]+[1])*2", (0, 1, 0, 1))],
)
def test_a_pattern_of_layers_is_read_as_megatron_writes_it(given, pattern):
    run = parse_args([*TINY.split(), "--window-size", "8", "--window-attn-skip-freq", *given.split()]).run
    assert run.model.window_attn_skip_freq == pattern


@pytest.mark.parametrize(
    "given", ["[1]*(3", "[1]*3+x", "__import__('os')*2", "[1]*100000000", "([1]*9999)*9999", "3*4", "[1.5]*4", "[1]*-1+[0"]
)
def test_what_is_no_pattern_is_refused(given):
    with pytest.raises(ConfigError, match=r"--window-attn-skip-freq: .*such as \(\[1\]\*3\+\[0\]\)\*2"):
        parse_args([*TINY.split(), "--window-size", "8", "--window-attn-skip-freq", given])


def test_all_mistakes_are_said_at_once():
    with pytest.raises(ConfigError) as refused:
        parsed(
            f"{MLA} --num-key-value-heads 2 --kv-channels 8 --rope-scaling-type yarn --rope-beta-slow 64 --window-size 3 --window-attn-skip-freq 1 0"
        )
    assert len(refused.value.problems) == 4


NEW = (
    "--qk-layernorm", "--disable-bias-linear --add-qkv-bias", "--window-size 8", "--softmax-type learnable", MLA,
    "--position-embedding-type rope --rotary-percent 0.5", "--position-embedding-type rope --rotary-interleaved",
    "--position-embedding-type rope --rope-scaling-type linear --rope-scaling-factor 2",
)  # fmt: skip


def of_before(architecture: dict) -> dict:
    """As a run that was written before these fields existed has it: the fields of then."""
    known = {
        "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "kv_channels", "ffn_hidden_size", "max_position_embeddings",
        "position_embedding_type", "rotary_base", "normalization", "layernorm_epsilon", "swiglu", "add_bias_linear",
        "untie_embeddings_and_output_weights", "make_vocab_size_divisible_by", "vocab_size", "padded_vocab_size", "experts_per_layer", "mlp_type",
    }  # fmt: skip
    return {name: value for name, value in architecture.items() if name in known}


def test_checkpoints_of_before_still_are_of_their_architecture():
    plain = parsed("").run.architecture(100)
    assert plain == of_before(plain), "a new field is named only where it does something"
    for flags in NEW:
        assert parsed(flags).run.architecture(100) != of_before(parsed(flags).run.architecture(100)), flags
    assert parsed("--kv-lora-rank 64 --rope-beta-fast 3 --add-qkv-bias").run.architecture(100) == plain, (
        "settings of nothing change nothing"
    )


@pytest.mark.parametrize(
    "flags", [*NEW, "--window-size 8 --window-attn-skip-freq 1 0 1 1", "--moe-first-k-dense-replace 2 --num-experts 4"]
)
def test_a_run_comes_back_from_json(flags):
    import json

    run = parsed(flags).run
    back = RunConfig.from_dict(json.loads(json.dumps(run.to_dict())))
    assert back == run
    assert json.loads(json.dumps(run.architecture(100))) == run.architecture(100)
