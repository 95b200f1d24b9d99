"""Training data as messages, several videos a sample, frames in folders and lists: what the model is shown."""

import json

import numpy as np
import torch
from PIL import Image
from videoxl.training.collator import IGNORE
from videoxl.training.data import BrokenSample, MixtureDataset

VIDEO = {"max_num_frames": 8, "sample_fps": 1, "max_sample_fps": None}
TURNS = [{"from": "human", "value": "<image>\nWhat moves?"}, {"from": "gpt", "value": "A red ball."}]


def dataset_of(folder, records, processor, name="data.jsonl", video=VIDEO, **entry):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return MixtureDataset([{"json_path": str(folder / name), **entry}], processor, video=video)


def samples_of(*arguments, **options):
    samples = list(dataset_of(*arguments, **options))
    broken = [sample.reason for sample in samples if isinstance(sample, BrokenSample)]
    assert not broken, broken
    return samples


def make_pictures(folder, names):
    folder.mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (30, 20), (20 * number, 0, 0)).save(folder / name)
    return folder


def user(*content):
    return {"role": "user", "content": list(content)}


def answered(text):
    return {"role": "assistant", "content": text}


def text_of(processor, sample):
    return processor.tokenizer.decode([token for token in sample["input_ids"] if token != processor.video_token_id])


def same(one, other):
    return (
        torch.equal(one["input_ids"], other["input_ids"])
        and torch.equal(one["labels"], other["labels"])
        and len(one["pixel_values_videos"]) == len(other["pixel_values_videos"])
        and all(map(torch.equal, one["pixel_values_videos"], other["pixel_values_videos"]))
    )


def test_messages_and_published_conversations_are_the_same_sample(processor, clips, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "p.png")
    question = {"type": "text", "text": "What moves?"}
    system = {"from": "system", "value": "Be short."}
    for published, items, first in (
        ({"video": clips[0]}, [{"type": "video", "video": clips[0]}], []),
        ({"image": "p.png"}, [{"type": "image", "path": "p.png"}], []),
        ({"image": ["p.png"] * 2}, [{"type": "image", "image": "p.png"}] * 2, []),
        ({"video": list(clips)}, [{"type": "video", "video": clip} for clip in clips], [system]),
    ):
        messages = [user(*items, question), answered("A red ball.")]
        if first:
            messages.insert(0, {"role": "system", "content": system["value"]})
        records = [{"conversations": first + TURNS, **published}, {"messages": messages}]
        one, other = samples_of(tmp_path, records, processor)
        assert same(one, other)
        assert [answer[:2] for answer in one["answers"]] == [answer[:2] for answer in other["answers"]]


def test_several_videos_and_images_stand_where_they_are_said(processor, clips, tmp_path):
    """Interleaved with texts and over turns; the ids are those that the processor gives at inference."""
    Image.new("RGB", (30, 20)).save(tmp_path / "p.png")
    messages = [
        user("First:", {"type": "video", "video": clips[0]}, {"type": "text", "text": "then:"},
             {"type": "image", "image": "p.png"}, {"type": "text", "text": "What?"}) | {"type": "order"},
        answered([{"type": "text", "text": "One."}]),
        user({"type": "video", "video": clips[1], "fps": 0.5, "start": 1, "end": 8}, "And this?"),
        answered("Two."),
    ]  # fmt: skip
    (sample,) = samples_of(tmp_path, [{"messages": messages}], processor, source="mine")
    messages[0]["content"][3]["image"] = str(tmp_path / "p.png")
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **VIDEO)
    assert sample["input_ids"].tolist() == expected["input_ids"][0]
    assert all(map(torch.equal, sample["pixel_values_videos"], expected["pixel_values_videos"]))
    assert [kind for *_, kind in sample["answers"]] == ["order", "mine"]
    labels = sample["labels"][sample["labels"] != IGNORE].tolist()
    assert processor.tokenizer.decode(labels) == "One.<|im_end|>Two.<|im_end|>"


def test_rows_of_tables_with_empty_cells(processor, clips, tmp_path):
    """As the `datasets` library gives them: every item has the keys of all others, most of them None."""
    empty = {"text": None, "video": None, "image": None, "fps": None, "timestamps": None, "num_frames": None}
    items = [empty | {"type": "video", "video": clips[0]}, empty | {"type": "text", "text": "What moves?"}]
    row = {
        "id": None,
        "messages": [user(*items) | {"type": None}, answered([empty | {"type": "text", "text": "A red ball."}])],
    }
    row |= {"conversations": None, "video": None, "image": None, "scale": None}
    published = {"conversations": [turn | {"type": None} for turn in TURNS], "video": clips[0], "image": None}
    published |= {"messages": None, "scale": None, "id": None}
    one, other = samples_of(tmp_path, [row, published], processor)
    assert same(one, other)


