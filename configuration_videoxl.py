"""Configuration of the Video-XL family: every setting once, in one config with a sub-config for each part.

What is surprising:
* `vision_feature_layer` counts like `hidden_states` of transformers, so -2 means "the last of `num_hidden_layers` is
  not used": that layer is not built, and the checkpoint does not hold it.
* `sparse_attention` is read at call time, and a dict may be assigned to it. The switches of the published code
  (`enable_sparse`, `enable_chunk_prefill`) win over its prefill fields while they are on.
  `resolve_sparse_attention` brings all of that, beacon memory and the dropping of tokens into one `Settings`.
* `frames_config` is shared: a processor holds a copy. Its settings can also be read, set and saved as the config's own
  (`config.time_format`), as config.json of earlier versions have them.
* Configs without an `__init__` are data classes (the library makes them so): a line is a setting with its default, and
  what else a file holds comes to `__post_init__`.
* Importing this file enters the model into a table of the library, because `transformers serve` reads it.
* Values that are not known, out of range or do not go together raise ValueError: those of a part when they are set,
  the member's own (beacons, dropping, selection) when a call resolves them.
"""

import random
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

PREFILL_MODES, DECODE_MODES = ("full", "streaming", "mask"), ("full", "bilevel")
TOKEN_SELECTORS = (None, "query", "timed_query")
BEACON_RATIO_MIXES = ("step-random", "instance-random", "sequence")
LLM_COMPRESS_TYPES = ("uniform", "attention", "uniform0_attention", "uniform1_attention")
_FRAME_VALUES = {"frame_fit": ("stretch", "crop"), "image_tiling": ("pad", "overview")}

