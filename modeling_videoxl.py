"""The Video-XL model: composes tower, compressor, projector and language model; forward and hooks of `generate`.

What is surprising:
* A prompt with videos is prefilled inside `forward`, prompt by prompt, into the cache that `generate` made, which
  becomes one of ours. Whole-sequence calls without a cache (training, `use_cache=False`) run at once instead.
* `generate` expands prompts for beams, never videos: every prompt is encoded and prefilled once, and its cache is
  repeated. Forms of decoding that transformers would get silently wrong over a video are refused.
* Placeholders count in the prompt only. A later token may have any id, so decode steps look for none.
* `forward` knows every argument it takes. What it does not know is an error, above all a cache under another name.
* The model object holds no session. Whatever outlives a call is in the cache or in the `EncodedVideo` that the caller
  holds.

B batch, V videos, F frames, G groups of frames, N visual tokens per group, P patches, C tower channels, L sequence.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .beacon_memory_videoxl import BeaconMemory
from .bilevel_videoxl import BilevelDecoding
from .chat_videoxl import VideoXLChatMixin
from .compressor_videoxl import (
    VideoXLDynamicTokenSynthesis,
    VideoXLMultiModalProjector,
    VideoXLRelativePosition,
    build_compressor,
)
from .configuration_videoxl import VideoXLConfig
from .kv_cache import CACHE_NAME, CACHE_NAMES, VideoXLCache
from .planning_videoxl import plan_video
from .prefill_videoxl import (
    DECODINGS,
    POLICIES,
    SEGMENT_TOKENS,
    Call,
    InForce,
    SequencePolicy,
    continue_rows,
    extend_cache,
    positions_of,
    prefill_rows,
    require_context,
    run_steps,
    run_without_cache,
    waits_for_question,
)
from .sparse_attention import plan_packed, prompt_rows, register_attention
from .token_dropping_videoxl import TokenDropping
from .token_selector_videoxl import TokenSelection
from .training_videoxl import (
    among_outputs,
    checkpointed_layers,
    of_whole_length,
    packed_samples,
    require_trainable,
    without_checkpointing,
)
from .vision_videoxl import build_vision_tower, encode_videos

logger = logging.get_logger(__name__)

# What members do differently, in the order in which it is asked for: see `SequencePolicy.apply`.
POLICIES += [BeaconMemory, TokenDropping, TokenSelection]
DECODINGS["bilevel"] = BilevelDecoding()


class VideoXLPreTrainedModel(PreTrainedModel):
    config_class = VideoXLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        *("Qwen2DecoderLayer", "SiglipEncoderLayer", "CLIPEncoderLayer", "VideoXLDynamicTokenSynthesis"),
        *("VideoXLClipLayer", "VideoXLClipEmbeddings", "VideoXLClassClipEmbeddings"),
    ]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @property
    def device(self) -> torch.device:
        # override: weights that accelerate has offloaded are on "meta"; its hook on them knows where they run
        device, embeddings = super().device, self.get_input_embeddings()
        if device.type != "meta" or embeddings is None:
            return device
        hook = getattr(embeddings, "_hf_hook", None)
        device = embeddings.weight.device
        running = getattr(hook, "execution_device", None)
        return torch.device(running) if device.type == "meta" and running is not None else device

    @torch.no_grad()
    def _init_weights(self, module):
        # override: the library's default covers linear, convolution, norm and embedding layers, not bare parameters
        super()._init_weights(module)
        if isinstance(module, VideoXLDynamicTokenSynthesis):
            init.normal_(module.temporal_encoding)
        elif isinstance(module, VideoXLRelativePosition):
            init.xavier_uniform_(module.embeddings_table)


class VideoXLModel(VideoXLPreTrainedModel):
    """Vision tower, compressor, projector, token selector and language model without its head."""

    # Tokens of a prompt that run through the language model at once, see `SEGMENT_TOKENS`.
    segment_tokens = SEGMENT_TOKENS

    def __init__(self, config: VideoXLConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        self.compressor = build_compressor(config.compressor_config)
        self.multi_modal_projector = VideoXLMultiModalProjector(
            config.compressor_config, config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.built_rope = dict(config.text_config.rope_parameters)
        if "sliding_attention" in getattr(self.language_model.config, "layer_types", ()):
            raise ValueError("text_config.use_sliding_window is not supported: visibility is the chunk plan's")
        for kind in POLICIES:
            kind.add_modules(self)
        self.post_init()
        self._route_attention()

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        # override: the language model's attention goes through the one that follows plans
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self._route_attention()

    def _route_attention(self):
        text_config = self.language_model.config
        text_config._attn_implementation = register_attention(text_config._attn_implementation or "eager")

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def embed_prompt(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of prompt ids; placeholders, which need no row of their own, get any."""
        return self.get_input_embeddings()(input_ids.masked_fill(input_ids == self.config.video_token_id, 0))

    def get_video_features(self, pixel_values_videos, output_tower_features=False, return_dict=True):
        """Visual tokens of videos and images; arguments, results and errors are those of `encode_videos`."""
        return encode_videos(self, pixel_values_videos, output_tower_features, return_dict)

    @property
    def tokens_per_group(self) -> int:
        return self.config.compressor_config.tokens_per_group

    def new_cache(self) -> VideoXLCache:
        """An empty cache for this model."""
        return VideoXLCache(self.config.text_config.num_hidden_layers)

    def extend_cache(self, inputs_embeds, layout, cache, keep_hidden=0) -> torch.Tensor | None:
        """Runs embeddings of one sequence into a cache under the settings in force, see `SequencePolicy.extend`."""
        return extend_cache(self, inputs_embeds, layout, cache, InForce(self.config).policy, keep_hidden)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values_videos=None,
        use_cache=None,
        cache=None,
        output_attentions=None,
        output_hidden_states=None,
        call=None,
        **unknown,
    ) -> BaseModelOutputWithPast:
        """See `VideoXLForConditionalGeneration.forward`; `call` is a `Call` with what else that was told."""
        refuse_unknown("forward", unknown)
        cache = given_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, length], got {tuple(input_ids.shape)}")
        use_cache = use_cache if use_cache is not None else self.config.text_config.use_cache
        direct, call = call is None, Call(InForce(self.config)) if call is None else call
        past, prompt_length = 0 if cache is None else cache.get_seq_length(), call.prompt_length
        new = (inputs_embeds if input_ids is None else input_ids).shape[1]
        _require_whole_past(past, new, attention_mask, position_ids, prompt_length)
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        options = {"use_cache": use_cache, **{name: value for name, value in wanted.items() if value is not None}}
        has_videos = pixel_values_videos is not None and len(pixel_values_videos) > 0
        if not has_videos and prompt_length is not None and 0 < prompt_length <= past:
            # A step of `generate` behind its whole prompt: whatever the settings say was done with it.
            embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            return self._decode(embeds, attention_mask, position_ids, cache, options)
        if call.dense_chunks is not None and call.in_force.settings.decode == "full":
            raise ValueError("dense_chunks needs bi-level decoding: set config.sparse_attention with decode='bilevel'")
        if has_videos:
            if input_ids is None:
                raise ValueError("pixel_values_videos needs input_ids, whose placeholders say where visual tokens go")
            pixels = pixel_values_videos
            output = self._forward_videos(input_ids, attention_mask, position_ids, cache, pixels, options, call)
            return of_whole_length(output, new) if direct else output
        if new > 1 and (prompt_length is None or past < prompt_length):
            padded = attention_mask is not None and attention_mask.ndim == 2
            end = min(past + new, prompt_length or past + new)
            require_context(self, int(attention_mask[:, :prompt_length].sum(dim=1).max()) if padded else end)
        if input_ids is not None and past == 0:
            self._require_no_placeholders(input_ids[:, :prompt_length])
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if past and isinstance(cache, VideoXLCache):
            rows = cache.rows
            if rows < len(embeds) or waits_for_question(cache, call) or (rows == 1 and new > 1):
                return continue_rows(self, embeds, attention_mask, cache, call)
        return self._decode(embeds, attention_mask, position_ids, cache, options)

    def _decode(self, embeds, attention_mask, position_ids, cache, options) -> BaseModelOutputWithPast:
        """Text, and further tokens of any cache."""
        if isinstance(cache, VideoXLCache) and cache.policy is not None:
            return cache.policy.decode(self, embeds, attention_mask, position_ids, cache, options)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions_of(attention_mask)[:, -embeds.shape[1] :]
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            **options,
        )

    def _forward_videos(self, input_ids, attention_mask, position_ids, cache, pixels, options, call):
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            samples = packed_samples(position_ids)
            if samples is not None and len(samples) > 1:
                return self._forward_packed(input_ids, position_ids, samples, past, pixels, options, call)
            attention_mask = torch.ones(input_ids.shape[0], past + input_ids.shape[1], device=input_ids.device)
        if attention_mask.shape != (input_ids.shape[0], past + input_ids.shape[1]):
            raise ValueError(
                f"attention_mask must be [{input_ids.shape[0]}, {past + input_ids.shape[1]}] (cached and new "
                f"tokens), got {tuple(attention_mask.shape)}"
            )
        require_context(self, int(attention_mask[:, : call.prompt_length].sum(dim=1).max()))
        if not attention_mask[:, past:].any(dim=1).all():
            raise ValueError("attention_mask hides every token of a prompt; at least one must be visible")
        embeds, rows, call = self._embed_videos(input_ids, attention_mask, pixels, options["use_cache"], call)
        filled = self._prefill(embeds, rows, cache, options, call)
        if filled is not None:
            return filled
        if call.in_force.settings.prefill != "full":
            return run_without_cache(self, embeds, rows, call.in_force.policy)
        if call.num_expanded > 1:
            embeds = embeds.repeat_interleave(call.num_expanded, dim=0)
        position_ids = positions_of(attention_mask)[:, past:] if position_ids is None else position_ids
        inputs = {"inputs_embeds": embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.language_model(**inputs, **{CACHE_NAME: cache}, **options)

    def _forward_packed(self, input_ids, position_ids, samples, past, pixels, options, call):
        """Several samples in one sequence [1, L], of which none sees another: whole, without a cache."""
        if past or options["use_cache"] or call.in_force.text_only:
            raise ValueError(
                "position_ids that start anew pack several prompts into one sequence, which goes without a cache "
                "(use_cache=False) and where all tokens have outputs: with beacon memory, a token selector, "
                "mm_llm_compress or decode='bilevel' give one prompt a row"
            )
        require_context(self, int(samples.sum(dim=1).max()))
        features = self.get_video_features(pixels).pooler_output
        timed = [video.ndim < 5 or self.config.image_timestamps for video in pixels]
        rows = prompt_rows(self.config, input_ids.expand(len(samples), -1), samples, features, timed)
        embeds = self._merge(input_ids, torch.ones_like(input_ids), features, None)
        plan = SequencePolicy.facts(call.in_force.policy)
        steps = plan_packed(rows, **plan, device=embeds.device)
        return BaseModelOutputWithPast(last_hidden_state=run_steps(self, embeds, position_ids, steps, None))

    def _embed_videos(self, input_ids, attention_mask, pixels, use_cache, call):
        """Embeddings [B, L, hidden] of prompts with the visual tokens in place, a `PromptRow` each, and the call."""
        past, repeats = attention_mask.shape[1] - input_ids.shape[1], call.num_expanded
        features = self.get_video_features(pixels).pooler_output
        timed = [video.ndim < 5 or self.config.image_timestamps for video in pixels]
        prompts, masks = input_ids[::repeats], attention_mask[::repeats]
        rows = prompt_rows(self.config, prompts, masks, features, timed, call.prompt_length)
        if repeats > 1 and not use_cache:
            # Without a cache every step comes here, and the copies of a prompt have grown apart.
            order = [index for row in rows for _ in range(repeats) for index in row.videos]
            features, timed = [features[index] for index in order], [timed[index] for index in order]
            prompts, masks, call = input_ids, attention_mask, replace(call, num_expanded=1)
            rows = prompt_rows(self.config, prompts, masks, features, timed, call.prompt_length)
        return self._merge(prompts, masks[:, past:], features, call.prompt_length), rows, call

    def _prefill(self, embeds, rows, cache, options, call) -> BaseModelOutputWithPast | None:
        """Prefills prompts with videos into a cache; None where the whole sequence is to run at once without one."""
        in_force, settings = call.in_force, call.in_force.settings
        layers, use_cache = self.config.text_config.num_hidden_layers, options["use_cache"]
        detailed = options.get("output_hidden_states") or options.get("output_attentions")
        if (use_cache or in_force.text_only) and not detailed:
            # What assembles key-values has a cache inside even where the caller wants none.
            cache = VideoXLCache(layers) if cache is None or not use_cache else cache
            if VideoXLCache.adopt(cache, layers):
                output = prefill_rows(self, embeds, rows, cache, call)
                return output if use_cache else BaseModelOutputWithPast(last_hidden_state=output.last_hidden_state)
        if not in_force.text_only and (not use_cache or settings.prefill == "full"):
            return None
        cause = f"sparse_attention with prefill={settings.prefill!r:.200} and decode={settings.decode!r:.200}"
        remedy = "set both to 'full'"
        if in_force.policy.text_only:
            cause = "a model that compresses, selects or drops visual tokens"
            remedy = "set beacon_ratio to 'none' or mm_llm_compress to False if it has one"
        raise ValueError(
            f"{cause} needs a dynamic cache and no output_hidden_states or output_attentions; leave "
            f"cache_implementation unset, or {remedy}"
        )

    def _require_no_placeholders(self, input_ids):
        if found := int((input_ids == self.config.video_token_id).sum()):
            raise ValueError(
                f"the prompt has {found} video placeholders (id {self.config.video_token_id}), but 0 visual tokens "
                "came: pass pixel_values_videos, or keep the placeholder out of the text"
            )

    def _merge(self, input_ids, mask, features, prompt_length):
        """Token embeddings [B, L, hidden] with the visual tokens in place of their placeholders."""
        embeds, is_visual = self.embed_prompt(input_ids), (input_ids == self.config.video_token_id) & mask.bool()
        if prompt_length is not None:
            is_visual[:, prompt_length:] = False
        visual = torch.cat([tokens.flatten(0, 1) for tokens in features]).to(embeds.device, embeds.dtype)
        return embeds.index_put((is_visual,), visual)


class VideoXLForConditionalGeneration(VideoXLPreTrainedModel, VideoXLChatMixin, GenerationMixin):
    """Video-XL with its language-modelling head: `forward`, `generate`, `chat` and `encode_video`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    plan = plan_video
    # For `Trainer`: the loss is divided by `num_items_in_batch` where that comes.
    accepts_loss_kwargs = True
    # What `save_pretrained` writes brings its code with it, however the model was loaded.
    _auto_class = "AutoModel"

    def __init__(self, config: VideoXLConfig):
        super().__init__(config)
        self.model = VideoXLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        # override: see VideoXLModel.set_attn_implementation; this call does not go through it
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.model._route_attention()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_decoder(self):
        return self.model.language_model

    def get_vision_tower(self):
        """The vision tower, under the name that published quick starts use."""
        return self.model.vision_tower

    def get_video_features(self, pixel_values_videos, output_tower_features=False, return_dict=True):
        """See `VideoXLModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, output_tower_features, return_dict)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values_videos=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        prompt_length=None,
        num_expanded=1,
        dense_chunks=None,
        required_chunks=(),
        return_dict=None,
        cache=None,
        output_attentions=None,
        output_hidden_states=None,
        num_items_in_batch=None,
        **unknown,
    ) -> CausalLMOutputWithPast:
        """Language-model outputs of prompts that may hold videos.

        Args:
            input_ids: [B, L], fully expanded: per group of frames its timestamp's tokens and `tokens_per_group` times
                `config.video_token_id`.
            attention_mask: [B, past + L], 0 on padding.
            position_ids: [B, L]; by default counted over the attention mask. Prompts with videos are always counted.
                Without a mask, positions [1, L] that start anew pack several prompts, of which none sees another.
            past_key_values: A cache; prompts with videos fill it in place. `cache` is its other name.
            inputs_embeds: [B, L, hidden] instead of input_ids, for text.
            pixel_values_videos: [V, F, 3, H, W] or a list in order of appearance: [F_i, 3, H, W] for a video,
                [T_i, 1, 3, H, W] for an image of T_i tiles, each a group without a timestamp (with an overview
                [1 + rows, columns, 3, H, W], see `get_video_features`).
            labels: [B, L], -100 where there is no loss; visual positions never have any. With a tensor
                `logits_to_keep` the loss is over the labels behind these positions.
            num_items_in_batch: What the loss is divided by, where it is accumulated over several batches; by default
                the labels of this one.
            output_attentions, output_hidden_states: As in transformers, for whole sequences and decode steps.
            use_cache: False returns no cache and runs the sequence at once.
            logits_to_keep: Number of last positions to compute logits for (0: all), or a tensor of positions.
            prompt_length: Positions from here on are generated tokens; set by `generate`.
            num_expanded: How many times `generate` repeated each prompt; set by `generate`.
            dense_chunks: Bi-level decoding: the chunks to keep dense, instead of choosing by the question. 0-based
                chunks of `decode_chunk_groups` groups, one list per video (or a plain list for one video); `[]` keeps
                only the first and the last, which always are dense.
            return_dict: False returns a plain tuple.
            required_chunks: Bi-level decoding: chunks, numbered over all videos, that the automatic choice must
                include.

        Returns:
            `CausalLMOutputWithPast` with logits [B, kept, vocabulary]; with bi-level decoding, beacon memory, a token
            selector or `mm_llm_compress` those of the tokens after the last video, and a loss over these.

        Raises:
            ValueError: If the number of placeholders differs from the number of visual tokens, or on an argument that
                is unknown: nothing is ignored.
        """
        refuse_unknown("forward", unknown)
        whole = isinstance(logits_to_keep, int)
        keep = logits_to_keep if whole and labels is None else 0
        call = Call(InForce(self.config), prompt_length, num_expanded, keep, dense_chunks, required_chunks, labels)
        if labels is not None:
            require_trainable(call.in_force, whole, logits_to_keep)
        checkpointed = checkpointed_layers(self.model.language_model) if self.training else []
        if use_cache is None and (labels is not None or checkpointed and torch.is_grad_enabled()):
            use_cache = False
        has_cache = use_cache is not False or pixel_values_videos is not None and call.in_force.text_only
        with without_checkpointing(checkpointed) if checkpointed and has_cache else nullcontext():
            tokens = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, pixel_values_videos)
            outputs = self.model(*tokens, use_cache, cache, output_attentions, output_hidden_states, call)
        # Positions in front of the first output, if only the sequence's end has some.
        first = (inputs_embeds if input_ids is None else input_ids).shape[1] - outputs.last_hidden_state.shape[1]
        kept = slice(-logits_to_keep, None) if whole else among_outputs(first, logits_to_keep)
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            given = labels
            if input_ids is not None:
                is_visual = input_ids == self.config.video_token_id
                if call.in_force.text_only:
                    # The last visual token, which would predict what follows it, has no output.
                    is_visual = is_visual | is_visual.roll(1, dims=1)
                labels = labels.masked_fill(is_visual, -100)
            following = nn.functional.pad(labels[:, first:], (0, 1), value=-100)[:, 1:]
            if num_items_in_batch is not None and (given[:, 1:] != -100).sum() != (following != -100).sum():
                logger.warning_once(
                    "some labels stand where there is no loss (visual positions, or in front of what has logits), and "
                    "the trainer counts them in what it divides the loss by: set them to -100"
                )
            sizes = {"vocab_size": self.config.text_config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels=None, shift_labels=following[:, kept].contiguous(), **sizes)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return output.to_tuple() if return_dict is False else output

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """The library's `generate`, with clear errors where it would go wrong over a video.

        Raises:
            ValueError: For `prefill_chunk_size` with a video (the prefill is chunked anyway), and for assisted
                decoding or prompt lookup over a cache that already holds tokens.
        """

        def setting(name):
            from_config = getattr(generation_config or self.generation_config, name, None)
            return kwargs[name] if kwargs.get(name) is not None else from_config

        past = given_cache(*(kwargs.pop(name, None) for name in reversed(CACHE_NAMES)))
        if past is not None:
            kwargs[CACHE_NAME] = past
        prefilled = past is not None and past.get_seq_length() > 0
        videos = kwargs.get("pixel_values_videos") is not None
        if videos:
            # A list: should a release expand inputs otherwise than below, it can repeat no video as if it were a row.
            kwargs["pixel_values_videos"] = list(kwargs["pixel_values_videos"])
        if (videos or prefilled) and setting("prefill_chunk_size") is not None:
            raise ValueError(
                "prefill_chunk_size cannot be used with a video: its prefill runs in bounded segments already"
            )
        assisted = kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None
        if prefilled and setting("use_cache") is False:
            raise ValueError(
                "use_cache=False has no meaning beside a cache that holds the prompt; leave one of them out"
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            raise ValueError(
                "generate continues at the right end of every row: pad prompts on the left, not on the right"
            )
        if assisted and prefilled:
            raise ValueError(
                "assisted decoding and prompt lookup over a prefilled cache give wrong answers in transformers; pass "
                "the video itself (pixel_values_videos) instead of an encoded one, or decode without assistance"
            )
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None:
            kwargs["prompt_length"] = input_ids.shape[1]
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """Keeps the 2-D mask, also for static caches: a prefill with videos needs to know what is padding."""
        return attention_mask

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # override: the library would repeat the tensors of videos as if their first axis were the batch
        videos = model_kwargs.pop("pixel_values_videos", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if videos is not None:
            model_kwargs["pixel_values_videos"] = videos
        # A cache that came along still has one row per prompt: the first forward sees that, and repeats it.
        model_kwargs["num_expanded"] = expand_size
        return input_ids, model_kwargs


# `Trainer` shifts the labels of its label smoothing only for models whose class stands in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(VideoXLConfig.model_type, VideoXLForConditionalGeneration.__name__)


# What `generate` leaves among a model's arguments and no model needs: with stop strings, the tokenizer.
WITHOUT_EFFECT = ("tokenizer",)


def given_cache(past_key_values, cache):
    """The cache of a call, under whichever of its two names it came.

    Raises:
        ValueError: If both came, or something that is no `Cache`.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument: give one of them")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, Cache):
        raise ValueError(
            f"past_key_values (or cache) must be a transformers Cache, got {type(given).__name__}: pass on what an "
            "earlier call returned"
        )
    return given


def refuse_unknown(where: str, arguments: dict) -> None:
    """Raises ValueError if any argument that `where` does not name holds something; None counts as absent."""
    for name, value in arguments.items():
        if value is not None and (name not in WITHOUT_EFFECT or _holds_cache(value)):
            held = " holds a cache: pass it as past_key_values or cache" if _holds_cache(value) else " is unknown"
            raise ValueError(
                f"{where} got an argument {name!r:.90}, which{held}. Nothing is ignored silently: leave it out, or, "
                "if transformers itself passed it, use a release this code was tested with (see the README)"
            )


def _holds_cache(value) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, Cache) or isinstance(value, (list, tuple)) and any(map(_holds_cache, value))


def _require_whole_past(past_length, new_tokens, attention_mask, position_ids, prompt_length) -> None:
    """Raises ValueError if a call speaks of other tokens than its cache holds and it brings."""
    known = past_length + new_tokens
    told = known if attention_mask is None or attention_mask.ndim != 2 else attention_mask.shape[1]
    if prompt_length is not None and known < prompt_length and position_ids is not None:
        told = max(told, int(position_ids.max()) + 1)
    if told != known:
        raise ValueError(
            f"attention_mask (or position_ids) speaks of {told} tokens, but the cache holds {past_length} and "
            f"{new_tokens} came with this call: pass the cache of the earlier tokens as past_key_values or cache, and "
            "a mask of [batch, cached and new tokens]"
        )


__all__ = ["VideoXLForConditionalGeneration", "VideoXLModel", "VideoXLPreTrainedModel"]
