"""Sockets: one thread per client, one request per connection.

The standard library's server, so that the repository gains no dependency; a client is a thread that waits, and there are few: at most
`clients` at a time, each with a deadline for its request and for every piece of its answer that it takes. Proxies do TLS.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty
from socketserver import TCPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_moe.inference.serving import protocol
from megatron_moe.inference.serving.protocol import ApiError
from megatron_moe.inference.serving.service import Asked, Collected, Service
from megatron_moe.utils.logging import logger

POLL_SECONDS = 0.1  # how soon a client that has gone is noticed while no token comes
LINGER_SECONDS = 1.0
GETS = ("/health", "/v1/models")
POSTS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class HttpLimits:
    request_bytes: int = 1 << 20  # of a body
    clients: int = 64  # connections
    client_seconds: float = 30.0  # for a client to send its request, and to take what is sent


class ClientGoneError(Exception):
    """Nobody is there to be answered."""


class UntilDeadline(io.RawIOBase):
    """What a socket receives until a point in time. A timeout per read would let a client send a byte a minute for ever."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.deadline = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One request. Whatever goes wrong before an answer begins is a JSON body of OpenAI's shape."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # also who names no version gets a status line
    server_version, sys_version = "megatron_moe", ""
    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(UntilDeadline(self.connection, self.server.limits.client_seconds))
        self.requestline, self.command, self.request_version, self.path = "", "", self.default_request_version, ""
        self.began, self.status, self.is_read = time.monotonic(), 0, False

    def handle(self) -> None:
        self.close_connection = True
        try:
            self._handle()
        except (ClientGoneError, ConnectionError, TimeoutError):  # a timeout here: it does not take its answer
            self.status = 0
        took = time.monotonic() - self.began
        if self.requestline:
            outcome = self.status or "the client has gone"
            logger.info("%s %s %s: %s, %.2f s", self.client_address[0], self.command, ascii(self.route[:80])[1:-1], outcome, took)

    def _handle(self) -> None:
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline:
                return
            if len(self.raw_requestline) > 65536:
                raise ApiError(414, "the request line is longer than 65536 bytes")
            if self.parse_request():  # else it has sent an error
                self._answer()
        except TimeoutError:
            if self.status:
                raise
            seconds = self.server.limits.client_seconds
            self._refuse(ApiError(408, f"the request was not complete after {seconds:g} s (--client-timeout)", code="timeout"))
        except ApiError as error:
            self._refuse(error)
        except (ClientGoneError, ConnectionError):
            raise
        except Exception as error:
            logger.exception("a request has failed")
            if self.status:
                raise ClientGoneError from None  # the answer has begun: all that is left is to break it off
            self._refuse(ApiError(500, f"the server has failed ({type(error).__name__}); its log has the reason"))

    @property
    def route(self) -> str:
        return self.path.partition("?")[0]

    def _answer(self) -> None:
        self._check_sender()
        path, method = self.route, self.command
        allowed = "GET" if path in GETS or path.startswith("/v1/models/") else "POST" if path in POSTS else None
        if allowed is None:
            endpoints = ", ".join([f"GET {p}" for p in GETS] + [f"POST {p}" for p in POSTS])
            raise ApiError(404, f"there is nothing at {path[:200]}; there are {endpoints}", code="unknown_url")
        if method != allowed:
            raise ApiError(405, f"{path} takes {allowed}, not {method}", code="method_not_allowed", headers={"Allow": allowed})
        if path == "/health":
            self._send(*self.server.service.health())
        elif path == "/v1/models":
            self._send(200, self.server.service.models())
        elif allowed == "GET":
            self._send(200, self.server.service.model(unquote(path.removeprefix("/v1/models/"))))
        else:
            body = self._body()
            self._continue(self.server.service.ask_completion(body) if path == POSTS[0] else self.server.service.ask_chat(body))

    def _check_sender(self) -> None:
        host = self.headers.get("Host", "")
        if self.server.is_loopback and not is_local_name(host):
            # a page whose name its owner has pointed to 127.0.0.1 would otherwise be of the same origin as this server
            raise ApiError(400, f"the Host {host[:200]!r} is not a name of this machine's own; use http://127.0.0.1 or http://localhost")
        if self.server.keys and self.route != "/health":
            scheme, _, key = self.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not any(hmac.compare_digest(key.strip().encode(), k.encode()) for k in self.server.keys):
                message = "this server wants a key: send the header Authorization: Bearer KEY, with a KEY of its --api-key-file"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _body(self) -> bytes:
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else "none"
        if kind != "application/json":
            raise ApiError(415, f"the Content-Type must be application/json, not {kind}", code="unsupported_media_type")
        length = self.headers.get("Content-Length")
        if length is None or "Transfer-Encoding" in self.headers:
            raise ApiError(411, "the request must have a Content-Length, and no Transfer-Encoding", code="length_required")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, f"the Content-Length must be a number of bytes, not {length[:40]!r}")
        limit = self.server.limits.request_bytes
        if len(length) > 18 or int(length) > limit:
            message = f"the body has {length[:40]} bytes, and this server takes {limit} (--max-request-bytes)"
            raise ApiError(413, message, code="request_too_large")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ClientGoneError
        self.is_read = True
        return body

    # ------------------------------------------------------------ answers

    def _continue(self, asked: Asked) -> None:
        try:
            if asked.call.stream:
                self._stream(asked)
            else:
                collected = Collected(asked)
                for event in self._events(asked, collected):
                    collected.add(event)
                self._send(200, collected.body())
        finally:  # also when all is well: a job that is done is in no queue
            self.server.service.scheduler.cancel(asked.job)

    def _events(self, asked: Asked, collected: Collected) -> Iterator[Any]:
        """Until `collected`, which the caller fills, is whole. Raises ClientGoneError."""
        while not collected.is_whole:
            if is_gone(self.connection):
                raise ClientGoneError
            try:
                event = asked.job.events.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            yield event

    def _stream(self, asked: Asked) -> None:
        collected = Collected(asked)
        try:
            for event in self._events(asked, collected):
                collected.add(event)
                if not self.status:  # now, not before: what fails until here still has a status of its own
                    self._head(200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
                    self._write(b"".join(map(protocol.event, asked.reply.first())))
                pieces = [piece for piece in event if piece.text or piece.finish]
                if pieces:
                    self._write(b"".join(protocol.event(asked.reply.chunk(piece)) for piece in pieces))
        except ApiError as error:
            if not self.status:
                raise
            self._write(protocol.event(error.body()))  # and no [DONE]
            return
        usage = protocol.event(asked.reply.last(collected.usage)) if asked.call.include_usage else b""
        self._write(usage + protocol.DONE)

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = protocol.encoded(body) + b"\n"
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})})
        if self.command != "HEAD":
            self._write(content)

    def _refuse(self, error: ApiError) -> None:
        self._send(error.status, error.body(), error.headers)
        if not self.is_read:
            linger(self.connection)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response_only(status)
        for name, value in {"Server": self.server_version, "Date": self.date_time_string(), **headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.connection.settimeout(self.server.limits.client_seconds)
        self.end_headers()

    def _write(self, content: bytes) -> None:
        self.connection.settimeout(self.server.limits.client_seconds)
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses: a request line or headers that are none."""
        self._refuse(ApiError(int(code), f"this is no HTTP request: {message or explain or code}"))


class Server(ThreadingHTTPServer):
    """Binds when it is made, so that a port that is taken is known before a model is loaded; `serve` accepts."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, limits: HttpLimits, keys: tuple[str, ...] = ()):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler, bind_and_activate=False)
        self.limits, self.keys, self.service = limits, keys, None
        self._open, self._changed, self._thread = 0, threading.Condition(), None
        try:
            TCPServer.server_bind(self)  # HTTPServer's would look up the host's name
        except BaseException:
            self.server_close()
            raise
        self.is_loopback = is_loopback(self.server_address[0])

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def serve(self, service: Service) -> None:
        """From now on clients are answered, in threads."""
        self.service = service
        self.server_activate()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="accept", daemon=True)
        self._thread.start()

    def stop_accepting(self) -> None:
        if self._thread:
            self.shutdown()
            self._thread.join()
        self.server_close()

    def wait_for_clients(self, seconds: float) -> bool:
        """Until the last one has its answer, or `seconds` have passed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._open == 0, seconds)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            is_free = self._open < self.limits.clients
            self._open += is_free
        if is_free:
            super().process_request(request, client_address)
        else:
            self._turn_away(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def _turn_away(self, request: socket.socket) -> None:
        error = ApiError(503, f"all {self.limits.clients} connections of this server are taken (--max-clients)", code="too_many_clients")
        content = protocol.encoded(error.body())
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
        try:
            request.settimeout(0.2)
            request.sendall(head.encode() + content)
            linger(request, 0.2)
        except OSError:
            pass
        self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("a connection has failed")


def is_gone(connection: socket.socket) -> bool:
    """Whether the client has closed its side. One that only ends its sending counts as gone: HTTP has no use for that."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def linger(connection: socket.socket, seconds: float = LINGER_SECONDS) -> None:
    """Take what the client is still sending: closing over it would throw away the answer that is on its way."""
    deadline = time.monotonic() + seconds
    try:
        connection.shutdown(socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(1 << 16):
                return
    except OSError:
        return


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def is_local_name(host: str) -> bool:
    """The value of a Host header: an address, or a name that nobody can point elsewhere. None at all is no browser's."""
    name = host.lower()
    try:
        name = (urlsplit("//" + host).hostname or "") if host else "localhost"
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    return True
