"""Continue prompts with a trained model, or chat with it, whatever layout wrote its checkpoint.

  python tools/generate_text.py --load runs/tiny --prompt "def main" "import " --max-new-tokens 60 --top-p 0.9
  python tools/generate_text.py --load runs/tiny --prompt-file prompts.jsonl --stop "###" --greedy --output answers.jsonl
  echo "17 4 250" | python tools/generate_text.py --load runs/mock --num-samples 3
  python tools/generate_text.py --load runs/tiny --interactive
  torchrun --nproc-per-node 2 tools/generate_text.py --load runs/tiny --moe-expert-parallel-size 2 --prompt "def main"

Without --prompt and --prompt-file, prompts are the lines of standard input. A prompt file has a prompt per line; with the ending
.jsonl, a line is {"prompt": "...", "stop": ["..."]}, the latter for this prompt alone. A model trained without a tokenizer (mock
data) takes and gives token ids separated by blanks. --prompt "" starts a new document.

--interactive is a conversation: /reset forgets it, /quit ends it, Ctrl-C ends an answer. It is written by the chat template beside
the tokenizer (tokenizer_config.json), or as "User: ..." and "Assistant: ..." where there is none.

Exit code 0: all prompts were continued. 2: the command, the checkpoint or a prompt is wrong. 130: interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import checked, flag, format_problems, parse_tool
from megatron_moe.config.inference import InferenceConfig, is_first_rank
from megatron_moe.config.sampling import SamplingConfig

if TYPE_CHECKING:
    from megatron_moe.inference.engine import Answer, Engine, Piece

PROG = "tools/generate_text.py"


@dataclass(frozen=True)
class GenerateConfig:
    """Generation."""

    prompt: tuple[str, ...] = flag((), "one or several prompts, each quoted", metavar="TEXT")
    prompt_file: str | None = flag(None, "a prompt per line (lines without text are left out), or .jsonl", metavar="FILE")
    interactive: bool = flag(False, "a conversation on the terminal")
    chat_template: Literal["auto", "plain"] = flag("auto", "of --interactive: the tokenizer's own if it has one, or ours")
    max_new_tokens: int = flag(100, "length of a continuation, unless the document ends before", minimum=1)
    stop: tuple[str, ...] = flag((), "a continuation ends before the first of these texts", metavar="TEXT")
    num_samples: int = flag(1, "continuations of each prompt", minimum=1)
    batch_size: int = flag(8, "continuations written at a time", minimum=1)
    stream: Literal["auto", "always", "never"] = flag("auto", "show text while it is written; auto: on a terminal")
    output: str | None = flag(None, "write the continuations here too, one JSON object per line", metavar="FILE.jsonl")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.prompt and self.prompt_file:
            yield "give either --prompt or --prompt-file, not both"
        if self.interactive:
            others = {"--prompt": self.prompt, "--prompt-file": self.prompt_file, "--output": self.output,
                      f"--num-samples {self.num_samples}": self.num_samples > 1}  # fmt: skip
            for name in (name for name, is_given in others.items() if is_given):
                yield f"--interactive reads from the terminal and answers there, once: it has no {name}; drop one of them"
        elif self.chat_template != "auto":
            yield f"--chat-template {self.chat_template} is about a conversation; add --interactive, or leave it out"
        if "" in self.stop:
            yield "--stop: an empty text ends everything before it begins; leave it out"
        if self.output and not Path(self.output).parent.is_dir():
            yield f"--output {self.output}: there is no folder {Path(self.output).parent}; make it first"


@dataclass(frozen=True)
class Prompt:
    text: str
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One continuation; a line of --output."""

    prompt_number: int  # both counted from 1
    sample_number: int
    prompt: str
    continuation: str
    prompt_ids: list[int]
    continuation_ids: list[int]  # those of a stop string are among them, its text is not in `continuation`
    stopped_by: str  # "end of document", "stop string" or "--max-new-tokens"


