"""The clients that people already use, unmodified: transformers' own ways in, accelerate, quantisers, peft, compile.

What is in other files: every Auto class, a simulated Hub cache and save_pretrained (`test_loading.py`), streaming
through `chat` (`test_chat.py`), `transformers serve` (`test_serve.py`), gradient checkpointing and LoRA in training
(`test_modeling.py`, `test_training.py`).
"""

import re
import threading

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, TextIteratorStreamer, pipeline

REMOTE = {"trust_remote_code": True}
SHORT = {"max_new_tokens": 8, "min_new_tokens": 8}
FEW_FRAMES = {"num_frames": 8}
# Everything but the language model's own layers stays as it is; bitsandbytes matches full prefixes only.
NOT_QUANTISED = ["model.vision_tower", "model.compressor", "model.multi_modal_projector", "lm_head"]


def item(source, kind="video"):
    return {"type": kind, kind: source}


def ask(*content, text="What moves?"):
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def photo():
    return Image.radial_gradient("L").resize((130, 40))


def prepare(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **FEW_FRAMES, **kwargs,
    )  # fmt: skip


def answers(model, processor, conversation, **kwargs):
    """What the documented calls give: the texts of the new tokens, one per conversation."""
    inputs = prepare(processor, conversation, **kwargs).to(model.device)
    output = model.generate(**inputs, do_sample=False, **SHORT)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(random_model, bundle, tmp_path_factory):
    """A checkpoint folder, as save_pretrained writes it, whose answers hang on every weight."""
    path = tmp_path_factory.mktemp("checkpoint") / "clients-model"
    for part in (random_model, *bundle[1:]):
        part.save_pretrained(path)
    return path


def load(folder, **options):
    return AutoModel.from_pretrained(folder, **REMOTE, **options).eval()


# ---------------------------------------------------------------- processor and generate


def test_the_snippet_of_the_hub_s_button(root):
    """What "Use this model" prints for a model with this card: text alone, its content a plain string."""
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(root, trust_remote_code=True)
    model = AutoModelForMultimodalLM.from_pretrained(root, trust_remote_code=True)
    messages = [
        {"role": "user", "content": "Who are you?"},
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)

    outputs = model.generate(**inputs, max_new_tokens=40)
    text = processor.decode(outputs[0][inputs["input_ids"].shape[-1] :])
    assert isinstance(text, str) and text
    assert "pixel_values_videos" not in inputs


def test_several_videos_and_an_image_in_one_conversation(model, processor, clips):
    first = ask(item(clips[0]), {"type": "text", "text": "and"}, item(clips[1]), item(photo(), "image"))
    conversation = [*first, {"role": "assistant", "content": "The dots."}, *ask(item(clips[1]), text="And here?")]
    inputs = prepare(processor, conversation)
    kinds = [pixels.ndim for pixels in inputs["pixel_values_videos"]]
    assert kinds == [4, 4, 5, 4]
    (answer,) = answers(model, processor, conversation)
    # Each of them is seen.
    for place in (0, 2, 3):
        changed = [{**message} for message in conversation]
        content = list(changed[0]["content"])
        content[place] = (
            item(clips[0] if place == 2 else clips[1]) if place < 3 else item(photo().rotate(180), "image")
        )
        if place == 3:
            content[place] = item(Image.new("RGB", (130, 40), "white"), "image")
        changed[0]["content"] = content
        with torch.no_grad():
            logits = [model(**prepare(processor, each), logits_to_keep=1).logits for each in (conversation, changed)]
        assert (logits[0] - logits[1]).abs().max() > 1e-3, f"item {place} changes nothing"
    assert isinstance(answer, str)


def test_left_padded_batch_equals_single_conversations(model, processor, clips):
    conversations = [
        ask(item(clips[0]), text="What moves from one side of the picture to the other?"),
        ask(item(clips[1]), item(clips[0])),
        ask(item(photo(), "image"), text="Colour?"),
        [{"role": "user", "content": "Who are you?"}],
    ]
    inputs = prepare(processor, conversations, padding=True)
    assert (inputs["attention_mask"][:, 0] == 0).any() and (inputs["attention_mask"][:, -1] == 1).all()
    together = answers(model, processor, conversations, padding=True)
    assert together == [answers(model, processor, each)[0] for each in conversations]


def test_text_iterator_streamer(model, processor, clips):
    conversation = ask(item(clips[0]))
    streamer = TextIteratorStreamer(processor, skip_prompt=True, skip_special_tokens=True, timeout=300)
    arguments = {**prepare(processor, conversation), "streamer": streamer, "do_sample": False, **SHORT}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == answers(model, processor, conversation)[0] and len(parts) > 2


