"""`transformers serve` with OpenAI's client, both as they are."""

import os
import sys

import pytest
from PIL import Image
from servers import DEMO, addresses, served, user


@pytest.fixture(scope="module")
def client(root, tmp_path_factory):
    for package in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(package, reason="pip install 'transformers[serving]'")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", root, "--trust-remote-code"]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with served([*command, "--device", "cpu"], log, environment) as client:
        yield client


@pytest.fixture
def ask(client, root):
    def ask(messages, **settings):
        return client.chat.completions.create(model=str(root), messages=messages, temperature=0, **settings)

    return ask


@pytest.fixture(scope="module")
def video(root):
    path = root / "assets" / "demo.mp4"
    return {"path": str(path), **addresses(path, "video/mp4")}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.new("RGB", (90, 60), "orange").save(path)
    return {"path": str(path), **addresses(path, "image/png")}


def expected(bundle, messages, **settings):
    """The package's own answer, and the length of the prompt."""
    model, _, processor = bundle
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings
    )
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=16)
    return processor.decode(output[0, length:], skip_special_tokens=True), length


def test_text(ask, bundle):
    for messages in ([{"role": "user", "content": "Who are you?"}], user("Who are you?")):
        answer = ask(messages, max_tokens=16)
        assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == expected(bundle, messages)


@pytest.mark.parametrize("kind", ["path", "file", "data"])
def test_a_video_however_it_is_named(ask, bundle, video, kind):
    """The server takes 32 frames unless it is told otherwise."""
    for number, (question, right) in enumerate(DEMO.items()):
        if kind == "path" or number == 0:
            messages = user(("video", video[kind]), question)
            answer = ask(messages)
            assert answer.choices[0].message.content == right
            assert answer.usage.prompt_tokens == expected(bundle, messages, num_frames=32)[1]


def test_sampling_in_chat_template_kwargs(ask, bundle, video):
    messages = user(("video", video["path"]), "What color is the star?")
    lengths = set()
    for settings in ({"num_frames": 8}, {"num_frames": None, "fps": 1}, {"num_frames": None, "max_num_frames": 12}):
        answer = ask(messages, extra_body={"chat_template_kwargs": settings})
        wanted = {name: value for name, value in settings.items() if value is not None}
        assert answer.usage.prompt_tokens == expected(bundle, messages, **wanted)[1]
        lengths.add(answer.usage.prompt_tokens)
    assert len(lengths) == 3


@pytest.mark.parametrize("kind", ["path", "file", "data"])
def test_an_image_however_it_is_named(ask, bundle, picture, kind):
    messages = user(("image", picture[kind]), "What color is it?")
    answer = ask(messages, max_tokens=16)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == expected(bundle, messages)


def test_streaming(ask, video):
    question = "When is the card with the purple ring shown?"
    chunks = list(ask(user(("video", video["path"]), question), stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(parts) == DEMO[question] and len(parts) > 1
    assert chunks[-1].choices[0].finish_reason == "stop"
