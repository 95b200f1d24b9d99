"""Dropping visual tokens between layers: against a slow oracle, in chunks, in every door, and what it refuses."""

import copy
import sys

import pytest
import torch
from dropping_oracle import run_oracle
from margins import CHOSEN
from transformers import AutoModel, Qwen2Config, Qwen2Model

SETTINGS = [
    ("uniform0_attention", [2, 4], [1, 0.75, 0.25]),
    ("attention", [2, 4], [1, 0.75, 0.25]),
    ("uniform", [2, 4], [1, 0.75, 0.25]),
    ("uniform1_attention", [1, 3, 5], [1.0, 0.7, 0.33, 0.11]),
    ("attention", [5], [1, 0]),
]
# Float32 rounding, of logits whose deviation is about 3.
TOLERANCE = 3e-4


@pytest.fixture(scope="module")
def flash_model(family_models):
    """A tiny VideoChat-Flash of six layers with random weights."""
    small = family_models["videochatflash"]
    config = copy.deepcopy(small.config)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 6, ["full_attention"] * 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, trust_remote_code=True).eval()
    model.generation_config = small.generation_config
    return model


@pytest.fixture
def flash(flash_model):
    from conftest import _undone

    with _undone(flash_model) as model:
        yield model


def switch(model, kind, layers, ratios):
    model.config.mm_llm_compress, model.config.llm_compress_type = True, kind
    model.config.llm_compress_layer_list, model.config.llm_image_token_ratio_list = layers, ratios


def prompt(model, groups=(5,), before=4, question=6, seed=0):
    """Ids [L] of a prompt with text between its videos, and the videos' pixels."""
    generator = torch.Generator().manual_seed(seed)
    side, size = model.config.vision_config.image_size, model.model.tokens_per_group
    parts, videos = [torch.randint(5, 200, (before,), generator=generator)], []
    for number, count in enumerate(groups):
        parts += [torch.randint(5, 200, (3,), generator=generator)] * (number > 0)
        parts.append(torch.full((count * size,), model.config.video_token_id))
        videos.append(torch.randn(count * 4, 3, side, side, generator=generator))
    return torch.cat([*parts, torch.randint(5, 200, (question,), generator=generator)]), videos


@torch.no_grad()
def oracle(model, ids, videos, more=()):
    """What the slow oracle gives for a prompt followed by generated tokens; logits [L', vocabulary]."""
    features = model.get_video_features(videos).pooler_output
    whole = torch.cat([ids, torch.tensor(more, dtype=torch.long)])
    embeds = model.model.embed_prompt(whole[None])
    is_visual = whole == model.config.video_token_id
    embeds[0, is_visual] = torch.cat([tokens.flatten(0, 1) for tokens in features])
    places = is_visual.nonzero().flatten().split([tokens.shape[0] * tokens.shape[1] for tokens in features])
    config = model.config
    settings = config.llm_compress_type, config.llm_compress_layer_list, config.llm_image_token_ratio_list
    language_model, positions = model.model.language_model, [part.tolist() for part in places]
    hidden, alive, lengths, kept = run_oracle(language_model, embeds, positions, *settings, prompt_length=len(ids))
    return model.lm_head(hidden[0]), alive, lengths, kept