def read_prompts(config: GenerateConfig) -> list[Prompt]:
    """Raises ValueError when there is none."""
    if config.prompt:
        return [Prompt(text) for text in config.prompt]
    if config.prompt_file:
        try:
            text = Path(config.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {config.prompt_file} cannot be read: {error}") from None
    else:
        if sys.stdin.isatty():
            print("prompts, one per line; Ctrl-D ends the list:", file=sys.stderr)
        text = sys.stdin.read()
    if (config.prompt_file or "").endswith(".jsonl"):
        prompts = json_prompts(config.prompt_file, text)
    else:
        prompts = [Prompt(line) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"no prompt in {config.prompt_file or 'standard input'}; give --prompt TEXT, or a line of text")
    return prompts


def json_prompts(path: str, text: str) -> list[Prompt]:
    """Raises ValueError with every line that is no prompt."""
    prompts, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(prompt_of(json.loads(line)))
        except ValueError as error:
            problems.append(f"{path} line {number}: {error}")
    if problems:
        raise ValueError("\n".join(problems[:20] + ([f"... and {len(problems) - 20} lines more"] if len(problems) > 20 else [])))
    return prompts


def prompt_of(record: Any) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError('wants an object such as {"prompt": "def main", "stop": ["###"]}; "prompt" is text')
    stop = record.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f'"stop" is a list of texts, none of them empty, not {json.dumps(stop)}')
    if unknown := sorted(record.keys() - {"prompt", "stop"}):
        raise ValueError(f'unknown key {unknown[0]!r}; there are "prompt" and "stop"')
    return Prompt(record["prompt"], tuple(stop))


def notes(engine: Engine, longest: int) -> Iterator[str]:
    """What the reader of the text should know."""
    loaded = engine.loaded
    yield from loaded.notes
    limit = loaded.run.model.max_position_embeddings
    if longest > limit:  # rotary positions go on; learned ones have been refused
        yield f"up to {longest} tokens, and the model was made for {limit} (max_position_embeddings): expect worse text beyond"
    if loaded.tokenizer is None:
        yield "the model was trained without a tokenizer: prompts and continuations are token ids"


def continuations(engine: Engine, prompts: list[Prompt], config: GenerateConfig, sampling: SamplingConfig) -> Iterator[Sample]:
    """Samples of all prompts, batch by batch. ValueError for prompts that cannot be continued, before the first."""
    from tqdm import tqdm

    from megatron_moe.inference.engine import Request

    requests = [Request(p.text, config.max_new_tokens, (*config.stop, *p.stop)) for p in prompts]
    if problems := engine.problems(requests):
        raise ValueError("\n".join(problems))
    for note in notes(engine, max(len(engine.encode(p.text)) for p in prompts) + config.max_new_tokens):
        print(note, file=sys.stderr)
    generator = engine.generator(sampling.seed)
    work = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(config.num_samples)]
    screen = Screen(config, prompts, sys.stdout)
    has_bar = sys.stderr.isatty() and not screen.is_live
    with tqdm(total=len(work) * config.max_new_tokens, unit="tok", disable=not has_bar, leave=False) as bar:
        for first in range(0, len(work), config.batch_size):
            batch = work[first : first + config.batch_size]
            answers = [empty_answer(engine, prompts[prompt]) for prompt, _ in batch]
            screen.begin(batch)
            for pieces in engine.stream([requests[prompt] for prompt, _ in batch], sampling, generator):
                for piece in pieces:
                    answers[piece.row].add(piece)
                    left = config.max_new_tokens - len(answers[piece.row].tokens) if piece.finish else 0
                    bar.update((piece.token is not None) + left)  # what an early end has saved
                screen.add(pieces)
            for (prompt, sample), answer in zip(batch, answers):
                stopped_by = "--max-new-tokens" if answer.finish == "length" else answer.finish
                done = Sample(prompt + 1, sample + 1, prompts[prompt].text, answer.text, answer.prompt_tokens, answer.tokens, stopped_by)
                screen.end(done)
                yield done


def empty_answer(engine: Engine, prompt: Prompt) -> Answer:
    from megatron_moe.inference.engine import Answer

    return Answer(engine.tokenizer.encode(prompt.text))


