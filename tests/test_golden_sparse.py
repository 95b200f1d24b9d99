"""Sparse prefill and bi-level decoding of Video-XL-2 give the reference's logits, KV sizes and greedy tokens."""

import pytest
import torch
from goldens import LOGITS_TOLERANCE, assert_close, open_golden
from margins import CHOSEN
from videoxl.sparse_attention import VisualLayout, dense_mask

CASES = [("shipped", "c0"), ("shipped", "c3"), *(("full", f"c{number}") for number in range(7))]
BILEVEL_CASES = [case for case in CASES if case[1] not in ("c0", "c1", "c2")]  # too short to leave a chunk out


@pytest.fixture
def case(request):
    source, name = request.param
    case = open_golden(request, "videoxl2", source).case(name)
    yield case
    # The model serves all tests.
    case.model.config.sparse_attention = {}
    case.model.config.enable_sparse = case.model.config.enable_chunk_prefill = False


def suffix_logits(case, **kwargs):
    with torch.inference_mode():
        return case.model(**case.inputs, logits_to_keep=case.settings["suffix"], **kwargs).logits[0]


def plans(case, mode):
    """The settings of a prefill mode, each with the logits that they give."""
    for settings in case.settings[mode]:
        expected = case.tensor(f"logits.{mode}.b{settings['chunk_groups']}p{settings['window_chunks']}")
        yield settings["chunk_groups"], settings["window_chunks"], expected


@pytest.mark.parametrize("mode", ["mask", "streaming"])
@pytest.mark.parametrize("case", CASES, ids="-".join, indirect=True)
def test_sparse_prefill(case, mode):
    for chunk_groups, window_chunks, expected in plans(case, mode):
        settings = {"prefill": mode, "chunk_groups": chunk_groups, "window_chunks": window_chunks}
        case.model.config.sparse_attention = settings
        assert_close(suffix_logits(case), expected, LOGITS_TOLERANCE)
        assert_close(suffix_logits(case, use_cache=False), expected, LOGITS_TOLERANCE)


@pytest.mark.parametrize("mode", ["mask", "streaming"])
@pytest.mark.parametrize("case", [("shipped", "c3")], ids="-".join, indirect=True)
def test_published_switches_of_sparse_prefill(case, mode):
    config = case.model.config
    for chunk_groups, window_chunks, expected in plans(case, mode):
        config.enable_sparse, config.sparse_mode = True, mode
        config.sparse_config = {"block_size_chosed": chunk_groups, "prev_blocks_num": window_chunks}
        assert_close(suffix_logits(case), expected, LOGITS_TOLERANCE)
        config.enable_sparse, config.enable_chunk_prefill = False, True
        config.prefill_config = {
            "chunk_prefill_mode": mode,
            "chunk_size": chunk_groups,
            "step_size": window_chunks,
            "offload": False,
            "chunk_size_for_vision_tower": 24,
        }
        assert_close(suffix_logits(case), expected, LOGITS_TOLERANCE)
        config.enable_chunk_prefill = False


@pytest.mark.ties
@pytest.mark.parametrize("mode", ["mask", "streaming"])
@pytest.mark.parametrize("case", [("shipped", "c3"), ("full", "c5")], ids="-".join, indirect=True)
def test_sparse_answer_is_the_argmax_of_a_new_forward(case, mode):
    case.model.config.sparse_attention = {"prefill": mode, "chunk_groups": 1, "window_chunks": 1}
    ids = case.inputs["input_ids"]
    generated = case.model.generate(**case.inputs, do_sample=False, max_new_tokens=6)
    with torch.inference_mode():
        logits = case.model(
            input_ids=generated[:, :-1],
            pixel_values_videos=case.inputs["pixel_values_videos"],
            prompt_length=ids.shape[1],
            logits_to_keep=6,
        ).logits
    # Near ties are no matter: the word that was chosen is as good as the best.
    chosen = logits[0].gather(1, generated[0, ids.shape[1] :, None])[:, 0]
    assert (logits[0].amax(1) - chosen).max() <= 2 * LOGITS_TOLERANCE


@pytest.mark.parametrize("case", CASES, ids="-".join, indirect=True)
def test_layout_and_share_of_visible_pairs(case):
    config = case.model.config
    layout = VisualLayout.from_ids(
        case.tensor("input_ids"),
        [len(case.settings["groups"])],
        config.compressor_config.tokens_per_group,
        config.video_token_id,
        config.time_start_token_id,
        config.time_end_token_id,
    )
    spans = [[group.start, group.visual_start, group.end] for group in layout.groups]
    assert spans == case.settings["groups"]
    for settings in case.settings["mask"]:
        visible = dense_mask(layout, "mask", settings["chunk_groups"], settings["window_chunks"])
        length = case.settings["total"]
        assert visible.sum().item() / (length * (length + 1) / 2) == pytest.approx(settings["ratio"], abs=1e-9)


@pytest.mark.parametrize("case", BILEVEL_CASES, ids="-".join, indirect=True)
def test_bilevel_decoding(case):
    ids = case.inputs["input_ids"]
    for entry in case.settings["bilevel"]:
        fields = ("chunk_groups", "window_chunks", "decode_chunk_groups", "pool_size")
        settings = {field: entry[field] for field in fields}
        case.model.config.sparse_attention = {"prefill": "mask", "decode": "bilevel", **settings}
        expected = case.golden.tensors[entry["tensor"]]
        with torch.inference_mode():
            # A whole sequence: the logits of the tokens after the last video.
            outputs = case.model(**case.inputs, dense_chunks=entry["dense_chunks"])
        assert_close(outputs.logits[0], expected, LOGITS_TOLERANCE)
        held = {layer.keys.shape[-2] for layer in outputs.past_key_values.layers}
        assert held == {entry["kv_len_after_suffix"]}, entry["tensor"]

        least = case.leads(outputs, entry["greedy"]).min()
        assert least > -2 * LOGITS_TOLERANCE, entry["tensor"]
        if least > CHOSEN:
            options = {
                "dense_chunks": entry["dense_chunks"],
                "do_sample": False,
                "max_new_tokens": len(entry["greedy"]),
            }
            generated = case.model.generate(**case.inputs, **options)
            assert generated[0, ids.shape[1] :].tolist() == entry["greedy"], entry["tensor"]
