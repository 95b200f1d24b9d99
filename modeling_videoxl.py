"""The Video-XL model: composes vision tower, compressor, projector and language model; forward and generation hooks.

What is surprising:
* A prompt with videos is prefilled inside `forward`, segment by segment, into the cache that `generate` made: its
  layers are replaced by ours in place. Whole-sequence calls without a cache (training, `use_cache=False`) run at once
  instead.
* `generate` expands prompts for beams, never videos: every prompt is encoded and prefilled once, and its cache is
  repeated.
* Placeholders count in the prompt only. A later token may have any id, so decode steps look for none.
* The model object holds no session. Whatever outlives a call is in the cache or in the `EncodedVideo` that the caller
  holds.

B batch, V videos, F frames, G groups of frames, N visual tokens per group, P patches, C tower channels, L sequence.
"""

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .beacon_memory_videoxl import add_beacons
from .bilevel_videoxl import pending_choice
from .cache_layers_videoxl import VideoXLCacheLayer
from .chat_videoxl import VideoXLChatMixin
from .compressor_videoxl import (
    VideoXLDynamicTokenSynthesis,
    VideoXLMultiModalProjector,
    VideoXLRelativePosition,
    build_compressor,
)
from .configuration_videoxl import VideoXLConfig
from .generation_videoxl import VideoXLGenerationMixin
from .kv_cache import CACHE_NAME, CACHE_NAMES, given_cache, new_cache, own_layers, refuse_unknown
from .planning_videoxl import plan_video
from .prefill_videoxl import VideoXLPrefillMixin
from .sparse_attention import VisualLayout, register_attention
from .token_dropping_videoxl import dropping_of
from .token_selector_videoxl import build_token_selector
from .vision_videoxl import build_vision_tower, encode_videos


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


