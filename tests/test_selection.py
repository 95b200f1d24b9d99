"""Bi-level decoding's policy: levels under a budget, and the scorers against naive formulas."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from videoxl import sparse_attention
from videoxl.bilevel_videoxl import (
    AUTO_SHARE,
    DENSE,
    DROPPED,
    POOLED,
    ChunkCost,
    LastQueries,
    ReloadPolicy,
    attention_mass,
    choose_levels,
    rank,
)

HEIGHT = {DROPPED: 0, POOLED: 1, DENSE: 2}


def uniform_cost(chunks, text=10, timestamp=3, dense=16, pooled=4):
    return ChunkCost(text, (timestamp,) * chunks, (dense,) * chunks, (pooled,) * chunks, 8)


@st.composite
def cases(draw):
    """(scores, cost, video_of_chunk, required) of one to three videos."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    videos = [video for video, size in enumerate(sizes) for _ in range(size)]
    total = len(videos)
    scores = draw(st.lists(st.integers(0, 4).map(float), min_size=total, max_size=total))
    stamps = draw(st.lists(st.integers(0, 5), min_size=total, max_size=total))
    dense = draw(st.lists(st.integers(0, 20), min_size=total, max_size=total))
    cost = ChunkCost(
        draw(st.integers(0, 9)),
        tuple(stamps),
        tuple(dense),
        tuple(size // 4 for size in dense),
        draw(st.integers(1, 9)),
    )
    return scores, cost, videos, tuple(draw(st.lists(st.integers(0, total - 1), max_size=3)))


@st.composite
def limits(draw):
    return {
        "count": draw(st.none() | st.integers(0, 8)),
        "share": draw(st.none() | st.floats(0, 1)),
        "mass": draw(st.none() | st.floats(0, 1)),
    }


def ends_of(videos):
    return {i for i, v in enumerate(videos) if i in (videos.index(v), len(videos) - 1 - videos[::-1].index(v))}


def least_tokens(cost, videos):
    return cost.text + sum(cost.timestamps[chunk] + cost.dense[chunk] for chunk in ends_of(videos))


def kept_tokens(levels, cost):
    size = {DENSE: cost.dense, POOLED: cost.pooled, DROPPED: (0,) * len(cost.dense)}
    visual = sum(size[level][chunk] for chunk, level in enumerate(levels.levels))
    return (
        cost.text
        + visual
        + sum(tokens for tokens, kept in zip(cost.timestamps, levels.timestamps, strict=True) if kept)
    )


@settings(deadline=None, max_examples=150)
@given(cases(), limits(), st.integers(0, 150), st.integers(0, 60), st.booleans())
def test_the_budget_holds_and_more_never_lowers_a_level(case, limit, slack, more, in_bytes):
    scores, cost, videos, required = case
    least = least_tokens(cost, videos)
    assume(least > 0)

    def levels_for(tokens):
        budget = {"max_bytes": tokens * cost.bytes_per_token} if in_bytes else {"max_tokens": tokens}
        return choose_levels(ReloadPolicy(**limit, **budget), scores, cost, videos, required)

    small, large = levels_for(least + slack), levels_for(least + slack + more)
    for levels, budget in ((small, least + slack), (large, least + slack + more)):
        assert levels.tokens == kept_tokens(levels, cost) <= budget
        assert all(levels.levels[chunk] == DENSE and levels.timestamps[chunk] for chunk in ends_of(videos))
        assert all(kept or level == DROPPED for level, kept in zip(levels.levels, levels.timestamps, strict=True))
    assert all(HEIGHT[a] <= HEIGHT[b] for a, b in zip(small.levels, large.levels, strict=True))
    assert all(a <= b for a, b in zip(small.timestamps, large.timestamps, strict=True))


@settings(deadline=None, max_examples=100)
@given(cases(), limits())
def test_without_a_budget_nothing_is_dropped_and_a_budget_of_everything_changes_nothing(case, limit):
    scores, cost, videos, required = case
    levels = choose_levels(ReloadPolicy(**limit), scores, cost, videos, required)
    assert DROPPED not in levels.levels and all(levels.timestamps)
    everything = max(cost.text + sum(cost.timestamps) + sum(cost.dense), 1)
    assert choose_levels(ReloadPolicy(**limit, max_tokens=everything), scores, cost, videos, required) == levels


@settings(deadline=None, max_examples=100)
@given(cases(), limits(), st.data())
def test_limits_count_chosen_chunks_and_never_cut_required_ones(case, limit, data):
    scores, cost, videos, required = case
    levels = choose_levels(ReloadPolicy(**limit), scores, cost, videos, required).levels
    inner = [chunk for chunk in range(len(videos)) if chunk not in ends_of(videos)]
    chosen = [chunk for chunk in inner if levels[chunk] == DENSE]
    assert all(levels[chunk] == DENSE for chunk in required)
    named = len(set(required) & set(inner))
    for allowed in (limit["count"], limit["share"] and math.ceil(limit["share"] * len(videos))):
        assert allowed is None or len(chosen) <= max(allowed, named)
    free = [chunk for chunk in chosen if chunk not in required]
    left = [chunk for chunk in inner if levels[chunk] == POOLED]
    assert all((scores[a], -a) > (scores[b], -b) for a in free for b in left), "best first, earlier first on ties"

    explicit = data.draw(st.lists(st.integers(0, len(videos) - 1)))
    exact = choose_levels(ReloadPolicy(**limit), scores, cost, videos, required, explicit).levels
    assert [chunk for chunk, level in enumerate(exact) if level == DENSE] == sorted(ends_of(videos) | set(explicit))


def test_no_choice_repeats_the_reference():
    levels = choose_levels(ReloadPolicy("none"), None, uniform_cost(5), [0] * 5)
    assert levels.levels == (DENSE, POOLED, POOLED, POOLED, DENSE)
    assert levels.tokens == 10 + 5 * 3 + 2 * 16 + 3 * 4
    assert set(choose_levels(ReloadPolicy("all"), None, uniform_cost(5), [0] * 5).levels) == {DENSE}
    two = choose_levels(ReloadPolicy("none"), None, uniform_cost(6), [0, 0, 0, 1, 1, 2]).levels
    assert two == (DENSE, POOLED, DENSE, DENSE, DENSE, DENSE)
    assert choose_levels(ReloadPolicy("none"), None, uniform_cost(0), []).tokens == 10


def test_share_is_rounded_up_and_immune_to_floating_point():
    scores = [float(chunk) for chunk in range(100)]
    levels = choose_levels(ReloadPolicy(share=0.07), scores, uniform_cost(100), [0] * 100).levels
    assert levels.count(DENSE) == 7 + 2
    assert choose_levels(ReloadPolicy(share=0.2), scores[:6], uniform_cost(6), [0] * 6).levels.count(DENSE) == 2 + 2


@pytest.mark.parametrize(("mass", "chosen"), [(0.0, 0), (0.2, 0), (0.21, 1), (0.6, 1), (0.61, 2), (0.9, 2), (1.0, 3)])
def test_mass_counts_what_the_ends_hold(mass, chosen):
    scores = [0.1, 0.3, 0.4, 0.1, 0.0, 0.1]
    levels = choose_levels(ReloadPolicy(mass=mass), scores, uniform_cost(6), [0] * 6).levels
    assert levels.count(DENSE) == 2 + chosen


def test_a_shrinking_budget_takes_dense_then_pooled_then_timestamps():
    scores = [0.0, 1.0, 3.0, 2.0, 0.0]
    policy = {"count": 2}
    cost, videos = uniform_cost(5), [0] * 5
    table = [
        (10 + 15 + 4 * 16 + 4, (DENSE, POOLED, DENSE, DENSE, DENSE), (True,) * 5),
        (10 + 15 + 4 * 16, (DENSE, DROPPED, DENSE, DENSE, DENSE), (True,) * 5),
        (10 + 15 + 4 * 16 - 1, (DENSE, DROPPED, DENSE, POOLED, DENSE), (True,) * 5),
        (10 + 15 + 2 * 16 + 8, (DENSE, DROPPED, POOLED, POOLED, DENSE), (True,) * 5),
        (10 + 15 + 2 * 16 + 7, (DENSE, DROPPED, POOLED, DROPPED, DENSE), (True,) * 5),
        (10 + 15 + 2 * 16, (DENSE, DROPPED, DROPPED, DROPPED, DENSE), (True,) * 5),
        (10 + 6 + 2 * 16 + 3, (DENSE, DROPPED, DROPPED, DROPPED, DENSE), (True, False, True, False, True)),
        (10 + 6 + 2 * 16, (DENSE, DROPPED, DROPPED, DROPPED, DENSE), (True, False, False, False, True)),
    ]
    for tokens, levels, timestamps in table:
        got = choose_levels(ReloadPolicy(**policy, max_tokens=tokens), scores, cost, videos)
        assert (got.levels, got.timestamps) == (levels, timestamps), tokens


def test_timestamps_of_what_is_kept_leave_the_budget_to_chosen_chunks():
    scores = [0.0, 1.0, 3.0, 2.0, 0.0]
    least = 10 + 2 * (3 + 16)
    for tokens, levels, timestamps in [
        (least + 2 * 19 + 7, (DENSE, POOLED, DENSE, DENSE, DENSE), (True,) * 5),
        (least + 2 * 19 + 6, (DENSE, DROPPED, DENSE, DENSE, DENSE), (True, False, True, True, True)),
        (least + 2 * 7 + 12, (DENSE, DROPPED, DENSE, POOLED, DENSE), (True, False, True, True, True)),
        (least + 7, (DENSE, DROPPED, POOLED, DROPPED, DENSE), (True, False, True, False, True)),
        (least + 6, (DENSE, DROPPED, DROPPED, DROPPED, DENSE), (True, False, False, False, True)),
    ]:
        policy = ReloadPolicy(count=2, max_tokens=tokens, timestamps="kept")
        got = choose_levels(policy, scores, uniform_cost(5), [0] * 5)
        assert (got.levels, got.timestamps) == (levels, timestamps), tokens
    free = choose_levels(ReloadPolicy(count=2, timestamps="kept"), scores, uniform_cost(5), [0] * 5)
    assert free == choose_levels(ReloadPolicy(count=2), scores, uniform_cost(5), [0] * 5)


def test_explicit_chunks_without_scores_rank_as_given():
    policy = ReloadPolicy("none", max_tokens=10 + 15 + 3 * 16 + 2 * 4)
    levels = choose_levels(policy, None, uniform_cost(5), [0] * 5, explicit=[3, 1, 3]).levels
    assert levels == (DENSE, POOLED, DROPPED, DENSE, DENSE)


def test_a_budget_below_what_is_always_kept_names_the_smallest_one():
    least = 10 + 2 * 19
    with pytest.raises(ValueError, match=rf"max_tokens={least - 1}.* need {least} tokens"):
        choose_levels(ReloadPolicy("none", max_tokens=least - 1), None, uniform_cost(5), [0] * 5)
    with pytest.raises(ValueError, match=rf"max_bytes={8 * least - 1}.* {8 * least} bytes"):
        choose_levels(ReloadPolicy("none", max_bytes=8 * least - 1), None, uniform_cost(5), [0] * 5)
    assert choose_levels(ReloadPolicy("none", max_tokens=least), None, uniform_cost(5), [0] * 5).tokens == least


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"explicit": [5]}, "no chunk 5: the videos have 5 chunks"),
        ({"explicit": [-1]}, "no chunk -1"),
        ({"explicit": [1.0]}, "no chunk 1.0"),
        ({"explicit": [True]}, "no chunk True"),
        ({"required": [9]}, "no chunk 9"),
        ({"scores": [1.0]}, "expected 5 scores.* got 1"),
        ({"scores": None}, "'probe' chooses by score"),
        ({"scores": [0, math.nan, 0, 0, 0]}, "chunk 1 is NaN"),
        ({"scores": [0, -1, 0, 0, 0], "policy": ReloadPolicy(mass=0.5)}, "mass needs finite scores"),
    ],
)
def test_bad_input_is_refused(options, match):
    arguments = {"policy": ReloadPolicy(), "scores": [0.0] * 5, "cost": uniform_cost(5), "video_of_chunk": [0] * 5}
    with pytest.raises(ValueError, match=match):
        choose_levels(**{**arguments, **options})


