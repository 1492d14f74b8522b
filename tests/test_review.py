"""The rating page: blind, only for its own page on this machine, and nothing that was acknowledged is lost."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

import ppo_jax
from ppo_jax import config_file, ratings
from ppo_jax.config import Config
from ppo_jax.errors import UserError
from ppo_jax.ratings import NOW, SFT, SKIP, TIE, Pair, RatingsFile
from ppo_jax.review import pairs as making
from ppo_jax.review.session import LONGEST_NAME, Refused, Session, policy_is_first

server = pytest.importorskip("ppo_jax.review.server", reason="the extra 'review' is not installed")
testclient = pytest.importorskip("starlette.testclient", reason="starlette's test client needs httpx2")

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ppo_jax" / "review"
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\x00\u2028\ud83d"
PAIRS = [
    Pair(f"prompt {i} {HOSTILE}", f"of the first {i} {HOSTILE}", f"of the second {i} {HOSTILE}") for i in range(24)
]
TOKEN = "the-token"


@pytest.fixture
def session(tmp_path):
    with RatingsFile(tmp_path) as file:
        yield Session([*PAIRS, Pair("same", "one text", " one text\n")], file, seed=3)


@pytest.fixture
def page(session):
    """A client that does what the page does."""
    with testclient.TestClient(server.make_app(session, TOKEN), base_url="http://127.0.0.1:8123") as client:
        yield client


def ask(client, call, *, token=TOKEN, headers=None, **asked):
    return client.post(
        f"/api/{call}", json={"rater": "ada"} | asked, headers={server.TOKEN_HEADER: token} | (headers or {})
    )


def prepared(directory):
    """A run directory whose pairs are made already, so that no model is loaded."""
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(Config().model_dump(mode="json")))
    ratings.write_pairs(directory, PAIRS, {"asked": 40})
    return directory


@contextmanager
def serving(run, *arguments):
    """(process, port, token) of the command, killed at the end."""
    command = [sys.executable, "-m", "ppo_jax.review", str(run), *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line.decode())
                if found := re.search(r"http://127\.0\.0\.1:(\d+)/#(\S+)", lines[-1]):
                    yield process, int(found[1]), found[2]
                    return
            pytest.fail("".join(lines))
        finally:
            process.kill()


# --------------------------------------------------------------------------------------------------------- session


def test_the_order_is_a_function_of_seed_rater_and_pair_and_as_good_as_random():
    ids = [f"{i:016x}" for i in range(1000)]

    def order(seed, rater):
        return [policy_is_first(seed, rater, pair) for pair in ids]

    assert order(0, "ada") == order(0, "ada")
    orders = [order(0, "ada"), order(1, "ada"), order(0, "bob")]
    for one in orders:
        assert 400 < sum(one) < 600
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 400 < sum(a == b for a, b in zip(orders[one], orders[other], strict=True)) < 600


def test_nothing_that_a_rater_is_sent_says_which_model_wrote_what(session):
    sides = set()
    for pair in PAIRS:
        shown = session.view("ada")["pair"]
        assert shown.keys() == {"id", "prompt", "first", "second"}
        assert shown["id"] == pair.id
        assert {shown["first"][:13], shown["second"][:13]} == {"of the first ", "of the second"}
        sides.add(shown["first"][:13])
        session.rate("ada", pair.id, "skip")
    assert len(sides) == 2


def test_a_choice_is_stored_for_the_model_whose_answer_was_shown_there(session, tmp_path):
    choices = ["first", "second", "tie", "skip"] * 6
    for choice in choices:
        shown = session.view("ada")["pair"]
        session.rate("ada", shown["id"], choice)
    standing = ratings.standing_choices(ratings.read_ratings(tmp_path))["ada"]
    for pair, choice in zip(PAIRS, choices, strict=True):
        policy_first = policy_is_first(3, "ada", pair.id)
        expected = {"tie": TIE, "skip": SKIP}.get(choice) or (NOW if (choice == "first") == policy_first else SFT)
        assert standing[pair.id] == expected


def test_pairs_with_one_text_are_not_asked_and_undo_brings_the_last_pair_back(session):
    assert session.view("ada") | {"pair": None} == {"done": 0, "total": 24, "pair": None}
    first = session.view("ada")["pair"]
    session.rate("ada", first["id"], "first")
    second = session.view("ada")["pair"]
    session.rate("ada", second["id"], "first")
    assert session.view("bob")["pair"]["id"] == first["id"]  # raters do not see each other's progress
    session.undo("ada")
    assert session.view("ada")["pair"] == second
    session.undo("ada")
    assert session.view("ada")["pair"] == first
    with pytest.raises(Refused, match="nothing to undo"):
        session.undo("ada")


def test_a_pair_is_rated_once_by_each_rater_and_unknown_pairs_and_choices_are_refused(session, tmp_path):
    pair = session.view("ada")["pair"]["id"]
    session.rate("ada", pair, "first")
    for rater, other, choice in (("ada", pair, "second"), ("bob", "unknown", "first"), ("bob", pair, "now")):
        with pytest.raises(Refused):
            session.rate(rater, other, choice)
    assert len(ratings.read_ratings(tmp_path)) == 1


@pytest.mark.parametrize("name", ["", " ada", "a\nb", "\ud83d", "x" * (LONGEST_NAME + 1), "\u202eada", "a\x1b"])
def test_names_that_could_act_or_be_confused_are_refused(session, name):
    with pytest.raises(Refused):
        session.view(name)


# ---------------------------------------------------------------------------------------------------------- server


@pytest.mark.parametrize(
    "changes",
    [
        {"token": ""},
        {"token": TOKEN[:-1]},
        {"headers": {"host": "evil.example"}},
        {"headers": {"host": "127.0.0.1.evil.example"}},
        {"headers": {"origin": "http://evil.example"}},
        {"headers": {"origin": "http://127.0.0.1:9999"}},
        {"headers": {"origin": "null"}},
    ],
    ids=lambda changes: str(changes),
)
def test_requests_from_elsewhere_read_and_store_nothing(page, tmp_path, changes):
    for call in ("view", "rate", "undo"):
        answered = ask(page, call, pair=PAIRS[0].id, choice="first", **changes)
        assert answered.status_code == 403
        assert "prompt" not in answered.text
    assert ratings.read_ratings(tmp_path) == []


def test_the_page_itself_is_not_given_to_another_host(page):
    assert page.get("/").status_code == 200
    assert page.get("/", headers={"host": "evil.example"}).status_code == 403
    assert page.get("/", headers={"host": "localhost:80", "origin": "http://localhost:80"}).status_code == 200


def test_the_page_as_opened_behind_a_forwarded_port_may_rate(page):
    own = {"host": "localhost:5000", "origin": "http://localhost:5000"}
    seen = ask(page, "view", headers=own).json()
    rated = ask(page, "rate", headers=own, pair=seen["pair"]["id"], choice="second")
    assert (rated.status_code, rated.json()["done"]) == (200, 1)


def test_every_answer_forbids_what_the_page_does_not_need(page):
    for answered in (
        page.get("/"),
        page.get("/page.js"),
        page.get("/none"),
        ask(page, "view"),
        ask(page, "view", token="x"),
    ):
        policy = answered.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert answered.headers["x-content-type-options"] == "nosniff"
        assert answered.headers["cache-control"] == "no-store"
        assert "set-cookie" not in answered.headers
        assert "access-control-allow-origin" not in answered.headers


def test_no_part_of_the_page_makes_markup_of_a_text():
    script, html = (PACKAGE / "page.js").read_text(), (PACKAGE / "page.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", script)
    assert re.findall(r"<script[^>]*>", html) == ['<script src="/page.js" defer>']
    assert not re.search(r"\son\w+=|style=|https?://", html)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"rater": 1}', b'{"rater": null}', b"{}", b'{"rater": "' + b"a" * 10_000 + b'"}']
)
def test_a_request_that_the_page_does_not_send_is_refused_in_json(page, body):
    answered = page.post("/api/view", content=body, headers={server.TOKEN_HEADER: TOKEN})
    assert answered.status_code in (400, 409)
    assert answered.json().keys() == {"error"}


def test_a_rating_that_cannot_be_stored_is_not_counted_and_the_rater_is_told(page, monkeypatch):
    pair = ask(page, "view").json()["pair"]["id"]
    monkeypatch.setattr(
        os, "write", lambda descriptor, data: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    failed = ask(page, "rate", pair=pair, choice="first")
    assert failed.status_code == 507
    assert "No space left" in failed.json()["error"]
    monkeypatch.undo()
    assert ask(page, "view").json()["done"] == 0


def test_twenty_ratings_survive_a_server_that_is_killed_in_the_middle(tmp_path):
    run, acknowledged = prepared(tmp_path / "run"), {}
    for _ in range(2):
        with serving(run) as (process, port, token):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

            def api(call, connection=connection, token=token, **asked):
                connection.request(
                    "POST", f"/api/{call}", json.dumps({"rater": "ada"} | asked), {server.TOKEN_HEADER: token}
                )
                return json.loads(connection.getresponse().read())

            view = api("view")
            assert view["done"] == len(acknowledged)
            for _ in range(10):
                pair = view["pair"]["id"]
                view = api("rate", pair=pair, choice="first")
                acknowledged[pair] = NOW if policy_is_first(0, "ada", pair) else SFT
            os.kill(process.pid, signal.SIGKILL)
            connection.close()
    assert ratings.read(run).choices == {"ada": acknowledged}
    assert len(acknowledged) == 20


def test_ctrl_c_is_how_the_server_ends_and_another_start_meanwhile_is_refused(tmp_path):
    run = prepared(tmp_path / "run")
    with serving(run) as (process, port, _):
        command = [sys.executable, "-m", "ppo_jax.review", str(run)]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert second.stderr.startswith("ppo-jax: ")
        assert "in use by another rating page" in second.stderr
        with pytest.raises(UserError, match=f"--port: {port} on 127.0.0.1 cannot be used"):
            server.listen(port)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert b"Traceback" not in process.stdout.read()


# ----------------------------------------------------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A run of two iterations on ten prompts of a file, of which two are held out."""
    directory = tmp_path_factory.mktemp("trained")
    file = directory / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"the soup {i}"}) + "\n" for i in range(10)))
    settings = {
        "model.path": str(tiny_model),
        "prompts.path": str(file),
        "prompts.evaluation_fraction": 0.2,
        "run.dir": str(directory / "run"),
        "run.iterations": 2,
        "rollout.batch_size": 8,
        "rollout.max_new_tokens": 8,
        "update.minibatch_size": 8,
        "update.epochs": 1,
        "update.learning_rate": 5e-2,
        "monitor.sample_every": 0,
        "monitor.tensorboard": False,
        "monitor.fixed_prompts": ["a fixed prompt"],
    }
    result = ppo_jax.fine_tune(settings, reward=lambda prompts, answers: [float(len(a)) for a in answers])
    return result.directory


