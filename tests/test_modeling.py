"""forward and generate: counts, modes of running, precision, gradients, batches, beams."""

import copy

import pytest
import torch
from margins import beam_scores
from videoxl.compressor_videoxl import VideoXLDynamicTokenSynthesis, group_frames
from videoxl.configuration_videoxl import VideoXLCompressorConfig

QUESTION = [20, 21, 22, 23]
PREFILLS = (
    {},
    {"prefill": "mask", "chunk_groups": 1, "window_chunks": 1},
    {"prefill": "streaming", "chunk_groups": 2},
)


def prompt(model, groups_per_video, question=QUESTION, between=(30, 31), prefix=(10, 11, 12)):
    """Expanded ids of a prompt with videos of the given numbers of groups."""
    config, ids = model.config, list(prefix)
    for number, groups in enumerate(groups_per_video):
        ids += list(between) if number else []
        for group in range(groups):
            ids += [config.time_start_token_id, 40 + group, config.time_end_token_id]
            ids += [config.video_token_id] * config.compressor_config.tokens_per_group
    return ids + list(question)


def pixels(model, frames, seed=0):
    side = model.config.vision_config.image_size
    return torch.randn(frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, ids, videos, **kwargs):
    return model(torch.tensor([ids]), pixel_values_videos=videos, **kwargs).logits[0]


@pytest.mark.parametrize("settings", PREFILLS)
def test_cache_no_cache_and_decode_agree(model, settings):
    model.config.sparse_attention = settings
    video, ids = pixels(model, 18), prompt(model, [5])
    cached = logits_of(model, ids, [video])
    at_once = logits_of(model, ids, [video], use_cache=False)
    torch.testing.assert_close(cached, at_once, atol=2e-4, rtol=0)
    with torch.no_grad():
        first = model(torch.tensor([ids[:-2]]), pixel_values_videos=video[None], logits_to_keep=1)
        rest = model(torch.tensor([ids[-2:]]), past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits[0], cached[-2:], atol=2e-4, rtol=0)
    torch.testing.assert_close(first.logits[0], cached[-3:-2], atol=2e-4, rtol=0)


@pytest.mark.parametrize("settings", PREFILLS)
def test_left_padded_batch_equals_single_prompts(model, settings):
    model.config.sparse_attention = settings
    videos = [pixels(model, 17, 21), pixels(model, 5, 22), pixels(model, 4, 23)]
    rows = [prompt(model, [5]), prompt(model, [2, 1], question=[24, 25])]
    singles = [logits_of(model, rows[0], videos[:1]), logits_of(model, rows[1], videos[1:])]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    for use_cache in (True, False):
        with torch.no_grad():
            out = model(ids, attention_mask=mask, pixel_values_videos=videos, use_cache=use_cache)
        assert (out.past_key_values is None) == (not use_cache)
        for logits, single in zip(out.logits, singles, strict=True):
            torch.testing.assert_close(logits[-len(single) :], single, atol=2e-4, rtol=0)
    batched = model.generate(input_ids=ids, attention_mask=mask, pixel_values_videos=videos, max_new_tokens=5)
    for row, own, answer in zip(rows, (videos[:1], videos[1:]), batched[:, length:], strict=True):
        alone = model.generate(input_ids=torch.tensor([row]), pixel_values_videos=own, max_new_tokens=5)
        assert answer.tolist() == alone[0, len(row) :].tolist()


def test_generate_forms_agree_with_greedy(model):
    ids, videos = torch.tensor([prompt(model, [2, 1])]), [pixels(model, 8), pixels(model, 3, 1)]
    greedy = model.generate(input_ids=ids, pixel_values_videos=videos, max_new_tokens=6)
    for form in ({"use_cache": False}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}):
        assert torch.equal(
            model.generate(input_ids=ids, pixel_values_videos=videos, max_new_tokens=6, **form), greedy
        ), form
    inputs = {"input_ids": ids, "pixel_values_videos": videos, "max_new_tokens": 6, "num_beams": 3}
    scores = [beam_scores(model, **inputs, use_cache=use_cache) for use_cache in (True, False)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=0)
    samples = model.generate(
        input_ids=ids, pixel_values_videos=videos, max_new_tokens=3, do_sample=True, num_return_sequences=3
    )
    assert samples.shape[0] == 3