def close(first, second):
    torch.testing.assert_close(first, second, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("groups", [(5,), (3, 4)])
def test_prefill_and_decode_equal_the_slow_oracle(flash, settings, groups):
    switch(flash, *settings)
    ids, videos = prompt(flash, groups, before=4 if len(groups) == 1 else 0)
    with torch.no_grad():
        outputs = flash(ids[None], pixel_values_videos=videos)
    expected, _, lengths, kept = oracle(flash, ids, videos)
    cache, behind = outputs.past_key_values, outputs.logits.shape[1]
    assert behind == 6  # the question
    close(outputs.logits[0], expected[-behind:])
    assert [layer.held for layer in cache.layers] == lengths
    assert [[tokens.tolist() for tokens in stage] for stage in cache.dropping.kept] == kept
    more = [7, 23, 11]
    for count, token in enumerate(more, 1):
        with torch.no_grad():
            logits = flash(torch.tensor([[token]]), past_key_values=cache).logits
        close(logits[0, -1], oracle(flash, ids, videos, more[:count])[0][-1])


def test_ratio_one_is_plain(flash):
    ids, videos = prompt(flash)
    with torch.no_grad():
        plain = flash(ids[None], pixel_values_videos=videos, logits_to_keep=6).logits
        for kind in ("uniform", "attention", "uniform0_attention", "uniform1_attention"):
            switch(flash, kind, [1, 2, 5], [1, 1.0, 1, 1])
            close(flash(ids[None], pixel_values_videos=videos).logits, plain)
        switch(flash, "uniform", [6], [1, 0.5])  # behind the last layer: accepted by the reference, without effect
        close(flash(ids[None], pixel_values_videos=videos).logits, plain)
    generated = flash.generate(ids[None], pixel_values_videos=videos, max_new_tokens=4, do_sample=False)
    flash.config.mm_llm_compress = False
    assert torch.equal(
        generated, flash.generate(ids[None], pixel_values_videos=videos, max_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("settings", SETTINGS[:4:3])
def test_chunks_of_any_size_equal_at_once(flash, monkeypatch, settings):
    switch(flash, *settings)
    ids, videos = prompt(flash, (3, 2))
    with torch.no_grad():
        expected = flash(ids[None], pixel_values_videos=videos)
        for size in (1, 7, 50):
            for module in {type(flash.model).extend_cache.__module__, "videoxl.prefill_videoxl"} & set(sys.modules):
                monkeypatch.setattr(sys.modules[module], "SEGMENT_TOKENS", size)
            found = flash(ids[None], pixel_values_videos=videos)
            close(found.logits, expected.logits)
            for stages in zip(
                found.past_key_values.dropping.kept, expected.past_key_values.dropping.kept, strict=True
            ):
                assert all(map(torch.equal, *stages))


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]])
def test_padded_batches_beams_and_sequences(flash, settings):
    switch(flash, *settings)
    prompts = [prompt(flash, (5,), question=9), prompt(flash, (2, 2), seed=1), (torch.arange(20, 31), [])]
    width = max(len(ids) for ids, _ in prompts)
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row, _ in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row, _ in prompts]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": [v for _, row in prompts for v in row]}
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    answers = []
    for number, (row, videos) in enumerate(prompts):
        single = {"input_ids": row[None], **({"pixel_values_videos": videos} if videos else {})}
        answers.append(flash.generate(**single, **options)[0, len(row) :].tolist())
        padded = {"input_ids": ids[number : number + 1], "attention_mask": mask[number : number + 1]}
        padded |= {"pixel_values_videos": videos} if videos else {}
        assert flash.generate(**padded, **options)[0, width:].tolist() == answers[-1]
    assert flash.generate(**batch, **options)[:, width:].tolist() == answers
    assert flash.generate(**batch, **options, use_cache=False)[:, width:].tolist() == answers
    row, videos = prompts[0]
    single = {"input_ids": row[None], "pixel_values_videos": videos}
    beams = flash.generate(**single, **options, num_beams=3, num_return_sequences=2)
    # Every beam's log-likelihood by the oracle is the one that beam search went by: the best comes first.
    sums = []
    for beam in beams[:, len(row) :].tolist():
        logits = oracle(flash, row, videos, beam)[0][-len(beam) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(beam)[:, None]).sum().item())
    assert sums[0] - sums[1] > CHOSEN, "two beams are as good as equal: choose another seed"
    assert torch.equal(beams, flash.generate(**single, **options, num_beams=3, num_return_sequences=2))
    together = flash.generate(**batch, **options, num_beams=3, num_return_sequences=2)
    assert together[:2, width:].tolist() == beams[:, len(row) :].tolist()
    looked_up = flash.generate(**single, **options, prompt_lookup_num_tokens=2)
    assert looked_up[0, len(row) :].tolist() == answers[0]


