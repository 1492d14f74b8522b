"""The HTTP reward against a real server on this machine that does everything a server can do wrong."""

import json
import socket
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ppo_jax.config import RewardConfig
from ppo_jax.errors import UserError
from ppo_jax.rewards import http
from ppo_jax.rewards.http import HttpReward
from ppo_jax.rewards.source import open_reward, score_answers

PROMPTS = [f"p{i}" for i in range(5)]
ANSWERS = ["a" * i for i in range(5)]
COLUMNS = {"label": [10, 11, 12, 13, 14]}
SCORES = [10.0, 12.0, 14.0, 16.0, 18.0]  # length plus label


class Server(ThreadingHTTPServer):
    """Answers each request as the next entry of `plan` says, and rightly when there is none left."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.seen, self.closing = deque(), [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/score?model=a"

    def handle_error(self, request, client_address):
        """A client that left is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Content-Type"], asked))
        behave = self.server.plan.popleft() if self.server.plan else right
        behave(self, asked)

    def log_message(self, *_):
        pass

    def reply(self, body, *, status=200, length=None, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def numbers(asked):
    return [len(answer) + label for answer, label in zip(asked["answers"], asked["columns"]["label"], strict=True)]


def right(handler, asked):
    handler.reply({"scores": numbers(asked)})


def replies(body, **keywords):
    return lambda handler, asked: handler.reply(body, **keywords)


def lies(**keywords):
    return lambda handler, asked: handler.reply({"scores": numbers(asked)}, **keywords)


def scores(change):
    return lambda handler, asked: handler.reply({"scores": change(numbers(asked))})


def stalls(handler, asked):
    handler.server.closing.wait(30)


def hangs_up(handler, asked):
    handler.connection.shutdown(socket.SHUT_RDWR)


def drips(handler, asked):
    """A byte now and then, each well within the timeout of a socket."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b" ")


def drips_headers(handler, asked):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"x")


def sends_noise(handler, asked):
    handler.wfile.write(b"\x00\xff\r\n\r\n" * 100)


SLOW = {"stalls": stalls, "drips": drips, "drips headers": drips_headers}
FAILURES = {
    "status 500": replies(b"broken", status=500),
    "status 503": replies(b"", status=503),
    "status 429": replies(b"slow down", status=429),
    **SLOW,
    "hangs up": hangs_up,
    "no HTTP": sends_noise,
    "ends early": lies(length=1000),
    "announces too little": lies(length=5),
    "not UTF-8": replies(b'{"scores": [1.0, "\xff"]}'),
    "not JSON": replies(b"<html>soon</html>"),
    "deep": replies(b"[" * 100_000),
    "no object": replies([1.0, 2.0]),
    "no scores": replies({"score": [1.0]}),
    "no list": replies({"scores": 3.0}),
    "one too few": scores(lambda right: right[:-1]),
    "one too many": scores(lambda right: [*right, 1.0]),
    "NaN": scores(lambda right: [float("nan"), *right[1:]]),
    "infinite": replies(b'{"scores": [1e999, 1.0]}'),
    "null": scores(lambda right: [None, *right[1:]]),
    "boolean": scores(lambda right: [True, *right[1:]]),
    "text": scores(lambda right: [str(right[0]), *right[1:]]),
    "a named one too few": scores(lambda right: {"a": right, "b": right[:-1]}),
}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server():
    made = Server()
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    made.closing.set()
    made.shutdown()
    made.server_close()


def ask(server, *, timeout_s=30.0, retries=1, batch_size=2):
    reward = HttpReward(server.url, timeout_s=timeout_s, retries=retries, batch_size=batch_size)
    return reward(PROMPTS, ANSWERS, COLUMNS)


def test_answers_are_sent_in_batches_with_their_prompts_and_columns_and_come_back_in_order(server):
    slow_first = deque([0.1])

    def right_but_the_first_one_last(handler, asked):
        time.sleep(slow_first.popleft() if slow_first else 0)
        right(handler, asked)

    server.plan.extend([right_but_the_first_one_last] * 3)
    assert ask(server) == SCORES
    assert {(path, kind) for path, kind, _ in server.seen} == {("/score?model=a", "application/json")}
    sent = sorted((asked for *_, asked in server.seen), key=lambda asked: asked["prompts"])
    assert sent == [
        {"prompts": PROMPTS[rows], "answers": ANSWERS[rows], "columns": {"label": COLUMNS["label"][rows]}}
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_goes_wrong_once_is_asked_again_and_nothing_is_counted_twice(server, failure):
    server.plan.append(FAILURES[failure])
    if failure in SLOW:  # a right reply may take as long on a busy machine
        assert ask(server, timeout_s=1.0, retries=9) == SCORES
        assert len(server.seen) >= 4
    else:
        assert ask(server) == SCORES
        assert len(server.seen) == 4


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_goes_on_going_wrong_ends_with_the_address_and_the_last_failure(server, failure):
    server.plan.extend([FAILURES[failure]] * 2)
    with pytest.raises(UserError, match=r"gave no scores in 2 attempts \(reward\.retries\); the last: \S+") as error:
        ask(server, batch_size=5, timeout_s=0.5 if failure in SLOW else 30.0)
    assert server.url in str(error.value)
    assert "another batch" not in str(error.value)
    assert len(server.seen) == 2


def test_an_attempt_takes_no_longer_than_its_timeout_however_its_bytes_come(server):
    for behaviour in SLOW.values():
        server.plan.append(behaviour)
        started = time.monotonic()
        with pytest.raises(UserError, match="1 attempts"):
            ask(server, batch_size=5, retries=0, timeout_s=0.2)
        assert time.monotonic() - started < 20  # a drip would go on for ever


def test_an_attempt_to_connect_takes_no_longer_either(monkeypatch):
    waited = []

    def connects_never(address, timeout, source_address):
        waited.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", connects_never)
    with pytest.raises(UserError, match=r"2 attempts .* TimeoutError"):
        HttpReward("http://nowhere.invalid/", timeout_s=3.0, retries=1, batch_size=5)(PROMPTS, ANSWERS, COLUMNS)
    assert waited == [3.0, 3.0]


def test_a_server_that_is_not_there_is_asked_again_and_then_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(UserError, match=r"3 attempts .* ConnectionRefusedError"):
            HttpReward(url, timeout_s=1.0, retries=2, batch_size=5)(PROMPTS, ANSWERS, COLUMNS)


@pytest.mark.parametrize("status", [302, 400, 401, 404, 413, 422])
def test_a_request_that_is_refused_is_not_sent_again(server, status):
    server.plan.append(replies(b"no such model", status=status, Location="http://127.0.0.1:1/"))
    with pytest.raises(UserError, match=rf"does not take the request: status {status} .*no such model"):
        ask(server, batch_size=5, retries=5)
    assert len(server.seen) == 1


def test_one_batch_that_fails_ends_them_all_before_they_are_asked_again(server, monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 20.0)

    def refuses_the_last_batch(handler, asked):
        handler.reply(b"", status=400 if asked["prompts"] == PROMPTS[4:] else 500)

    server.plan.extend([refuses_the_last_batch] * 3)
    started = time.monotonic()
    with pytest.raises(UserError, match="status 400"):
        ask(server, retries=5)
    assert time.monotonic() - started < 15  # less than the first pause
    assert len(server.seen) <= 3  # none twice; one that was not begun when the last one failed is not sent at all


def test_pauses_between_attempts_double_up_to_a_bound_and_end_when_another_batch_has_failed(server, monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.5)
    reward = HttpReward(server.url, timeout_s=30.0, retries=8, batch_size=5)
    pauses, stop, turn = [], threading.Event(), threading.Semaphore()
    monkeypatch.setattr(stop, "wait", pauses.append)
    server.plan.extend([replies(b"", status=500)] * 9)
    with pytest.raises(UserError, match="9 attempts"):
        reward._scores(b"{}", 5, stop, turn)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert len(server.seen) == 9
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(UserError, match="another batch failed first"):
        reward._scores(b"{}", 5, stopped, turn)
    assert len(server.seen) == 9


def test_several_scores_come_by_name(server):
    server.plan.extend([scores(lambda right: {"a": right, "b": [-x for x in right]})] * 3)
    assert ask(server) == {"a": SCORES, "b": [-x for x in SCORES]}
    server.plan.extend([right, scores(lambda right: {"a": right})])
    with pytest.raises(UserError, match="named other scores"):
        ask(server)


def test_columns_that_json_cannot_hold_are_refused(server):
    reward = HttpReward(server.url, timeout_s=1.0, retries=0, batch_size=5)
    with pytest.raises(UserError, match=r"columns of the prompts .* bytes is not JSON"):
        reward(PROMPTS, ANSWERS, {"image": [b"\x89PNG"] * 5})
    assert server.seen == []


def test_the_service_is_a_source_of_scores_like_any_other(server):
    config = RewardConfig(url=server.url, timeout_s=1.0, retries=0, http_batch_size=3, weights={"url": 2.0})
    scored = score_answers(open_reward(config), PROMPTS, ANSWERS, COLUMNS)
    assert scored.total.tolist() == [2 * x for x in SCORES]
    assert len(server.seen) == 2
    server.plan.extend([replies(b"", status=500)] * 2)
    with pytest.raises(UserError, match=r"reward\.url: .* status 500"):
        score_answers(open_reward(config), PROMPTS, ANSWERS, COLUMNS)
