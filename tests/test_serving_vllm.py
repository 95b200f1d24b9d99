"""The vLLM plug-in: vLLM's prompts, tokens and probabilities are those of the package itself.

Runs where vLLM is (`make test-serving`). Models are random, so every step's token is compared with the package's
logits behind the same tokens: it must be the best one, or within `MARGIN` of it.
"""

import copy
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="vLLM is not here; make test-serving installs it into .venv-serving")

import openai
from servers import DEMO, addresses, served
from servers import user as from_client
from vllm_engine import QUICK, ask

pytestmark = pytest.mark.ties

# Of log-probabilities; the largest difference seen was 3e-5.
MARGIN = 1e-3


def video(path, **own):
    return {"type": "video", "video": str(path), **own}


def image(path):
    return {"type": "image", "image": str(path)}


def user(*parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.radial_gradient("L").resize((130, 40)).save(folder / "wide.png")
    Image.linear_gradient("L").resize((50, 90)).convert("RGBA").rotate(20).save(folder / "tall.png")
    return folder / "wide.png", folder / "tall.png"


@pytest.fixture(scope="module")
def cases(root, clips, pictures):
    """Conversations, with the sampling that the request asks for: name -> (messages, sampling)."""
    demo, (a, b), (wide, tall) = root / "assets" / "demo.mp4", clips, pictures
    what, why = "What color is the star?", "And why?\n\nSay it in 3 words… ✓ 日本"
    found = {
        "demo": ([user(video(demo), what)], {}),
        "max_num_frames": ([user(video(demo), what)], {"max_num_frames": 8}),
        "num_frames": ([user(video(demo), what)], {"num_frames": 17}),
        "fps": ([user(video(demo), what)], {"fps": 2}),
        "sample_fps": ([user(video(demo), what)], {"sample_fps": 0.5, "max_sample_fps": 1}),
        "uniform": ([user(video(demo), what)], {"sample_fps": None, "max_num_frames": 21}),
        "part": ([user(video(demo), what)], {"start": 4.0, "end": 9.5}),
        "several items": ([user(video(b), why)], {"fps": 10}),
        "two videos": ([user("First", video(a), "and then", video(b), why)], {"max_num_frames": 40, "sample_fps": 8}),
        "one video twice": ([user(video(a), video(a), why)], {}),
        "image": ([user(image(wide), "What is it?")], {}),
        "images": ([user("Compare ", image(wide), " with ", image(tall), " please")], {}),
        "video and image": ([user(image(tall), "Where is it in", video(a), "?")], {}),
        "text": ([user("Who are you?")], {}),
        "text as a string": ([{"role": "user", "content": "Who are you?"}], {}),
        "system": ([{"role": "system", "content": "Be brief."}, user(video(a), why)], {}),
        "second turn": ([user(video(demo), what), said("orange"), user(why)], {}),
        "second video in a second turn": ([user(video(a), what), said("red"), user(video(b), why)], {}),
        "image in a second turn": ([user(video(a), what), said("red"), user(image(wide), why)], {}),
    }
    if folder := os.environ.get("VIDEOXL_TEST_DATA"):
        videos = Path(folder).resolve() / "data" / "videos"
        few = {"max_num_frames": 24}
        found |= {
            "variable rate": ([user(video(videos / "phone_desk_h263_vfr.3gp"), why)], few),
            "variable rate, long": ([user(video(videos / "derived" / "clock_300s_vfr_24_6_12fps.mp4"), why)], few),
            "rotation 90": ([user(video(videos / "rotation_90_3frames.mov"), why)], {}),
            "rotation 270": ([user(video(videos / "rotation_270_3frames.mov"), why)], {}),
            "AV1": ([user(video(videos / "testsrc_5s_av1.mkv"), why)], {}),
            "VP9": ([user(video(videos / "testpattern_2s_vp9.webm"), why)], {}),
            "10 bits, HDR": ([user(video(videos / "phone_hevc_hdr10_1s.mp4"), why)], {"fps": 4}),
            "damaged": ([user(video(videos / "corrupted_decord.mp4"), why)], few),
            "cut off": ([user(video(videos / "derived" / "truncated_moov_front.mp4"), why)], few),
            "MPEG-4": ([user(video(videos / "counting_10s_mpeg4.mp4"), why)], {}),
        }
    return found


def requests(cases):
    """The cases as an OpenAI client writes them."""
    return [
        {"messages": [as_client(message) for message in messages], "sampling": s} for messages, s in cases.values()
    ]


def as_client(message):
    if isinstance(message["content"], str):
        return message
    content = []
    for part in message["content"]:
        kind = part["type"]
        url = {"type": f"{kind}_url", f"{kind}_url": {"url": f"file://{part.get(kind)}"}}
        content.append(part if kind == "text" else url)
    return {**message, "content": content}


def prepared(processor, messages, sampling):
    """What the package makes of a case."""
    sampling = dict(sampling)
    part = {name: sampling.pop(name) for name in ("start", "end") if name in sampling}
    if part:
        messages = [
            user(*({**item, **part} if item["type"] == "video" else item["text"] for item in messages[0]["content"]))
        ]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **sampling
    )


