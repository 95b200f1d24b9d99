"""A further policy runs everywhere with no edit elsewhere."""

import sys
from dataclasses import dataclass

import pytest
import torch
from videoxl.prefill_videoxl import Kept, SequencePolicy, run_text

SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}
FRAMES = torch.randint(0, 255, (10, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class EveryOther(SequencePolicy):
    """Runs every second visual token, and forgets the others."""

    text_only, switch = True, "every_other"

    def facts(self):
        return {**super().facts(), "every_other": True}

    @classmethod
    def apply(cls, config, facts, policy):
        return cls(policy.prefill, policy.chunk_groups, policy.window_chunks)

    def kept(self, size, config):
        return Kept((size.text + (size.visual + 1) // 2) * size.token_bytes)

    def extend(self, model, inputs_embeds, layout, cache, keep_hidden=0):
        begin, cache.layout = layout.length - inputs_embeds.shape[1], layout
        stays = torch.ones(inputs_embeds.shape[1], dtype=torch.bool)
        for group in layout.groups:
            if group.visual_start >= begin:
                stays[group.visual_start - begin + 1 : group.end - begin : 2] = False
        run_text(model, inputs_embeds[:, stays], cache, keep_hidden=None)
        for layer in cache.layers:
            layer.pass_by(int((~stays).sum()))


@pytest.fixture
def thinned(model, monkeypatch):
    """The bundled architecture with that policy."""
    policies = sys.modules[type(model).__module__].POLICIES
    monkeypatch.setattr(
        sys.modules[type(model).__module__.replace("modeling", "prefill")], "POLICIES", [*policies, EveryOther]
    )
    model.config.every_other = True
    yield model
    del model.config.every_other


@pytest.mark.ties  # the same computation twice
def test_it_is_encoded_asked_saved_loaded_grown_and_planned(thinned, tokenizer, tmp_path):
    times = list(range(10))
    video = thinned.encode_video(FRAMES, tokenizer, timestamps=times)
    visual = video.num_visual_tokens
    assert video.cache.held == len(video.input_ids) - len(video.layout.groups) * (
        visual // len(video.layout.groups) // 2
    )
    answer = thinned.chat(video, tokenizer, "What?", return_history=False, generation_config=SHORT)
    assert answer == thinned.chat(
        FRAMES, tokenizer, "What?", timestamps=times, return_history=False, generation_config=SHORT
    )
    video.save(tmp_path / "video.videoxl")
    loaded = thinned.load_video(tmp_path / "video.videoxl", tokenizer)
    assert loaded.policy.facts() == video.policy.facts()
    assert answer == thinned.chat(loaded, tokenizer, "What?", return_history=False, generation_config=SHORT)
    grown = thinned.encode_video(FRAMES[:6], tokenizer, timestamps=times[:6])
    grown.append(FRAMES[6:], times[6:])
    for mine, theirs in zip(grown.cache.layers, video.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
    plan = thinned.plan(10, tokenizer=tokenizer)
    assert abs(plan.kv_bytes - video.nbytes) <= len(video.layout.groups) * plan.kv_bytes // plan.total_tokens