def test_pairs_are_made_once_and_are_different_prompts_the_fixed_and_the_held_out_first(trained, monkeypatch):
    config = making.read_config(trained)
    few = making.read_or_make(trained, config, 3, None)
    pairs = making.read_or_make(trained, config, 40, None)
    assert [pair.prompt for pair in pairs[:3]] == [pair.prompt for pair in few]
    assert pairs[0].prompt == "a fixed prompt"
    assert len({pair.prompt for pair in pairs}) == len(pairs) == 11
    assert any(not pair.is_same for pair in pairs)
    held_out = {pair.prompt for pair in pairs[1:3]}
    training = making.load_split(config.prompts, making.build.open_model(config).tokenizer, seed=0)[0].texts
    assert not held_out & set(training)
    monkeypatch.setattr(making, "make_pairs", lambda *_: pytest.fail("made again"))
    assert making.read_or_make(trained, config, 40, None) == pairs
    assert making.read_or_make(trained, config, 5, None) == pairs[:5]


def test_an_untrained_policy_gives_the_sft_models_answers_and_new_weights_make_new_pairs(trained, tiny_model):
    config = making.read_config(trained)
    moved = making.read_or_make(trained, config, 11, None)
    weights = trained / "policy" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes((tiny_model / "model.safetensors").read_bytes())
        os.utime(weights, (1, 1))
        same = making.read_or_make(trained, config, 11, None)
    finally:
        weights.write_bytes(kept)
    assert all(pair.is_same for pair in same)
    assert [pair.sft for pair in same] == [pair.sft for pair in moved]