# Between these the published Video-XL-Pro code draws the share of visual tokens that it keeps.
RANDOM_KEEP_RATIO = (0.7, 0.99)
# SigLIP so400m/14 at 384 pixels, the tower of Video-XL-2 (google/siglip-so400m-patch14-384).
_SIGLIP_SO400M = {
    **{"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
    **{"num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False},
}


class VideoXLVideoTowerConfig(PreTrainedConfig):
    """A transformer over the patches of all frames of a clip: UMT or InternVideo2, which transformers lacks."""

    base_config_key = "vision_config"
    qk_norm = layer_scale = False

    hidden_size: int = 1024  # C, channels
    num_hidden_layers: int = 24  # of the whole tower; `VideoXLConfig.vision_feature_layer` says how many are built
    num_attention_heads: int = 16  # of the attention, and of the token merging behind it
    num_channels: int = 3  # colours of a frame
    image_size: int = 224  # side of the square frames, in pixels
    patch_size: int = 16  # side of a patch, in pixels
    num_frames: int = 4  # of a clip
    mlp_ratio: float = 4.0  # width of the MLP over `hidden_size`
    hidden_act: str = "gelu"  # activation of the MLP
    norm_eps: float = 1e-6  # of the norms inside the blocks
    final_norm_eps: float | None = 1e-12  # of the norm behind the last block; None for a tower without one

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} {getattr(self, whole)} must be a multiple of {part} {getattr(self, part)}")

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP, cut to a whole number as in the public references (418 for 96 * 48 / 11)."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def grid_size(self) -> int:
        """Patches along the side of a frame."""
        return self.image_size // self.patch_size


class VideoXLUMTConfig(VideoXLVideoTowerConfig):
    """UMT-L (Unmasked Teacher, arXiv 2303.16058) as VideoChat-Flash uses it; the defaults are `umt-large`'s."""

    model_type = "videoxl_umt"


class VideoXLInternVideo2Config(VideoXLVideoTowerConfig):
    """InternVideo2-1B (arXiv 2403.15377) as VideoChat-Flash uses it."""

    model_type = "videoxl_internvideo2"
    qk_norm = layer_scale = True

    hidden_size: int = 1408
    num_hidden_layers: int = 40
    patch_size: int = 14
    mlp_ratio: float = 48 / 11
    final_norm_eps: float | None = None


VIDEO_TOWERS = {config.model_type: config for config in (VideoXLUMTConfig, VideoXLInternVideo2Config)}


class VideoXLCompressorConfig(PreTrainedConfig):
    """How frame features become visual tokens, up to and including the projector."""

    model_type = "videoxl_compressor"
    base_config_key = "compressor_config"

    # "dts": dynamic token synthesis (Video-XL-2, Video-XL-Pro). "none": the tower's features are passed on (Video-XL).
    # "tome": similar tokens of a clip are merged (VideoChat-Flash).
    compressor_type: str = "dts"
    hidden_size: int = 1152  # channels of the tower's features and of the compressor
    frames_per_group: int = 4  # frames that are merged into one group of tokens; a power of two
    grid_size: int = 24  # side of the square grid that the tower's grid is resized to before the compressor
    projector_pool_size: int = 2  # side of the average pooling after the projector
    projector_hidden_act: str = "gelu"  # activation between the projector's two layers
    norm_groups: int = 32  # of the compressor's group normalisation
    norm_eps: float = 1e-6  # of the same
    max_relative_position: int = 64  # half the size of the relative-position tables of the temporal attention
    kernel_size: int = 3  # side of the 3-D convolutions that halve the time axis
    merge_heads: int = 16  # token merging compares tokens by the mean over so many parts of them (the tower's heads)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.frames_per_group < 1 or self.frames_per_group & (self.frames_per_group - 1):
            raise ValueError(f"frames_per_group must be a power of two, got {self.frames_per_group}")
        side, pool = self.grid_size, self.projector_pool_size
        if side % pool:
            raise ValueError(f"grid_size {side} must be a multiple of projector_pool_size {pool}")

    @property
    def tokens_per_group(self) -> int:
        """Visual tokens that one group of frames becomes."""
        return (self.grid_size // self.projector_pool_size) ** 2


class VideoXLFramesConfig(PreTrainedConfig):
    """How frames and images are chosen, resized and named in the prompt: what a model and its processor share."""

    model_type = "videoxl_frames"
    base_config_key = "frames_config"

    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)  # normalisation of pixels in 0..1, per channel
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    frame_fit: str = "stretch"  # how a frame becomes a square; "crop": short side to size, middle of the long one
    # Whether frames are resized bit for bit as in the public code, ten times slower; else 2 of 255 levels may be off.
    exact_resize: bool = False
    # (width, height) in pixels of the grids that images are cut in; None for all of 1 to 6 columns and rows of the
    # tower's image size, as in Video-XL-2.
    image_grid_pinpoints: list[list[int]] | None = None
    # "pad" fits an image into its grid between black borders. "overview" squashes it into a first tile, stretches it
    # over the grid for the others, and lays the tokens of these out as one picture's.
    image_tiling: str = "pad"
    image_timestamps: bool = False  # whether every tile of an image has a timestamp, of 0 s, in front of it
    time_format: str | None = "Time {seconds:.1f}s:"  # the timestamp's text; None for families without timestamps
    video_message: str | None = None  # in front of the first question, with {duration} in seconds and {num_frames}
    frame_sampler: str = "fps"  # how frames are chosen from a file: like the next two for `FrameSampler`
    min_num_frames: int = 64
    frame_multiple: int = 8
    max_source_bytes: int = 2**30  # of a file in memory: bytes, an open file, a `data:` address

    def __setattr__(self, name, value):
        # override: a config's and a processor's own attributes end here, at construction and later
        if value not in _FRAME_VALUES.get(name, [value]):
            raise ValueError(f"{name} must be one of {_FRAME_VALUES[name]}, got {value!r:.200}")
        super().__setattr__(name, list(value) if isinstance(value, tuple) else value)


# The fields that a config and a processor also offer as their own.
FRAME_SETTINGS = tuple(VideoXLFramesConfig.__annotations__)


class SharesFrameSettings:
    """Reads and sets the settings of the object's `frames_config` as if they were its own."""

    def __getattr__(self, name):
        if name in FRAME_SETTINGS:
            return getattr(self.frames_config, name)
        raise AttributeError(f"{type(self).__name__!r:.200} object has no attribute {name!r:.200}")

    def __setattr__(self, name, value):
        if name in FRAME_SETTINGS:
            setattr(self.frames_config, name, value)
        else:
            super().__setattr__(name, value)


@dataclass(frozen=True)
class Settings:
    """What a call runs with: `sparse_attention` or the published switches, beacon memory and dropping of tokens."""

    # "full": dense causal; "streaming": chunk by chunk; "mask": so too, but timestamp queries see the whole past.
    prefill: str = "full"
    chunk_groups: int = 4  # groups of frames in one prefill chunk, at least 1
    window_chunks: int = 3  # earlier chunks that a chunk sees in full, at least 1
    decode: str = "full"  # keeps all KV; "bilevel": dense KV for relevant chunks, pooled KV for the others
    decode_chunk_groups: int = 4  # groups in one chunk of bi-level decoding
    pool_size: int = 4  # kernel and stride of the pooling over a group's visual KV
    reload: str | dict = "auto"  # how relevant chunks are chosen from the question: `ReloadPolicy.parse`
    # `encode_video` and `chat` keep the key-values of finished chunks in host memory. Frees the device in "streaming"
    # prefill; "mask" works, but moves a layer's past to the device for every chunk.
    offload: bool = False
    beacons: dict | None = None  # beacon memory: `window`, `ratios`, `mix`, `seed`; None where nothing is compressed
    dropping: dict | None = None  # of visual tokens between layers: `type`, `layers`, `ratios`; None where nothing is

    def __post_init__(self):
        for name, known in (("prefill", PREFILL_MODES), ("decode", DECODE_MODES), ("offload", (True, False))):
            if getattr(self, name) not in known or type(getattr(self, name)) is not type(known[0]):
                raise ValueError(f"sparse_attention.{name} must be one of {known}, got {getattr(self, name)!r:.200}")
        for name in ("chunk_groups", "window_chunks", "decode_chunk_groups", "pool_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"sparse_attention.{name} must be an integer of at least 1, got {value!r:.200}")

    @property
    def plan(self) -> dict:
        """What decides who sees whom during prefill, and what is kept of it; ready for JSON."""
        names = ("prefill", "chunk_groups", "window_chunks", "beacons", "dropping")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class VideoXLSparseAttentionConfig(PreTrainedConfig):
    """Who sees whom during prefill, and what is kept for decoding: the fields of `Settings`, with its defaults."""

    model_type = "videoxl_sparse_attention"
    base_config_key = "sparse_attention"
    # But not beacons and dropping, which have no default: other settings decide them.
    fields: ClassVar[tuple] = tuple(field.name for field in fields(Settings) if field.default is not None)

    def __init__(self, **kwargs):
        given = {name: kwargs.pop(name, getattr(Settings, name)) for name in self.fields}
        known = kwargs and {*PreTrainedConfig().to_dict(), "model_type", "transformers_version", "attn_implementation"}
        if unknown := sorted(key for key in kwargs if key not in known and not key.startswith("_")):
            raise ValueError(
                f"sparse_attention has no field {', '.join(unknown):.200}; it has {', '.join(self.fields)}"
            )
        Settings(**given)  # raises
        super().__init__(**kwargs)
        for name, value in given.items():
            setattr(self, name, value)


class VideoXLConfig(SharesFrameSettings, PreTrainedConfig):
    """Configuration of `VideoXLForConditionalGeneration`; the defaults are Video-XL-2's outside the language model.

    Sub-configs may be dicts; of `sparse_attention` and `frames_config` also when they are assigned later.
    """

    model_type = "videoxl"
    sub_configs = {
        "vision_config": AutoConfig,
        "compressor_config": VideoXLCompressorConfig,
        "text_config": AutoConfig,
        "sparse_attention": VideoXLSparseAttentionConfig,
        "frames_config": VideoXLFramesConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None  # the tower's own config (`siglip_vision_model`, ...)
    compressor_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None  # the language model's config (`qwen2`)
    sparse_attention: dict | PreTrainedConfig | None = None
    frames_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -2  # hidden state of the tower that is taken; layers above it are not built
    vision_chunk_frames: int = 32  # go through tower and compressor at once: bounds memory, never changes results
    # What fills a last, partial group: "last" repeats the last frame; "random" doubles random frames in place, as the
    # published Video-XL-Pro code does (`forward` and `generate` only, for comparisons).
    frame_padding: str = "last"
    frame_padding_seed: int = 0
    video_token_id: int = 151654  # the placeholder that stands for one visual token
    time_start_token_id: int | None = 1462  # first token of a timestamp; None for families without timestamps
    time_end_token_id: int | None = 25  # and the last one
    tokenizer_model_max_length: int | None = None  # tokens of a prompt, visual ones included; None for no limit
    # Whether visual tokens are dropped between layers of the language model (VideoChat-Flash), and how: "uniform",
    # "attention", or "uniform0_attention" and "uniform1_attention", which begin with one and two uniform stages.
    mm_llm_compress: bool = False
    llm_compress_type: str = "attention"
    llm_compress_layer_list: list[int] | tuple[int, ...] = (8, 16, 24)  # behind how many layers each stage comes
    llm_image_token_ratio_list: list[float] | tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)  # before, behind each
    # Which visual tokens reach the language model: None for all, "query" by the prompt's text (Video-XL-Pro of March
    # 2025), "timed_query" by it after attention to timestamps (of April 2025).
    token_selector: str | None = None
    selector_heads: int = 4  # of that attention
    keep_ratio: float = 1.0  # share of the visual tokens that the selector keeps, rounded down to a multiple of 16
    keep_seed: int | None = None  # or a seed with which the share is drawn from `RANDOM_KEEP_RATIO`, as published
    max_visual_tokens: int | None = None  # at most so many tokens of a video are kept; None for no limit
    beacon_window: int | None = None  # visual tokens compressed at once into beacons; None for families without them
    beacon_ratio: int | str | list[int] | None = None  # visual tokens per beacon, a list to choose from, or "none"
    # How to choose from a list: "step-random" for every window, "instance-random" for every video, "sequence" in turn.
    beacon_ratio_mix: str = "step-random"
    beacon_seed: int = 42  # of these choices, which start anew with every video
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.text_config is None and "hidden_size" in kwargs:
            raise ValueError(
                "expected a config.json of ours; this one has no text_config, and hidden_size at top level. A "
                "published checkpoint is to be converted first (python convert_weights.py SOURCE OUTPUT in a clone, "
                "or videoxl convert SOURCE OUTPUT where the package is installed); then load OUTPUT."
            )
        self.vision_config = _host_config(self.vision_config, _SIGLIP_SO400M)
        self.text_config = _host_config(self.text_config, {"model_type": "qwen2"})
        self.llm_compress_layer_list = list(self.llm_compress_layer_list or ())
        self.llm_image_token_ratio_list = list(self.llm_image_token_ratio_list or ())
        if self.token_selector not in TOKEN_SELECTORS:
            raise ValueError(f"token_selector must be one of {TOKEN_SELECTORS}, got {self.token_selector!r:.200}")
        # Settings of `frames_config` that come by themselves are set here, so they win over it.
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        # override: users may assign a dict between calls; fields that are missing from it take their defaults.
        own = self.sub_configs.get(name, AutoConfig)
        if own is not AutoConfig and (value is None or isinstance(value, dict)):
            value = own(**(value or {}))
        elif name == "sparse_attention" and not hasattr(value, "prefill"):
            fields = ", ".join(VideoXLSparseAttentionConfig.fields)
            raise ValueError(f"sparse_attention must be a dict with some of {fields}, got {value!r:.200}")
        super().__setattr__(name, value)

    @property
    def rope_scaling(self) -> dict:
        """Rotary scaling of the language model (its `rope_parameters`), for `from_pretrained(rope_scaling=...)`.

        Set it before the model is built; what is left out (`rope_theta`) stays, and None changes nothing.
        """
        return self.text_config.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value):
        # override: the library's would set it where no language model looks
        if value:
            self.text_config.rope_parameters = {"rope_theta": self.rope_scaling.get("rope_theta"), **value}
            self.text_config.standardize_rope_params()

    @property
    def frames_per_group(self) -> int:
        """Frames that share one timestamp and one run of visual tokens."""
        return self.compressor_config.frames_per_group

    def resolve_sparse_attention(self) -> Settings:
        """The settings in force now: `sparse_attention`, overridden by the published switches, and the member's own.

        Raises:
            ValueError: Also on sparse attention where visual tokens are compressed in another way.
        """
        settings = {name: getattr(self.sparse_attention, name) for name in VideoXLSparseAttentionConfig.fields}
        settings = Settings(**settings | self._published_switches())
        beacons, dropping = self.resolve_beacons(), self.resolve_llm_compression()
        if beacons is None and dropping is None and self.token_selector is None:
            return settings
        if (settings.prefill, settings.decode, settings.offload) != ("full", "full", False):
            cause, remedy = "has beacon memory", ", or beacon_ratio to 'none'"
            if dropping is not None:
                cause, remedy = "drops visual tokens between layers", ", or mm_llm_compress to False"
            elif self.token_selector:
                cause, remedy = "selects visual tokens by the question", ""
            raise ValueError(
                f"this model {cause}, which goes with sparse_attention at its defaults only (prefill and decode "
                f"'full', no offload); got prefill={settings.prefill!r:.200}, decode={settings.decode!r:.200}, "
                f"offload={settings.offload!r:.200}: set it to {{}}{remedy}"
            )
        return replace(settings, beacons=beacons, dropping=dropping)

    def _published_switches(self) -> dict[str, Any]:
        """What the published code's switches say of the fields of `sparse_attention`, while they are on."""
        found = {}
        if getattr(self, "enable_sparse", False):
            published = getattr(self, "sparse_config", None) or {}
            found["prefill"] = getattr(self, "sparse_mode", None) or "streaming"
            found |= _renamed(published, {"block_size_chosed": "chunk_groups", "prev_blocks_num": "window_chunks"})
        if getattr(self, "enable_chunk_prefill", False):
            published = getattr(self, "prefill_config", None) or {}
            found["prefill"] = published.get("chunk_prefill_mode", "streaming")
            # The published code does not define `step_size`: that it is the window in chunks is our reading.
            found |= _renamed(published, {"chunk_size": "chunk_groups", "step_size": "window_chunks"})
            found |= {"offload": bool(published["offload"])} if "offload" in published else {}
        return found

    def resolve_beacons(self) -> dict | None:
        """The beacon memory in force now: `window`, `ratios`, `mix` and `seed`; None where nothing is compressed."""
        ratio, mix = self.beacon_ratio, self.beacon_ratio_mix
        if ratio in (None, "none"):
            return None
        if self.beacon_window is None:
            raise ValueError(f"this model has no beacon memory: set beacon_ratio to None, got {ratio!r:.200}")
        ratios = list(ratio) if isinstance(ratio, (list, tuple)) else [ratio]
        if not ratios or not all(type(ratio) is int and ratio >= 1 for ratio in ratios):
            raise ValueError(
                f"beacon_ratio must be a whole number of at least 1, a list of such or 'none', got {ratio!r:.200}"
            )
        if len(ratios) > 1 and mix not in BEACON_RATIO_MIXES:
            raise ValueError(
                f"beacon_ratio_mix must be one of {BEACON_RATIO_MIXES}, got {mix!r:.200}; one beacon_ratio needs none"
            )
        return {"window": self.beacon_window, "ratios": ratios, "mix": mix, "seed": self.beacon_seed}

    @property
    def sees_clips(self) -> bool:
        """Whether the tower sees whole clips (groups) of frames, and not each frame by itself."""
        return self.vision_config.model_type in VIDEO_TOWERS

    def resolve_llm_compression(self) -> dict | None:
        """The dropping of visual tokens in force now: `type`, `layers` and `ratios`; None where nothing is dropped."""
        if not self.mm_llm_compress:
            return None
        if self.compressor_config.compressor_type != "tome":
            raise ValueError(
                "mm_llm_compress drops visual tokens between layers, which only VideoChat-Flash models do: this model "
                "does not. Set it to False; sparse_attention saves key-values here"
            )
        kind, layers, ratios = self.llm_compress_type, self.llm_compress_layer_list, self.llm_image_token_ratio_list
        if kind not in LLM_COMPRESS_TYPES:
            raise ValueError(f"llm_compress_type must be one of {LLM_COMPRESS_TYPES}, got {kind!r:.200}")
        # Behind the last layer only a uniform stage does no harm (and nothing else).
        most = self.text_config.num_hidden_layers - (kind != "uniform")
        numbers = isinstance(layers, (list, tuple)) and all(type(layer) is int for layer in layers)
        if not numbers or not layers or sorted({*layers}) != list(layers) or not 1 <= layers[0] <= layers[-1] <= most:
            raise ValueError(
                f"llm_compress_layer_list must be ascending numbers of layers from 1 to {most}, behind which "
                f"{kind!r:.200} drops visual tokens, got {layers!r:.200}"
            )
        numbers = isinstance(ratios, (list, tuple)) and all(type(ratio) in (int, float) for ratio in ratios)
        shares = list(ratios) if numbers else []
        falling = shares[:1] == [1] and shares == sorted(shares, reverse=True) and shares[-1] >= 0
        # The published code never looks at further ones: its defaults stay where only the layers are set.
        if not falling or len(shares) <= len(layers):
            raise ValueError(
                f"llm_image_token_ratio_list must be {len(layers) + 1} shares from 1 down to 0, one before and one "
                f"behind each stage of llm_compress_layer_list={list(layers)}, got {ratios!r:.200}"
            )
        return {"type": kind, "layers": list(layers), "ratios": shares[: len(layers) + 1]}

    def resolve_context_limit(self) -> tuple[int, str] | None:
        """Tokens that a sequence may have, and why; None where `tokenizer_model_max_length` is None."""
        tokens, text = self.tokenizer_model_max_length, self.text_config
        if tokens is None:
            return None
        rope, reach = text.rope_parameters or {}, text.max_position_embeddings
        if rope.get("rope_type", "default") != "default":
            reach = max(reach, int(rope.get("factor", 1.0) * (rope.get("original_max_position_embeddings") or reach)))
        if tokens <= reach:
            return tokens, f"config.tokenizer_model_max_length={tokens}, of positions that reach {reach}"
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": text.max_position_embeddings}
        return reach, (
            f"its positions reach {reach} (config.text_config.max_position_embeddings and rope scaling), whatever "
            f"tokenizer_model_max_length={tokens} says; for more load it with rope_scaling={yarn}"
        )

    def resolve_keep_ratio(self) -> float:
        """The share of visual tokens that the selector keeps now."""
        if self.keep_seed is not None:
            return random.Random(self.keep_seed).uniform(*RANDOM_KEEP_RATIO)
        ratio = self.keep_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(f"keep_ratio must be a number above 0 and at most 1, got {ratio!r:.200}")
        return ratio

    def resolve_vision_chunk_frames(self) -> int:
        """Frames per call of the tower: a whole number of groups, at least one; the published switch wins."""
        frames = self.vision_chunk_frames
        if getattr(self, "enable_chunk_prefill", False):
            published = (getattr(self, "prefill_config", None) or {}).get("chunk_size_for_vision_tower")
            frames = frames if published is None else published
        if not isinstance(frames, int) or frames < 1:
            raise ValueError(f"the vision chunk must be a number of frames of at least 1, got {frames!r:.200}")
        return max(frames // self.frames_per_group, 1) * self.frames_per_group


# `transformers serve` follows `auto_map` only for model types that stand in this table.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[VideoXLConfig.model_type] = "VideoXLForConditionalGeneration"


def _renamed(settings: dict, names: dict) -> dict:
    return {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}


def _host_config(value, defaults):
    """Turns a dict (or None) into the tower's or language model's config; objects pass through."""
    value = defaults if value is None else value
    if not isinstance(value, dict):
        return value
    model_type = value.get("model_type", defaults["model_type"])
    if model_type not in VIDEO_TOWERS and model_type not in CONFIG_MAPPING:
        raise ValueError(f"sub-config with unknown model_type {model_type!r:.200}")
    if model_type == "siglip_vision_model":
        value = {"vision_use_head": False, **value}  # no member of the family has the pooling head
    return (VIDEO_TOWERS.get(model_type) or CONFIG_MAPPING[model_type])(**value)
