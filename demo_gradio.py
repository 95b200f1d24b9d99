"""The demo page: give a video, ask, watch the answer come, see which chunks of the video it saw in full.

    python demo_gradio.py                                   # the checkpoint in this folder; --help: others, limits

gradio is optional: `pip install "gradio>=6"`, or `make page`, which installs pinned versions. As a Space of the Hub it
needs this file, a `requirements.txt` with `torch`, `transformers`, `av` and `einops`, an `app.py`

    from demo_gradio import main

    main(["--model", "org/name", "--trust-remote-code"])

and a `README.md` that begins with

    ---
    title: Video-XL
    sdk: gradio
    sdk_version: 6.31.0
    python_version: "3.11"
    app_file: app.py
    ---

(In a Space that holds the model's own files, `app_file: demo_gradio.py` is enough.)

What is surprising:
* A visitor's encoded video and conversation are a value in the visitor's session (`Session` in `gr.State`); the model
  holds nothing of them. What is set on the model's config is set once, for all visitors.
* One question or video at a time runs on the model; the others wait in gradio's queue.
* The timeline is HTML of our own: a plot's image could not be clicked, nor follow the width of the window.
* gradio is imported by what draws the page only; what answers and what makes the timeline works without it.
"""

import argparse
import html
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, TextIteratorStreamer

HERE = Path(__file__).resolve().parent
EXAMPLE_CLIP = HERE / "assets" / "demo.mp4"
EXAMPLE_QUESTIONS = (
    "What color is the star?",
    "When does the triangle first appear?",
    "What is on the card with the purple ring?",
)
# A visitor who has been gone for so long finds the video forgotten; uploaded files go, too. Seconds.
KEEP_SECONDS = 3600
# Steps of the time axis, in seconds; the first one that gives at most so many ticks is taken.
TICK_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
MAX_TICKS = 8
LEVELS = {"dense": "seen in full", "pooled": "pooled", "dropped": "left out"}

CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
#head, #facts, #problem, #seen, :is(#head, #facts, #problem, #seen) .html-container { padding: 0; }
#head h1 { margin: 0 0 4px; } #head p { margin: 0; max-width: 75ch; color: var(--body-text-color-subdued); }
#question .submit-button { background: #1a9850; color: white; border-radius: 6px; padding: 4px 14px; }
#talk .message-content { white-space: pre-wrap; }
.note { color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.note.error { color: var(--body-text-color); border-left: 4px solid #d62728; padding: 6px 12px;
  background: rgba(214, 39, 40, .09); border-radius: 4px; }
.timeline { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 16px 14px;
  background: var(--block-background-fill); }
.timeline header { display: flex; flex-wrap: wrap; gap: 4px 20px; justify-content: space-between; }
.timeline .legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; }
.timeline .legend b { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.timeline .legend .dense { background: #1a9850; } .timeline .legend .pooled { background: #9aa0a9; }
.timeline .legend .dropped { border: 1px dashed #9aa0a9; }
.timeline .legend .named { width: 0; height: 0; border: 6px solid transparent; border-top: 9px solid #d62728;
  border-bottom: 0; }
.timeline .cites { position: relative; height: 15px; margin-top: 6px; }
.timeline .cite { position: absolute; bottom: 2px; height: 3px; background: #d62728; cursor: pointer; }
.timeline .cite::before { content: ""; position: absolute; left: -6px; bottom: 0; border: 6px solid transparent;
  border-top: 9px solid #d62728; border-bottom: 0; }
.timeline .bars { position: relative; height: 84px; border-bottom: 1px solid var(--body-text-color-subdued); }
.timeline .chunk { position: absolute; bottom: 0; height: 100%; cursor: pointer; }
.timeline .chunk i { position: absolute; bottom: 0; left: 0; right: 0; min-height: 2px; }
.timeline .chunk, .timeline .chunk i { border-right: 1px solid var(--block-background-fill); }
.timeline .chunk:hover { filter: brightness(.85); }
.timeline .bars .dense { background: rgba(26, 152, 80, .16); } .timeline .bars .dense i { background: #1a9850; }
.timeline .bars .pooled { background: rgba(128, 134, 145, .10); } .timeline .bars .pooled i { background: #9aa0a9; }
.timeline .ticks { position: relative; height: 20px; font-size: 12px; color: var(--body-text-color-subdued); }
.timeline .ticks span { position: absolute; top: 3px; transform: translateX(-50%); white-space: nowrap; }
.timeline .ticks span:first-child { transform: none; }
.timeline .chips { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin-top: 10px; font-size: 13px; }
#seen .timeline button { font: inherit; color: inherit; box-shadow: none; padding: 1px 8px; margin: 0;
  border-radius: 6px;
  border: 1px solid var(--border-color-primary);
  font-variant-numeric: tabular-nums; background: rgba(26, 152, 80, .12); cursor: pointer; }
#seen .timeline button.named { background: rgba(214, 39, 40, .10); }
#seen .timeline button span { color: var(--body-text-color-subdued); margin-left: 8px; }
"""

# A click on anything that stands for a time shows that time in the video.
SEEK = """
element.addEventListener("click", (event) => {
  const place = event.target.closest("[data-seconds]");
  const clip = document.querySelector("#clip video");
  if (place && clip) { clip.pause(); clip.currentTime = Number(place.dataset.seconds); }
});
"""


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        max_num_frames: Frames of a video that are read, at most.
        max_minutes: Longest video.
        max_new_tokens: Longest answer.
    """

    max_num_frames: int = 512
    max_minutes: float = 120
    max_new_tokens: int = 512


@dataclass(frozen=True, eq=False)  # gradio hashes what a session holds: by identity, for histories have no hash
class Session:
    """One visitor's encoded video and the conversation about it; the history is None before the first answer."""

    video: object
    history: list | None = None


@dataclass(frozen=True)
class Reply:
    """An answer as far as it has come; complete when it has the session that follow-up questions go to.

    Attributes:
        text: The answer.
        chunks: What it saw of the video, see `return_chunks` of `model.chat`.
        cited: (start, end) seconds of the times that the answer names.
    """

    text: str
    session: Session | None = None
    chunks: Sequence[dict] = ()
    cited: Sequence[tuple[float, float]] = ()


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


class _Streamer(TextIteratorStreamer):
    """Hands pieces of an answer from the thread that generates; ends that thread when it was told to stop."""

    stopped = False

    def put(self, value):
        if self.stopped:
            raise _Stopped
        super().put(value)


class VideoChat:
    """Encodes videos and answers questions, for any number of visitors: what is theirs is a `Session`."""

    def __init__(self, model, tokenizer, limits: Limits):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits

    def encode(self, path: str) -> Session:
        """Reads and encodes a video.

        Raises:
            FileNotFoundError, ValueError: If it cannot be read, or is too long.
        """
        with self._remote("video_processing_videoxl").open_video(path, size=1) as reader:
            duration = reader.duration
        if duration > 60 * self.limits.max_minutes:
            raise ValueError(
                f"{path} is {clock(duration)} long; this page takes up to {clock(60 * self.limits.max_minutes)}. "
                "Cut it, and upload the part that you want to ask about."
            )
        sampling = {"max_num_frames": self.limits.max_num_frames}
        video = self.model.encode_video(path, self.tokenizer, **sampling, progress=True)
        # Idle visitors must not fill the GPU; a question brings back what it needs.
        return Session(video if self.model.device.type == "cpu" else video.to("cpu"))

    def ask(self, session: Session, question: str, remember: bool = True) -> Iterator[Reply]:
        """Answers a question about the session's video, which is not read or encoded again.

        Args:
            session: From `encode`, or from the reply before.
            question: The question.
            remember: Whether the answer may refer to earlier questions and answers.

        Yields:
            The answer as it grows, then the complete reply. Closing the iterator stops the answer.

        Raises:
            ValueError: On an empty question, and for what `model.chat` raises it.
        """
        streamer = _Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        turn = {
            "chat_history": session.history if remember else None,
            "return_chunks": True,
            "streamer": streamer,
            "generation_config": {"max_new_tokens": self.limits.max_new_tokens},
        }
        with ThreadPoolExecutor(1) as worker:
            answering = worker.submit(self.model.chat, session.video, self.tokenizer, question, **turn)
            # An error ends the answer, too.
            answering.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))
            text = ""
            try:
                for piece in streamer:
                    text += piece
                    yield Reply(text.strip())
            finally:
                streamer.stopped = True
            answer, history, chunks = answering.result()
        cited = self._remote("messages_videoxl").times_in_text(answer)
        duration = session.video.duration
        # A negative start counts from the end of the video.
        cited = [(max(duration + start, 0) if start < 0 else start, min(end, duration)) for start, end in cited]
        cited = [(start, end) for start, end in cited if start <= end]
        yield Reply(answer, replace(session, history=history), chunks, cited)

    def _remote(self, name: str):
        """A module of the model's own code, wherever transformers has put it."""
        return import_module(f"{type(self.model).__module__.rpartition('.')[0]}.{name}")


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss, with a tenth of a second where there is one."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{tenths // 10:02d}" + (f".{tenths % 10}" if tenths % 10 else "")
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def span(start: float, end: float) -> str:
    """A time or a range of time in words of the clock."""
    return clock(start) if end == start else f"{clock(start)} – {clock(end)}"


def timeline(chunks: Sequence[dict], duration: float, cited: Sequence[tuple[float, float]] = ()) -> str:
    """HTML of what an answer saw of the video: a bar a chunk, as high as its score, and the times that it names.

    Args:
        chunks: See `return_chunks` of `model.chat`.
        duration: Seconds.
        cited: (start, end) seconds.
    """
    duration = max(duration, max(chunk["end"] for chunk in chunks)) or 1.0

    def place(start, end):
        return f'style="left:{100 * start / duration:.3f}%;width:{100 * (end - start) / duration:.3f}%"'

    def button(start, end, style, more=""):
        return f'<button type="button" class="{style}" data-seconds="{start:.3f}">{span(start, end)}{more}</button>'

    largest = max(chunk["score"] or 0 for chunk in chunks) or 1
    bars = []
    for chunk in chunks:
        start, end, level, score = (chunk[key] for key in ("start", "end", "level", "score"))
        title = f"{span(start, end)}: {LEVELS[level]}" + ("" if score is None else f", score {score:.3f}")
        bars.append(
            f'<div class="chunk {level}" data-seconds="{start:.3f}" title="{title}" {place(start, end)}>'
            f'<i style="height:{100 * (score or 0) / largest:.1f}%"></i></div>'
        )
    marks = [
        f'<div class="cite" data-seconds="{start:.3f}" title="in the answer: {span(start, end)}" '
        f"{place(start, end)}></div>"
        for start, end in cited
    ]
    step = next((step for step in TICK_STEPS if duration / step < MAX_TICKS), math.ceil(duration / MAX_TICKS))
    ticks = [f"<span {place(at, at)}>{clock(at)}</span>" for at in range(0, int(0.97 * duration) + 1, step)]
    counts = {level: sum(chunk["level"] == level for chunk in chunks) for level in LEVELS}
    title = ", ".join(f"{count} {LEVELS[level]}" for level, count in counts.items() if count)
    legend = [f'<span><b class="{level}"></b>{LEVELS[level]}</span>' for level, count in counts.items() if count]
    if cited:
        legend.append('<span><b class="named"></b>time in the answer</span>')
    chips = [
        button(
            chunk["start"], chunk["end"], "", "" if chunk["score"] is None else f"<span>{chunk['score']:.3f}</span>"
        )
        for chunk in chunks
        if chunk["level"] == "dense"
    ]
    named = [button(start, end, "named") for start, end in cited]
    return (
        f'<section class="timeline"><header><strong>{len(chunks)} chunks: {title}</strong>'
        f'<div class="legend">{"".join(legend)}</div></header>'
        f'<div class="cites">{"".join(marks)}</div><div class="bars">{"".join(bars)}</div>'
        f'<div class="ticks">{"".join(ticks)}</div>'
        + (f'<div class="chips">Times in the answer: {"".join(named)}</div>' if named else "")
        + f'<div class="chips reloaded">Seen in full, with scores: {"".join(chips)}</div></section>'
    )


def note(text: str, error: bool = False) -> str:
    """HTML of a line that tells something, or of a message about what went wrong."""
    return f'<div class="note{" error" * error}"{" role=alert" * error}>{html.escape(text)}</div>'


def explain(error: Exception, path: str | None) -> str:
    """A message for a visitor, who knows the name of the file but not where this machine keeps it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The memory of this machine is too small for that. Try a shorter video."
    return str(error).replace(path, Path(path).name) if path else str(error)


def build_page(chat: VideoChat, about: str = ""):
    """The page.

    Args:
        chat: Who answers.
        about: What else the page says at the top.

    Returns:
        A `gradio.Blocks`, not launched.
    """
    import gradio as gr

    errors = (FileNotFoundError, ValueError, torch.OutOfMemoryError)
    waiting = gr.Textbox(interactive=False, placeholder="Give a video first", submit_btn=False, stop_btn=False)
    ready = gr.Textbox(interactive=True, placeholder="Ask about the video", submit_btn="Ask", stop_btn=False)
    busy = gr.Textbox(submit_btn=False, stop_btn="Stop")
    fine = gr.HTML("", visible=False)

    def problem_of(text):
        return gr.HTML(note(text, error=True), visible=True)

    def take_video(path, progress=gr.Progress(track_tqdm=True)):  # noqa: B008  (gradio finds it there)
        if path is None:
            yield None, "", [], "", fine, waiting
            return
        yield None, note("Reading the video …"), [], "", fine, waiting
        try:
            session = chat.encode(path)
        except errors as error:
            yield None, note(explain(error, path), error=True), [], "", fine, waiting
            return
        video = session.video
        facts = (
            f"{clock(video.duration)} long, {video.num_frames} frames read, encoded into {video.nbytes / 1e6:,.1f} MB."
        )
        yield session, note(facts), [], "", fine, ready

    def answer(session, question, messages, remember, path):
        if session is None:
            yield (
                session,
                messages,
                "",
                problem_of("There is no video, or it was forgotten meanwhile: upload it again."),
                waiting,
            )
            return
        asked = [*messages, {"role": "user", "content": question}]
        yield session, asked, gr.skip(), fine, busy
        try:
            for reply in chat.ask(session, question, remember):
                shown = [*asked, {"role": "assistant", "content": reply.text}]
                if reply.session is None:
                    yield session, shown, gr.skip(), fine, gr.skip()
        except errors as error:
            yield session, messages, gr.skip(), problem_of(explain(error, path)), ready
            return
        seen = timeline(reply.chunks, session.video.duration, reply.cited)
        yield reply.session, shown, seen, fine, gr.Textbox("", submit_btn="Ask", stop_btn=False)

    with gr.Blocks(title="Video-XL", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        session = gr.State(time_to_live=KEEP_SECONDS)
        gr.HTML(
            "<h1>Ask about a video</h1><p>The video is encoded once and can be asked many times. For each answer the "
            "model sees in full what the question is about, and the rest of the video pooled. "
            f"Answers can be wrong: look them up in the video. {html.escape(about)}</p>",
            elem_id="head",
        )
        question = gr.Textbox(
            label="Question",
            show_label=False,
            interactive=False,
            placeholder=waiting.placeholder,
            elem_id="question",
            render=False,  # its place is in the second column; the first one has examples for it
        )
        with gr.Row():
            with gr.Column(min_width=320):
                clip = gr.Video(show_label=False, sources=["upload"], include_audio=True, height=300, elem_id="clip")
                facts = gr.HTML("", elem_id="facts")
                if EXAMPLE_CLIP.is_file():
                    example = gr.Button("Take the example clip", size="sm", elem_id="example")
                    questions = [[text] for text in EXAMPLE_QUESTIONS]
                    gr.Examples(questions, [question], label="Questions about the example clip")
            with gr.Column(min_width=320):
                talk = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    height=300,
                    elem_id="talk",
                    buttons=[],
                    render_markdown=False,  # a model's text is shown, never run
                    placeholder="Answers appear here.",
                )
                question.render()
                problem = gr.HTML("", visible=False, elem_id="problem")
                remember = gr.Checkbox(True, label="Follow-up questions know the conversation so far", container=False)
        seen = gr.HTML("", elem_id="seen", js_on_load=SEEK)
        if EXAMPLE_CLIP.is_file():
            example.click(lambda: str(EXAMPLE_CLIP), None, [clip])

        # The model does one thing at a time.
        alone = {"concurrency_id": "model", "concurrency_limit": 1}
        states = [session, facts, talk, seen, problem, question]
        clip.change(take_video, [clip], states, show_progress_on=facts, **alone)
        asking = question.submit(
            answer,
            [session, question, talk, remember, clip],
            [session, talk, seen, problem, question],
            show_progress="hidden",
            **alone,
        )
        question.stop(lambda: ready, None, [question], cancels=[asking], queue=False)
        # The bin over the conversation: the next question begins another one about the same video.
        talk.clear(lambda session: (session and Session(session.video), ""), [session], [session, seen])
    return page


def load(options: argparse.Namespace) -> VideoChat:
    """Loads the model and sets what is asked of it."""
    trust = options.trust_remote_code or Path(options.model).is_dir()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=trust)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=trust, dtype=options.dtype)
    model = model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    current = model.config.resolve_sparse_attention()
    wanted = {"decode": "bilevel", "decode_chunk_groups": options.decode_chunk_groups}
    model.config.sparse_attention = {
        name: getattr(current, name) for name in model.config.sparse_attention.fields
    } | wanted
    return VideoChat(model, tokenizer, Limits(options.max_num_frames, options.max_minutes, options.max_new_tokens))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Serves a page on which a video can be asked about.")
    parser.add_argument("--model", default=str(HERE), help="folder or Hub id (default: the folder of this file)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the Hub; needed for a Hub id")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", default="auto", help="precision, such as bfloat16 (default: that of the weights)")
    parser.add_argument(
        "--decode-chunk-groups", type=int, default=1, help="groups of frames in a chunk (default: %(default)s)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-num-frames", type=int, default=Limits.max_num_frames, help="default: %(default)s")
    limits.add_argument("--max-minutes", type=float, default=Limits.max_minutes, help="default: %(default)s")
    limits.add_argument("--max-megabytes", type=int, default=500, help="of an upload (default: %(default)s)")
    limits.add_argument("--max-new-tokens", type=int, default=Limits.max_new_tokens, help="default: %(default)s")
    limits.add_argument("--max-visitors", type=int, default=16, help="encoded videos in memory (default: %(default)s)")
    page = parser.add_argument_group("page")
    page.add_argument("--host", help="address to listen on (default: this machine only)")
    page.add_argument("--port", type=int, help="default: the first free one from 7860")
    page.add_argument("--share", action="store_true", help="a public address for 72 hours, through gradio's servers")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Loads the model and serves the page until it is interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        import gradio as gr
    except ImportError:
        sys.exit('error: the page needs gradio: pip install "gradio>=6"')
    chat = load(options)
    parameters = sum(parameter.numel() for parameter in chat.model.parameters())
    name = "" if options.model == str(HERE) else f"{options.model}, "
    page = build_page(chat, f"Model: {name}{parameters / 1e6:,.0f} million parameters.")
    # Fonts of the visitor's own: the page loads nothing from elsewhere.
    theme = gr.themes.Soft(primary_hue="emerald", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme = theme.set(block_border_width="1px", block_shadow="none")
    page.queue(max_size=64).launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        max_file_size=f"{options.max_megabytes}mb",
        state_session_capacity=options.max_visitors,
        allowed_paths=[str(EXAMPLE_CLIP)],  # elsewhere than the working directory, perhaps
        theme=theme,
        css=CSS,
        footer_links=[],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
