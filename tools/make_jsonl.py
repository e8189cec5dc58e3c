"""Turn folders of text or source code into a JSONL corpus, one document per file, in an order shuffled by a seed.

  python tools/make_jsonl.py --output corpus.jsonl                          # this Python's own standard library
  python tools/make_jsonl.py --input notes/ book.txt --extensions .txt .md --output corpus.jsonl

The order matters because --split cuts a corpus in file order: unshuffled, validation would be the last folders only.
Each line is {"text": ..., "path": ...}. Files that are not UTF-8 are skipped and counted.
"""

from __future__ import annotations

import json
import os
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, without an install

from tqdm import tqdm

from megatron_moe.config.flags import checked, flag, parse_tool
from megatron_moe.utils.atomic import atomic_write

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "node_modules"}
TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class MakeJsonlConfig:
    """Making a corpus."""

    input: tuple[str, ...] = flag((), "files and folders; the standard library of the running Python when not given", metavar="PATH")
    output: str | None = flag(None, "the JSONL file to write", metavar="FILE.jsonl")
    extensions: tuple[str, ...] = flag((".py", ".txt", ".rst", ".md"), "endings of the files to take from folders", metavar=".EXT")
    min_bytes: int = flag(1, "leave out smaller files", minimum=0)
    max_bytes: int = flag(1 << 24, "leave out larger files", minimum=1)
    include_tests: bool = flag(False, "also descend into folders named test or tests")
    seed: int = flag(1234, "seed of the order of documents", minimum=0)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.output:
            yield "--output FILE.jsonl is required"
        for path in self.input:
            if not os.path.exists(path):
                yield f"--input {path} does not exist; name a file or a folder"
        for extension in self.extensions:
            if not extension.startswith("."):
                yield f"--extensions begin with a dot: .{extension}, not {extension}"
        if self.min_bytes > self.max_bytes:
            yield f"--min-bytes ({self.min_bytes}) is above --max-bytes ({self.max_bytes})"


def find_files(config: MakeJsonlConfig) -> list[Path]:
    """Files to take, in an order that depends on names and seed alone."""
    roots = config.input or (sysconfig.get_paths()["stdlib"],)
    names: set[str] = set()
    for root in roots:
        names.update([root] if os.path.isfile(root) else walk(root, config))
    files = sorted(names)
    random.Random(config.seed).shuffle(files)
    return [Path(name) for name in files]


def walk(root: str, config: MakeJsonlConfig) -> Iterator[str]:
    skipped = SKIPPED_FOLDERS | (set() if config.include_tests else TEST_FOLDERS)
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        yield from (os.path.join(folder, name) for name in names if name.endswith(config.extensions))


def read_text(path: Path, config: MakeJsonlConfig) -> tuple[str, str]:
    """(text, "") of a file to keep, or ("", why it is left out)."""
    try:
        size = path.stat().st_size
        if not config.min_bytes <= size <= config.max_bytes:
            return "", "smaller than --min-bytes or larger than --max-bytes"
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    except OSError as error:
        return "", f"not readable: {error.strerror}"
    return (text, "") if text.strip() else ("", "blank")


def write_corpus(files: Iterable[Path], config: MakeJsonlConfig) -> tuple[int, int, Counter]:
    """(documents, bytes of text, files left out by reason). ValueError when nothing is left: the output is not made then."""
    documents = size = 0
    left_out: Counter = Counter()
    with atomic_write(config.output) as output:
        for path in tqdm(files, unit=" files", disable=not sys.stderr.isatty()):
            text, reason = read_text(path, config)
            if reason:
                left_out[reason] += 1
                continue
            output.write(json.dumps({"text": text, "path": str(path)}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            documents += 1
            size += len(text.encode())
        if not documents:
            raise ValueError(f"no document was found (left out: {dict(left_out) or 'nothing'}); check --input and --extensions")
    return documents, size, left_out


def main(argv: list[str] | None = None) -> int:
    config = parse_tool(MakeJsonlConfig, "tools/make_jsonl.py", argv)
    try:
        documents, size, left_out = write_corpus(find_files(config), config)
    except (ValueError, OSError) as error:
        print(f"tools/make_jsonl.py: {error}", file=sys.stderr)
        return 2
    print(f"{config.output}: {documents} documents, {size / 1e6:.1f} MB of text")
    for reason, count in left_out.most_common():
        print(f"  left out {count}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
