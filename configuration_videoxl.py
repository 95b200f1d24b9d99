"""Configuration of the Video-XL family: one config, with slots for tower x compressor x attention plan.

What is surprising:
* `vision_feature_layer` counts like `hidden_states` of transformers, so -2 means "the last of `num_hidden_layers` is
  not used": that layer is not built, and the checkpoint does not hold it.
* `sparse_attention` may be assigned as a dict at any time; it becomes a typed sub-config at that moment. It is read
  at call time, and the switches of the published code (`enable_sparse`, `enable_chunk_prefill`) win over its prefill
  fields while
  they are on: `resolve_sparse_attention` is the one place that knows.
* A published `config.json` is flat (`mm_*` keys and the language model's sizes at top level) and is refused: the
  converter reads it, where it has the weights to go with it.
"""

import math
import random

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, SiglipVisionConfig

from .part_configs_videoxl import VideoXLCompressorConfig, VideoXLSparseAttentionConfig
from .tower_config_videoxl import VIDEO_TOWERS

FRAME_FITS = ("stretch", "crop")
IMAGE_TILINGS = ("pad", "overview")
TOKEN_SELECTORS = (None, "query", "timed_query")
BEACON_RATIO_MIXES = ("step-random", "instance-random", "sequence")
LLM_COMPRESS_TYPES = ("uniform", "attention", "uniform0_attention", "uniform1_attention")

