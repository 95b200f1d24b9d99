"""How `generate` meets videos, and the prefill of sequences that grow: hooks of the model class.

What is surprising:
* `generate` expands prompts for beams, never videos or encoded videos: every prompt runs once, and its cache is
  repeated.
* Forms of decoding that transformers would get silently wrong over a video are refused.
"""

import torch
from transformers import GenerationMixin

from .kv_cache import CACHE_NAME, CACHE_NAMES, given_cache, new_cache, offload_cache
from .sparse_attention import GroupSpan, VisualLayout


class VideoXLGenerationMixin(GenerationMixin):
    """`generate` and incremental prefill for a model that offers `model.extend_cache` and `get_video_features`."""

    @torch.no_grad()
    def prefill_text(self, cache, ids):
        """Runs text behind a cached sequence, without logits.

        Args:
            cache: A cache that these methods made, extended in place; None starts a sequence.
            ids: Token ids.

        Returns:
            The cache; its `layout` says where its videos are.
        """
        if cache is None:
            cache = new_cache(self.config.text_config.num_hidden_layers)
            cache.layout = VisualLayout()
        if self.config.resolve_sparse_attention().offload:
            offload_cache(cache, self.device)
        if ids:
            embeds = self.get_input_embeddings()(torch.tensor([ids], device=self.device))
            layout = VisualLayout(cache.layout.videos, cache.layout.length + len(ids))
            self.model.extend_cache(embeds, layout, cache, keep_hidden=None)
        return cache

    @torch.no_grad()
    def prefill_frames(self, cache, pixels, time_ids, continues, plan=None):
        """Encodes further frames of a video and runs them behind a cached sequence.

        Args:
            cache: See `prefill_text`; extended in place.
            pixels: [F, 3, H, W]; a partial group is filled by repeating the last frame.
            time_ids: Per group, the token ids of its timestamp.
            continues: Whether the groups belong to the sequence's last video; else they start a new one.
            plan: See `extend_cache`.

        Returns:
            The token ids that were appended.
        """
        tokens = self.get_video_features([pixels]).pooler_output[0]
        ids, groups, position = [], [], cache.layout.length
        for group_ids in time_ids:
            visual_start = position + len(group_ids)
            groups.append(GroupSpan(position, visual_start, visual_start + tokens.shape[1]))
            ids += [*group_ids, *[self.config.video_token_id] * tokens.shape[1]]
            position = groups[-1].end
        earlier = cache.layout.videos
        videos = (*earlier[:-1], earlier[-1] + tuple(groups)) if continues else (*earlier, tuple(groups))
        embeds = self.model.embed_prompt(torch.tensor([ids], device=self.device))
        is_visual = torch.tensor(ids, device=embeds.device) == self.config.video_token_id
        visual = tokens.to(embeds.device, embeds.dtype)
        embeds = embeds.index_put((is_visual[None],), visual.flatten(0, 1))
        self.model.extend_cache(embeds, VisualLayout(videos, position), cache, keep_hidden=None, plan=plan)
        return ids

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
