"""Conversations as training samples: messages become token ids whose labels are what the assistant says.

What is surprising:
* Prompts come from the processor alone, so training sees exactly the ids that `generate` sees. The published code
  differs: it writes the newline behind the video twice in training.
* Only what the model has to write carries loss: the assistant's content and its `<|im_end|>`. The published code also
  supervises `<|im_start|>`, `<|im_end|>` and the newline behind it of every turn, system and user included; that
  teaches nothing that is ever generated.
* Batches are padded on the right: attention is causal, so padding that has no label changes nothing that counts.

B batch, L sequence, F frames, T tiles, S image side.
"""

import re

import torch

# What the loss leaves out (PyTorch's and transformers' convention).
IGNORE = -100

# Where an item of a message names its source.
SOURCES = {"video": ("video", "video_path", "path", "url"), "image": ("image", "path", "url")}
# How other trainers' data mark the place of a video or image in a text.
MARKERS = {"<video>": "video", "<image>": "image"}


class VideoXLCollator:
    """Makes batches of conversations, for any trainer that calls `model(**batch).loss`.

    Each example is a dict with `messages` as `apply_chat_template` takes them, the last one the assistant's. Its
    videos and images are items of the messages, or lie in `videos` and `images` and stand in the texts as `<video>`
    and `<image>` (the form of LLaMA-Factory and ms-swift). `Trainer` needs `remove_unused_columns=False`.

    Args:
        processor: The checkpoint's processor.
        max_length: Longest sequence in tokens; a longer one is an error, as nothing is ever cut. None for no limit.
        logits_where_labelled: Also gives `logits_to_keep`, so that the model computes logits only where a label
            follows: no [L, vocabulary] for the visual tokens. Not for trainers that look at `logits` themselves (trl,
            label smoothing).
        **video: How video files are sampled, see the processor: `max_num_frames`, `sample_fps`, `max_sample_fps`.
    """

    def __init__(self, processor, max_length: int | None = None, logits_where_labelled: bool = False, **video):
        self.processor, self.max_length, self.video = processor, max_length, video
        self.logits_where_labelled = logits_where_labelled

    def __call__(self, examples: list[dict]) -> dict:
        """A batch.

        Returns:
            `input_ids`, `attention_mask` and `labels` [B, L], and where there are any `pixel_values_videos`, the list
            of all videos [F, 3, S, S] and images [T, 1, 3, S, S].

        Raises:
            ValueError: If an example cannot be used. Nothing is left out silently.
        """
        samples = []
        for number, example in enumerate(examples):
            try:
                messages, _ = conversation_of(example)
                samples.append(encode_messages(self.processor, messages, **self.video))
            except (ValueError, OSError) as error:  # noqa: PERF203 - says which
                raise ValueError(f"example {number} of the batch cannot be used: {error}") from error
            count = len(samples[-1]["input_ids"])
            if self.max_length is not None and count > self.max_length:
                raise ValueError(
                    f"example {number} of the batch has {count} tokens, max_length is {self.max_length}: leave it "
                    "out or take fewer frames; nothing is cut"
                )
        batch = pad_samples(samples, self.processor.tokenizer)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        if videos := [video for sample in samples for video in sample["pixel_values_videos"]]:
            batch["pixel_values_videos"] = videos
        if self.logits_where_labelled:
            batch["logits_to_keep"] = labelled_columns(batch["labels"])
        return batch


def encode_messages(processor, messages: list[dict], **video) -> dict:
    """One conversation as a sample.

    Returns:
        `input_ids` and `labels` [L], `pixel_values_videos` (list of [F, 3, S, S] and, for images, [T, 1, 3, S, S])
        and `spans`, where the answers stand.
    """
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **video)
    ids = inputs["input_ids"][0]
    spans = answer_spans(ids, processor.tokenizer, messages)
    return {
        "input_ids": torch.tensor(ids),
        "labels": mask_labels(ids, spans),
        "pixel_values_videos": list(inputs.get("pixel_values_videos", ())),
        "spans": spans,
    }


def pad_samples(samples: list[dict], tokenizer) -> dict:
    """`input_ids` and `labels` [B, L] of samples, padded on the right."""
    length = max(len(sample["input_ids"]) for sample in samples)
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = {}
    for name, value in (("input_ids", filler), ("labels", IGNORE)):
        batch[name] = torch.full((len(samples), length), value)
        for row, sample in zip(batch[name], samples, strict=True):
            row[: len(sample[name])] = sample[name]
    return batch


def labelled_columns(labels: torch.Tensor) -> torch.Tensor:
    """[n] positions before a label in any row of [B, L]; at least one, whose loss is zero, that always exists."""
    columns = labels[:, 1:].ne(IGNORE).any(dim=0).nonzero().flatten()
    return columns if len(columns) else columns.new_full((1,), labels.shape[1] - 1)


