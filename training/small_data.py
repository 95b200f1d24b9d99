"""Batches of the small model's stages, drawn from clips of the world by seed and number: groups to see, clips to read.

B clips in a batch, R rows of questions, P positions of a clip's prompt, L of the longest row, F frames, G groups, T
frames a group, N visual tokens a group, K facts a token, S image side, n positions that are left of a mixed prompt.
"""

import random
from dataclasses import replace

import numpy as np
import torch
from videoxl.training.collator import IGNORE
from videoxl.training.data import stretch_positions
from videoxl.training.looks import LOOKS, looks_of, option_lines
from videoxl.training.slots import FRAMES, NUM_SLOTS, STORY, facts_of, patches_of, places_of, story_of
from videoxl.video_world import (
    COLORS,
    NOT_THERE,
    SHAPES,
    SIZES,
    Item,
    Question,
    absent_keys,
    make_clip,
    name_of,
    needle_questions,
)
from videoxl.video_world.questions import LETTERS, TEXTS

SEEDS = 2**40  # clips to draw from
MOST_TURNS = 6  # of a conversation
PATCH_SIZE = 8  # of the small model's tower, in pixels
PADDED_ROWS = 12  # at least so many rows are padded to one length


def normalise(frames: np.ndarray, processor) -> torch.Tensor:
    """Frames as the tower takes them. uint8 [F, S, S, 3] -> float32 [F, 3, S, S]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - mean) / std


def crowded(clip, rng, moving: float = 0.0):
    """A clip with up to six shapes side by side, four times as much to see as usually.

    Args:
        clip: Whose background it has.
        rng: Draws it.
        moving: Share of the lanes in which one shape moves instead.
    """
    items, shapes = [], rng.sample(SHAPES, len(SHAPES))
    for lane in (0, 1):
        if moving and rng.random() < moving:
            way, length = (
                rng.choice(("up", "down") if clip.columns else ("left", "right")),
                rng.randint(3, clip.seconds),
            )
            begin = rng.randint(0, clip.seconds - length)
            color, size = rng.choice(list(COLORS)), rng.choice(list(SIZES))
            items.append(Item(((begin, begin + length),), lane, 0.5, color, shapes.pop(), size, direction=way))
            continue
        places = (0.16, 0.5, 0.84) if rng.random() < 0.7 else (0.25, 0.75)
        for place in places:
            begin = rng.randrange(max(clip.seconds - 1, 1))
            end = rng.randint(begin + 1, clip.seconds)
            color, new = rng.sample(list(COLORS), 2)
            size = "small" if len(places) == 3 else rng.choice(list(SIZES))
            change = (rng.randrange(begin + 1, end), new) if end > begin + 1 and rng.random() < 0.3 else None
            place += rng.uniform(-0.04, 0.04)
            items.append(Item(((begin, end),), lane, place, color, shapes.pop(), size, change=change))
    return replace(clip, items=tuple(items))


class GroupBatches:
    """Batches of groups of frames, each group with its facts.

    Args:
        sources: Each a dict: `share` (of the clips), `clip` (arguments of `make_clip`), `sample_fps` (one or several),
            `crowd` (whether all shapes may stand side by side) and `moving`, see `crowded`, `from` (the first batch
            that may draw it).
        processor: The model's.
        seed: Of everything that is drawn.
        split: Of the world.
        groups: In a batch; four of one clip.
    """

    def __init__(self, sources: list[dict], processor, seed: int, split: str = "train", groups: int = 64):
        self.sources, self.processor, self.seed, self.split, self.groups = sources, processor, seed, split, groups
        self.side = processor.image_size // PATCH_SIZE

    def __getitem__(self, index: int) -> dict:
        """`pixels` [G, T, 3, S, S], `facts` [G, N, K], `patches` and `places` (see `patches_of`, `places_of`)."""
        rng, pixels, facts, patches, places = random.Random(f"{self.seed}-{index}"), [], [], [], []
        while len(facts) < self.groups:
            source = _drawn(self.sources, index, rng)
            clip = make_clip(
                rng.randrange(SEEDS), self.split, size=self.processor.image_size, num_questions=0, **source["clip"]
            )
            if source.get("crowd"):
                clip = crowded(clip, rng, source.get("moving", 0.0))
            for _ in range(4):
                rate = float(rng.choice(_listed(source.get("sample_fps", 1))))
                last = max(int(clip.seconds * rate) - FRAMES, 0)
                first = rng.randint(0, last)
                if clip.cards and rng.random() < 0.5:
                    # Most groups show no card, and cards are the hardest to read.
                    card = rng.choice(clip.cards)
                    first = min(max(int(card.second * rate) - rng.randrange(FRAMES), 0), last)
                times = [min(first + number, int(clip.seconds * rate) - 1) / rate for number in range(FRAMES)]
                pixels.append(normalise(clip.frames(times), self.processor))
                facts.append(torch.from_numpy(facts_of(clip, times)))
                patches.append(torch.from_numpy(patches_of(clip, times, self.side)))
                places.append(torch.from_numpy(places_of(clip, times)))
        batch = {"pixels": pixels, "facts": facts, "patches": patches, "places": places}
        return {name: torch.stack(values) for name, values in batch.items()}


class ClipBatches:
    """Batches of clips with questions; one item is a batch.

    Args:
        sources: Each a dict: `share` (of the batches), `clips` (B), `questions` (a clip), `clip` (arguments of
            `make_clip`), `sample_fps` (one or several), `talk` (share of what is asked in conversations), `segments`
            (clips one after the other, whose cards are asked for), `kinds` (of the questions about segments, see
            `needle_questions`), `time_offset_max`, `gaps` (seconds that may be missing between groups), `stretch`
            (positions reach up to it in half of the batches), `streaming` (windows of the prefill in chunks, 0 for
            none, to draw from), `mix` (share of the groups that stay dense while the others are pooled, as in bi-level
            decoding; only what is seen in those is asked), `from` (the first batch that may draw it).
        processor: The model's.
        seed: Of everything that is drawn.
        split: Of the world.
        frames: Whether pictures are drawn.
    """

    def __init__(self, sources: list[dict], processor, seed: int, split: str = "train", frames: bool = False):
        self.sources, self.processor, self.seed, self.split, self.frames = sources, processor, seed, split, frames
        self.tokenizer = processor.tokenizer
        text = processor.render([{"role": "user", "content": [{"type": "video"}]}], add_generation_prompt=False)
        self.head = self._encode(text.partition(processor.video_token)[0])
        # Of a conversation's later questions: between an answer and the question's line.
        self.turn = self._encode("\n<|im_start|>user")
        self.seconds = self._encode("2 seconds")[-1]
        self.letters = [self._encode(letter)[0] for letter in LETTERS]

    def __getitem__(self, index: int) -> dict:
        """A batch: `ids` and `positions` of the prompts [B, P], `facts` [B, G, N, K] or `pixels` [B, F, 3, S, S],
        `story` (dict of [B, G, N]), the `window` of the prefill, perhaps `mix` [B, n, P] (what the kept
        positions are made of), and `asked`: rows of questions, see `_pad`."""
        rng = random.Random(f"{self.seed}-{index}")
        source = _drawn(self.sources, index, rng)
        rate = float(rng.choice(_listed(source.get("sample_fps", 1))))
        limit = source.get("time_offset_max", 0)
        common = float(rng.randint(0, limit))  # with as many tokens for the times of each clip
        facts, stories, pixels, asked, batch, gaps = [], [], [], [], {}, None
        for row in range(source["clips"]):
            start = common if limit > 900 else float(rng.randint(0, limit))
            clips, questions = self._clips(source, start, rng)
            times = [clip.start + number / rate for clip in clips for number in range(int(clip.seconds * rate))]
            per_clip = len(times) // len(clips)
            groups = np.array(times + times[-1:] * (-len(times) % FRAMES)).reshape(-1, FRAMES)
            shown = np.stack([facts_of(clips[number * FRAMES // per_clip], g) for number, g in enumerate(groups)])
            facts.append(shown)
            if len(clips) == 1:
                stories.append(story_of(shown, groups))
            if self.frames:
                drawn = np.concatenate([clip.frames(times[n * per_clip :][:per_clip]) for n, clip in enumerate(clips)])
                pixels.append(normalise(drawn, self.processor))
            gaps = np.cumsum(_gaps(len(groups), source.get("gaps", 0), rng)) if row == 0 else gaps
            ids = self._prompt(groups[:, 0] + gaps)
            batch.setdefault("ids", []).append(ids)
            visual, keep = np.equal(ids, self.processor.video_token_id), None
            if "mix" in source:
                keep = _dense_groups(shown, source["mix"], rng)
                questions = [question for question in questions if _seen_in(question, groups, keep)]
                batch.setdefault("mix", []).append(_mixing(visual, keep))
            asked += [(row, question, self._looks(question, groups, visual, keep)) for question in questions]
        batch["ids"] = torch.tensor(batch["ids"])
        batch["positions"] = self._positions(batch["ids"], source.get("stretch", 0), rng)
        batch["facts"] = torch.from_numpy(np.stack(facts))
        batch["window"] = rng.choice(_listed(source.get("streaming", 0)))
        if stories:
            batch["story"] = {kind: torch.from_numpy(np.stack([s[kind] for s in stories])) for kind in STORY}
        if pixels:
            batch["pixels"] = torch.stack(pixels)
        if "mix" in batch:
            batch["mix"] = torch.from_numpy(np.stack(batch["mix"]))
        prompt = batch["mix"].shape[1] if "mix" in batch else batch["ids"].shape[1]
        batch["asked"] = self._ask(asked, prompt, source.get("talk", 0.0), rng)
        return batch

    def _clips(self, source, start, rng):
        """Clips one after the other (mostly one), and questions about them."""
        options = {"size": self.processor.image_size, **source["clip"]}
        segments, seed = source.get("segments", 1), rng.randrange(SEEDS)
        if segments == 1:
            clip = make_clip(seed, self.split, start=start, num_questions=source["questions"], **options)
            return [clip], list(clip.questions)
        seconds, choice = options["seconds"], options.get("choice_share", 0.0)
        clips = [
            make_clip(rng.randrange(SEEDS), self.split, start=start + number * seconds, num_questions=0, **options)
            for number in range(segments)
        ]
        cards = [
            type(card)(int(clip.start - start) + card.second, card.key, card.value, card.seconds)
            for clip in clips
            for card in clip.cards
        ]
        keys, words = [card.key for card in cards], [card.value for card in cards]
        draw, good = np.random.default_rng(seed), []
        wordings = options.get("wordings", 2)
        for kind in source.get("kinds", ("single", "multi_hop")):
            for question in needle_questions(cards, kind, draw, choice, start, wordings):
                named = [key for key in keys if _named(key, question.text)]
                chain = question.type != "two_hop" or words.count(question.answer.partition(",")[0]) == 1
                if len(named) == 1 and chain:
                    good.append(question)
        whole = ((start, start + segments * seconds),)
        for key in absent_keys(keys, draw)[: len(good) // 5]:
            text = TEXTS["needle"][draw.integers(wordings)].format(key=name_of(key))
            good.append(Question("absent_card", text, NOT_THERE, None, whole))
        draw.shuffle(good)
        return clips, good[: source["questions"]]

    def _prompt(self, begins) -> list[int]:
        ids = list(self.head)
        for begin in begins:
            ids += self._encode(self.processor.time_format.format(seconds=float(begin)))
            ids += [self.processor.video_token_id] * NUM_SLOTS
        return ids

    def _encode(self, text) -> list[int]:
        return self.tokenizer.encode(text)

    def _positions(self, ids, limit, rng):
        positions = torch.arange(ids.shape[1])
        if limit and rng.random() < 0.5:
            positions = stretch_positions(ids[0], self.processor, limit, np.random.default_rng(rng.randrange(SEEDS)))
        return positions.expand(len(ids), -1)

    def _looks(self, question, groups, visual, keep):
        """Where a question's answer is read, as positions of the prompt that are left of it."""
        looks = looks_of(question, groups, visual)
        if keep is not None:
            kept = _mixing(visual, keep) == 1  # what was pooled is no place to look at
            looks = [(kind, begin, kept @ places > 0) for kind, begin, places in looks]
        return [look for look in looks if look[2].any()]

    def _ask(self, asked, prompt, talk, rng) -> list[dict]:
        """Rows of one question or of a conversation, in batches of about the same length."""
        rng.shuffle(asked)
        by_clip, rows = {}, []
        for clip, question, looks in asked:
            by_clip.setdefault(clip, []).append((question, looks))
        for clip, questions in by_clip.items():
            while questions:
                turns = rng.randint(2, MOST_TURNS) if rng.random() < talk else 1
                rows.append(self._row(clip, questions[:turns], prompt))
                del questions[:turns]
        rows.sort(key=lambda row: len(row["ids"]))
        size = max(PADDED_ROWS, -(-len(rows) // 5))
        return [self._pad(rows[begin : begin + size], prompt) for begin in range(0, len(rows), size)]

    def _row(self, clip, turns, prompt) -> dict:
        row = {"clip": clip, "ids": [], "labels": [], "owners": [], "types": [], "looks": []}
        for number, (question, look) in enumerate(turns):
            row["ids"] += self.turn if number else []
            row["labels"] += [IGNORE] * (len(row["ids"]) - len(row["labels"]))
            base = len(row["ids"])
            before = self._encode(f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer = self._encode(f"{question.answer}<|im_end|>")
            row["labels"] += [IGNORE] * len(before) + answer
            row["ids"] += before + answer
            row["owners"] += [number] * (len(row["ids"]) - len(row["owners"]))
            row["types"].append(question.type + "+" * (question.choices is not None))
            ends = {"": len(before) - 1, "article": len(before), "answer": len(before) + len(answer) - 3}
            row["looks"] += [
                (kind, base + (ends[text] if text in ends else self._length(text) - 1), places.nonzero()[0], None)
                for kind, text, places in look
            ]
            if question.choices is None:
                continue
            for option, line in enumerate(option_lines(question)):
                letter, start, stop = (self._length(text) for text in line)
                # An option's last word and the end of its line should know its letter.
                where = np.array([prompt + base + letter - 1])
                row["looks"] += [("letter", base + place, where, before[letter - 1]) for place in (stop - 1, stop)]
                if question.answer == LETTERS[option]:
                    word = self._word(before[start:stop])
                    row["looks"].append(("choice", base + ends[""], prompt + base + np.arange(start, stop + 1), word))
        return row

    def _pad(self, rows, prompt) -> dict:
        """`rows` (of the batch) [R]; `ids`, `labels`, `owners` [R, L] (which question a label is of, counted over all
        rows); `types`; and `looks`: per kind of `LOOKS` rows [M], the places in the row to look from [M] and positions
        of prompt and row to look at [M, P + L]; of options also which `word`, of the tokens `among` which it is,
        should be known there."""
        length, types, looks = max(len(row["ids"]) for row in rows), [], {}
        ids, labels, owners = (torch.full((len(rows), length), fill) for fill in (0, IGNORE, 0))
        for number, row in enumerate(rows):
            stop = len(row["ids"])
            ids[number, :stop], labels[number, :stop] = torch.tensor(row["ids"]), torch.tensor(row["labels"])
            owners[number, :stop] = torch.tensor(row["owners"]) + len(types)
            types += row["types"]
        for kind in LOOKS:
            found = [
                (number, *look[1:]) for number, row in enumerate(rows) for look in row["looks"] if look[0] == kind
            ]
            if not found:
                continue
            places = torch.zeros(len(found), prompt + length, dtype=torch.bool)
            for look, (_, _, where, _) in zip(places, found, strict=True):
                look[where] = True
            looks[kind] = {
                "rows": torch.tensor([number for number, *_ in found]),
                "place": torch.tensor([place for _, place, *_ in found]),
                "look": places,
            }
            if kind == "letter":
                letters = [self.letters.index(word) for *_, word in found]
                looks[kind] |= {"word": torch.tensor(letters), "among": torch.tensor(self.letters)}
            if kind == "choice":
                looks[kind]["word"] = torch.tensor([word for *_, word in found])
        clips = torch.tensor([row["clip"] for row in rows])
        return {"rows": clips, "ids": ids, "labels": labels, "owners": owners, "types": types, "looks": looks}

    def _word(self, ids) -> int:
        """The token that tells an option from others, of its words: the last one, or its number."""
        return ids[-2] if ids[-1] == self.seconds else ids[-1]

    def _length(self, text) -> int:
        return len(self._encode(f"\n{text}"))


def _drawn(sources, index, rng) -> dict:
    """One of the sources that batch `index` may draw, by their shares."""
    ready = [source for source in sources if source.get("from", 0) <= index]
    return rng.choices(ready, [source.get("share", 1.0) for source in ready])[0]


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _named(key, text) -> bool:
    return f"word {key}" in text if isinstance(key, str) else " ".join(key) in text


def _gaps(groups, limit, rng) -> list[int]:
    """Seconds missing before each group, `limit` at most in all: now and then a long gap."""
    gaps, left = [0] * groups, rng.randint(0, limit)
    while left > 0:
        part = rng.randint(1, left)
        gaps[rng.randrange(groups)] += part
        left -= part
    return gaps


def _dense_groups(shown, share, rng) -> np.ndarray:
    """Which groups stay dense, bool [G]: the first, the last, most of those with cards, and others."""
    cards = shown[:, NUM_SLOTS - 1].sum(axis=1) > 1  # more than which slot it is
    rank = np.array([rng.random() - 0.5 * card for card in cards])
    rank[[0, -1]] = -1
    keep = np.zeros(len(shown), bool)
    keep[np.argsort(rank)[: max(2, round(share * len(shown)))]] = True
    return keep


def _seen_in(question, groups, keep) -> bool:
    """Whether a question can be answered from the groups that stay dense: what is known at the end, or seen there."""
    first, last = groups[0, 0], groups[-1, -1]
    for begin, end in question.evidence:
        if begin <= first and end >= last:
            continue
        inside = ((groups >= begin) & (groups < end)).any(axis=1)
        if (inside & ~keep).any() or not inside.any():
            return False
    return True


def _mixing(visual, keep) -> np.ndarray:
    """What each kept position is made of, float32 [n, P]: itself, or the mean of a pooled group's visual tokens."""
    matrix, group = [], -1
    places = np.flatnonzero(visual).reshape(-1, NUM_SLOTS)
    for place in range(len(visual)):
        group += visual[place] and place == places[min(group + 1, len(places) - 1), 0]
        if not visual[place] or keep[group]:
            matrix.append(np.eye(1, len(visual), place, dtype=np.float32)[0])
        elif place == places[group, 0]:
            matrix.append(np.zeros(len(visual), np.float32))
            matrix[-1][places[group]] = 1 / NUM_SLOTS
    return np.stack(matrix)
