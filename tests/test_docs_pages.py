"""The documentation pages, and audio, in a real browser that reaches no host but the server itself."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Response,
    Route,
    expect,
    sync_playwright,
)

from tests.servers import Server
from tests.skipping import skip_without
from tests.sound import duration

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE_MS = 15_000
# Some violations of a page's policy are told to the page only.
TELL_VIOLATIONS = """addEventListener('securitypolicyviolation', event =>
    console.error(`refused ${event.violatedDirective}: ${event.blockedURI} ${event.sample}`))"""
USERNAME = "reader-of-the-docs"
PASSWORD = "correct-horse-battery"


@dataclass
class Watch:
    """What a page did that a page of ours never does."""

    server: str
    foreign: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def guard(self, route: Route) -> None:
        """Let through what goes to the server or stays in the page; stop and note the rest."""
        url = urlsplit(route.request.url)
        if url.scheme in {"data", "blob"} or f"{url.scheme}://{url.netloc}" == self.server:
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()

    def hear(self, message: ConsoleMessage) -> None:
        """Note what the page complains about."""
        if message.type in {"error", "warning"}:
            self.troubles.append(f"console {message.type}: {message.text}")

    def miss(self, request: Request) -> None:
        """Note a request that got no answer."""
        self.troubles.append(f"failed: {request.url}")

    def read(self, response: Response) -> None:
        """Note an answer that is an error."""
        if response.status >= 400:
            self.troubles.append(f"{response.status}: {response.url}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    chromium = shutil.which("chromium")
    if chromium is None:
        skip_without("chromium in PATH")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def watch(backend: Server) -> Watch:
    """Nothing seen yet."""
    return Watch(backend.url)


@pytest.fixture
def page(browser: Browser, watch: Watch) -> Iterator[Page]:
    """A watched page; by the end of the test it has complained about nothing and asked no other host."""
    with browser.new_context(viewport={"width": 1280, "height": 1400}) as context:
        context.route("**/*", watch.guard)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.add_init_script(TELL_VIOLATIONS)
        page.on("console", watch.hear)
        page.on("pageerror", lambda error: watch.troubles.append(f"exception: {error}"))
        page.on("requestfailed", watch.miss)
        page.on("response", watch.read)
        yield page
    assert watch.foreign == []
    assert watch.troubles == []


@pytest.fixture
def operations(backend: Server) -> list[dict[str, Any]]:
    """Every operation of the API, as its schema describes it."""
    schema = httpx.get(f"{backend.url}/openapi.json", trust_env=False).json()
    return [operation for path in schema["paths"].values() for operation in path.values()]


def test_swagger_shows_every_operation_under_its_tag(
    backend: Server, page: Page, operations: list[dict[str, Any]]
) -> None:
    page.goto(f"{backend.url}/docs")
    expect(page.get_by_role("heading", name="AI 语音后端")).to_be_visible()
    for operation in operations:
        section = page.locator(f"[data-tag='{operation['tags'][0]}']").locator("..")
        expect(section.get_by_text(operation["summary"], exact=True).last).to_be_visible()


def test_redoc_shows_title_and_operations(backend: Server, page: Page, operations: list[dict[str, Any]]) -> None:
    page.goto(f"{backend.url}/redoc")
    expect(page.get_by_role("heading", name="AI 语音后端")).to_be_visible()
    for operation in operations:
        heading = page.locator(f"[id$='/operation/{operation['operationId']}']").get_by_role("heading", level=2)
        expect(heading).to_have_text(operation["summary"])
    page.get_by_placeholder("Search...").fill("estimate")
    expect(page.get_by_role("search").get_by_role("menuitem").first).to_be_visible()


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_page_runs_no_script_that_it_was_not_made_with(backend: Server, page: Page, watch: Watch, path: str) -> None:
    answer = page.goto(f"{backend.url}{path}")
    assert answer is not None
    [scripts] = re.findall(r"script-src ([^;]*)", answer.headers["content-security-policy"])
    assert all(re.fullmatch(r"'self'|'sha256-[\w+/=]{44}'", each) for each in scripts.split())
    expect(page.get_by_role("heading", name="AI 语音后端")).to_be_visible()
    added = """script => document.body.append(Object.assign(document.createElement('script'), {textContent: script}))"""
    page.evaluate(added, "window.intruder = true")
    assert page.evaluate("window.intruder") is None
    assert {trouble.split(":")[0] for trouble in watch.troubles} == {"console error"}
    watch.troubles.clear()


def test_a_first_sentence_is_spoken_and_recognised_on_the_swagger_page(
    backend: Server, page: Page, tmp_path: Path
) -> None:
    registered = httpx.post(
        f"{backend.url}/api/auth/register", json={"username": USERNAME, "password": PASSWORD}, trust_env=False
    )
    assert registered.status_code == 200, registered.text
    page.goto(f"{backend.url}/docs")

    page.get_by_role("button", name="Authorize").click()
    dialog = page.locator(".dialog-ux")
    dialog.get_by_label("username:").fill(USERNAME)
    dialog.get_by_label("password:").fill(PASSWORD)
    dialog.get_by_role("button", name="Apply given OAuth2 credentials").click()
    expect(dialog.get_by_role("button", name="Remove authorization")).to_be_visible()
    dialog.get_by_role("button", name="Close", exact=True).click()

    stored = run_example(page, "put", "/api/user/apikey")
    assert stored["masked"].startswith("sk-****")

    speech = run_example(page, "post", "/api/audio/tts/synthesize")
    audio = httpx.get(speech["audio_url"], trust_env=False)
    assert audio.headers["content-type"] == "audio/mpeg"
    assert duration(audio.content, "mp3", 22050) == pytest.approx(speech["duration"], abs=0.1)

    file = tmp_path / "speech.mp3"
    file.write_bytes(audio.content)
    assert run_example(page, "post", "/api/audio/asr/recognize", upload=file)["text"] == "你好，欢迎使用语音合成服务！"

    assert run_example(page, "get", "/api/user/me")["username"] == USERNAME
    player = show_media(page, urlsplit(speech["audio_url"]).path.removeprefix("/media/"))
    page.wait_for_function("audio => audio.duration > 0", arg=player.element_handle())


def test_audio_plays_by_itself_and_on_the_pages_of_others(
    backend: Server, browser: Browser, page: Page, spoken: str
) -> None:
    page.goto(spoken)
    page.wait_for_function("document.querySelector('video').duration > 0")

    with elsewhere(f"<audio src='{spoken}'></audio><audio crossorigin src='{spoken}'></audio>") as url:
        foreign = browser.new_page()
        foreign.goto(url)
        foreign.wait_for_function("[...document.querySelectorAll('audio')].every(audio => audio.duration > 0)")
        foreign.close()


@pytest.fixture
def spoken(backend: Server) -> str:
    """The address of some speech."""
    login = {"username": "listener-of-the-audio", "password": PASSWORD}
    speech = {"model": "cosyvoice-v3-flash", "voice": "longanyang", "text": "你好。"}
    with httpx.Client(base_url=f"{backend.url}/api", trust_env=False) as client:
        client.post("/auth/register", json=login)
        token = client.post("/auth/login", json=login).json()["data"]["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        client.put("/user/apikey", json={"api_key": "sk-test-0123456789abcdef"})
        url: str = client.post("/audio/tts/synthesize", json=speech).json()["data"]["audio_url"]
    return url


@contextmanager
def elsewhere(content: str) -> Iterator[str]:
    """Serve a page from another site than the server's; gives its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def show_media(page: Page, key: str) -> Locator:
    """Fetch audio from the page as it stands there; gives the player that the page shows."""
    operation = page.locator(".opblock-get").filter(has=page.locator("[data-path='/media/{key}']"))
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_placeholder("key").fill(key)
    operation.get_by_role("button", name="Execute").click()
    player = operation.locator(".live-responses-table audio")
    expect(player).to_be_visible()
    return player


def run_example(page: Page, method: str, path: str, *, upload: Path | None = None) -> dict[str, Any]:
    """Send an operation's example from the page as it stands there, and give the data that the page shows."""
    operation = page.locator(f".opblock-{method}").filter(has=page.locator(f"[data-path='{path}']"))
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    if upload is not None:
        operation.locator(".body-param-content-type select, [aria-label='Request content type']").first.select_option(
            "multipart/form-data"
        )
        operation.locator("input[type=file]").set_input_files(upload)
    operation.get_by_role("button", name="Execute").click()
    answer = operation.locator(".live-responses-table .response")
    expect(answer.locator(".response-col_status")).to_contain_text("200")
    shown: dict[str, Any] = json.loads(answer.locator(".highlight-code code").first.inner_text())
    assert shown["code"] == 200
    data: dict[str, Any] = shown["data"]
    return data
