"""Key-values in 8 and 4 bits: what is packed, what stays as it is, and that questions hardly notice."""

import copy
import json
import sys

import pytest
import torch
from command_line import one_line_error, run_main
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import first_logits, frames_of
from test_planning import allocated_peak
from videoxl import video_file_videoxl as video_file
from videoxl.kv_tiers_videoxl import BLOCK_ROWS, PackedRows, packed_bytes
from videoxl.shell.ask import main
from videoxl.video_file_videoxl import load_video_file, save_video_file

STORES = ("int8", "int4")
# By how much logits of random weights, which are of the order of 10, may move.
LOGITS = {"int8": 0.5, "int4": 6.0}
FRAMES = frames_of(9, 120)
SECONDS = [float(number) for number in range(120)]
PREFILLS = {
    "full": {},
    "streaming": {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 2},
    "mask": {"prefill": "mask", "chunk_groups": 1, "window_chunks": 2},
    "offload": {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 2, "offload": True},
}


def encode(model, tokenizer, count=110, **options):
    return model.encode_video(FRAMES[:count], tokenizer, timestamps=SECONDS[:count], **options)


def contents(video):
    """Keys and values of all layers, unpacked."""
    layers = [layer.unpacked("cpu") for layer in video.cache.layers]
    return [states for layer in layers for states in (layer.keys, layer.values)]


