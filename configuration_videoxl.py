"""Configuration of the Video-XL family: one config, with slots for tower x compressor x attention plan.

What is surprising:
* `vision_feature_layer` counts like `hidden_states` of transformers, so -2 means "the last of `num_hidden_layers` is
  not used": that layer is not built, and the checkpoint does not hold it.
* `sparse_attention` may be assigned as a dict at any time; it becomes a typed sub-config at that moment. It is read
  at call time, and the switches of the published code (`enable_sparse`, `enable_chunk_prefill`) win over its prefill
  fields while
  they are on: `resolve_sparse_attention` is the one place that knows.
* A published `config.json` is flat (`model_type: llava_qwen`, `mm_*` keys, the language model's sizes at top level);
  `VideoXLConfig.from_published` reads it, and `from_dict` sends flat dicts there.
"""

import math
import random

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, SiglipVisionConfig

PREFILL_MODES = ("full", "streaming", "mask")
DECODE_MODES = ("full", "bilevel")
FRAME_FITS = ("stretch", "crop")
TOKEN_SELECTORS = (None, "query", "timed_query")
BEACON_RATIO_MIXES = ("step-random", "instance-random", "sequence")

# Between these the published Video-XL-Pro code draws the share of visual tokens that it keeps.
RANDOM_KEEP_RATIO = (0.7, 0.99)
# Settings of published beacon memory that are built here; other values of these keys are another algorithm.
_BEACON_ALGORITHM = {
    "beacon_pos": "interleave",
    "beacon_attn": "full-coverage",
    "beacon_sink_size": 0,
    "beacon_parallel_window": 1,
    "beacon_param": ["q", "k", "v"],
}

# Model types that published checkpoints of the family carry in their flat config.json.
PUBLISHED_MODEL_TYPES = ("llava_qwen", "llava_qwen_flash", "videochat_flash_qwen")

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

# SigLIP so400m/14 at 384 pixels, the tower of Video-XL-2 (google/siglip-so400m-patch14-384).
_SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


