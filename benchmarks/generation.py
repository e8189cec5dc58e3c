"""tokens/s of reading a prompt and of writing, batch 1 and 8, against transformers' generate and against the products alone

A Mixtral of 6 layers, 512 wide, 8 experts of 1024, top-2, float32: 89 million parameters, more than any cache holds. Ours is
inference/generate.py, theirs MixtralForCausalLM.generate with each implementation of its experts that runs here, with the same weights; the
greedy tokens of all have to be the same before anything is timed. A turn reads prompts of 256 tokens and writes one token, and another one
reads them and writes 33: the difference is 32 tokens of writing.

The floor is the products of the same weights with as many rows, each expert's with the tokens that go to it (drawn evenly), without attention,
norms, routing or sampling. Bytes: every weight that a token needs is read once; at batch 1 the floor of writing is these bytes over the rate
at which this machine reads memory, which is measured beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Options, Report, Spread, System, Times, interleave, missing, spread, table
from benchmarks.step_peers import mixtral_weights
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate
from megatron_moe.kernels.linear import linear
from megatron_moe.kernels.matmul_cpu import matmul
from megatron_moe.model.flops import parameter_counts
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import initialize_parameters
from megatron_moe.model.plain import build_plain
from megatron_moe.training.planning.exchange import distinct

PEERS = {"transformers": "MixtralForCausalLM.generate; experts eager or grouped_mm"}
FULL = {"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
QUICK = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {
    "num_experts": (8,), "topk": 2, "expert_interval": 1, "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope",
    "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "moe_token_dropping": False, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "max_position_embeddings": 512, "seq_length": 512, "moe_router_normalize": "chosen",
    "moe_top2_2nd_expert_sampling": False, "make_vocab_size_divisible_by": 64,
}  # fmt: skip
OURS, FLOOR = "megatron_moe", "products alone"
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies the weights for each routed token: 26 GB for eight of these prompts
ROUNDS = 7
READ_BYTES = 1 << 28


def run(options: Options) -> Report:
    vocab, prompt, new = (128, 16, 4) if options.quick else (8192, 256, 32)
    rounds = options.rounds_or(ROUNDS)
    report = Report("generation", {"prompt": prompt, "new": new, "rounds": rounds, "threads": torch.get_num_threads()}, missing(PEERS))
    config = RunConfig.from_values((QUICK if options.quick else FULL) | COMMON)
    model = model_of(config, vocab)
    read = memory_rate(READ_BYTES >> (8 if options.quick else 0))
    for batch in (1, 8):
        writers = {OURS: partial(ours, model), FLOOR: partial(products, model, random.Random(1))}
        if not report.skipped:
            writers |= {f"transformers {experts}": partial(theirs, their_model(model, config, vocab, experts)) for experts in EXPERTS}
        prompts = torch.randint(vocab, (batch, prompt), generator=torch.Generator().manual_seed(batch)).tolist()
        check_equal({name: write(prompts, new + 1) for name, write in writers.items() if name != FLOOR})
        systems = [System(f"{name}, {n}", partial(write, prompts, n)) for name, write in writers.items() for n in (1, new + 1)]
        samples = interleave(systems, rounds)
        report.samples[f"batch {batch}"] = samples
        conclude(report, batch, prompt, new, list(writers), samples, active_bytes(config, vocab, batch), read)
    return report


def conclude(
    report: Report, batch: int, prompt: int, new: int, names: list[str], samples: dict[str, list[Times]], active: float, read: float
) -> None:  # fmt: skip
    rows, figures = [], {}
    for name in names:
        reading = [t.cpu for t in samples[f"{name}, 1"]]
        writing = between(samples[f"{name}, 1"], samples[f"{name}, {new + 1}"])
        floor = between(samples[f"{FLOOR}, 1"], samples[f"{FLOOR}, {new + 1}"])
        over = {
            "reading": spread(a / b.cpu for a, b in zip(reading, samples[f"{FLOOR}, 1"])),
            "writing": spread(a / b for a, b in zip(writing, floor)),
        }
        figures[name] = {
            "reading_tokens_per_cpu_second": batch * prompt / spread(reading).median,
            "writing_tokens_per_cpu_second": batch * new / spread(writing).median,
        } | {f"{phase}_over_products": values._asdict() for phase, values in over.items()}
        rows.append([
            name, *(f"{figures[name][f'{phase}_tokens_per_cpu_second']:.0f}" for phase in over), *(shown(values) for values in over.values()),
            f"{spread(writing).median / new * 1e3:.2f}",
        ])  # fmt: skip
    report.figures[f"batch {batch}"] = {
        "systems": figures, "bytes_read_per_step": active, "memory_bytes_per_second": read, "least_seconds_per_step": active / read,
    }  # fmt: skip
    header = ["system", "read tokens/cpu s", "written tokens/cpu s", "read / products", "written / products", "cpu ms a step"]
    text = (f"batch {batch}: a step reads {active / 1e6:.1f} MB of weights, {active / read * 1e3:.2f} ms at the {read / 1e9:.1f} GB/s "
            "at which this machine reads")  # fmt: skip
    report.tables.append(f"{text}\n{table(header, rows)}")


def between(short: list[Times], long: list[Times]) -> list[float]:
    """CPU seconds of what the longer turns do beyond the shorter ones, round by round."""
    return [max(b.cpu - a.cpu, 1e-9) for a, b in zip(short, long)]


def shown(values: Spread) -> str:
    return f"{values.median:.2f} ({values.low:.2f}-{values.high:.2f})"


def check_equal(tokens: dict[str, list[list[int]]]) -> None:
    """All systems do the same work."""
    first = tokens[OURS]
    for name, found in tokens.items():
        assert found == first, f"{name} and {OURS} do not write the same: {found} and {first}"


def memory_rate(size: int) -> float:
    """Bytes per second of CPU time at which a tensor that no cache holds is read and added up, the best of 5."""
    x = torch.ones(size // 4)
    return size / min(System("read", x.sum).turn().cpu for _ in range(5))


def active_bytes(config: RunConfig, vocab: int, batch: int) -> float:
    """Weights that a step with one token for each of `batch` texts reads: those of all experts that somebody goes to, if each token's
    choice is as likely as any other; of the embedding only the rows of the tokens."""
    counts = parameter_counts(config.model, config.moe, vocab)
    experts, k = config.moe.num_experts[0], config.moe.topk
    used = experts * (1 - (1 - distinct(experts, experts, k) / experts) ** batch)
    layers = sum(layer.total - layer.experts + layer.experts / experts * used for layer in counts.per_layer)
    return 4.0 * (layers + counts.head + counts.final_norm + batch * config.model.hidden_size)


# ---------------------------------------------------------------- the systems: (prompts, new tokens) -> tokens


def model_of(config: RunConfig, vocab: int) -> GPT:
    model = build_plain(config, vocab)
    model.to_empty(device="cpu")
    initialize_parameters(model, 1, 0.05, config.model.num_layers)
    return model.eval()


def ours(model: GPT, prompts: list[list[int]], new: int) -> list[list[int]]:
    return generate(model, prompts, new, SamplingConfig(greedy=True))


def products(model: GPT, draw: random.Random, prompts: list[list[int]], new: int) -> None:
    """Each weight times as many rows as it has in such a run, by the faster of torch's two libraries."""
    with torch.no_grad():
        for step in range(new):
            _step_of_products(model, draw, len(prompts), 1 if step else len(prompts[0]))


