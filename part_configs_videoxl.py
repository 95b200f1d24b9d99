"""Sub-configs of the rooms between tower and language model: the compressor, and sparse attention."""

from transformers import PreTrainedConfig

PREFILL_MODES = ("full", "streaming", "mask")
DECODE_MODES = ("full", "bilevel")


class VideoXLCompressorConfig(PreTrainedConfig):
    """How frame features become visual tokens, up to and including the projector.

    Args:
        compressor_type: Slot value; `"dts"` is dynamic token synthesis (Video-XL-2, Video-XL-Pro), `"none"` passes
            the tower's features on (Video-XL), `"tome"` merges similar tokens of a clip (VideoChat-Flash).
        hidden_size: Channels of the tower's features and of the compressor.
        frames_per_group: Frames that are merged into one group of tokens; a power of two.
        grid_size: Side of the square grid that the tower's grid is resized to before the compressor.
        projector_pool_size: Side of the average pooling after the projector.
        projector_hidden_act: Activation between the projector's two layers.
        norm_groups, norm_eps: Group normalisation of the compressor.
        max_relative_position: Half size of the relative-position tables of the temporal attention.
        kernel_size: Side of the 3-D convolutions that halve the time axis.
        merge_heads: Token merging compares tokens by the mean over so many parts of their channels (the tower's
            heads).
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
        merge_heads=16,
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
        self.merge_heads = merge_heads
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
    # And where visual tokens are dropped between layers, see `VideoXLConfig.resolve_llm_compression`.
    dropping = None
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
        compressed = {"beacons": self.beacons, "dropping": self.dropping}
        return {**plan, **{name: settings for name, settings in compressed.items() if settings is not None}}

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
