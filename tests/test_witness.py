"""An encoded video knows the weights and active adapters that it was made with, and no others answer from it."""

import copy

import pytest
import torch
from test_families import frames_of

FRAMES, SECONDS = frames_of(7, 8), [0.5 * number for number in range(8)]
GREEDY = {"do_sample": False, "max_new_tokens": 2}
TARGET = "model.language_model.layers.1.mlp.up_proj.weight"

pytestmark = pytest.mark.ties  # no answer is compared


@pytest.fixture
def own(model):
    """A model whose weights may be changed."""
    return copy.deepcopy(model)


@pytest.fixture
def video(own, tokenizer):
    return own.encode_video(FRAMES[:6], tokenizer, timestamps=SECONDS[:6])


def ask(model, tokenizer, video, **options):
    return model.chat(video, tokenizer, "What is it?", return_history=False, generation_config=GREEDY, **options)


def assert_refused(model, tokenizer, video, path, match):
    before = len(video.input_ids)
    uses = (
        lambda: ask(model, tokenizer, video),
        lambda: model.chat_batch(video, tokenizer, ["What?", "Where?"], GREEDY),
        lambda: video.append(FRAMES[6:], SECONDS[6:]),
        lambda: video.save(path),
        lambda: video.question_cache(),
    )
    for use in uses:
        with pytest.raises(ValueError, match=match):
            use()
    assert len(video.input_ids) == before and not path.exists()


def assert_accepted(model, tokenizer, video, path):
    assert isinstance(ask(model, tokenizer, video), str)
    video.save(path)
    assert isinstance(ask(model, tokenizer, model.load_video(path, tokenizer)), str)
    video.append(FRAMES[6:], SECONDS[6:])


def step_of(optimizer, **options):
    def change(model):
        made = optimizer(model.parameters(), lr=1e-3, **options)
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        made.step()

    return change


def change_one_value(model):
    with torch.no_grad():
        model.get_parameter(TARGET)[1, 2] += 1  # none of those that are looked at


def load_another(model):
    model.load_state_dict({name: weight + 0.01 for name, weight in model.state_dict().items()})


def assign_another(model):
    model.load_state_dict({name: weight + 0.01 for name, weight in model.state_dict().items()}, assign=True)


def write_data(model):
    model.get_parameter(TARGET).data *= 1.01


def add_a_parameter(model):
    model.model.language_model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.ones(3)))