def test_rank_puts_the_earlier_chunk_first():
    assert rank([1.0, 2.0, 1.0, 2.0, -math.inf]) == [1, 3, 0, 2, 4]
    assert rank([]) == []


# --- parsing --------------------------------------------------------------------------------------------------------
def test_parse_reads_what_a_config_can_hold():
    auto = ReloadPolicy.parse("auto")
    assert auto == ReloadPolicy("probe", share=AUTO_SHARE) == ReloadPolicy.parse({}) == ReloadPolicy.parse("probe")
    assert ReloadPolicy.parse({"method": "auto", "count": 3}) == ReloadPolicy(count=3)
    assert ReloadPolicy.parse({"max_bytes": 10**9}) == ReloadPolicy(share=AUTO_SHARE, max_bytes=10**9)
    assert ReloadPolicy.parse({"reduce": "max"}) == auto  # of earlier checkpoints
    assert ReloadPolicy.parse("none") == ReloadPolicy("none") and ReloadPolicy.parse("all").share is None
    for value in ("auto", "none", {"method": "probe", "mass": 0.9, "layers": [0, 0.5], "positions": "true"}):
        policy = ReloadPolicy.parse(value)
        assert ReloadPolicy.parse(json.loads(json.dumps(asdict(policy)))) == policy


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "method's name or a dict.* got None"),
        (3, "got 3"),
        ("best", "method must be one of .*'auto', 'probe'.* got 'best'"),
        ({"method": None}, "method must be"),
        ("mean_key", "method must be one of .*'probe'.* got 'mean_key'"),
        ({"top": 3}, "no field 'top'; it has method, count"),
        ({"count": -1}, "count must be None or an integer of at least 0, got -1"),
        ({"count": True}, "count must be"),
        ({"count": 2.0}, "count must be"),
        ({"share": 1.5}, "share must be None or a number from 0 to 1, got 1.5"),
        ({"share": math.nan}, "share must be"),
        ({"mass": "0.9"}, "mass must be"),
        ({"max_tokens": 0}, "max_tokens must be None or an integer of at least 1"),
        ({"max_bytes": 1e9}, "max_bytes must be"),
        ({"positions": "real"}, "positions must be one of .*compact.*true"),
        ({"layers": [0.5]}, "layers must be"),
        ({"layers": [0.5, 0.5]}, "layers must be"),
        ({"layers": "ab"}, "layers must be"),
        ({"method": "none", "count": 1}, "count must be None with 'none'"),
    ],
)
def test_parse_names_the_field_that_is_wrong(value, match):
    with pytest.raises(ValueError, match=f"sparse_attention.reload.*{match}"):
        ReloadPolicy.parse(value)


