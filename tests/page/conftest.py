"""A real Chromium: Debian's, driven by Playwright. These tests are marked `all` and skip without either of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import program

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.all)


@pytest.fixture(scope="session")
def start_browser() -> Iterator[Callable[..., Any]]:
    """Starts browsers. Arguments: further options of Chromium's command line."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (make .venv/all)")
    chromium = program("chromium", "chromium")
    with contextlib.ExitStack() as opened:
        driver = opened.enter_context(playwright.sync_playwright())

        def start(*options: str) -> Any:
            # Root has no sandbox; a small /dev/shm, as in containers, would crash tabs.
            arguments = ["--no-sandbox", "--disable-dev-shm-usage", *options]
            browser = driver.chromium.launch(executable_path=chromium, args=arguments)
            opened.callback(browser.close)
            return browser

        yield start


@pytest.fixture(scope="session")
def browser(start_browser: Callable[..., Any]) -> Any:
    return start_browser()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page at an address. Options as Playwright's new_context, such as `java_script_enabled=False`.

    What the browser reports of a page, such as errors of scripts and refusals by its policy for content, is collected
    in `page.reports`.
    """
    with contextlib.ExitStack() as opened:

        def open_one(url: str, **options: Any) -> Any:
            context = browser.new_context(**options)
            opened.callback(context.close)
            page = context.new_page()
            page.reports = []
            page.on("pageerror", lambda error: page.reports.append(str(error)))
            page.on("console", lambda said: page.reports.append(said.text) if said.type != "log" else None)
            page.goto(url)
            return page

        yield open_one