def _step_of_products(model: GPT, draw: random.Random, batch: int, length: int) -> None:
    width, rows = model.config.hidden_size, batch * length
    x_TD = torch.ones(rows, width)
    for block in model.layers.values():
        for proj in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            proj(x_TD)
        block.attn.out_proj(torch.ones(rows, block.attn.out_proj.in_features))
        block.moe.gate(x_TD)
        experts, E = block.moe.experts, block.moe.num_experts
        counts = [0] * E
        for _ in range(rows):
            for e in draw.sample(range(E), model.moe_config.topk):
                counts[e] += 1
        for e, n in enumerate(counts):
            if n:
                x_nD = torch.ones(n, width)
                matmul(matmul(x_nD, experts.w1[e]), experts.w2[e])
                matmul(x_nD, experts.w_gate[e])
    linear(torch.ones(batch, width), model.output_weight)


def their_model(model: GPT, config: RunConfig, vocab: int, experts: str) -> torch.nn.Module:
    """Mixtral with our weights."""
    import transformers

    m = config.model
    settings = transformers.MixtralConfig(
        vocab_size=vocab, hidden_size=m.hidden_size, intermediate_size=m.ffn_size, num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads, num_key_value_heads=m.key_value_heads, head_dim=m.head_dim,
        max_position_embeddings=m.max_position_embeddings, rms_norm_eps=m.layernorm_epsilon, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": m.rotary_base}, bos_token_id=None, eos_token_id=None,
        num_local_experts=config.moe.num_experts[0], num_experts_per_tok=config.moe.topk, attn_implementation="sdpa",
        experts_implementation=experts,
    )  # fmt: skip
    peer = transformers.MixtralForCausalLM(settings)
    weights: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    peer.load_state_dict(mixtral_weights(weights, m.num_layers))
    return peer.eval()


def theirs(peer: torch.nn.Module, prompts: list[list[int]], new: int) -> list[list[int]]:
    write: Callable[..., Tensor] = peer.generate
    tokens_BS = torch.tensor(prompts)
    with torch.no_grad():
        found = write(
            input_ids=tokens_BS,
            attention_mask=torch.ones_like(tokens_BS),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
    return found[:, tokens_BS.shape[1] :].tolist()
