"""Continue prompts with a trained model, in one process, whatever layout wrote its checkpoint.

  python tools/generate_text.py --load runs/tiny --prompt "def main" "import " --max-new-tokens 60 --top-p 0.9
  python tools/generate_text.py --load runs/tiny --prompt-file prompts.txt --greedy --output answers.jsonl
  echo "17 4 250" | python tools/generate_text.py --load runs/mock --num-samples 3

Without --prompt and --prompt-file, prompts are the lines of standard input. A model trained without a tokenizer (mock data)
takes and gives token ids separated by blanks. --prompt "" starts a new document.

Exit code 0: all prompts were continued. 2: the command, the checkpoint or a prompt is wrong. 130: interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import checked, flag, format_problems, parse_tool
from megatron_moe.config.sampling import SamplingConfig

if TYPE_CHECKING:
    from megatron_moe.inference.load import Loaded

PROG = "tools/generate_text.py"


@dataclass(frozen=True)
class GenerateConfig:
    """Generation."""

    load: str | None = flag(None, "run directory (its newest checkpoint), or one iter_ directory", metavar="DIR")
    ckpt_step: int | None = flag(None, "the checkpoint of this iteration and no other", names=("load-iteration",), minimum=0)
    ckpt_verify: Literal["crc", "size", "off"] = flag("crc", "how the checkpoint is checked before it is loaded")
    prompt: tuple[str, ...] = flag((), "one or several prompts, each quoted", metavar="TEXT")
    prompt_file: str | None = flag(None, "a prompt per line; lines without text are left out", metavar="FILE")
    max_new_tokens: int = flag(100, "length of a continuation, unless the document ends before", minimum=1)
    num_samples: int = flag(1, "continuations of each prompt", minimum=1)
    batch_size: int = flag(8, "continuations written at a time", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto takes a GPU if there is one")
    output: str | None = flag(None, "write the continuations here too, one JSON object per line", metavar="FILE.jsonl")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.load:
            yield "--load DIR is missing: the directory given to --save in training"
        if self.prompt and self.prompt_file:
            yield "give either --prompt or --prompt-file, not both"
        if self.output and not Path(self.output).parent.is_dir():
            yield f"--output {self.output}: there is no folder {Path(self.output).parent}; make it first"


class TokenIds:
    """In place of a tokenizer: text that already is token ids, such as "5 17 2"."""

    def encode(self, text: str) -> list[int]:
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(
                f"the model was trained without a tokenizer: a prompt is token ids separated by blanks, not {text!r}; give ids, or "
                f"the tokenizer with --tokenizer-model, --vocab-file and --merge-file, or --tokenizer-type"
            ) from None

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Sample:
    """One continuation; a line of --output."""

    prompt_number: int  # both counted from 1
    sample_number: int
    prompt: str
    continuation: str
    prompt_ids: list[int]
    continuation_ids: list[int]
    stopped_by: Literal["end of document", "--max-new-tokens"]


def read_prompts(config: GenerateConfig) -> list[str]:
    """Raises ValueError when there is none."""
    if config.prompt:
        return list(config.prompt)
    if config.prompt_file:
        try:
            text = Path(config.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {config.prompt_file} cannot be read: {error}") from None
    else:
        if sys.stdin.isatty():
            print("prompts, one per line; Ctrl-D ends the list:", file=sys.stderr)
        text = sys.stdin.read()
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"no prompt in {config.prompt_file or 'standard input'}; give --prompt TEXT, or a line of text")
    return prompts


def notes(loaded: Loaded, longest: int) -> Iterator[str]:
    """What the reader of the text should know."""
    yield from loaded.notes
    limit = loaded.run.model.max_position_embeddings
    if longest > limit:  # rotary positions go on; learned ones have been refused
        yield f"up to {longest} tokens, and the model was made for {limit} (max_position_embeddings): expect worse text beyond"
    if loaded.tokenizer is None:
        yield "the model was trained without a tokenizer: prompts and continuations are token ids"


def continuations(loaded: Loaded, prompts: list[str], config: GenerateConfig, sampling: SamplingConfig) -> Iterator[Sample]:
    """Samples of all prompts, batch by batch. ValueError for prompts that cannot be continued, before the first."""
    import torch
    from tqdm import tqdm

    from megatron_moe.inference.generate import collect, prompt_problems, start, stream

    text = loaded.tokenizer or TokenIds()
    encoded = [text.encode(prompt) for prompt in prompts]
    starts = [start(ids, loaded.eod) for ids in encoded]
    if problems := prompt_problems(loaded.model, starts, config.max_new_tokens):
        raise ValueError("\n".join(problems))
    for note in notes(loaded, max(map(len, starts)) + config.max_new_tokens):
        print(note, file=sys.stderr)
    generator = torch.Generator(loaded.model.output_weight.device).manual_seed(sampling.seed)
    work = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(config.num_samples)]
    with tqdm(total=len(work) * config.max_new_tokens, unit="tok", disable=not sys.stderr.isatty(), leave=False) as bar:
        for first in range(0, len(work), config.batch_size):
            batch = work[first : first + config.batch_size]
            steps = stream(loaded.model, [starts[p] for p, _ in batch], config.max_new_tokens, sampling, loaded.eod, generator)
            texts = collect(counted(steps, bar), len(batch))
            for (prompt, sample), new in zip(batch, texts):
                bar.update(config.max_new_tokens - len(new))  # what an early end has saved
                whole, head = text.decode(encoded[prompt] + new), text.decode(encoded[prompt])
                # not decode(new): SentencePiece drops a leading blank
                tail = whole.removeprefix(head) if whole.startswith(head) else text.decode(new)
                stopped_by = "end of document" if len(new) < config.max_new_tokens else "--max-new-tokens"
                yield Sample(prompt + 1, sample + 1, prompts[prompt], tail, encoded[prompt], new, stopped_by)


def counted(steps: Iterator[list[int | None]], bar) -> Iterator[list[int | None]]:
    for step in steps:
        bar.update(sum(token is not None for token in step))
        yield step


def show(sample: Sample, total_prompts: int, total_samples: int, file: TextIO) -> None:
    """A rule with the numbers, then the text; on a terminal the continuation is bold."""
    which = f"prompt {sample.prompt_number} of {total_prompts}"
    if total_samples > 1:
        which += f", sample {sample.sample_number} of {total_samples}"
    bold, plain = ("\033[1m", "\033[0m") if file.isatty() else ("", "")
    print(f"--- {which}: {len(sample.continuation_ids)} new tokens, stopped by {sample.stopped_by}", file=file)
    print(f"{sample.prompt}{bold}{sample.continuation}{plain}", file=file, flush=True)


def run(config: GenerateConfig, sampling: SamplingConfig, tokenizer: TokenizerConfig) -> None:
    """Load, continue, show. Raises ValueError or CheckpointError for what the user has to change."""
    prompts = read_prompts(config)
    import torch  # from here on: mistakes above are answered at once

    from megatron_moe.inference.load import load_for_inference

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    loaded = load_for_inference(config.load, config.ckpt_step, device, tokenizer, config.ckpt_verify)
    with ExitStack() as stack:
        output = None
        for sample in continuations(loaded, prompts, config, sampling):
            show(sample, len(prompts), config.num_samples, sys.stdout)
            if config.output:
                output = output or stack.enter_context(open(config.output, "w", encoding="utf-8"))
                output.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
                output.flush()  # an interrupted run keeps what it has


def main(argv: list[str] | None = None) -> int:
    config, sampling, tokenizer = parse_tool((GenerateConfig, SamplingConfig, TokenizerConfig), PROG, argv)
    from megatron_moe.checkpoint.files import CheckpointError

    try:
        if sampling.greedy and config.num_samples > 1:
            raise ValueError(f"--greedy makes --num-samples ({config.num_samples}) equal samples; drop one of them")
        run(config, sampling, tokenizer)
    except (ValueError, OSError, CheckpointError) as error:
        print(format_problems(PROG, str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
