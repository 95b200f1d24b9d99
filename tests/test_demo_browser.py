"""The demo page as visitors use it: a server of its own, and Debian's Chromium, driven through selenium.

The picture in the README is taken here: `make screenshot` (SCREENSHOT says where it goes). CLICKED names a file that
gets a line for everything that `test_everything_can_be_clicked` clicks.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image
from videoxl.demo.page import EXAMPLES

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Seconds until something must have happened, on a machine that is busy.
PATIENCE = 120
LENGTH = 40
QUESTION = "#question textarea:not([disabled])"
DESKTOP, PHONE = (1160, 1000), (390, 844)
POSITION = "return document.querySelector('#clip video').currentTime"
# What can be clicked, as a list of names; the one that is asked for is the returned element.
CLICKABLE = """
const all = [...document.querySelectorAll(
  "button, [role=button], summary, [data-seconds], input[type=checkbox], a[href]")];
const seen = all.filter(e => !e.disabled && e.checkVisibility() && e.getBoundingClientRect().width > 0);
const named = {};
for (const e of seen) {
  const words = e.getAttribute("aria-label") || e.innerText.trim() || e.title || e.type || e.className;
  const place = e.closest("[id]:not([id^=html-])");
  let name = (place ? "#" + place.id + " " : "") + words, again = 1;
  while (name in named) name = name.replace(/( \\(\\d+\\))?$/, ` (${++again})`);
  named[name] = e;
}
return arguments[0] === undefined ? Object.keys(named) : named[arguments[0]];
"""
# [contrast, colour, what is behind it, text] of every text and placeholder, the lowest contrast first.
CONTRASTS = """
const probe = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgba = color => {
  probe.clearRect(0, 0, 1, 1); probe.fillStyle = color; probe.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = probe.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
};
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const light = color => {
  const [r, g, b] = color.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const page = rgba(getComputedStyle(document.body).backgroundColor);
const behind = e => {
  const layers = [];
  for (; e; e = e.parentElement) layers.unshift(rgba(getComputedStyle(e).backgroundColor));
  return layers.reduce((under, top) => over(top, under), over(page, [255, 255, 255, 1]));
};
const found = [];
const measure = (e, style, text) => {
  let opacity = 1;
  for (let p = e; p; p = p.parentElement) opacity *= Number(getComputedStyle(p).opacity);
  if (opacity === 0) return;
  const back = behind(e), color = rgba(style.color);
  color[3] *= opacity;
  const front = over(color, back), [a, b] = [light(front), light(back)].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), front.slice(0, 3), back.slice(0, 3), text]);
};
for (const e of document.querySelectorAll("body *")) {
  if (!e.checkVisibility({visibilityProperty: true}) || e.closest("[disabled], svg, video, script, style")) continue;
  if (e.classList.contains("sr-only") || e.closest(".sr-only, .hide, .hidden")) continue;
  const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join(" ").trim();
  if (text && e.getBoundingClientRect().width > 1) measure(e, getComputedStyle(e), text);
  if (e.placeholder && !e.value) measure(e, getComputedStyle(e, "::placeholder"), e.placeholder);
}
return found.sort((a, b) => a[0] - b[0]);
"""
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
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make test-browser does")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        f"window-size={DESKTOP[0]},{DESKTOP[1]}",
        f"user-data-dir={tmp_path / 'browser'}",
    ):
        options.add_argument(f"--{argument}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Visitor(driver)
    driver.quit()


@pytest.fixture
def checkpoint(model, tokenizer, processor, tmp_path):
    """A folder with random weights: their answers are long, and hang on everything."""
    return saved(model, tokenizer, processor, tmp_path / "checkpoint")


def saved(model, tokenizer, processor, folder):
    model.config.sparse_attention = {"decode_chunk_groups": 1}
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


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

    def visit(self, address, size=DESKTOP, theme="light"):
        self.resize(*size)
        self.driver.get(f"{address}?__theme={theme}")
        self.wait(lambda: self.find("#clip input[type=file]"), "the page")

    def upload(self, path):
        self.wait(lambda: self.find("#clip input[type=file]"), "the page")[0].send_keys(str(path))

    def click(self, element):
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def hover(self, selector):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(self.find(selector)[0]).perform()
        time.sleep(1)

    def ask(self, text):
        """Asks, waits for the end of the answer; returns every text that it had."""
        field = self.wait(lambda: self.find(QUESTION), "a field for the question")[0]
        self.js(WATCH, len(self.find("#talk [data-testid=bot]")))
        field.send_keys(text)
        self.click(self.wait(lambda: self.find("#question .submit-button"), "the button")[0])
        # The field is emptied when the answer is complete.
        self.wait(lambda: self.js("return window.texts.length") and not field.get_property("value"), "an answer")
        return self.js("return window.texts")

    def settled(self):
        """Waits until nothing is under way."""

        def calm():
            field = self.find("#question textarea")
            return (
                field
                and not self.find("#question .stop-button, #facts [data-testid=status-tracker]:not(.hide)")
                and "Reading" not in self.text("#facts")
                and (not field[0].is_enabled() or not field[0].get_property("value"))
            )

        self.wait(calm, "the end of what was under way")
        time.sleep(0.3)
        self.wait(calm, "the end of what was under way")

    def resize(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def picture(self):
        """The whole page."""
        width, height = self.js("return [window.innerWidth, document.documentElement.scrollHeight]")
        self.resize(width, height)
        self.js("document.activeElement.blur()")
        time.sleep(1)  # for pictures that fade in
        return Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")


def test_a_visit(browser, checkpoint, model, tokenizer, root, tmp_path):
    clip = root / "assets" / "demo.mp4"
    model.config.sparse_attention = {"decode": "bilevel", "decode_chunk_groups": 2}
    settings = {"return_chunks": True, "generation_config": {"max_new_tokens": LENGTH}}
    first, second = "What happens?", "And at 0:09?"
    answer, history, chunks = model.chat(str(clip), tokenizer, first, **settings)
    arguments = ["--model", str(checkpoint), "--decode-chunk-groups", "2", "--max-new-tokens", str(LENGTH)]
    with served(root, tmp_path, tmp_path / "log", *arguments) as address:
        browser.visit(address)
        assert "toy world" not in browser.text("#head"), "this is another model"
        browser.upload(clip)
        browser.wait(lambda: "0:24 long; 96 pictures of it were read" in browser.text("#facts"), "the facts")

        texts = browser.ask(first)
        assert texts[-1] == answer
        assert len(texts) > 2 and all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
        bars = browser.wait(lambda: browser.find("#seen .chunk"), "the timeline")
        assert [bar.get_attribute("class").split()[1] for bar in bars] == [chunk["level"] for chunk in chunks]
        assert [float(bar.get_attribute("data-seconds")) for bar in bars] == [chunk["start"] for chunk in chunks]

        # A bar of the timeline shows its time in the video.
        browser.click(bars[6])
        browser.wait(lambda: browser.js(POSITION) == 12, "a seek")

        answer, _, chunks = model.chat(None, tokenizer, second, chat_history=history, **settings)
        assert browser.ask(second)[-1] == answer
        assert chunks[4]["level"] == "dense", "the question names its time"
        browser.wait(lambda: "dense" in browser.find("#seen .chunk")[4].get_attribute("class"), "the timeline")

        for width in (360, 390, 800, 1160):
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
        browser.visit(address)
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


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize(
    "member", ["videoxl2", "videoxl1", "videoxlpro", "videoxlpro_march", "videochatflash", "videochatflash_dropping"]
)
def test_everything_can_be_clicked(
    browser, member, size, random_model, family_models, tokenizer, processor, root, tmp_path
):
    """What takes something away comes last; after each click the page works on, and nothing has failed."""
    folder = saved(family_models.get(member, random_model), tokenizer, processor, tmp_path / member)
    log = tmp_path / "log"
    with served(root, tmp_path, log, "--model", str(folder), "--max-new-tokens", "8") as address:
        browser.visit(address, size)
        browser.upload(root / "assets" / "demo.mp4")
        browser.wait(lambda: "Ready" in browser.text("#facts"), "the facts")
        browser.ask("What happens at 0:09?")
        clicked, last = [], ["#talk Clear", "#clip Clear"]
        for removing in (last, last[1:], []):
            while waiting := [name for name in browser.js(CLICKABLE) if name not in [*clicked, *removing]]:
                element = browser.js(CLICKABLE, waiting[0])
                clicked.append(waiting[0])
                seconds = element.get_attribute("data-seconds")
                if waiting[0].endswith(" Ask"):
                    browser.find(QUESTION)[0].send_keys("And then?")
                browser.click(element)
                if seconds:
                    browser.wait(lambda at=float(seconds): abs(browser.js(POSITION) - at) < 0.1, f"second {seconds}")
                    continue
                browser.settled()
                assert not browser.find(".error, .toast-body"), (waiting[0], browser.text("body"))
                assert "Traceback" not in log.read_text(), (waiting[0], log.read_text()[-3000:])
        # After all that: another visit to the same page, whose file is opened.
        (kept,) = (tmp_path / "downloads").glob("*.videoxl")
        assert len(browser.find("#talk [data-testid=bot]")) == 0
        browser.find("#files input[type=file]")[0].send_keys(str(kept))
        browser.wait(lambda: "Ready" in browser.text("#facts"), "the facts of the saved video")
        assert browser.ask("What happens?")[-1]
    for expected in [*(question for question, _ in EXAMPLES), "Save for later", "Download", "Open a saved one",
                     "#clip Clear", "#talk Clear", "#remember", "Ask"]:  # fmt: skip
        assert any(expected in name for name in clicked), (expected, clicked)
    bars = [name for name in clicked if "seen closely" in name or "seen in summary" in name]
    assert len(bars) >= 20 or member != "videoxl2"
    if file := os.environ.get("CLICKED"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.writelines(f"{member}, {size[0]} px: {name}\n" for name in clicked)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_text_can_be_read(browser, root, tmp_path, size, theme):
    with served(root, tmp_path, tmp_path / "log") as address:
        browser.visit(address, size, theme)
        lowest = [browser.js(CONTRASTS)]
        browser.find(".example")[1].click()  # a question whose answer is a time
        browser.wait(lambda: browser.find("#seen .timeline"), "the timeline")
        browser.settled()
        browser.hover("#clip video")  # whose controls come then
        lowest.append(browser.js(CONTRASTS))
        assert any("/ 0:24" in text for *_, text in lowest[-1])
        (tmp_path / "notes.mp4").write_text("no video")
        browser.find("#clip button[aria-label='Clear']")[0].click()
        browser.settled()
        browser.upload(tmp_path / "notes.mp4")
        browser.wait(lambda: "notes.mp4" in browser.text("#facts .error"), "an error")
        time.sleep(1.5)  # for what fades in
        lowest.append(browser.js(CONTRASTS))
    if file := os.environ.get("CLICKED"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.writelines(f"{size[0]} px, {theme}: {each[0][0]:.2f}:1 {each[0][3]}\n" for each in lowest)
    for measured, least in zip(lowest, (10, 20, 10), strict=True):
        assert len(measured) >= least, measured
        assert measured[0][0] >= 4.5, [entry for entry in measured if entry[0] < 4.5]


def test_the_bar_of_a_video_that_is_read_lies_over_nothing(browser, checkpoint, clips, root, tmp_path):
    overlap = """
    const bar = document.querySelector("#facts .progress-bar-wrap").getBoundingClientRect();
    return [...document.querySelectorAll("#clip, #facts .note, #seen, #files button, #talk, #question")].filter(e => {
      const r = e.getBoundingClientRect();
      return r.width && r.left < bar.right && bar.left < r.right && r.top < bar.bottom && bar.top < r.bottom;
    }).map(e => e.id + e.className);
    """
    arguments = ["--model", str(checkpoint), "--max-num-frames", "4000"]
    import av

    with av.open(str(tmp_path / "long.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(3600):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([shade % 255]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with served(root, tmp_path, tmp_path / "log", *arguments) as address:
        for size in (PHONE, DESKTOP):
            browser.visit(address, size)
            browser.upload(tmp_path / "long.mp4")
            browser.wait(lambda: browser.find("#facts .progress-bar-wrap"), "the bar")
            assert browser.js(overlap) == []
            browser.wait(lambda: "30:00 long" in browser.text("#facts"), "the facts")
        # A long video has few bars, and a strip of all of them to scroll in; the page stays as wide as the window.
        browser.resize(*PHONE)
        browser.ask("What happens at 3:00?")
        for fold in browser.find("#seen summary"):
            browser.click(fold)
        widths = browser.js(
            "return [...document.querySelectorAll('#seen .chunk')].map(e => e.getBoundingClientRect().width)"
        )
        assert len(widths) > 400 and min(widths) >= 4
        assert browser.js("return document.documentElement.scrollWidth") <= PHONE[0]


def test_nobody_reads_this_machines_files(checkpoint, root, tmp_path):
    """The queue of the page is asked directly, as no browser would."""
    httpx = pytest.importorskip("httpx", reason="httpx comes with gradio, which is not installed")
    (tmp_path / "private.mp4").write_bytes((root / "assets" / "demo.mp4").read_bytes())
    with served(root, tmp_path, tmp_path / "log", "--model", str(checkpoint)) as address:
        config = httpx.get(f"{address}/config").json()
        clip = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "clip")
        taking = next(each["id"] for each in config["dependencies"] if [clip, "upload"] in each["targets"])
        for number, path in enumerate(
            (str(tmp_path / "private.mp4"), "private.mp4", f"file://{tmp_path}/private.mp4", f"{address}/config")
        ):
            asked = {
                "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}],
                "fn_index": taking,
                "session_hash": f"session{number}",
            }
            joined = httpx.post(f"{address}/gradio_api/queue/join", json=asked)
            said = joined.text
            if joined.status_code == 200:
                with httpx.stream(
                    "GET", f"{address}/gradio_api/queue/data?session_hash=session{number}", timeout=PATIENCE
                ) as stream:
                    for line in stream.iter_lines():
                        said += line
                        if '"process_completed"' in line:
                            assert json.loads(line.removeprefix("data: "))["success"] is False or "error" in line
                            break
            assert "Ready" not in said and "0:24" not in said, said
        assert httpx.get(f"{address}/gradio_api/file={tmp_path}/private.mp4").status_code in (403, 404)


def test_picture_of_the_bundled_checkpoint(browser, root, tmp_path):
    """One click loads the clip and asks; the picture in the README shows what comes then."""
    with served(root, tmp_path, tmp_path / "log") as address:
        for size in (PHONE, DESKTOP):
            browser.visit(address, size)
            assert "toy world" in browser.text("#head")
            for number, (question, right) in enumerate(EXAMPLES, 1):
                button = next(each for each in browser.find(".example") if each.text == question)
                browser.click(button)
                answers = browser.wait(
                    lambda number=number: browser.find("#talk [data-testid=bot]")[number - 1 :], "an answer"
                )
                browser.settled()
                assert answers[-1].text == right
                # The page is as before: the field is there, and empty, and its button too.
                assert browser.find(QUESTION)[0].get_property("value") == ""
                assert browser.find("#question .submit-button")
            assert browser.js(POSITION) > 0, "an empty scene"
        browser.visit(address, DESKTOP)
        browser.find(".example")[1].click()
        bars = browser.wait(lambda: browser.find("#seen .chunk"), "the timeline")
        assert len(bars) == 24 and len(browser.find("#seen .cite")) == 1
        browser.settled()
        browser.click(browser.find("#seen .cite")[0])
        browser.wait(lambda: browser.js(POSITION) == 16, "a seek")
        browser.click(bars[14])  # something is to be seen then
        picture = browser.picture()
    assert picture.width == DESKTOP[0] and 700 < picture.height < 1400
    # 128 colours do for a page, and make the file small.
    target = os.environ.get("SCREENSHOT") or tmp_path / "page.png"
    picture.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    assert os.path.getsize(target) < 150_000
