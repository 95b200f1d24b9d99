"""VideoChat-Flash drops visual tokens between layers as the reference does: kept tokens, scores, logits, answers."""

import sys

import pytest
import torch
from goldens import assert_close, open_flash_case
from margins import TIE, greedy_choice
from videoxl.token_dropping_videoxl import uniform_choice

# Absolute, as the golden's notes say for everything; ids, kept tokens and lengths are exact.
TOLERANCE = 1e-4
CASES = ["c0", "c1", "c2", "c3", "i0", "i1", "h0", "h1", "hi0", "v0", "v1", "vi0"]
SWITCHES = ("mm_llm_compress", "llm_compress_type", "llm_compress_layer_list", "llm_image_token_ratio_list")


@pytest.fixture(params=CASES)
def case(request):
    case = open_flash_case(request, "full", request.param)
    before = dict(case.model.config.__dict__)
    yield case
    case.model.config.__dict__.clear()
    case.model.config.__dict__.update(before)


def runs(case):
    """The runs of a case, each with the published switches set to it."""
    settings = {entry["name"]: entry for entry in case.golden.settings["settings"]}
    for run in case.settings["runs"]:
        entry = settings[run["setting"]]
        for name in SWITCHES:
            if entry[name] is not None:
                setattr(case.model.config, name, entry[name])
        yield run, entry


def test_dropping_is_the_references(case, monkeypatch):
    suffix, scores = case.settings["sequence"]["suffix_len"], []
    room = sys.modules[type(case.model.model).run_stages.__module__]
    choose = room.best_choice
    monkeypatch.setattr(room, "best_choice", lambda given, keep: scores.append(given) or choose(given, keep))
    for run, entry in runs(case):
        name = entry["name"]
        scores.clear()
        with torch.inference_mode():
            outputs = case.model(**case.inputs, logits_to_keep=suffix)
        cache, greedy = outputs.past_key_values, run["greedy_tokens"]
        assert_close(outputs.logits[0], case.tensor(f"logits.{name}"), TOLERANCE)
        assert [layer.held for layer in cache.layers] == run["kv_len_prefill"]
        assert {layer.get_seq_length() for layer in cache.layers} == {case.settings["sequence"]["total"]}
        kept = cache.dropping.kept if entry["mm_llm_compress"] else ()
        assert len(kept) == len(run["stages"])
        for number, (tokens,) in enumerate(kept):
            assert torch.equal(tokens, case.tensor(f"kept.{name}.stage{number}"))
        for number, given in enumerate(scores):
            assert_close(given, case.tensor(f"scores.{name}.att{number}"), TOLERANCE)
        assert f"{case.name}.scores.{name}.att{len(scores)}" not in case.golden.tensors
        decoded = case.decode_logits(cache, greedy)
        assert_close(decoded, case.tensor(f"decode_logits.{name}"), TOLERANCE)
        answer = [greedy_choice(logits, TIE) for logits in (outputs.logits[0, -1], *decoded)]
        assert answer == [*greedy, run["next_after"]]
        assert [layer.held for layer in cache.layers] == run["kv_len_end"]


def test_generate_gives_the_references_answer(case):
    run = next(run for run, entry in runs(case) if entry["name"] == "u0att")
    expected = [*run["greedy_tokens"], run["next_after"]]
    options = {"do_sample": False, "max_new_tokens": len(expected), "eos_token_id": None}
    for use_cache in (True, False):
        generated = case.model.generate(**case.inputs, **options, use_cache=use_cache)
        assert generated[0, case.inputs["input_ids"].shape[1] :].tolist() == expected


def test_uniform_choice_is_the_references(test_data):
    import json

    entries = json.loads((test_data / "golden" / "videochatflash" / "uniform_indices.json").read_text())
    assert len(entries) > 10
    for entry in entries:
        assert uniform_choice(entry["in"], entry["keep"]).tolist() == entry["index"], (entry["in"], entry["keep"])
