"""Filling caches: how the language model runs over prompts with videos and over text behind them.

What is surprising:
* Every prompt is prefilled by itself, at its own positions, and the caches are stacked afterwards, padded on the
  left. So a batch gives what single calls give, also where each prompt keeps another part of its key-values.
* Positions in the plan of attention are places in the cache; positions given to the language model are the rotary
  ones. They are the same until bi-level decoding thins a cache.
* Where a token selector asks the question which visual tokens to run, `extend_cache` only puts the sequence's rows
  aside; they run when text behind the videos comes (`_read_question`). Beacon memory needs no question: it compresses
  as it goes. Where visual tokens are dropped between layers a part runs and the rest waits (`run_stages`).

B batch, L sequence, n new tokens; "hidden" is the language model's width.
"""

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast

from .beacon_memory_videoxl import plan_windows
from .bilevel_videoxl import choose_for_question, pending_choice, split_per_row
from .cache_layers_videoxl import VideoXLCacheLayer, VideoXLOffloadedLayer
from .deferred_rows_videoxl import defer_rows
from .kv_cache import CACHE_NAME, fork_cache, new_cache, stack_caches
from .sparse_attention import AttentionPlan, GroupSpan, VisualLayout, plan_prefill
from .token_dropping_videoxl import VideoXLTokenDroppingMixin, drop_stages, dropping_of

# Tokens of a prompt that run through the language model at once while a cache is filled. Bounds the activations (the
# widest is the MLP's, [segment, intermediate_size]); large enough that matrix products stay efficient.
SEGMENT_TOKENS = 4096


