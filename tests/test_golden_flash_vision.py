"""VideoChat-Flash's pixels, towers, token merging and images give the reference's numbers, room by room."""

import json

import pytest
import torch
from goldens import FIXTURES, assert_close, open_flash_case, open_golden
from PIL import Image
from safetensors.torch import load_file
from videoxl.compressor_videoxl import match_tokens, merge_schedule, merge_sum, merge_tokens
from videoxl.configuration_videoxl import VideoXLUMTConfig
from videoxl.hub.families import name_table
from videoxl.image_processing_videoxl import tile_image
from videoxl.video_processing_videoxl import normalize_frames, resize_frames
from videoxl.vision_videoxl import VideoXLUMT, clip_position_table, factorised_position_table

# The golden's notes allow 1e-4 for everything; sizes and matches are exact.
FEATURES, TABLES, PIXELS = 5e-5, 1e-6, 1e-6
FULL = ("c0", "c1", "c2", "c3", "i0", "i1", "h0", "h1", "hi0", "v0", "v1", "vi0")
CASES = [("shipped", "c0"), ("shipped", "i1"), *(("full", name) for name in FULL)]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return open_flash_case(request, *request.param)


@pytest.fixture(params=["shipped", "full"])
def tensors(request):
    return open_golden(request, "videochatflash", request.param, ("checkpoint_res224",) * 2).tensors


def test_pixels(case):
    config, frames = case.model.config, case.tensor("frames")
    size, expected = config.vision_config.image_size, case.pixels
    if case.settings["kind"] == "anyres":
        tiles = tile_image(Image.fromarray(frames[0].numpy()), size, config.image_grid_pinpoints, config.image_tiling)
        pixels = normalize_frames(tiles.flatten(0, 1), config.image_mean, config.image_std)
        pixels = pixels.unflatten(0, tiles.shape[:2])
    else:
        resized = resize_frames(frames.permute(0, 3, 1, 2), size, exact=True, fit=config.frame_fit)
        pixels = normalize_frames(resized, config.image_mean, config.image_std).view_as(expected)
    assert_close(pixels, expected, PIXELS)


def test_tower_merging_and_visual_tokens(case):
    merged, sizes = case.tensor("merged_tokens"), case.tensor("merge_sizes")
    with torch.inference_mode():
        features = case.model.get_video_features([case.pixels], output_tower_features=True)
        (tower,), (tokens,) = features.tower_features, features.pooler_output
        expected = case.tensor("tower_features")
        assert tower.shape[0] == (len(expected) if case.settings["kind"] != "video" else case.settings["frames"])
        units = tower.reshape(expected.shape)
        assert_close(units, expected, FEATURES)
        compressor = case.model.model.compressor
        found, found_sizes = merge_tokens(units, compressor.heads, compressor.target)
        assert torch.equal(found_sizes, sizes) and found_sizes.sum() == units.shape[0] * units.shape[1]
        assert merge_schedule(units.shape[1], 64) == case.settings["merge_schedule"]
        assert_close(found, merged, FEATURES)
        assert_close(compressor(units), merged, FEATURES)
        assert_close(case.model.model.multi_modal_projector(merged), case.tensor("projector_output"), FEATURES)
    if case.settings["kind"] == "anyres":
        assert_close(tokens.flatten(0, 1), case.tensor("visual_embeds"), FEATURES)
    else:
        assert_close(tokens, case.tensor("projector_output"), FEATURES)


def test_whole_merges(tensors, request):
    folder = FIXTURES if "shipped" in request.node.name else request.getfixturevalue("test_data") / "golden"
    for case in json.loads((folder / "videochatflash" / "golden.json").read_text())["standalone"]:
        if case["kind"] != "merge_tokens":
            continue
        x, out, sizes = (tensors[f"merge.{case['name']}.{name}"] for name in ("x", "out", "sizes"))
        assert merge_schedule(x.shape[1], case["target"]) == case["schedule"]
        found, found_sizes = merge_tokens(x, case["heads"], case["target"])
        assert_close(found, out, FEATURES)
        assert torch.equal(found_sizes, sizes)


