"""Which chunks a question should see in full: rules of choice side by side, by what is answered behind them.

What is surprising:
* All rules choose equally many chunks, so that they differ only in which. Answers are given by `dense_chunks`.
* What a rule reads is recorded: the attention of each layer, head and token of a question to each chunk's dense keys,
  with the queries that it has behind a video of which some chunks are dense and the others pooled.
* "Calibrated heads" are the twentieth of all heads, at least two, that most often give the chunk of a card most. They
  are found on training clips. Everything else is measured on held-out clips.
* With chunks of several groups there is one more rule: chunks that end where neighbouring groups are least alike,
  equally many of them.
"""

import time
from functools import partial
from itertools import pairwise
from statistics import mean
from unittest.mock import patch

import torch
from common import ROOT, median, parse, parser, report, table
from transformers import AutoTokenizer
from videoxl import VideoXLForConditionalGeneration, bilevel_videoxl
from videoxl.bilevel_videoxl import DENSE, POOLED, Chunk, DenseVideo, Levels
from videoxl.kv_cache import rotate
from videoxl.prefill_videoxl import positions_after, run_text
from videoxl.sparse_attention import attention_rows
from videoxl.video_world import make_clip

EPILOG = """\
examples:
  python benchmarks/choice.py --out choice_bundled
      The bundled checkpoint's chunks of one group, 24 clips of 64 seconds.

  python benchmarks/choice.py --clips 4 --seconds 256 --decode-chunk-groups 4 --count 3
      Chunks of four groups, fixed ones and such that end at changes.
"""


class Recorder:
    """Takes in the question's queries, and gives the share of attention that each chunk gets: [layers, H, n, C]."""

    def __init__(self, video: DenseVideo):
        self.video, self.queries = video, []

    def record(self, layer_idx, query, key, scaling=None):
        self.queries.append(query)

    def shares(self, dense, question):
        """With the queries that a question has where the chunks `dense` are dense and the others pooled."""
        video, self.queries = self.video, []
        kinds = tuple(DENSE if chunk in dense else POOLED for chunk in range(len(video.chunks)))
        seen = video.mix(Levels(kinds, (True,) * len(kinds), 0))
        here, behind = (positions_after(cache, question.shape[1])[0] for cache in (seen, video.cache))
        run_text(video.model, question, seen, keep_hidden=None, probe=self)
        spans = [[video.visual[group] for group in chunk.groups] for chunk in video.chunks]
        layers = []
        for query, layer in zip(self.queries, video.cache.layers, strict=True):
            query, heads = rotate(query, here, behind, video.inv_freq), query.shape[1]
            # One query at a time, so that none of them counts as the last of the keys.
            tokens = [
                torch.cat([rows.clone() for rows in attention_rows(query[:, :, [token]], layer.keys)])
                for token in range(query.shape[2])
            ]
            weights = torch.stack(tokens, dim=1)
            assert weights.shape[0] == heads
            parts = [sum(weights[..., start:stop].sum(-1) for start, stop in chunk) for chunk in spans]
            layers.append(torch.stack(parts, dim=-1))
        return torch.stack(layers)


def best(scores, count, among=None) -> list[int]:
    """The `count` chunks with the highest scores, without the first and the last, which are always dense."""
    inner = range(1, len(scores) - 1) if among is None else among
    return sorted(inner, key=lambda chunk: -float(scores[chunk]))[:count]