def conversation_of(example: dict, read_item=dict, answers: bool = True) -> tuple[list[dict], list[str]]:
    """The messages of an example, its media in their places; see `read_training_messages`."""
    if not isinstance(example, dict) or not isinstance(example.get("messages"), list):
        raise ValueError("messages must be a list of {'role': ..., 'content': text or items}, in a dict")
    media = {kind: example.get(f"{kind}s") for kind in SOURCES}
    messages = example["messages"]
    if any(sources is not None for sources in media.values()):
        messages = place_media(messages, media)
    return read_training_messages(messages, read_item, answers)


def place_media(messages: list[dict], media: dict) -> list[dict]:
    """Puts videos and images where their markers stand in the texts, as items.

    Args:
        messages: Their content is text, or items already.
        media: `video` and `image`: a list of sources each, or one, or None.

    Raises:
        ValueError: If there are more markers than sources, or fewer.
    """
    given = {kind: [] if value is None else value for kind, value in media.items()}
    listed = {kind: value if isinstance(value, list) else [value] for kind, value in given.items()}
    waiting, placed = {kind: iter(sources) for kind, sources in listed.items()}, []
    counts = dict.fromkeys(listed, 0)
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            placed.append(message)
            continue
        items = []
        for piece in re.split("(<video>|<image>)", content):
            if kind := MARKERS.get(piece):
                counts[kind] += 1
                items.append({"type": kind, kind: next(waiting[kind], None)})
            elif text := piece.removeprefix("\n") if items else piece.strip() and piece:
                items.append({"type": "text", "text": text})
        placed.append(message | {"content": items if visual_items({"content": items}) else content})
    for kind, sources in listed.items():
        if counts[kind] != len(sources):
            raise ValueError(
                f"{kind}s has {len(sources)} entries, and the texts have {counts[kind]} times <{kind}>: each needs one"
            )
    return placed


def read_training_messages(messages, read_item=dict, answers=True) -> tuple[list[dict], list[str]]:
    """Checks a conversation of `{"role", "content"}` messages, whose videos and images stand where they belong.

    Args:
        messages: Content is text or a list of items; a user's message may carry a `type` (of the question).
        read_item: What becomes of a video or image item.
        answers: False where only the items count.

    Returns:
        Messages, and per assistant message the type of the question before it ("" if there is none).

    Raises:
        ValueError: If there is no answer, the last message is none, or an answer is empty or holds a video.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of {'role': ..., 'content': text or items}")
    read, types, kind = [], [], ""
    for number, message in enumerate(messages):
        content, visuals = message.get("content"), visual_items({"content": message.get("content")})
        if isinstance(content, (list, tuple)):
            # Tables give every item the keys of all others, with null in them.
            content = [
                read_item(item) if any(item is visual for visual in visuals) else _without_nulls(item)
                for item in content
            ]
        read.append({"role": message.get("role"), "content": content})
        if message.get("role") == "assistant":
            texts = [content] if isinstance(content, str) else [item.get("text") for item in content or ()]
            if visuals or not any(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"message {number} of the assistant must be text that is not empty")
            types.append(kind)
        kind = message.get("type") or "" if message.get("role") == "user" else kind
    if answers and (not types or read[-1]["role"] != "assistant"):
        raise ValueError("messages must end with the assistant's answer")
    return read, types


def _without_nulls(item):
    return {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item


def visual_items(message: dict) -> list[dict]:
    """The videos and images of a message."""
    content = message["content"]
    listed = content if isinstance(content, (list, tuple)) else []
    return [item for item in listed if isinstance(item, dict) and item.get("type") in SOURCES]


def answer_spans(ids: list[int], tokenizer, messages: list[dict]) -> list[tuple[int, int]]:
    """Where the assistant's tokens stand in an expanded prompt, each answer with its `<|im_end|>`.

    Args:
        ids: Token ids of the whole conversation.
        tokenizer: The checkpoint's.
        messages: The conversation that `ids` were rendered from.

    Returns:
        (start, stop) per assistant message.

    Raises:
        ValueError: If a text holds chat markers, so that turns cannot be told apart.
    """
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    header = [begin, *tokenizer("assistant\n", add_special_tokens=False)["input_ids"]]
    total = len(messages) + (messages[0]["role"] != "system")
    if ids.count(begin) != total or ids.count(end) != total:
        raise ValueError("a text of the conversation contains <|im_start|> or <|im_end|>; remove it")
    spans, cursor = [], 0
    for message in messages:
        if message["role"] != "assistant":
            continue
        while ids[cursor : cursor + len(header)] != header:
            cursor = ids.index(begin, cursor + 1)
        start = cursor + len(header)
        cursor = ids.index(end, start) + 1
        spans.append((start, cursor))
    return spans


def mask_labels(ids: list[int], spans: list[tuple[int, int]]) -> torch.Tensor:
    """Labels [L]: the ids inside the spans, `IGNORE` elsewhere."""
    labels = torch.full((len(ids),), IGNORE)
    for start, stop in spans:
        labels[start:stop] = torch.tensor(ids[start:stop])
    return labels