class VideoXLPrefillMixin(VideoXLTokenDroppingMixin):
    """Prefill for a model with a `language_model`, whose attention follows plans, and a `config`."""

    @property
    def segment_tokens(self) -> int:
        return SEGMENT_TOKENS

    def require_context(self, tokens: int) -> None:
        """Raises ValueError if a sequence of so many tokens is longer than the model's limit: nothing is ever cut."""
        limit, rope = self.config.resolve_context_limit(), self.config.text_config.rope_parameters
        if rope != self._rope_parameters:
            raise ValueError(
                f"the model was built with rope parameters {self._rope_parameters}, and its config now says {rope}: "
                "load it anew with rope_scaling=..."
            )
        if limit is not None and tokens > limit[0]:
            raise ValueError(
                f"the prompt has {tokens} tokens, visual ones included, and this model takes {limit[0]}: {limit[1]}. "
                "Give fewer frames, or raise the limit"
            )

    def extend_cache(self, inputs_embeds, layout, cache, keep_hidden=0, plan=None) -> torch.Tensor:
        """Runs further positions of one sequence through the language model, segment by segment, into its dense cache.

        Args:
            inputs_embeds: [1, n, hidden], the positions [layout.length - n, layout.length).
            layout: `VisualLayout` of the whole sequence; it becomes the cache's.
            cache: Dynamic cache with our layers that holds all earlier positions; it grows by n.
            keep_hidden: How many of the last positions' hidden states to return; 0 for all, None for none.
            plan: As `resolve_sparse_attention().plan`, if not what is in force now.

        Returns:
            [1, keep_hidden or n, hidden], after the final norm; None if none were asked for, and always where the
            run, or a part of it, waits for the question.
        """
        assert cache.get_seq_length() == layout.length - inputs_embeds.shape[1], "the cache must hold what is before"
        self.require_context(layout.length)
        if self.token_selector is not None:
            cache.layout = layout
            return defer_rows(cache, inputs_embeds[0])
        return self._run_sequence(inputs_embeds, layout, cache, keep_hidden, plan)

    def _run_sequence(self, inputs_embeds, layout, cache, keep_hidden=0, plan=None):
        begin, layer = layout.length - inputs_embeds.shape[1], cache.layers[0]
        passed_by = 0 if layer.row_shift is None else int(layer.row_shift)
        if layer.hidden != passed_by or getattr(cache, "choices", None) is not None:
            raise ValueError(
                "a video cannot follow a cache that bi-level decoding has thinned; start from the dense one"
            )
        plan = dict(self.config.resolve_sparse_attention().plan if plan is None else plan)
        beacons, dropping = plan.pop("beacons", None), plan.pop("dropping", None)
        stages = None if dropping is None else drop_stages(dropping)
        if dropping_of(cache) is not None or (stages and layout.end > begin):
            return self.defer_to_stages(inputs_embeds, layout, cache, stages)
        cache.layout = layout
        if beacons is not None:
            return self._run_windows(inputs_embeds, layout, cache, keep_hidden, beacons)
        steps = plan_prefill(layout, **plan, start=begin, device=inputs_embeds.device)
        for layer in cache.layers:
            layer.reserve(layout.length)
        positions = torch.arange(begin, layout.length, device=inputs_embeds.device)[None]
        return self._run_steps(inputs_embeds, positions, steps, cache, keep_hidden)

    def _run_windows(self, inputs_embeds, layout, cache, keep_hidden, beacons):
        """Runs text as it is and videos window by window, of which beacons stay; text is all that is returned."""
        begin = cursor = layout.length - inputs_embeds.shape[1]
        # Through the module, whose weight may be offloaded.
        beacon = self.beacon_embed_tokens(torch.zeros(1, dtype=torch.long, device=inputs_embeds.device))
        inv_freq = self.language_model.rotary_emb.inv_freq
        for video in layout.videos:
            start, end = video[0].start, video[-1].end
            if end <= begin:
                continue
            assert video[0].visual_start == start, "windows hold visual tokens only"
            if start > cursor:
                self.run_text(inputs_embeds[:, cursor - begin : start - begin], cache, keep_hidden=None)
            for window in plan_windows(end - start, **beacons):
                first, last = start + window.start - begin, start + window.stop - begin
                if last <= 0:
                    continue
                assert first >= 0, "a window that grows is run anew from its start"
                rows = window.interleave(inputs_embeds[0, first:last], beacon)
                places = window.places(rows.device)
                self._run_behind(rows[None], cache, None, beacon_places=places)
                for layer in cache.layers:
                    layer.keep_of_last(len(rows), places, window.stop - window.start, inv_freq)
            cursor = end
        if cursor < layout.length:
            return self.run_text(inputs_embeds[:, cursor - begin :], cache, keep_hidden)
        return None

    def run_text(self, inputs_embeds, cache, keep_hidden=0, attention_probe=None, before=None) -> torch.Tensor:
        """Runs text behind a cache of one row, dense or mixed; every token sees all that is held.

        Args:
            inputs_embeds: [1, n, hidden].
            cache: Dynamic cache with our layers; it grows by n.
            keep_hidden: See `extend_cache`.
            before: Tokens before these, without padding; by default all that the cache counts.
            attention_probe: An object whose `record(layer_idx, query, key, scaling)` sees every layer's attention.

        Returns:
            [1, keep_hidden or n, hidden], after the final norm.
        """
        if dropping_of(cache) is not None:
            return self.run_stages(cache, inputs_embeds, keep_hidden=keep_hidden)
        positions = self.positions_after(cache, inputs_embeds.shape[1], before)
        return self._run_behind(inputs_embeds, cache, keep_hidden, positions, attention_probe=attention_probe)

    def _run_behind(self, inputs_embeds, cache, keep_hidden, positions=None, **options):
        """Runs rows behind all that a cache of one row holds; by default at the positions of their places in it."""
        held, count = cache.layers[0].held, inputs_embeds.shape[1]
        if positions is None:
            positions = torch.arange(held, held + count, device=inputs_embeds.device)[None]
        steps = plan_prefill(VisualLayout(length=held + count), "full", 1, 1, start=held)
        return self._run_steps(inputs_embeds, positions, steps, cache, keep_hidden, **options)

    def positions_after(self, cache, count, before=None) -> torch.Tensor:
        """[1, count] positions of the next tokens behind a cache of one row."""
        layer = cache.layers[0]
        first = layer.get_seq_length() if before is None else before
        if layer.row_shift is not None:
            first -= int(layer.row_shift)
        return torch.arange(first, first + count, device=self.device)[None]

    def _run_steps(
        self, inputs_embeds, positions, steps, cache, keep_hidden=0, attention_probe=None, beacon_places=None
    ) -> torch.Tensor:
        begin, end = steps[0].start, steps[-1].stop
        keep_from = end if keep_hidden is None else end - keep_hidden if keep_hidden else begin
        kept = []
        offloaded = cache is not None and isinstance(cache.layers[0], VideoXLOffloadedLayer)
        while steps:
            count = 1
            # Without a cache later tokens could not see earlier ones: everything at once.
            unread = steps[0].stop <= keep_from
            while count < len(steps) and (cache is None or steps[count].stop - steps[0].start <= SEGMENT_TOKENS):
                if cache is not None and (steps[count].stop <= keep_from) != unread:
                    break
                count += 1
            segment, steps = steps[:count], steps[count:]
            start, stop = segment[0].start, segment[-1].stop
            places = beacon_places
            if places is not None and (start > begin or stop < end):  # a window larger than a segment
                inside = (places >= start - begin) & (places < stop - begin)
                places = places[inside] - (start - begin)
            layers = cache.layers if offloaded else None
            plan = AttentionPlan(segment, attention_probe, layers, cache is not None and unread, places)
            hidden = self.language_model(
                inputs_embeds=inputs_embeds[:, start - begin : stop - begin],
                position_ids=positions[:, start - begin : stop - begin],
                # As the library hands masks to itself: none is to be made.
                attention_mask={"full_attention": None},
                use_cache=cache is not None,
                attention_plan=plan,
                **{CACHE_NAME: cache},
            ).last_hidden_state
            plan.require_followed(range(self.language_model.config.num_hidden_layers))
            if offloaded:
                for layer in cache.layers:
                    layer.retire(cache.layout.non_visual, (steps or segment[-1:])[0].window_start)
            if stop > keep_from:
                kept.append(hidden[:, max(keep_from - start, 0) :])
        return torch.cat(kept, dim=1) if kept else None

    def _prefill_rows(
        self, embeds, rows, cache, num_expanded, keep_hidden, prompt_length, settings, dense_chunks, required_chunks
    ):
        """Prefills each prompt by itself, then stacks their caches, padded on the left, into the caller's."""
        single = len(rows) == 1
        if not single and cache.get_seq_length():
            raise ValueError(
                "a cache that already holds tokens can be continued with videos one prompt at a time only"
            )
        # Of a video that is thinned or compressed nothing but key-values is left: only text behind it has outputs.
        whole = not self.leaves_only_text(settings)
        per_row = split_per_row(dense_chunks, [len(layout.videos) for _, layout, _ in rows])
        past, length = cache.get_seq_length(), embeds.shape[1]
        states, caches = [], []
        for row, ((columns, layout, _), wanted) in enumerate(zip(rows, per_row, strict=True)):
            row_cache = cache if single else new_cache(len(cache.layers))
            row_embeds = embeds[row : row + 1, columns]
            # What a cache that is continued holds already: its visual tokens stay out of the new videos' windows.
            earlier = getattr(row_cache, "layout", VisualLayout()).videos
            layout = VisualLayout(earlier + layout.videos, layout.length)
            if whole or not layout.videos:
                states.append(self._run_sequence(row_embeds, layout, row_cache, keep_hidden))
            else:
                begin = layout.length - len(columns)
                if layout.end == layout.length:
                    raise ValueError("the prompt ends with its video; put a question behind it")
                dense = VisualLayout(layout.videos, layout.end)
                self.extend_cache(row_embeds[:, : layout.end - begin], dense, row_cache, keep_hidden=None)
                asked = None if prompt_length is None else int((columns < prompt_length).sum()) + begin - layout.end
                question = row_embeds[:, layout.end - begin :]
                states.append(self._ask(row_cache, question, asked, settings, wanted, required_chunks))
            caches.append(row_cache)
        if not single:
            self._stack(cache, caches, past + length)
        elif length > len(columns):
            for layer in cache.layers:
                layer.hidden += length - len(columns)
        if whole and not keep_hidden:
            hidden = embeds.new_zeros(len(rows), length, embeds.shape[2])
            for row, ((columns, _, _), part) in enumerate(zip(rows, states, strict=True)):
                hidden[row, columns] = part[0]
        else:
            hidden = pad_left(states)
        if num_expanded > 1:
            cache.batch_repeat_interleave(num_expanded)
            hidden = hidden.repeat_interleave(num_expanded, dim=0)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_NAME: cache})

    @staticmethod
    def _stack(cache, rows, length):
        """Stacks caches of one row into `cache`, in place, padded on the left to `length` tokens."""
        stack_caches(cache, rows, length)
        cache.dropping = next((state for row in rows if (state := dropping_of(row)) is not None), None)

    def leaves_only_text(self, settings) -> bool:
        """Whether of a video nothing but key-values is left, so that only text behind it has outputs."""
        compressed = settings.beacons is not None or settings.dropping is not None
        return settings.decode == "bilevel" or compressed or self.token_selector is not None

    def _ask(self, cache, text, asked, settings, dense_chunks, required_chunks, before=None):
        """Runs text behind a cache of one row; its first `asked` tokens are the question, None for all."""
        if dropping_of(cache) is not None:
            return self.run_stages(cache, text, asked)
        self._read_question(cache, text[:, :asked], settings, dense_chunks, required_chunks)
        return self.run_text(text, cache, before=before)

    def _read_question(self, cache, question, settings, dense_chunks, required_chunks):
        """Does to a cache of one row, in place, what waits for the question: see `pending_choice`."""
        if not pending_choice(cache, settings):
            return
        if settings.decode == "bilevel":
            mixed, choices = choose_for_question(self, cache, question, settings, dense_chunks, required_chunks)
            cache.layers, cache.choices = mixed.layers, choices
        else:
            self._run_selected(cache, question)

    def _run_selected(self, cache, question):
        """Runs the rows that wait in a cache, of the videos' those that the selector keeps for the text."""
        waiting, layout = cache.deferred, cache.layout
        keep_ratio, limit = self.config.resolve_keep_ratio(), self.config.max_visual_tokens
        # Text before, between and behind the videos, whose timestamps are theirs.
        edges = [0, *(edge for video in layout.videos for edge in (video[0].start, video[-1].end)), layout.length]
        pieces = [
            waiting[start:stop].to(question) if stop > start else question[0, :0]
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
        ]
        text = torch.cat([*pieces, question[0]])
        parts, videos, cursor = [pieces[0]], [], len(pieces[0])
        for video, piece in zip(layout.videos, pieces[1:], strict=True):
            start = video[0].start
            groups = [tuple(place - start for place in group) for group in video]
            _, kept = self.token_selector(waiting.until(video[-1].end).since(start), groups, text, keep_ratio, limit)
            videos.append((GroupSpan(cursor, cursor, cursor + len(kept)),))
            parts += [kept, piece]
            cursor += len(kept) + len(piece)
        cache.layers = [VideoXLCacheLayer() for _ in cache.layers]
        cache.deferred = None
        self._run_sequence(torch.cat(parts)[None], VisualLayout(tuple(videos), cursor), cache, keep_hidden=None)
        cache.layout = layout
        for layer in cache.layers:
            layer.pass_by(layout.length - cursor)

    def _continue_rows(self, embeds, attention_mask, cache, num_expanded, options):
        """Text behind a cache of one row, or several texts behind copies of it."""
        settings, asked, dense_chunks, required_chunks = options
        batch, count = embeds.shape[:2]
        held_rows = cache.layers[0].rows
        repeats = num_expanded  # `generate` has repeated the prompts, not yet the cache
        if held_rows != 1:
            raise ValueError(
                f"{batch} prompts cannot follow a cache of {held_rows} rows; give one prompt a row, or one row"
            )
        embeds, batch = embeds[::repeats], batch // repeats
        valid = torch.ones(batch, count, dtype=torch.bool, device=embeds.device)
        if attention_mask is not None:
            valid = attention_mask[::repeats, -count:].bool()
        past = cache.get_seq_length()
        states, caches = [], []
        for row in range(batch):
            row_cache = cache if batch == 1 else fork_cache(cache)
            columns = valid[row].nonzero().flatten()
            text = embeds[row : row + 1, columns]
            own_asked = None if asked is None else int((columns < asked).sum())
            own = (
                required_chunks[row] if required_chunks and isinstance(required_chunks[0], tuple) else required_chunks
            )
            before = None if attention_mask is None else int(attention_mask[row * repeats, :-count].sum())
            states.append(self._ask(row_cache, text, own_asked, settings, dense_chunks, own, before))
            caches.append(row_cache)
        if batch > 1:
            self._stack(cache, caches, past + count)
            cache.choices = [getattr(row, "choices", None) for row in caches]
            cache.deferred = None
        hidden = pad_left(states, count)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
            hidden = hidden.repeat_interleave(repeats, dim=0)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_NAME: cache})

    def _run_rows_without_cache(self, embeds, rows, settings):
        """Sparse prefill of whole prompts at once, without a cache: differentiable, for training."""
        outputs = []
        for row, (columns, layout, _) in enumerate(rows):
            steps = plan_prefill(layout, **settings.plan, device=embeds.device)
            hidden = embeds.new_zeros(embeds.shape[1:])
            positions = torch.arange(layout.length, device=embeds.device)[None]
            states = self._run_steps(embeds[row : row + 1, columns], positions, steps, None)
            outputs.append(hidden.index_copy(0, columns, states[0]))
        return BaseModelOutputWithPast(last_hidden_state=torch.stack(outputs))


def pad_left(states, length=None) -> torch.Tensor:
    """Stacks hidden states [1, n_i, hidden] of several rows, zero-padded on the left to `length` or the longest."""
    length = max(part.shape[1] for part in states) if length is None else length
    return torch.cat([F.pad(part, (0, 0, length - part.shape[1], 0)) for part in states])
