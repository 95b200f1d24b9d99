"""The demo page without a browser: what answers, the timeline, limits, messages; with gradio the page's handlers."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from videoxl.demo import page as demo_page
from videoxl.demo.answers import Limits, VideoChat, explain
from videoxl.demo.page import EXAMPLES, Visits, build_parser, load, use_bilevel
from videoxl.demo.saved import SavedVideos, read_header
from videoxl.demo.timeline import MAX_BARS, MAX_CHIPS, MAX_TICKS, clock, timeline

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
        patch.setattr(type(chat.model.model), "get_video_features", None)
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


def chunks_of(levels, scores, seconds=10.0):
    return [
        {"video": 0, "index": index, "start": seconds * index, "end": seconds * (index + 1), "level": level,
         "score": score}
        for index, (level, score) in enumerate(zip(levels, scores, strict=True))
    ]  # fmt: skip


def test_timeline():
    levels = ["dense", "pooled", "dropped", "pooled", "dense"]
    chunks = chunks_of(levels, [0.1, 0.4, None, 0.0, 0.2])
    page = Elements(timeline(chunks, 50.0, [(14.0, 14.0), (20.0, 30.0)]))
    bars = page.of("chunk")
    assert [bar["class"].split()[1] for bar in bars] == levels
    assert [(percent(bar, "left"), percent(bar, "width")) for bar in bars] == [(20 * index, 20) for index in range(5)]
    assert bars[1]["title"] == "0:10 – 0:20: seen in summary" and bars[2]["title"] == "0:20 – 0:30: left out"
    heights = [percent(element, "height") for element in page.found if "height:" in element.get("style", "")]
    assert heights == [25, 100, 0, 0, 50]
    assert [(percent(mark, "left"), percent(mark, "width")) for mark in page.of("cite")] == [(28, 0), (40, 20)]
    buttons = [element for element in page.found if element.get("type") == "button"]
    # Times of the answer, then what was seen closely: what fits best first.
    assert [float(button["data-seconds"]) for button in buttons] == [14, 20, 40, 0]
    text = timeline(chunks, 50.0)
    assert "40 % of the video was looked at closely" in text and "details" not in text
    for jargon in ("chunk", "pooled", "dense", "score"):
        assert jargon not in re.sub(r"<[^>]*>", "", text)


def test_a_model_that_chooses_nothing_has_no_bars():
    text = timeline(chunks_of(["dense"] * 5, [None] * 5), 50.0, [(14.0, 14.0)])
    page = Elements(text)
    assert not page.of("chunk") and len(page.of("cite")) == 1 and "the whole video" in text


def test_a_long_video_has_few_bars_and_all_of_them_where_one_zooms_in():
    levels = ["dense" if number % 10 == 3 else "pooled" for number in range(300)]
    page = Elements(timeline(chunks_of(levels, [number / 300 for number in range(300)], 4.0), 1200.0))
    bars, zoomed = page.of("chunk")[:MAX_BARS], page.of("chunk")[MAX_BARS:]
    assert len(zoomed) == 300 and [bar["class"].split()[1] for bar in zoomed] == levels
    # Five to a bar: one that holds a part that was seen closely shows it.
    assert [bar["class"].split()[1] for bar in bars] == ["dense", "pooled"] * 30
    assert bars[0]["title"] == "0:00 – 0:20: 1 of 5 parts seen closely"
    buttons = [element for element in page.found if element.get("type") == "button"]
    assert float(buttons[0]["data-seconds"]) == 4 * 293 and len(buttons) == 30
    text = timeline(chunks_of(levels, [0.1] * 300, 4.0), 1200.0)
    assert f"<summary>{30 - MAX_CHIPS} more</summary>" in text


def test_clock():
    assert [clock(seconds) for seconds in (0, 9.96, 14.5, 75, 3600, 7325.25)] == [
        *("0:00", "0:10", "0:14.5", "1:15", "1:00:00", "2:02:05.2"),
    ]


@pytest.mark.parametrize("duration", [0.4, 7.9, 24, 61, 600, 3600, 40000])
def test_ticks_are_few_and_round(duration):
    chunk = {"video": 0, "index": 0, "start": 0.0, "end": duration, "level": "dense", "score": None}
    ticks = re.search(r'<div class="ticks">(.*?)</div>', timeline([chunk], duration))[1]
    assert 1 <= ticks.count("<span") <= MAX_TICKS + 1


def test_the_folder_of_the_file_is_the_default_model(root):
    chat = load(build_parser().parse_args(["--decode-chunk-groups", "2"]))
    sparse = chat.model.config.resolve_sparse_attention()
    assert (sparse.decode, sparse.decode_chunk_groups, sparse.prefill) == ("bilevel", 2, "full")
    assert chat.limits == Limits()


def test_what_the_page_offers_to_ask_is_answered_rightly():
    chat = load(build_parser().parse_args([]))
    session = chat.encode(str(demo_page.EXAMPLE_CLIP))
    for question, right in EXAMPLES:
        assert list(chat.ask(session, question, remember=False))[-1].text == right


@pytest.mark.ties  # what is answered does not matter here
def test_every_member_answers_with_the_modes_that_it_has(member, tokenizer, clips):
    has = member.config.resolve_beacons() is None and member.config.token_selector is None
    has = has and not member.config.mm_llm_compress
    assert use_bilevel(member.config, None) == has
    if not has:
        with pytest.raises(ValueError, match="--decode-chunk-groups: this model"):
            use_bilevel(member.config, 2)
    chat = VideoChat(member, tokenizer, Limits(max_num_frames=16, max_new_tokens=4))
    *_, reply = chat.ask(chat.encode(clips[0]), "What moves?")
    chosen = {chunk["level"] for chunk in reply.chunks} == {"dense", "pooled"}
    assert chosen == has and timeline(reply.chunks, reply.session.video.duration)


def test_a_damaged_files_warning_reaches_the_visitor(chat, clips, tmp_path):
    cut = tmp_path / "cut.mp4"
    data = bytearray(Path(clips[1]).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 6000] = bytes(6000)
    cut.write_bytes(data)
    session = chat.encode(str(cut))
    assert session.warnings and "cut.mp4 is damaged" in session.warnings[0]
    assert str(tmp_path) not in " ".join(session.warnings)
    assert 'class="note warning" role=alert' in demo_page.about(session)
    assert not chat.encode(clips[1]).warnings


# ---------------------------------------------------------------- saved videos


def test_a_saved_video_comes_back(chat, clips, tmp_path):
    session, file = chat.encode(clips[0]), tmp_path / "a.videoxl"
    chat.saved.save(session.video, file)
    assert clips[0].encode() not in file.read_bytes(), "the file says where this machine keeps the video"
    again = chat.open_saved(str(file))
    assert list(chat.ask(again, "What moves?"))[-1].text == list(chat.ask(session, "What moves?"))[-1].text


def test_every_members_saved_video_comes_back(member, tokenizer, clips, tmp_path):
    saved = SavedVideos(member, tokenizer, 64)
    for frames in (5, 16):
        video = member.encode_video(clips[0], tokenizer, max_num_frames=frames)
        saved.save(video, tmp_path / "a.videoxl")
        again = saved.load(str(tmp_path / "a.videoxl"))
        assert again.timestamps == video.timestamps and str(again) == ""


def forged(file, **changes):
    """A saved file with other facts in its header, or (tensors, by name) other entries."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ((key, about),) = header["__metadata__"].items()
    about = json.loads(about)
    about["facts"] |= changes.pop("facts", {})
    about["shapes"] |= changes.pop("shapes", {})
    header["__metadata__"][key] = json.dumps(about)
    for name, entry in changes.pop("tensors", {}).items():
        header[name] = header.get(name, {}) | entry
    header = changes.pop("header", json.dumps(header).encode())
    assert not changes
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.fixture
def saved_file(chat, clips, tmp_path):
    file = tmp_path / "a.videoxl"
    chat.saved.save(chat.encode(clips[0]).video, file)
    return file


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": {"model": "0" * 64}},
        {"facts": {"kind": "image"}},
        {"facts": {"prefill": {"prefill": "mask", "chunk_groups": 4, "window_chunks": 3}}},
        {"facts": {"timestamps": [0.0, 1.0]}},
        {"facts": {"timestamps": [float(number) for number in range(1000)]}},
        {"facts": {"timestamps": "abc"}},
        {"facts": {"timestamps": [1e999]}},
        {"facts": {"videos": [[[0, 10, 10**9]]]}},
        {"facts": {"videos": []}},
        {"facts": {"duration": "long"}},
        {"facts": {"whole": [0, 10**12]}},
        {"shapes": {"layers.0.keys": [1, 2, 10**9, 32]}},
        {"shapes": {"layers.0.keys": [-1, -2, 4, 4]}},
        {"tensors": {"more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}},
        {"tensors": {"input_ids": {"dtype": "F32"}}},
        {"tensors": {"input_ids": {"shape": [10**12]}}},
        {"header": b"{}"},
        {"header": b"[" * 100_000},
        {"header": b" " * (5 * 2**20)},
        {"facts": {}},  # even with nothing changed it is written in another way: its digest does not agree
    ],
)
def test_a_forged_file_is_refused_before_it_is_read(chat, saved_file, changes, monkeypatch):
    saved_file.write_bytes(forged(saved_file, **changes))
    if changes != {"facts": {}}:
        monkeypatch.setattr(type(chat.model), "load_video", None)
    with pytest.raises(ValueError, match="is not a video that this page has saved") as error:
        chat.open_saved(str(saved_file))
    assert "NoneType" not in str(error.value), "it was read"


