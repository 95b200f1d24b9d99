"""The Video-XL model: composes vision tower, compressor, projector and language model; forward and generation hooks.

What is surprising:
* A prompt with videos is prefilled inside `forward`, segment by segment, into the cache that `generate` made: its layers are
  replaced by ours in place. Whole-sequence calls without a cache (training, `use_cache=False`) run at once instead.
* `generate` expands prompts for beams, never videos: every prompt is encoded and prefilled once, and its cache is repeated.
* Placeholders count in the prompt only. A later token may have any id, so decode steps look for none.
* The model object holds no session. Whatever outlives a call is in the cache or in the `EncodedVideo` that the caller holds.

B batch, V videos, F frames, G groups of frames, N visual tokens per group, P patches, C tower channels, L sequence.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .chat_videoxl import VideoXLChatMixin
from .compressor_videoxl import VideoXLDynamicTokenSynthesis, VideoXLMultiModalProjector, VideoXLRelativePosition
from .compressor_videoxl import build_compressor
from .configuration_videoxl import VideoXLConfig
from .kv_cache import VideoXLCacheLayer, new_cache, own_layers, stack_caches
from .sparse_attention import GroupSpan, VisualLayout, plan_prefill, register_attention

# Tokens of a prompt that run through the language model at once while a cache is filled. Bounds the activations (the widest
# is the MLP's, [segment, intermediate_size]); large enough that matrix products stay efficient.
SEGMENT_TOKENS = 4096


@dataclass
class VideoXLVideoFeatures(ModelOutput):
    """Visual features of several videos.

    Args:
        pooler_output: Per video, its visual tokens [G, N, hidden].
        tower_features: Per video, the vision tower's output [F, P, C], if asked for.
    """

    pooler_output: tuple[torch.Tensor, ...] | None = None
    tower_features: tuple[torch.Tensor, ...] | None = None


class VideoXLPreTrainedModel(PreTrainedModel):
    config_class = VideoXLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer", "VideoXLDynamicTokenSynthesis"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        # override: the library's default covers linear, convolution, norm and embedding layers, not bare parameters
        super()._init_weights(module)
        if isinstance(module, VideoXLDynamicTokenSynthesis):
            init.normal_(module.temporal_encoding)
        elif isinstance(module, VideoXLRelativePosition):
            init.xavier_uniform_(module.embeddings_table)


class VideoXLModel(VideoXLPreTrainedModel):
    """Vision tower, compressor, projector and language model without its head."""

    def __init__(self, config: VideoXLConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        self.compressor = build_compressor(config.compressor_config)
        self.multi_modal_projector = VideoXLMultiModalProjector(config.compressor_config, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        if "sliding_attention" in getattr(self.language_model.config, "layer_types", ()):
            raise ValueError("text_config.use_sliding_window is not supported: visibility is the chunk plan's")
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

    @property
    def tokens_per_group(self) -> int:
        return self.config.compressor_config.tokens_per_group

    def get_video_features(self, pixel_values_videos, output_tower_features=False, return_dict=True):
        """Encodes videos into visual tokens, a bounded number of frames at a time.

        Args:
            pixel_values_videos: [V, F, 3, H, W], or a list of [F_i, 3, H, W]; any device and float dtype.
            output_tower_features: Also return the tower's output.
            return_dict: False returns a plain tuple.

        Returns:
            `VideoXLVideoFeatures`; per video, `pooler_output` holds [G, N, hidden] and `tower_features` [F, P, C].

        Raises:
            ValueError: On pixels of another shape.
        """
        side, channels = self.config.vision_config.image_size, self.config.vision_config.num_channels
        tokens, towers = [], []
        for pixels in pixel_values_videos:
            if pixels.ndim != 4 or pixels.shape[0] == 0 or tuple(pixels.shape[1:]) != (channels, side, side):
                raise ValueError(
                    f"each video in pixel_values_videos must be [frames, {channels}, {side}, {side}] with at least one "
                    f"frame, got {tuple(pixels.shape)}; the processor builds it"
                )
            parts = [self._encode_frames(chunk) for chunk in pixels.split(self.config.resolve_vision_chunk_frames())]
            tokens.append(torch.cat([part[0] for part in parts]))
            if output_tower_features:
                towers.append(torch.cat([part[1] for part in parts]))
            del parts
        output = VideoXLVideoFeatures(tuple(tokens), tuple(towers) if output_tower_features else None)
        return output if return_dict else output.to_tuple()

    def _encode_frames(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [F, 3, H, W] of whole groups (the last may be partial) -> visual tokens [G, N, hidden], tower [F, P, C]."""
        patch_embedding = self.vision_tower.embeddings.patch_embedding.weight
        pixels = pixels.to(device=patch_embedding.device, dtype=patch_embedding.dtype)
        # Through the tower's parts: only the last built layer's output is wanted, without the norm that follows it.
        embedded = self.vision_tower.embeddings(pixels)
        features = self.vision_tower.encoder(inputs_embeds=embedded).last_hidden_state
        return self.multi_modal_projector(self.compressor(features)), features

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
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """See `VideoXLForConditionalGeneration.forward`. `keep_hidden` > 0 lets a prefill return only its last positions."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        use_cache = use_cache if use_cache is not None else self.config.text_config.use_cache
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if pixel_values_videos is not None and len(pixel_values_videos) == 0:
            pixel_values_videos = None
        if pixel_values_videos is None:
            if input_ids is not None and past_length == 0:
                self._require_no_placeholders(input_ids[:, :prompt_length])
            if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
                position_ids = _positions(attention_mask)[:, past_length:]
            return self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        if input_ids is None:
            raise ValueError("pixel_values_videos needs input_ids: their placeholders say where the visual tokens go")
        if attention_mask is None:
            attention_mask = torch.ones(
                input_ids.shape[0], past_length + input_ids.shape[1], dtype=torch.long, device=input_ids.device
            )
        features = self.get_video_features(pixel_values_videos).pooler_output
        prompts, masks = input_ids[::num_expanded], attention_mask[::num_expanded]
        rows = self._rows(prompts, masks, features, past_length, prompt_length)
        if num_expanded > 1 and not use_cache:
            # Without a cache every step comes here, and the copies of a prompt have grown apart.
            features = [tokens for row in rows for _ in range(num_expanded) for tokens in features[row[2]]]
            prompts, masks, num_expanded = input_ids, attention_mask, 1
            rows = self._rows(prompts, masks, features, past_length, prompt_length)
        embeds = self._merge(prompts, rows, features)
        if use_cache:
            if past_key_values is None:
                past_key_values = new_cache(self.config.text_config.num_hidden_layers)
            cached = own_layers(past_key_values, self.config.text_config.num_hidden_layers)
            if cached and not kwargs.get("output_hidden_states") and not kwargs.get("output_attentions"):
                return self._prefill_rows(embeds, rows, past_key_values, num_expanded, keep_hidden)
        settings = self.config.resolve_sparse_attention()
        if settings.prefill != "full":
            if use_cache:
                raise ValueError(
                    f"sparse_attention.prefill={settings.prefill!r} needs a dynamic cache and no output_hidden_states or "
                    "output_attentions; leave cache_implementation unset, or set prefill to 'full'"
                )
            return self._run_rows_without_cache(embeds, rows, settings)
        if num_expanded > 1:
            embeds = embeds.repeat_interleave(num_expanded, dim=0)
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=_positions(attention_mask)[:, past_length:] if position_ids is None else position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _require_no_placeholders(self, input_ids):
        if found := int((input_ids == self.config.video_token_id).sum()):
            raise ValueError(
                f"the prompt has {found} video placeholders (id {self.config.video_token_id}), but 0 visual tokens came: "
                "pass pixel_values_videos, or keep the placeholder out of the text"
            )

    def _rows(self, input_ids, attention_mask, features, past_length, prompt_length):
        """Per prompt: which columns are not padding, and the layout of its videos in its own positions."""
        rows, used = [], 0
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            past, valid = int(mask[:past_length].sum()), mask[past_length:]
            columns = valid.nonzero().flatten()
            if prompt_length is not None:
                prompt = ids[columns[columns < prompt_length]]
            else:
                prompt = ids[columns]
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
        embeds = self.get_input_embeddings()(input_ids)
        is_visual = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (columns, layout, _) in enumerate(rows):
            begin = layout.length - len(columns)
            for group in layout.groups:
                is_visual[row, columns[group.visual_start - begin : group.end - begin]] = True
        visual = torch.cat([tokens.flatten(0, 1) for tokens in features]).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(is_visual[..., None].expand_as(embeds), visual)

    def extend_cache(self, inputs_embeds, layout, cache, keep_hidden=0) -> torch.Tensor:
        """Runs further positions of one sequence through the language model, segment by segment, into its cache.

        Args:
            inputs_embeds: [1, n, hidden], the positions [layout.length - n, layout.length).
            layout: `VisualLayout` of the whole sequence.
            cache: Dynamic cache with our layers that holds all earlier positions; it grows by n.
            keep_hidden: How many of the last positions' hidden states to return; 0 for all.

        Returns:
            [1, keep_hidden or n, hidden], after the final norm.
        """
        begin = layout.length - inputs_embeds.shape[1]
        assert cache.get_seq_length() == begin, "the cache must hold exactly the positions before these"
        settings = self.config.resolve_sparse_attention()
        steps = plan_prefill(layout, settings.prefill, settings.chunk_groups, settings.window_chunks, start=begin)
        for layer in cache.layers:
            layer.reserve(layout.length)
        keep_from = layout.length - keep_hidden if keep_hidden else begin
        kept = []
        while steps:
            count = 1
            while count < len(steps) and steps[count].stop - steps[0].start <= SEGMENT_TOKENS:
                count += 1
            segment, steps = steps[:count], steps[count:]
            start, stop = segment[0].start, segment[-1].stop
            hidden = self._run_segment(inputs_embeds[:, start - begin : stop - begin], segment, cache)
            if stop > keep_from:
                kept.append(hidden[:, max(keep_from - start, 0) :])
        return torch.cat(kept, dim=1)

    def _run_segment(self, inputs_embeds, steps, cache=None):
        positions = torch.arange(steps[0].start, steps[-1].stop, device=inputs_embeds.device)[None]
        return self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=positions,
            attention_mask={"full_attention": None},
            past_key_values=cache,
            use_cache=cache is not None,
            attention_steps=steps,
        ).last_hidden_state

    def _prefill_rows(self, embeds, rows, cache, num_expanded, keep_hidden):
        """Prefills each prompt by itself, then stacks their caches, padded on the left, into the caller's."""
        batch, length = embeds.shape[:2]
        if batch == 1 and len(rows[0][0]) == length:
            hidden = self.extend_cache(embeds, rows[0][1], cache, keep_hidden)
        else:
            if cache.get_seq_length():
                raise ValueError("a cache that already holds tokens can be continued with videos one prompt at a time only")
            row_caches, hidden = [], embeds.new_zeros(batch, keep_hidden or length, embeds.shape[2])
            for row, (columns, layout, _) in enumerate(rows):
                row_cache = new_cache(len(cache.layers))
                states = self.extend_cache(embeds[row : row + 1, columns], layout, row_cache)
                kept = columns - (length - hidden.shape[1])
                hidden[row, kept[kept >= 0]] = states[0, kept >= 0]
                row_caches.append(row_cache)
            for layer, (keys, values) in zip(cache.layers, stack_caches(row_caches), strict=True):
                layer.update(keys, values)
        if num_expanded > 1:
            cache.batch_repeat_interleave(num_expanded)
            hidden = hidden.repeat_interleave(num_expanded, dim=0)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _run_rows_without_cache(self, embeds, rows, settings):
        """Sparse prefill of whole prompts at once, without a cache: differentiable, for training."""
        outputs = []
        for row, (columns, layout, _) in enumerate(rows):
            steps = plan_prefill(layout, settings.prefill, settings.chunk_groups, settings.window_chunks)
            hidden = embeds.new_zeros(embeds.shape[1:])
            states = self._run_segment(embeds[row : row + 1, columns], steps)
            outputs.append(hidden.index_copy(0, columns, states[0]))
        return BaseModelOutputWithPast(last_hidden_state=torch.stack(outputs))