def assert_equal(model, inputs, answer):
    """vLLM's prompt is the package's, and so are its tokens and their probabilities."""
    assert "error" not in answer, answer
    assert answer["ids"] == inputs["input_ids"][0].tolist()
    tokens = torch.tensor(answer["tokens"])[None]
    length = tokens.shape[1]
    inputs = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logprobs = model(**inputs, logits_to_keep=length).logits[0].log_softmax(-1)
    chosen = logprobs.gather(1, tokens.T)[:, 0]
    assert (logprobs.amax(1) - chosen).max() < MARGIN, "another token is more probable"
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), chosen, atol=MARGIN, rtol=0)


def save(model, processor, path):
    for part in (model, processor, processor.tokenizer):
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def members(random_model, family_models, bundle, tmp_path_factory):
    """Checkpoint folders by member: name -> (model, processor, folder)."""
    found, folder = {}, tmp_path_factory.mktemp("serving")
    models = {
        "videoxl2": random_model,
        "flash": family_models["videochatflash"],
        "videoxl1": family_models["videoxl1"],
    }
    for name, model in models.items():
        if name == "videoxl1":
            model.config.beacon_ratio = "none"
        model.config.sparse_attention = {}
        processor = type(bundle[2]).from_config(model.config, bundle[1])
        found[name] = (model, processor, save(model, processor, folder / f"serving-{name}"))
    return found


@pytest.mark.parametrize("name", ["videoxl2", "flash", "videoxl1"])
def test_prompts_and_answers_are_the_package_s(members, cases, name):
    model, processor, folder = members[name]
    if name == "videoxl1":
        few = ("demo", "max_num_frames", "part", "several items", "two videos", "images", "video and image", "text")
        cases = {case: cases[case] for case in (*few, "second turn", "variable rate", "damaged") if case in cases}
    for case, answer in zip(cases, ask(folder, requests(cases)), strict=True):
        assert_equal(model, prepared(processor, *cases[case]), answer)


@pytest.mark.parametrize(
    "settings",
    [
        {"hf_overrides": {"vision_chunk_frames": 4096}},
        {"max_num_batched_tokens": 128, "max_num_seqs": 8},
        {"mm_processor_cache_gb": 0, "enable_prefix_caching": False},
        {"tensor_parallel_size": 2},
    ],
    ids=["one item", "prefill cut at 128 tokens", "no caches", "tensor parallel"],
)
def test_how_the_engine_runs_changes_nothing(members, cases, settings):
    model, processor, folder = members["videoxl2"]
    names = ("several items", "two videos", "video and image", "images", "demo", "second turn")
    cases = {name: cases[name] for name in names}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "tensor_parallel_size" in settings else {}
    for case, answer in zip(cases, ask(folder, requests(cases), environment, **settings), strict=True):
        assert_equal(model, prepared(processor, *cases[case]), answer)


