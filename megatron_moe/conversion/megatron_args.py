"""Megatron-DeepSpeed's argparse.Namespace, read without making one, and written for its --use-checkpoint-args.

Its arguments have the names of our fields, since our flags are spelled like its flags; the few that differ are here. Of a pickled
Namespace only what is inside is looked at: true, false, numbers, text and lists of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_moe.config.flags import ConfigError, convert_all, fields_of
from megatron_moe.config.run import FIELDS, GROUPS, RunConfig
from megatron_moe.conversion.plain_data import Namespace

OWN_MULTIPLE = "megatron_moe_make_vocab_size_divisible_by"  # in what we write: to read the padding that the model has here
NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
# What is taken besides model, experts and tokenizer: what a person wants to know, and what the files depend on.
_ALSO = {
    "seq_length", "seed", "micro_batch_size", "global_batch_size", "fp16", "bf16", "tensor_model_parallel_size",
    "enable_expert_tensor_parallelism", "lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad",
}  # fmt: skip
_OTHER_NAMES = {"rotary_base": "rope_theta"}  # our field -> theirs
# What the model is with them is nothing that is here; false or zero is what it must be.
_UNKNOWN = {
    "apply_layernorm_1p": "weights of norms around zero",
    "apply_residual_connection_post_layernorm": "the residual taken behind the norm",
    "embed_layernorm": "a norm behind the embedding",
    "retro_add_retriever": "a retriever",
    "mem_efficient_ln": None,  # of kernels, not of the model
}
_TANH_GELU = ("bias_gelu_fusion", "openai_gelu")  # its kernel that adds the bias too is the approximation by tanh


def plain_items(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What is true, false, a number, text, nothing, or a list of these."""
    return {str(name): value for name, value in namespace.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def run_of_args(args: Mapping[str, Any], where: str, vocab_size: int, rows: int) -> RunConfig:
    """The run that the arguments describe. `rows`: of the embedding in the files. ConfigError with all that cannot be."""
    problems = [f"{where}: the arguments in it have no {name}" for name in NEEDED if args.get(name) is None]
    problems += [f"{where}: --{name.replace('_', '-')}: {what}, which is not known here"
                 for name, what in _UNKNOWN.items() if what and args.get(name)]  # fmt: skip
    theirs = {name: args.get(_OTHER_NAMES.get(name, name)) for name, _ in _fields_taken()}
    raw = {name: value for name, value in theirs.items() if value is not None}
    raw["vocab_size"] = vocab_size
    is_rotary = bool(args.get("use_rotary_position_embeddings")) or args.get("position_embedding_type") == "rope"
    if not is_rotary and args.get("add_position_embedding") is False:
        problems.append(f"{where}: the model has no position embeddings at all (--no-position-embedding); rotary or learned ones are known")
    raw["position_embedding_type"] = "rope" if is_rotary else "learned_absolute"
    raw.pop("activation_func", None)
    raw["activation_func"] = _activation(args)
    raw.setdefault("num_experts", [1])
    if args.get("tokenizer_type") not in {None, *FIELDS["tokenizer_type"].choices}:
        for name in ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model"):
            raw.pop(name, None)
    values = convert_all(GROUPS.values(), raw, problems)
    if problems:
        raise ConfigError(problems)
    values["make_vocab_size_divisible_by"] = padding_multiple(args, vocab_size, rows)
    return RunConfig.from_values(values)


def _fields_taken() -> Iterator[tuple[str, str]]:
    """(field, its group)."""
    for group in ("model", "moe", "tokenizer"):
        yield from ((spec.name, group) for spec in fields_of(GROUPS[group]))
    for group in ("training", "parallel", "optimizer"):
        yield from ((spec.name, group) for spec in fields_of(GROUPS[group]) if spec.name in _ALSO)


def padding_multiple(args: Mapping[str, Any], vocab_size: int, rows: int) -> int:
    """Of what the vocabulary was padded to a multiple: theirs is the flag times the tensor-parallel degree; ours knows no degree."""
    tp, flag = (value if type(value := args.get(name)) is int and value > 0 else usual
                for name, usual in (("tensor_model_parallel_size", 1), ("make_vocab_size_divisible_by", 128)))  # fmt: skip
    own = args.get(OWN_MULTIPLE)
    if type(own) is int and own > 0 and -(-vocab_size // own) * own <= rows:
        return own
    for multiple in (flag, flag * tp, tp, rows):
        if multiple % tp == 0 and -(-vocab_size // multiple) * multiple == rows:
            return multiple
    raise ConfigError([f"{rows} rows of the embedding are not {vocab_size} words padded to a multiple of {flag} x {tp}: "
                       f"give --true-vocab-size, the vocabulary before padding"])  # fmt: skip


def _activation(args: Mapping[str, Any]) -> str:
    named = next((name for name in ("swiglu", "squared_relu") if args.get(name)), None)
    return named or ("gelu_tanh" if any(args.get(name) for name in _TANH_GELU) else "gelu")


# ---------------------------------------------------------------- the other way


def args_of_run(
    run: RunConfig, vocab_size: int | None, rows: int | None, degrees: Mapping[str, Any], progress: Mapping[str, Any]
) -> Namespace:
    """Arguments with which its --use-checkpoint-args and its check of arguments find the same model."""
    m = run.model
    settings = {_OTHER_NAMES.get(name, name): getattr(getattr(run, group), name) for name, group in _fields_taken()}
    settings |= {
        "num_experts": list(run.moe.num_experts), "num_key_value_heads": m.key_value_heads, "kv_channels": m.head_dim,
        "ffn_hidden_size": m.ffn_size, "vocab_size": vocab_size, "padded_vocab_size": rows, "swiglu": m.activation == "swiglu",
        "squared_relu": m.activation == "squared_relu", "normalization": m.normalization.lower(),
        "use_rotary_position_embeddings": m.position_embedding_type == "rope",
        "add_position_embedding": m.position_embedding_type == "learned_absolute", "bias_gelu_fusion": m.activation == "gelu_tanh" and m.add_bias_linear,
        "openai_gelu": m.activation == "gelu_tanh" and not m.add_bias_linear,
        "iteration": progress.get("iteration", 0), "consumed_train_samples": progress.get("consumed_samples", 0),
        "consumed_train_tokens": progress.get("consumed_tokens", 0), "consumed_valid_samples": 0, "pipeline_model_parallel_size": 1,
    } | degrees  # fmt: skip
    return Namespace(**{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()})
