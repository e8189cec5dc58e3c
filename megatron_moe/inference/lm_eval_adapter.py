"""EleutherAI's lm-evaluation-harness (the package lm_eval, extra test-lm-eval) runs our checkpoints: the model "megatron_moe".

  python -m megatron_moe.inference.lm_eval_adapter run --model megatron_moe --model_args load=runs/a --batch_size 16 --tasks lambada_openai

or from Python, also in a layout of several ranks (rank 0 evaluates, the others follow):

    with Engine(load_for_inference("runs/a", layout=layout)) as engine:
        engine.follow() if not engine.is_leader else lm_eval.simple_evaluate(model=MegatronMoELM(engine=engine), tasks=[...])

Scores are those of inference/scoring.py, text that of Engine.stream. A conversation template is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import ConfigError, fields_of
from megatron_moe.config.inference import InferenceConfig
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.engine import Engine, Request, open_engine
from megatron_moe.inference.scoring import Row, Score, encode_pair, pair_row, windows

DEFAULT_NEW_TOKENS = 256  # the harness's own, where a task says nothing


@register_model("megatron_moe")
class MegatronMoELM(TemplateLM):
    """`engine`, or the flags of a tool: load=DIR, ckpt_step, device, expert_cache_gb, tokenizer_model, ...

    max_length: tokens that a prediction sees at most; as in training when not given.
    """

    def __init__(self, engine: Engine | None = None, batch_size: int | str = 8, max_length: int | None = None, **flags: Any):
        super().__init__()
        self.engine = engine or open_by_flags(flags)
        if self.engine.loaded.eod is None or self.engine.loaded.tokenizer is None:
            raise ValueError("the harness scores text, and the model was trained without a tokenizer; give one with tokenizer_model=FILE")
        self.rows_at_a_time = 8 if batch_size == "auto" else int(batch_size)
        self.window = int(max_length or self.engine.loaded.run.training.seq_length)

    @property
    def eot_token_id(self) -> int:
        return self.engine.loaded.eod

    @property
    def tokenizer_name(self) -> str:
        return self.engine.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.engine.tokenizer.encode(string)

    # ------------------------------------------------------------ scoring

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self.engine.tokenizer, context, continuation, self.eot_token_id)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [pair_row(before, after, self.window) for _, before, after in requests]
        answers = [(score.log_prob, score.is_greedy) for score in self._scores(rows, disable_tqdm)]
        for (texts, _, _), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap, but for the last one, which is moved back."""
        texts = [request.args[0] for request in requests]
        rows = [list(windows([self.eot_token_id, *self.tok_encode(text)], self.window, self.window)) for text in texts]
        scores = iter(self._scores([row for some in rows for row in some], disable_tqdm))
        sums = [sum(next(scores).log_prob for _ in some) for some in rows]
        for text, total in zip(texts, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def _scores(self, rows: Sequence[Row], is_silent: bool) -> list[Score]:
        """In the order of the rows."""
        scores: dict[int, Score] = {}
        for batch in self._batches(len(rows), lambda i: len(rows[i].tokens), is_silent):
            scores |= zip(batch, self.engine.score([rows[i] for i in batch]))
        return [scores[i] for i in range(len(rows))]

    # ------------------------------------------------------------ text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        wanted = [self._request(*request.args) for request in requests]
        texts: dict[int, str] = {}
        for sampling in dict.fromkeys(sampling for _, sampling in wanted):
            mine = [i for i, (_, other) in enumerate(wanted) if other == sampling]
            generator = self.engine.generator(sampling.seed)
            for batch in self._batches(len(mine), lambda i, mine=mine: len(wanted[mine[i]][0].prompt), disable_tqdm):
                numbers = [mine[i] for i in batch]
                answers = self.engine.complete([wanted[i][0] for i in numbers], sampling, generator)
                texts |= zip(numbers, (answer.text for answer in answers))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _request(self, context: str, settings: dict[str, Any]) -> tuple[Request, SamplingConfig]:
        """The context is cut on the left to what the window has room for beside the answer."""
        stops = settings.get("until") or []
        stops = (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)
        new = min(int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), max(self.window - 1, 1))
        prompt = (self.tok_encode(context) or [self.eot_token_id])[-max(self.window - new, 1) :]
        temperature = float(settings.get("temperature") or 0.0)
        if not settings.get("do_sample", temperature > 0) or temperature == 0:
            sampling = SamplingConfig(greedy=True)
        else:
            sampling = SamplingConfig(temperature=temperature, top_k=int(settings.get("top_k", 0)), top_p=float(settings.get("top_p", 1.0)))
        return Request(prompt, new, stops), sampling

    def _batches(self, count: int, length: Callable[[int], int], is_silent: bool) -> Iterator[list[int]]:
        """Numbers from 0 to `count`, the longest first, so that little is padding."""
        order = sorted(range(count), key=lambda i: -length(i))
        with tqdm(total=count, disable=is_silent) as bar:
            for first in range(0, count, self.rows_at_a_time):
                batch = order[first : first + self.rows_at_a_time]
                yield batch
                bar.update(len(batch))


def open_by_flags(flags: dict[str, Any]) -> Engine:
    """One process. ConfigError for a name that is no flag."""
    groups: dict[type, dict[str, Any]] = {InferenceConfig: {}, TokenizerConfig: {}}
    flags = {name: value for name, value in flags.items() if name != "max_batch_size" and value is not None}  # it is for "auto"
    # the harness says cuda where nobody has said anything
    flags["device"] = "cpu" if str(flags.get("device", "auto")) == "cpu" else "auto"
    problems = []
    for name, value in flags.items():
        owner = next((cls for cls in groups if name in {spec.name for spec in fields_of(cls)}), None)
        if owner is None:
            problems.append(f"model_args: there is no {name}; there are {', '.join(s.name for cls in groups for s in fields_of(cls))}")
        else:
            groups[owner][name] = value
    if problems:
        raise ConfigError(problems)
    return open_engine(InferenceConfig(**groups[InferenceConfig]), TokenizerConfig(**groups[TokenizerConfig]), _no_ranks)


def _no_ranks(_: Any) -> Any:
    raise ValueError("model_args open a model in one process; for several ranks hand MegatronMoELM an engine, as its file says")


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