def test_other_files_are_refused(chat, saved_file, tmp_path, root):
    short = saved_file.read_bytes()[:-1]
    for name, data in (("short", short), ("long", short + b"ab"), ("empty", b""), ("text", b"no video" * 9)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="is not a video that this page has saved"):
            chat.open_saved(str(tmp_path / name))
    with pytest.raises(ValueError, match="is not a video"):
        chat.open_saved(str(root / "model.safetensors"))
    tensors, _ = read_header(saved_file)
    assert {name.partition(".")[0] for name in tensors} >= {"input_ids", "layers"}


def test_the_page_takes_no_paths(chat, clips):
    for path in ("file:///etc/passwd", "http://localhost/a.mp4", "../a.mp4", "data:video/mp4;base64,AAAA", ""):
        with pytest.raises(ValueError, match="give the video itself"):
            chat.encode(path)


def test_a_visitors_files_go_with_the_visit(tmp_path):
    visits, upload = Visits(), tmp_path / "upload.mp4"
    upload.write_text("a")
    visits.owns("ann", str(upload))
    visits.owns("bob", str(upload))  # gradio keeps one file of what two visitors have uploaded
    visits.owns("bob", str(demo_page.EXAMPLE_CLIP))
    mine = visits.new_file("bob", "a.videoxl")
    mine.write_text("b")
    visits.leave("ann")
    assert upload.is_file() and mine.is_file()
    visits.leave("bob")
    assert not upload.exists() and not mine.exists() and demo_page.EXAMPLE_CLIP.is_file()
    visits.leave("carl")