def test_generate_refuses_what_would_go_wrong(model):
    ids, videos = torch.tensor([prompt(model, [2])]), [pixels(model, 8)]
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(input_ids=ids, pixel_values_videos=videos, prefill_chunk_size=8)
    cache = model(ids, pixel_values_videos=videos).past_key_values
    longer = torch.cat([ids, torch.tensor([[5]])], dim=1)
    with pytest.raises(ValueError, match="prefilled cache"):
        model.generate(input_ids=longer, past_key_values=cache, prompt_lookup_num_tokens=2)
    model.config.sparse_attention = {"prefill": "streaming"}
    with pytest.raises(ValueError, match="dynamic cache"):
        model.generate(input_ids=ids, pixel_values_videos=videos, cache_implementation="static", max_new_tokens=2)


def test_generated_placeholder_ids_are_ordinary_tokens(model):
    ids, videos = torch.tensor([prompt(model, [1])]), [pixels(model, 4)]
    forced = model.config.video_token_id

    def only_placeholders(batch, prefix):
        return [forced]

    for use_cache in (True, False):
        out = model.generate(
            input_ids=ids, pixel_values_videos=videos, max_new_tokens=3, prefix_allowed_tokens_fn=only_placeholders,
            use_cache=use_cache,
        )  # fmt: skip
        assert out[0, ids.shape[1] :].tolist() == [forced] * 3


def test_words_time_and_colon_elsewhere_change_nothing(model):
    start, end = model.config.time_start_token_id, model.config.time_end_token_id
    model.config.sparse_attention = {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1}
    ids = prompt(model, [4], prefix=(start, 10, end, start, end), question=(start, 20, end))
    cached = logits_of(model, ids, [pixels(model, 16)])
    torch.testing.assert_close(cached, logits_of(model, ids, [pixels(model, 16)], use_cache=False), atol=2e-4, rtol=0)
    from videoxl.sparse_attention import VisualLayout

    tokens = model.config.compressor_config.tokens_per_group
    layout = VisualLayout.from_ids(torch.tensor(ids), [4], tokens, model.config.video_token_id, start, end)
    second = 8 + tokens
    assert [tuple(group) for group in layout.groups[:2]] == [(5, 8, second), (second, second + 3, second + 3 + tokens)]


@pytest.mark.parametrize(("groups", "videos"), [([2], []), ([2], [9]), ([1], [8]), ([2], [8, 4]), ([1, 1], [4])])
def test_placeholder_count_must_match(model, groups, videos):
    tokens = model.config.compressor_config.tokens_per_group
    with pytest.raises(ValueError, match=str(sum(groups) * tokens)):
        logits_of(model, prompt(model, groups), [pixels(model, frames) for frames in videos])


def test_wrong_pixels_and_missing_ids(model):
    side, hidden = model.config.vision_config.image_size, model.config.text_config.hidden_size
    with pytest.raises(ValueError, match=str(side)):
        logits_of(model, prompt(model, [1]), [torch.zeros(4, 3, side - 8, side - 8)])
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, hidden), pixel_values_videos=[pixels(model, 4)])


@pytest.mark.parametrize("settings", PREFILLS)
def test_loss_reaches_every_part_and_ignores_visual_positions(model, settings):
    model.config.sparse_attention = settings
    model.train()
    ids = torch.tensor([prompt(model, [3])])
    out = model(ids, pixel_values_videos=[pixels(model, 11)], labels=ids)
    visual = ids == model.config.video_token_id
    again = model(ids, pixel_values_videos=[pixels(model, 11)], labels=ids.masked_fill(visual, -100))
    assert torch.equal(out.loss, again.loss)
    out.loss.backward()
    # Parameters that the published model holds but never uses.
    unused = ("post_layernorm", "vision_tower.head")
    missing = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert [name for name in missing if not any(part in name for part in unused)] == []
    model.zero_grad()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_give_the_same_logits(model, mode):
    ids, video = prompt(model, [2]), pixels(model, 8)
    expected = logits_of(model, ids, [video])
    with mode():
        got = model(torch.tensor([ids]), pixel_values_videos=[video]).logits[0]
    torch.testing.assert_close(got.detach().clone(), expected, atol=1e-5, rtol=0)