def test_switches_are_read_at_call_time_and_text_is_never_compressed(flash):
    ids, videos = prompt(flash)
    with torch.no_grad():
        text = flash(torch.arange(20, 40)[None]).logits
        plain = flash(ids[None], pixel_values_videos=videos, logits_to_keep=1).logits
        found = []
        for settings in SETTINGS[:4]:
            switch(flash, *settings)
            found.append(flash(ids[None], pixel_values_videos=videos, logits_to_keep=1).logits)
            assert torch.equal(flash(torch.arange(20, 40)[None]).logits, text)
        flash.config.mm_llm_compress = False
        assert torch.equal(flash(ids[None], pixel_values_videos=videos, logits_to_keep=1).logits, plain)
    assert all((logits - plain).abs().max() > 100 * TOLERANCE for logits in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm_compress_type": "random"}, "llm_compress_type must be one of"),
        ({"llm_compress_layer_list": [4, 2]}, "llm_compress_layer_list must be ascending"),
        ({"llm_compress_layer_list": [2, 2]}, "llm_compress_layer_list must be ascending"),
        ({"llm_compress_layer_list": [0, 2]}, "llm_compress_layer_list must be ascending"),
        ({"llm_compress_layer_list": [2, 6]}, "from 1 to 5"),
        ({"llm_compress_layer_list": []}, "llm_compress_layer_list must be ascending"),
        ({"llm_compress_layer_list": [1, 2, 4]}, "llm_image_token_ratio_list must be 4 shares"),
        ({"llm_image_token_ratio_list": [1, 0.25, 0.5]}, "must be 3 shares from 1 down to 0"),
        ({"llm_image_token_ratio_list": [0.9, 0.5, 0.25]}, "must be 3 shares from 1 down to 0"),
        ({"llm_image_token_ratio_list": [1, 0.5, -0.1]}, "must be 3 shares from 1 down to 0"),
        ({"sparse_attention": {"prefill": "streaming"}}, "mm_llm_compress to False"),
        ({"sparse_attention": {"decode": "bilevel"}}, "mm_llm_compress to False"),
    ],
)
def test_settings_out_of_range(flash, changes, message):
    ids, videos = prompt(flash, (2,))
    switch(flash, *SETTINGS[1])
    for name, value in changes.items():
        setattr(flash.config, name, value)
    with pytest.raises(ValueError, match=message):
        flash(ids[None], pixel_values_videos=videos)


def test_shares_beyond_the_last_stage_count_for_nothing(flash):
    """As in the published code, whose default list is long enough for three stages."""
    ids, videos = prompt(flash, (2,))
    found = []
    for ratios in ([1, 0.5], [1.0, 0.5, 0.25, 0.125]):
        switch(flash, "attention", [2], ratios)
        with torch.no_grad():
            found.append(flash(ids[None], pixel_values_videos=videos).logits)
    assert torch.equal(*found)


def test_calls_that_cannot_be_right_say_so(flash):
    ids, videos = prompt(flash, (2,))
    switch(flash, *SETTINGS[0])
    whole = {"input_ids": ids[None], "pixel_values_videos": videos}
    for options, message in (
        ({"output_hidden_states": True}, "mm_llm_compress to False"),
        ({"labels": ids[None]}, "labels cannot be used with mm_llm_compress"),
        ({"logits_to_keep": torch.tensor([0])}, "behind the last video only"),
        ({"input_ids": ids[None, :-6]}, "put a question behind it"),
    ):
        with pytest.raises(ValueError, match=message):
            flash(**{**whole, **options})
    with pytest.raises(ValueError, match="cache_implementation"):
        flash.generate(**whole, max_new_tokens=2, cache_implementation="static")
    with torch.no_grad():
        cache = flash(**whole).past_key_values
        with pytest.raises(ValueError, match="dropped already"):
            flash(**whole, past_key_values=cache)
        with pytest.raises(ValueError, match="output_hidden_states"):
            flash(torch.tensor([[5]]), past_key_values=cache, output_hidden_states=True)