def test_prompts_of_a_file_are_answered_in_place_of_the_runs_own(trained, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "mine"}\n{"prompt": "mine"}\n{"prompt": "yours"}\n')
    pairs = making.read_or_make(trained, making.read_config(trained), 40, str(file))
    assert [pair.prompt for pair in pairs] == ["mine", "yours"]


def test_another_sft_model_a_missing_policy_and_prompts_from_python_are_refused(trained, tmp_path):
    config = making.read_config(trained)
    described = trained / "versions.json"
    kept = described.read_text()
    try:
        described.write_text(json.dumps(json.loads(kept) | {"reference_digest": "another"}))
        with pytest.raises(UserError, match=r"is not the one .* began with .*expected another"):
            making.make_pairs(trained, config, 2, None)
        described.write_text(json.dumps(json.loads(kept) | {"from_python": ["prompts"]}))
        with pytest.raises(UserError, match="came from Python; say with --prompts FILE"):
            making.make_pairs(trained, config, 2, None)
    finally:
        described.write_text(kept)
    (tmp_path / "config.yaml").write_text(config_file.load().to_yaml())
    with pytest.raises(UserError, match="policy is not there"):
        making.read_or_make(tmp_path, config, 2, None)
    with pytest.raises(UserError, match="it has no config"):
        making.read_config(tmp_path / "absent")
