"""OpenAI's dialect without sockets, and whose turn it is without a model."""

import json
import threading
from types import SimpleNamespace

import pytest

from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.engine import Piece, Request
from megatron_moe.inference.serving import protocol
from megatron_moe.inference.serving.protocol import ApiError, Call, Limits, Reply, Usage
from megatron_moe.inference.serving.scheduler import Job, Scheduler, together

LIMITS = Limits(total_tokens=20, default_max_tokens=8, answers=4)


def completion(**fields) -> Call:
    return protocol.completion_call({"prompt": "ab"} | fields)


def chat(**fields) -> Call:
    return protocol.chat_call({"messages": [{"role": "user", "content": "hi"}]} | fields)


def refusal(make, *args, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(*args, **fields)
    assert caught.value.status == 400
    return caught.value


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    "prompt, prompts",
    [("ab", ("ab",)), ("", ("",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1, 2], [3]], ((1, 2), (3,)))],
)
def test_a_prompt_is_text_or_tokens_one_or_several(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


def test_fields_become_a_call():
    call = completion(n=3, max_tokens=5, stop="x", temperature=0.5, top_p=0.9, top_k=4, seed=-7, stream=True, echo=True,
                      stream_options={"include_usage": True}, model="m", user="me")  # fmt: skip
    assert (call.n, call.max_tokens, call.stop, call.seed, call.model) == (3, 5, ("x",), -7, "m")
    assert call.stream
    assert call.include_usage
    assert call.echo
    assert call.sampling == SamplingConfig(temperature=0.5, top_p=0.9, top_k=4)
    assert completion(temperature=0, top_p=0.5).sampling == SamplingConfig(greedy=True)


def test_null_and_what_asks_for_nothing_pass():
    assert completion(n=None, stop=None, logprobs=None, logit_bias={}, presence_penalty=0, frequency_penalty=0.0, best_of=1) == completion()


def test_a_conversation_has_text_in_one_or_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = protocol.chat_call({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]})
    assert call.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "ab"})
    assert call.is_chat
    assert chat(max_completion_tokens=4).max_tokens == chat(max_tokens=4).max_tokens == 4


def test_all_that_is_wrong_is_named_at_once():
    fields = {"promt": "x", "n": "2", "temperature": 3, "stop": [""], "logprobs": 5, "max_tokens": 0, "echo": 1}
    error = refusal(protocol.completion_call, fields)
    lines = error.message.splitlines()
    assert [line.split(":")[0] for line in lines] == ["prompt", "promt", "n", "temperature", "stop", "logprobs", "max_tokens", "echo"]
    assert "did you mean prompt?" in lines[1]
    assert "does not support it (given: 5)" in lines[5]
    assert error.body()["error"] | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": "prompt", "code": "missing_required_parameter",
    }  # fmt: skip


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("max_tokens", True, "wants a whole number, not true"), ("max_tokens", 2.0, "wants a whole number"), ("n", 0, "must be 1 or more"),
        ("seed", 2**63, "must be from -9223372036854775808"), ("top_p", 0, "must be above 0 and at most 1, not 0"),
        ("temperature", float("inf"), "must be from 0 to 2"), ("prompt", [], "wants a text, a list"), ("prompt", [1, "a"], "wants a text"),
        ("prompt", [True], "wants a text"), ("prompt", "\ud800", "half of a character"), ("prompt", ["a", "\ud800"], "number 2 has half"),
        ("stop", 5, "wants a text or a list"), ("stop", ["x"] * 17, "has 17 texts; at most 16"), ("stream_options", {"x": 1}, "nothing else"),
        ("stream_options", {"include_usage": 1}, "include_usage wants true or false"), ("logprobs", 0, "does not support"),
        ("\u00e9\n", 1, r"\u00e9\n: unknown field; there are echo, max_tokens"), ("suffix", "x", "does not support"),
        ("presence_penalty", 0.5, "does not support"), ("stream_options", {"include_usage": True}, 'add "stream": true'),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(field, value, message):
    assert message in refusal(completion, **{field: value}).message


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "wants a list of messages"), (["a"], "message 1 wants"), ([{"role": "user"}], "message 1 wants"),
        ([{"role": "tool", "content": "a"}], 'the role "tool"; there are system, user, assistant'),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image_url"}]}], "message 2 content wants text"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "content wants text"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "unknown field 'tool_calls'"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_named(messages, message):
    assert message in refusal(chat, messages=messages).message