def test_an_answer_goes_on_and_a_cache_is_copied(flash):
    ids, videos = prompt(flash)
    switch(flash, *SETTINGS[0])
    more = [9, 30, 41, 12]
    with torch.no_grad():
        cache = flash(ids[None], pixel_values_videos=videos).past_key_values
        copied = copy.deepcopy(cache)
        together = flash(torch.tensor([more]), past_key_values=cache).logits[0]
        one_by_one = [flash(torch.tensor([[token]]), past_key_values=copied).logits[0, -1] for token in more]
    close(together, torch.stack(one_by_one))
    assert [layer.held for layer in cache.layers] == [layer.held for layer in copied.layers]
    cache.crop(-4)
    with torch.no_grad():
        again = flash(torch.tensor([more]), past_key_values=cache).logits[0]
    close(again, together)
    cache.reset()
    with torch.no_grad():
        fresh = flash(torch.tensor([more])).logits
        close(flash(torch.tensor([more]), past_key_values=cache).logits, fresh)


FRAMES = torch.randint(0, 255, (23, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
TIMES = [float(second) for second in range(23)]


@torch.no_grad()
def asked(model, video, suffix=(5, 6, 7, 8)):
    """Logits of the first token behind a question about an encoded video, and the keys that each layer holds."""
    cache = model._question_cache(video)
    logits = model(torch.tensor([suffix]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return logits, [layer.held for layer in cache.layers]


@pytest.mark.parametrize("settings", SETTINGS[:3])
def test_encoded_videos_equal_whole_prompts(flash, tokenizer, tmp_path, settings):
    from videoxl.processing_videoxl import VideoXLProcessor

    switch(flash, *settings)
    video = flash.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    size = video.nbytes
    content = [{"type": "video", "video": FRAMES, "timestamps": TIMES}, {"type": "text", "text": "What moves?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    processor = VideoXLProcessor.from_config(flash.config, tokenizer)
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    question = inputs["input_ids"][0, len(video.input_ids) :].tolist()
    with torch.no_grad():
        whole = flash(**inputs, logits_to_keep=1)
    logits, held = asked(flash, video, question)
    close(logits, whole.logits[0, -1])
    assert held == [layer.held for layer in whole.past_key_values.layers]
    assert torch.equal(asked(flash, video, question)[0], logits) and video.nbytes == size
    # Another question keeps other tokens where the question decides.
    other = asked(flash, video, (200, 9, 120))[0]
    assert (other - logits).abs().max() > 100 * TOLERANCE

    video.save(tmp_path / "a.videoxl")
    loaded = flash.load_video(tmp_path / "a.videoxl", tokenizer)
    assert loaded.nbytes == size and loaded.prefill == video.prefill
    close(asked(flash, loaded, question)[0], logits)

    grown = flash.encode_video(FRAMES[:6], tokenizer, timestamps=TIMES[:6])
    asked(flash, grown, question)  # what follows from the shorter video must not stay
    grown.append(FRAMES[6:11], TIMES[6:11])
    grown.save(tmp_path / "b.videoxl")
    grown = flash.load_video(tmp_path / "b.videoxl", tokenizer)
    grown.append(FRAMES[11:], TIMES[11:])
    assert grown.nbytes == size
    close(asked(flash, grown, question)[0], logits)

    # A video keeps its settings; so two of them, asked in turn, are what they are alone.
    flash.config.mm_llm_compress = False
    plain = flash.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    expected = asked(flash, plain)
    assert torch.equal(asked(flash, video, question)[0], logits)
    assert torch.equal(asked(flash, plain)[0], expected[0]) and len(set(expected[1])) == 1


def test_uniform_stages_are_done_once_for_all_questions(flash, tokenizer, monkeypatch):
    switch(flash, *SETTINGS[0])
    video = flash.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    asked(flash, video)
    rows = []
    run = type(flash.model)._run_layers
    monkeypatch.setattr(
        type(flash.model), "_run_layers", lambda self, given, cache, span, *rest: rows.append((given.shape[1], span))
        or run(self, given, cache, span, *rest),
    )  # fmt: skip
    asked(flash, video)
    visual, text = video.num_visual_tokens, 4
    assert rows == [(text, range(0, 2)), (text, range(2, 4)), (int(visual * 0.25) + text, range(4, 6))]


def test_a_conversation_with_two_videos_and_batches(flash, tokenizer):
    switch(flash, *SETTINGS[0])
    greedy = {"max_new_tokens": 4, "do_sample": False}
    video = flash.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    questions = ["Please say: What moves?", "Please say: Which colour is it, and where does it stand?"]
    singles = [
        flash.chat(video, tokenizer, each, return_history=False, generation_config=greedy) for each in questions
    ]
    assert flash.chat_batch(video, tokenizer, questions, generation_config=greedy) == singles
    answer, history = flash.chat(video, tokenizer, questions[0], generation_config=greedy)
    assert answer == singles[0]
    second, history = flash.chat(None, tokenizer, questions[1], chat_history=history, generation_config=greedy)
    assert history[0]["content"][0]["video"] is video
    other = flash.encode_video(FRAMES[:9], tokenizer, timestamps=TIMES[:9])
    frames = [{"type": "video", "video": FRAMES[:9], "timestamps": TIMES[:9]}]
    _, longer = flash.chat(frames, tokenizer, questions[0], chat_history=history, generation_config=greedy)
    assert len(longer[-2]["content"][0]["video"].layout.videos) == 2
    assert flash.chat(other, tokenizer, questions[0], return_history=False, generation_config=greedy)
    flash.config.llm_compress_layer_list = [3, 4]
    with pytest.raises(ValueError, match="encoded with other settings"):
        flash.chat(frames, tokenizer, questions[0], chat_history=history, generation_config=greedy)


def test_memory_is_linear_and_scores_are_one_row(flash):
    """A long prompt runs in segments: no tensor has as many elements as its length squared."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if torch.is_tensor(tensor):
                    Largest.size = max(Largest.size, tensor.numel())
            return result

    switch(flash, *SETTINGS[1])
    cache, layout_length = None, 6000
    embeds = torch.randn(1, layout_length, flash.config.text_config.hidden_size, generator=torch.manual_seed(0))
    room = sys.modules[type(flash.model).extend_cache.__module__]
    layout = room.VisualLayout(((room.GroupSpan(4, 4, layout_length),),), layout_length)
    cache = room.new_cache(6)
    with torch.no_grad(), Largest():
        flash.model.extend_cache(embeds, layout, cache, keep_hidden=None)
        flash.model.run_stages(cache, embeds[:, :5])
    widest = flash.config.text_config.intermediate_size
    assert Largest.size <= max(4096 * widest, layout_length * flash.config.text_config.hidden_size * 2)
    assert Largest.size < layout_length**2 // 2


# --- the context's limit and rotary scaling


def test_a_context_beyond_the_limit_is_an_error(flash, tokenizer):
    ids, videos = prompt(flash, (3,))
    flash.config.tokenizer_model_max_length = len(ids)
    with torch.no_grad():
        flash(ids[None], pixel_values_videos=videos)
        flash.config.tokenizer_model_max_length = len(ids) - 1
        message = f"has {len(ids)} tokens.*takes {len(ids) - 1}: config.tokenizer_model_max_length={len(ids) - 1}"
        with pytest.raises(ValueError, match=message):
            flash(ids[None], pixel_values_videos=videos)
        with pytest.raises(ValueError, match="Give fewer frames, or raise the limit"):
            flash.generate(ids[None], pixel_values_videos=videos, max_new_tokens=2)
        padded = torch.cat([torch.zeros(4, dtype=torch.long), ids[1:]])
        mask = (torch.arange(len(padded)) >= 4).long()
        flash(padded[None], attention_mask=mask[None], pixel_values_videos=videos)  # padding does not count
        with pytest.raises(ValueError, match="has 200 tokens"):
            flash(torch.full((1, 200), 7))
    flash.config.tokenizer_model_max_length = 60
    with pytest.raises(ValueError, match="takes 60"):
        flash.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    video = flash.encode_video(FRAMES[:6], tokenizer, timestamps=TIMES[:6])
    before = asked(flash, video, (5,))[0], video.num_frames, len(video.input_ids)
    with pytest.raises(ValueError, match="takes 60"):
        video.append(FRAMES[6:], TIMES[6:])
    assert torch.equal(asked(flash, video, (5,))[0], before[0])
    assert (video.num_frames, len(video.input_ids)) == before[1:]
    flash.config.tokenizer_model_max_length = None  # no limit
    video.append(FRAMES[6:], TIMES[6:])
    assert video.num_frames == 23


def test_positions_bound_the_context_too_and_rope_scaling_moves_them(flash):
    config = copy.deepcopy(flash.config)
    positions = config.text_config.max_position_embeddings
    config.tokenizer_model_max_length = 10 * positions
    limit, reason = config.resolve_context_limit()
    assert limit == positions and "max_position_embeddings" in reason and "rope_scaling=" in reason
    config.rope_scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": positions}
    assert config.resolve_context_limit()[0] == 4 * positions
    config.tokenizer_model_max_length = positions
    assert config.resolve_context_limit()[0] == positions
    config.tokenizer_model_max_length = None
    assert config.resolve_context_limit() is None


@pytest.mark.parametrize("settings", [None, SETTINGS[0]])
def test_yarn_is_the_librarys(flash, settings):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = copy.deepcopy(flash.config)
    theta = config.text_config.rope_parameters["rope_theta"]
    config.rope_scaling = scaling
    assert config.text_config.rope_parameters["rope_theta"] == theta
    scaled = AutoModel.from_config(config, trust_remote_code=True).eval()
    scaled.load_state_dict(flash.state_dict())
    text = {**flash.config.text_config.to_dict(), "rope_parameters": {**scaling, "rope_type": "yarn"}}
    text["rope_parameters"]["rope_theta"] = theta
    library = Qwen2Model(Qwen2Config(**text)).eval()
    library.load_state_dict(flash.model.language_model.state_dict())
    ids, videos = prompt(scaled)
    if settings is None:
        with torch.no_grad():
            expected = scaled.lm_head(library(input_ids=torch.arange(5, 85)[None]).last_hidden_state)
            close(scaled(torch.arange(5, 85)[None]).logits, expected)
            assert (flash(torch.arange(5, 85)[None]).logits - expected).abs().max() > 100 * TOLERANCE
        return
    switch(scaled, *settings)
    with torch.no_grad():
        found = scaled(ids[None], pixel_values_videos=videos).logits[0]
    expected = oracle(scaled, ids, videos)[0][-len(found) :]
    scaled.model.language_model = library
    close(found, expected)
    close(found, oracle(scaled, ids, videos)[0][-len(found) :])


def test_rope_scaling_set_after_loading_is_an_error(flash):
    before = flash.config.text_config.rope_parameters
    try:
        flash.config.rope_scaling = {"rope_type": "yarn", "factor": 2.0}
        with pytest.raises(ValueError, match="load it anew with rope_scaling"):
            flash(torch.full((1, 9), 7))
    finally:
        flash.config.text_config.rope_parameters = before
