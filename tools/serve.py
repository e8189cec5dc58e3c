"""Answer over HTTP, in OpenAI's dialect, with a trained model, whatever layout wrote its checkpoint.

  python tools/serve.py --load runs/tiny
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def main", "max_tokens": 40}'
  python tools/serve.py --load runs/tiny --port 9000 --batch-size 16 --max-waiting-requests 32 --api-key-file keys.txt
  torchrun --nproc-per-node 2 tools/serve.py --load runs/tiny --moe-expert-parallel-size 2

POST /v1/completions, POST /v1/chat/completions (both with "stream": true if wished), GET /v1/models, GET /health. docs/using_a_model.md
lists the fields and the errors.

Only this machine can reach it unless --host says otherwise. Calls that wait are answered in one batch; a call with a "seed" is
answered alone, so that its text does not depend on what else runs.

The first SIGTERM or Ctrl-C ends it: what is there is still answered, within --shutdown-timeout; another one ends that too.
Exit code 0: ended by a signal. 1: the model has failed. 2: the command, the checkpoint or the address is wrong.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import checked, flag, format_problems, parse_tool
from megatron_moe.config.inference import InferenceConfig, is_first_rank
from megatron_moe.utils.logging import logger, setup_logging

if TYPE_CHECKING:
    from megatron_moe.inference.engine import Engine
    from megatron_moe.inference.serving.scheduler import Scheduler
    from megatron_moe.inference.serving.server import Server

PROG = "tools/serve.py"
SAME_SIGNAL_SECONDS = 2.0  # Ctrl-C under torchrun arrives twice: from the terminal and from the launcher


class ModelFailedError(Exception):
    """Nothing that the user could change on the command line."""


@dataclass(frozen=True)
class ServeConfig:
    """Serving."""

    host: str = flag("127.0.0.1", "address to listen at; anything but this machine's own opens the model to the network")
    port: int = flag(8000, "0 takes one that is free", minimum=0, maximum=65535)
    served_model_name: str | None = flag(
        None, "what clients call the model; without it the name of the directory of --load", metavar="NAME"
    )
    api_key_file: str | None = flag(None, "keys that clients may send, one per line; without it nobody is asked for one", metavar="FILE")
    chat_template: Literal["auto", "plain"] = flag("auto", "of conversations: the tokenizer's own if it has one, or ours")
    batch_size: int = flag(8, "answers written at a time; also the most that one request may ask for", minimum=1)
    max_waiting_requests: int = flag(16, "requests that wait for their turn; a further one is answered 429", minimum=0)
    max_clients: int = flag(64, "open connections; a further one is answered 503", minimum=1)
    max_request_bytes: int = flag(1 << 20, "of the body of a request", minimum=1)
    max_total_tokens: int | None = flag(None, "prompt and answer together; without it the positions of the model", minimum=2)
    default_max_tokens: int = flag(100, "length of an answer whose request has no max_tokens", minimum=1)
    client_timeout: float = flag(30.0, "seconds in which a client has to send its request, and to take each piece of its answer", above=0)
    shutdown_timeout: float = flag(20.0, "seconds for what is being answered when a signal comes; torchrun waits for 30", minimum=0)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.host:
            yield "--host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every address it has"
        if self.served_model_name == "":
            yield "--served-model-name is empty; leave it out, or give a name"


def read_keys(path: str | None) -> tuple[str, ...]:
    """Raises ValueError for a file without keys: it would be a server that nobody may use, or everybody."""
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in Path(path).read_text(encoding="ascii").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {path} cannot be read: {error}") from None
    if not keys or any(" " in key for key in keys):
        raise ValueError(f"--api-key-file {path} {'has a key with a blank in it' if keys else 'has no key'}; write one key per line")
    return keys


def most_tokens(config: ServeConfig, engine: Engine) -> int:
    """Prompt and answer together. Rotary positions go on beyond those of training, if someone asks for it; learned ones end."""
    made_for = engine.loaded.run.model.max_position_embeddings
    wanted = config.max_total_tokens or made_for
    if engine.most_tokens is not None and wanted > engine.most_tokens:
        raise ValueError(f"--max-total-tokens {wanted} is more than the {engine.most_tokens} learned positions of the model; give at most "
                         f"{engine.most_tokens}, or leave it out")  # fmt: skip
    if wanted > made_for:
        logger.warning("--max-total-tokens %d, and the model was made for %d: expect worse text beyond", wanted, made_for)
    return wanted


def open_server(config: ServeConfig) -> Server:
    """Takes the port, before minutes of loading. Raises ValueError when it cannot."""
    from megatron_moe.inference.serving.server import HttpLimits, Server

    keys = read_keys(config.api_key_file)
    limits = HttpLimits(config.max_request_bytes, config.max_clients, config.client_timeout)
    try:
        server = Server(config.host, config.port, limits, keys)
    except OSError as error:
        raise ValueError(f"--host {config.host} --port {config.port}: {error.strerror or error}; take another, or --port 0") from None
    if not server.is_loopback:
        remedy = "it asks them for a key, and sends it and all texts in the clear" if keys else "add --api-key-file, or leave out --host"
        logger.warning("--host %s: whoever reaches this address can use the model; %s", config.host, remedy)
    return server


@contextmanager
def serving(config: ServeConfig, engine: Engine, server: Server, ended: threading.Event) -> Iterator[Scheduler]:
    """Clients are answered inside. `ended` is set when the model has failed for good. Leaving, ModelFailedError if it hangs."""
    from megatron_moe.inference.chat import PlainTemplate, tokenizer_template
    from megatron_moe.inference.serving.protocol import Limits
    from megatron_moe.inference.serving.scheduler import Scheduler
    from megatron_moe.inference.serving.service import Service

    limits = Limits(most_tokens(config, engine), config.default_max_tokens, config.batch_size)
    template = tokenizer_template(engine.loaded.tokenizer_config) if config.chat_template == "auto" else None
    scheduler = Scheduler(engine, config.batch_size, config.max_waiting_requests, broken=ended.set)
    name = config.served_model_name or served_name(engine.loaded.path)
    service = Service(engine, scheduler, limits, name, template or PlainTemplate())
    scheduler.start()
    server.serve(service)
    logger.info("%s answers at %s/v1 (up to %d tokens; template: %s)", name, server.url, limits.total_tokens, service.template.where)
    try:
        yield scheduler
    finally:
        server.stop_accepting()
        is_over = scheduler.stop(config.shutdown_timeout)
        server.wait_for_clients(2)
        if not is_over:
            raise ModelFailedError("the model does not end its step")


def served_name(checkpoint: Path) -> str:
    """The run directory of an iter_ directory."""
    return checkpoint.resolve().parent.name or "model"


class Signals:
    """The first one ends the serving, another one what is left of it."""

    def __init__(self) -> None:
        self.ended, self.abandon = threading.Event(), lambda: None
        self._first = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)

    def _heard(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            self.ended.set()
        elif now - self._first > SAME_SIGNAL_SECONDS:
            threading.Thread(target=lambda: self.abandon(), daemon=True).start()  # not here: this thread may hold the lock it needs


def run(config: ServeConfig, model: InferenceConfig, tokenizer: TokenizerConfig) -> None:
    """Load, serve, end. Raises ValueError or CheckpointError for what the user has to change, ModelFailedError when the model fails."""
    server = open_server(config) if is_first_rank() else None
    from megatron_moe.inference.engine import open_engine
    from megatron_moe.training.distributed import init_distributed

    try:
        with open_engine(model, tokenizer, init_distributed) as engine:
            if not engine.is_leader:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)  # rank 0 says when it is over
                return engine.follow()
            for note in engine.loaded.notes:
                logger.warning("%s", note)
            signals = Signals()
            with serving(config, engine, server, signals.ended) as scheduler:
                signals.abandon = scheduler.abandon
                signals.ended.wait()
                if is_broken := not scheduler.is_open:
                    logger.error("the model has failed: the server ends")
                else:
                    logger.info("stopping: what is there is answered within %g s", config.shutdown_timeout)
            if engine.loaded.expert_cache:
                logger.info("%s", engine.loaded.expert_cache.report())
            if is_broken:
                raise ModelFailedError("the model has failed in a layout of several processes, which cannot go on")
    finally:
        if server:
            server.server_close()


def main(argv: list[str] | None = None) -> int:
    config, model, tokenizer = parse_tool((ServeConfig, InferenceConfig, TokenizerConfig), PROG, argv)
    setup_logging()
    from megatron_moe.checkpoint.files import CheckpointError

    try:
        run(config, model, tokenizer)
    except (ValueError, OSError, CheckpointError) as error:
        if is_first_rank():
            print(format_problems(PROG, str(error).splitlines()), file=sys.stderr)
        return 2
    except ModelFailedError as error:
        logger.error("%s: %s", PROG, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
