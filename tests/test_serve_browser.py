"""The served page in a real browser: a text is typed, a feature changed, a label saved."""

import json
import threading

import pytest
from explorer_pages import EvilTokenizer, make_page
from test_explore_browser import Browser, pytestmark  # noqa: F401  # skips without a browser
from test_features import TEXTS, folder, lm, make, sae  # noqa: F401  # fixtures

from kronsae.explore.content import make_content
from kronsae.explore.serve import Answers, bound, serve
from kronsae.explore.write import render


@pytest.fixture(scope="module")
def served(lm, tmp_path_factory):  # noqa: F811
    """Address and labels.json of a page of other latents, with the tiny model behind it."""
    pytest.importorskip("uvicorn")
    root = tmp_path_factory.mktemp("served")
    made = make_page(root)
    content = make_content(made.run, made.sae, made.stored, EvilTokenizer())
    content["facts"] |= {"served": True, "mostTokens": 200, "longestText": 128}
    said: list[str] = []
    there = threading.Event()

    def say(text):
        said.append(text)
        there.set()

    answers = Answers(lm, {}, root / "labels.json")
    with bound("127.0.0.1", 0) as door:
        arguments = (render(content, connect="'self'"), answers, door, say)
        threading.Thread(target=serve, args=arguments, daemon=True).start()
        assert there.wait(60)
        yield said[0].splitlines()[-1], root / "labels.json"


def test_ask_steer_ablate_and_label(served, lm, tmp_path):  # noqa: F811
    address, file = served
    features = lm.features(TEXTS[0])
    browser = Browser(tmp_path)
    try:
        browser.driver.get(address)
        browser.until("document.body.dataset.ready !== undefined")
        assert "token" not in browser.run("return location.href")
        browser.run("location.hash = '#/ask'")
        browser.until("document.querySelector('textarea')")
        browser.run(
            "const text = document.querySelector('textarea'); text.value = arguments[0];"
            "text.dispatchEvent(new Event('input')); text.form.requestSubmit()",
            TEXTS[0],
        )
        browser.until("document.querySelector('.asked button')")
        shown = browser.run(
            "return [...document.querySelectorAll('.asked button')].map((b) => b.textContent)"
        )
        assert [text.strip() for text in shown] == [text.strip() for text in features.tokens]
        first = browser.run("return document.querySelector('.answers tbody a').textContent")
        assert first == f"latent {features.strongest(1).index[0]}"
        # A token's own features.
        browser.run("document.querySelectorAll('.asked button')[2].click()")
        token = features.strongest(1, token=2).index[0]
        browser.until(
            f"document.querySelector('.answers tbody a').textContent === 'latent {token}'"
        )
        # Steer the first, and generate.
        browser.run("document.querySelector('.answers [aria-label^=Change]').click()")
        browser.run(
            "const box = document.querySelector('.edit input'); box.value = '500';"
            "box.dispatchEvent(new Event('input'));"
            "document.querySelectorAll('form.ask')[1].requestSubmit()"
        )
        browser.until("document.querySelector('.beside')")
        shown = browser.texts(".beside pre")
        plain, steered = (text.removeprefix(TEXTS[0]) for text in shown)
        assert plain == lm.generate(TEXTS[0], 40)
        with lm.steer({int(token): 500.0}):
            assert steered == lm.generate(TEXTS[0], 40)
        # Ablate it; an error of the server is said.
        browser.run("document.querySelectorAll('form.ask')[2].requestSubmit()")
        browser.until("document.querySelectorAll('.next').length === 6")
        browser.run(
            "const text = document.querySelector('textarea'); text.value = 'w1 '.repeat(200);"
            "text.form.requestSubmit()"
        )
        browser.until("document.querySelector('.ask .status').textContent.includes('at most')")
        # A label is kept on the disk.
        browser.run("location.hash = '#/latent/3'")
        browser.until("document.querySelector('.labelline button')")
        browser.run(
            "document.querySelector('.labelline button').click();"
            "document.querySelector('.labelline input').value = '<b>names';"
            "document.querySelector('.labelline form').requestSubmit()"
        )
        browser.until("document.querySelector('.labelline .label')")
        browser.run("location.reload()")
        browser.until("document.querySelector('.labelline .label')?.textContent === '<b>names'")
        assert json.loads(file.read_text())["labels"] == {"3": {"text": "<b>names"}}
        assert browser.run("return document.querySelector('#edits').textContent") == ""
        log = browser.driver.get_log("browser")
        assert all("400" in entry["message"] for entry in log), log  # the text that was too long
    finally:
        browser.driver.quit()
