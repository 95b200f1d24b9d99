"""Reads the flat config.json of published checkpoints (`mm_*` keys beside Qwen2's) into our fields.

What is surprising:
* `model_type` tells nothing: it is `llava_qwen`, `videochat_flash_qwen`, or plain `qwen2`. The `mm_*` keys do.
* The file says little about vision: what it leaves out comes from a preset, or from the defaults of our config.
* VideoChat-Flash names its tower in `mm_vision_tower`, and the tower's sizes stand nowhere. Many of its keys describe
  modules that do not exist (`mm_spatial_pool_mode`, `mm_num_compress_latents`, ...): they are not read.
"""

# `mm_vision_tower` of published VideoChat-Flash checkpoints: the tower, with what differs from its defaults.
PUBLISHED_TOWERS = {
    "umt-large": {"model_type": "videoxl_umt", "image_size": 224},
    "umt-hd-large": {"model_type": "videoxl_umt", "image_size": 448},
    "internvideo2": {"model_type": "videoxl_internvideo2"},
}

# Settings of published beacon memory that are built here; other values of these keys are another algorithm.
_BEACON_ALGORITHM = {
    "beacon_pos": "interleave",
    "beacon_attn": "full-coverage",
    "beacon_sink_size": 0,
    "beacon_parallel_window": 1,
    "beacon_param": ["q", "k", "v"],
}

# Keys of a published config.json that belong to the language model (the rest are `mm_*` keys and training leftovers).
_PUBLISHED_TEXT_KEYS = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_dropout",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

# Rotary base of Qwen2.5, where a published file does not state it.
_QWEN2_5_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}

# The one way of VideoChat-Flash to merge tokens: to 16 a frame, so 64 a clip of four, and to 64 a tile of an image.
_TOKEN_MERGING, _CLIP_FRAMES = "tome16_mlp_hd64", 4
_VIDEOCHAT_FLASH_KEYS = (
    "mm_llm_compress",
    "llm_compress_type",
    "llm_compress_layer_list",
    "llm_image_token_ratio_list",
    "tokenizer_model_max_length",
)


def is_published(config: dict) -> bool:
    """Whether this is the flat config.json of a published checkpoint: one with `mm_*` keys that is not ours."""
    if config.get("model_type") == "videoxl" or "text_config" in config:
        return False
    # Of the published keys this one is a setting of our own config, too.
    return any(key.startswith("mm_") and key != "mm_llm_compress" for key in config)


def dropped_settings(published: dict) -> list[str]:
    """Which settings of a published config.json look as if they meant something and are not taken over, and why."""
    dropped = []
    if published.get("dual_chunk_attention_config"):
        dropped.append("dual_chunk_attention_config is dropped: the published code of this model never reads it")
    if "beacon_window" in published and published.get("rope_scaling"):
        dropped.append("rope_scaling is dropped: the published code of models with beacon memory does not apply it")
    return dropped


