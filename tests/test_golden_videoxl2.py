"""Video-XL-2 gives the reference's numbers: pixels, tower, visual tokens and dense logits, through the converter."""

import pytest
import torch
from goldens import LOGITS_TOLERANCE, TOKENS_TOLERANCE, TOWER_TOLERANCE, assert_close, open_golden
from videoxl.compressor_videoxl import resize_feature_grid
from videoxl.video_processing_videoxl import normalize_frames, resize_frames

CASES = [("shipped", "c0"), ("shipped", "c3"), *(("full", f"c{number}") for number in range(7))]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    source, name = request.param
    return open_golden(request, "videoxl2", source).case(name)


def resized(case, exact):
    frames = case.tensor("frames").permute(0, 3, 1, 2)
    return resize_frames(frames, case.model.config.vision_config.image_size, exact=exact)


def test_pixels_are_the_reference_s(case):
    config = case.model.config
    pixels = normalize_frames(resized(case, exact=True), config.image_mean, config.image_std)
    assert_close(pixels, case.tensor("pixel_values"), 1e-6)


def test_fast_resize_is_within_two_levels(case):
    levels = (case.tensor("pixel_values") * 0.5 + 0.5) * 255
    assert_close(resized(case, exact=False), levels, 2 + 1e-3)


def test_tower_features_and_visual_tokens(case):
    with torch.inference_mode():
        features = case.model.get_video_features(case.inputs["pixel_values_videos"], output_tower_features=True)
    (tower,), (tokens,) = features.tower_features, features.pooler_output
    assert_close(tower, case.tensor("tower_features"), TOWER_TOLERANCE)
    assert_close(tokens, case.tensor("visual_tokens"), TOKENS_TOLERANCE, relative=True)


def test_dense_logits(case):
    expected = case.tensor("logits.full")
    suffix = expected.shape[0]
    with torch.inference_mode():
        kept = case.model(**case.inputs, logits_to_keep=suffix).logits
        every = case.model(**case.inputs).logits
        uncached = case.model(**case.inputs, logits_to_keep=suffix, use_cache=False)
    assert kept.shape[:2] == (1, suffix) and every.shape[:2] == case.inputs["input_ids"].shape
    assert uncached.past_key_values is None
    assert_close(kept[0], expected, LOGITS_TOLERANCE)
    assert_close(every[0, -suffix:], expected, LOGITS_TOLERANCE)
    assert_close(uncached.logits[0], expected, LOGITS_TOLERANCE)


@pytest.mark.ties
def test_greedy_answer_is_the_argmax_of_a_new_forward(case):
    ids = case.inputs["input_ids"]
    generated = case.model.generate(**case.inputs, do_sample=False, max_new_tokens=6)
    assert torch.equal(generated[:, : ids.shape[1]], ids)
    with torch.inference_mode():
        logits = case.model(
            input_ids=generated[:, :-1],
            pixel_values_videos=case.inputs["pixel_values_videos"],
            # Any id may have been generated, the placeholder's too.
            prompt_length=ids.shape[1],
            logits_to_keep=6,
        ).logits
    # Near ties are no matter: the word that was chosen is as good as the best.
    chosen = logits[0].gather(1, generated[0, ids.shape[1] :, None])[:, 0]
    assert (logits[0].amax(1) - chosen).max() <= 2 * LOGITS_TOLERANCE


@pytest.mark.parametrize("source", ["shipped", "full"])
def test_tower_grid_of_the_true_size_is_resized_as_in_the_reference(request, source):
    tensors = open_golden(request, "videoxl2", source).tensors
    assert_close(resize_feature_grid(tensors["regrid.input"], 24), tensors["regrid.output"], 1e-6)