class VideoXLModel(VideoXLPreTrainedModel, VideoXLPrefillMixin):
    """Vision tower, compressor, projector, token selector and language model without its head."""

    def __init__(self, config: VideoXLConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        self.compressor = build_compressor(config.compressor_config)
        self.multi_modal_projector = VideoXLMultiModalProjector(
            config.compressor_config, config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self._rope_parameters = dict(config.text_config.rope_parameters)
        if "sliding_attention" in getattr(self.language_model.config, "layer_types", ()):
            raise ValueError("text_config.use_sliding_window is not supported: visibility is the chunk plan's")
        self.token_selector = build_token_selector(config)
        if config.beacon_window is not None:
            self.beacon_embed_tokens = nn.Embedding(1, config.text_config.hidden_size)
            add_beacons(self.language_model)
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

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values_videos=None,
        use_cache=None,
        prompt_length=None,
        num_expanded=1,
        keep_hidden=0,
        dense_chunks=None,
        required_chunks=(),
        cache=None,
        output_attentions=None,
        output_hidden_states=None,
        **unknown,
    ) -> BaseModelOutputWithPast:
        """See `VideoXLForConditionalGeneration.forward`; with `keep_hidden` a prefill returns its last positions."""
        refuse_unknown("forward", unknown)
        past_key_values = given_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, length], got {tuple(input_ids.shape)}")
        use_cache = use_cache if use_cache is not None else self.config.text_config.use_cache
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        new_tokens = (inputs_embeds if input_ids is None else input_ids).shape[1]
        _require_whole_past(past_length, new_tokens, attention_mask, position_ids, prompt_length)
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        kwargs = {name: value for name, value in wanted.items() if value is not None}
        has_videos = pixel_values_videos is not None and len(pixel_values_videos) > 0
        if not has_videos and prompt_length is not None and 0 < prompt_length <= past_length:
            # A step of `generate` behind its whole prompt: whatever the settings say was done with it.
            inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            return self._continue_plain(
                inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, kwargs
            )
        settings = self.config.resolve_sparse_attention()
        if dense_chunks is not None and settings.decode != "bilevel":
            raise ValueError("dense_chunks needs bi-level decoding: set config.sparse_attention with decode='bilevel'")
        if has_videos:
            if input_ids is None:
                raise ValueError(
                    "pixel_values_videos needs input_ids: their placeholders say where the visual tokens go"
                )
            return self._forward_videos(
                input_ids, attention_mask, position_ids, past_key_values, pixel_values_videos, use_cache,
                prompt_length, num_expanded, keep_hidden, settings, (dense_chunks, required_chunks), kwargs,
            )  # fmt: skip
        if new_tokens > 1 and (prompt_length is None or past_length < prompt_length):
            if attention_mask is not None and attention_mask.ndim == 2:
                self.require_context(int(attention_mask[:, :prompt_length].sum(dim=1).max()))
            else:
                self.require_context(min(past_length + new_tokens, prompt_length or past_length + new_tokens))
        if input_ids is not None and past_length == 0:
            self._require_no_placeholders(input_ids[:, :prompt_length])
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if past_length and isinstance(past_key_values.layers[0], VideoXLCacheLayer):
            rows = past_key_values.layers[0].rows
            if (
                rows < inputs_embeds.shape[0]
                or pending_choice(past_key_values, settings)
                or (rows == 1 and new_tokens > 1)
            ):
                question = None if prompt_length is None else prompt_length - past_length
                options = (settings, question, dense_chunks, required_chunks)
                return self._continue_rows(inputs_embeds, attention_mask, past_key_values, num_expanded, options)
        return self._continue_plain(inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, kwargs)

    def _continue_plain(self, embeds, attention_mask, position_ids, cache, use_cache, kwargs):
        """The library's way: text, and decode steps of any cache."""
        if cache is not None and dropping_of(cache) is not None:
            if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
                raise ValueError(
                    "output_hidden_states and output_attentions do not go with dropped visual tokens, of which layers "
                    "hold different numbers; set mm_llm_compress to False"
                )
            return self.continue_stages(embeds, attention_mask, cache)
        past_length = cache.get_seq_length() if cache is not None else 0
        layer = cache.layers[0] if past_length else None
        if attention_mask is not None and attention_mask.ndim == 2 and position_ids is None:
            position_ids = _positions(attention_mask)[:, past_length:]
        if isinstance(layer, VideoXLCacheLayer) and layer.row_shift is not None:
            if position_ids is None:
                counted = torch.arange(past_length, past_length + embeds.shape[1], device=embeds.device)
                position_ids = counted.expand(embeds.shape[0], -1)
            position_ids = position_ids - layer.row_shift.to(position_ids.device)[:, None]
        if isinstance(layer, VideoXLCacheLayer) and (layer.hidden or layer.row_padding is not None):
            # The keys that are held stand at the end of the logical past: say which of them are padding.
            mask = torch.ones(embeds.shape[0], past_length + embeds.shape[1], dtype=torch.long, device=embeds.device)
            if layer.row_padding is not None:
                columns = torch.arange(mask.shape[1], device=embeds.device)
                mask[columns < layer.hidden + layer.row_padding.to(embeds.device)[:, None]] = 0
            if attention_mask is not None:
                mask[:, past_length:] = attention_mask[:, past_length:]
            attention_mask = mask
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _forward_videos(
        self, input_ids, attention_mask, position_ids, cache, pixels, use_cache, prompt_length, num_expanded,
        keep_hidden, settings, chunks, kwargs,
    ):  # fmt: skip
        past_length = cache.get_seq_length() if cache is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], past_length + input_ids.shape[1], device=input_ids.device)
        if attention_mask.shape != (input_ids.shape[0], past_length + input_ids.shape[1]):
            raise ValueError(
                f"attention_mask must be [{input_ids.shape[0]}, {past_length + input_ids.shape[1]}] (cached and new "
                f"tokens), got {tuple(attention_mask.shape)}"
            )
        self.require_context(int(attention_mask[:, :prompt_length].sum(dim=1).max()))
        if not attention_mask[:, past_length:].any(dim=1).all():
            raise ValueError("attention_mask hides every token of a prompt; at least one must be visible")
        features = self.get_video_features(pixels).pooler_output
        timed = [video.ndim == 4 or self.config.image_timestamps for video in pixels]
        prompts, masks = input_ids[::num_expanded], attention_mask[::num_expanded]
        rows = self._rows(prompts, masks, features, timed, past_length, prompt_length)
        if num_expanded > 1 and not use_cache:
            # Without a cache every step comes here, and the copies of a prompt have grown apart.
            order = [index for row in rows for _ in range(num_expanded) for index in range(row[2].start, row[2].stop)]
            features, timed = [features[index] for index in order], [timed[index] for index in order]
            prompts, masks, num_expanded = input_ids, attention_mask, 1
            rows = self._rows(prompts, masks, features, timed, past_length, prompt_length)
        embeds = self._merge(prompts, rows, features)
        layers = self.config.text_config.num_hidden_layers
        detailed = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        assembled = self.leaves_only_text(settings)
        if (use_cache or assembled) and not detailed:
            # What assembles key-values has a cache inside even where the caller wants none.
            cache = new_cache(layers) if cache is None or not use_cache else cache
            if own_layers(cache, layers):
                output = self._prefill_rows(
                    embeds, rows, cache, num_expanded, keep_hidden, prompt_length, settings, *chunks
                )  # fmt: skip
                return output if use_cache else BaseModelOutputWithPast(last_hidden_state=output.last_hidden_state)
        if assembled or (use_cache and settings.prefill != "full"):
            cause = f"sparse_attention with prefill={settings.prefill!r} and decode={settings.decode!r}"
            remedy = "set both to 'full'"
            if settings.decode == "full" and assembled:
                cause, remedy = (
                    "a model that compresses, selects or drops visual tokens",
                    "set beacon_ratio to 'none' or mm_llm_compress to False if it has one",
                )
            raise ValueError(
                f"{cause} needs a dynamic cache and no output_hidden_states or output_attentions; leave "
                f"cache_implementation unset, or {remedy}"
            )
        if settings.prefill != "full":
            return self._run_rows_without_cache(embeds, rows, settings)
        if num_expanded > 1:
            embeds = embeds.repeat_interleave(num_expanded, dim=0)
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=_positions(attention_mask)[:, past_length:] if position_ids is None else position_ids,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _require_no_placeholders(self, input_ids):
        if found := int((input_ids == self.config.video_token_id).sum()):
            raise ValueError(
                f"the prompt has {found} video placeholders (id {self.config.video_token_id}), but 0 visual tokens "
                "came: pass pixel_values_videos, or keep the placeholder out of the text"
            )

    def _rows(self, input_ids, attention_mask, features, timed, past_length, prompt_length):
        """Per prompt: which columns are not padding, and the layout of its videos in its own positions."""
        rows, used = [], 0
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            past, valid = int(mask[:past_length].sum()), mask[past_length:]
            columns = valid.nonzero().flatten()
            prompt = ids[columns] if prompt_length is None else ids[columns[columns < prompt_length]]
            wanted = int((prompt == self.config.video_token_id).sum())
            counts, first = [], used
            while used < len(features) and sum(counts) * self.tokens_per_group < wanted:
                counts.append(features[used].shape[0])
                used += 1
            layout = VisualLayout.from_ids(
                prompt,
                counts,
                self.tokens_per_group,
                self.config.video_token_id,
                self.config.time_start_token_id,
                self.config.time_end_token_id,
                offset=past,
                timed=timed[first:used],
            )
            layout = VisualLayout(layout.videos, past + len(columns))
            rows.append((columns, layout, slice(first, used)))
        if used != len(features):
            raise ValueError(
                f"{len(features)} videos came, but the prompts have placeholders for {used} of them: "
                f"{sum(f.shape[0] * f.shape[1] for f in features)} visual tokens against "
                f"{int((input_ids == self.config.video_token_id).sum())} placeholders"
            )
        return rows

    def _merge(self, input_ids, rows, features):
        """Token embeddings [B, L, hidden] with the visual tokens in place of their placeholders."""
        embeds = self.embed_prompt(input_ids)
        is_visual = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (columns, layout, _) in enumerate(rows):
            begin = layout.length - len(columns)
            for group in layout.groups:
                is_visual[row, columns[group.visual_start - begin : group.end - begin]] = True
        visual = torch.cat([tokens.flatten(0, 1) for tokens in features]).to(embeds.device, embeds.dtype)
        return embeds.index_put((is_visual,), visual)


