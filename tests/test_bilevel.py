"""Bi-level decoding and encoded videos: properties, selection, budgets, batches, saving and loading."""

import copy
import json
import shutil
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margins import beam_scores
from test_modeling import logits_of, pixels, prompt
from videoxl.bilevel_videoxl import KeptSpan, Levels, chunks_of, explicit_chunks, kept_spans, mix_cache
from videoxl.kv_cache import VideoXLCache, rotate
from videoxl.sparse_attention import GroupSpan, VisualLayout

SHORT = {"max_new_tokens": 6, "min_new_tokens": 6}
BILEVEL = {"decode": "bilevel", "decode_chunk_groups": 1, "pool_size": 4}
FRAMES = np.random.default_rng(0).integers(0, 255, (38, 40, 60, 3), dtype=np.uint8)
TIMES = [0.5 * index for index in range(38)]


@pytest.fixture
def video(model, tokenizer):
    return model.encode_video(FRAMES, tokenizer, timestamps=TIMES)


def held(video, cache):
    return {layer.held for layer in cache.layers}


def test_everything_dense_is_full(model):
    ids, videos = prompt(model, [5, 3]), [pixels(model, 20), pixels(model, 11)]
    full = logits_of(model, ids, videos)[-4:]
    model.config.sparse_attention = {**BILEVEL, "reload": "all"}
    torch.testing.assert_close(logits_of(model, ids, videos), full, atol=2e-4, rtol=0)
    model.config.sparse_attention = BILEVEL
    everything = [list(range(5)), list(range(3))]
    torch.testing.assert_close(logits_of(model, ids, videos, dense_chunks=everything), full, atol=2e-4, rtol=0)
    pooled = logits_of(model, ids, videos, dense_chunks=[[], []])
    assert (pooled - full).abs().max() > 1e-2