def test_two_limits_that_differ_are_refused():
    assert "max_tokens (3) and max_completion_tokens (4)" in refusal(chat, max_tokens=3, max_completion_tokens=4).message
    assert chat(max_tokens=3, max_completion_tokens=3).max_tokens == 3


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "not JSON"), (b"\xff", "not JSON in UTF-8"), (b"[]", "a JSON object"), (b'{"n": NaN}', "NaN is no JSON number"),
        (b"[" * 100000, "too many levels"), (b'{"n": 1, "n": 2}', "the field 'n' is there twice"), (b"", "not JSON"),
        (b"9" * 5000, "not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body, message):
    error = refusal(protocol.parse_json, body)
    assert message in error.message
    assert error.code == "invalid_json"


# ---------------------------------------------------------------- calls -> requests


def test_each_prompt_has_n_answers_side_by_side():
    requests = protocol.requests_of(completion(n=2, stop=["s"]), [[1], [2, 3]], LIMITS, ("t",))
    assert requests == [Request([1], 8, ("s", "t"))] * 2 + [Request([2, 3], 8, ("s", "t"))] * 2


def test_without_max_tokens_an_answer_takes_the_room_there_is():
    assert protocol.requests_of(completion(), [[1] * 15], LIMITS)[0].max_new_tokens == 5


@pytest.mark.parametrize(
    "call, prompts, message",
    [
        (completion(max_tokens=6), [[1] * 15], "the prompt has 15 tokens; with max_tokens 6 that is 21, and this server takes 20"),
        (completion(max_tokens=6), [[1] * 15], "ask for 5 or fewer"),
        (completion(prompt=["a", "b"]), [[1], [1] * 20], "prompt 2 has 20 tokens; with max_tokens 1 that is 21"),
        (completion(), [[1] * 20], "shorten the prompt to 19 tokens or fewer"),
        (chat(), [[1] * 20], "the conversation has 20 tokens"),
        (completion(n=3), [[1], [2]], "2 prompts with 3 answers each are 6; this server writes at most 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(call, prompts, message):
    assert message in refusal(protocol.requests_of, call, prompts, LIMITS).message


def test_exactly_as_many_tokens_as_there_is_room_for_fit():
    assert protocol.requests_of(completion(max_tokens=5), [[1] * 15], LIMITS)[0].max_new_tokens == 5


def test_answers_draw_from_seeds_of_their_own():
    seeds = [s.seed for seed in (7, 8, -7) for s in protocol.samplings_of(completion(), seed, 4)]
    assert len(set(seeds)) == 12
    assert seeds[:2] == [s.seed for s in protocol.samplings_of(completion(), 7, 2)]
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------- replies


def test_chunks_of_a_completion():
    reply = Reply(False, "cmpl-1", "m", 5, ("", "ab"))
    (first,) = reply.first()  # the echo of the second answer; the first has none
    assert first["choices"] == [{"index": 1, "text": "ab", "logprobs": None, "finish_reason": None}]
    chunk = reply.chunk(Piece(0, "x", 3, "stop string"))
    assert chunk == {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m",
                     "choices": [{"index": 0, "text": "x", "logprobs": None, "finish_reason": "stop"}]}  # fmt: skip


def test_chunks_of_a_conversation():
    reply = Reply(True, "chatcmpl-1", "m", 5, ("",))
    assert [c["choices"][0]["delta"] for c in reply.first()] == [{"role": "assistant", "content": ""}]
    last = reply.chunk(Piece(0, "", 3, "length"))
    assert last["object"] == "chat.completion.chunk"
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert reply.last(Usage(3, 4)) | {"choices": []} == reply.last(Usage(3, 4))
    assert reply.last(Usage(3, 4))["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_whole_replies():
    whole = Reply(False, "c", "m", 5, ("ab", "ab")).whole(["x", "y"], ["length", "end of document"], Usage(2, 3))
    assert [(c["index"], c["text"], c["finish_reason"]) for c in whole["choices"]] == [(0, "abx", "length"), (1, "aby", "stop")]
    talk = Reply(True, "c", "m", 5, ("",)).whole(["x"], ["length"], Usage(2, 3))
    assert talk["object"] == "chat.completion"
    assert talk["choices"][0]["message"] == {"role": "assistant", "content": "x"}


def test_an_event_is_one_line_whatever_the_text():
    event = protocol.event({"text": 'a\nb\r\n"\u00e9\u2028'})
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[6:]) == {"text": 'a\nb\r\n"\u00e9\u2028'}


# ---------------------------------------------------------------- whose turn it is


class ScriptedEngine:
    """Each request gets as many pieces as it wants tokens, one per permit of `go`."""

    loaded = SimpleNamespace(layout=SimpleNamespace(is_split=False))

    def __init__(self):
        self.batches, self.go = [], threading.Semaphore(0)
        self.began = threading.Semaphore(0)

    def stream(self, requests, sampling, generator=None, cancelled=lambda row: False):
        self.batches.append([request.prompt for request in requests])
        self.began.release()
        ended = set()
        for step in range(1, max(request.max_new_tokens for request in requests) + 1):
            assert self.go.acquire(timeout=20)
            pieces = []
            for row, request in enumerate(requests):
                if row in ended:
                    continue
                finish = "cancelled" if cancelled(row) else "length" if step == request.max_new_tokens else None
                ended |= {row} if finish else set()
                pieces.append(Piece(row, "x", step, finish))
            yield pieces
            if len(ended) == len(requests):
                return

    def wait_for_batch(self):
        assert self.began.acquire(timeout=20)


def job(name, tokens=1, rows=1, alone=False) -> Job:
    return Job([Request(name, tokens)] * rows, [SamplingConfig()] * rows, alone)


def end_of(one: Job):
    """The finish of its last piece, or its error."""
    while True:
        event = one.events.get(timeout=20)
        if isinstance(event, ApiError):
            return event.status
        if event[-1].finish:
            return event[-1].finish


@pytest.fixture
def scheduler():
    scheduler = Scheduler(ScriptedEngine(), batch_size=4, max_waiting=2)
    scheduler.start()
    yield scheduler
    scheduler.engine.go.release(1000)
    assert scheduler.stop(20)


def test_as_many_may_wait_as_the_limit_says(scheduler):
    scheduler.submit(job("runs"))
    scheduler.engine.wait_for_batch()
    for name in ("a", "b"):
        scheduler.submit(job(name))
    assert scheduler.counts() == (1, 2)
    with pytest.raises(ApiError, match="1 calls are being answered and 2 wait") as caught:
        scheduler.submit(job("c"))
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1


def test_one_that_gives_up_waiting_makes_room(scheduler):
    scheduler.submit(job("runs"))
    scheduler.engine.wait_for_batch()
    gone, stays, last = job("gone"), job("stays"), job("last")
    scheduler.submit(gone)
    scheduler.submit(stays)
    scheduler.cancel(gone)
    scheduler.submit(last)
    scheduler.engine.go.release(10)
    assert end_of(last) == "length"
    assert scheduler.engine.batches == [["runs"], ["stays", "last"]]


def test_with_no_place_to_wait_an_idle_model_still_takes_one():
    scheduler = Scheduler(ScriptedEngine(), batch_size=4, max_waiting=0)
    scheduler.submit(job("a"))  # the thread has not begun: it is certain that "a" still stands in the queue
    with pytest.raises(ApiError, match="--max-waiting-requests 0"):
        scheduler.submit(job("b"))


def test_a_batch_has_what_fits_and_the_first_always():
    a, b, c, d = job("a", rows=3), job("b", rows=2), job("c"), job("d")
    assert together([a, b, c, d], 4) == [a, c]
    assert together([b, a, c, d], 4) == [b, c, d]
    assert together([a], 2) == [a]


def test_one_that_wants_to_be_alone_is():
    alone, a, b = job("s", alone=True), job("a"), job("b")
    assert together([alone, a, b], 4) == [alone]
    assert together([a, alone, b], 4) == [a, b]


def test_one_that_is_cancelled_ends_before_the_next_token_and_the_others_go_on(scheduler):
    gone, stays = job("gone", 50), job("stays", 3)
    scheduler.engine.go.release(1)
    scheduler.submit(job("first"))
    scheduler.engine.wait_for_batch()
    scheduler.submit(gone)
    scheduler.submit(stays)
    scheduler.engine.wait_for_batch()
    scheduler.cancel(gone)
    scheduler.engine.go.release(3)
    assert end_of(gone) == "cancelled"
    assert end_of(stays) == "length"


def test_a_stop_answers_what_is_there_and_takes_nothing_new(scheduler):
    running, waiting = job("a", 2), job("b", 2)
    scheduler.submit(running)
    scheduler.engine.wait_for_batch()
    scheduler.submit(waiting)
    thread = threading.Thread(target=scheduler.stop, args=(20,))
    thread.start()
    while scheduler.is_open:
        pass
    with pytest.raises(ApiError, match="stopping") as caught:
        scheduler.submit(job("late"))
    assert caught.value.status == 503
    scheduler.engine.go.release(4)
    thread.join(20)
    assert (end_of(running), end_of(waiting)) == ("length", "length")


def test_after_its_time_a_stop_ends_the_rest(scheduler):
    running, waiting = job("a", 500), job("b", 2)
    scheduler.submit(running)
    scheduler.engine.wait_for_batch()
    scheduler.submit(waiting)
    threading.Timer(0.2, scheduler.engine.go.release, (1,)).start()
    assert scheduler.stop(0.05)
    assert (end_of(running), end_of(waiting)) == ("cancelled", 503)


@pytest.mark.parametrize("is_split, status", [(False, None), (True, 503)])
def test_an_error_ends_its_batch_and_in_a_layout_everything(monkeypatch, is_split, status):
    broken = threading.Event()
    engine = ScriptedEngine()
    engine.loaded = SimpleNamespace(layout=SimpleNamespace(is_split=is_split))
    monkeypatch.setattr(engine, "stream", lambda *_, **__: 1 / 0)
    scheduler = Scheduler(engine, 4, 2, broken.set)
    scheduler.start()
    first = job("a")
    scheduler.submit(first)
    assert end_of(first) == 500
    if is_split:
        assert broken.wait(20)
        with pytest.raises(ApiError, match="started again"):
            scheduler.submit(job("b"))
    else:
        monkeypatch.undo()
        engine.go.release(1)
        second = job("b")
        scheduler.submit(second)
        assert end_of(second) == "length"
    assert scheduler.stop(20)
