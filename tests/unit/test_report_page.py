"""The report page in a real Chromium without a window: it loads nothing, and its search, keys and blur work."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.screenshots import CHROMIUM, DRIVER, SCREENS, open_browser, screenshot, show
from ifguide.report.page import render_report
from tests.sample_report import full_data, large_data

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page") / "index.html", render_report(full_data()))


def written(path: Path, html: str) -> Path:
    path.write_text(html, encoding="utf-8")
    return path


def network(browser: Any, event: str) -> list[dict[str, Any]]:
    """What the network log holds since it was last read."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [message["params"] for message in messages if message["method"] == f"Network.{event}"]


def press(browser: Any, *keys: str) -> None:
    webdriver.ActionChains(browser).send_keys(*keys).perform()


def focused(browser: Any) -> str:
    return browser.execute_script("return document.activeElement.getAttribute('aria-label') || ''")


def shown(browser: Any) -> list[str]:
    """The documents of the first behaviour that can be seen."""
    script = "return [...document.querySelectorAll('#documents-1 .document')].filter(e => e.checkVisibility())"
    return [document.get_attribute("aria-label") for document in browser.execute_script(script)]


def test_it_asks_for_nothing_but_itself_and_logs_no_error(browser: Any, full_page: Path) -> None:
    show(browser, full_page)
    assert [event["request"]["url"] for event in network(browser, "requestWillBeSent")] == [full_page.as_uri()]
    assert browser.get_log("browser") == []
    assert browser.title == "Guided pretraining of pythia-160m"
    # The policy holds: what somebody put into the page could load and run nothing.
    browser.execute_script(
        "window.ran = false;"
        "const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        "const image = document.createElement('img'); image.src = 'https://example.invalid/a.png';"
        "document.body.append(script, image)"
    )
    assert browser.execute_script("return window.ran") is False
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert len(refused) == 2
    assert all("Content Security Policy" in message for message in refused)
    assert [event["blockedReason"] for event in network(browser, "loadingFailed")] == ["csp"]


def test_the_search_filters_documents_and_says_how_many(browser: Any, full_page: Path) -> None:
    show(browser, full_page)
    search = browser.find_element(By.CSS_SELECTOR, "#documents-1 input[type=search]")
    output = browser.find_element(By.CSS_SELECTOR, "#documents-1 output")
    assert (output.get_attribute("aria-live"), output.text) == ("polite", "3 of 3 documents")
    search.send_keys("SAID bernd")
    assert shown(browser) == ["Document 2"]
    assert output.text == "1 of 3 documents"
    search.send_keys(" nowhere")
    assert (shown(browser), output.text) == ([], "0 of 3 documents")
    search.send_keys(Keys.ESCAPE)
    assert len(shown(browser)) == 3


def test_masked_only_searches_the_masked_tokens(browser: Any, full_page: Path) -> None:
    show(browser, full_page)
    output = browser.find_element(By.CSS_SELECTOR, "#documents-2 output")
    search = browser.find_element(By.CSS_SELECTOR, "#documents-2 input[type=search]")
    search.send_keys("wise")
    assert output.text == "1 of 2 documents"
    browser.find_element(By.CSS_SELECTOR, "#documents-2 .toolbar input[type=checkbox]").click()
    assert output.text == "0 of 2 documents"  # of "How very wise of you, as ever." only "of you," is masked
    search.send_keys(Keys.ESCAPE)
    assert output.text == "1 of 2 documents"  # the other document has no masked token
    search.send_keys("of you")
    assert output.text == "1 of 2 documents"
    assert browser.find_element(By.CSS_SELECTOR, "#documents-1 output").text == "3 of 3 documents"


def test_text_is_blurred_until_it_is_asked_for(browser: Any, full_page: Path) -> None:
    show(browser, full_page)
    tokens = browser.find_elements(By.CSS_SELECTOR, "#documents-1 .tokens")

    def blurred() -> list[bool]:
        return [element.value_of_css_property("filter") != "none" for element in tokens]

    assert blurred() == [True] * 3
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[1])
    browser.find_elements(By.CSS_SELECTOR, "#documents-1 .veil")[1].click()
    assert blurred() == [True, False, True]
    box = browser.find_element(By.CSS_SELECTOR, "#documents-1 .tokens .m")
    assert "inset" in box.value_of_css_property("box-shadow")
    browser.find_element(By.CSS_SELECTOR, "label[for=reveal-1-all]").click()
    assert blurred() == [False] * 3


def test_without_the_script_text_can_still_be_shown(browser: Any, full_page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, full_page)
        assert not browser.find_element(By.CSS_SELECTOR, "#documents-1 .toolbar").is_displayed()
        browser.find_element(By.CSS_SELECTOR, "label[for=reveal-1-all]").click()
        tokens = browser.find_element(By.CSS_SELECTOR, "#documents-1 .tokens")
        assert tokens.value_of_css_property("filter") == "none"
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_it_can_be_used_by_keyboard(browser: Any, full_page: Path) -> None:
    show(browser, full_page)
    press(browser, "j")
    assert focused(browser) == "Document 1"
    press(browser, "j", "j", "j")  # the last stays
    assert focused(browser) == "Document 3"
    press(browser, "k")
    assert focused(browser) == "Document 2"
    press(browser, Keys.ARROW_UP)
    press(browser, Keys.ARROW_DOWN)
    assert focused(browser) == "Document 2"
    press(browser, Keys.ENTER)
    assert browser.find_element(By.ID, "reveal-1-2").is_selected()
    press(browser, "/")
    assert focused(browser).startswith("Search the documents")
    press(browser, "jk/ Anna")  # is text there
    assert browser.find_element(By.CSS_SELECTOR, "#documents-1 output").text == "0 of 3 documents"
    press(browser, Keys.ESCAPE, "Clara", Keys.ENTER)
    assert focused(browser) == "Document 3"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_body_does_not_overflow(browser: Any, full_page: Path, width: int) -> None:
    show(browser, full_page, width)
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)
    assert browser.execute_script("return [document.documentElement.scrollWidth <= innerWidth, innerWidth]") == [
        True,
        width,
    ]


def test_a_very_large_page_is_small_and_quick_enough(browser: Any, tmp_path: Path) -> None:
    html = render_report(large_data())
    assert len(html.encode()) < 8_000_000  # 120,000 tokens at about 50 bytes, 43 groups of four models
    show(browser, written(tmp_path / "index.html", html))
    # Bounds are far above what it takes on a busy machine: they catch a layout of every document at every key.
    timing = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert timing < 15_000
    search = browser.find_element(By.CSS_SELECTOR, "#documents-1 input[type=search]")
    start = time.monotonic()
    search.send_keys("pie number 137,")
    assert browser.find_element(By.CSS_SELECTOR, "#documents-1 output").text == "1 of 200 documents"
    assert time.monotonic() - start < 20
    assert shown(browser) == ["Document 137"]


@pytest.mark.parametrize("screen", list(SCREENS))
def test_a_screenshot_is_as_large_as_the_screen(browser: Any, full_page: Path, screen: str) -> None:
    width, height = SCREENS[screen]
    picture = screenshot(browser, full_page, width, height)
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (width, height)
