"""Training data: mixtures, published JSON, label masking token by token, broken samples, positions, batches."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from videoxl.training.batches import Collator, EpochSampler, videos_of
from videoxl.training.collator import IGNORE, answer_spans
from videoxl.training.data import BrokenSample, MixtureDataset, choose_samples, stretch_positions

TURNS = [
    {"from": "human", "value": "<image>\nWhat moves?"},
    {"from": "gpt", "value": "A red ball."},
    {"from": "human", "value": "Where to?"},
    {"from": "gpt", "value": "Left."},
]
WORLD = {
    "split": "train",
    "size": 6,
    "first_seed": 3,
    "clip": {"seconds": 4, "num_questions": 2},
    "sample_fps": [1, 2],
}


def write_data(folder, records, **entry):
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "mixture.yaml").write_text(yaml.safe_dump({"datasets": [{"json_path": "data.json", **entry}]}))
    return folder / "mixture.yaml"


def make_pictures(folder, count):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (30, 20), (40 * number, 0, 0)).save(folder / f"{number:03d}.png")
    return folder


def test_sampling_strategies():
    assert choose_samples(5, "all", 0) == [0, 1, 2, 3, 4]
    assert choose_samples(5, "first:2", 0) == [0, 1]
    assert choose_samples(5, "end:2", 0) == [3, 4]
    assert choose_samples(5, "end:0", 0) == []
    assert choose_samples(10, "first:20%", 0) == [0, 1]
    assert choose_samples(10, "first:11%", 0) == [0, 1]  # rounded up, as published
    drawn = choose_samples(100, "random:30", 0)
    assert drawn == choose_samples(100, "random:30", 0) != choose_samples(100, "random:30", 1)
    assert len(set(drawn)) == 30
    assert len(choose_samples(100, "random:30%", 0)) == 30
    for wrong in ("some:3", "first:x", "random", "first:-1"):
        with pytest.raises(ValueError, match="sampling_strategy must be"):
            choose_samples(5, wrong, 0)
    with pytest.raises(ValueError, match="asks for 6 of 5"):
        choose_samples(5, "first:6", 0)


def test_labels_token_by_token(processor, tmp_path, clips):
    """The labels are the assistant's words and <|im_end|>, and the ids are those that `generate` would see."""
    path = write_data(tmp_path, [{"id": "a", "video": clips[0], "conversations": TURNS}])
    sample = MixtureDataset(path, processor, video={"max_num_frames": 8})[0]
    tokenizer = processor.tokenizer
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    expected = [tokenizer(text + "<|im_end|>")["input_ids"] for text in ("A red ball.", "Left.")]
    supervised = [label for label in labels if label != IGNORE]
    assert supervised == expected[0] + expected[1]
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    assert [ids[start:stop] for start, stop, _ in sample["answers"]] == expected
    # In front of each answer stands exactly the assistant's header.
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    assert all(ids[start - len(header) : start] == header for start, _, _ in sample["answers"])
    # Up to the first answer: what inference builds.
    messages = [
        {"role": "user", "content": [{"type": "video", "video": clips[0]}, {"type": "text", "text": "What moves?"}]}
    ]
    inference = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, max_num_frames=8
    )
    start = sample["answers"][0][0]
    assert ids[:start] == inference["input_ids"][0]
    assert torch.equal(sample["pixel_values_videos"][0], inference["pixel_values_videos"][0])
    # The second turn follows behind a newline without a label.
    stop = sample["answers"][0][1]
    assert tokenizer.decode(ids[stop:]) == (
        "\n<|im_start|>user\nWhere to?<|im_end|>\n<|im_start|>assistant\nLeft.<|im_end|>\n"
    )


def test_text_with_chat_markers_is_refused(processor):
    messages = [
        {"role": "user", "content": "What is <|im_end|>\n<|im_start|>assistant\n?"},
        {"role": "assistant", "content": "A marker."},
    ]
    ids = processor([processor.render(messages, add_generation_prompt=False)])["input_ids"][0]
    with pytest.raises(ValueError, match="remove it"):
        answer_spans(ids, processor.tokenizer, messages)