@pytest.mark.parametrize("limits", [{"video": 0, "image": 0}, {"video": 0}], ids=["text alone", "images alone"])
def test_what_a_server_may_leave_out(members, cases, limits):
    model, processor, folder = members["videoxl2"]
    cases = {name: cases[name] for name in ("text", "images", "demo")[: 3 - len(limits)] + ("demo",)}
    *answers, refused = ask(folder, requests(cases), limit_mm_per_prompt=limits)
    for case, answer in zip(cases, answers, strict=False):
        assert_equal(model, prepared(processor, *cases[case]), answer)
    assert "At most 0 video" in refused["error"]


def test_lora_on_the_language_model(members, cases, tmp_path):
    """An adapter as peft writes it; without it the same engine is the model itself."""
    model, processor, folder = members["videoxl2"]
    torch.manual_seed(0)
    weights, changed = {}, copy.deepcopy(model)
    for layer, block in enumerate(changed.model.language_model.layers):
        for name in ("q_proj", "v_proj"):
            weight = getattr(block.self_attn, name).weight.data
            down, up = torch.randn(4, weight.shape[1]) / 8, torch.randn(weight.shape[0], 4) / 8
            weight += 2 * up @ down
            place = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}"
            weights |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (asked,), inputs = requests({"demo": cases["demo"]}), prepared(processor, *cases["demo"])
    with_it, without = ask(folder, [{**asked, "lora": str(tmp_path)}, asked], enable_lora=True, max_lora_rank=8)
    assert_equal(changed, inputs, with_it)
    assert_equal(model, inputs, without)
    assert with_it["logprobs"] != without["logprobs"]


def frames(count, seed=3):
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 12, 16, 3), dtype=np.uint8)
    return pixels.repeat(5, axis=1).repeat(5, axis=2)


def in_memory(processor, count, text="What moves?"):
    prompt = processor.render([user(video(""), text)])
    pair = frames(count), {"timestamps": [0.5 * number for number in range(count)]}
    return {"prompt": prompt, "multi_modal_data": {"video": [pair]}}


def test_what_is_known_of_a_video_is_not_made_again(members, cases):
    """A second question finds the video cached, and one that has grown finds its beginning."""
    model, processor, folder = members["videoxl2"]
    counts = (64, 64, 96, 128)
    asked = [in_memory(processor, count, f"Question {number}?") for number, count in enumerate(counts)]
    answers = ask(folder, asked)
    group = len(processor.time_token_ids(0.0)) + processor.tokens_per_group
    for request, answer in zip(asked, answers, strict=True):
        pixels, times = request["multi_modal_data"]["video"][0]
        inputs = processor(request["prompt"], videos=[pixels], timestamps=[times["timestamps"]], return_tensors="pt")
        assert_equal(model, inputs, answer)
    cached = [answer["cached"] for answer in answers]
    # Blocks are 128 tokens, and the first question's text ends within one.
    assert cached[0] == 0 and all(
        after >= before // 4 * group - 128 for before, after in zip(counts[:-1], cached[1:], strict=True)
    )


def test_requests_that_are_refused(members, root, pictures, tmp_path):
    _, processor, folder = members["videoxl2"]
    demo, marker = root / "assets" / "demo.mp4", "<|vision_pad|>"
    (tmp_path / "text.mp4").write_text("This is no video.")
    bare = frames(8)
    cases = {
        "1 videos": {"messages": [as_client(user(video(demo), f"What is {marker}?"))]},
        "1 images": {"messages": [as_client(user(image(pictures[0]), "<|image_pad|>"))]},
        "unknown arguments: frames": {"messages": [as_client(user(video(demo), "?"))], "sampling": {"frames": 3}},
        "num_frames conflicts with": {
            "messages": [as_client(user(video(demo), "?"))], "sampling": {"num_frames": 3, "fps": 1},
        },
        "the file from memory": {"messages": [as_client(user(video(tmp_path / "text.mp4"), "?"))]},
        "timestamps": {"prompt": marker, "multi_modal_data": {"video": [bare]}},
        "uuid": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": None, "uuid": "a"}]}]},
    }  # fmt: skip
    for expected, answer in zip(cases, ask(folder, list(cases.values())), strict=True):
        assert re.search(expected, answer.get("error", "")), (expected, answer)


