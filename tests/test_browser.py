"""Both pages in a real browser: what a person does with them, and that no text of a model runs in them.

Skipped where Playwright or a Chromium is missing; `.ci/run` installs one where it can.
"""

import os
import shutil
import signal
from contextlib import contextmanager

import pytest

from ppo_jax import ratings
from ppo_jax.ratings import NOW, SFT, SKIP, TIE
from ppo_jax.report.page import page as report_page
from ppo_jax.report.runs import read_curves
from ppo_jax.review.session import policy_is_first
from tests.test_report import HOSTILE, metrics, sample, write
from tests.test_review import PAIRS, prepared, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra 'test')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@contextmanager
def opened(browser, url, *, width=1280, height=800):
    """A page, what it wrote to its console, and the URLs that it asked for."""
    page = browser.new_page(viewport={"width": width, "height": height})
    messages, asked = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page, messages, asked
    page.close()


def begin(page, name):
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#pair:not([hidden]), #end:not([hidden])")


def press(page, key):
    """Press a key and wait until its pair is counted, or uncounted."""
    before = page.inner_text("#count")
    page.keyboard.press(key)
    page.wait_for_function("before => document.getElementById('count').textContent !== before", arg=before)


def test_twenty_pairs_are_rated_by_keys_and_none_is_lost_when_the_server_is_killed(browser, tmp_path):
    run, keys = prepared(tmp_path / "run"), ["ArrowLeft", "ArrowRight", "ArrowDown", "s"] * 5
    with (
        serving(run) as (process, port, token),
        opened(browser, f"http://127.0.0.1:{port}/#{token}") as (page, messages, asked),
    ):
        begin(page, "Ada")
        for key in keys[:10]:
            press(page, key)
        press(page, "u")
        press(page, keys[9])
        assert page.inner_text("#count") == "10 of 24 rated"
        assert page.url == f"http://127.0.0.1:{port}/"  # the token is out of sight
        assert not any(token in url for url in asked)
        assert page.evaluate("window.hacked") is None
        assert "<script>window.hacked = 1</script>" in page.inner_text("#first")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#problem:not([hidden])")
        assert "does not answer" in page.inner_text("#problem")
        messages = [text for text in messages if "ERR_CONNECTION_REFUSED" not in text]
        assert messages == []
    with serving(run) as (_, port, token), opened(browser, f"http://127.0.0.1:{port}/#{token}") as (page, *_):
        begin(page, "Ada")
        assert page.inner_text("#count") == "10 of 24 rated"
        for key in keys[10:]:
            press(page, key)
    meanings = {"ArrowDown": TIE, "s": SKIP}
    expected = {
        pair.id: meanings.get(key) or (NOW if (key == "ArrowLeft") == policy_is_first(0, "Ada", pair.id) else SFT)
        for pair, key in zip(PAIRS, keys, strict=False)
    }
    assert ratings.read(run).choices == {"Ada": expected}


def test_a_held_key_rates_one_pair_and_the_last_pair_ends_the_page_on_a_phone_too(browser, tmp_path):
    run = prepared(tmp_path / "run")
    with (
        serving(run) as (_, port, token),
        opened(browser, f"http://127.0.0.1:{port}/#{token}", width=390, height=844) as (page, messages, _),
    ):
        begin(page, "Bob")
        page.keyboard.down("ArrowLeft")
        for _ in range(5):
            page.keyboard.down("ArrowLeft")  # what a keyboard repeats
        page.keyboard.up("ArrowLeft")
        page.wait_for_function("() => document.getElementById('count').textContent.startsWith('1 of')")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for number in range(1, 24):
            page.click("text=Tie")
            page.wait_for_function(
                "n => document.getElementById('count').textContent.startsWith(`${n + 1} of`)", arg=number
            )
        assert page.inner_text("#total") == "24 pairs are rated. Thank you, Bob."
        assert messages == []
    assert len(ratings.read_ratings(run)) == 24


def test_the_report_shows_hostile_texts_asks_for_nothing_and_fits_a_phone(browser, tmp_path):
    run = write(
        tmp_path / "run",
        [metrics(step) for step in range(12)],
        samples=[sample(step, f"{HOSTILE} {step}" + "x" * 200, HOSTILE) for step in (0, 12)],
        answers=[sample(0, HOSTILE, HOSTILE) | {"why": ["best"]}],
        alarms=[{"step": 3, "scene": HOSTILE, "level": "act", "message": HOSTILE}],
    )
    file = tmp_path / "report.html"
    file.write_text(report_page(read_curves([str(run)])), encoding="utf-8")
    for width in (1280, 390):
        with opened(browser, file.as_uri(), width=width, height=844) as (page, messages, asked):
            dialogs = []
            page.on("dialog", lambda dialog, dialogs=dialogs: (dialogs.append(dialog.message), dialog.dismiss()))
            page.reload()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.hover("#curves .plot >> nth=0")
            assert page.inner_text(".tip").startswith("iteration ")
            assert (messages, dialogs) == ([], [])
            assert set(asked) == {file.as_uri()}