class VideoXLForConditionalGeneration(
    VideoXLPreTrainedModel, VideoXLChatMixin, VideoXLGenerationMixin, GenerationMixin
):
    """Video-XL with its language-modelling head: `forward`, `generate`, `chat` and `encode_video`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    plan = plan_video
    # For `Trainer`: the loss is divided by `num_items_in_batch` where that comes.
    accepts_loss_kwargs = True

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
            past_key_values: A cache; prompts with videos fill it in place. `cache` is its other name.
            inputs_embeds: [B, L, hidden] instead of input_ids, for text.
            pixel_values_videos: [V, F, 3, H, W] or a list in order of appearance: [F_i, 3, H, W] for a video,
                [T_i, 1, 3, H, W] for an image of T_i tiles, each a group without a timestamp (with an overview
                [1 + rows, columns, 3, H, W], see `get_video_features`).
            labels: [B, L], -100 where there is no loss; visual positions never have any.
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
        partial = False
        if labels is not None or pixel_values_videos is not None:
            partial = self._leaves_only_text(labels is not None, logits_to_keep)
        if labels is not None:
            use_cache = False if use_cache is None else use_cache
        keep_hidden = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            use_cache=use_cache,
            prompt_length=prompt_length,
            num_expanded=num_expanded,
            keep_hidden=keep_hidden,
            dense_chunks=dense_chunks,
            required_chunks=required_chunks,
            cache=cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if input_ids is not None:
                is_visual = input_ids == self.config.video_token_id
                if partial:
                    # The last visual token, which would predict what follows it, has no output.
                    is_visual = is_visual | is_visual.roll(1, dims=1)
                labels = labels.masked_fill(is_visual, -100)[:, -logits.shape[1] :]
            sizes = {"vocab_size": self.config.text_config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, **sizes)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return output.to_tuple() if return_dict is False else output

    def _leaves_only_text(self, trains, logits_to_keep) -> bool:
        """Whether only text behind the last video has logits; refuses what does not go with that, or with labels."""
        settings = self.config.resolve_sparse_attention()
        partial = self.model.leaves_only_text(settings)
        if partial and not isinstance(logits_to_keep, int):
            raise ValueError(
                "with decode='bilevel', beacon memory, a token selector or mm_llm_compress logits exist behind the "
                "last video only: give logits_to_keep a number"
            )
        if not trains:
            return partial
        if not isinstance(logits_to_keep, int):
            raise ValueError("labels are for all positions: leave logits_to_keep out")
        if settings.decode == "bilevel":
            raise ValueError(
                "labels cannot be used with decode='bilevel': train with a prefill plan and decode='full'"
            )
        if settings.dropping is not None:
            raise ValueError(
                "labels cannot be used with mm_llm_compress, whose choice of tokens depends on where the prompt "
                "ends: set it to False for training, as the published weights were trained"
            )
        return partial


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


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions counted over the tokens that are not padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


__all__ = ["VideoXLCacheLayer", "VideoXLForConditionalGeneration", "VideoXLModel", "VideoXLPreTrainedModel"]