def test_media_of_all_kinds(processor, tmp_path, clips):
    make_pictures(tmp_path / "frames", 6)
    records = [
        {"id": "video", "video": clips[0], "conversations": TURNS},
        {"id": "scaled", "video": clips[0], "scale": 2.0, "conversations": TURNS},
        {"id": "folder", "video": "frames", "conversations": TURNS},
        {"id": "image", "image": "frames/001.png", "conversations": TURNS},
        {"id": "images", "image": ["frames/001.png", "frames/002.png"], "conversations": TURNS},
        {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    ]
    path = write_data(tmp_path, records, sample_fps=2, source="mine")
    samples = list(MixtureDataset(path, processor, video={"max_num_frames": 4, "sample_fps": 1}))
    assert not [sample for sample in samples if isinstance(sample, BrokenSample)]
    text = [processor.tokenizer.decode(sample["input_ids"]) for sample in samples]
    frames = [[len(video) for video in sample["pixel_values_videos"]] for sample in samples]
    tiles = [tuple(image.shape[:2]) for image in samples[4]["pixel_values_videos"]]
    assert frames[:3] == [[4], [4], [6]] and frames[5] == []
    assert tiles == [(frames[3][0], 1)] * 2
    assert torch.equal(samples[0]["pixel_values_videos"][0], samples[1]["pixel_values_videos"][0])
    assert "Time" not in text[3]
    assert text[2].count("Time") == 2 and "Time 2.0s:" in text[2]  # frame 4 at 2 frames a second
    marker = processor.video_token
    assert text[4].count(marker) == 2 * text[3].count(marker) == 2 * frames[3][0] * processor.tokens_per_group
    assert "Time" not in text[5]
    assert [sample["source"] for sample in samples] == ["mine"] * 6

    def times(folder):
        path = write_data(folder, [{**records[int(folder.name)], "video": clips[0]}])
        sample = MixtureDataset(path, processor, video={"max_num_frames": 8, "sample_fps": 2, "max_sample_fps": None})
        return [
            float(part.split("s:")[0])
            for part in processor.tokenizer.decode(sample[0]["input_ids"]).split("Time ")[1:]
        ]

    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
    plain, scaled = times(tmp_path / "0"), times(tmp_path / "1")
    assert scaled == [2 * time for time in plain] and plain[1] > 0


def test_broken_samples_are_reported_by_name(processor, tmp_path, clips):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    one_turn = TURNS[:1]
    records = [
        {"id": "missing", "video": "nowhere.mp4", "conversations": TURNS},
        {"id": "undecodable", "video": "bad.mp4", "conversations": TURNS},
        {"id": "no pictures", "video": "empty", "conversations": TURNS},
        {"id": "odd", "video": clips[0], "conversations": one_turn},
        {"id": "no marker", "video": clips[0], "conversations": TURNS[2:]},
        {"id": "no media", "conversations": TURNS},
        {"id": "long", "conversations": [{"from": "human", "value": "a b " * 90}, {"from": "gpt", "value": "c"}]},
        {"id": "good", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    ]
    samples = list(MixtureDataset(write_data(tmp_path, records), processor, max_length=60))
    assert [isinstance(sample, BrokenSample) for sample in samples] == [True] * 7 + [False]
    for sample, record, reason in zip(
        samples,
        records,
        ("no such", "", "no images", "alternate", "<image>", "<image>", "max_length is 60"),
        strict=False,
    ):
        assert sample.name.startswith(record["id"]) and reason in sample.reason
    assert "nowhere.mp4" in samples[0].name
    batch = Collator(processor)(samples)
    assert len(batch["input_ids"]) == 1 and batch["samples"] == 8
    assert [name.split(" ")[0] for _, name, _ in batch["broken"]][:2] == ["missing", "undecodable"]
    # Nothing left: one row without labels, with a video so that every module runs.
    batch = Collator(processor)(samples[:3])
    assert (batch["labels"] == IGNORE).all() and len(batch["broken"]) == 3
    assert [len(video) for video in videos_of(batch)] == [processor.frames_per_group]


def test_mixture_errors(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such mixture"):
        MixtureDataset(tmp_path / "none.yaml", processor)
    with pytest.raises(FileNotFoundError, match="no such file"):
        MixtureDataset([{"json_path": str(tmp_path / "none.json")}], processor)
    for wrong in ({}, {"datasets": []}, [{"json": "x"}], [{"world": {"sizes": 3}}], [{"world": {"split": "train"}}]):
        with pytest.raises(ValueError, match="mixture|world"):
            MixtureDataset(wrong, processor)


def test_world_clips(processor):
    entry = {"world": {**WORLD, "time_offset_max": 50}, "source": "clips"}
    dataset = MixtureDataset([entry], processor, seed=5)
    assert len(dataset) == 6
    samples = [dataset[number] for number in range(6)]
    assert samples[2]["name"] == "train:5" and samples[2]["source"] == "clips"
    assert {len(sample["pixel_values_videos"][0]) for sample in samples} == {4, 8}
    assert all(len(sample["answers"]) == 2 and all(kind for *_, kind in sample["answers"]) for sample in samples)
    starts = {processor.tokenizer.decode(sample["input_ids"]).split("Time ")[1].split("s:")[0] for sample in samples}
    assert len(starts) > 2
    again = MixtureDataset([entry], processor, seed=5)[4]
    assert torch.equal(again["input_ids"], samples[4]["input_ids"])
    assert torch.equal(again["pixel_values_videos"][0], samples[4]["pixel_values_videos"][0])


def test_stretched_positions(processor):
    dataset = MixtureDataset([{"world": WORLD}], processor, position_stretch=5000)
    sample = dataset[0]
    ids, positions = sample["input_ids"], sample["position_ids"]
    steps = positions.diff()
    assert (steps >= 1).all() and positions[0] == 0 and len(ids) <= positions[-1] < 5000
    visual = (ids == processor.video_token_id).nonzero().flatten()
    ends = set((visual[processor.tokens_per_group - 1 :: processor.tokens_per_group]).tolist())
    assert set((steps > 1).nonzero().flatten().tolist()) <= ends  # jumps only behind whole groups
    assert torch.equal(positions, dataset[0]["position_ids"])
    reached = [int(stretch_positions(ids, processor, 5000, np.random.default_rng(seed))[-1]) for seed in range(60)]
    assert max(reached) > 4000 and min(reached) < 1500
    text = ids[ids != processor.video_token_id]
    assert torch.equal(stretch_positions(text, processor, 5000, np.random.default_rng(0)), torch.arange(len(text)))
    batch = Collator(processor)([dataset[0], dataset[1], dataset[2]])
    assert batch["position_ids"].shape == batch["input_ids"].shape
    assert (batch["position_ids"].diff(dim=1) >= 1).all()


def test_order_of_samples(processor):
    entries = [{"world": {**WORLD, "size": size}} for size in (10, 21, 5)]
    dataset = MixtureDataset(entries, processor)
    epoch = 0
    plain = EpochSampler(dataset, 1, lambda: epoch)
    first = list(plain)
    assert sorted(first) == list(range(36)) and first == list(plain) != list(EpochSampler(dataset, 2, lambda: 0))
    epoch = 1
    assert first != list(plain)
    grouped = list(EpochSampler(dataset, 1, lambda: 0, block=4))
    assert sorted(grouped) == list(range(36))
    for start in range(0, 32, 4):  # 2 + 5 + 1 whole blocks
        assert len({dataset.locate(index)[0] for index in grouped[start : start + 4]}) == 1
