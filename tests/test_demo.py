"""The demo page without a browser: what answers, the timeline, limits, messages; with gradio the page's handlers."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from videoxl import demo_gradio
from videoxl.demo_gradio import Limits, VideoChat, build_parser, clock, explain, load, timeline

BILEVEL = {"decode": "bilevel", "decode_chunk_groups": 1, "pool_size": 3}
LENGTH = 14


@pytest.fixture
def chat(model, tokenizer):
    model.config.sparse_attention = BILEVEL
    return VideoChat(model, tokenizer, Limits(max_num_frames=24, max_new_tokens=LENGTH))


def direct(chat, clip, question, history=None):
    """What `model.chat` says when it is given the file."""
    settings = {"max_num_frames": 24, "return_chunks": True, "generation_config": {"max_new_tokens": LENGTH}}
    return chat.model.chat(clip, chat.tokenizer, question, chat_history=history, **settings)


class Elements(HTMLParser):
    """Attributes of the elements of each class."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.found.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, name):
        return [element for element in self.found if name in element.get("class", "").split()]


def percent(element, name):
    return float(re.search(rf"\b{name}:([\d.]+)%", element["style"])[1])


def test_answers_stream_and_equal_chat(chat, clips):
    session = chat.encode(clips[0])
    *growing, reply = chat.ask(session, "What moves?")
    answer, history, chunks = direct(chat, clips[0], "What moves?")
    texts = [part.text for part in growing]
    assert len(set(texts)) > 2, "the answer came at once"
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert all(part.session is None for part in growing)
    assert texts[-1] == reply.text == answer
    assert reply.chunks == chunks and {"dense", "pooled"} == {chunk["level"] for chunk in chunks}

    # A follow-up question neither decodes nor encodes: it works when both are forbidden.
    follow_up = direct(chat, clips[0], "And then?", history)[0]
    alone = direct(chat, clips[0], "And then?")[0]
    assert follow_up != alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(chat.model), "prefill_frames", None)
        assert list(chat.ask(reply.session, "And then?"))[-1].text == follow_up
        assert list(chat.ask(reply.session, "And then?", remember=False))[-1].text == alone


def test_visitors_do_not_meet(chat, clips):
    before = set(vars(chat.model))
    mine, theirs = map(chat.encode, clips)
    mine = list(chat.ask(mine, "Please say: What moves?"))[-1].session
    theirs = list(chat.ask(theirs, "Please say: Which colour?"))[-1].session
    histories = [
        direct(chat, clip, text)[1]
        for clip, text in zip(clips, ("Please say: What moves?", "Please say: Which colour?"), strict=True)
    ]
    for session, clip, history in zip((mine, theirs), clips, histories, strict=True):
        assert list(chat.ask(session, "Why?"))[-1].text == direct(chat, clip, "Why?", history)[0]
    assert set(vars(chat.model)) == before


def test_a_stopped_answer_stops_generating(chat, clips):
    chat.limits = Limits(max_num_frames=24, max_new_tokens=5000)
    session, calls = chat.encode(clips[0]), []
    hook = chat.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        replies = chat.ask(session, "What moves?")
        next(replies)
        replies.close()
        assert 0 < len(calls) < 1000
    finally:
        hook.remove()


def test_what_cannot_be_done_is_said(chat, clips, tmp_path):
    session = chat.encode(clips[0])
    with pytest.raises(ValueError, match="question"):
        list(chat.ask(session, "  "))
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    with pytest.raises(ValueError) as error:
        chat.encode(str(text))
    message = explain(error.value, str(text))
    assert message.startswith("notes.mp4") and str(tmp_path) not in message
    with pytest.raises(FileNotFoundError):
        chat.encode(str(tmp_path / "gone.mp4"))
    chat.limits = Limits(max_minutes=0.1)
    with pytest.raises(ValueError, match="is 0:09 long; this page takes up to 0:06"):
        chat.encode(clips[0])


def test_times_in_the_answer(chat, clips, monkeypatch):
    session = chat.encode(clips[0])
    duration = session.video.duration
    answer = "At 2 seconds, from 0:03 to 0:05, in the last 4 seconds and at 2:00."
    monkeypatch.setattr(type(chat.model), "chat", lambda *_, streamer, **__: (streamer.end(), (answer, [], []))[1])
    assert list(chat.ask(session, "When?"))[-1].cited == [(2, 2), (3, 5), (duration - 4, duration)]