def read_published(published, preset, defaults, towers):
    """Fields of a `VideoXLConfig` from a published config.json.

    Args:
        published: The parsed file.
        preset: See `VideoXLConfig.from_published`.
        defaults: Gives the fields of a complete config where there is no preset.
        towers: The configs of the video towers, by their `model_type`.

    Raises:
        ValueError: On settings that are another algorithm than the one built here.
    """
    merging = str(published.get("mm_projector_type")).startswith("tome")
    if preset is None and (merging or "beacon_window" in published):
        cause = "merges tokens" if merging else "has beacon memory"
        raise ValueError(f"this config.json {cause} and needs a preset: convert it with convert_weights.py")
    config = dict(preset) if preset else defaults()
    text = {key: published[key] for key in _PUBLISHED_TEXT_KEYS if key in published}
    if "beacon_window" in published:
        text.pop("rope_scaling", None)  # see `dropped_settings`
    if not {"rope_theta", "rope_parameters"} & set(text):
        text["rope_parameters"] = preset["text_config"]["rope_parameters"] if preset else dict(_QWEN2_5_ROPE)
    config["text_config"] = {"model_type": "qwen2", **text}
    config |= _read_clip_rooms(published, config, towers) if merging else _read_frame_rooms(published, config)
    config["tie_word_embeddings"] = published.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    copied = ("enable_sparse", "sparse_mode", "sparse_config", "enable_chunk_prefill", "prefill_config")
    copied += ("video_token_id", "time_start_token_id", "time_end_token_id")
    copied += ("image_grid_pinpoints",) if isinstance(published.get("image_grid_pinpoints"), list) else ()
    copied += _VIDEOCHAT_FLASH_KEYS if merging else ()
    if config.get("beacon_window") is not None:
        copied += ("beacon_window", "beacon_ratio", "beacon_ratio_mix")
        expected = {**_BEACON_ALGORITHM, "beacon_stride": published.get("beacon_window")}
        if other := [key for key, value in expected.items() if published.get(key, value) != value]:
            settings = ", ".join(f"{key}={published[key]!r} instead of {expected[key]!r}" for key in other)
            raise ValueError(f"beacon memory with {settings} is not supported")
    config |= {key: published[key] for key in copied if key in published}
    config["dtype"] = published.get("torch_dtype", published.get("dtype"))
    for key in ("model_type", "architectures", "transformers_version"):
        config.pop(key, None)
    return config


def _read_frame_rooms(published, config):
    """Tower and compressor of the families whose tower sees single frames."""
    vision = {key: value for key, value in config["vision_config"].items() if key != "transformers_version"}
    vision |= published.get("vision_config", {})
    compressor = {"projector_pool_size": 2, **config.get("compressor_config", {})}
    compressor["hidden_size"] = published.get("mm_hidden_size", vision["hidden_size"])
    compressor["projector_pool_size"] = published.get("mm_spatial_pool_stride", compressor["projector_pool_size"])
    if (mode := published.get("mm_spatial_pool_mode", "average")) != "average":
        raise ValueError(f"mm_spatial_pool_mode must be 'average', got {mode!r}")
    if compressor.get("compressor_type") == "none":
        compressor["grid_size"] = vision["image_size"] // vision["patch_size"]
    rooms = {"vision_config": vision, "compressor_config": compressor}
    if vision["model_type"] != "siglip_vision_model":
        # Members with SigLIP drop its last layer whatever this key says.
        rooms["vision_feature_layer"] = published.get("mm_vision_select_layer", config["vision_feature_layer"])
    return rooms


def _read_clip_rooms(published, config, towers):
    """Tower and compressor of VideoChat-Flash, whose tower sees clips."""
    expected = {"mm_projector_type": _TOKEN_MERGING, "mm_local_num_frames": _CLIP_FRAMES}
    if other := {key: published[key] for key, value in expected.items() if published.get(key, value) != value}:
        raise ValueError(f"VideoChat-Flash is built here for {expected} only, the config says {other}")
    name, stated = published.get("mm_vision_tower"), published.get("vision_config", {})
    if name not in PUBLISHED_TOWERS:
        raise ValueError(f"mm_vision_tower must be one of {', '.join(PUBLISHED_TOWERS)}, got {name!r}")
    tower = PUBLISHED_TOWERS[name]
    known = towers[tower["model_type"]]()
    preset = config["vision_config"] if config["vision_config"]["model_type"] == tower["model_type"] else {}
    vision = {**preset, **tower, **{key: value for key, value in stated.items() if key in known.to_dict()}}
    heads = vision.get("num_attention_heads", known.num_attention_heads)
    layer = published.get("mm_vision_select_layer", config["vision_feature_layer"])
    compressor = {**config["compressor_config"], "frames_per_group": _CLIP_FRAMES, "merge_heads": heads}
    compressor["hidden_size"] = published.get("mm_hidden_size", vision.get("hidden_size", known.hidden_size))
    return {
        "vision_config": {**vision, "num_frames": _CLIP_FRAMES},
        "compressor_config": compressor,
        "vision_feature_layer": stated.get("return_idx", stated.get("x_vis_return_idx", layer)),
    }
