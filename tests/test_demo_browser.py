"""The demo page as visitors use it: a server of its own, and Debian's Chromium, driven through selenium.

The picture in the README is taken here: `make screenshot` (SCREENSHOT says where it goes).
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Seconds until something must have happened, on a machine that is busy.
PATIENCE = 120
LENGTH = 40
QUESTION = "#question textarea:not([disabled])"
# Every text that the newest answer had, in a list that the test reads afterwards.
WATCH = """
window.texts = [];
new MutationObserver(() => {
  const answers = document.querySelectorAll("#talk [data-testid=bot] .message-content");
  const text = answers.length ? answers[answers.length - 1].textContent : "";
  if (answers.length > arguments[0] && text !== window.texts.at(-1)) window.texts.push(text);
}).observe(document.querySelector("#talk"), {subtree: true, childList: true, characterData: true});
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not here: make test-browser"),
]


@contextlib.contextmanager
def served(root, folder, log, *arguments):
    """The page in a process of its own; gives its address."""
    pytest.importorskip("gradio", reason="gradio is not installed: make test-browser installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "videoxl.demo", "--port", str(port), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            until = time.monotonic() + PATIENCE
            while True:
                assert server.poll() is None and time.monotonic() < until, log.read_text()
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make test-browser does")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        "window-size=1160,1000",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Visitor(driver)
    driver.quit()


@pytest.fixture
def checkpoint(model, tokenizer, processor, tmp_path):
    """A folder with random weights: their answers are long, and hang on everything."""
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


class Visitor:
    """What a visitor does on the page, and waits for."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return " ".join(element.text for element in self.find(selector))

    def js(self, script, *values):
        return self.driver.execute_script(script, *values)

    def wait(self, condition, what):
        until = time.monotonic() + PATIENCE
        while not (result := condition()):
            assert time.monotonic() < until, f"never came: {what}; the page says {self.text('body')}"
            time.sleep(0.1)
        return result

    def upload(self, path):
        self.wait(lambda: self.find("#clip input[type=file]"), "the page")[0].send_keys(str(path))

    def ask(self, text):
        """Asks, waits for the end of the answer; returns every text that it had."""
        field = self.wait(lambda: self.find(QUESTION), "a field for the question")[0]
        self.js(WATCH, len(self.find("#talk [data-testid=bot]")))
        field.send_keys(text)
        self.wait(lambda: self.find("#question .submit-button"), "the button")[0].click()
        # The field is emptied when the answer is complete.
        self.wait(lambda: self.js("return window.texts.length") and not field.get_property("value"), "an answer")
        return self.js("return window.texts")

    def resize(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def test_a_visit(browser, checkpoint, model, tokenizer, root, tmp_path):
    clip = root / "assets" / "demo.mp4"
    model.config.sparse_attention = {"decode": "bilevel", "decode_chunk_groups": 2}
    settings = {"return_chunks": True, "generation_config": {"max_new_tokens": LENGTH}}
    first, second = "What happens?", "And at 0:09?"
    answer, history, chunks = model.chat(str(clip), tokenizer, first, **settings)
    arguments = ["--model", str(checkpoint), "--decode-chunk-groups", "2", "--max-new-tokens", str(LENGTH)]
    with served(root, tmp_path, tmp_path / "log", *arguments) as address:
        browser.driver.get(address)
        browser.upload(clip)
        browser.wait(lambda: "0:24 long, 96 frames read" in browser.text("#facts"), "the facts")

        texts = browser.ask(first)
        assert texts[-1] == answer
        assert len(texts) > 2 and all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
        bars = browser.wait(lambda: browser.find("#seen .chunk"), "the timeline")
        assert [bar.get_attribute("class").split()[1] for bar in bars] == [chunk["level"] for chunk in chunks]
        assert [float(bar.get_attribute("data-seconds")) for bar in bars] == [chunk["start"] for chunk in chunks]
        scores = [float(score.text) for score in browser.find("#seen .reloaded button span")]
        assert scores == [round(chunk["score"], 3) for chunk in chunks if chunk["level"] == "dense"]

        # A bar of the timeline shows its time in the video.
        bars[6].click()
        browser.wait(lambda: browser.js("return document.querySelector('#clip video').currentTime") == 12, "a seek")

        answer, _, chunks = model.chat(None, tokenizer, second, chat_history=history, **settings)
        assert browser.ask(second)[-1] == answer
        assert chunks[4]["level"] == "dense", "the question names its time"
        browser.wait(lambda: "dense" in browser.find("#seen .chunk")[4].get_attribute("class"), "the timeline")

        for width in (360, 800, 1160):
            browser.resize(width, 1000)
            time.sleep(0.5)
            assert browser.js("return document.documentElement.scrollWidth") <= width, (
                "the page is wider than its window"
            )

        # What cannot be read is said, without saying where this machine keeps it; the old video is gone.
        (tmp_path / "notes.mp4").write_text("no video")
        browser.find("#clip button[aria-label='Clear']")[0].click()
        browser.wait(lambda: not browser.text("#facts") and not browser.find("#seen .chunk"), "an empty page")
        browser.upload(tmp_path / "notes.mp4")
        browser.wait(lambda: "notes.mp4" in browser.text("#facts .error"), "an error")
        assert "/" not in browser.text("#facts .error").split("notes.mp4")[0]
        assert not browser.find(QUESTION)


def test_an_answer_can_be_stopped(browser, checkpoint, root, tmp_path):
    def shown():
        return [len(element.text) for element in browser.find("#talk [data-testid=bot]")]

    with served(root, tmp_path, tmp_path / "log", "--model", str(checkpoint), "--max-new-tokens", "20000") as address:
        browser.driver.get(address)
        browser.upload(root / "assets" / "demo.mp4")
        field = browser.wait(lambda: browser.find(QUESTION), "a field for the question")[0]
        field.send_keys("What happens?\n")
        browser.wait(lambda: sum(shown()) > 20, "the beginning of an answer")
        browser.wait(lambda: browser.find("#question .stop-button"), "a way to stop it")[0].click()
        browser.wait(lambda: browser.find("#question .submit-button"), "a way to ask again")
        # The model does one thing at a time: it answers the next question only if it was really stopped.
        before = shown()
        field.send_keys(" And then?\n")
        browser.wait(lambda: len(shown()) == 2 and shown()[1] > 20, "the beginning of another answer")
        assert shown()[0] <= before[0] + 50, "the stopped answer went on"


def test_picture_of_the_bundled_checkpoint(browser, bundled_model, tokenizer, root, tmp_path):
    bundled_model.config.sparse_attention = {"decode": "bilevel", "decode_chunk_groups": 1}
    clip, question = root / "assets" / "demo.mp4", "When does the triangle first appear?"
    answer = bundled_model.chat(str(clip), tokenizer, question, return_history=False)
    with served(root, tmp_path, tmp_path / "log") as address:
        browser.driver.get(address)
        browser.wait(lambda: browser.find("#example"), "the page")[0].click()
        browser.wait(lambda: "encoded into" in browser.text("#facts"), "the facts")
        assert browser.ask(question)[-1] == answer
        bars = browser.wait(lambda: browser.find("#seen .chunk"), "the timeline")
        assert len(bars) == 24
        bars[14].click()  # something is to be seen then
        browser.wait(lambda: browser.js("return document.querySelector('#clip video').currentTime") == 14, "a seek")
        browser.resize(
            1160, round(browser.js("return document.querySelector('#seen').getBoundingClientRect().bottom")) + 24
        )
        browser.js("document.activeElement.blur()")
        time.sleep(1)  # for pictures that fade in
        picture = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
    assert picture.width == 1160 and 700 < picture.height < 1400
    # 128 colours do for a page, and make the file small.
    target = os.environ.get("SCREENSHOT") or tmp_path / "page.png"
    picture.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    assert os.path.getsize(target) < 150_000
