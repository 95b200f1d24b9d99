"""Text for a terminal: answers as they come, facts about the run, tables of chunks.

A model may write any byte, and control characters would steer the terminal: all text goes through `printable`.
"""

from transformers import TextStreamer

MIB = 2**20
# A table of chunks shows at most so many; --json has them all.
MAX_ROWS = 40
BAR_WIDTH = 24


def printable(text: str) -> str:
    """The text without control characters other than the end of a line."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


class AnswerStreamer(TextStreamer):
    """Writes an answer word by word, and counts its tokens.

    Args:
        tokenizer: The checkpoint's.
        out: A text file to write to; None only counts.
    """

    def __init__(self, tokenizer, out=None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out, self.calls, self.started = out, 0, False

    def put(self, value) -> None:
        self.calls += 1
        super().put(value)

    def on_finalized_text(self, text, stream_end=False) -> None:
        # `chat` strips what it returns.
        text = text if self.started else text.lstrip()
        self.started = self.started or bool(text)
        if self.out is not None:
            self.out.write(printable(text.rstrip() if stream_end else text))
            self.out.flush()

    @property
    def tokens(self) -> int:
        """Tokens of the answer; the first call brought the prompt."""
        return max(self.calls - 1, 0)


def describe_video(result: dict, stats: bool) -> str:
    """What is known before the first question, as rows for a terminal."""
    rows = [
        ("video", f"{result['video'] or 'frames from memory'}, {result['duration']:.1f} s"),
        ("frames", f"{result['num_frames']}"),
        ("visual tokens", f"{result['visual_tokens']}"),
        ("read saved video" if result["loaded_from"] else "decode + encode", f"{result['encode_seconds']:.2f} s"),
    ]
    if result["saved_to"]:
        rows.append(("saved to", result["saved_to"]))
    if stats:
        rows[:0] = [
            ("model", f"{result['model']}, {result['parameters'] / 1e6:,.1f} M parameters"),
            ("runs on", f"{result['device']}, {result['dtype']}"),
            ("load", f"{result['load_seconds']:.2f} s"),
        ]
        rows += [
            ("attention", ", ".join(f"{name} {value}" for name, value in result["sparse_attention"].items())),
            ("encoded video", f"{result['tokens']} tokens, {result['cache_bytes'] / MIB:.1f} MiB of key-values"),
        ]
    return printable("\n".join(f"{name:<17}{value}" for name, value in rows) + "\n")


def describe_answer(entry: dict, stats: bool) -> str:
    """What follows a streamed answer."""
    spent = f"{entry['seconds']:.2f} s"
    if stats and entry["seconds"] > 0:
        spent += f", {entry['tokens']} tokens, {entry['tokens'] / entry['seconds']:.0f} a second"
    return printable("\n".join([f"   [{spent}]", *chunk_table(entry.get("chunks", ()))]) + "\n")


def describe_memory(peak: int | None) -> str:
    """The last row of --stats."""
    return f"\n{'peak memory':<17}{'unknown' if peak is None else f'{peak / MIB:,.0f} MiB'}\n"


def chunk_table(chunks) -> list[str]:
    """Lines that show what became of each chunk; of many chunks, those that matter most."""
    if not chunks:
        return []
    levels = [chunk["level"] for chunk in chunks]
    counts = ", ".join(f"{levels.count(level)} {level}" for level in dict.fromkeys(levels))
    order = ("dense", "pooled", "dropped")
    ranked = sorted(chunks, key=lambda chunk: (order.index(chunk["level"]), -(chunk["score"] or 0)))
    shown = sorted(ranked[:MAX_ROWS], key=chunks.index)
    largest = max((chunk["score"] or 0 for chunk in chunks), default=0) or 1
    lines = ["", f"   {len(chunks)} chunks: {counts}" + f"; {MAX_ROWS} are shown" * (len(chunks) > MAX_ROWS)]
    lines.append(f"   chunk  {'seconds':^17}  level    score")
    for chunk in shown:
        times, score = f"{chunk['start']:7.1f} - {chunk['end']:7.1f}", chunk["score"]
        bar = "-" if score is None else f"{score:.3f} " + "#" * round(BAR_WIDTH * score / largest)
        lines.append(f"   {chunk['index']:>5}  {times}  {chunk['level']:<7}  {bar}".rstrip())
    return lines
