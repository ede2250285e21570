"""A report page as pictures, on a desktop and on a phone: `python bench/screenshots.py PAGE [--out FOLDER]`.

    python bench/screenshots.py runs/civil_comments/seeds/0/compare/report/index.html --out bench

    python bench/screenshots.py runs/demo/report/index.html --document 3 --out docs --name demo

Written: `<name>_desktop.png` and `<name>_phone.png`, the top of the page as it opens (texts are blurred), or, with
`--document N`, `<name>_document.png`, the text of the N-th document of the page with its masked tokens.
Needs selenium, Chromium and its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE = 500  # CSS pixels: a narrower screen is a phone's
SCREENS = {"desktop": (1280, 1600), "phone": (390, 1600)}  # name -> width and height of the picture, in CSS pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--name", default="report")
    parser.add_argument("--document", type=int, help="only this document of the page, its text shown")
    options = parser.parse_args()
    if not (CHROMIUM and DRIVER):
        raise SystemExit("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    pictures = []
    with tempfile.TemporaryDirectory() as profile:
        browser = open_browser(Path(profile))
        try:
            if options.document:
                taken = {"document": document(browser, options.page, options.document)}
            else:
                taken = {screen: screenshot(browser, options.page, *size) for screen, size in SCREENS.items()}
            for what, picture in taken.items():
                path = options.out / f"{options.name}_{what}.png"
                path.write_bytes(picture)
                pictures.append(str(path))
        finally:
            browser.quit()
    print(json.dumps({"pictures": pictures}))


def open_browser(profile: Path) -> Any:
    """A Chromium without a window, whose console and network logs are kept."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    browser.set_page_load_timeout(60)
    return browser


def show(browser: Any, page: Path, width: int = 1280, height: int = 844) -> None:
    """Open the page anew on a screen of `width` x `height` CSS pixels, and forget what was logged before."""
    from selenium.webdriver.support.wait import WebDriverWait

    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.resolve().as_uri())
    # on a busy machine `get` came back with the page still empty
    loaded = "return document.readyState === 'complete' && document.querySelector('main') !== null"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(loaded))


def screenshot(browser: Any, page: Path, width: int, height: int) -> bytes:
    """The top of the page as a PNG."""
    show(browser, page, width, height)
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return base64.b64decode(taken["data"])


def document(browser: Any, page: Path, number: int, width: int = 900) -> bytes:
    """The `number`-th document of the page, counted from 1, with its text shown, as a PNG."""
    show(browser, page, width)
    article = browser.find_elements("css selector", ".document")[number - 1]
    browser.execute_script(
        """const [article] = arguments;
        article.querySelector(".reveal").click();
        article.querySelector(".button").remove();
        article.style.padding = article.style.margin = "1rem";
        article.scrollIntoView();""",
        article,
    )
    return article.screenshot_as_png


if __name__ == "__main__":
    main()