# --- scorers --------------------------------------------------------------------------------------------------------
def naive_weights(query, key, scaling):
    """[1, H, n, L] softmax with all keys spelled out."""
    repeated = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ repeated.transpose(2, 3) * scaling
    queries, length = query.shape[2], key.shape[2]
    future = torch.ones(queries, length, dtype=torch.bool).triu(length - queries + 1)
    return logits.masked_fill(future, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "past"), [(4, 4, 3, 30), (6, 2, 5, 41), (4, 1, 1, 7), (2, 2, 4, 0)]
)
@pytest.mark.parametrize("blocks", [(2**23, 2**22), (64, 24), (1, 1)])
def test_attention_mass_is_the_softmax(monkeypatch, heads, kv_heads, queries, past, blocks):
    monkeypatch.setattr(sparse_attention, "MAX_WEIGHTS", blocks[0])
    monkeypatch.setattr(sparse_attention, "MAX_KEY_ELEMENTS", blocks[1])
    torch.manual_seed(0)
    # The model's queries are a transposed view.
    query = torch.randn(1, queries, heads, 8).transpose(1, 2) * 3
    key = torch.randn(1, kv_heads, past + queries, 8) * 3
    for scaling in (None, 0.7):
        expected = naive_weights(query, key, 8**-0.5 if scaling is None else scaling).sum(dim=(0, 1, 2))
        torch.testing.assert_close(attention_mass(query, key, scaling).double(), expected, rtol=1e-5, atol=1e-6)


def test_attention_mass_survives_large_logits_and_half_precision():
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 3, 8) * 100, torch.randn(1, 2, 20, 8) * 100
    for dtype in (torch.float16, torch.bfloat16):
        half_query, half_key = query.to(dtype), key.to(dtype)
        expected = naive_weights(half_query, half_key, 8**-0.5).sum(dim=(0, 1, 2))
        torch.testing.assert_close(attention_mass(half_query, half_key).double(), expected, rtol=1e-3, atol=1e-3)


def test_the_last_query_of_the_layers_that_choose_is_kept():
    """A question may come in pieces, with gradients, and in inference mode."""
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    for mode in (torch.inference_mode(), torch.enable_grad()):
        probe = LastQueries(range(1, 3))
        with mode:
            for layer in range(4):
                probe.record(layer, query[:, :, :2] + layer, None, 0.5)
                probe.record(layer, query[:, :, 2:] + layer, None, 0.5)
        assert list(probe.queries) == [1, 2]
        for layer, (kept, scaling) in probe.queries.items():
            assert scaling == 0.5 and not kept.requires_grad
            torch.testing.assert_close(kept, query.detach()[:, :, -1:] + layer)