def test_single_rounds(tensors, request):
    folder = FIXTURES if "shipped" in request.node.name else request.getfixturevalue("test_data") / "golden"
    for case in json.loads((folder / "videochatflash" / "golden.json").read_text())["standalone"]:
        if case["kind"] == "merge_tokens":
            continue

        def tensor(name, case=case):
            return tensors[f"match.{case['name']}.{name}"]

        match = match_tokens(tensor("metric"), case["r_requested"])
        assert match.merged.shape[1] == case["r_used"]
        assert torch.equal(match.unmerged, tensor("unmerged_a"))
        assert torch.equal(match.merged, tensor("src_a"))
        assert torch.equal(match.partner, tensor("dst_b"))
        x, sizes = tensor("x"), tensor("size_in")[..., None]
        assert_close(merge_sum(x, match), tensor("merged_sum"), FEATURES)
        merged_sizes = merge_sum(sizes, match)
        assert_close(merged_sizes[..., 0], tensor("size_out"), FEATURES)
        assert_close(merge_sum(x * sizes, match) / merged_sizes, tensor("merged_wavg"), FEATURES)
        unit_sizes = merge_sum(torch.ones_like(sizes), match)
        assert torch.equal(unit_sizes[..., 0], tensor("size_out_unit"))
        assert_close(merge_sum(x, match) / unit_sizes, tensor("merged_wavg_unit"), FEATURES)


def test_position_tables(tensors):
    expected = {
        "hd.video": clip_position_table(4, 28, 64)[::8],
        "hd.image": clip_position_table(1, 28, 64)[::4],
        "base.video": clip_position_table(4, 14, 64),
        "base.image": clip_position_table(1, 14, 64),
        "p16.video": clip_position_table(4, 8, 64),
        "frames8.base.video.rows": clip_position_table(8, 14, 64)[::49],
        "frames8.hd.video.rows": clip_position_table(8, 28, 64)[::196],
        "iv2_init.video": factorised_position_table(4, 16, 96)[::8],
        "iv2_init.image": factorised_position_table(1, 16, 96),
    }
    for name, grid in (("base", 14), ("hd", 28)):
        rows = tensors[f"pos.real1024.{name}.row_index"]
        expected[f"real1024.{name}.video.rows"] = clip_position_table(4, grid, 1024)[rows]
    found = {name: table for name, table in expected.items() if f"pos.{name}" in tensors}
    assert len(found) >= 6
    for name, table in found.items():
        assert_close(table, tensors[f"pos.{name}"], TABLES)


def test_patches_of_the_true_size(request, test_data):
    """A tower with the true 16-pixel patches, whose grid of 8 x 8 shrinks the position table."""
    folder = test_data / "golden" / "videochatflash"
    tensors = open_golden(request, "videochatflash", "full", ("checkpoint_res224",) * 2).tensors
    published = json.loads((folder / "checkpoint_p16" / "config.json").read_text())["vision_config"]
    known = VideoXLUMTConfig().to_dict()
    config = VideoXLUMTConfig(**{key: value for key, value in published.items() if key in known})
    tower, prefix = VideoXLUMT(config).eval(), "model.vision_tower."
    del tower.encoder.layers[3:]
    stored = load_file(folder / "checkpoint_p16" / "model.safetensors")
    ours = {name_table("videochatflash").to_ours(name): tensor for name, tensor in stored.items()}
    tower.load_state_dict({key.removeprefix(prefix): value for key, value in ours.items() if key.startswith(prefix)})
    with torch.inference_mode():
        features = tower(tensors["p16.pixel_values"][None])
        assert_close(features, tensors["p16.tower_features"], FEATURES)
        merged, sizes = merge_tokens(features, config.num_attention_heads, 64)
    assert_close(merged, tensors["p16.merged_tokens"], FEATURES)
    assert torch.equal(sizes, tensors["p16.merge_sizes"])


def test_logits_without_dropping(case):
    with torch.inference_mode():
        outputs = case.model(**case.inputs, logits_to_keep=case.settings["sequence"]["suffix_len"])
    assert_close(outputs.logits[0], case.tensor("logits.none"), 1e-4)
    greedy = next(run for run in case.settings["runs"] if run["setting"] == "none")["greedy_tokens"]
    generated = case.model.generate(**case.inputs, do_sample=False, max_new_tokens=6)
    assert generated[0, case.inputs["input_ids"].shape[1] :].tolist() == greedy