def test_timeline():
    levels = ["dense", "pooled", "dropped", "pooled", "dense"]
    scores = [0.1, 0.4, None, 0.0, 0.2]
    chunks = [
        {"video": 0, "index": index, "start": 10.0 * index, "end": 10.0 * index + 10, "level": level, "score": score}
        for index, (level, score) in enumerate(zip(levels, scores, strict=True))
    ]
    page = Elements(timeline(chunks, 50.0, [(14.0, 14.0), (20.0, 30.0)]))
    bars = page.of("chunk")
    assert [bar["class"].split()[1] for bar in bars] == levels
    assert [(percent(bar, "left"), percent(bar, "width")) for bar in bars] == [(20 * index, 20) for index in range(5)]
    assert bars[1]["title"] == "0:10 – 0:20: pooled, score 0.400" and bars[2]["title"] == "0:20 – 0:30: left out"
    heights = [percent(element, "height") for element in page.found if "height:" in element.get("style", "")]
    assert heights == [25, 100, 0, 0, 50]
    assert [(percent(mark, "left"), percent(mark, "width")) for mark in page.of("cite")] == [(28, 0), (40, 20)]
    buttons = [element for element in page.found if element.get("type") == "button"]
    assert [float(button["data-seconds"]) for button in buttons] == [14, 20, 0, 40]
    assert "5 chunks: 2 seen in full, 2 pooled, 1 left out" in timeline(chunks, 50.0)
    unscored = Elements(timeline([{**chunk, "score": None} for chunk in chunks], 50.0))
    assert len(unscored.of("chunk")) == 5 and not unscored.of("cite")


def test_clock():
    assert [clock(seconds) for seconds in (0, 9.96, 14.5, 75, 3600, 7325.25)] == [
        *("0:00", "0:10", "0:14.5", "1:15", "1:00:00", "2:02:05.2"),
    ]


@pytest.mark.parametrize("duration", [0.4, 7.9, 24, 61, 600, 3600, 40000])
def test_ticks_are_few_and_round(duration):
    chunk = {"video": 0, "index": 0, "start": 0.0, "end": duration, "level": "dense", "score": None}
    ticks = re.search(r'<div class="ticks">(.*?)</div>', timeline([chunk], duration))[1]
    assert 1 <= ticks.count("<span") <= demo_gradio.MAX_TICKS + 1


def test_the_folder_of_the_file_is_the_default_model(root):
    chat = load(build_parser().parse_args(["--decode-chunk-groups", "2"]))
    sparse = chat.model.config.resolve_sparse_attention()
    assert (sparse.decode, sparse.decode_chunk_groups, sparse.prefill) == ("bilevel", 2, "full")
    assert chat.limits == Limits()


def test_without_gradio_it_says_what_to_install(root):
    script = "import sys; sys.modules['gradio'] = None; import demo_gradio; demo_gradio.main([])"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == 'error: the page needs gradio: pip install "gradio>=6"'


def test_versions_agree(root):
    pins = (root / "requirements-demo.txt").read_text()
    for name in ("torch", "transformers", "av", "numpy", "huggingface_hub"):
        pin = re.search(rf"^{name}==(.+)$", pins, re.MULTILINE)
        assert pin and pin[0] in (root / "requirements.txt").read_text().splitlines()
    assert f"sdk_version: {re.search('^gradio==(.+)$', pins, re.MULTILINE)[1]}\n" in demo_gradio.__doc__
    assert 'demo = ["gradio>=6"]' in (root / "pyproject.toml").read_text()


def test_handlers_of_the_page(chat, clips, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: make test-browser runs this")
    page = demo_gradio.build_page(chat, "Model: <tiny>.")
    handlers = {function.fn.__name__: function.fn for function in page.fns.values() if function.fn}
    take_video, answer = handlers["take_video"], handlers["answer"]
    assert "Model: &lt;tiny&gt;." in str(page.config)

    *_, (session, facts, *_, problem, question) = take_video(clips[0])
    assert (
        f"0:09 long, {session.video.num_frames} frames read" in facts and question.interactive and not problem.visible
    )
    states = list(answer(session, "What moves?", [], True, clips[0]))
    after, messages, seen, *_ = states[-1]
    expected, _, chunks = direct(chat, clips[0], "What moves?")
    assert messages == [{"role": "user", "content": "What moves?"}, {"role": "assistant", "content": expected}]
    assert len(states) > 4 and len(Elements(seen).of("chunk")) == len(chunks)
    assert after.video is session.video and session.history is None and after.history

    # What goes wrong is said on the page; the conversation stays as it was.
    *_, (kept, kept_messages, _, problem, _) = answer(after, " ", messages, True, clips[0])
    assert kept is after and kept_messages == messages and problem.visible and "question" in problem.value
    *_, (nothing, _, _, problem, _) = answer(None, "What?", [], True, None)
    assert nothing is None and "upload" in problem.value
    file = tmp_path / "<b>.mp4"
    file.write_text("no video")
    *_, (nothing, facts, *_) = take_video(str(file))
    assert nothing is None and "&lt;b&gt;.mp4" in facts and "error" in facts
    assert list(take_video(None))[-1][0] is None
