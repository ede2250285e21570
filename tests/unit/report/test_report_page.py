"""The report page in a real Chromium without a window: it loads nothing; its search, keys, scores and blur work."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.screenshots import CHROMIUM, DRIVER, SCREENS, open_browser, screenshot, show
from ifguide.report.page import LEVELS, render_report
from tests.unit.report.sample_report import full_data, large_data

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


def test_a_click_on_a_token_tells_its_score(browser: Any, full_page: Path) -> None:
    show(browser, full_page, 390)
    first, second = browser.find_elements(By.CSS_SELECTOR, "#documents-1 .document > output")[:2]
    assert (first.get_attribute("aria-live"), first.text) == ("polite", "")
    browser.find_element(By.CSS_SELECTOR, "label[for=reveal-1-all]").click()
    token = browser.find_element(By.CSS_SELECTOR, "#documents-1 .tokens .m.k")
    token.click()
    assert (
        first.text == f"“{token.get_property('textContent')}” score {token.get_attribute('title')}, masked, annotated"
    )
    assert token.value_of_css_property("outline-style") == "solid"
    assert second.text == ""
    press(browser, Keys.ARROW_LEFT)  # a click gives its document the focus
    assert first.text.endswith(", masked")
    assert token.value_of_css_property("outline-style") == "none"
    # One listener serves all tokens, and Tab visits documents, not tokens.
    assert not browser.find_elements(By.CSS_SELECTOR, ".tokens [tabindex], .tokens [onclick]")


def test_arrow_keys_tell_the_scores_of_a_documents_tokens(browser: Any, full_page: Path) -> None:
    show(browser, full_page)
    output = browser.find_elements(By.CSS_SELECTOR, "#documents-1 .document > output")[1]
    tokens = browser.find_elements(By.CSS_SELECTOR, "#documents-1 .document:nth-of-type(2) .tokens > span")
    scores = [token.get_attribute("title") for token in tokens[:3]]
    press(browser, "j", "j", Keys.ARROW_RIGHT)
    assert output.text == "Show the text first."  # the text is hidden from the output as well
    press(browser, Keys.ENTER, Keys.ARROW_RIGHT)
    assert output.text == f"“You” score {scores[0]}"
    press(browser, Keys.ARROW_LEFT)  # the first stays
    assert output.text == f"“You” score {scores[0]}"
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert output.get_property("textContent") == f"“  a” score {scores[2]}"
    assert focused(browser) == "Document 2"
    press(browser, "k", "j", Keys.ARROW_LEFT)  # a document keeps its place
    assert output.text == f"“ are” score {scores[1]}"
    press(browser, *[Keys.ARROW_RIGHT] * 4)
    assert output.text.startswith("“↵↵said” score ")
    press(browser, "/", "a", Keys.ARROW_LEFT, "b")  # moves the cursor there
    assert browser.find_element(By.CSS_SELECTOR, "#documents-1 input[type=search]").get_property("value") == "ba"
    assert output.get_property("textContent").startswith("“↵↵said” score ")


def test_a_token_that_is_out_of_sight_is_scrolled_to(browser: Any, full_page: Path) -> None:
    show(browser, full_page, 390)
    press(browser, "j", Keys.ENTER, *[Keys.ARROW_RIGHT] * 120)
    seen = (
        "const box = document.querySelector('.tokens').getBoundingClientRect(),"
        " now = document.querySelector('.now').getBoundingClientRect();"
        "return box.top <= now.top && now.bottom <= box.bottom + 1"
    )
    assert browser.execute_script("return document.querySelector('.tokens').scrollTop") > 0
    assert browser.execute_script(seen)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_every_colour_of_a_token_has_contrast(browser: Any, full_page: Path, scheme: str) -> None:
    scheme_of = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_of)
    try:
        show(browser, full_page)
        levels = [f"{kind}{level}" for kind in "wc" for level in range(1, LEVELS + 1)]
        colours = browser.execute_script(
            "const token = document.querySelector('.tokens').appendChild(document.createElement('span'));"
            "const card = getComputedStyle(document.querySelector('section')).backgroundColor;"
            "return arguments[0].map((level) => {"
            "  token.className = level;"
            "  const style = getComputedStyle(token);"
            "  return [style.color, style.backgroundColor, card].map((colour) => colour.match(/[\\d.]+/g).map(Number));"
            "})",
            levels,
        )
        assert colours[0][2] == ([255, 255, 255] if scheme == "light" else [25, 29, 37])
        assert len({tuple(behind) for _, behind, _ in colours}) == 2 * LEVELS
        low = {level: contrast(*own) for level, own in zip(levels, colours, strict=True) if contrast(*own) < 4.5}
        assert low == {}
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(ink: list[float], colour: list[float], card: list[float]) -> float:
    """WCAG's contrast ratio of `ink` on a translucent `colour` over the `card`."""

    def luminance(rgb: list[float]) -> float:
        shares = [value / 255 for value in rgb]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    *rgb, alpha = colour
    behind = [alpha * front + (1 - alpha) * back for front, back in zip(rgb, card, strict=True)]
    dark, light = sorted(luminance(each) for each in (ink, behind))
    return (light + 0.05) / (dark + 0.05)


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
