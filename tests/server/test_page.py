"""The web page in headless Chromium, over a real model that is streamed."""

import os
import shutil
import time

import pytest
from server_process import ServerProcess

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    flags = ["--context=512", "--max_batch=4", "--resident=none", "--stream_depth=3", "--model_alias=smol"]
    with ServerProcess(smollm2, tmp_path_factory.mktemp("server"), flags) as process:
        yield process


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        path = (
            os.environ.get("AIRJAX_TEST_CHROMIUM")
            or shutil.which("chromium")
            or shutil.which("chromium-browser")
        )
        try:
            opened = tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: install Debian's chromium ({str(error).splitlines()[0]:.100})")
        yield opened
        opened.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1360, "height": 860}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.requested, page.problems = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.goto(server.url)
    page.wait_for_selector("#status.ready")
    yield page
    assert page.problems == []
    assert all(url.startswith((server.url, "data:")) for url in page.requested)
    context.close()


def until(page, expression):
    """Waits until it is true; Playwright's own way needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def ask(page, text):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def test_a_chat_streams_while_the_layers_light_up(page):
    page.click("#settings-toggle")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "32")
    page.click("#settings-toggle")
    # A layer is lit for a moment only, which polling may miss on a busy machine.
    page.evaluate(
        """() => new MutationObserver(() => {
            window.lit ||= document.querySelector("#layers .computing") !== null;
        }).observe(document.getElementById("layers"), {subtree: true, childList: true, attributes: true})"""
    )
    ask(page, "What is the capital of France?")
    until(page, "window.lit")
    until(page, "parseFloat(document.getElementById('tokens-per-s').textContent) > 0")
    assert page.locator("#layers .cell").count() == 30 and page.locator("#slots .slot").count() == 3
    page.wait_for_selector("#stop", state="hidden")
    assert "Paris" in page.inner_text(".turn.assistant") and "per second" in page.inner_text(".note")
    assert "compute" in page.inner_text("#detail")
    if folder := os.environ.get("AIRJAX_TEST_SCREENSHOTS"):
        ask(page, "Write a table of three planets in markdown, then a list of three colours.")
        until(page, "document.querySelectorAll('.text')[2]?.textContent.length > 40")
        page.screenshot(path=f"{folder}/light.png")
        page.click("#theme")
        page.click("#settings-toggle")
        page.wait_for_timeout(800)
        page.screenshot(path=f"{folder}/dark.png")


def test_stop_ends_the_answer_and_history_survives_a_reload(page, server):
    ask(page, "Tell me a very long story.")
    until(page, "document.querySelector('.turn.assistant .text')?.textContent.length > 10")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send", state="visible")
    text = page.inner_text(".turn.assistant .text")
    page.reload()
    assert page.inner_text(".turn.assistant .text") == text and page.inner_text(".note") == "stopped"
    page.wait_for_selector("#status.ready")
    until(page, "document.getElementById('batch').textContent === '0'")
    page.click("#conversations .delete")
    page.reload()
    page.wait_for_selector("#status.ready")
    assert page.locator(".turn").count() == 0


def test_what_a_model_writes_never_becomes_markup(page):
    text = (
        "<img src=x onerror=alert(1)> **bold** `<b>` [good](https://a.example/) [bad](javascript:alert(1))\n"
        "- one\n- two\n\n```\n<script>1</script>\n```\n| a | b |\n|---|---|\n| 1 | 2 |"
    )
    html = page.evaluate(
        """async (text) => {
            const { render } = await import('/page/markdown.js');
            const node = document.createElement('div');
            node.append(...render(text));
            return node.innerHTML;
        }""",
        text,
    )
    assert (
        "<img" not in html and "<script" not in html and "javascript:" not in html.replace("(javascript:", "")
    )
    assert 'href="https://a.example/"' in html and "<strong>bold</strong>" in html
    assert "<li>one</li>" in html and "<td>2</td>" in html and "<code>&lt;b&gt;</code>" in html


def test_the_theme_follows_the_system_until_it_is_chosen(page):
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "light"
    page.emulate_media(color_scheme="dark")
    until(page, theme + " === 'dark'")
    page.click("#theme")
    page.reload()
    page.wait_for_selector("#status.ready")
    assert page.evaluate(theme) == "light"


def test_everything_is_reached_by_the_keyboard(page):
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"settings-toggle", "theme", "new", "log", "input", "send"} <= seen