# ---------------------------------------------------------------- pipelines


def test_image_text_to_text_pipeline(folder, model, processor, clips):
    pipe = pipeline("image-text-to-text", model=str(folder), **REMOTE)
    options = {"generate_kwargs": {"do_sample": False, **SHORT}, "return_full_text": False}
    video, image = ask(item(clips[0])), ask(item(photo(), "image"))
    result = pipe(text=video, processor_kwargs=FEW_FRAMES, **options)
    assert result[0]["generated_text"] == answers(model, processor, video)[0]
    results = pipe(text=[image, image], **options)
    assert [each[0]["generated_text"] for each in results] == answers(model, processor, image) * 2
    prompt = processor.apply_chat_template(image, add_generation_prompt=True)
    plain = pipe(images=photo(), text=prompt, **options)
    assert plain[0]["generated_text"] == answers(model, processor, image)[0]


def test_any_to_any_pipeline(folder, model, processor, clips):
    pytest.importorskip("torchvision", reason="the any-to-any pipeline of transformers requires torchvision")
    pipe = pipeline("any-to-any", model=str(folder), **REMOTE)
    video = ask(item(clips[0]))
    options = {"generate_kwargs": {"do_sample": False, **SHORT}, "return_full_text": False}
    result = pipe(text=video, processor_kwargs=FEW_FRAMES, **options)
    assert result[0]["generated_text"] == answers(model, processor, video)[0]


# ---------------------------------------------------------------- accelerate


def offloaded(model):
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


def test_device_map_auto(folder, model, processor, clips):
    pytest.importorskip("accelerate")
    placed = load(folder, device_map="auto")
    assert answers(placed, processor, ask(item(clips[0]))) == answers(model, processor, ask(item(clips[0])))


@pytest.mark.parametrize("prefix", ["model.vision_tower", "model.compressor", "model.language_model.layers"])
def test_offload_to_disk_by_device_map(folder, model, tokenizer, processor, clips, tmp_path, prefix):
    pytest.importorskip("accelerate")
    parts = [*(f"model.language_model.layers.{index}" for index in range(4)), "model.language_model.embed_tokens"]
    parts += ["model.language_model.norm", "model.language_model.rotary_emb", "lm_head"]
    parts += ["model.vision_tower", "model.compressor", "model.multi_modal_projector"]
    device_map = {part: "disk" if part.startswith(prefix) else "cpu" for part in parts}
    placed = load(folder, device_map=device_map, offload_folder=str(tmp_path))
    assert offloaded(placed) and all(name.startswith(prefix) for name in offloaded(placed))
    conversation = ask(item(clips[0]))
    assert answers(placed, processor, conversation) == answers(model, processor, conversation)
    settings = {"return_history": False, "max_num_frames": 8, "generation_config": SHORT}
    assert placed.chat(clips[0], tokenizer, "Why?", **settings) == model.chat(clips[0], tokenizer, "Why?", **settings)


def test_offload_of_everything_to_host_memory(folder, model, tokenizer, clips):
    """As on a GPU that holds one layer at a time; here the CPU plays the GPU."""
    accelerate = pytest.importorskip("accelerate")
    placed = load(folder)
    accelerate.cpu_offload(placed, execution_device=torch.device("cpu"))
    assert len(offloaded(placed)) > 100 and placed.device.type == "cpu"
    settings = {"return_history": False, "max_num_frames": 8, "generation_config": SHORT}
    assert placed.chat(clips[0], tokenizer, "Why?", **settings) == model.chat(clips[0], tokenizer, "Why?", **settings)


@pytest.mark.cuda
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_split_between_gpu_and_host(folder, model, tokenizer, processor, clips, share):
    accelerate = pytest.importorskip("accelerate")
    size = accelerate.utils.compute_module_sizes(load(folder))[""]
    placed = load(folder, device_map="auto", max_memory={0: int(share * size), "cpu": 2 * size})
    assert set(placed.hf_device_map.values()) == {0, "cpu"}
    assert answers(placed, processor, ask(item(clips[0]))) == answers(model, processor, ask(item(clips[0])))
    settings = {"return_history": False, "max_num_frames": 8, "generation_config": SHORT}
    assert placed.chat(clips[0], tokenizer, "Why?", **settings) == model.chat(clips[0], tokenizer, "Why?", **settings)