class VideoXLCompressorConfig(PreTrainedConfig):
    """How frame features become visual tokens, up to and including the projector.

    Args:
        compressor_type: Slot value; `"dts"` is dynamic token synthesis (Video-XL-2, Video-XL-Pro), `"none"` passes
            the tower's features on (Video-XL).
        hidden_size: Channels of the tower's features and of the compressor.
        frames_per_group: Frames that are merged into one group of tokens; a power of two.
        grid_size: Side of the square grid that the tower's grid is resized to before the compressor.
        projector_pool_size: Side of the average pooling after the projector.
        projector_hidden_act: Activation between the projector's two layers.
        norm_groups, norm_eps: Group normalisation of the compressor.
        max_relative_position: Half size of the relative-position tables of the temporal attention.
        kernel_size: Side of the 3-D convolutions that halve the time axis.
    """

    model_type = "videoxl_compressor"
    base_config_key = "compressor_config"

    def __init__(
        self,
        compressor_type="dts",
        hidden_size=1152,
        frames_per_group=4,
        grid_size=24,
        projector_pool_size=2,
        projector_hidden_act="gelu",
        norm_groups=32,
        norm_eps=1e-6,
        max_relative_position=64,
        kernel_size=3,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.compressor_type = compressor_type
        self.hidden_size = hidden_size
        self.frames_per_group = frames_per_group
        self.grid_size = grid_size
        self.projector_pool_size = projector_pool_size
        self.projector_hidden_act = projector_hidden_act
        self.norm_groups = norm_groups
        self.norm_eps = norm_eps
        self.max_relative_position = max_relative_position
        self.kernel_size = kernel_size
        if frames_per_group < 1 or frames_per_group & (frames_per_group - 1):
            raise ValueError(f"frames_per_group must be a power of two, got {frames_per_group}")
        if grid_size % projector_pool_size:
            raise ValueError(f"grid_size {grid_size} must be a multiple of projector_pool_size {projector_pool_size}")

    @property
    def tokens_per_group(self) -> int:
        """Visual tokens that one group of frames becomes."""
        return (self.grid_size // self.projector_pool_size) ** 2


class VideoXLSparseAttentionConfig(PreTrainedConfig):
    """Who sees whom during prefill, and what is kept for decoding.

    Args:
        prefill: `"full"` (dense causal), `"streaming"` (chunk by chunk) or `"mask"` (the same chunk loop, in which
            timestamp queries see the whole past as well).
        chunk_groups: Groups of frames in one prefill chunk, at least 1.
        window_chunks: Earlier chunks that a chunk sees in full, at least 1.
        decode: `"full"` (keep all KV) or `"bilevel"` (dense KV for relevant chunks, pooled KV for the others).
        decode_chunk_groups: Groups in one chunk of bi-level decoding.
        pool_size: Kernel and stride of the pooling over a group's visual KV.
        reload: How relevant chunks are chosen from the question: `"auto"`, a method's name, or a dict (see
            `ReloadPolicy`).
        offload: `encode_video` and `chat` keep the key-values of finished chunks in host memory. Frees the device in
            `streaming` prefill; `mask` works, but moves a layer's past to the device for every chunk.

    Raises:
        ValueError: On an unknown field or a value outside its range.
    """

    model_type = "videoxl_sparse_attention"
    base_config_key = "sparse_attention"
    # What `resolve_sparse_attention` adds for families with beacon memory, see `resolve_beacons`.
    beacons = None
    fields = (
        "prefill",
        "chunk_groups",
        "window_chunks",
        "decode",
        "decode_chunk_groups",
        "pool_size",
        "reload",
        "offload",
    )

    def __init__(
        self,
        prefill="full",
        chunk_groups=4,
        window_chunks=3,
        decode="full",
        decode_chunk_groups=4,
        pool_size=4,
        reload="auto",
        offload=False,
        **kwargs,
    ):
        # Looked up only where there is something to look up: this runs at every decode step.
        known = kwargs and {*PreTrainedConfig().to_dict(), "model_type", "transformers_version", "attn_implementation"}
        if unknown := sorted(key for key in kwargs if key not in known and not key.startswith("_")):
            raise ValueError(f"sparse_attention has no field {', '.join(unknown)}; it has {', '.join(self.fields)}")
        super().__init__(**kwargs)
        self.prefill = prefill
        self.chunk_groups = chunk_groups
        self.window_chunks = window_chunks
        self.decode = decode
        self.decode_chunk_groups = decode_chunk_groups
        self.pool_size = pool_size
        self.reload = reload
        self.offload = offload
        self.check()

    @property
    def plan(self) -> dict:
        """What decides who sees whom during prefill, and what is kept of it."""
        plan = {"prefill": self.prefill, "chunk_groups": self.chunk_groups, "window_chunks": self.window_chunks}
        return plan if self.beacons is None else {**plan, "beacons": self.beacons}

    def check(self) -> None:
        """Raises ValueError if a field is outside its range (fields may have been set after construction)."""
        if self.prefill not in PREFILL_MODES:
            raise ValueError(f"sparse_attention.prefill must be one of {PREFILL_MODES}, got {self.prefill!r}")
        if self.decode not in DECODE_MODES:
            raise ValueError(f"sparse_attention.decode must be one of {DECODE_MODES}, got {self.decode!r}")
        if not isinstance(self.offload, bool):
            raise ValueError(f"sparse_attention.offload must be True or False, got {self.offload!r}")
        for name in ("chunk_groups", "window_chunks", "decode_chunk_groups", "pool_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"sparse_attention.{name} must be an integer of at least 1, got {value!r}")


class VideoXLConfig(PreTrainedConfig):
    """Configuration of `VideoXLForConditionalGeneration`; the defaults are Video-XL-2's outside the language model.

    Args:
        vision_config: The tower's own config (`siglip_vision_model`, ...), as an object or a dict with `model_type`.
        compressor_config: See `VideoXLCompressorConfig`.
        text_config: The language model's config (`qwen2`).
        sparse_attention: See `VideoXLSparseAttentionConfig`; also accepted as a dict, also when assigned later.
        vision_feature_layer: Which hidden state of the tower is taken, counted as in `hidden_states`; layers above it
            are not built.
        vision_chunk_frames: Frames that go through tower and compressor at once. Bounds memory, never changes results.
        video_token_id: The placeholder that stands for one visual token.
        time_start_token_id, time_end_token_id: First and last token of a timestamp; None for families without
            timestamps.
        time_format: The timestamp's text, formatted with `seconds`; None for families without timestamps.
        image_mean, image_std: Normalisation of pixels in 0..1, per channel.
        frame_fit: How a frame becomes a square: `"stretch"`, or `"crop"` (short side to size, middle of the long one).
        frame_padding: What fills a last, partial group: `"last"` repeats the last frame; `"random"` doubles random
            frames in place, as the published Video-XL-Pro code does (`forward` and `generate` only, for comparisons).
        frame_padding_seed: Of that choice.
        image_grid_pinpoints: (width, height) in pixels of the grids that images are cut in; None for all of 1 to 6
            columns and rows of the tower's image size, as in Video-XL-2.
        image_timestamps: Whether every tile of an image has a timestamp, of 0 s, in front of it.
        token_selector: Which visual tokens reach the language model: None for all, `"query"` by the prompt's text
            (Video-XL-Pro of March 2025), `"timed_query"` by it after attention to timestamps (of April 2025).
        selector_heads: Heads of that attention.
        keep_ratio: Share of the visual tokens that the selector keeps, rounded down to a multiple of 16 tokens.
        keep_seed: None, or the seed with which the share is drawn between 0.7 and 0.99 instead, as in published code.
        max_visual_tokens: At most so many tokens of a video are kept; None for no limit.
        beacon_window: Visual tokens that are compressed at once into beacons; None for families without them.
        beacon_ratio: Visual tokens per beacon: a number, a list to choose from, or `"none"` (or None).
        beacon_ratio_mix: How to choose from a list: `"step-random"` for every window, `"instance-random"` for every
            video, `"sequence"` in turn.
        beacon_seed: Of these choices, which start anew with every video.
    """

    model_type = "videoxl"
    sub_configs = {
        "vision_config": AutoConfig,
        "compressor_config": VideoXLCompressorConfig,
        "text_config": AutoConfig,
        "sparse_attention": VideoXLSparseAttentionConfig,
    }

    def __init__(
        self,
        vision_config=None,
        compressor_config=None,
        text_config=None,
        sparse_attention=None,
        vision_feature_layer=-2,
        vision_chunk_frames=32,
        video_token_id=151654,
        time_start_token_id=1462,
        time_end_token_id=25,
        time_format="Time {seconds:.1f}s:",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        frame_fit="stretch",
        frame_padding="last",
        frame_padding_seed=0,
        image_grid_pinpoints=None,
        image_timestamps=False,
        token_selector=None,
        selector_heads=4,
        keep_ratio=1.0,
        keep_seed=None,
        max_visual_tokens=None,
        beacon_window=None,
        beacon_ratio=None,
        beacon_ratio_mix="step-random",
        beacon_seed=42,
        tie_word_embeddings=False,
        **kwargs,
    ):
        if text_config is None and "hidden_size" in kwargs:
            raise ValueError(
                "This looks like a published, flat config.json (hidden_size at top level, no text_config). Read it "
                "with VideoXLConfig.from_published, or convert the checkpoint with convert_weights.py."
            )
        self.vision_config = _sub_config(vision_config, _SIGLIP_SO400M)
        self.compressor_config = _sub_config(compressor_config, {}, VideoXLCompressorConfig)
        self.text_config = _sub_config(text_config, {"model_type": "qwen2"})
        self.sparse_attention = sparse_attention if sparse_attention is not None else {}
        self.vision_feature_layer = vision_feature_layer
        self.vision_chunk_frames = vision_chunk_frames
        self.video_token_id = video_token_id
        self.time_start_token_id = time_start_token_id
        self.time_end_token_id = time_end_token_id
        self.time_format = time_format
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.frame_fit = frame_fit
        self.frame_padding = frame_padding
        self.frame_padding_seed = frame_padding_seed
        self.image_grid_pinpoints = image_grid_pinpoints
        self.image_timestamps = image_timestamps
        self.token_selector = token_selector
        self.selector_heads = selector_heads
        self.keep_ratio = keep_ratio
        self.keep_seed = keep_seed
        self.max_visual_tokens = max_visual_tokens
        self.beacon_window = beacon_window
        self.beacon_ratio = beacon_ratio
        self.beacon_ratio_mix = beacon_ratio_mix
        self.beacon_seed = beacon_seed
        for name, known in (("frame_fit", FRAME_FITS), ("token_selector", TOKEN_SELECTORS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def __setattr__(self, name, value):
        # override: users may assign a dict between calls; fields that are missing from it take their defaults.
        if name == "sparse_attention" and (value is None or isinstance(value, dict)):
            value = VideoXLSparseAttentionConfig(**(value or {}))
        elif name == "sparse_attention" and not hasattr(value, "prefill"):
            fields = ", ".join(VideoXLSparseAttentionConfig.fields)
            raise ValueError(f"sparse_attention must be a dict with some of {fields}, got {value!r}")
        super().__setattr__(name, value)

    @property
    def frames_per_group(self) -> int:
        """Frames that share one timestamp and one run of visual tokens."""
        return self.compressor_config.frames_per_group

    def resolve_sparse_attention(self) -> VideoXLSparseAttentionConfig:
        """The sparse-attention settings in force now: `sparse_attention`, overridden by the published switches.

        `prefill_config["step_size"]` is read as the window in chunks: our reading, the published code does not define
        it.

        Raises:
            ValueError: On a value outside its range, or sparse attention where visual tokens are compressed otherwise.
        """
        settings = {name: getattr(self.sparse_attention, name) for name in VideoXLSparseAttentionConfig.fields}
        if getattr(self, "mm_llm_compress", False):
            raise ValueError(
                "mm_llm_compress drops visual tokens between layers, which only VideoChat-Flash models do: this model "
                "does not. Set it to False; sparse_attention saves key-values here"
            )
        if getattr(self, "enable_sparse", False):
            published = getattr(self, "sparse_config", None) or {}
            settings["prefill"] = getattr(self, "sparse_mode", None) or "streaming"
            settings["chunk_groups"] = published.get("block_size_chosed", settings["chunk_groups"])
            settings["window_chunks"] = published.get("prev_blocks_num", settings["window_chunks"])
        if getattr(self, "enable_chunk_prefill", False):
            published = getattr(self, "prefill_config", None) or {}
            settings["prefill"] = published.get("chunk_prefill_mode", "streaming")
            settings["chunk_groups"] = published.get("chunk_size", settings["chunk_groups"])
            settings["window_chunks"] = published.get("step_size", settings["window_chunks"])
            settings["offload"] = bool(published.get("offload", settings["offload"]))
        resolved = VideoXLSparseAttentionConfig(**settings)
        resolved.beacons = self.resolve_beacons()
        if resolved.beacons is None and self.token_selector is None:
            return resolved
        if (resolved.prefill, resolved.decode, resolved.offload) != ("full", "full", False):
            cause = "selects visual tokens by the question" if self.token_selector else "has beacon memory"
            remedy = "" if self.token_selector else ", or beacon_ratio to 'none'"
            raise ValueError(
                f"this model {cause}, which goes with sparse_attention at its defaults only (prefill and decode "
                f"'full', no offload); got prefill={resolved.prefill!r}, decode={resolved.decode!r}, "
                f"offload={resolved.offload!r}: set it to {{}}{remedy}"
            )
        return resolved

    def resolve_beacons(self) -> dict | None:
        """The beacon memory in force now: `window`, `ratios`, `mix` and `seed`; None where nothing is compressed.

        Raises:
            ValueError: On a value outside its range.
        """
        ratio = self.beacon_ratio
        if self.beacon_window is None or ratio is None or ratio == "none":
            if self.beacon_window is None and ratio not in (None, "none"):
                raise ValueError(f"this model has no beacon memory: set beacon_ratio to None, got {ratio!r}")
            return None
        ratios = list(ratio) if isinstance(ratio, (list, tuple)) else [ratio]
        if not ratios or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ratios):
            raise ValueError(
                f"beacon_ratio must be a whole number of at least 1, a list of such, or 'none', got {ratio!r}"
            )
        if len(ratios) > 1 and self.beacon_ratio_mix not in BEACON_RATIO_MIXES:
            raise ValueError(
                f"beacon_ratio_mix must be one of {BEACON_RATIO_MIXES}, got {self.beacon_ratio_mix!r}; or give a "
                "single beacon_ratio, which needs none"
            )
        return {"window": self.beacon_window, "ratios": ratios, "mix": self.beacon_ratio_mix, "seed": self.beacon_seed}

    def resolve_unit_frames(self, beacons: dict | None) -> int:
        """Frames behind which a video can be continued as if it had not ended: a group, or what fills beacon windows.

        Args:
            beacons: As `resolve_beacons` gave them when the video was begun.
        """
        if beacons is None or self.token_selector is not None:
            return self.frames_per_group
        window = beacons["window"]
        return window // math.gcd(window, self.compressor_config.tokens_per_group) * self.frames_per_group

    def resolve_keep_ratio(self) -> float:
        """The share of visual tokens that the selector keeps now.

        Raises:
            ValueError: On a value outside its range.
        """
        if self.keep_seed is not None:
            return random.Random(self.keep_seed).uniform(*RANDOM_KEEP_RATIO)
        ratio = self.keep_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(f"keep_ratio must be a number above 0 and at most 1, got {ratio!r}")
        return ratio

    def resolve_vision_chunk_frames(self) -> int:
        """Frames per call of the tower: a whole number of groups, at least one; the published switch wins."""
        frames = self.vision_chunk_frames
        if getattr(self, "enable_chunk_prefill", False):
            published = (getattr(self, "prefill_config", None) or {}).get("chunk_size_for_vision_tower")
            frames = frames if published is None else published
        if not isinstance(frames, int) or frames < 1:
            raise ValueError(f"the vision chunk must be a number of frames of at least 1, got {frames!r}")
        return max(frames // self.frames_per_group, 1) * self.frames_per_group

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Like the library's, but also reads a published flat config.json (see `from_published`)."""
        if config_dict.get("model_type") in PUBLISHED_MODEL_TYPES and "text_config" not in config_dict:
            config_dict = cls.from_published(config_dict).to_dict()
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_published(cls, published, preset=None):
        """Builds our config from a published config.json.

        Args:
            published: The parsed config.json of a published checkpoint (flat, `mm_*` keys).
            preset: What that file does not spell out, as the dict of a complete config (`presets/*.json`); None takes
                this class's defaults. Sizes that the published file states win over the preset's.

        Returns:
            A `VideoXLConfig`.
        """
        if preset is None and "beacon_window" in published:
            raise ValueError("a config.json with beacon memory needs a preset: convert it with convert_weights.py")
        config = dict(preset) if preset else cls().to_dict()
        text = {key: published[key] for key in _PUBLISHED_TEXT_KEYS if key in published}
        if "beacon_window" in published:
            text.pop("rope_scaling", None)  # as the published code does
        if not {"rope_theta", "rope_parameters"} & set(text):
            text["rope_parameters"] = preset["text_config"]["rope_parameters"] if preset else dict(_QWEN2_5_ROPE)
        config["text_config"] = {"model_type": "qwen2", **text}
        vision = {key: value for key, value in config["vision_config"].items() if key != "transformers_version"}
        vision = config["vision_config"] = {**vision, **published.get("vision_config", {})}
        if vision["model_type"] != "siglip_vision_model":
            # Members with SigLIP drop its last layer whatever this key says.
            config["vision_feature_layer"] = published.get("mm_vision_select_layer", config["vision_feature_layer"])
        compressor = {"projector_pool_size": 2, **config.get("compressor_config", {})}
        compressor["hidden_size"] = published.get("mm_hidden_size", vision["hidden_size"])
        compressor["projector_pool_size"] = published.get("mm_spatial_pool_stride", compressor["projector_pool_size"])
        if (mode := published.get("mm_spatial_pool_mode", "average")) != "average":
            raise ValueError(f"mm_spatial_pool_mode must be 'average', got {mode!r}")
        if compressor.get("compressor_type") == "none":
            compressor["grid_size"] = vision["image_size"] // vision["patch_size"]
        config["compressor_config"] = compressor
        config["tie_word_embeddings"] = published.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        copied = ("enable_sparse", "sparse_mode", "sparse_config", "enable_chunk_prefill", "prefill_config")
        copied += ("video_token_id", "time_start_token_id", "time_end_token_id")
        copied += ("image_grid_pinpoints",) if isinstance(published.get("image_grid_pinpoints"), list) else ()
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
        return cls(**config)


def _sub_config(value, defaults, config_class=None):
    """Turns a dict (or None) into a typed sub-config; objects pass through."""
    if value is None:
        value = defaults
    if not isinstance(value, dict):
        return value
    if config_class is not None:
        return config_class(**value)
    model_type = value.get("model_type", defaults.get("model_type"))
    if model_type == "siglip_vision_model":
        # The pooling head is not part of any member of the family.
        return SiglipVisionConfig(**{"vision_use_head": False, **value})
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"sub-config with unknown model_type {model_type!r}")
    return CONFIG_MAPPING[model_type](**value)