def test_eager_and_sdpa_agree(model):
    ids, video = prompt(model, [3]), pixels(model, 12)
    expected = logits_of(model, ids, [video], use_cache=False)
    model.set_attn_implementation("eager")
    try:
        for use_cache in (True, False):
            got = logits_of(model, ids, [video], use_cache=use_cache)
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
    finally:
        model.set_attn_implementation("sdpa")


def test_chunk_size_of_vision_never_changes_results(model):
    video = pixels(model, 23)
    expected = model.get_video_features([video], output_tower_features=True)
    for frames in (1, 8, 1000):
        model.config.enable_chunk_prefill = True
        model.config.prefill_config = {"chunk_size_for_vision_tower": frames}
        got = model.get_video_features(video[None], output_tower_features=True)
        for name in ("pooler_output", "tower_features"):
            reference = getattr(expected, name)[0]
            assert (getattr(got, name)[0] - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_groups_follow_the_published_memory_order():
    grids = torch.arange(8 * 8 * 2 * 2, dtype=torch.float).view(8, 8, 2, 2)
    volumes = group_frames(grids, 4)
    assert torch.equal(volumes, grids.contiguous().view(2, 8, 4, 2, 2))
    assert volumes[1, 5, 3, 1, 0] == grids[4 + 5 // 2, 4 * (5 % 2) + 3, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_compressor_is_finite_and_close_in_half_precision(dtype, scale):
    torch.manual_seed(0)
    config = VideoXLCompressorConfig(hidden_size=128, grid_size=8)
    compressor = VideoXLDynamicTokenSynthesis(config)
    for weight in compressor.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    for layer in compressor.encoder:
        if hasattr(layer, "q"):  # logits in the thousands: overflow in half precision unless computed in float32
            layer.q.weight.data *= 40
            layer.k.weight.data *= 40
    features = scale * torch.randn(8, 64, 128)
    with torch.no_grad():
        expected = compressor(features)
        got = compressor.to(dtype)(features.to(dtype)).float()
    assert got.isfinite().all()
    error = (got - expected).norm() / expected.norm()
    assert error < (2e-2 if dtype is torch.bfloat16 else 4e-3), error


def test_text_embeddings_generate(model, tokenizer):
    ids = tokenizer("What moves?", return_tensors="pt")["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=5)[0, ids.shape[1] :]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=5)[0], expected)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids, videos = torch.tensor([prompt(model, [2])]), [pixels(model, 7)]
    model.train()

    def gradients():
        model.zero_grad()
        model(ids, pixel_values_videos=videos, labels=ids).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    try:
        got = gradients()
    finally:
        model.gradient_checkpointing_disable()
        model.zero_grad()
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_resized_vocabulary_and_copies_keep_working(model):
    ids, videos = torch.tensor([prompt(model, [2])]), [pixels(model, 7)]
    other = copy.deepcopy(model)
    vocabulary = other.config.text_config.vocab_size
    other.resize_token_embeddings(vocabulary + 8)
    assert other.config.text_config.vocab_size == vocabulary + 8 == other.lm_head.weight.shape[0]
    logits = other(ids, pixel_values_videos=videos).logits
    expected = model(ids, pixel_values_videos=videos).logits
    torch.testing.assert_close(logits[..., :vocabulary], expected, atol=1e-5, rtol=0)


def test_a_user_cache_is_continued(model):
    """A second video behind a cache of text and a first one equals both in one prompt."""
    both = prompt(model, [2, 3])
    videos = [pixels(model, 8), pixels(model, 12, 1)]
    for settings in PREFILLS:
        model.config.sparse_attention = settings
        expected = logits_of(model, both, videos)
        split = len(prompt(model, [2], question=()))
        with torch.no_grad():
            first = model(torch.tensor([both[:split]]), pixel_values_videos=videos[:1])
            second = model(
                torch.tensor([both[split:]]), pixel_values_videos=videos[1:], past_key_values=first.past_key_values
            )
        torch.testing.assert_close(second.logits[0], expected[split:], atol=2e-4, rtol=0)


@pytest.mark.parametrize("settings", (*PREFILLS, {"decode": "bilevel", "decode_chunk_groups": 1}))
@pytest.mark.parametrize("rows", [1, 2])
def test_padding_that_all_rows_share(model, settings, rows):
    model.config.sparse_attention = settings
    row, videos = prompt(model, [5]), [pixels(model, 20)] * rows
    ids, mask = torch.tensor([[0] * 4 + row] * rows), torch.tensor([[0] * 4 + [1] * len(row)] * rows)
    alone = model.generate(input_ids=torch.tensor([row]), pixel_values_videos=videos[:1], max_new_tokens=5)
    padded = model.generate(input_ids=ids, attention_mask=mask, pixel_values_videos=videos, max_new_tokens=5)
    assert padded[:, 4:].tolist() == alone.tolist() * rows
    if settings.get("decode") == "bilevel":
        return
    right = torch.tensor([row + [0] * 4] * rows)
    for use_cache in (True, False):
        with torch.no_grad():
            logits = model(right, attention_mask=mask.flip(1), pixel_values_videos=videos, use_cache=use_cache).logits
        torch.testing.assert_close(
            logits[:, : len(row)], logits_of(model, row, videos[:1]).expand(rows, -1, -1), atol=2e-4, rtol=0
        )


def test_sparse_prefill_of_several_segments_with_and_without_cache(model, monkeypatch):
    monkeypatch.setattr(model.model, "segment_tokens", 50)
    ids, video = prompt(model, [9]), pixels(model, 36)
    for settings in PREFILLS:
        model.config.sparse_attention = settings
        torch.testing.assert_close(
            logits_of(model, ids, [video]), logits_of(model, ids, [video], use_cache=False), atol=2e-4, rtol=0
        )


def test_bad_arguments_say_what_to_do(model):
    ids, videos = torch.tensor([prompt(model, [2])]), [pixels(model, 8)]
    ones = torch.ones_like(ids)
    for wrong, says in (
        ({"input_ids": ids[0], "pixel_values_videos": videos}, "input_ids"),
        ({"input_ids": ids, "pixel_values_videos": videos, "attention_mask": ones[:, 1:]}, "attention_mask"),
        ({"input_ids": ids, "pixel_values_videos": videos, "attention_mask": 0 * ones}, "hides every token"),
        ({"input_ids": ids, "pixel_values_videos": [videos[0].numpy()]}, "pixel_values_videos"),
    ):
        with pytest.raises(ValueError, match=says):
            model(**wrong)
    with pytest.raises(ValueError, match="pixel_values_videos"):
        model.get_video_features([])
    right = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    mask = torch.cat([ones, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    with pytest.raises(ValueError, match="left"):
        model.generate(input_ids=right, attention_mask=mask, pixel_values_videos=videos, max_new_tokens=2)
    plain = model(ids, pixel_values_videos=videos, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], model(ids, pixel_values_videos=videos).logits)
    for wrong in ("streaming", 3):
        with pytest.raises(ValueError, match="sparse_attention"):
            model.config.sparse_attention = wrong
    model.config.sparse_attention = {"decode": "bilevel"}
    for chunks in (2, "0"):
        with pytest.raises(ValueError, match="dense_chunks"):
            logits_of(model, ids[0].tolist(), videos, dense_chunks=chunks)


@pytest.mark.slow
@torch.no_grad()
def test_a_decode_step_is_one_graph(model):
    """Dynamo alone: no compiler is needed. A graph break would be an error."""
    import torch._dynamo as dynamo

    ids, video = torch.tensor([prompt(model, [2])]), pixels(model, 8)
    caches = [model(ids, pixel_values_videos=video[None]).past_key_values for _ in range(2)]
    compiled = torch.compile(model.forward, dynamic=True, fullgraph=True, backend="eager")
    for number in range(3):
        length = ids.shape[1] + number
        inputs = {"input_ids": torch.tensor([[20 + number]]), "position_ids": torch.tensor([[length]])}
        inputs |= {"attention_mask": torch.ones(1, length + 1, dtype=torch.long), "prompt_length": ids.shape[1]}
        expected, found = (
            forward(**inputs, past_key_values=cache).logits
            for forward, cache in zip((model, compiled), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    dynamo.reset()