def test_modules_that_must_not_be_split(folder):
    """accelerate may split a model between any two modules but these; compressor and blocks run as wholes."""
    accelerate = pytest.importorskip("accelerate")
    model = load(folder)
    sizes = accelerate.utils.compute_module_sizes(model)
    budget = int(sizes[""] * 0.6)
    device_map = accelerate.infer_auto_device_map(
        model, max_memory={0: budget, "cpu": 2 * sizes[""]}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {0, "cpu"}
    whole = re.compile(r"model\.(compressor|vision_tower\.encoder\.layers\.\d+|language_model\.layers\.\d+)\.")
    assert not [name for name in device_map if whole.match(name)]


# ---------------------------------------------------------------- quantisation


def quantised(name):
    if name == "bitsandbytes-8bit":
        pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50' (it quantises on the CPU, too)")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTISED), "Int8Params"
    if name == "bitsandbytes-4bit":
        pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50' (it quantises on the CPU, too)")
        from transformers import BitsAndBytesConfig

        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=NOT_QUANTISED, **settings), "Params4bit"
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    from transformers import TorchAoConfig

    kind = quantization.Int8WeightOnlyConfig()
    return TorchAoConfig(kind, modules_to_not_convert=NOT_QUANTISED), "Int8Tensor"


@pytest.mark.parametrize("name", ["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-8bit"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_quantised_language_model(root, bundled_model, tokenizer, processor, name, device):
    config, kind = quantised(name)
    small = AutoModel.from_pretrained(root, quantization_config=config, device_map=device, **REMOTE)
    layer = small.model.language_model.layers[0].mlp.up_proj
    assert kind in (type(layer.weight).__name__, type(layer.weight.data).__name__)
    for kept in (small.model.vision_tower.encoder.layers[0].mlp.fc1, small.model.multi_modal_projector.linear_1):
        assert type(kept.weight.data) is torch.Tensor and kept.weight.dtype == torch.float32
    inputs = prepare(processor, ask(item(f"{root}/assets/demo.mp4"), text="What color is the star?"))
    with torch.no_grad():
        models = (bundled_model, small)
        pair = [model(**inputs.to(model.device), logits_to_keep=1).logits[0, -1].float().cpu() for model in models]
    assert torch.nn.functional.cosine_similarity(*pair, dim=0) > (0.9 if "4bit" in name else 0.99)
    settings = {"return_history": False, "max_num_frames": 8, "generation_config": SHORT}
    assert small.chat(f"{root}/assets/demo.mp4", tokenizer, "What color is the star?", **settings)


# ---------------------------------------------------------------- torch.compile


@pytest.mark.slow
def test_compiled_language_model(folder, model, processor, clips):
    """Same tokens, and no new graph at later steps or for later prompts (dynamo alone: no compiler is needed)."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled, conversation = load(folder), ask(item(clips[0]))
    decoder = compiled.model.language_model
    decoder.forward = torch.compile(decoder.forward, dynamic=True, backend="eager")
    assert answers(compiled, processor, conversation) == answers(model, processor, conversation)
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    inputs = prepare(processor, ask(item(clips[0]), text="And what else is there to be seen?"))
    compiled.generate(**inputs, max_new_tokens=24, min_new_tokens=24)
    assert 0 < graphs == dynamo.utils.counters["stats"]["unique_graphs"]
    dynamo.reset()


# ---------------------------------------------------------------- peft and training


def test_lora_on_language_model_and_compressor(folder, processor, tokenizer, clips, tmp_path):
    peft = pytest.importorskip("peft")
    targets = r".*(language_model.*\.(q_proj|v_proj)|compressor\.encoder\.\d+\.(q|v|qkv|proj_out))"
    torch.manual_seed(0)
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=True))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {"compressor" in name for name in trained} == {True, False}
    assert not [name for name in trained if "vision_tower" in name]

    messages = [*ask(item(clips[0])), {"role": "assistant", "content": "A picture."}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", num_frames=8
    )
    adapted.train()
    adapted.gradient_checkpointing_enable()  # the name that scripts use; transformers 6 will drop it
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in adapted.named_parameters() if "lora_B" in name and parameter.any()}
    assert {"compressor" in name for name in moved} == {True, False} and losses[-1] != losses[0]

    adapted.eval()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path).eval()
    with torch.no_grad():
        expected, found, plain = (model(**inputs, logits_to_keep=1).logits for model in (adapted, again, load(folder)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-3
    settings = {"return_history": False, "max_num_frames": 8, "generation_config": SHORT}
    assert again.chat(clips[0], tokenizer, "Why?", **settings) == adapted.chat(clips[0], tokenizer, "Why?", **settings)


def test_the_image_text_class_is_ours_too(folder):
    assert type(AutoModelForImageTextToText.from_pretrained(folder, **REMOTE)).__name__.startswith("VideoXL")