CHANGES = {
    "one value": change_one_value,
    "SGD": step_of(torch.optim.SGD),
    "fused AdamW": step_of(torch.optim.AdamW, fused=True),
    "load_state_dict": load_another,
    "load_state_dict, assign": assign_another,
    "through .data": write_data,
    "another dtype": lambda model: model.to(torch.float64),
    "half": lambda model: model.half(),
    "one more": add_a_parameter,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_refused(own, tokenizer, video, tmp_path, change):
    change(own)
    assert_refused(own, tokenizer, video, tmp_path / "a", "weights have changed since .*: encode the video again")


def test_what_does_not_change_the_weights_is_accepted(own, tokenizer, video, tmp_path):
    own.train()
    own(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()  # gradients alone
    own.eval().requires_grad_(False)
    own.config.sparse_attention = {"decode": "bilevel"}
    assert_accepted(own, tokenizer, video, tmp_path / "a")


def test_a_moved_model_is_accepted_and_watched_on(own, tokenizer, video, tmp_path):
    for move in (lambda: own.to("cpu"), lambda: own._apply(torch.clone), lambda: own._apply(torch.clone)):
        addresses = own.get_parameter(TARGET).data_ptr()
        move()
        assert isinstance(ask(own, tokenizer, video), str)
    assert own.get_parameter(TARGET).data_ptr() != addresses
    with torch.inference_mode():
        assert isinstance(ask(own, tokenizer, video), str)
    assert_accepted(own, tokenizer, copy.deepcopy(video), tmp_path / "a")
    change_one_value(own)
    assert_refused(own, tokenizer, video, tmp_path / "b", "weights have changed")


@pytest.mark.cuda
def test_moves_between_devices_are_accepted(own, tokenizer, video, tmp_path):
    for device in ("cuda", "cpu", "cuda"):
        own.to(device)
        assert isinstance(ask(own, tokenizer, video), str)
    video.save(tmp_path / "a")
    own.to("cpu")  # a digest is the same on every device
    own.load_video(tmp_path / "a")
    change_one_value(own)
    assert_refused(own, tokenizer, video, tmp_path / "b", "weights have changed")


def test_weights_made_in_inference_mode(own, tokenizer, tmp_path):
    with torch.inference_mode():
        own._apply(torch.clone)
        video = own.encode_video(FRAMES, tokenizer, timestamps=SECONDS)
        assert isinstance(ask(own, tokenizer, video), str)
        own.get_parameter(TARGET).mul_(1.01)
        assert_refused(own, tokenizer, video, tmp_path / "a", "weights have changed")


def test_the_check_works_under_autocast(own, tokenizer):
    video = own.half().encode_video(FRAMES, tokenizer, timestamps=SECONDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        video.question_cache()


def test_a_second_video_behind_a_stale_one_is_refused(own, tokenizer, video):
    _, history = own.chat(video, tokenizer, "What is it?", generation_config=GREEDY)
    change_one_value(own)
    again = [{"type": "video", "video": FRAMES, "timestamps": SECONDS}]
    with pytest.raises(ValueError, match="weights have changed"):
        own.chat(again, tokenizer, "And now?", chat_history=history, generation_config=GREEDY)


def test_files_of_other_weights_are_refused(own, tokenizer, video, tmp_path):
    path = tmp_path / "a"
    video.save(path)
    own.load_video(path)
    weight = own.get_parameter(TARGET)
    for row, column in ((0, 0), (1, 2), (-1, -1)):  # also values that no sample has, written so that nothing tells
        before = weight.data[row, column].clone()
        weight.data[row, column] += 1e-3
        with pytest.raises(ValueError, match="a does not fit: .*weights: the file has"):
            own.load_video(path)
        weight.data[row, column] = before
    weight.data[[1, 2]] = weight.data[[2, 1]]  # the same values in another order
    with pytest.raises(ValueError, match="weights: the file has"):
        own.load_video(path, verify=False)


def test_weights_are_read_once_for_several_saves(own, tokenizer, video, tmp_path, monkeypatch):
    video.save(tmp_path / "a")
    loaded = own.load_video(tmp_path / "a")
    reads = []
    monkeypatch.setattr(torch, "stack", lambda *_, **__: reads.append(1))
    video.save(tmp_path / "b")
    copy.deepcopy(video).save(tmp_path / "c")
    loaded.save(tmp_path / "d")
    assert not reads
    monkeypatch.undo()
    for name in "bcd":
        assert isinstance(ask(own, tokenizer, own.load_video(tmp_path / name)), str)


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapted(own):
    """The model with two adapters, `default` active and `other` not, by peft."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(own, config)
    wrapped.add_adapter("other", config)
    return wrapped.eval()


def scaled(adapted):
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict):  # in attention it is a number
            module.scaling["default"] *= 2


ADAPTER_CHANGES = {
    "switched": lambda adapted: adapted.set_adapter("other"),
    "disabled": lambda adapted: adapted.base_model.disable_adapter_layers(),
    "merged": lambda adapted: adapted.merge_adapter(),
    "unloaded": lambda adapted: adapted.unload(),
    "merged and unloaded": lambda adapted: adapted.merge_and_unload(),
    "scaled": scaled,
    "both": lambda adapted: adapted.base_model.set_adapter(["default", "other"]),
}


@pytest.mark.parametrize("change", ADAPTER_CHANGES.values(), ids=ADAPTER_CHANGES)
def test_changed_adapters_are_refused(own, adapted, tokenizer, tmp_path, change):
    video = own.encode_video(FRAMES[:6], tokenizer, timestamps=SECONDS[:6])
    ask(own, tokenizer, video)
    change(adapted)
    match = "adapters have changed since .*active then: default x .*switch them back"
    assert_refused(own, tokenizer, video, tmp_path / "a", match)


def test_an_added_adapter_is_refused_until_it_is_switched_off(own, video, tokenizer, tmp_path, request):
    adapted = request.getfixturevalue("adapted")
    assert_refused(own, tokenizer, video, tmp_path / "a", "active then: none; now: default x ")
    with adapted.disable_adapter():
        assert isinstance(ask(own, tokenizer, video), str)
        video.save(tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit: .*weights"):
        own.load_video(tmp_path / "a")
    adapted.base_model.unload()  # the file was made as if there had been no adapter
    assert isinstance(ask(own, tokenizer, own.load_video(tmp_path / "a")), str)


def test_an_adapter_switched_back_is_accepted(own, adapted, tokenizer, tmp_path):
    video = own.encode_video(FRAMES[:6], tokenizer, timestamps=SECONDS[:6])
    adapted.set_adapter("other")
    other = own.encode_video(FRAMES[:6], tokenizer, timestamps=SECONDS[:6])
    ask(own, tokenizer, other)
    with pytest.raises(ValueError, match="adapters have changed"):
        ask(own, tokenizer, video)
    adapted.set_adapter("default")
    assert_accepted(own, tokenizer, video, tmp_path / "a")
    adapted.delete_adapter("other")  # it was not active
    assert isinstance(ask(own, tokenizer, video), str)


def test_training_the_active_adapter_is_refused_and_another_is_not(own, adapted, tokenizer, tmp_path):
    video = own.encode_video(FRAMES[:6], tokenizer, timestamps=SECONDS[:6])
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if ".other." in name:
                parameter.add_(1)
    assert isinstance(ask(own, tokenizer, video), str)
    with torch.no_grad():
        next(weight for name, weight in own.named_parameters() if "lora_A.default" in name)[0, 1] += 1
    assert_refused(own, tokenizer, video, tmp_path / "a", "weights have changed")


def test_modules_to_save_are_adapters(own, tokenizer, video, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["linear_1"])
    adapted = peft.get_peft_model(own, config).eval()
    assert_refused(own, tokenizer, video, tmp_path / "a", "now: default x ")
    with adapted.disable_adapter():
        assert isinstance(ask(own, tokenizer, video), str)
