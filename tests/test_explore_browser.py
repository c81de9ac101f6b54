"""The explorer's page in a real browser: what a reader does with it, and what an attacker cannot.

Needs Chromium, its driver and selenium (Debian: chromium, chromium-driver); skipped without.
"""

import itertools
import re
import shutil
import time

import numpy as np
import pytest
from explorer_pages import (
    EVIL,
    ByteTokenizer,
    EvilTokenizer,
    byte_ids,
    make_large_page,
    make_page,
)
from test_report import records, some_contexts, write_run

from kronsae.explore.report import write_report
from kronsae.explore.write import write_explorer
from kronsae.properties import WINDOW
from kronsae.properties.labels import FILE, Label, read_labels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


class Browser:
    """A browser on a page."""

    def __init__(self, folder) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.chrome.service.Service(DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition):
        """Wait until a script's expression holds."""
        end = time.monotonic() + 30
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.02)

    def screen(self, width, height, dark=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, page, address="#/"):
        self.driver.get("about:blank")
        self.driver.get(page.as_uri() + address)
        self.until("document.body && 'ready' in document.body.dataset")

    def go(self, address):
        self.run("location.hash = arguments[0]", address)
        self.arrive(address)

    def arrive(self, address):
        self.until(f"document.getElementById('main').dataset.address === '{address}'")

    def texts(self, selector):
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            selector,
        )

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def press(self, *keys):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self):
        return self.run("return document.activeElement.getAttribute('href')")

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_page(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def at_home(browser, made):
    browser.screen(1200, 900)
    browser.complaints()
    browser.open(made.page)
    yield browser
    assert browser.complaints() == []
    assert browser.run("return window.pwned") is None


Keys = webdriver.Keys


def test_from_the_heads_to_a_latent_and_back(at_home, made):
    assert "72 latents" in at_home.texts("main")[0]
    canvas = at_home.driver.find_element("css selector", ".wall canvas")
    center = at_home.run(
        "const c = arguments[0].getBoundingClientRect();"
        "return [c.width, c.height]", canvas)  # fmt: skip
    # Head 1 is the second square of the first row.
    tile = 3 * 8 + 6
    move = webdriver.ActionChains(at_home.driver).move_to_element_with_offset(
        canvas, int(-center[0] / 2 + tile + 4), int(-center[1] / 2 + 4)
    )
    move.click().perform()
    at_home.arrive("#/head/1")
    assert at_home.texts("h2")[0].startswith("Head 1 of 12")
    assert len(at_home.texts(".grid td .cell")) == 6 and len(at_home.texts(".grid th .cell")) == 5
    at_home.click(".grid a[href='#/latent/10']")
    at_home.arrive("#/latent/10")
    assert at_home.texts(".unit h3") == ["Latent 10"]
    assert at_home.driver.title.startswith("latent 10")
    at_home.click(".unit .title a.base")
    at_home.arrive("#/head/1/base/1")  # latent 10 = head 1, base 1, extension 1
    at_home.driver.back()
    at_home.arrive("#/latent/10")
    at_home.click("#home")
    at_home.arrive("#/")


def test_shows_the_examples_of_a_latent(at_home, made):
    post = made.stored.properties.post
    latent = int(np.argmax(post.top.scores[:, 0]))
    at_home.go(f"#/latent/{latent}")
    figures = [text for text in at_home.texts(".unit section:first-of-type .examples li > b")]
    peaks = post.top.scores[latent][np.isfinite(post.top.scores[latent])]
    assert float(figures[0]) == pytest.approx(peaks[0], rel=0.01)
    middle = post.top.tokens[latent, 0, WINDOW // 2]
    shown = at_home.texts(".unit .examples mark")[0]
    expected = EVIL[middle] if middle < len(EVIL) else f"word{middle}"
    assert shown == expected.replace("\u2028", "\ufffd").replace("\u202e", "\ufffd")
    assert at_home.texts(".bars h4") == [
        "Top tokens, by share of its activation",
        "Positive logits",
        "Negative logits",
    ]
    assert len(at_home.texts(".near li")) == 4
    assert "final_norm" in at_home.texts(".note")[0]


def test_characters_of_several_tokens(browser, tmp_path):
    """In the lines of examples, whole where the window holds them; bytes where a latent fires."""
    text = "你好😀 é\u202e"
    made = make_page(tmp_path, ids=byte_ids(text), tokenizer=ByteTokenizer())
    browser.open(made.page)
    lines, seen = [], 0
    for latent in np.flatnonzero(made.stored.properties.post.count)[:20]:
        browser.go(f"#/latent/{latent}")
        lines += browser.texts(".unit .examples code")
        for marked in browser.texts(".unit .examples mark, .unit .examples code span"):
            assert re.fullmatch("⟨[0-9A-F]{2}⟩|[你好😀é\ufffd.]| ?", marked)
            seen += marked != ""
    assert seen and lines
    whole = text.replace("\u202e", "\ufffd")
    for line in lines:
        inner = re.sub("⟨[0-9A-F]{2}(?: [0-9A-F]{2})*⟩", "", line).strip(".")
        assert inner and inner in 4 * whole
    assert browser.complaints() == []


def test_a_latent_that_never_fires(at_home, made):
    silent = int(np.flatnonzero(made.stored.properties.post.count == 0)[0])
    at_home.go(f"#/latent/{silent}")
    assert "It never fires" in at_home.texts(".unit")[0]


def test_keyboard(at_home):
    at_home.press("/")
    assert at_home.run("return document.activeElement.id") == "query"
    at_home.press("head 3", Keys.ENTER)
    at_home.arrive("#/head/3")
    at_home.click("main .grid a[href='#/latent/18']")
    at_home.arrive("#/latent/18")
    assert at_home.focused() == "#/latent/18"
    at_home.press(Keys.TAB)
    assert at_home.focused() == "#/latent/19"
    at_home.press(Keys.ENTER)
    at_home.arrive("#/latent/19")
    assert at_home.focused() == "#/latent/19"
    at_home.go("#/")
    at_home.run("document.querySelector('.wall canvas').focus()")
    at_home.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    at_home.until("location.hash.startsWith('#/head/')")


def strength(post, tokens, text, latent, token):
    """Mean activation on a token, less that on all."""
    everywhere = post.mean[latent] * post.count[latent] / tokens
    at = post.top_tokens[latent].tolist().index(token)
    share = post.top_shares[latent][at]
    there = share * everywhere * tokens / (text == token).sum()
    return min(there, post.top.scores[latent, 0]) - everywhere


def test_search_is_ranked_by_the_activation_on_what_is_typed(at_home, made):
    found = made.stored.properties
    at_home.go("#/find/word17")
    shown = at_home.texts("section:first-of-type .found > li > a")
    latents = np.flatnonzero((found.post.top_tokens == 17).any(1))
    strengths = {
        f"latent {f}": strength(found.post, found.tokens, found.text, f, 17) for f in latents
    }
    expected = sorted((f for f in strengths if strengths[f] > 0), key=lambda f: -strengths[f])
    assert shown == expected[: len(shown)] and shown
    # A text of two tokens, and the example in which a latent fires most on it.
    latent = int(np.argmax(found.post.count))
    tokens = found.post.top.tokens[latent, 0]
    middle = WINDOW // 2
    first, second = tokens[middle - 1], tokens[middle]
    if min(first, second) < len(EVIL):
        first, second = next((a, b) for a, b in itertools.pairwise(tokens) if min(a, b) > len(EVIL))
    at_home.go(f"#/find/word{first}%20word{second}")
    assert at_home.texts("main > p .chip") == [f"word{first}", f"word{second}"]
    at_home.until("/times in the text\\./.test(document.querySelector('[aria-live]').textContent)")
    values = [float(each.split()[0]) for each in at_home.texts(".texts > li > b")]
    assert values == sorted(values, reverse=True) and values
    at_home.go("#/find/word9")
    effects = made.stored.logits
    best = max(
        (effects.raised_by[f][slot], f)
        for f, slot in zip(*np.nonzero(effects.raised[:, :4] == 9), strict=True)
    )[1]
    [section] = at_home.run(
        "return [...document.querySelectorAll('section')]"
        ".filter((e) => e.querySelector('h2').textContent === 'Positive logits')"
    )
    assert section.find_element("css selector", "li a").text == f"latent {best}"


def test_search_as_one_types(at_home):
    at_home.press("/")
    at_home.press("word1")
    at_home.arrive("#/find/word1")
    at_home.press("7")
    at_home.arrive("#/find/word17")
    assert at_home.run("return document.activeElement.id") == "query"
    at_home.driver.back()  # one entry for all that was typed
    at_home.arrive("#/")
    # A number: its latent by Enter, or a word that there is none.
    at_home.run("document.getElementById('query').select()")
    at_home.press("71", Keys.ENTER)
    at_home.arrive("#/latent/71")
    at_home.run("document.getElementById('query').select()")
    at_home.press("72", Keys.ENTER)
    at_home.arrive("#/find/72")
    assert "There are latents 0 to 71 in heads 0 to 11." in at_home.texts("main > p")
    at_home.press(Keys.BACKSPACE, Keys.BACKSPACE)  # an empty field has no results
    at_home.arrive("#/")


def test_table_sorts_filters_and_is_moved_by_keys(at_home, made):
    post = made.stored.properties.post
    at_home.click("#to-table")
    at_home.arrive("#/latents")
    rows = ".latents tbody th"
    assert at_home.texts(rows)[:3] == ["0", "1", "2"]
    at_home.click(".latents .of-density button")
    at_home.click(".latents .of-density button")
    assert at_home.run("return location.hash") == "#/latents?sort=-density"
    sort = ".latents [aria-sort='descending']"
    assert at_home.texts(sort) == ["Density"] and len(at_home.texts("[aria-sort]")) == 1
    order = np.argsort(-post.count, kind="stable")
    assert at_home.texts(rows)[:5] == [str(f) for f in order[:5]]
    at_home.run("document.querySelector('.latents tbody a').focus()")
    at_home.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert at_home.focused() == f"#/latent/{order[2]}"
    at_home.press(Keys.END)
    assert at_home.focused() == f"#/latent/{order[-1]}"
    assert at_home.run("return document.activeElement.closest('tr').ariaRowIndex") == "73"
    at_home.press(Keys.ENTER)
    at_home.arrive(f"#/latent/{order[-1]}")
    at_home.driver.back()
    at_home.arrive("#/latents?sort=-density")
    at_home.go("#/latents?show=dead")
    dead = np.flatnonzero(post.count == 0)
    assert f"{len(dead)} of 72 latents" in at_home.texts("[role='status']")
    at_home.go("#/latents?from=10&to=20&head=2")
    assert at_home.texts(rows) == [str(f) for f in range(12, 18)]
    at_home.go("#/latents?text=word17")
    logits = made.stored.logits.raised[:, :4]
    holds = (post.top_tokens[:, :4] == 17).any(1) | (logits == 17).any(1)
    assert f"{holds.sum()} of 72 latents" in at_home.texts("[role='status']")


def test_more_context(at_home, made):
    latent = int(np.argmax(made.stored.properties.post.top.scores[:, 0]))
    at_home.go(f"#/latent/{latent}")
    first = ".unit .examples li:first-child "
    before = at_home.texts(f"{first}code")[0]
    at_home.click(f"{first}.more")
    after = at_home.texts(f"{first}code")[0]
    assert before in after and len(after) > len(before)
    button = "return document.querySelector('.more').ariaExpanded"
    assert at_home.run(button) == "true"
    at_home.click(f"{first}.more")
    assert at_home.texts(f"{first}code")[0] == before


def test_labels_are_shown_and_edited(browser, tmp_path):
    made = make_page(tmp_path)
    labels = {3: Label(EVIL[0], "a model", 0.9), 5: Label("the other one")}
    write_explorer(made.run, made.sae, made.stored, EvilTokenizer(), made.page, labels=labels)
    browser.screen(1200, 900)
    browser.open(made.page, "#/latent/3")
    assert browser.texts(".labelline .label") == [EVIL[0]]
    assert browser.texts(".labelline small") == ["by a model, detection 0.9"]
    browser.click(".labelline button")
    browser.press(" my own, ", Keys.ENTER)
    assert browser.texts(".labelline .label") == ["my own,"]
    assert browser.texts("#edits button") == ["Download labels.json"]
    saved = browser.run(
        "window.blobs = []; const own = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { window.blobs.push(blob); return own.call(URL, blob); };"
        "document.querySelector('#edits button').click();"
        "return window.blobs[0].text();"
    )
    (tmp_path / FILE).write_text(saved)
    kept = read_labels(tmp_path, made.sae.dict_size, None)
    assert kept == {3: Label("my own,"), 5: Label("the other one")}
    browser.open(made.page, "#/find/own")  # the page remembers what is not saved yet
    assert browser.texts(".found a")[0] == "latent 3"
    browser.go("#/latents?show=labelled&sort=label")
    assert browser.texts(".latents tbody .label") == ["my own,", "the other one"]
    browser.run("localStorage.clear()")
    assert browser.complaints() == []


def test_links_that_lead_nowhere(at_home):
    for address in ("#/latent/72", "#/latent/", "#/head/99", "#/head/1/base/2", "#/x", "#/find/%"):
        at_home.go(address)
        assert at_home.texts("h1") == ["Nothing there"]
    at_home.go("#/head/1/")
    assert at_home.texts("h2")[0].startswith("Head 1")


def test_tokens_stay_text(at_home, made):
    at_home.go("#/find/" + "%3C/script")
    chips = at_home.texts(".chip")
    assert any(EVIL[0] in chip for chip in chips)
    assert at_home.run("return document.images.length") == 0
    # Even an attack that got through the escaping would not run.
    at_home.run("const s = document.createElement('script'); s.textContent = 'window.pwned = 1';"
                "document.body.append(s)")  # fmt: skip
    assert at_home.run("return window.pwned") is None
    assert "Content Security Policy" in at_home.complaints()[0]


def test_a_report_runs_and_loads_nothing(browser, tmp_path):
    """Not even what got through the escaping; its own styles hold."""
    write_run(tmp_path, records(20))
    page = write_report(tmp_path, contexts=some_contexts())
    evil = (
        f"<script>window.pwned = 1</script><img src='{page.parent.as_uri()}/x.png' onerror='pwn'>"
    )
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</body>", f"{evil}</body>"), encoding="utf-8")
    browser.complaints()
    browser.driver.get(page.as_uri())
    browser.until("document.images.length === 1")
    assert browser.run("return window.pwned") is None
    complaints = browser.complaints()
    assert len(complaints) >= 2 and all("Content Security Policy" in each for each in complaints)
    shade = "return getComputedStyle(document.querySelector('mark')).backgroundColor"
    assert browser.run(shade).startswith("rgb")
    assert browser.run("return getComputedStyle(document.querySelector('main')).maxWidth") != "none"


@pytest.mark.parametrize("width", [390, 820, 1400])
def test_fits_every_screen(at_home, made, width):
    colors = []
    for dark in (False, True):
        at_home.screen(width, 900, dark)
        for address in ("#/", "#/latent/10", "#/head/1/base/0", "#/find/word", "#/latents"):
            at_home.open(made.page, address)
            wide = at_home.run("return document.documentElement.scrollWidth")
            assert wide <= width, address
        colors.append(at_home.run("return getComputedStyle(document.body).backgroundColor"))
    assert colors[0] != colors[1]


def test_a_dense_encoder(browser, tmp_path):
    made = make_page(tmp_path, "dense")
    browser.screen(1200, 900)
    browser.open(made.page)
    assert "150 latents" in browser.texts("main")[0]
    browser.go("#/head/2")
    assert browser.texts("h2")[0].startswith("Group 2 of 3")
    assert len(browser.texts(".grid .cell")) == 150 - 2 * 64
    browser.go("#/latent/3")
    assert browser.texts(".unit h3") == ["Latent 3"]
    browser.go("#/find/word")
    assert browser.complaints() == []


@pytest.mark.slow
def test_a_large_dictionary(browser, tmp_path):
    """2^17 latents: the first view within 3 s, then soon the last latent's and the table."""
    page = make_large_page(tmp_path)
    browser.screen(1400, 900)
    browser.open(page)
    [shown] = browser.run(
        "return performance.getEntriesByName('first-view').map((m) => m.startTime)"
    )
    assert shown < 3000
    assert "131,072 latents" in browser.texts("main")[0]
    started = time.monotonic()
    browser.go("#/latent/131071")
    assert browser.texts(".unit h3") == ["Latent 131071"]
    browser.go("#/latents?sort=-density")
    assert "131,072 of 131,072 latents" in browser.texts("[role='status']")
    assert len(browser.texts(".latents tbody tr")) < 100
    assert time.monotonic() - started < 6
    assert browser.complaints() == []