class VideoXLForConditionalGeneration(VideoXLPreTrainedModel, VideoXLChatMixin, GenerationMixin):
    """Video-XL with its language-modelling head: `forward`, `generate`, `chat` and `encode_video`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

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
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Language-model outputs of prompts that may hold videos.

        Args:
            input_ids: [B, L], fully expanded: per group of frames its timestamp's tokens and `tokens_per_group` times
                `config.video_token_id`.
            attention_mask: [B, past + L], 0 on padding.
            position_ids: [B, L]; by default counted over the attention mask. Prompts with videos are always counted.
            past_key_values: A cache; prompts with videos fill it in place.
            inputs_embeds: [B, L, hidden] instead of input_ids, for text.
            pixel_values_videos: [V, F, 3, H, W] or a list of [F_i, 3, H, W], in order of appearance.
            labels: [B, L], -100 where there is no loss; visual positions never have any.
            use_cache: False returns no cache and runs the sequence at once.
            logits_to_keep: Number of last positions to compute logits for (0: all), or a tensor of positions.
            prompt_length: Positions from here on are generated tokens; set by `generate`.
            num_expanded: How many times `generate` repeated each prompt; set by `generate`.

        Returns:
            `CausalLMOutputWithPast` with logits [B, kept, vocabulary].

        Raises:
            ValueError: If the number of placeholders differs from the number of visual tokens.
        """
        if labels is not None and use_cache is None:
            use_cache = False
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
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if input_ids is not None:
                labels = labels.masked_fill(input_ids == self.config.video_token_id, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def prefill_text(self, cache, layout, ids):
        """Runs text behind a cached sequence, without logits.

        Args:
            cache: Dynamic cache with our layers, extended in place; None starts a sequence.
            layout: `VisualLayout` of what it holds, or None.
            ids: Token ids.

        Returns:
            `(cache, layout)`, both including the text.
        """
        cache = new_cache(self.config.text_config.num_hidden_layers) if cache is None else cache
        layout = layout if layout is not None else VisualLayout()
        if ids:
            embeds = self.get_input_embeddings()(torch.tensor([ids], device=self.device))
            layout = VisualLayout(layout.videos, layout.length + len(ids))
            self.model.extend_cache(embeds, layout, cache, keep_hidden=1)
        return cache, layout

    @torch.no_grad()
    def prefill_frames(self, cache, layout, pixels, time_ids, continues):
        """Encodes further frames of a video and runs them behind a cached sequence.

        Args:
            cache, layout: See `prefill_text`; the cache is extended in place.
            pixels: [F, 3, H, W]; a partial group is filled by repeating the last frame.
            time_ids: Per group, the token ids of its timestamp.
            continues: Whether the groups belong to the sequence's last video; else they start a new one.

        Returns:
            `(ids, layout)`: the token ids that were appended, and the layout including them.
        """
        tokens = self.get_video_features([pixels]).pooler_output[0]
        ids, groups, position = [], [], layout.length
        for group_ids in time_ids:
            visual_start = position + len(group_ids)
            groups.append(GroupSpan(position, visual_start, visual_start + tokens.shape[1]))
            ids += [*group_ids, *[self.config.video_token_id] * tokens.shape[1]]
            position = groups[-1].end
        earlier = (*layout.videos[:-1], layout.videos[-1] + tuple(groups)) if continues else (*layout.videos, tuple(groups))
        layout = VisualLayout(earlier, position)
        embeds = self.get_input_embeddings()(torch.tensor([ids], device=self.device))
        is_visual = torch.tensor(ids, device=embeds.device) == self.config.video_token_id
        embeds = embeds.masked_scatter(is_visual[None, :, None].expand_as(embeds), tokens.to(embeds.device, embeds.dtype))
        self.model.extend_cache(embeds, layout, cache, keep_hidden=1)
        return ids, layout

    def drop_last_group(self, cache, layout):
        """Takes the last group of the sequence's last video out of the cache, in place; returns the layout without it."""
        *videos, last = layout.videos
        cache.crop(last[-1].start - last[-1].end)
        kept = (*videos, last[:-1]) if len(last) > 1 else tuple(videos)
        return VisualLayout(kept, last[-1].start)

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """The library's `generate`, with clear errors where it would go wrong over a video.

        Raises:
            ValueError: For `prefill_chunk_size` with a video (the prefill is chunked anyway), and for assisted decoding or
                prompt lookup over a cache that already holds tokens.
        """

        def setting(name):
            from_config = getattr(generation_config or self.generation_config, name, None)
            return kwargs[name] if kwargs.get(name) is not None else from_config

        past = kwargs.get("past_key_values")
        if kwargs.get("pixel_values_videos") is not None and setting("prefill_chunk_size") is not None:
            raise ValueError("prefill_chunk_size cannot be used with a video: its prefill runs in bounded segments already")
        assisted = kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None
        if assisted and isinstance(past, Cache) and past.get_seq_length():
            raise ValueError(
                "assisted decoding and prompt lookup over a prefilled cache give wrong answers in transformers; pass the "
                "video itself (pixel_values_videos) instead of an encoded one, or decode without assistance"
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
        past = model_kwargs.get("past_key_values")
        if expand_size > 1 and isinstance(past, Cache) and past.get_seq_length():
            past.batch_repeat_interleave(expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if videos is not None:
            model_kwargs.update(pixel_values_videos=videos, num_expanded=expand_size)
        return input_ids, model_kwargs


def build_vision_tower(config: VideoXLConfig) -> PreTrainedModel:
    """The tower that `config.vision_config` names, without the layers above `config.vision_feature_layer`.

    Raises:
        ValueError: If the slot has no such value.
    """
    vision_config = config.vision_config
    if vision_config.model_type != "siglip_vision_model":
        raise ValueError(f"vision_config.model_type must be 'siglip_vision_model', got {vision_config.model_type!r}")
    tower = AutoModel.from_config(vision_config)
    layer = config.vision_feature_layer
    depth = layer if layer >= 0 else vision_config.num_hidden_layers + 1 + layer
    del tower.encoder.layers[depth:]
    return tower


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions counted over the tokens that are not padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


__all__ = ["VideoXLCacheLayer", "VideoXLForConditionalGeneration", "VideoXLModel", "VideoXLPreTrainedModel"]