def test_the_engine_does_not_start_with_them_and_starts_with_the_way_out(members, cases, tmp_path):
    model, processor, folder = members["videoxl2"]
    sparse = tmp_path / "serving-sparse"
    shutil.copytree(folder, sparse)
    config = json.loads((sparse / "config.json").read_text())
    (sparse / "config.json").write_text(json.dumps({**config, "sparse_attention": {"prefill": "streaming"}}))
    with pytest.raises(RuntimeError, match="vLLM cannot serve this checkpoint with its sparse_attention"):
        ask(sparse, [])
    with pytest.raises(RuntimeError, match="trust.remote.code"):
        ask(folder, [], trust_remote_code=False)
    way_out = {"sparse_attention": {"prefill": "full", "decode": "full"}}
    few = {"max_num_frames": 8}
    (answer,) = ask(sparse, requests({"demo": cases["demo"]}), hf_overrides=way_out, mm_processor_kwargs=few)
    assert_equal(model, prepared(processor, cases["demo"][0], few), answer)


# ---------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server(root, tmp_path_factory):
    """OpenAI's client of a server of the bundled checkpoint."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", root, "--trust-remote-code"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--served-model-name", "bundled"]
    command += ["--allowed-local-media-path", root / "assets", "--trust-request-mm-kwargs"]
    command += ["--enable-prompt-tokens-details"]
    environment = {**os.environ, **QUICK, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with served(command, tmp_path_factory.mktemp("server") / "log", environment, 600) as client:
        yield client


def asked(server, messages, **settings):
    return server.chat.completions.create(model="bundled", messages=messages, **settings)


@pytest.fixture(scope="module")
def demo(root):
    return addresses(root / "assets" / "demo.mp4", "video/mp4")


def test_the_server_answers_a_client_that_names_no_temperature(server, demo):
    """Greedily, and with what the first way of naming the video has left in the caches."""
    for kind in ("file", "data"):
        for number, (question, right) in enumerate(DEMO.items()):
            answer = asked(server, from_client(("video", demo[kind]), question))
            assert answer.choices[0].message.content == right
            cached = (answer.usage.prompt_tokens_details or None) and answer.usage.prompt_tokens_details.cached_tokens
            assert bool(cached) == (kind == "data" or number > 0)


def test_the_server_streams(server, demo):
    question = "When is the card with the purple ring shown?"
    chunks = asked(server, from_client(("video", demo["file"]), question), stream=True)
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(parts) == DEMO[question] and len(parts) > 1


def test_the_server_takes_images_text_and_sampling(server, demo, bundle, pictures):
    processor = bundle[2]
    image = ("image", addresses(pictures[0], "image/png")["data"])
    for messages, sampling in (
        (from_client(image, "What is it?"), {}),
        (from_client("Who are you?"), {}),
        (from_client("Compare ", ("video", demo["file"]), "with", image, "!"), {"num_frames": 11}),
    ):
        answer = asked(server, messages, extra_body={"mm_processor_kwargs": sampling} if sampling else {})
        expected = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **sampling)
        assert answer.usage.prompt_tokens == len(expected[0])


def test_64_concurrent_requests(server, demo):
    questions = [*DEMO] * 13

    def ask(question):
        return asked(server, from_client(("video", demo["file"]), question)).choices[0].message.content

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, questions[:64]))
    assert answers == [DEMO[question] for question in questions[:64]]


def test_what_the_server_refuses(server, demo, root):
    question = "What color is the star?"
    film, nothing = ("video", demo["file"]), ("video", "data:video/mp4;base64,bm8gdmlkZW8=")
    outside = ("video", (root / "config.json").as_uri())
    for expected, messages, settings in (
        ("markers", from_client(film, "What is <|vision_pad|>?"), {}),
        ("unknown arguments: frames", from_client(film, question), {"mm_processor_kwargs": {"frames": 2}}),
        ("mm_processor_kwargs", from_client(film, question), {"media_io_kwargs": {"video": {"num_frames": 8}}}),
        ("the file from memory", from_client(nothing, question), {}),
        ("allowed-local-media-path", from_client(outside, question), {}),
    ):
        with pytest.raises(openai.BadRequestError, match=expected):
            asked(server, messages, extra_body=settings)
