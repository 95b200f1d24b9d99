"""What an earlier version wrote, for `fixtures/before/make.py`, which made it with that version, and `test_before.py`.

Everything goes through public names, so that both run whatever the remote files are called.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer
from videoxl.hub.convert import convert

FIXTURES = Path(__file__).resolve().parent / "fixtures"
BEFORE = FIXTURES / "before"
ROOT = FIXTURES.parent.parent
CLIP = ROOT / "assets" / "demo.mp4"
# The tiny published checkpoints that are converted, by member.
CHECKPOINTS = {
    "videoxl1": "checkpoint",
    "videoxl2": "checkpoint",
    "videoxlpro": "checkpoint",
    "videochatflash": "checkpoint_res224",
}
NEW_TOKENS = 4
# Largest difference of logits, relative to the largest of them. The first is rounding in float32 on another processor.
TOLERANCES = {"float32": 2e-4, "bfloat16": 5e-2}
# Steps of an answer whose best two logits are closer than so many tolerances are not compared as words.
MARGIN = 10
STREAMING = {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1}
BILEVEL = {"decode": "bilevel", "decode_chunk_groups": 1, "pool_size": 9}
DROPPING = {
    "mm_llm_compress": True,
    "llm_compress_type": "uniform0_attention",
    "llm_compress_layer_list": [2, 4],
    "llm_image_token_ratio_list": [1, 0.75, 0.25],
}
COLOR, WHEN = "What color is the star?", "When does the circle first appear?"
# The saved videos: the model, the config's settings while encoding, what is encoded, and what is asked, each question
# with the config's settings and options of `chat`. "append" are frames that are added before the last question.
VIDEOS = {
    "bundled_full": {
        "model": "bundled",
        "settings": {},
        "clip": {"max_num_frames": 7, "sample_fps": None},
        "asked": [(COLOR, {}, {}), (WHEN, {"sparse_attention": BILEVEL}, {})],
        "append": 3,
    },
    "bundled_streaming": {
        "model": "bundled",
        "settings": {"sparse_attention": STREAMING},
        "clip": {"max_num_frames": 12, "sample_fps": None},
        "asked": [(COLOR, {}, {}), (WHEN, {"sparse_attention": BILEVEL}, {"dense_chunks": []})],
        "append": 4,
    },
    "bundled_image": {"model": "bundled", "settings": {}, "image": True, "asked": [(COLOR, {}, {})]},
    "videoxl2_bfloat16": {
        "model": "videoxl2",
        "dtype": "bfloat16",
        "settings": {},
        "frames": 6,
        "asked": [(COLOR, {}, {})],
    },
    "videoxl1_beacons": {
        "model": "videoxl1",
        "settings": {"beacon_ratio": 4},
        "frames": 6,
        "asked": [(COLOR, {}, {})],
        "append": 2,
    },
    "videoxlpro_deferred": {
        "model": "videoxlpro",
        "settings": {"keep_ratio": 0.5},
        "frames": 10,
        "asked": [(COLOR, {"keep_ratio": 0.5}, {}), (WHEN, {"keep_ratio": 0.8}, {})],
        "append": 3,
    },
    "videochatflash_dropping": {
        "model": "videochatflash",
        "settings": DROPPING,
        "frames": 6,
        "asked": [(COLOR, {}, {}), (WHEN, {}, {})],
        "append": 3,
    },
}
# The folders: converted checkpoints, and what `save_pretrained` wrote of the bundled one with settings of users.
SAVED = {
    "saved": {"sparse_attention": STREAMING | BILEVEL},
    "switches": {
        "enable_sparse": True,
        "sparse_mode": "mask",
        "sparse_config": {"block_size_chosed": 1, "prev_blocks_num": 1},
        "enable_chunk_prefill": False,
    },
}


def pictures(count, seed=0):
    """uint8 [count, 48, 64, 3]: coarse noise that drifts, the same everywhere."""
    tile = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    picture = tile.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(picture, 5 * number, axis=1) for number in range(count)])


def seconds(count, first=0.0):
    return [first + 0.5 * number for number in range(count)]


def published_checkpoint(member, target):
    """A tiny published checkpoint with a tokenizer of characters, as a new folder."""
    shutil.copytree(FIXTURES / member / CHECKPOINTS[member], target, copy_function=shutil.copyfile)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BEFORE / "tokenizer" / file, target / file)
    return target


def converted_checkpoint(member, folder):
    """Converts a tiny checkpoint with the code as it is, to a new folder in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the tokenizer fits
        return convert(published_checkpoint(member, folder / f"published_{member}"), folder / f"new_{member}")