def state(video):
    """What a file would hold of the layers."""
    return [tensor for layer in video.cache.layers for tensor in layer.state().values()]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 3 * BLOCK_ROWS),
    bits=st.sampled_from([4, 8]),
    offset=st.sampled_from([0.0, 3.0, -250.0]),
    size=st.sampled_from([1e-6, 1.0, 40.0]),
    data=st.data(),
)
def test_a_packed_number_is_off_by_half_a_step_at_most(rows, bits, offset, size, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    states = offset + size * torch.randn(4, rows, 8, generator=generator)
    packed = PackedRows.pack(states, bits)
    step = packed.scales[1].float().repeat_interleave(BLOCK_ROWS, dim=1)[:, :rows]
    every = torch.arange(rows)
    rounding = 1e-5 * states.abs()  # float32's
    assert ((packed.read(every, "cpu") - states).abs() <= step * 0.5001 + rounding).all()
    # A step is no coarser than the range needs, but for what float16 cannot say.
    spread = states.amax(dim=1) - states.amin(dim=1)
    assert (
        packed.scales[1].amax(dim=1).float() <= 1.01 * (spread + states.abs().amax() / 500) / (2**bits - 1) + 1e-6
    ).all()
    some = torch.arange(0, rows, 7)
    assert torch.equal(packed.read(some, "cpu"), packed.read(every, "cpu")[:, some])
    assert packed.nbytes == packed_bytes(rows, -(-rows // BLOCK_ROWS), 4 * 8, f"int{bits}")


def test_packed_rows_go_on_behind_a_ragged_block():
    states = torch.randn(2, 130 + BLOCK_ROWS, 4, generator=torch.Generator().manual_seed(1))
    first, second = (PackedRows.pack(part, 8) for part in states.split([130, BLOCK_ROWS], dim=1))
    both, rows = first.then(second), torch.arange(130 + BLOCK_ROWS)
    expected = torch.cat([first.read(torch.arange(130), "cpu"), second.read(torch.arange(BLOCK_ROWS), "cpu")], dim=1)
    assert torch.equal(both.read(rows, "cpu"), expected) and len(both) == len(rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_what_no_scale_can_hold_is_refused(bad):
    with pytest.raises(ValueError, match="cannot be packed: leave store out"):
        PackedRows.pack(torch.full((2, 3, 4), bad), 4)


@pytest.mark.parametrize("mode", PREFILLS)
@pytest.mark.parametrize("store", STORES)
def test_questions_hardly_notice(model, tokenizer, processor, mode, store):
    """Text, timestamps and the window are the same to the bit; the rest is near; logits move little."""
    model.config.sparse_attention = PREFILLS[mode]
    plain, packed = encode(model, tokenizer), encode(model, tokenizer, store=store)
    assert (plain.store, packed.store) == (None, store) and packed.prefill == plain.prefill
    # Of 28 groups the last one is partial, and after streaming two chunks in front of the last one are its window.
    begin = plain.layout.groups[25 if PREFILLS[mode].get("prefill") == "streaming" else 27].start
    text = plain.layout.non_visual
    for before, after in zip(contents(plain), contents(packed), strict=True):
        assert torch.equal(before[:, :, text], after[:, :, text])
        assert torch.equal(before[:, :, begin:], after[:, :, begin:])
        assert 0 < (before - after).abs().max() < before.abs().max() * (0.02 if store == "int8" else 0.3)
    for decode in ("full", "bilevel"):
        model.config.sparse_attention = {**PREFILLS[mode], "decode": decode, "decode_chunk_groups": 2, "pool_size": 3}
        logits = [first_logits(model, processor, video) for video in (plain, packed)]
        assert 0 < (logits[0] - logits[1]).abs().max() < LOGITS[store], decode


@pytest.mark.parametrize("store", STORES)
def test_bilevel_reads_packed_rows_as_full_decoding_does(model, tokenizer, processor, store):
    """With everything kept, bi-level decoding over what is packed is full decoding over it."""
    video = encode(model, tokenizer, store=store)
    full = first_logits(model, processor, video)
    model.config.sparse_attention = {"decode": "bilevel", "reload": "all", "decode_chunk_groups": 2, "pool_size": 3}
    assert torch.allclose(first_logits(model, processor, video), full, atol=1e-3)


@pytest.mark.parametrize("mode", PREFILLS)
@pytest.mark.parametrize("steps", [(61, 62, 85), (20, 100)])
def test_append_equals_packing_what_was_encoded_at_once(model, tokenizer, processor, mode, steps):
    """To rounding after streaming prefill, where the window is all that is read; near it after the others."""
    model.config.sparse_attention = PREFILLS[mode]
    at_once = encode(model, tokenizer, 110, store="int8")
    grown, first = encode(model, tokenizer, steps[0], store="int8"), steps[0]
    for stop in (*steps[1:], 110):
        grown.append(FRAMES[first:stop], SECONDS[first:stop])
        first = stop
    exact = PREFILLS[mode].get("prefill") == "streaming"
    assert not exact or grown.nbytes == at_once.nbytes
    assert grown.layout == at_once.layout and grown.store == "int8"
    logits = [first_logits(model, processor, video) for video in (grown, at_once)]
    assert (logits[0] - logits[1]).abs().max() < (1e-2 if exact else 2 * LOGITS["int8"])
    packed = encode(model, tokenizer, 110).quantize("int8")
    if exact:
        assert packed.nbytes == at_once.nbytes
        for one, other in zip(contents(packed), contents(at_once), strict=True):
            assert torch.allclose(one, other, atol=0.05)  # a number may round to the next step


def test_a_failed_append_leaves_a_packed_video_as_it_was(model, tokenizer, processor):
    model.config.sparse_attention = PREFILLS["streaming"]
    video = encode(model, tokenizer, 86, store="int4")
    before, logits = [tensor.clone() for tensor in state(video)], first_logits(model, processor, video)
    layer = model.model.language_model.layers[2]
    hook = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        video.append(FRAMES[86:], SECONDS[86:])
    hook.remove()
    assert all(map(torch.equal, state(video), before)) and video.num_frames == 86
    assert torch.equal(first_logits(model, processor, video), logits)


@pytest.mark.parametrize("mode", ["full", "streaming"])
@pytest.mark.parametrize("store", STORES)
def test_a_file_holds_it_packed(model, tokenizer, processor, tmp_path, mode, store):
    model.config.sparse_attention = PREFILLS[mode]
    video, path = encode(model, tokenizer, store=store), tmp_path / "a.videoxl"
    video.save(path)
    loaded = model.load_video(path, tokenizer)
    assert (loaded.store, loaded.nbytes) == (store, video.nbytes)
    assert all(map(torch.equal, state(loaded), state(video)))
    assert path.stat().st_size < video.nbytes + 2**16
    assert torch.equal(first_logits(model, processor, loaded), first_logits(model, processor, video))
    for each in (video, loaded):
        each.append(FRAMES[110:], SECONDS[110:])
    assert all(map(torch.equal, state(loaded), state(video)))


def test_files_of_the_layout_before_are_read(model, tokenizer, processor, tmp_path, monkeypatch):
    video, path = encode(model, tokenizer, 20), tmp_path / "a.videoxl"
    video.save(path)
    tensors, facts = load_video_file(path)
    del facts["store"]
    monkeypatch.setattr(video_file, "LAYOUT_VERSION", 2)
    save_video_file(path, tensors, facts)
    monkeypatch.undo()
    loaded = model.load_video(path)
    assert loaded.store is None
    assert torch.equal(first_logits(model, processor, loaded), first_logits(model, processor, video))


@pytest.mark.parametrize("mode", ["full", "streaming", "mask"])
@pytest.mark.parametrize("count", [1, 4, 39, 110])
def test_the_plan_knows_the_bytes(model, tokenizer, mode, count):
    model.config.sparse_attention = PREFILLS[mode]
    for store in (None, *STORES):
        plan = model.plan(count, tokenizer=tokenizer, store=store)
        assert plan.kv_bytes == encode(model, tokenizer, count, store=store).nbytes, store


@pytest.mark.parametrize("mode", ["full", "streaming"])
def test_planned_peaks_never_fall(model, tokenizer, mode):
    model.config.sparse_attention = PREFILLS[mode]
    peaks = [model.plan(count, tokenizer=tokenizer, store="int4").peak_bytes for count in range(1, 130)]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("mode", ["full", "streaming"])
def test_planned_peaks_are_near_what_the_allocator_sees(model, tokenizer, mode):
    model.config.sparse_attention = PREFILLS[mode]
    frames, seconds, videos = FRAMES.repeat(4, 1, 1, 1), [float(number) for number in range(480)], []
    encode(model, tokenizer, 4)
    peak = allocated_peak(
        lambda: videos.append(model.encode_video(frames, tokenizer, timestamps=seconds, store="int4"))
    )
    plan = model.plan(480, tokenizer=tokenizer, store="int4", question_tokens=3, max_new_tokens=1)
    assert plan.kv_bytes == videos[0].nbytes
    assert (
        0.9 < max(plan.beyond(stage) for stage in ("vision", "prefill", "store") if stage in plan.stages) / peak < 1.35
    )
    with torch.no_grad():
        ids = {"input_ids": torch.tensor([[5, 6, 7]])}
        peak = allocated_peak(lambda: model(**ids, past_key_values=videos[0].question_cache()))
    assert 0.9 < (plan.beyond("question") - videos[0].nbytes) / peak < 1.5


def test_the_command_line_keeps_it_packed(root, tmp_path):
    file = tmp_path / "a.videoxl"
    done = run_main(main, root / "assets" / "demo.mp4", "What moves?", "--store", "int4", "--save", file, "--json")
    facts = json.loads(done.stdout)
    plan = run_main(main, root / "assets" / "demo.mp4", "--store", "int4", "--plan", "--json")
    assert json.loads(plan.stdout)["plan"]["kv_bytes"] == facts["cache_bytes"] > file.stat().st_size - 2**17
    assert load_video_file(file)[1]["store"] == "int4"
    said = one_line_error(run_main(main, "--load", file, "What moves?", "--store", "int8"))
    assert "--store was settled when" in said


def test_conversations_batches_copies_and_devices(model, tokenizer, processor):
    model.config.sparse_attention = PREFILLS["streaming"]
    video = encode(model, tokenizer, store="int4")
    logits = first_logits(model, processor, video)
    bytes_before = video.nbytes
    assert len(model.chat_batch(video, tokenizer, ["What?", "Which card is red?"], {"max_new_tokens": 2})) == 2
    answer, history = model.chat(video, tokenizer, "What?", generation_config={"max_new_tokens": 2})
    model.chat(None, tokenizer, "And then?", history, generation_config={"max_new_tokens": 2})
    assert torch.equal(first_logits(model, processor, copy.deepcopy(video)), logits)
    assert torch.equal(first_logits(model, processor, video.to("cpu")), logits)
    assert video.nbytes == bytes_before, "questions leave nothing behind"


def test_forward_unpacks_a_fork_and_generate_refuses_what_it_cannot(model, tokenizer, processor):
    video = encode(model, tokenizer, store="int8")
    expected = first_logits(model, processor, video)
    question = video.question_cache()
    assert question.store is None and question.held == len(video.input_ids)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        seen = [model(input_ids=ids, past_key_values=cache).logits for cache in (question, video.cache.fork())]
    assert torch.equal(*seen)
    with pytest.raises(ValueError, match="video.question_cache"):
        video.cache.fork().get_seq_length() and video.cache.layers[0].get_mask_sizes(1)
    assert torch.equal(first_logits(model, processor, video), expected)


def test_a_second_video_behind_a_packed_one(model, tokenizer):
    model.config.sparse_attention = PREFILLS["streaming"]
    frames = [{"type": "video", "video": FRAMES[:30], "timestamps": SECONDS[:30]}]
    answers = []
    for store in (None, "int8"):
        first = encode(model, tokenizer, store=store)
        settings = {"generation_config": {"max_new_tokens": 1}}
        _, history = model.chat(first, tokenizer, "What?", **settings)
        _, history = model.chat([dict(frames[0])], tokenizer, "And here?", history, **settings)
        second = history[2]["content"][0]["video"]
        assert second.store == store
        answers.append(contents(second))
    for plain, packed in zip(*answers, strict=True):
        assert (plain - packed).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(random_model, tokenizer, processor, dtype):
    model = copy.deepcopy(random_model).to(dtype)
    plain, packed = encode(model, tokenizer), encode(model, tokenizer, store="int4")
    visual = packed.num_visual_tokens
    text = (len(packed.input_ids) - visual) * (plain.nbytes // len(plain.input_ids))
    assert (packed.nbytes - text) / (plain.nbytes - text) < 0.33  # a partial group among them
    assert all(states.dtype == dtype for states in contents(packed))
    logits = [first_logits(model, processor, video).float() for video in (plain, packed)]
    assert (logits[0] - logits[1]).abs().max() < 2 * LOGITS["int4"]


def test_quantize_once_more(model, tokenizer, processor):
    video = encode(model, tokenizer)
    assert video.quantize("int8") is video and video.store == "int8"
    before = [tensor.clone() for tensor in state(video)]
    assert all(map(torch.equal, state(video.quantize("int8")), before)), "nothing is packed twice"
    other = copy.deepcopy(video)
    assert other.quantize("int4").nbytes < video.nbytes and video.store == "int8"
    with pytest.raises(ValueError, match="packed in int4, which int8 cannot improve: encode it again"):
        other.quantize("int8")
    for wrong in ("int3", 8, None):
        with pytest.raises(ValueError, match="store must be one of 'int8', 'int4'"):
            video.quantize(wrong)
    with pytest.raises(ValueError, match="store must be one of"):
        encode(model, tokenizer, store="fp8")


def test_an_error_while_packing_changes_nothing(model, tokenizer, monkeypatch):
    video, calls, pack = encode(model, tokenizer), [], PackedRows.pack

    def failing(states, bits):
        calls.append(bits)
        if len(calls) == 3:
            raise MemoryError("no room")
        return pack(states, bits)

    before = [tensor.clone() for tensor in state(video)]
    module = sys.modules[type(video.cache.layers[0]).__module__.replace("kv_cache", "kv_tiers_videoxl")]
    monkeypatch.setattr(module.PackedRows, "pack", failing)
    with pytest.raises(MemoryError):
        video.quantize("int4")
    assert video.store is None and all(map(torch.equal, state(video), before))


def test_images_are_packed_too(model, tokenizer):
    picture = FRAMES[0]
    plain, packed = model.encode_video(picture, tokenizer), model.encode_video(picture, tokenizer, store="int8")
    assert packed.store == "int8" and packed.nbytes < plain.nbytes


def test_members_without_all_key_values_refuse(member, tokenizer):
    if member.config.beacon_window or member.config.token_selector or member.config.mm_llm_compress:
        for refused in (
            lambda: encode(member, tokenizer, 8, store="int4"),
            lambda: encode(member, tokenizer, 8).quantize("int4"),
            lambda: member.plan(8, tokenizer=tokenizer, store="int4"),
        ):
            with pytest.raises(ValueError, match="packs key-values of every visual token"):
                refused()
    else:
        assert encode(member, tokenizer, 8, store="int4").store == "int4"
