"""The page in a browser: Chromium, headless, driven by playwright. Machines without either say so and skip.

With PACE_SCREENSHOTS=DIR the pictures that the tests make stay there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server.kit import Server, running

pytestmark = pytest.mark.browser

CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))
    ),
    None,
)
TIMEOUT_MS = 30_000
KEY = "the key"
DRAFT = '{"method": "draft_model", "model": "demo-draft"}'


@pytest.fixture(scope="module")
def chatty() -> Iterator[Server]:
    """A server with speculation."""
    with running("--speculative-config", DRAFT) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    if CHROMIUM is None:
        pytest.skip("the browser tests need Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, chatty: Server) -> Iterator[Any]:
    """Opens the page; at the end nothing that the browser complained of is forgiven."""
    complaints: list[str] = []
    contexts = []

    def open_page(url: str = "", allow: str = "", **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text)
                if message.type in ("error", "warning") and not (allow and allow in message.text)
                else None
            ),
        )
        page.goto(url or chatty.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def say(page: Any, text: str, max_tokens: int = 60) -> None:
    """Send a message, with few tokens to come."""
    page.evaluate(
        "n => localStorage.setItem('pace.settings', JSON.stringify({max_tokens: n, seed: 1, temperature: 0.7}))",
        str(max_tokens),
    )
    page.reload()
    page.wait_for_selector("#state[data-state=ok]")
    page.fill("#input", text)
    page.keyboard.press("Enter")


def picture(page: Any, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("PACE_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 5000


def wait_until(page: Any, expression: str) -> None:
    """Wait until it is true; playwright's own way needs eval, which the page's policy forbids."""
    end = time.monotonic() + TIMEOUT_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def finished(page: Any) -> str:
    """Wait for the end of an answer; returns its text."""
    page.wait_for_selector("#send:not([hidden])")
    page.wait_for_selector("article.assistant:last-child:not(.waiting)")
    return str(page.inner_text("article.assistant:last-child .text"))


def test_an_answer_streams_and_its_figures_are_shown(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    say(page, "Write a function that reads a file.")
    page.wait_for_selector("article.assistant.waiting")
    assert finished(page)
    stats = page.inner_text("article.assistant .stats")
    assert re.search(
        r"^\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · \d+ % of drafts accepted", stats
    )
    picture(page, "desktop", tmp_path)
    page.click("#show-metrics")
    page.wait_for_timeout(2500)  # two samples
    assert len(page.query_selector_all("#tiles .tile")) == 9
    page.fill("#input", "And one that writes a file?")
    page.keyboard.press("Enter")
    finished(page)
    wait_until(page, "Number(document.querySelector('#tiles .value').textContent) > 0")  # tokens per second
    picture(page, "metrics", tmp_path)
    page.click("#show-settings")
    assert page.is_hidden("#metrics") and page.is_visible("#settings")
    picture(page, "settings", tmp_path)


def test_conversations_outlive_the_page_and_can_be_deleted(open_page: Any) -> None:
    page = open_page()
    say(page, "first question", 8)
    text = finished(page)
    page.reload()
    assert page.inner_text("article.user .text") == "first question"
    assert page.inner_text("article.assistant .text") == text
    page.keyboard.press("Alt+n")
    assert page.is_visible("#empty")
    page.fill("#input", "second question")
    page.keyboard.press("Enter")
    finished(page)
    page.select_option("#chats", label="first question")
    assert page.inner_text("article.user .text") == "first question"
    page.click("#delete")
    assert page.inner_text("article.user .text") == "second question"
    page.reload()
    assert [option.inner_text() for option in page.query_selector_all("#chats option")] == ["second question"]


def test_stop_and_regenerate(open_page: Any, chatty: Server) -> None:
    page = open_page()

    def on_and_on(route: Any) -> None:
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    page.route("**/v1/chat/completions", on_and_on)
    say(page, "Go on for long.", 1500)
    wait_until(page, "document.querySelector('article.assistant .text')?.textContent.length > 5")
    page.keyboard.press("Escape")
    finished(page)
    assert "stopped" in page.inner_text("article.assistant .stats")
    wait_until(page, "fetch('load').then((r) => r.json()).then((load) => load.server_load === 0)")
    page.evaluate("localStorage.setItem('pace.settings', JSON.stringify({max_tokens: '5', seed: '2'}))")
    page.reload()
    page.keyboard.press("Alt+r")
    finished(page)
    assert "5 tokens" in page.inner_text("article.assistant .stats")
    assert len(page.query_selector_all("article")) == 2


def test_the_servers_words_are_shown_where_it_refuses(open_page: Any) -> None:
    page = open_page(allow="status of 400")
    page.evaluate("localStorage.setItem('pace.settings', JSON.stringify({temperature: '-3'}))")
    page.reload()
    page.wait_for_selector("#state[data-state=ok]")
    page.fill("#input", "x")
    page.keyboard.press("Enter")
    page.wait_for_selector("article .error:not([hidden])")
    assert "temperature" in page.inner_text("article .error")
    page.click("#show-settings")
    page.click("#reset")
    page.fill("#set-max_tokens", "3")
    page.click("text=Regenerate")
    finished(page)
    assert page.is_hidden("article .error")


HOSTILE = """<script>window.hurt = 1</script><img src=x onerror="window.hurt = 1"> **bold** `code <b>`
[link](javascript:window.hurt=1) [good](https://example.org/a) <https://example.org/b>

```html
<svg onload="window.hurt = 1">
```

| a | b |
|---|---|
| <i>1</i> | 2 |

- one <u>x</u>
  1. two
"""


def test_what_a_model_writes_is_text(open_page: Any, tmp_path: Path) -> None:
    """Markup in an answer, its reasoning, a question or a kept conversation is shown, never obeyed."""
    page = open_page(allow="TrustedHTML")
    page.evaluate(
        """text => localStorage.setItem('pace.chat.x', JSON.stringify({id: 'x', time: 1, messages: [
            {role: 'user', content: text}, {role: 'assistant', content: text, reasoning: text, error: text}]}))""",
        HOSTILE,
    )
    page.reload()
    page.click("details summary")
    answer = page.query_selector("article.assistant .text.prose")
    assert answer.query_selector("script, img, svg, b, i, u, [onerror], [onload]") is None
    assert "<script>window.hurt = 1</script><img" in answer.inner_text()
    assert answer.query_selector("strong").inner_text() == "bold"
    assert answer.query_selector(".code pre").inner_text() == '<svg onload="window.hurt = 1">'
    assert [a.get_attribute("href") for a in answer.query_selector_all("a")] == [
        "https://example.org/a",
        "https://example.org/b",
    ]
    assert answer.query_selector("td").inner_text() == "<i>1</i>"
    assert answer.query_selector("ul > li > ol > li").inner_text() == "two"
    assert page.evaluate("window.hurt") is None
    with pytest.raises(Exception, match=r"TrustedHTML|Trusted Type"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    picture(page, "markdown", tmp_path)


def test_reasoning_is_folded_and_told_apart(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "Let me see."}}], "usage": {"completion_tokens": 4}},
        {"choices": [{"delta": {"content": "42"}}], "usage": {"completion_tokens": 5}},
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}},
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    say(page, "What is it?")
    assert finished(page) == "42"
    assert not page.is_visible("details.reasoning .prose")
    page.click("details summary")
    assert page.inner_text("details.reasoning .prose") == "Let me see."
    sent: list[Any] = []
    page.on(
        "request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None
    )
    page.fill("#input", "Why?")
    page.keyboard.press("Enter")
    finished(page)
    contents = [(one["role"], one["content"]) for one in sent[0]["messages"]]
    assert contents == [("user", "What is it?"), ("assistant", "42"), ("user", "Why?")]  # no reasoning


def test_a_broken_stream_is_told_and_what_came_stays(open_page: Any) -> None:
    page = open_page()
    body = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\ndata: {"error": {"message": "the engine died"}}\n\n'
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    say(page, "x")
    assert finished(page) == "half"
    assert page.inner_text("article .error") == "the engine died"


def test_with_keys_the_page_asks_for_one(open_page: Any) -> None:
    with running("--api-key", KEY) as server:
        page = open_page(server.url, allow="status of 401")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        wait_until(page, "document.getElementById('key-note').textContent.includes('does not know')")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#state[data-state=ok]")
        assert not page.is_visible("#key-dialog")
        assert page.evaluate("JSON.stringify(localStorage)").find(KEY) < 0
        page.fill("#input", "x")
        page.click("#send")
        assert finished(page) is not None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(open_page: Any, tmp_path: Path, scheme: str) -> None:
    phone = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}
    page = open_page(**phone, color_scheme=scheme, device_scale_factor=2)
    say(page, "Write a function that counts words in a file, please.", 90)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, f"phone-{scheme}", tmp_path)
    page.tap("#show-metrics")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, f"phone-metrics-{scheme}", tmp_path)
    page.tap("#metrics .close")
    assert page.is_visible("#input")


def test_everything_can_be_done_from_the_keyboard(open_page: Any, tmp_path: Path) -> None:
    page = open_page(color_scheme="dark")
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.press("Alt+s")
    assert page.is_visible("#settings")
    page.keyboard.press("Escape")
    assert page.is_hidden("#settings") and page.evaluate("document.activeElement.id") == "input"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    assert page.is_visible("#help-dialog")
    picture(page, "help-dark", tmp_path)
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    assert page.input_value("#input") == "a\nb"
