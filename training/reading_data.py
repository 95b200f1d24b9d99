"""Batches of clips of the world with many questions each, for `pretrain_reading.py`; drawn from seed and number.

B clips in a batch, R questions, P positions of a clip's prompt, L of the longest question, F frames, G groups,
N visual tokens a group, K facts a token, S image side.
"""

import random

import numpy as np
import torch
from torch.utils.data import Dataset
from videoxl.training.collator import IGNORE
from videoxl.training.data import stretch_positions
from videoxl.training.looks import LOOKS, looks_of, option_lines
from videoxl.training.pretrain_vision import normalise
from videoxl.training.slots import FRAMES, NUM_SLOTS, STORY, facts_of, story_of
from videoxl.video_world import make_clip, needle_questions
from videoxl.video_world.questions import LETTERS


class ClipBatches(Dataset):
    """Batches of clips with questions; one item is a batch.

    Args:
        sources: Each a dict: `share` (of the batches), `clips` (B), `questions` (a clip), `clip` (arguments of
            `make_clip`), `sample_fps` (one or several), `time_offset_max`, `stretch` (positions reach up to it in half
            of the batches), `segments` (clips one after the other, whose cards are asked for).
        processor: The model's.
        seed: Of everything that is drawn.
        size: Number of batches.
        frames: Whether pictures are drawn.
    """

    def __init__(self, sources: list[dict], processor, seed: int, size: int, frames: bool, split: str = "train"):
        self.sources, self.processor, self.seed, self.size = sources, processor, seed, size
        self.frames, self.split = frames, split
        self.tokenizer = processor.tokenizer
        text = processor.render([{"role": "user", "content": [{"type": "video"}]}], add_generation_prompt=False)
        self.head = self.tokenizer.encode(text.partition(processor.video_token)[0])
        self._ids = {}
        self.seconds = self.tokenizer.encode("2 seconds")[-1]
        self.letters = [self.tokenizer.encode(letter)[0] for letter in LETTERS]

    def __len__(self):
        return self.size

    def __getitem__(self, index: int) -> dict:
        """A batch: `ids` and `positions` of the prompts [B, P], `facts` [B, G, N, K] or `pixels` [B, F, 3, S, S],
        `story` (dict of [B, G, N]), and `asked`: per length class `rows` (of the batch) [R], `ids`, `labels` [R, L],
        `types` and `looks` (per kind of `LOOKS` rows [M], places in the question from where to look [M] and positions
        of prompt and question to look at [M, P + L]; of options also which `word`, of the tokens `among` which it is,
        should be known there)."""
        rng = random.Random(f"{self.seed}-{index}")
        source = rng.choices(self.sources, [item.get("share", 1.0) for item in self.sources])[0]
        rates = source.get("sample_fps", 1)
        rate = float(rng.choice(rates if isinstance(rates, list) else [rates]))
        prompts, facts, stories, pixels, questions = [], [], [], [], []
        for row in range(source["clips"]):
            start = float(rng.randint(0, source.get("time_offset_max", 0)))
            clips, asked = self._clips(source, start, rng)
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
            prompts.append(self._prompt(groups[:, 0]))
            visual = np.equal(prompts[-1], self.processor.video_token_id)
            questions += [(row, question, looks_of(question, groups, visual)) for question in asked]
        ids = torch.tensor(prompts)
        batch = {
            "ids": ids,
            "positions": self._positions(ids, source.get("stretch", 0), rng),
            "facts": torch.from_numpy(np.stack(facts)),
            "asked": self._ask(questions, ids.shape[1]),
        }
        if stories:
            batch["story"] = {kind: torch.from_numpy(np.stack([s[kind] for s in stories])) for kind in STORY}
        if pixels:
            batch["pixels"] = torch.stack(pixels)
        return batch

    def _clips(self, source, start, rng):
        options, size = dict(source["clip"]), self.processor.image_size
        seconds, segments = options.pop("seconds"), source.get("segments", 1)
        if segments == 1:
            seed = rng.randrange(2**40)
            clip = make_clip(
                seed, self.split, seconds, size=size, start=start, num_questions=source["questions"], **options
            )
            return [clip], list(clip.questions)
        options.pop("kinds", None)
        choice = options.pop("choice_share", 0.0)
        clips = [
            make_clip(
                rng.randrange(2**40),
                self.split,
                seconds,
                size=size,
                start=start + n * seconds,
                num_questions=0,
                **options,
            )
            for n in range(segments)
        ]
        cards, taken = [], set()
        for clip in clips:
            for card in clip.cards:
                second = int(clip.start - start) + card.second
                cards.append(type(card)(second, card.key, card.value, card.seconds))
                taken.add(card.key)
        keys = [card.key for card in cards]
        words = [card.value for card in cards]
        alone = {card.key for card in cards if keys.count(card.key) == 1}
        draw = np.random.default_rng(rng.randrange(2**40))
        questions = []
        for kind in source.get("kinds", ("single", "multi_hop")):
            questions += needle_questions(cards, kind, draw, choice, start)
        good = []
        for question in questions:
            named = [key for key in keys if _named(key, question.text)]
            chain = question.type == "two_hop"
            if all(key in alone for key in named) and (
                not chain or words.count(question.answer.partition(",")[0]) == 1
            ):
                good.append(question)
        draw.shuffle(good)
        return clips, good[: source["questions"]]

    def _prompt(self, begins) -> list[int]:
        ids = list(self.head)
        for begin in begins:
            ids += self._encode(self.processor.time_format.format(seconds=float(begin)))
            ids += [self.processor.video_token_id] * NUM_SLOTS
        return ids

    def _encode(self, text) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text)
        return self._ids[text]

    def _positions(self, ids, limit, rng):
        positions = torch.arange(ids.shape[1])
        if limit and rng.random() < 0.5:
            positions = stretch_positions(ids[0], self.processor, limit, np.random.default_rng(rng.randrange(2**40)))
        return positions.expand(len(ids), -1)

    def _ask(self, questions, prompt):
        asked = []
        for options in (False, True):
            chosen = [entry for entry in questions if (entry[1].choices is not None) == options]
            if not chosen:
                continue
            rows = []
            for row, question, look in chosen:
                before = self.tokenizer.encode(f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
                answer = self.tokenizer.encode(f"{question.answer}<|im_end|>")
                ends = {"": len(before) - 1, "article": len(before), "answer": len(before) + len(answer) - 3}
                looks = [
                    (kind, ends[text] if text in ends else self._length(text) - 1, places.nonzero()[0])
                    for kind, text, places in look
                ]
                if options:
                    for number, line in enumerate(option_lines(question)):
                        letter, start, stop = (self._length(text) for text in line)
                        # An option's last word and the end of its line should know its letter.
                        looks += [("letter", place, np.array([prompt + letter - 1])) for place in (stop - 1, stop)]
                        if question.answer == LETTERS[number]:
                            looks.append(("choice", ends[""], prompt + np.arange(start, stop + 1)))
                rows.append((row, before, answer, question.type, looks))
            # Short questions are not padded to the length of long ones.
            rows.sort(key=lambda row: len(row[1]) + len(row[2]))
            size = -(-len(rows) // (3 if len(rows) > 30 else 1))
            asked += [self._pad(rows[begin : begin + size], options, prompt) for begin in range(0, len(rows), size)]
        return asked

    def _pad(self, rows, options, prompt):
        length = max(len(before) + len(answer) for _, before, answer, *_ in rows)
        ids, labels = torch.full((len(rows), length), 0), torch.full((len(rows), length), IGNORE)
        for number, (_, before, answer, *_) in enumerate(rows):
            stop = len(before) + len(answer)
            ids[number, :stop] = torch.tensor(before + answer)
            labels[number, len(before) : stop] = torch.tensor(answer)
        looks = {}
        for kind in LOOKS:
            found = [(number, *look) for number, row in enumerate(rows) for look in row[-1] if look[0] == kind]
            if found:
                places = torch.zeros(len(found), prompt + length, dtype=torch.bool)
                for look, (*_, where) in zip(places, found, strict=True):
                    look[where] = True
                looks[kind] = {
                    "rows": torch.tensor([number for number, *_ in found]),
                    "place": torch.tensor([place for _, _, place, _ in found]),
                    "look": places,
                }
                if kind == "letter":
                    letters = [self.letters.index(rows[number][1][where[0] - prompt]) for number, *_, where in found]
                    looks[kind] |= {"word": torch.tensor(letters), "among": torch.tensor(self.letters)}
                if kind == "choice":
                    looks[kind]["word"] = torch.tensor(
                        [self._word(rows[number][1], where - prompt) for number, *_, where in found]
                    )
        return {
            "rows": torch.tensor([row for row, *_ in rows]),
            "ids": ids,
            "labels": labels,
            "types": [kind for *_, kind, _ in rows],
            "options": options,
            "looks": looks,
        }

    def _word(self, ids, where) -> int:
        """The token that tells an option from others, of those in a question: its last word, or its number."""
        text = [ids[place] for place in where[:-1]]
        return text[-2] if text[-1] == self.seconds else text[-1]

    def _length(self, text) -> int:
        return len(self.tokenizer.encode(f"\n{text}"))


def _named(key, text) -> bool:
    return f"word {key}" in text if isinstance(key, str) else " ".join(key) in text