# Between these the published Video-XL-Pro code draws the share of visual tokens that it keeps.
RANDOM_KEEP_RATIO = (0.7, 0.99)
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
        exact_resize: Whether frames are resized bit for bit as the public code does, which takes ten times as long.
            Without it they are at most 2 of 255 levels away.
        frame_fit: How a frame becomes a square: `"stretch"`, or `"crop"` (short side to size, middle of the long one).
        frame_padding: What fills a last, partial group: `"last"` repeats the last frame; `"random"` doubles random
            frames in place, as the published Video-XL-Pro code does (`forward` and `generate` only, for comparisons).
        frame_padding_seed: Of that choice.
        image_grid_pinpoints: (width, height) in pixels of the grids that images are cut in; None for all of 1 to 6
            columns and rows of the tower's image size, as in Video-XL-2.
        image_timestamps: Whether every tile of an image has a timestamp, of 0 s, in front of it.
        image_tiling: `"pad"` fits an image into its grid between black borders; `"overview"` squashes it into a first
            tile, stretches it over the grid for the others, and lays the tokens of these out as one picture's.
        frame_sampler: How frames are chosen from a file, a mode of `FrameSampler`: `"fps"` by `sample_fps` and its
            companions; `"dynamic_fps1"` is VideoChat-Flash's rule: about one a second, in multiples of
            `frame_multiple`, at least `min_num_frames` where there are.
        min_num_frames, frame_multiple: See `frame_sampler`.
        video_message: Sentence in front of the first question, formatted with `duration` (seconds) and `num_frames`;
            None for families without it.
        tokenizer_model_max_length: Tokens that a prompt may have, visual ones included; None for no limit.
        mm_llm_compress: Whether visual tokens are dropped between layers of the language model (VideoChat-Flash).
        llm_compress_type: How: `"uniform"`, `"attention"`, or `"uniform0_attention"` and `"uniform1_attention"`, which
            begin with one and two uniform stages.
        llm_compress_layer_list: Per stage, behind how many layers it comes.
        llm_image_token_ratio_list: Share of a video's tokens that is left before the first stage and behind each.
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
        exact_resize=False,
        frame_padding="last",
        frame_padding_seed=0,
        image_grid_pinpoints=None,
        image_timestamps=False,
        image_tiling="pad",
        frame_sampler="fps",
        min_num_frames=64,
        frame_multiple=8,
        video_message=None,
        tokenizer_model_max_length=None,
        mm_llm_compress=False,
        llm_compress_type="attention",
        llm_compress_layer_list=(8, 16, 24),
        llm_image_token_ratio_list=(1.0, 0.5, 0.25, 0.125),
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
                "expected a config.json of ours; this one has no text_config, and hidden_size at top level. A "
                "published checkpoint is to be converted first (python convert_weights.py SOURCE OUTPUT in a clone, "
                "or videoxl convert SOURCE OUTPUT where the package is installed); then load OUTPUT."
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
        self.exact_resize = exact_resize
        self.frame_padding = frame_padding
        self.frame_padding_seed = frame_padding_seed
        self.image_grid_pinpoints = image_grid_pinpoints
        self.image_timestamps = image_timestamps
        self.image_tiling = image_tiling
        self.frame_sampler = frame_sampler
        self.min_num_frames = min_num_frames
        self.frame_multiple = frame_multiple
        self.video_message = video_message
        self.tokenizer_model_max_length = tokenizer_model_max_length
        self.mm_llm_compress = mm_llm_compress
        self.llm_compress_type = llm_compress_type
        self.llm_compress_layer_list = list(llm_compress_layer_list or ())
        self.llm_image_token_ratio_list = list(llm_image_token_ratio_list or ())
        self.token_selector = token_selector
        self.selector_heads = selector_heads
        self.keep_ratio = keep_ratio
        self.keep_seed = keep_seed
        self.max_visual_tokens = max_visual_tokens
        self.beacon_window = beacon_window
        self.beacon_ratio = beacon_ratio
        self.beacon_ratio_mix = beacon_ratio_mix
        self.beacon_seed = beacon_seed
        known_values = {"frame_fit": FRAME_FITS, "image_tiling": IMAGE_TILINGS}
        for name, known in {**known_values, "token_selector": TOKEN_SELECTORS}.items():
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

    def resolve_sparse_attention(self) -> VideoXLSparseAttentionConfig:
        """The sparse-attention settings in force now: `sparse_attention`, overridden by the published switches.

        `prefill_config["step_size"]` is read as the window in chunks: our reading, the published code does not define
        it.

        Raises:
            ValueError: On a value outside its range, or sparse attention where visual tokens are compressed otherwise.
        """
        settings = {name: getattr(self.sparse_attention, name) for name in VideoXLSparseAttentionConfig.fields}
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
        resolved.beacons, resolved.dropping = self.resolve_beacons(), self.resolve_llm_compression()
        if resolved.beacons is None and resolved.dropping is None and self.token_selector is None:
            return resolved
        if (resolved.prefill, resolved.decode, resolved.offload) != ("full", "full", False):
            cause, remedy = "has beacon memory", ", or beacon_ratio to 'none'"
            if resolved.dropping is not None:
                cause, remedy = "drops visual tokens between layers", ", or mm_llm_compress to False"
            elif self.token_selector:
                cause, remedy = "selects visual tokens by the question", ""
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

    @property
    def sees_clips(self) -> bool:
        """Whether the tower sees whole clips (groups) of frames, and not each frame by itself."""
        return self.vision_config.model_type in VIDEO_TOWERS

    def resolve_llm_compression(self) -> dict | None:
        """The dropping of visual tokens in force now: `type`, `layers` and `ratios`; None where nothing is dropped.

        Raises:
            ValueError: On values that do not go together, or a model of a family that drops nothing.
        """
        if not self.mm_llm_compress:
            return None
        if self.compressor_config.compressor_type != "tome":
            raise ValueError(
                "mm_llm_compress drops visual tokens between layers, which only VideoChat-Flash models do: this model "
                "does not. Set it to False; sparse_attention saves key-values here"
            )
        kind, layers, ratios = self.llm_compress_type, self.llm_compress_layer_list, self.llm_image_token_ratio_list
        if kind not in LLM_COMPRESS_TYPES:
            raise ValueError(f"llm_compress_type must be one of {LLM_COMPRESS_TYPES}, got {kind!r}")
        # Behind the last layer only a uniform stage does no harm (and nothing else).
        most = self.text_config.num_hidden_layers - (kind != "uniform")
        numbers = isinstance(layers, (list, tuple)) and all(type(layer) is int for layer in layers)
        if not numbers or not layers or sorted({*layers}) != list(layers) or not 1 <= layers[0] <= layers[-1] <= most:
            raise ValueError(
                f"llm_compress_layer_list must be ascending numbers of layers from 1 to {most}, behind which "
                f"{kind!r} drops visual tokens, got {layers!r}"
            )
        numbers = isinstance(ratios, (list, tuple)) and all(type(ratio) in (int, float) for ratio in ratios)
        falling = (
            numbers and list(ratios) == sorted(ratios, reverse=True) and list(ratios)[:1] == [1] and ratios[-1] >= 0
        )
        # The published code never looks at further ones: its defaults stay where only the layers are set.
        if not falling or len(ratios) <= len(layers):
            raise ValueError(
                f"llm_image_token_ratio_list must be {len(layers) + 1} shares from 1 down to 0, one before and one "
                f"behind each stage of llm_compress_layer_list={list(layers)}, got {ratios!r}"
            )
        return {"type": kind, "layers": list(layers), "ratios": list(ratios[: len(layers) + 1])}

    def resolve_context_limit(self) -> tuple[int, str] | None:
        """Tokens that a sequence may have, and why; None where `tokenizer_model_max_length` is None."""
        tokens, text = self.tokenizer_model_max_length, self.text_config
        if tokens is None:
            return None
        rope, reach = text.rope_parameters or {}, text.max_position_embeddings
        if rope.get("rope_type", "default") != "default":
            scaled = rope.get("factor", 1.0) * (rope.get("original_max_position_embeddings") or reach)
            reach = max(reach, int(scaled))
        if tokens <= reach:
            return tokens, f"config.tokenizer_model_max_length={tokens}, of positions that reach {reach}"
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": text.max_position_embeddings}
        return reach, (
            f"its positions reach {reach} (config.text_config.max_position_embeddings and rope scaling), whatever "
            f"tokenizer_model_max_length={tokens} says; for more load it with rope_scaling={yarn}"
        )

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


def _sub_config(value, defaults, config_class=None):
    """Turns a dict (or None) into a typed sub-config; objects pass through."""
    if value is None:
        value = defaults
    if not isinstance(value, dict):
        return value
    if config_class is not None:
        return config_class(**value)
    model_type = value.get("model_type", defaults.get("model_type"))
    if model_type in VIDEO_TOWERS:
        return VIDEO_TOWERS[model_type](**value)
    if model_type == "siglip_vision_model":
        # The pooling head is not part of any member of the family.
        return SiglipVisionConfig(**{"vision_use_head": False, **value})
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"sub-config with unknown model_type {model_type!r}")
    return CONFIG_MAPPING[model_type](**value)