def digests(weights):
    """What tells tensors of a safetensors file apart: name -> dtype, shape and sha256 of the values."""
    return {
        name: [
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
        for name, tensor in sorted(load_file(weights).items())
    }


def old_folder(name, folder):
    """A folder as the earlier version wrote it, but for the remote code, which is the present one.

    The files and the names of the weights are the earlier version's; the weights are found by their digests in what
    the present converter makes of the same checkpoint.
    """
    if name in SAVED:
        target = folder / f"before_{name}"
        target.mkdir()
        for file in [*ROOT.glob("*.py"), *map(ROOT.joinpath, ("model.safetensors", "tokenizer.json"))]:
            shutil.copyfile(file, target / file.name)
        shutil.copyfile(ROOT / "tokenizer_config.json", target / "tokenizer_config.json")
    else:
        target = converted_checkpoint(name, folder).rename(folder / f"before_{name}")
        made = load_file(target / "model.safetensors")
        by_digest = {tuple(map(str, entry)): name for name, entry in digests(target / "model.safetensors").items()}
        wanted = json.loads((BEFORE / name / "weights.json").read_text())
        weights = {old: made[by_digest[tuple(map(str, entry))]] for old, entry in wanted.items()}
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        shutil.copytree(BEFORE / "tokenizer", target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for file in (BEFORE / name).iterdir():
        if file.name != "weights.json":
            shutil.copyfile(file, target / file.name)
    return target


def load(folder, dtype="float32"):
    """(model, tokenizer, processor) as users load them."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    options = {"trust_remote_code": True}
    return model, AutoTokenizer.from_pretrained(folder, **options), AutoProcessor.from_pretrained(folder, **options)


def set_config(model, settings):
    for key, value in settings.items():
        assert hasattr(model.config, key), key
        setattr(model.config, key, value)


def encode(model, tokenizer, case, clip):
    """The video of a case of `VIDEOS`, encoded anew."""
    if "clip" in case:
        return model.encode_video(str(clip), tokenizer, **case["clip"])
    if "image" in case:
        return model.encode_video(Image.fromarray(pictures(1, seed=2)[0]), tokenizer, system_prompt="Be brief.")
    options = {"timestamps": seconds(case["frames"]), "system_prompt": "Be brief."}
    return model.encode_video(pictures(case["frames"]), tokenizer, **options)


def append(video, case):
    """Adds the frames of the case to its video."""
    video.append(pictures(case["append"], seed=1), seconds(case["append"], video.timestamps[-1] + 0.5))


def ask(model, tokenizer, video, question, **options):
    """The answer of a few tokens, and the logits [steps, vocabulary] that chose them."""
    steps = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: steps.append(output.detach().reshape(-1, output.shape[-1])[-1].float().cpu())
    )
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    try:
        answer = model.chat(video, tokenizer, question, return_history=False, generation_config=settings, **options)
    finally:
        hook.remove()
    return answer, torch.stack(steps[-NEW_TOKENS:])


def inputs_of(processor):
    """What the processor makes of one prompt: ids, the pixels' shape, and their mean and deviation."""
    content = [{"type": "video", "video": pictures(6)}, {"type": "text", "text": COLOR}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(prompt, videos=[pictures(6)], timestamps=[seconds(6)], return_tensors="pt")
    pixels = torch.as_tensor(inputs["pixel_values_videos"][0])
    return {
        "ids": inputs["input_ids"][0].tolist(),
        "shape": list(pixels.shape),
        "pixels": [round(pixels.mean().item(), 5), round(pixels.std().item(), 5)],
    }
