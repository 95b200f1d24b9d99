"""The demo page: give a video, ask, watch the answer come, see what of the video it looked at closely.

    python -m videoxl.demo                                  # the bundled checkpoint; --help: others, limits

gradio is optional: `pip install ".[demo]"`, or `make page`, which installs a pinned version. A Space of the Hub needs
an `app.py`

    from videoxl.demo import main

    main(["--model", "org/name", "--trust-remote-code"])

a `requirements.txt` with `videoxl[demo] @ git+ADDRESS`, where ADDRESS is this repository's, and a `README.md` that
begins with

    ---
    title: Video-XL
    sdk: gradio
    sdk_version: 6.31.0
    python_version: "3.11"
    app_file: app.py
    ---

What is surprising:
* A visitor's encoded video and conversation are a value in the visitor's session (`Session` in `gr.State`); the model
  holds nothing of them. What is set on the model's config is set once, for all visitors.
* One question or video at a time runs on the model; the others wait in gradio's queue.
* The timeline is HTML of our own: a plot's image could not be clicked, nor follow the width of the window.
* A button sets only what it changes of another component. What gradio makes of a component's first properties (its
  own examples do that) would undo what a visit has set since.
* gradio is imported by what draws the page only; what answers and what makes the timeline works without it.
"""

import argparse
import html
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from .answers import Limits, Session, VideoChat, explain
from .style import COLORS, CSS, SEEK, SHOW_EXAMPLE
from .timeline import clock, timeline

# The bundled checkpoint: the root of a clone, or the installed package.
BUNDLED = Path(__file__).resolve().parent.parent
EXAMPLE_CLIP = BUNDLED / "assets" / "demo.mp4"
# What the bundled checkpoint answers rightly about that clip.
EXAMPLES = (
    ("What color is the star?", "orange"),
    ("When does the ring disappear?", "At 16 seconds"),
    ("How many cards are shown?", "3"),
)
TOY_WORLD = (
    "The model on this page is tiny and knows <b>one toy world: coloured shapes, signs and cards</b>, as in the "
    "example clip. About other videos it can only guess; converted published weights (<code>--model</code>) are for "
    "those."
)
# A visitor who has been gone for so long finds the video forgotten; uploaded files go, too. Seconds.
KEEP_SECONDS = 3600
FAILURES = (OSError, ValueError, torch.OutOfMemoryError)


class Visits:
    """Which files belong to which visitors: a file goes with the last one who has it."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="videoxl-page-")
        self.files: dict[str, set[str]] = defaultdict(set)

    def owns(self, visitor: str, path: str) -> None:
        """Takes down that a visitor has a file; the example clip is nobody's."""
        if Path(path) != EXAMPLE_CLIP:
            self.files[path].add(visitor)

    def new_file(self, visitor: str, name: str) -> Path:
        """A path for a file that this visitor alone will have."""
        path = Path(tempfile.mkdtemp(dir=self.folder.name)) / name
        self.owns(visitor, str(path))
        return path

    def leave(self, visitor: str) -> None:
        """Removes the files that nobody else has."""
        for path, visitors in list(self.files.items()):
            visitors.discard(visitor)
            if not visitors:
                del self.files[path]
                Path(path).unlink(missing_ok=True)


def note(text: str, kind: str = "") -> str:
    """HTML of a line that tells something: by kind a plain one, a "warning" or an "error"."""
    return f'<div class="note {kind}"{" role=alert" * bool(kind)}>{html.escape(text)}</div>'


def about(session: Session) -> str:
    """HTML of what is known about a session's video, and of what reading it warned of."""
    video = session.video
    seconds = video.duration / max(video.num_frames, 1)
    rate = f"one every {seconds:.1f} s" if seconds > 1 else f"{1 / seconds:.0f} a second" if seconds else "one"
    facts = f"Ready. {clock(video.duration)} long; {video.num_frames} pictures of it were read ({rate})."
    return note(facts) + "".join(note(text, "warning") for text in session.warnings)