def test_folders_of_frames_are_read_by_number(processor, tmp_path):
    """One order in training and in chat, whatever the zeros in the names."""
    names = [f"frame_{number}.png" for number in range(1, 13)]
    make_pictures(tmp_path / "frames", names)
    published = {"conversations": TURNS}
    videos = ["frames", [f"frames/{name}" for name in names]]
    records = [published | {"video": video} for video in videos]
    records += [
        {"messages": [user({"type": "video", "video": video}, "What moves?"), answered("A red ball.")]}
        for video in videos
    ]
    samples = samples_of(tmp_path, records, processor)
    assert all(same(samples[0], sample) for sample in samples)
    brightness = samples[0]["pixel_values_videos"][0][:, 0].mean(dim=(1, 2))
    assert len(brightness) == 12 and (brightness.diff() > 0).all()
    messages = [
        user({"type": "video", "video": str(tmp_path / "frames"), "media_dict": {"video_read_type": "frame"}}, "?")
    ]
    chat = processor.apply_chat_template(messages, tokenize=True, return_dict=True, max_num_frames=12, sample_fps=None)
    assert torch.equal(chat["pixel_values_videos"][0], samples[0]["pixel_values_videos"][0])


def test_lists_of_frame_files_have_times(processor, tmp_path):
    make_pictures(tmp_path / "frames", [f"{number}.png" for number in range(8)])
    files = [f"frames/{number}.png" for number in (3, 1, 7, 5, 0)]
    item = {"type": "video", "video": files}
    records = [{"video": files, "conversations": TURNS}, {"video": files, "conversations": TURNS, "scale": 3}]
    records += [{"messages": [user(item | extra, "What moves?"), answered("A red ball.")]}
                for extra in ({}, {"fps": 0.25}, {"timestamps": [0, 9, 10, 11, 50.5]})]  # fmt: skip
    samples = samples_of(tmp_path, records, processor, sample_fps=2)
    times = [
        [float(part.split("s:")[0]) for part in text_of(processor, sample).split("Time ")[1:]] for sample in samples
    ]
    assert times == [[0.0, 2.0], [0.0, 6.0], [0.0, 2.0], [0.0, 16.0], [0.0, 50.5]]  # a group is four frames
    order = samples[0]["pixel_values_videos"][0][:, 0].mean(dim=(1, 2))[:5]
    assert np.argsort(np.argsort(order)).tolist() == [2, 1, 4, 3, 0]  # as listed


def test_what_cannot_be_used_is_named(processor, clips, tmp_path):
    make_pictures(tmp_path / "unnumbered", ["a.png", "b.png"])
    make_pictures(tmp_path / "frames", ["1.png"])
    good = user({"type": "video", "video": clips[0]}, "What?")
    mixed = ["frames/1.png", clips[0]]
    records = [
        ({"video": "unnumbered", "conversations": TURNS}, "a.png has none"),
        ({"video": mixed[::-1] + ["no.mp4"], "conversations": TURNS}, "no such"),
        ({"messages": [user({"type": "video", "video": mixed}, "?"), answered("x")]}, "a list as one video"),
        ({"messages": [user({"type": "video", "video": []}, "?"), answered("x")]}, "a list as one video"),
        ({"messages": [good]}, "must end with the assistant"),
        ({"messages": [good, answered(" ")]}, "must be text that is not empty"),
        ({"messages": [good, answered([{"type": "video", "video": clips[0]}])]}, "must be text"),
        ({"messages": [good, answered("x"), good]}, "must end with the assistant"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": ["hello"]}, "must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}, answered("x")]}, "role"),
        ({"messages": [user({"type": "sound", "sound": "x"}), answered("x")]}, "an item must be"),
        ({"messages": [good, answered("x")], "conversations": TURNS}, "messages, or with conversations"),
        ({"video": clips[0], "image": "frames/1.png", "conversations": TURNS}, "at most one of"),
        ({"messages": [user("half \ud83d"), answered("x")]}, "half of a letter"),
    ]  # fmt: skip
    samples = list(dataset_of(tmp_path, [record for record, _ in records], processor))
    for sample, (record, reason) in zip(samples, records, strict=True):
        assert isinstance(sample, BrokenSample), record
        assert reason in sample.reason and len(sample.reason) < 700, (record, sample.reason)


def test_videos_alone(processor, clips, tmp_path):
    """For stages that read no text: whatever the messages say, all that is seen."""
    Image.new("RGB", (30, 20)).save(tmp_path / "p.png")
    seen = [{"type": "video", "video": clips[0]}, {"type": "image", "image": "p.png"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (
        {"messages": [user(seen[0]), user(seen[1], "no answer")]}, {"video": clips[0]}, {"messages": [user("text")]},
    )))  # fmt: skip
    samples = list(MixtureDataset([{"json_path": str(path)}], processor, video=VIDEO, answers=False))
    assert [len(sample["pixel_values_videos"]) for sample in samples[:2]] == [2, 1]
    assert "neither a video nor an image" in samples[2].reason