def rules(recorder, question, answer, read, heads, count) -> dict[str, tuple[list[int], float]]:
    """The chunks that each rule chooses, and the milliseconds that it took beyond the first look."""
    last, chunks = len(recorder.video.chunks) - 1, {}
    begin = time.perf_counter()
    first = recorder.shares((0, last), question)
    took = 1000 * (time.perf_counter() - begin)

    def add(name, scores, more=0.0, among=None):
        chunks[name] = best(scores, count, among), took + more

    add("last token, layers read", first[read, :, -1].sum((0, 1)))
    add("last token, all layers", first[:, :, -1].sum((0, 1)))
    add("last token, best head", first[read, :, -1].amax((0, 1)))
    add("all tokens, sum", first[read].sum((0, 1, 2)))
    add("all tokens, best head and token", first[read].amax((0, 1, 2)))
    add("calibrated heads", sum(first[layer, head, -1] for layer, head in heads))
    begin = time.perf_counter()
    wide = best(first[read, :, -1].sum((0, 1)), 2 * count)
    second = recorder.shares((0, last, *wide), question)[read, :, -1].sum((0, 1))
    more = 1000 * (time.perf_counter() - begin)
    add("two stages: twice as many, then again", second, more, wide)
    begin = time.perf_counter()
    with_answer = torch.cat([question, answer(chunks["last token, layers read"][0])], dim=1)
    again = recorder.shares((0, last), with_answer)[read, :, question.shape[1] - 1 :].sum((0, 1))
    again = (again / again.sum(-1, keepdim=True)).amax(0)
    add("the answer looks again", again, 1000 * (time.perf_counter() - begin))
    return chunks