def build_page(chat: VideoChat, model_name: str = "", toy: bool = False):
    """The page.

    Args:
        chat: Who answers.
        model_name: What the page says about the model.
        toy: Whether that is the bundled one, which knows one toy world.

    Returns:
        A `gradio.Blocks`, not launched.
    """
    import gradio as gr

    def field(**changes):
        return gr.Textbox(**changes)

    waiting = field(interactive=False, placeholder="Give a video first", submit_btn=False, stop_btn=False)
    ready = field(interactive=True, placeholder="Ask about the video", submit_btn="Ask", stop_btn=False)
    busy = field(submit_btn=False, stop_btn="Stop")
    hidden = gr.HTML("", visible=False)
    visits = Visits()
    keep_off = gr.Button(interactive=False), gr.DownloadButton(visible=False)

    def problem_of(text):
        return gr.HTML(note(text, "error"), visible=True)

    def nothing(facts=""):
        return None, facts, [], "", hidden, waiting, *keep_off

    def taken(session):
        keep = gr.Button(interactive=True), gr.DownloadButton(visible=False)
        return session, about(session), [], "", hidden, ready, *keep

    def take_video(path, request: gr.Request, progress=gr.Progress(track_tqdm=True)):  # noqa: B008  (found there)
        if path is None:
            yield nothing()
            return
        visits.owns(request.session_hash, path)
        yield nothing(note("Reading the video …"))
        try:
            yield taken(chat.encode(path))
        except FAILURES as error:
            yield nothing(note(explain(error, path), "error"))

    def take_saved(path, request: gr.Request):
        visits.owns(request.session_hash, path)
        try:
            return gr.Video(None), *taken(chat.open_saved(path))
        except FAILURES as error:
            return gr.skip(), *nothing(note(explain(error, path), "error"))

    def keep_video(session, path, request: gr.Request):
        if session is None:
            return gr.DownloadButton(visible=False)
        target = visits.new_file(request.session_hash, f"{Path(path).stem if path else 'video'}.videoxl")
        chat.saved.save(session.video, target)
        megabytes = target.stat().st_size / 1e6
        return gr.DownloadButton(f"Download ({megabytes:,.1f} MB)", value=str(target), visible=True)

    def answer(session, question, messages, remember, path):
        if session is None:
            gone = problem_of("There is no video, or it was forgotten meanwhile: upload it again.")
            yield session, messages, "", gone, waiting
            return
        if not question.strip():
            yield [gr.skip()] * 5
            return
        asked = [*messages, {"role": "user", "content": question}]
        yield session, asked, gr.skip(), hidden, busy
        try:
            for reply in chat.ask(session, question, remember):
                shown = [*asked, {"role": "assistant", "content": reply.text}]
                if reply.session is None:
                    yield session, shown, gr.skip(), hidden, gr.skip()
        except FAILURES as error:
            yield session, messages, gr.skip(), problem_of(explain(error, path)), ready
            return
        seen = timeline(reply.chunks, session.video.duration, reply.cited)
        yield reply.session, shown, seen, hidden, field(value="", submit_btn="Ask", stop_btn=False)

    def leave(request: gr.Request):
        visits.leave(request.session_hash)

    def take_example(question):
        """A handler that shows the example clip, and leaves the question in its field."""

        def take():
            return str(EXAMPLE_CLIP), field(value=question)

        return take

    def read_example(session, request: gr.Request, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        if session is not None and str(session.video) == str(EXAMPLE_CLIP):
            yield [gr.skip()] * len(states)  # it has been read
            return
        yield from take_video(str(EXAMPLE_CLIP), request, progress)

    with gr.Blocks(title="Video-XL", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        session = gr.State(time_to_live=KEEP_SECONDS)
        toy_note = f'<p class="toy">{TOY_WORLD}</p>' if toy else ""
        gr.HTML(
            "<h1>Ask about a video</h1><p>The video is read once, then each question takes a moment. "
            f"Answers can be wrong: click a time to see for yourself. {html.escape(model_name)}</p>{toy_note}",
            elem_id="head",
        )
        examples = []
        if EXAMPLE_CLIP.is_file():
            with gr.Row(elem_id="examples"):
                gr.HTML("<b>Try it with the example clip:</b>")
                for number, (text, _) in enumerate(EXAMPLES):
                    variant = "secondary" if number else "primary"
                    examples.append((text, gr.Button(text, variant=variant, size="md", elem_classes="example")))
        with gr.Row(elem_id="columns"):
            with gr.Column(min_width=320):
                clip = gr.Video(
                    label="Video", show_label=False, sources=["upload"], include_audio=True, height=300, elem_id="clip"
                )
                facts = gr.HTML("", elem_id="facts")
                seen = gr.HTML("", elem_id="seen", js_on_load=SEEK)
                with gr.Row(elem_id="files"):
                    keep = gr.Button("Save for later", size="sm", interactive=False, elem_id="keep")
                    download = gr.DownloadButton("Download", size="sm", visible=False, elem_id="download")
                    saved = gr.UploadButton("Open a saved one", size="sm", file_types=[".videoxl"], elem_id="saved")
            with gr.Column(min_width=320):
                talk = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    height=380,
                    elem_id="talk",
                    buttons=[],
                    render_markdown=False,  # a model's text is shown, never run
                    placeholder="Answers appear here.",
                )
                question = gr.Textbox(
                    label="Question",
                    show_label=False,
                    interactive=False,
                    placeholder=waiting.placeholder,
                    elem_id="question",
                )
                problem = gr.HTML("", visible=False, elem_id="problem")
                # The bundled model was never shown a conversation, and repeats itself in one.
                remember = gr.Checkbox(
                    not toy,
                    label="Follow-up questions know the conversation so far",
                    container=False,
                    elem_id="remember",
                )

        # The model does one thing at a time. Only the page itself may call what it does.
        private = {"api_visibility": "private"}
        alone = private | {"concurrency_id": "model", "concurrency_limit": 1}
        states = [session, facts, talk, seen, problem, question, keep, download]
        asking = {
            "fn": answer,
            "inputs": [session, question, talk, remember, clip],
            "outputs": [session, talk, seen, problem, question],
            "show_progress": "hidden",
            **alone,
        }
        # `upload` is what a visitor does; an example's clip is read by its own button, which asks after that.
        clip.upload(take_video, [clip], states, show_progress_on=facts, **alone)
        clip.clear(nothing, None, states, **private)
        asked = [question.submit(**asking)]
        for text, button in examples:
            shown = button.click(take_example(text), None, [clip, question], show_progress="hidden", **private)
            shown.then(None, js=SHOW_EXAMPLE, **private)
            read = shown.then(read_example, [session], states, show_progress_on=facts, **alone)
            asked.append(read.success(**asking))
        question.stop(lambda: ready, None, [question], cancels=asked, queue=False, **private)
        saved.upload(take_saved, [saved], [clip, *states], show_progress_on=facts, **alone)
        keep.click(keep_video, [session, clip], [download], show_progress_on=facts, **alone)
        # The bin over the conversation: the next question begins another one about the same video.
        talk.clear(lambda session: (session and Session(session.video), ""), [session], [session, seen], **private)
        page.unload(leave)
    return page


def use_bilevel(config, chunk_groups: int | None) -> bool:
    """Lets questions choose what they see closely, where the model's kind has that; says whether it has.

    Raises:
        ValueError: If `chunk_groups` is given for a model that has not.
    """
    before, current = config.sparse_attention, config.resolve_sparse_attention()
    wanted = {"decode": "bilevel", "decode_chunk_groups": chunk_groups or current.decode_chunk_groups}
    config.sparse_attention = {name: getattr(current, name) for name in before.fields} | wanted
    try:
        config.resolve_sparse_attention()
    except ValueError as error:
        config.sparse_attention = before
        if chunk_groups is not None:
            raise ValueError(f"--decode-chunk-groups: {error}") from error
        return False
    return True


def load(options: argparse.Namespace) -> VideoChat:
    """Loads the model and sets what is asked of it."""
    trust = options.trust_remote_code or Path(options.model).is_dir()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=trust)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=trust, dtype=options.dtype)
    model = model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    use_bilevel(model.config, options.decode_chunk_groups)
    return VideoChat(model, tokenizer, Limits(options.max_num_frames, options.max_minutes, options.max_new_tokens))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m videoxl.demo", description="Serves a page on which a video can be asked about."
    )
    parser.add_argument("--model", default=str(BUNDLED), help="folder or Hub id (default: the bundled one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the Hub; needed for a Hub id")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", default="auto", help="precision, such as bfloat16 (default: that of the weights)")
    parser.add_argument(
        "--decode-chunk-groups",
        type=int,
        help="groups of frames in what a question chooses or not (default: the model's; only where it chooses)",
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
    try:
        chat = load(options)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    parameters = sum(parameter.numel() for parameter in chat.model.parameters())
    toy = Path(options.model).resolve() == BUNDLED
    name = "" if toy else f"{Path(options.model).name}, "
    page = build_page(chat, f"Model: {name}{parameters / 1e6:,.0f} million parameters.", toy)
    # Fonts of the visitor's own: the page loads nothing from elsewhere.
    theme = gr.themes.Soft(primary_hue="emerald", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.queue(max_size=64).launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        max_file_size=f"{options.max_megabytes}mb",
        state_session_capacity=options.max_visitors,
        allowed_paths=[str(EXAMPLE_CLIP)],  # elsewhere than the working directory, perhaps
        theme=theme.set(**COLORS),
        css=CSS,
        footer_links=[],
    )
    return 0