@pytest.mark.parametrize("pool_size", [2, 4, 9])
def test_a_pooled_group_keeps_what_fills_whole_windows(model, tokenizer, video, pool_size):
    model.config.sparse_attention = {**BILEVEL, "pool_size": pool_size, "reload": "none"}
    ids = torch.cat([video.input_ids, torch.tensor([20, 21])])[None]
    with torch.no_grad():
        out = model(ids[:, -2:], past_key_values=video.cache.fork(), attention_mask=torch.ones_like(ids))
    tokens, groups = model.config.compressor_config.tokens_per_group, len(video.layout.groups)
    text = len(video.input_ids) - groups * tokens
    # The bundled checkpoint's 9 tokens and the default pool size 4 leave 2, the ninth token is left out.
    expected = text + 2 * tokens + (groups - 2) * (tokens // pool_size)
    assert {layer.held - 2 for layer in out.past_key_values.layers} == {expected}


def test_pool_size_one_is_full_up_to_rotation(model):
    ids, video = prompt(model, [6]), pixels(model, 24)
    full = logits_of(model, ids, [video])[-4:]
    for positions in ("compact", "true"):
        reload = {"method": "none", "positions": positions}
        model.config.sparse_attention = {**BILEVEL, "pool_size": 1, "reload": reload}
        torch.testing.assert_close(logits_of(model, ids, [video]), full, atol=5e-4, rtol=0)


def test_first_and_last_chunk_are_always_dense(model):
    model.config.sparse_attention = BILEVEL
    ids, video = prompt(model, [6]), pixels(model, 24)
    none = logits_of(model, ids, [video], dense_chunks=[])
    assert torch.equal(none, logits_of(model, ids, [video], dense_chunks=[0, 5]))
    assert torch.equal(none, logits_of(model, ids, [video], dense_chunks=[[]]))
    assert not torch.equal(none, logits_of(model, ids, [video], dense_chunks=[2]))


@pytest.mark.parametrize("positions", ["compact", "true"])
def test_use_cache_and_generate_forms_agree(model, positions):
    model.config.sparse_attention = {**BILEVEL, "reload": {"method": "probe", "count": 1, "positions": positions}}
    ids, videos = torch.tensor([prompt(model, [6])]), [pixels(model, 24, 10)]
    greedy = model.generate(input_ids=ids, pixel_values_videos=videos, max_new_tokens=6)
    for form in ({"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        again = model.generate(input_ids=ids, pixel_values_videos=videos, max_new_tokens=6, **form)
        assert torch.equal(again, greedy), form
    inputs = {"input_ids": ids, "pixel_values_videos": videos, "max_new_tokens": 5, "num_beams": 3}
    scores = [beam_scores(model, **inputs, use_cache=use_cache) for use_cache in (True, False)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=0)
    with torch.no_grad():
        out = model(ids, pixel_values_videos=videos, use_cache=False)
    assert out.past_key_values is None and out.logits.shape[1] == 4


def test_left_padded_batch_equals_single_prompts(model):
    model.config.sparse_attention = {**BILEVEL, "prefill": "mask", "chunk_groups": 1, "window_chunks": 1}
    videos = [pixels(model, 30, 1), pixels(model, 20, 2)]
    rows = [prompt(model, [8]), prompt(model, [5], question=[24, 25])]
    wanted = [[3], [1, 2]]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    for chunks in (None, wanted):
        batched = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values_videos=videos, dense_chunks=chunks, max_new_tokens=5
        )
        for number, row in enumerate(rows):
            alone = model.generate(
                input_ids=torch.tensor([row]),
                pixel_values_videos=videos[number : number + 1],
                dense_chunks=None if chunks is None else [chunks[number]],
                max_new_tokens=5,
            )
            assert batched[number, length:].tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize(
    ("chunks", "says"),
    [([6], "0 to 5"), ([-1], "0 to 5"), ([[0], [1]], "1 lists"), ([1.5], "1.5"), ([[0, 9]], "0 to 5")],
)
def test_chunks_outside_the_video(model, chunks, says):
    model.config.sparse_attention = BILEVEL
    with pytest.raises(ValueError, match=says):
        logits_of(model, prompt(model, [6]), [pixels(model, 24)], dense_chunks=chunks)


def test_refusals(model, tokenizer, video):
    ids, pixel = prompt(model, [6]), [pixels(model, 24)]
    with pytest.raises(ValueError, match="bi-level"):
        logits_of(model, ids, pixel, dense_chunks=[0])
    with pytest.raises(ValueError, match="bi-level"):
        model.chat(video, tokenizer, "What?", selector=lambda question, chunks: [])
    model.config.sparse_attention = BILEVEL
    with pytest.raises(ValueError, match="selector must be a function"):
        model.chat(video, tokenizer, "What?", selector=[0])
    with pytest.raises(ValueError, match="several videos are a list of"):
        model.chat(["a.mp4", "b.mp4"], tokenizer, "What?")
    with pytest.raises(ValueError, match="labels"):
        model(torch.tensor([ids]), pixel_values_videos=pixel, labels=torch.tensor([ids]))
    with pytest.raises(ValueError, match="question"):
        logits_of(model, prompt(model, [6], question=()), pixel)
    with pytest.raises(ValueError, match="dynamic cache"):
        model.generate(input_ids=torch.tensor([ids]), pixel_values_videos=pixel, cache_implementation="static")
    model.config.sparse_attention = {**BILEVEL, "reload": {"max_tokens": 10}}
    with pytest.raises(ValueError, match="max_tokens=10.* too small"):
        logits_of(model, ids, pixel)


def test_automatic_choice_comes_back_with_times_and_scores(model, tokenizer, video):
    model.config.sparse_attention = {**BILEVEL, "reload": {"method": "probe", "count": 2}}
    answer, chunks = model.chat(
        video, tokenizer, "What moves?", return_history=False, return_chunks=True, generation_config=SHORT
    )
    assert answer == model.chat(video, tokenizer, "What moves?", return_history=False, generation_config=SHORT)
    assert [chunk["index"] for chunk in chunks] == list(range(10)) and {chunk["video"] for chunk in chunks} == {0}
    assert [chunk["start"] for chunk in chunks] == [2.0 * index for index in range(10)]
    assert chunks[-1]["end"] == video.duration == 19.0
    dense = [chunk["index"] for chunk in chunks if chunk["level"] == "dense"]
    assert {0, 9} <= set(dense) and len(dense) <= 4
    json.dumps(chunks)
    chosen = sorted(chunks[1:-1], key=lambda chunk: -chunk["score"])[: len(dense) - 2]
    assert {chunk["index"] for chunk in chosen} <= set(dense)
    options = {"return_history": False, "generation_config": SHORT}
    assert model.chat(video, tokenizer, "What moves?", dense_chunks=dense, **options) == answer


@torch.no_grad()
def test_a_chunk_scores_what_the_questions_last_token_attends_to_it(model):
    """With pools of one token the question's queries are full attention's, whose weights the dense path spells out."""
    ids, videos = prompt(model, [6], question=(20, 21, 22)), [pixels(model, 24)]
    count = model.config.text_config.num_hidden_layers
    model.config.sparse_attention = {**BILEVEL, "pool_size": 1, "reload": {"count": 2, "layers": [0.4, 0.8]}}
    out = model(torch.tensor([ids]), pixel_values_videos=videos, use_cache=True)
    choices, layout = out.past_key_values.choices, out.past_key_values.layout
    model.config.sparse_attention = {}
    model.set_attn_implementation("eager")
    weights = model(
        torch.tensor([ids]), pixel_values_videos=videos, output_attentions=True, use_cache=False
    ).attentions
    expected = torch.zeros(6, dtype=torch.float64)
    for layer in range(int(0.4 * count), int(0.8 * count)):
        seen = weights[layer][0, :, -1, :-3].double()  # before the question, whose own tokens are no part of it
        mass = (seen / seen.sum(dim=1, keepdim=True)).sum(dim=0)
        expected += torch.stack([mass[group.visual_start : group.end].mean() for group in layout.groups])
    scores = [choice.score for choice in choices]
    assert scores == pytest.approx((expected / expected.sum()).tolist(), rel=1e-3)


def test_times_in_the_question_and_a_selector_choose(model, tokenizer, video):
    model.config.sparse_attention = {**BILEVEL, "reload": {"method": "probe", "count": 1}}
    options = {"return_history": False, "return_chunks": True, "generation_config": SHORT}
    for question, wanted in (("What happens at 0:09?", {4}), ("What happens between 10 s and 13 s?", {5, 6})):
        _, chunks = model.chat(video, tokenizer, question, **options)
        assert wanted <= {chunk["index"] for chunk in chunks if chunk["level"] == "dense"}
    seen = []

    def selector(question, chunks):
        seen.append((question, chunks))
        return [3]

    answer, chunks = model.chat(video, tokenizer, "What moves?", selector=selector, **options)
    assert {chunk["index"] for chunk in chunks if chunk["level"] == "dense"} == {0, 3, 9}
    assert seen[0][0] == "What moves?" and seen[0][1][3] == {"video": 0, "index": 3, "start": 6.0, "end": 8.0}


@pytest.mark.parametrize("budget", [45, 60, 80, 100])
def test_token_budget_holds(model, tokenizer, video, budget):
    model.config.sparse_attention = {**BILEVEL, "reload": {"max_tokens": budget}}
    ids = torch.cat([video.input_ids, torch.tensor([20, 21])])[None]

    with torch.no_grad():
        out = model(ids[:, -2:], past_key_values=video.cache.fork(), attention_mask=torch.ones_like(ids))
    chunk = video.layout.groups[1].end - video.layout.groups[0].end
    kept = {layer.held - 2 for layer in out.past_key_values.layers}
    assert len(video.input_ids) > 110, "a budget must bind, or it is not tested"
    assert len(kept) == 1 and budget - chunk < max(kept) <= budget
    assert out.past_key_values.get_seq_length() == ids.shape[1]


@contextmanager
def scores_of_beams(model):
    """The log-likelihoods of the best beams of every call of `generate` meanwhile, see `beam_scores`."""
    scores = []

    def scored(*args, generation_config, **kwargs):
        generation_config.return_dict_in_generate = generation_config.output_scores = True
        output = type(model).generate(model, *args, generation_config=generation_config, **kwargs)
        scores.append(output.sequences_scores)
        return output.sequences

    model.generate = scored
    yield scores
    del model.generate


@pytest.mark.parametrize("sparse", [{}, {**BILEVEL, "reload": {"count": 2}}])
def test_several_questions_in_one_call(model, tokenizer, video, sparse):
    model.config.sparse_attention = sparse
    questions = [
        "Please say: What moves?",
        "Please say: How many red circles are there at the end of the video?",
        "Please say: Why?",
    ]
    alone = [model.chat(video, tokenizer, q, return_history=False, generation_config=SHORT) for q in questions]
    for listed in (questions, iter(questions), dict.fromkeys(questions)):
        assert model.chat_batch(video, tokenizer, listed, generation_config=SHORT) == alone
    with scores_of_beams(model) as scores:
        beams = {"generation_config": {**SHORT, "num_beams": 2}}
        for question in questions:
            model.chat(video, tokenizer, question, **beams)
        model.chat_batch(video, tokenizer, questions, **beams)
    *singly, together = scores
    torch.testing.assert_close(together, torch.cat(singly))
    for wrong in ("What?", None, 7, [], iter(())):
        with pytest.raises(ValueError, match="list of questions"):
            model.chat_batch(video, tokenizer, wrong)
    for wrong in (["What?", ""], ["What?", " \n"], ["What?", None], (b"What?" for _ in range(2)), [["What?"]]):
        with pytest.raises(ValueError, match=r"question \d must be a question in text"):
            model.chat_batch(video, tokenizer, wrong)
    with pytest.raises(ValueError, match="encode_video"):
        model.chat_batch("clip.mp4", tokenizer, ["What?"])


def test_saved_and_loaded_is_the_same_bit_for_bit(model, tokenizer, video, tmp_path):
    path = tmp_path / "video.videoxl"
    video.save(path)
    loaded = model.load_video(path, tokenizer)
    assert torch.equal(loaded.input_ids, video.input_ids) and loaded.timestamps == video.timestamps
    assert loaded.layout == video.layout and loaded.duration == video.duration
    for mine, theirs in zip(loaded.cache.layers, video.cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    for sparse in ({}, {**BILEVEL, "reload": {"count": 2}}):
        model.config.sparse_attention = sparse
        options = {"return_history": False, "generation_config": SHORT}
        assert model.chat(video, tokenizer, "What?", **options) == model.chat(loaded, tokenizer, "What?", **options)
    for each in (video, loaded):
        each.append(FRAMES[:3], [20.0, 20.5, 21.0])
    assert torch.equal(loaded.cache.layers[-1].keys, video.cache.layers[-1].keys)
    assert model.load_video(path).num_frames == 38
    with pytest.raises(ValueError, match="tokenizer"):
        model.load_video(path).append(FRAMES[:1], [30.0])


def test_load_refuses_what_does_not_fit(model, tokenizer, clips, tmp_path):
    source = tmp_path / "clip.mp4"
    shutil.copyfile(clips[0], source)
    path = tmp_path / "video.videoxl"
    video = model.encode_video(source, tokenizer, max_num_frames=8, sample_fps=None)
    video.save(path)
    assert model.load_video(path, max_num_frames=8, sample_fps=None).num_frames == 8
    with pytest.raises(ValueError, match="max_num_frames"):
        model.load_video(path, max_num_frames=9)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1.0
        other.model.compressor.temporal_encoding[0, 0] += 1.0
    with pytest.raises(ValueError, match="model"):
        other.load_video(path)
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4
    (tmp_path / "damaged.videoxl").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        model.load_video(tmp_path / "damaged.videoxl")
    shutil.copyfile(clips[1], source)
    with pytest.raises(ValueError, match="source"):
        model.load_video(path)


def test_another_models_video_is_not_used(model, tokenizer, video):
    with pytest.raises(ValueError, match="another model"):
        copy.deepcopy(model).chat(video, tokenizer, "What?")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_mixed_cache_is_what_the_spans_say(data):
    """Against a naive oracle: un-rotate, pool, rotate, one token at a time."""
    size = data.draw(st.sampled_from([4, 6, 9]))
    pool = data.draw(st.integers(1, 5))
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    videos, cursor = [], data.draw(st.integers(0, 3))
    for count in counts:
        groups = []
        for _ in range(count):
            stamp = data.draw(st.integers(0, 2))
            groups.append(GroupSpan(cursor, cursor + stamp, cursor + stamp + size))
            cursor = groups[-1].end
        cursor += data.draw(st.integers(0, 2))
        videos.append(tuple(groups))
    layout = VisualLayout(tuple(videos), cursor)
    chunks = chunks_of(layout, data.draw(st.integers(1, 3)))
    levels = Levels(
        tuple(data.draw(st.sampled_from(["dense", "pooled", "dropped"])) for _ in chunks),
        tuple(data.draw(st.booleans()) for _ in chunks),
        0,
    )
    true_positions = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    keys, values = (torch.randn(1, 2, cursor, 8, generator=generator) for _ in range(2))
    inv_freq = 1.0 / 10000.0 ** (torch.arange(4) / 4)
    cache = VideoXLCache(1)
    cache.layers[0].set_content(keys.clone(), values.clone())
    spans = kept_spans(layout, chunks, levels, cursor)
    groups = [(group.visual_start, group.end) for group in layout.groups]
    mixed = mix_cache(cache, spans, groups, pool, inv_freq, true_positions).layers[0] if spans else None
    expected = []
    for span in spans:
        step = 1 if span.group is None else pool
        for start in range(span.start, span.start + (span.stop - span.start) // step * step, step):
            window = range(start, start + step)
            raw = [rotate(keys[:, :, i : i + 1], torch.tensor([i]), None, inv_freq) for i in window]
            mean = sum(raw) / step
            position = start + (step - 1) / 2 if true_positions else len(expected)
            turned = rotate(mean, None, torch.tensor([position]), inv_freq)
            expected.append((turned, values[:, :, start : start + step].mean(dim=2, keepdim=True)))
    if not expected:
        return
    torch.testing.assert_close(mixed.keys, torch.cat([key for key, _ in expected], dim=2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed.values, torch.cat([value for _, value in expected], dim=2), atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.layers[0].keys, keys) and mixed.get_seq_length() == cursor


def test_explicit_chunks_of_several_videos():
    layout = VisualLayout(
        (tuple(GroupSpan(i, i, i + 1) for i in range(5)), tuple(GroupSpan(i, i, i + 1) for i in range(5, 8))), 8
    )
    chunks = chunks_of(layout, 2)
    assert [(chunk.video, chunk.index, list(chunk.groups)) for chunk in chunks] == [
        (0, 0, [0, 1]), (0, 1, [2, 3]), (0, 2, [4]), (1, 0, [5, 6]), (1, 1, [7]),
    ]  # fmt: skip
    assert explicit_chunks([[1], [0, 1]], chunks) == [1, 3, 4]
    assert explicit_chunks(None, chunks) is None
    with pytest.raises(ValueError, match="2 lists"):
        explicit_chunks([1], chunks)
    assert kept_spans(layout, chunks, Levels(("dense",) * 5, (True,) * 5, 8), 8) == [KeptSpan(0, 8)]


@pytest.mark.parametrize("prefill", ["full", "streaming", "mask"])
def test_offloaded_prefill_is_the_same(model, tokenizer, prefill):
    plan = {"prefill": prefill, "chunk_groups": 1, "window_chunks": 2}
    options = {"return_history": False, "generation_config": SHORT}
    grown, at_once = [], []
    for offload in (False, True):
        model.config.sparse_attention = {**plan, "offload": offload}
        at_once.append(model.encode_video(FRAMES, tokenizer, timestamps=TIMES))
        grown.append(model.encode_video(FRAMES[:21], tokenizer, timestamps=TIMES[:21]))
        grown[-1].append(FRAMES[21:], TIMES[21:])
    first, second = at_once[0].layout.groups[:2]
    chunk = second.end - first.end
    for mine, theirs in zip(at_once[1].cache.layers, at_once[0].cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-5, rtol=1e-4)
        if prefill == "streaming":  # two chunks of the window and the one at hand, not all ten
            assert mine.near_start > 0 and mine._near[0].shape[2] <= 3 * chunk
    for sparse in (plan, {**plan, **BILEVEL}):
        model.config.sparse_attention = sparse
        answers = [model.chat(video, tokenizer, "What?", **options) for video in (*at_once, *grown)]
        assert len(set(answers)) == 1
    two_videos = []
    for chosen in ({**plan, "offload": True}, plan):
        model.config.sparse_attention = chosen
        _, history = model.chat(FRAMES, tokenizer, "What?", timestamps=TIMES, generation_config=SHORT)
        second = {"timestamps": TIMES[:9], "chat_history": history, **options}
        two_videos.append(model.chat(FRAMES[:9], tokenizer, "And?", **second))
    assert two_videos[0] == two_videos[1]


def test_forks_of_forks_never_see_each_other():
    def states(value, count):
        return torch.full((1, 1, count, 2), float(value))

    def content(cache):
        return cache.layers[0].keys[0, 0, :, 0].tolist()

    cache = VideoXLCache(1)
    cache.update(states(0, 3), states(0, 3), 0)
    first = cache.fork(make_room=True)
    second = first.fork()
    del first
    second.update(states(1, 2), states(1, 2), 0)
    cache.update(states(2, 2), states(2, 2), 0)
    third = second.fork()
    third.crop(-1)
    third.update(states(3, 1), states(3, 1), 0)
    assert content(cache) == [0, 0, 0, 2, 2]
    assert content(second) == [0, 0, 0, 1, 1]
    assert content(third) == [0, 0, 0, 1, 3]


def test_a_question_copies_nothing_of_the_video(model, tokenizer, video, tmp_path):
    video.save(tmp_path / "video.videoxl")
    loaded = model.load_video(tmp_path / "video.videoxl", tokenizer)
    for each in (video, loaded):
        model.chat(each, tokenizer, "What?", generation_config=SHORT)
        keys = each.cache.layers[0].keys
        fork = each.cache.fork(make_room=True)
        fork.update(keys[:, :, :1], keys[:, :, :1], 0)
        assert fork.layers[0].keys.data_ptr() == each.cache.layers[0].keys.data_ptr()


def test_pooled_keys_leave_a_device_with_their_video(model, tokenizer, video):
    inv_freq = model.model.language_model.rotary_emb.inv_freq
    groups = [(group.visual_start, group.end) for group in video.layout.groups]
    fresh = [layer.pooled_groups(groups, 4, inv_freq) for layer in video.cache.layers]
    for moved in (True, False):
        pooled = [layer.pooled_groups(groups, 4, inv_freq.to("meta")) for layer in video.cache.layers]
        assert all(keys.is_meta for keys, _ in pooled), "as if the model lay on another device"
        left = [weakref.ref(states) for pair in pooled for states in pair]
        del pooled
        assert all(states() is not None for states in left)
        if moved:
            video.to("cpu")
            assert not any(states() is not None for states in left)
        for layer, expected in zip(video.cache.layers, fresh, strict=True):
            assert all(map(torch.equal, layer.pooled_groups(groups, 4, inv_freq), expected))
    shared = video.cache.layers[0].pooled_groups(groups, 4, inv_freq)
    assert video.to("cpu").cache.layers[0].pooled_groups(groups, 4, inv_freq) is shared, "nothing to move"


def test_pooled_keys_do_not_leak_between_branches_of_one_video(model, tokenizer, video):
    branches = [copy.deepcopy(video), copy.deepcopy(video)]
    model.config.sparse_attention = {**BILEVEL, "reload": "none"}
    for branch, frames in zip(branches, (FRAMES[:8], FRAMES[8:16]), strict=True):
        model.chat(branch, tokenizer, "Tell me: What?", generation_config=SHORT)
        branch.append(frames, [20.0 + 0.5 * index for index in range(8)])
    fresh = copy.deepcopy(video)
    fresh.append(FRAMES[8:16], [20.0 + 0.5 * index for index in range(8)])
    options = {"return_history": False, "generation_config": SHORT}
    model.chat(branches[0], tokenizer, "Tell me: What?", **options)
    assert model.chat(branches[1], tokenizer, "Tell me: What?", **options) == model.chat(
        fresh, tokenizer, "Tell me: What?", **options
    )


def test_append_keeps_the_plan_the_video_was_made_with(model, tokenizer):
    model.config.sparse_attention = {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1}
    at_once = model.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    grown = model.encode_video(FRAMES[:20], tokenizer, timestamps=TIMES[:20])
    model.config.sparse_attention = {}
    grown.append(FRAMES[20:], TIMES[20:])
    assert grown.prefill == at_once.prefill
    torch.testing.assert_close(grown.cache.layers[-1].keys, at_once.cache.layers[-1].keys, atol=1e-4, rtol=1e-4)


def test_several_questions_with_times_equal_single_calls(model, tokenizer, video):
    model.config.sparse_attention = {**BILEVEL, "reload": {"method": "none"}}
    questions = ["What happens at 0:09?", "What moves?", "And between 10 s and 13 s?"]
    alone = [model.chat(video, tokenizer, q, return_history=False, generation_config=SHORT) for q in questions]
    assert model.chat_batch(video, tokenizer, questions, generation_config=SHORT) == alone
    with pytest.raises(ValueError, match="pool_size"):
        model.config.sparse_attention = {**BILEVEL, "pool_size": 17}
        model.chat(video, tokenizer, "What?")


def test_an_earlier_video_that_was_replaced_is_not_reused(model, tokenizer, clips):
    eight = {"max_num_frames": 8, "sample_fps": None, "generation_config": SHORT}
    _, history = model.chat(clips[0], tokenizer, "What moves?", **eight)
    _, longer = model.chat(clips[1], tokenizer, "And here?", history, generation_config=SHORT)
    other = np.flip(FRAMES[: longer[0]["content"][0]["video"].num_frames]).copy()
    times = longer[0]["content"][0]["video"].timestamps
    edited = copy.deepcopy(longer)
    edited[0]["content"][0]["video"] = model.encode_video(other, tokenizer, timestamps=times)
    answer, _ = model.chat(None, tokenizer, "Compare.", edited, generation_config=SHORT)
    again = [message if index else edited[0] for index, message in enumerate(json.loads(json.dumps(longer)))]
    sampling = {"sample_fps": 1, "max_num_frames": 512}
    assert answer == model.chat(None, tokenizer, "Compare.", again, False, generation_config=SHORT, **sampling)
