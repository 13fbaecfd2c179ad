"""Servers of nano, browsers and visitors for the tests of the page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conversions import write_answers
from openai import OpenAI
from visits import Visit, plain, wav

import mimo_fast
from benchmarks.chromium import Microphone, chromium, driver, missing
from benchmarks.serving import Served, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

VISITORS = {"viewport": {"width": 1280, "height": 800}}

Open = Callable[..., Visit]
"""Opens the page of a server as a new visitor, with these options of a context."""


@pytest.fixture(scope="session")
def playwright() -> Iterator[Any]:
    if reason := missing():
        # CI must not pass without these tests.
        end = pytest.fail if os.environ.get("MIMO_FAST_BROWSER") == "required" else pytest.skip
        end(reason)
    with driver() as found:
        yield found


@pytest.fixture(scope="session")
def microphone(tmp_path_factory: pytest.TempPathFactory) -> Microphone:
    """What the browser's microphone plays whenever it is opened."""
    return Microphone(tmp_path_factory.mktemp("microphone") / "speech.wav")


@pytest.fixture(scope="session")
def browser(playwright: Any, microphone: Microphone) -> Iterator[Browser]:
    with chromium(playwright, microphone) as found:
        yield found


@pytest.fixture(scope="session")
def nano(playwright: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of nano in a process of its own, on which the browser's load does not weigh."""
    sets = tmp_path_factory.mktemp("sets")
    with mimo_fast.load() as model:
        write_answers(model, sets / "answers")
    options = ["--allowed-hosts", "voice.test", "--log-level", "warning", "--examples", str(sets)]
    with served(options) as server:
        yield server
        assert not server.failures()


@pytest.fixture(scope="session")
def transcribed(nano: Served) -> Callable[[Any, int], str]:
    """The words that the model finds in samples of a rate."""
    client = OpenAI(base_url=f"{nano.url}/v1", api_key="none")

    def words(samples: Any, rate: int) -> str:
        file = ("heard.wav", wav(samples, rate))
        return plain(client.audio.transcriptions.create(model="nano", file=file).text)

    return words


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens pages; no visit may reach for another host, break the policy or log an error."""
    opened = list[Visit]()

    def opening(
        server: Any,
        path: str = "",
        *,
        granted: bool = True,
        chrome: Browser | None = None,
        script: str = "",
        **options: Any,
    ) -> Visit:
        """server: what has a `url`, or one. granted: whether the microphone is allowed.
        script: runs before the page's own."""
        permissions = ["microphone"] if granted else []
        found = {**VISITORS, "permissions": permissions, "accept_downloads": True, **options}
        context = (chrome or browser).new_context(**found)
        opened.append(Visit(context, getattr(server, "url", server)))
        if script:
            context.add_init_script(script)
        return opened[-1].open(path)

    yield opening
    problems = list[str]()
    for each in opened:
        problems += each.guard.found()
        each.context.close()
    assert not problems, problems


@pytest.fixture
def download(tmp_path: Path) -> Callable[[Visit, str], Path]:
    """Presses what saves a file -> the file."""

    def saved(visit: Visit, selector: str) -> Path:
        with visit.page.expect_download() as found:
            visit.page.locator(selector).click()
        path = tmp_path / found.value.suggested_filename
        found.value.save_as(path)
        return path

    return saved