class Screen:
    """Where continuations are shown: one after the other, each with a rule above.

    Live, the first one of a batch that is not finished is shown as it grows; what the others have meanwhile follows at their turn.
    """

    def __init__(self, config: GenerateConfig, prompts: list[Prompt], file: TextIO):
        self.prompts, self.samples, self.file = prompts, config.num_samples, file
        self.is_live = config.stream == "always" or (config.stream == "auto" and file.isatty())
        self.bold, self.plain = ("\033[1m", "\033[0m") if file.isatty() else ("", "")

    def begin(self, batch: list[tuple[int, int]]) -> None:
        self.batch, self.row = batch, -1  # the row that is shown
        self.kept, self.ends = [""] * len(batch), [""] * len(batch)
        if self.is_live:
            self._next()

    def add(self, pieces: list[Piece]) -> None:
        if not self.is_live:
            return
        for piece in pieces:
            self.kept[piece.row] += piece.text
            if piece.finish:
                self.ends[piece.row] = "--max-new-tokens" if piece.finish == "length" else piece.finish
        self._show()
        while self.row < len(self.batch) and self.ends[self.row]:
            print(f"{self.plain}\n    (stopped by {self.ends[self.row]})", file=self.file, flush=True)
            self._next()

    def end(self, sample: Sample) -> None:
        if not self.is_live:
            print(f"--- {self._which(sample.prompt_number, sample.sample_number)}: {len(sample.continuation_ids)} new tokens, stopped by "
                  f"{sample.stopped_by}", file=self.file)  # fmt: skip
            print(f"{sample.prompt}{self.bold}{sample.continuation}{self.plain}", file=self.file, flush=True)

    def _next(self) -> None:
        self.row += 1
        if self.row < len(self.batch):
            prompt, sample = self.batch[self.row]
            print(f"--- {self._which(prompt + 1, sample + 1)}\n{self.prompts[prompt].text}{self.bold}", end="", file=self.file)
            self._show()

    def _show(self) -> None:
        if self.row < len(self.batch):
            print(self.kept[self.row], end="", file=self.file, flush=True)
            self.kept[self.row] = ""

    def _which(self, prompt_number: int, sample_number: int) -> str:
        which = f"prompt {prompt_number} of {len(self.prompts)}"
        return which + (f", sample {sample_number} of {self.samples}" if self.samples > 1 else "")


def continue_prompts(engine: Engine, prompts: list[Prompt], config: GenerateConfig, sampling: SamplingConfig) -> None:
    with ExitStack() as stack:
        output = None
        for sample in continuations(engine, prompts, config, sampling):
            if config.output:
                output = output or stack.enter_context(open(config.output, "w", encoding="utf-8"))
                output.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
                output.flush()  # an interrupted run keeps what it has


def chat(engine: Engine, config: GenerateConfig, sampling: SamplingConfig, tokenizer: TokenizerConfig) -> None:
    """Until /quit or the end of standard input."""
    from megatron_moe.inference.chat import PlainTemplate, converse, tokenizer_template
    from megatron_moe.inference.engine import Request

    template = (tokenizer_template(tokenizer) if config.chat_template == "auto" else None) or PlainTemplate()
    for note in notes(engine, 0):
        print(note, file=sys.stderr)
    print(f"template: {template.where}; /reset forgets the conversation, /quit ends it", file=sys.stderr)
    generator = engine.generator(sampling.seed)

    def answer(prompt: str, stops: tuple[str, ...]) -> str:
        text = ""
        steps = engine.stream([Request(prompt, config.max_new_tokens, (*config.stop, *stops))], sampling, generator)
        try:
            for (piece,) in steps:
                text += piece.text
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            if engine.loaded.layout.is_split:
                raise  # the other ranks have been interrupted too
            print(" (interrupted)", end="")
        finally:
            steps.close()
        print(flush=True)
        return text

    converse(next_line, answer, template, lambda text: print(text, file=sys.stderr, flush=True))


def next_line() -> str | None:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline() or None


def run(config: GenerateConfig, model: InferenceConfig, sampling: SamplingConfig, tokenizer: TokenizerConfig) -> None:
    """Load, continue, show. Raises ValueError or CheckpointError for what the user has to change."""
    prompts = read_prompts(config) if is_first_rank() and not config.interactive else []
    from megatron_moe.inference.engine import open_engine  # from here on: mistakes above are answered at once
    from megatron_moe.training.distributed import init_distributed

    with open_engine(model, tokenizer, init_distributed) as engine:
        if not engine.is_leader:
            engine.follow()
        elif config.interactive:
            chat(engine, config, sampling, engine.loaded.tokenizer_config)
        else:
            continue_prompts(engine, prompts, config, sampling)
        if engine.is_leader and engine.loaded.expert_cache:
            print(engine.loaded.expert_cache.report(), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    config, model, sampling, tokenizer = parse_tool((GenerateConfig, InferenceConfig, SamplingConfig, TokenizerConfig), PROG, argv)
    from megatron_moe.checkpoint.files import CheckpointError

    try:
        if sampling.greedy and config.num_samples > 1:
            raise ValueError(f"--greedy makes --num-samples ({config.num_samples}) equal samples; drop one of them")
        run(config, model, sampling, tokenizer)
    except (ValueError, OSError, CheckpointError) as error:
        if is_first_rank():
            print(format_problems(PROG, str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_first_rank():
            print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
