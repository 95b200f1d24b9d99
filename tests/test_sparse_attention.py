"""Planned attention is the dense-mask oracle, over random layouts and splits, at a bounded size and with gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from videoxl import sparse_attention
from videoxl.sparse_attention import GroupSpan, VisualLayout, dense_mask, plan_prefill, planned_attention

MODES = ("full", "streaming", "mask")
HEADS, KEY_HEADS, HEAD_SIZE = 4, 2, 8
TOLERANCE = 2e-5  # absolute, float32, outputs of order 1


@st.composite
def layouts(draw, max_videos=3):
    """Text, then videos of groups with timestamps of 0 to 3 tokens, with text (or none) after each."""
    videos, position = [], draw(st.integers(0, 4))
    visual_tokens = draw(st.integers(1, 5))
    for _ in range(draw(st.integers(0, max_videos))):
        groups = []
        for _ in range(draw(st.integers(1, 8))):
            visual_start = position + draw(st.integers(0, 3))
            groups.append(GroupSpan(position, visual_start, visual_start + visual_tokens))
            position = groups[-1].end
        videos.append(tuple(groups))
        position += draw(st.integers(0, 4))
    return VisualLayout(tuple(videos), max(position, 1))


plans = st.tuples(st.sampled_from(MODES), st.integers(1, 3), st.integers(1, 3))


def random_states(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(1, heads, length, HEAD_SIZE, generator=generator) for heads in sizes]


def oracle(query, key, value, layout, plan):
    """Softmax over the visible keys, written out: [1, L, H, D]."""
    key, value = (states.repeat_interleave(HEADS // KEY_HEADS, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) / HEAD_SIZE**0.5
    scores = scores.masked_fill(~dense_mask(layout, *plan), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def run(query, key, value, steps, **options):
    """The steps, as one call of the attention function."""
    start, stop = steps[0].start, steps[-1].stop
    return planned_attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], steps, **options)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Block sizes that short sequences reach too; one thread, since for tensors this small more only wait."""
    monkeypatch.setattr(sparse_attention, "MAX_STEP_QUERIES", 8)
    monkeypatch.setattr(sparse_attention, "MASK_ROWS", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@settings(max_examples=100, deadline=None)
@given(layouts(), plans)
def test_planned_attention_is_the_oracle(layout, plan):
    states = random_states(layout.length)
    output = run(*states, plan_prefill(layout, *plan))
    torch.testing.assert_close(output, oracle(*states, layout, plan), atol=TOLERANCE, rtol=0)


@settings(max_examples=80, deadline=None)
@given(layouts(), plans, st.data())
def test_any_split_is_at_once(layout, plan, data):
    states = random_states(layout.length)
    at_once = run(*states, plan_prefill(layout, *plan))
    cuts = data.draw(st.lists(st.integers(1, layout.length), max_size=4, unique=True).map(sorted))
    parts, start = [], 0
    for stop in [*(cut for cut in cuts if cut < layout.length), layout.length]:
        # What later calls bring is not known yet: the layout ends here, perhaps inside a group.
        known = truncated(layout, stop)
        steps = plan_prefill(known, *plan, start=start)
        assert (steps[0].start, steps[-1].stop) == (start, stop)
        parts.append(run(*states, steps))
        start = stop
    torch.testing.assert_close(torch.cat(parts, dim=1), at_once, atol=TOLERANCE, rtol=0)


def truncated(layout, length):
    """What is known of a layout after `length` tokens; a group that has begun is known to its end."""
    begun = (tuple(group for group in video if group.start < length) for video in layout.videos)
    videos = tuple(video for video in begun if video)
    clipped = tuple(
        tuple(GroupSpan(group.start, min(group.visual_start, length), min(group.end, length)) for group in video)
        for video in videos
    )
    return VisualLayout(clipped, length)


@settings(max_examples=80, deadline=None)
@given(layouts(), plans, st.data())
def test_plan_covers_the_rest_in_bounded_steps(layout, plan, data):
    start = data.draw(st.integers(0, layout.length - 1))
    steps = plan_prefill(layout, *plan, start=start)
    assert steps[0].start == start
    assert steps[-1].stop == layout.length
    for step, following in zip(steps, steps[1:], strict=False):
        assert step.stop == following.start
    for step in steps:
        assert 0 < step.stop - step.start <= sparse_attention.MAX_STEP_QUERIES
        if step.gathered is not None and len(step.gathered):
            assert step.gathered.max() < step.window_start <= step.start
        if step.wide is not None:
            assert plan[0] == "mask"
            assert step.start <= step.wide.min() <= step.wide.max() < step.stop


@settings(max_examples=30, deadline=None)
@given(layouts(), plans)
def test_no_call_gets_more_rows_than_a_step(layout, plan):
    seen = []
    attend = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, is_causal=False, **options):
        seen.append((query.shape[2], attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        run(*random_states(layout.length), plan_prefill(layout, *plan))
    for rows, mask in seen:
        assert rows <= sparse_attention.MAX_STEP_QUERIES
        assert mask is None or mask.shape[-2] == rows


@settings(max_examples=40, deadline=None)
@given(layouts(max_videos=2), plans)
def test_gradients_flow(layout, plan):
    ours, expected = ([tensor.requires_grad_() for tensor in random_states(layout.length)] for _ in range(2))
    weights = random_states(layout.length, seed=1)[0].transpose(1, 2)
    (run(*ours, plan_prefill(layout, *plan)) * weights).sum().backward()
    (oracle(*expected, layout, plan) * weights).sum().backward()
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=10 * TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_real_block_sizes(mode, monkeypatch):
    monkeypatch.undo()
    groups = tuple(GroupSpan(at, at + 9, at + 153) for at in range(14, 14 + 17 * 153, 153))
    layout = VisualLayout((groups,), groups[-1].end + 300)
    states, plan = random_states(layout.length), (mode, 4, 1)
    output = run(*states, plan_prefill(layout, *plan))
    torch.testing.assert_close(output, oracle(*states, layout, plan), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["streaming", "mask"])
def test_scaling_and_dtype(mode):
    groups = tuple(GroupSpan(at, at + 1, at + 4) for at in range(2, 34, 4))
    layout = VisualLayout((groups,), 40)
    query, key, value = random_states(layout.length)
    expected = oracle(3 * query, key, value, layout, (mode, 1, 1))
    steps = plan_prefill(layout, mode, 1, 1)
    output = run(query, key, value, steps, scaling=3 / HEAD_SIZE**0.5)
    torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=0)
    half = [states.bfloat16() for states in (query, key, value)]
    output = run(*half, steps, scaling=3 / HEAD_SIZE**0.5)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0)


@settings(max_examples=50, deadline=None)
@given(layouts(), plans)
def test_who_sees_whom_in_words(layout, plan):
    """The rule as the module states it, pair by pair, against the mask."""
    mode, chunk_groups, window_chunks = plan
    visible = dense_mask(layout, *plan)
    places = {}  # position -> (video, chunk, whether visual)
    for number, video in enumerate(layout.videos):
        for index, group in enumerate(video):
            for position in range(group.start, group.end):
                places[position] = (number, index // chunk_groups, position >= group.visual_start)
    for row in range(layout.length):
        for column in range(row + 1):
            expected = True
            if mode != "full" and column in places and places[column][2] and row in places:
                video, chunk, is_visual = places[row]
                near = video == places[column][0] and chunk - places[column][1] <= window_chunks
                expected = near or (mode == "mask" and not is_visual)
            assert bool(visible[row, column]) == expected, (row, column)
    assert not visible.triu(1).any()
