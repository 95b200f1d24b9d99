"""`VideoXLConfig`: every setting in one place, whichever way a file or a caller gives it."""

import copy
import json
import pickle

import pytest
from videoxl.configuration_videoxl import FRAME_SETTINGS, Settings, VideoXLConfig, VideoXLFramesConfig

OTHER = {
    **{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "frame_fit": "crop", "exact_resize": True},
    **{"image_grid_pinpoints": [[384, 384]], "image_tiling": "overview", "image_timestamps": True},
    **{"time_format": None, "video_message": "{duration}", "frame_sampler": "middle"},
    **{"min_num_frames": 1, "frame_multiple": 2, "max_source_bytes": 9},
}


def test_every_frame_setting_is_tried_here():
    assert set(OTHER) == set(FRAME_SETTINGS)
    assert all(getattr(VideoXLConfig(), name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("name", OTHER)
def test_settings_of_frames_by_themselves_and_in_their_config_are_one(name):
    value = OTHER[name]
    for config in (
        VideoXLConfig(**{name: value}),
        VideoXLConfig(frames_config={name: value}),
        VideoXLConfig(frames_config=VideoXLFramesConfig(**{name: value})),
        VideoXLConfig.from_dict({name: value, "frames_config": {"model_type": "videoxl_frames"}}),
        VideoXLConfig.from_dict({}, **{name: value}),
    ):
        assert getattr(config, name) == getattr(config.frames_config, name) == value
        assert {**VideoXLConfig().frames_config.to_dict(), name: value} == config.frames_config.to_dict()
    config = VideoXLConfig()
    setattr(config, name, value)
    assert getattr(config.frames_config, name) == value
    config.frames_config = {}
    assert getattr(config, name) == getattr(VideoXLConfig(), name)


def test_what_is_saved_is_nested_and_comes_back(tmp_path):
    config = VideoXLConfig(**OTHER)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not set(OTHER) & set(written) and OTHER.items() <= written["frames_config"].items()
    for again in (VideoXLConfig.from_pretrained(tmp_path), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert {name: getattr(again, name) for name in OTHER} == OTHER
    again.time_format = "at {seconds}"
    assert config.time_format is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"frame_fit": "shrink"}, "frame_fit must be one of .*'shrink'"),
        ({"frames_config": {"image_tiling": None}}, "image_tiling must be one of"),
        ({"token_selector": "best"}, "token_selector must be one of"),
        ({"sparse_attention": {"prefil": "full"}}, "sparse_attention has no field prefil; it has prefill"),
        ({"sparse_attention": {"decode": "some"}}, "sparse_attention.decode must be one of"),
        ({"sparse_attention": {"offload": 1}}, "sparse_attention.offload must be one of"),
        ({"sparse_attention": {"pool_size": True}}, "sparse_attention.pool_size must be an integer"),
        ({"sparse_attention": 3}, "sparse_attention must be a dict with some of prefill"),
        ({"vision_config": {"model_type": "nothing"}}, "unknown model_type 'nothing'"),
        ({"vision_config": {"model_type": "videoxl_umt", "patch_size": 9}}, "image_size 224 must be a multiple of"),
        ({"compressor_config": {"frames_per_group": 3}}, "power of two"),
    ],
)
def test_values_that_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        VideoXLConfig(**given)


def test_unknown_names_are_no_attributes():
    with pytest.raises(AttributeError, match="'VideoXLConfig' object has no attribute 'time_fromat'"):
        VideoXLConfig().time_fromat  # noqa: B018


def test_a_call_runs_with_one_frozen_value():
    config = VideoXLConfig(sparse_attention={"prefill": "mask"})
    settings = config.resolve_sparse_attention()
    assert settings == Settings(prefill="mask")
    assert settings.plan == {"prefill": "mask", "chunk_groups": 4, "window_chunks": 3}
    with pytest.raises(AttributeError):
        settings.prefill = "full"
    config.enable_chunk_prefill, config.prefill_config = True, {"chunk_size": 2, "step_size": 5, "offload": True}
    assert config.resolve_sparse_attention() == Settings("streaming", 2, 5, offload=True)
    beacons = VideoXLConfig(beacon_window=32, beacon_ratio=[2, 4]).resolve_sparse_attention()
    assert beacons.beacons == {"window": 32, "ratios": [2, 4], "mix": "step-random", "seed": 42}
    assert json.loads(json.dumps(beacons.plan)) == {
        **{"prefill": "full", "chunk_groups": 4, "window_chunks": 3, "beacons": beacons.beacons}
    }
    with pytest.raises(ValueError, match="has beacon memory"):
        VideoXLConfig(
            beacon_window=32, beacon_ratio=2, sparse_attention={"decode": "bilevel"}
        ).resolve_sparse_attention()
