"""Which member can do what: runs every ability with a small model of every member, and writes the table of the docs.

    .venv/bin/python -m pytest -q tests/test_abilities.py     # runs them, and compares the table in docs/members.md
    WRITE_TABLE=1 ... the same                                # writes it there

An ability is a function that works, or raises the `ValueError` that users get. Anything else is a defect, and fails.
Each also looks at what came out where that can be said in a line; that it is right is what the other tests are about.
"""

import copy
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import TextIteratorStreamer
from videoxl.serving.vllm_plugin import refuse_unserved

GREEDY = {"do_sample": False, "max_new_tokens": 3}
QUESTION = "What color is the star?"
# Title in the table -> name in `FAMILY_CHANGES`, and what is set on its config besides.
MEMBERS = {
    "Video-XL-2": (None, {}),
    "Video-XL": ("videoxl1", {}),
    'Video-XL, `beacon_ratio="none"`': ("videoxl1", {"beacon_ratio": "none"}),
    "Pro, April": ("videoxlpro", {}),
    "Pro, March": ("videoxlpro_march", {}),
    "VideoChat-Flash": ("videochatflash", {}),
    "VideoChat-Flash, dropping": ("videochatflash_dropping", {}),
}


class Member:
    """A model with what the abilities are tried on: a clip of some seconds."""

    def __init__(self, model, tokenizer, processor, clip):
        self.model, self.tokenizer, self.processor, self.clip = model, tokenizer, processor, str(clip)

    def encode(self, **options):
        return self.model.encode_video(self.clip, self.tokenizer, max_num_frames=8, progress=False, **options)

    def ask(self, video, question=QUESTION, **options):
        asked = {"return_history": False, "generation_config": GREEDY, "max_num_frames": 8, **options}
        return self.model.chat(video, self.tokenizer, question, **asked)

    def inputs(self, *questions):
        """What the processor makes of conversations about the clip, one a question."""
        video = {"type": "video", "video": self.clip}
        chats = [[{"role": "user", "content": [video, {"type": "text", "text": text}]}] for text in questions]
        return self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True,
            num_frames=8,
        )  # fmt: skip


def history(member):
    _, first = member.ask(member.clip, return_history=True)
    _, second = member.ask(None, "And then?", chat_history=first, return_history=True)
    assert len(second) == 4


def images(member):
    member.ask(Image.new("RGB", (60, 40), "red"))


def several_videos(member):
    member.ask([{"type": "video", "video": member.clip}, {"type": "text", "text": "and"},
                {"type": "video", "video": member.clip}])  # fmt: skip


def streamed(member):
    streamer = TextIteratorStreamer(member.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer, chunks = member.ask(member.clip, streamer=streamer, return_chunks=True)
    assert "".join(streamer).strip() == answer and chunks[0]["level"] == "dense"


def encoded_once(member):
    video = member.encode()
    assert member.ask(video) == member.ask(member.clip) == member.ask(video)


def saved(member):
    video = member.encode()
    with tempfile.TemporaryDirectory() as folder:
        video.save(Path(folder, "a.videoxl"))
        loaded = member.model.load_video(Path(folder, "a.videoxl"), member.tokenizer)
        assert member.ask(loaded) == member.ask(video)


def appended(member):
    frames = torch.zeros(8, 40, 60, 3, dtype=torch.uint8)
    options = {"timestamps": [float(second) for second in range(8)], "progress": False}
    video = member.model.encode_video(frames, member.tokenizer, **options)
    video.append(frames, [float(second) for second in range(8, 16)])
    assert video.num_frames == 16
    member.ask(video)


def sparse(**settings):
    def ability(member):
        member.model.config.sparse_attention = settings
        member.ask(member.clip)

    return ability


def question_batch(member):
    answers = member.model.chat_batch(member.encode(), member.tokenizer, [QUESTION, "Why?"], GREEDY)
    assert len(answers) == 2


def generated_batch(member):
    output = member.model.generate(**member.inputs(QUESTION, "What is it, and why is it there?"), **GREEDY)
    assert len(output) == 2


def beams(member):
    output = member.model.generate(**member.inputs(QUESTION), **GREEDY, num_beams=2, num_return_sequences=2)
    assert len(output) == 2


def loss(member, model=None):
    inputs = member.inputs(QUESTION)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    found = (model or member.model)(**inputs, labels=labels).loss
    found.backward()
    assert found.isfinite()


def lora(member):
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapted = get_peft_model(copy.deepcopy(member.model), LoraConfig(r=2, target_modules=targets))
    loss(member, adapted)
    merged = Member(adapted.merge_and_unload(), member.tokenizer, member.processor, member.clip)
    merged.ask(merged.clip)


def many_videos(member):
    from videoxl.shell.records import Question, ask_video

    questions = [Question(number, "a.mp4", text, member.clip) for number, text in enumerate((QUESTION, "Why?"))]
    entries = list(ask_video(member.model, member.tokenizer, questions, 3, max_num_frames=8, progress=False))
    assert all("answer" in entry for entry in entries), entries


# Rows of the table.
ABILITIES = {
    "`chat` about a video": lambda member: member.ask(member.clip),
    "histories": history,
    "images": images,
    "several videos": several_videos,
    "streamed answers, `return_chunks` (what the page uses)": streamed,
    "`encode_video`, then questions": encoded_once,
    "`save`, `load_video`": saved,
    "`append`": appended,
    "`prefill`: `streaming`": sparse(prefill="streaming", chunk_groups=1, window_chunks=1),
    "`prefill`: `mask`": sparse(prefill="mask", chunk_groups=1, window_chunks=1),
    "`decode`: `bilevel`": sparse(decode="bilevel", decode_chunk_groups=1),
    "`chat_batch`": question_batch,
    "`generate` on a batch": generated_batch,
    "beams": beams,
    "loss and gradients": loss,
    "LoRA (peft), merged": lora,
    "`videoxl batch`": many_videos,
    # What vLLM refuses at start; that the others answer there is what test_serving_vllm.py is about.
    "vLLM": lambda member: refuse_unserved(member.model.config),
}


def table(can: dict[str, dict[str, bool]]) -> str:
    """The table in Markdown.

    Args:
        can: Ability -> member -> whether it has it.
    """
    lines = ["| | " + " | ".join(MEMBERS) + " |", "| --- |" + " :-: |" * len(MEMBERS)]
    for ability, row in can.items():
        lines.append(f"| {ability} | " + " | ".join("yes" if row[member] else "no" for member in MEMBERS) + " |")
    return "\n".join(lines) + "\n"
