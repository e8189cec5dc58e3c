"""The server: a small model behind a real socket, and clients of every kind."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_generate_text import save_tiny_run

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.chat import PlainTemplate
from megatron_moe.inference.engine import Engine, Request
from megatron_moe.inference.load import Loaded
from megatron_moe.inference.serving.server import HttpLimits, Server, is_local_name
from megatron_moe.model.init import initialize_parameters
from megatron_moe.model.plain import build_plain
from megatron_moe.tokenizers import build_tokenizer
from tools import serve

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30  # seconds: of what has to happen, on a busy machine
GREEDY = SamplingConfig(greedy=True)
JSON = {"Content-Type": "application/json"}


class PacedEngine(Engine):
    """`pause` seconds between tokens; counts them; `fails_at` a step."""

    pause, steps, fails_at = 0.0, 0, None

    def stream(self, *arguments, **options):
        self.steps = 0
        for pieces in super().stream(*arguments, **options):
            if self.steps == self.fails_at:
                raise OSError("a planted error")
            yield pieces
            self.steps += 1
            time.sleep(self.pause)


def small_loaded() -> Loaded:
    """Bytes as tokens, 64 positions, no end of document: every answer is as long as it may be."""
    values = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_experts": (4,), "max_position_embeddings": 64,
              "seq_length": 64, "moe_token_dropping": False, "params_dtype": "float64", "tokenizer_type": "ByteTokenizer"}  # fmt: skip
    run = RunConfig.from_values(values)
    tokenizer = build_tokenizer(run.tokenizer)
    model = build_plain(run, tokenizer.vocab_size)
    model.to_empty(device="cpu")
    initialize_parameters(model, 1, 0.3, 2)
    return Loaded(model.eval(), run, tokenizer.vocab_size, None, tokenizer, Path("runs/bytes/iter_0000005"), (), TokenizerConfig())


@pytest.fixture(scope="module")
def loaded():
    return small_loaded()


@pytest.fixture(scope="module")
def oracle():
    """Its own model, with the same weights: a server may still be at the end of a batch whose answers are all sent."""
    return Engine(small_loaded())


class Client:
    def __init__(self, server: Server, engine: PacedEngine):
        self.server, self.engine = server, engine

    def send(self, method: str, path: str, body=None, headers=None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(*self.server.server_address[:2], timeout=PATIENCE)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, JSON if headers is None else headers)
        response = connection.getresponse()
        response.connection = connection  # or it would be closed with the first reference that goes
        return response

    def ask(self, method: str, path: str, body=None, headers=None) -> tuple[int, dict]:
        with self.send(method, path, body, headers) as response:
            return response.status, json.loads(response.read())

    def complete(self, prompt="ab", **fields) -> dict:
        status, body = self.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 9, "temperature": 0} | fields)
        assert status == 200, body
        return body

    def chunks(self, path="/v1/completions", **fields) -> list[dict]:
        return events(self.send("POST", path, {"stream": True, "max_tokens": 9, "temperature": 0} | fields))

    def raw(self, content: bytes) -> socket.socket:
        connection = socket.create_connection(self.server.server_address[:2], timeout=PATIENCE)
        connection.sendall(content)
        return connection

    def post(self, **fields) -> socket.socket:
        """A request whose answer nobody has read yet."""
        body = json.dumps({"prompt": "ab", "max_tokens": 60} | fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return self.raw(head.encode() + body)

    def wait_for(self, running: int, waiting: int) -> None:
        until(lambda: self.ask("GET", "/health")[1] | {"status": ""} == {"status": "", "running": running, "waiting": waiting})


def events(response) -> list[dict]:
    """Of a stream that ends as it should."""
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    *lines, done, nothing = response.read().decode().split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def client_of(loaded, keys=(), client_seconds=PATIENCE, clients=64, request_bytes=2000, **flags):
    engine = PacedEngine(loaded)
    server = Server("127.0.0.1", 0, HttpLimits(request_bytes, clients, client_seconds), keys)
    with serve.serving(serve.ServeConfig(**flags), engine, server, threading.Event()) as scheduler:
        client = Client(server, engine)
        client.scheduler = scheduler
        yield client
        engine.pause = 0
    engine.close()


@pytest.fixture(scope="module")
def client(loaded):
    with client_of(loaded) as client:
        yield client


@pytest.fixture
def slow(loaded):
    """Six seconds for the longest answer; one row at a time, one waiting."""
    with client_of(loaded, batch_size=1, max_waiting_requests=1, shutdown_timeout=0) as client:
        client.engine.pause = 0.1
        yield client


# ---------------------------------------------------------------- answers


def expected(oracle, *requests: Request) -> list[str]:
    return [answer.text for answer in oracle.complete(requests, GREEDY)]


def test_a_completion_is_what_the_engine_writes(client, oracle):
    body = client.complete("ab", model="bytes", echo=True)
    (choice,) = body["choices"]
    assert choice == {"index": 0, "text": "ab" + expected(oracle, Request("ab", 9))[0], "logprobs": None, "finish_reason": "length"}
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11}
    assert (body["object"], body["model"]) == ("text_completion", "bytes")


def test_several_prompts_as_text_or_tokens_with_n_answers_each(client, oracle):
    texts = expected(oracle, Request("ab", 9), Request("xyz", 9))
    for prompt in (["ab", "xyz"], [[97, 98], [120, 121, 122]]):
        body = client.complete(prompt, n=2)
        assert [c["text"] for c in body["choices"]] == [texts[0], texts[0], texts[1], texts[1]]
        assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 36, "total_tokens": 41}


def test_a_seed_gives_its_text_whatever_else_runs(client):
    draws = {"temperature": 1.5, "max_tokens": 20, "n": 2}
    alone = [c["text"] for c in client.complete(seed=7, **draws)["choices"]]
    assert alone[0] != alone[1]
    assert [c["text"] for c in client.complete(seed=8, **draws)["choices"]] != alone
    others = [threading.Thread(target=client.complete, args=("x" * i,), kwargs=draws) for i in range(1, 5)]
    for other in others:
        other.start()
    assert [c["text"] for c in client.complete(seed=7, **draws)["choices"]] == alone
    for other in others:
        other.join(PATIENCE)
    assert len({client.complete(**draws)["choices"][0]["text"] for _ in range(3)}) == 3  # no seed: another text each time


def test_only_a_call_with_a_seed_has_a_batch_to_itself(client):
    asked = [client.server.service.ask_completion(json.dumps(OK | seed).encode()) for seed in ({}, {"seed": 0})]
    assert [one.job.runs_alone for one in asked] == [False, True]
    for one in asked:
        client.scheduler.cancel(one.job)


def test_a_stream_is_the_same_text_in_pieces(client):
    whole = client.complete(["ab", "q"])
    chunks = client.chunks(prompt=["ab", "q"], stream_options={"include_usage": True})
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stop_string_never_shows_in_a_stream_or_in_a_whole(client):
    free = client.complete("ab", max_tokens=30)["choices"][0]["text"]
    at = next(i for i in range(4, len(free) - 3) if free.find(free[i : i + 3]) == i)  # three tokens: it comes in pieces
    stop = free[at : at + 3]
    (choice,) = client.complete("ab", max_tokens=30, stop=stop)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (free[:at], "stop")
    choices = [c["choices"][0] for c in client.chunks(prompt="ab", max_tokens=30, stop=["never", stop])]
    assert "".join(c["text"] for c in choices) == free[:at]
    assert choices[-1]["finish_reason"] == "stop"


def test_a_conversation_is_written_by_the_template_and_ends_at_its_next_turn(client, oracle):
    messages = [{"role": "user", "content": "hi"}]
    prompt = PlainTemplate().render(messages)
    (text,) = expected(oracle, Request(prompt, 9))
    status, body = client.ask("POST", "/v1/chat/completions", {"messages": messages, "max_completion_tokens": 9, "temperature": 0})
    assert (status, body["object"]) == (200, "chat.completion")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert body["usage"]["prompt_tokens"] == len(prompt)
    deltas = [c["choices"][0]["delta"] for c in client.chunks("/v1/chat/completions", messages=messages)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == text


def test_models_and_health(client):
    status, body = client.ask("GET", "/v1/models")
    assert (status, body["data"][0]["id"], body["data"][0]["max_model_len"]) == (200, "bytes", 64)
    assert client.ask("GET", "/v1/models/bytes")[1] == body["data"][0]
    assert client.ask("GET", "/health") == (200, {"status": "ok", "running": 0, "waiting": 0})


# ---------------------------------------------------------------- what is refused


OK = {"prompt": "ab"}


@pytest.mark.parametrize(
    "method, path, body, headers, status, message",
    [
        ("POST", "/v1/completions", b"{", JSON, 400, "the body is not JSON"),
        ("POST", "/v1/completions", OK | {"tempreature": 1, "n": 0}, JSON, 400, "tempreature: unknown field; did you mean temperature?\nn: must"),
        ("POST", "/v1/completions", {"prompt": "a" * 60, "max_tokens": 5}, JSON, 400, "with max_tokens 5 that is 65, and this server takes 64"),
        ("POST", "/v1/completions", {"prompt": [97, 300]}, JSON, 400, "the token 300, and the vocabulary goes from 0 to 256"),
        ("POST", "/v1/completions", {"prompt": ""}, JSON, 400, "an empty prompt starts from the end-of-document token"),
        ("POST", "/v1/completions", OK | {"n": 9}, JSON, 400, "writes at most 8 at a time"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "cat", "content": ""}]}, JSON, 400, 'message 1 has the role "cat"'),
        ("POST", "/v1/completions", OK | {"model": "gpt"}, JSON, 404, "no model 'gpt' here; this server has 'bytes'"),
        ("GET", "/v1/models/x", None, None, 404, "no model 'x'"),
        ("POST", "/v1/embeddings", OK, JSON, 404, "nothing at /v1/embeddings; there are GET /health"),
        ("GET", "/v1/completions", None, None, 405, "takes POST, not GET"),
        ("DELETE", "/v1/models", None, None, 405, "takes GET, not DELETE"),
        ("GET", "//[", None, None, 404, "nothing at /["),
        ("BREW", "/health", None, None, 405, "takes GET, not BREW"),
        ("POST", "/v1/completions", OK, {"Content-Type": "text/plain"}, 415, "must be application/json, not text/plain"),
        ("POST", "/v1/completions", OK, {}, 415, "not none"),
        ("POST", "/v1/completions", OK, JSON | {"Transfer-Encoding": "chunked"}, 411, "must have a Content-Length"),
        ("POST", "/v1/completions", b"x" * 2001, JSON, 413, "has 2001 bytes, and this server takes 2000 (--max-request-bytes)"),
        ("POST", "/v1/completions", OK, JSON | {"Content-Length": "-5"}, 400, "must be a number of bytes, not '-5'"),
        ("GET", "/v1/models", None, {"Host": "evil.example"}, 400, "not a name of this machine's own"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_answered_with_its_status_and_the_reason(client, method, path, body, headers, status, message):
    got, answer = client.ask(method, path, body, headers)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"]


def test_the_method_that_is_allowed_is_named(client):
    with client.send("GET", "/v1/completions") as response:
        assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize("content, status", [(b"\x16\x03\x01\x02\r\n\r\n", 400), (b"GET / HTTP/9.9\r\n\r\n", 505),
                                             (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414)])  # fmt: skip
def test_what_is_no_http_is_answered_in_the_same_shape(client, content, status):
    with client.raw(content) as connection, connection.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(body)["error"]["message"]


def test_a_key_is_asked_for_where_there_are_keys(loaded):
    with client_of(loaded, keys=("one", "two")) as client:
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}, {"Authorization": "Bearer "}):
            status, answer = client.ask("GET", "/v1/models", None, headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert client.ask("GET", "/v1/models", None, {"Authorization": "Bearer two"})[0] == 200
        assert client.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize("host, is_local", [("127.0.0.1:80", True), ("localhost", True), ("[::1]:80", True), ("a.localhost", True), ("", True),
                                            ("192.168.1.5:80", True), ("evil.example:80", False), ("localhost.evil.example", False), ("[", False)])  # fmt: skip
def test_names_that_others_can_point_here_are_not_local(host, is_local):
    assert is_local_name(host) == is_local


# ---------------------------------------------------------------- clients that are slow, gone or too many


def test_a_client_that_does_not_end_its_request_is_told_so(loaded):
    with client_of(loaded, client_seconds=0.2) as client:
        for part in (b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"):
            with client.raw(part) as connection, connection.makefile("rb") as file:
                assert file.readline() == b"HTTP/1.1 408 Request Timeout\r\n"
                assert b"not complete after 0.2 s" in file.read()
        with client.raw(b"") as connection:  # a byte now and then is no excuse
            until(lambda: is_hung_up_on(connection))
        until(lambda: client.server.wait_for_clients(0))


def is_hung_up_on(connection) -> bool:
    try:
        connection.sendall(b"G")
    except OSError:
        return True
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place_between_two_tokens(slow, stream):
    connection = slow.post(stream=stream)
    slow.wait_for(1, 0)
    if stream:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    connection.close()
    slow.wait_for(0, 0)
    assert slow.engine.steps < 55
    assert slow.complete(max_tokens=1)["usage"]["completion_tokens"] == 1


def test_one_call_runs_one_waits_and_a_third_is_told_to_come_back(slow):
    first, second = slow.post(), None
    slow.wait_for(1, 0)
    second = slow.post(max_tokens=1)
    slow.wait_for(1, 1)
    with slow.send("POST", "/v1/completions", OK) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert json.loads(response.read())["error"]["type"] == "rate_limit_error"
    second.close()  # it gives up waiting
    slow.wait_for(1, 0)
    third = slow.post(max_tokens=1)
    slow.wait_for(1, 1)
    first.close()
    assert third.recv(15) == b"HTTP/1.1 200 OK"
    third.close()


def test_calls_that_wait_are_answered_in_one_batch(loaded):
    with client_of(loaded) as client:
        client.engine.pause = 0.1
        first = client.post(max_tokens=10)
        client.wait_for(1, 0)
        others = [client.post(max_tokens=3) for _ in range(2)]
        client.wait_for(1, 2)
        client.wait_for(2, 0)
        for connection in (first, *others):
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            connection.close()


def test_more_connections_than_allowed_are_turned_away(loaded):
    with client_of(loaded, clients=1) as client:
        with client.raw(b"GET"):
            status, answer = client.ask("GET", "/v1/models")
            assert (status, answer["error"]["code"]) == (503, "too_many_clients")
        until(lambda: client.ask("GET", "/v1/models")[0] == 200)


def test_an_error_of_the_model_is_a_500_and_the_server_goes_on(loaded):
    with client_of(loaded) as client:
        client.engine.fails_at = 0
        status, answer = client.ask("POST", "/v1/completions", OK)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "planted" not in answer["error"]["message"]
        client.engine.fails_at = 3  # in the middle of a stream: the status is sent already
        with client.send("POST", "/v1/completions", OK | {"stream": True}) as response:
            *_, last, nothing = response.read().decode().split("\n\n")
        assert (response.status, nothing) == (200, "")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "failed"
        client.engine.fails_at = None
        client.complete()


def test_a_stop_ends_what_takes_too_long(loaded):
    with client_of(loaded, shutdown_timeout=0.3) as client:
        client.engine.pause = 0.1
        connection = client.post()
        client.wait_for(1, 0)
        client.engine.pause = 0.3
        client.server.stop_accepting()
        client.scheduler.abandon()
        with connection.makefile("rb") as file:
            assert file.readline() == b"HTTP/1.1 503 Service Unavailable\r\n"
            assert b"stopped before the end of the answer" in file.read()


# ---------------------------------------------------------------- the command


@contextmanager
def started(*words, launcher=(sys.executable,)):
    process = subprocess.Popen([*launcher, "tools/serve.py", "--port", "0", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        until_slow = time.monotonic() + 4 * PATIENCE
        while not (url := re.search(r"answers at http://127\.0\.0\.1:(\d+)/v1", "".join(lines))):
            assert process.poll() is None, "".join(lines)
            assert time.monotonic() < until_slow
            time.sleep(0.05)
        yield process, int(url.group(1)), lines
    finally:
        process.terminate()  # torchrun ends its processes, and whoever does not listen after 30 s
        try:
            process.wait(2 * PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join(PATIENCE)


def documented_curl() -> tuple[str, dict]:
    """Path and body of the example in docs/using_a_model.md."""
    page = (ROOT / "docs/using_a_model.md").read_text(encoding="utf-8")
    path, body = re.search(r"curl http://127\.0\.0\.1:8000(\S+) -H \"Content-Type: application/json\" \\?\s*-d '([^']*)'", page).groups()
    return path, json.loads(body)


def test_the_command_answers_the_documented_request_and_ends_with_exit_code_0(tmp_path):
    with started("--load", save_tiny_run(tmp_path / "bytes", tokenizer_type="ByteTokenizer")) as (process, port, lines):
        path, body = documented_curl()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("POST", path, json.dumps(body).encode(), JSON)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert (response.status, answer["model"]) == (200, "bytes")
        assert answer["usage"]["completion_tokens"] <= body["max_tokens"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    log = "".join(lines)
    assert f"POST {path}: 200" in log
    assert "stopping" in log


@pytest.mark.parametrize(
    "words, message",
    [
        (["--port", "70000"], "--port must be at most 65535"),
        (["--host", ""], "--host is empty"),
        (["--api-key-file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--host", "192.0.2.1"], "take another, or --port 0"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_loaded(words, message, capsys):
    try:
        code = serve.main(["--load", "nowhere", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_keys_are_lines_of_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n two\n")
    assert serve.read_keys(str(file)) == ("one", "two")
    for content, message in (("\n", "has no key"), ("a b\n", "a key with a blank")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            serve.read_keys(str(file))


def test_a_port_that_is_taken_is_named(client, capsys):
    port = client.server.server_address[1]
    assert serve.main(["--load", "nowhere", "--port", str(port)]) == 2
    assert f"--port {port}: Address already in use; take another" in capsys.readouterr().err


def test_an_open_address_is_warned_about(capsys):
    assert serve.main(["--load", "nowhere", "--port", "0", "--host", "0.0.0.0"]) == 2  # there is no checkpoint
    assert "whoever reaches this address can use the model; add --api-key-file" in capsys.readouterr().err


def test_more_tokens_than_learned_positions_are_refused(loaded):
    engine = Engine(loaded)
    assert serve.most_tokens(serve.ServeConfig(), engine) == 64
    if engine.most_tokens is None:
        assert serve.most_tokens(serve.ServeConfig(max_total_tokens=99), engine) == 99
    else:
        with pytest.raises(ValueError, match="--max-total-tokens 65 is more than the 64 learned positions"):
            serve.most_tokens(serve.ServeConfig(max_total_tokens=65), engine)


@pytest.mark.matrix
def test_two_processes_answer_as_one_and_a_client_may_go(tmp_path):
    run = save_tiny_run(tmp_path / "bytes", tokenizer_type="ByteTokenizer")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with started("--load", run, "--moe-expert-parallel-size", "2", launcher=launcher) as (process, port, _):
        here = Client(type("Address", (), {"server_address": ("127.0.0.1", port)}), None)
        texts = [here.complete(seed=3, temperature=1)["choices"][0]["text"] for _ in range(2)]
        assert texts[0] == texts[1]
        here.post(stream=True).close()
        assert here.complete(seed=3, temperature=1)["choices"][0]["text"] == texts[0]
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    with started("--load", run) as (_, port, _):
        here = Client(type("Address", (), {"server_address": ("127.0.0.1", port)}), None)
        assert here.complete(seed=3, temperature=1)["choices"][0]["text"] == texts[0]