def chunks_at_changes(keys, layout, size) -> list[Chunk]:
    """As many chunks as of `size` groups, ending where the keys of neighbouring groups are least alike."""
    groups = layout.groups
    means = torch.stack([keys[0, :, group.visual_start : group.end].mean(1).flatten() for group in groups])
    alike = torch.cosine_similarity(means[1:], means[:-1], dim=1)
    wanted = -(-len(groups) // size) - 1
    ends = sorted(int(place) + 1 for place in alike.argsort()[:wanted])
    return [Chunk(0, number, range(*pair)) for number, pair in enumerate(pairwise([0, *ends, len(groups)]))]


class Asked:
    """One clip behind the model: its questions, and what is answered with chosen chunks."""

    def __init__(self, model, tokenizer, clip):
        self.model, self.tokenizer, self.clip = model, tokenizer, clip
        times = [clip.start + second for second in range(clip.seconds)]
        self.video = model.encode_video(clip.frames(times), tokenizer, timestamps=times)

    def ask(self, question, dense_chunks=None):
        return self.model.chat(
            self.video,
            self.tokenizer,
            question.text,
            return_history=False,
            generation_config={"max_new_tokens": 24},
            dense_chunks=dense_chunks,
        )

    def evidence(self, question) -> set[int]:
        spans = self.video.chunks(self.model.config.sparse_attention.decode_chunk_groups)
        return {
            number
            for number, (begin, stop) in enumerate(spans)
            for start, end in question.evidence
            if begin < max(end, start + 1e-6) and start < stop
        }

    def look(self, question, seen):
        """Calls `seen(dense video, question embeddings)` where the model would choose."""

        def scores(dense, embeddings):
            seen(dense, embeddings)
            return [0.0] * len(dense.chunks)

        with patch.object(DenseVideo, "scores", scores):
            self.ask(question)


def calibrate(model, tokenizer, args) -> list[tuple[int, int]]:
    """The heads that most often give the chunk of the card that is asked for most."""
    hits = 0
    for number in range(args.calibration_clips):
        kinds = ("needle", "when_card")
        asked = Asked(model, tokenizer, make_clip(10**6 + number, "train", args.seconds, kinds=kinds, size=args.size))
        for question in asked.clip.questions:
            needed = asked.evidence(question)

            def seen(dense, embeddings, needed=needed):
                nonlocal hits
                shares = Recorder(dense).shares((0, len(dense.chunks) - 1), embeddings)[:, :, -1]
                hits = hits + torch.isin(shares.argmax(-1), torch.tensor(sorted(needed))).double()

            asked.look(question, seen)
    order = hits.flatten().argsort(descending=True)[: max(2, round(0.05 * hits.numel()))]
    return [(int(place) // hits.shape[1], int(place) % hits.shape[1]) for place in order]


def measure(model, tokenizer, args) -> dict:
    """Per rule, for each question: answered right, all needed chunks chosen (None where too many), milliseconds."""
    layers = model.config.text_config.num_hidden_layers
    low, high = model.config.resolve_sparse_attention().reload["layers"]
    read, heads = slice(int(low * layers), int(high * layers)), calibrate(model, tokenizer, args)
    found, size = {"heads": heads}, model.config.sparse_attention.decode_chunk_groups

    def note(name, right, chosen=None, needed=frozenset(), took=None):
        inside = None if chosen is None or len(needed - ends) > args.count else needed <= {*chosen, *ends}
        found.setdefault(name, []).append((right, inside, took))

    for number in range(args.clips):
        asked = Asked(model, tokenizer, make_clip(number, "held_out", args.seconds, size=args.size))
        for question in asked.clip.questions:
            chosen, needed = {}, asked.evidence(question)
            answers = {}

            def answer(chunks, question=question, asked=asked, answers=answers):
                key = tuple(sorted(chunks))
                if key not in answers:
                    answers[key] = asked.ask(question, list(key))
                return answers[key]

            def tokens_of(chunks, answer=answer):
                ids = tokenizer(answer(chunks), add_special_tokens=False, return_tensors="pt").input_ids[:, :3]
                return model.get_input_embeddings()(ids)

            def seen(dense, embeddings, chosen=chosen, tokens_of=tokens_of):
                chosen |= rules(Recorder(dense), embeddings, tokens_of, read, heads, args.count)

            ends = {0, len(asked.video.chunks(size)) - 1}
            asked.look(question, seen)
            for name, (chunks, took) in chosen.items():
                note(name, right(answer(chunks), question), chunks, needed, took)
            if size > 1:
                keys = asked.video.cache.layers[0].keys
                with patch.object(bilevel_videoxl, "chunks_of", partial(chunks_at_changes, keys)):
                    note("chunks that end at changes", right(asked.ask(question), question))
            note("no further chunk", right(answer([]), question), [], needed)
            with decoding(model, "full"):
                note("full decoding", right(asked.ask(question), question))
    return found


def right(answer: str, question) -> bool:
    return answer.strip().rstrip(".").lower() == question.answer.rstrip(".").lower()


def decoding(model, decode):
    return patch.object(
        model.config, "sparse_attention", {**model.config.sparse_attention.to_dict(), "decode": decode}
    )


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    arguments.add_argument("--model", default=str(ROOT), help="checkpoint folder in this project's format")
    arguments.add_argument("--clips", type=int, default=24, help="held-out clips")
    arguments.add_argument("--calibration-clips", type=int, default=12, help="training clips with cards")
    arguments.add_argument("--seconds", type=int, default=64, help="of a clip, one frame a second")
    arguments.add_argument("--count", type=int, default=3, help="chunks that a rule chooses")
    arguments.add_argument("--decode-chunk-groups", type=int, default=1, help="groups in a chunk")
    args = parse(arguments)
    model = VideoXLForConditionalGeneration.from_pretrained(args.model).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    args.size = min(model.config.vision_config.image_size, 224)
    reload = dict(model.config.resolve_sparse_attention().reload) | {"count": args.count, "share": None}
    settings = {"decode": "bilevel", "decode_chunk_groups": args.decode_chunk_groups, "reload": reload}
    model.config.sparse_attention = model.config.sparse_attention.to_dict() | settings
    found = measure(model, tokenizer, args)
    rows, results = [], [{"calibrated_heads": found.pop("heads")}]
    for name, notes in found.items():
        rights, inside, took = zip(*notes, strict=True)
        inside, took = ([value for value in values if value is not None] for values in (inside, took))
        result = {"rule": name, "questions": len(rights), "right": mean(map(float, rights))}
        result["needed_chunks_chosen"] = mean(map(float, inside)) if inside else None
        result["milliseconds"] = median(took) if took else None
        results.append(result)
        rows.append(["-" if value is None else value for value in result.values()])
    args.model = "bundled"
    table(["rule", "questions", "right", "needed chunks chosen", "ms to choose"], rows)
    report("choice", args, results)


if __name__ == "__main__":
    main()