def test_without_gradio_it_says_what_to_install(root):
    script = "import sys; sys.modules['gradio'] = None; import videoxl.demo; videoxl.demo.main([])"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == 'error: the page needs gradio: pip install "gradio>=6"'


def test_versions_agree(root):
    pins = (root / "requirements-demo.txt").read_text()
    assert f"sdk_version: {re.search('^gradio==(.+)$', pins, re.MULTILINE)[1]}\n" in demo_page.__doc__
    assert 'demo = ["gradio>=6"]' in (root / "pyproject.toml").read_text()


def test_handlers_of_the_page(chat, clips, tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: make test-browser runs this")
    page = demo_page.build_page(chat, "Model: <tiny>.", toy=True)
    handlers = {function.fn.__name__: function.fn for function in page.fns.values() if function.fn}
    take_video, answer = handlers["take_video"], handlers["answer"]
    assert "Model: &lt;tiny&gt;." in str(page.config) and "toy world" in str(page.config)
    assert all(
        function["api_visibility"] == "private" for function in page.config["dependencies"] if function["targets"]
    )
    request = gradio.Request(session_hash="ann")
    clip = str(shutil.copy(clips[0], tmp_path))  # it goes with the visit

    *_, (session, facts, _, _, problem, question, keep, _) = take_video(clip, request)
    assert f"0:09 long; {session.video.num_frames} pictures of it were read" in facts
    assert question.interactive and keep.interactive and not problem.visible
    states = list(answer(session, "What moves?", [], True, clip))
    after, messages, seen, *_ = states[-1]
    expected, _, chunks = direct(chat, clip, "What moves?")
    assert messages == [{"role": "user", "content": "What moves?"}, {"role": "assistant", "content": expected}]
    assert len(states) > 4 and len(Elements(seen).of("chunk")) == len(chunks)
    assert after.video is session.video and session.history is None and after.history

    # Kept in a file, opened again by another visitor, gone with the visit.
    kept = Path(handlers["keep_video"](session, clip, request).value["path"])
    assert kept.name == "a.videoxl"
    _, again, facts, *_ = handlers["take_saved"](str(kept), gradio.Request(session_hash="bob"))
    assert again.video.timestamps == session.video.timestamps and "0:09 long" in facts

    # What goes wrong is said on the page; the conversation stays as it was.
    monkeypatch.setattr(chat, "limits", Limits(max_new_tokens=0))
    *_, (kept, kept_messages, _, problem, _) = answer(after, "Why?", messages, True, clip)
    assert kept is after and kept_messages == messages and problem.visible and "max_new_tokens" in problem.value
    assert list(answer(after, " ", messages, True, clip)) == [[gradio.skip()] * 5]
    *_, (nothing, _, _, problem, _) = answer(None, "What?", [], True, None)
    assert nothing is None and "upload" in problem.value
    file = tmp_path / "<b>.mp4"
    file.write_text("no video")
    *_, (nothing, facts, *_) = take_video(str(file), request)
    assert nothing is None and "&lt;b&gt;.mp4" in facts and "error" in facts
    assert list(take_video(None, request))[-1][0] is None
    _, nothing, facts, *_ = handlers["take_saved"](str(file), request)
    assert nothing is None and "&lt;b&gt;.mp4 is not a video that this page has saved" in facts
    handlers["leave"](request)
    assert not file.exists() and not Path(clip).exists()
