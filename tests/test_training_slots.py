"""The small model's curriculum: facts by slots, the story, where to look, many questions behind one clip."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")
SMALL = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}


LOOK = {"card": [1, 2], "choice": [2, 0], "letter": [0, 1]}


@pytest.fixture(scope="module")
def workshop(root):
    import videoxl.training.slots as slots
    import videoxl.training.small_data as data
    import videoxl.training.train_small as small

    yield slots, data, small


@pytest.fixture(scope="module")
def processor(root):
    return AutoProcessor.from_pretrained(root, trust_remote_code=True)


def shown(slots, row, kind):
    part = row[slots.STARTS[kind] : slots.STARTS[kind] + slots.KINDS[kind]]
    return part.nonzero()[0].tolist()


def test_facts_say_what_a_group_shows(workshop):
    """Against the clip's own words, frame by frame."""
    slots, _, _ = workshop
    from videoxl.video_world import make_clip

    ways, changes, keys = set(), 0, 0
    for seed in range(6):
        clip = make_clip(seed, "held_out", seconds=32, cards=3, signs=2, shapes=6, num_questions=0)
        for begin in np.arange(0, 29, 0.5):
            times = [begin + 0.5 * number for number in range(4)]
            facts = slots.facts_of(clip, times)
            assert facts.shape == (9, slots.NUM_FACTS)
            cards = [next((c for c in clip.cards if c.second <= t < c.second + c.seconds), None) for t in times]
            card_frames = [number for number, card in enumerate(cards) if card]
            for slot in slots.CARD:
                assert shown(slots, facts[slot], "frames") == card_frames
            for card in filter(None, cards):
                assert slots.TEXTS.index(card.value) in shown(slots, facts[slots.CARD[0]], "text")
                keys += isinstance(card.key, str)
            for slot, shape in enumerate(slots.SHAPES):
                item = next((item for item in clip.items if item.shape == shape), None)
                frames = [n for n, t in enumerate(times) if item and item.span_at(t) and not cards[n]]
                assert shown(slots, facts[slot], "frames") == frames
                if not frames:
                    assert facts[slot].sum() == 1, "only which slot it is"
                    continue
                looks = [item.change[1] if item.change and times[n] >= item.change[0] else item.color for n in frames]
                assert shown(slots, facts[slot], "color") == [slots.COLOR_NAMES.index(looks[0])]
                assert shown(slots, facts[slot], "last_color") == [slots.COLOR_NAMES.index(looks[-1])]
                changes += looks[0] != looks[-1]
                way = [slots.DIRECTIONS.index(item.direction)] if item.direction and len(frames) > 1 else []
                assert shown(slots, facts[slot], "way") == way
                ways |= set(way)
    assert len(ways) == 4 and changes and keys


def test_patches_say_what_stands_where(workshop):
    """Against pixels: where a patch is said to show a colour, its middle has it."""
    slots, _, _ = workshop
    from videoxl.video_world import COLORS, make_clip

    checked, signs = 0, 0
    for seed in range(12):
        clip = make_clip(seed, "held_out", seconds=16, cards=1, shapes=4, num_questions=0)
        times = np.arange(16.0)
        patches, frames = slots.patches_of(clip, times, 6), clip.frames(times).astype(int)
        assert patches.shape == (16, 36, 8)
        for number, frame in enumerate(frames):
            card = any(card.second == number for card in clip.cards)
            assert (patches[number, :, 4] == (0 if card else 1)).all()
            for place, (shape, color, size, text) in enumerate(patches[number, :, :4]):
                none = shape == len(slots.SHAPES)
                assert (color == len(COLORS)) == (size == 2) == none
                signs += text < len(slots.TEXTS)
                y, x = divmod(place, 6)
                middle = frame[8 * y + 3 : 8 * y + 5, 8 * x + 3 : 8 * x + 5].reshape(-1, 3).mean(axis=0)
                # A ring and a star have corners and holes.
                if not none and slots.SHAPES[shape] == "square" and text == len(slots.TEXTS):
                    wanted = np.array(list(COLORS.values())[color])
                    checked += bool(np.abs(middle - wanted).max() < 40)
            if card:
                # The key is above the line, the text below it.
                upper, lower = patches[number, :18], patches[number, 18:]
                assert (patches[number, :, :3] == [6, 8, 2]).all() and (upper[:, 3] == 26).all()
                assert (lower[:, 5:] == [16, 8, 6]).all() and (lower[:, 3] < 26).any()
                assert (upper[:, 5] < 16).any() != (upper[:, 6:] < [8, 6]).all(axis=1).any()
            else:
                assert (patches[number, :, 5:] == [16, 8, 6]).all()
    assert checked > 30 and signs > 30


def test_words_are_like_the_facts_they_name(workshop, processor, root):
    """A new model's embeddings: a word is nearest to tokens that tell its facts, a number to its neighbours."""
    slots, _, small = workshop
    from videoxl.training.small_model import set_embeddings

    config = AutoConfig.from_pretrained(root, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, trust_remote_code=True)
    set_embeddings(model, processor.tokenizer)
    weight = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=-1)
    basis = slots.SlotCode(weight.shape[1]).basis
    for word, kind in (("sun", "text"), ("sun", "key_word"), ("7", "text"), ("red", "color"), ("red", "last_color")):
        names = slots.COLOR_NAMES if kind.endswith("color") else slots.TEXTS
        for written in (word, f" {word}"):
            (token,) = processor.tokenizer.encode(written)
            told = weight[token] @ basis[slots.STARTS[kind] :][: slots.KINDS[kind]].T
            assert told.argmax() == names.index(word) and told.max() > 3 * told.sort().values[-2], (word, kind)
    near, far = (
        (weight[processor.tokenizer.encode(" 57")[0]] @ weight[processor.tokenizer.encode(text)[0]])
        for text in (" 58", " 83")
    )
    assert near > far


def test_crowds_show_all_that_they_say(workshop):
    """Shapes side by side, none of them out of the frame or over another's middle."""
    import random

    slots, data, _ = workshop
    from videoxl.video_world import make_clip

    most = 0
    for seed in range(20):
        clip = make_clip(seed, "train", 6, shapes=0, cards=0, signs=0, num_questions=0)
        crowd = data.crowded(clip, random.Random(seed))
        assert len({item.shape for item in crowd.items}) == len(crowd.items) in (4, 5, 6)
        for second in range(6):
            there = [item for item in crowd.items if item.span_at(second)]
            most = max(most, len(there))
            places = [crowd.place_of(item, second) for item in there]
            assert all(np.hypot(*np.subtract(a, b)) > 0.2 for n, a in enumerate(places) for b in places[:n])
            facts = slots.facts_of(crowd, [second, second + 0.25, second + 0.5, second + 0.75])
            assert (facts[:6, 9:13].all(axis=1) == [any(i.shape == s for i in there) for s in slots.SHAPES]).all()
    assert most == 6


def test_slots_look_where_their_things_stand(workshop, processor):
    """Against the attention that the compressor itself computes, of the cells that make a slot's token."""
    slots, data, small = workshop
    seeing, _ = small.build(small_part(small, trains="see"), None)
    batch = data.GroupBatches([{"clip": {"seconds": 8, "cards": 0, "shapes": 3}}], processor, 0, groups=4)[0]
    layer, given = seeing.compressor.encoder[0], []
    layer.register_forward_pre_hook(lambda _, states: given.append(states[0]))
    with torch.no_grad():
        told = seeing(**batch)["told"]
        normed = layer.norm(given[0].float())
        query, key = (part(normed).flatten(3) for part in (layer.q, layer.k))
        weights = torch.einsum("gctq,gctk->gtqk", query, key).mul(layer.scale).softmax(dim=-1).mean(dim=1)
    shares = []
    for group, patches in enumerate(batch["patches"]):
        for slot in range(slots.SIGN + 1):
            shown = patches[..., 0] == slot if slot < slots.SIGN else patches[..., 3] < len(slots.TEXTS)
            cells = shown.any(dim=0)
            if cells.any():
                row, column = 2 * (slot // 3), 2 * (slot % 3)
                own = [6 * (row + down) + column + across for down in (0, 1) for across in (0, 1)]
                shares.append(weights[group][own][:, cells].sum(dim=-1).mean())
    assert shares and told["look"] == pytest.approx(float(torch.stack(shares).mean()), rel=0.03)


def test_the_code_can_be_read_back(workshop):
    slots, _, _ = workshop
    code = slots.SlotCode(128)
    facts = (torch.rand(5, 9, slots.NUM_FACTS) < 0.2).float()
    assert torch.allclose(code.facts(code.tokens(facts)), facts, atol=1e-5)
    elsewhere = facts.to("meta")  # as on a GPU, where the facts of a batch are
    assert code.facts(code.tokens(elsewhere)).device == elsewhere.device
    with pytest.raises(ValueError, match="do not fit"):
        slots.SlotCode(slots.NUM_FACTS - 1)


def test_the_story_so_far(workshop):
    """At one frame a second, against the clip's spans; what a card hides is not gone."""
    slots, _, _ = workshop
    from videoxl.video_world import make_clip

    seen = 0
    for seed in range(12):
        clip = make_clip(seed, "held_out", seconds=32, start=8.0, shapes=5, cards=2, num_questions=0)
        times = 8.0 + np.arange(32.0).reshape(-1, 4)
        story = slots.story_of(np.stack([slots.facts_of(clip, group) for group in times]), times)
        assert (story["time"] == times[:, :1]).all()
        busy = {card.second for card in clip.cards}
        for item in clip.items:
            edges = {edge + shift for span in item.spans for edge in span for shift in (-1, 0)}
            if not item.shape or edges & busy:
                continue
            slot = slots.SHAPES.index(item.shape)
            for group, end in enumerate(times[:, -1] - 8):
                begun = [span for span in item.spans if span[0] <= end]
                gone = [span[1] for span in begun if span[1] <= end]
                none = slots.SECONDS
                assert story["first"][group, slot] == (8 + begun[0][0] if begun else none)
                assert story["begin"][group, slot] == (8 + begun[-1][0] if begun else none)
                ended = begun and gone and begun[-1][1] <= end
                assert story["gone"][group, slot] == (8 + begun[-1][1] if ended else none)
                assert story["times"][group, slot] == (len(begun) if begun else slots.STORY["times"] - 1)
                seen += bool(ended)
    assert seen > 20


def small_part(small, **given):
    return small.DEFAULTS | {"trains": "read", "text_config": SMALL, "rates": {0: 0, 2: 1}, "log_steps": 8} | given


def log_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_seeing_lowers_its_loss_and_keeps_only_the_vision_path(workshop, tmp_path):
    _, _, small = workshop
    part = small_part(
        small,
        trains="see",
        groups=8,
        data=[{"clip": {"seconds": 8, "cards": 1, "chains": 0}}],
        held_out=[{"name": "h", "clip": {"seconds": 4}}],
        learning_rate=3e-3,
        steps=24,
        eval_steps=24,
        eval_batches=1,
        max_norm=10.0,
    )
    state = small.train_part("see", tmp_path, recipe=part)
    assert state.facts["finished"] and state.facts["step"] == 24
    lines = log_of(tmp_path, "see")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0] and "held_out/h/right" in lines[-1] and "cores" in lines[0]["machine"]
    weights = small.State(tmp_path, "see").weights()
    kept = {"vision_tower", "compressor", "multi_modal_projector", "patch_head", "place_head"}
    assert {name.split(".")[0] for name in weights} == kept and "patch/shape" in lines[1] and "look" in lines[1]


def test_a_part_that_was_stopped_goes_on_as_if_it_had_not_been(workshop, tmp_path):
    """To the bit: weights, optimizer and data all follow from the file."""
    _, _, small = workshop
    part = small_part(small, data=[{"clips": 1, "questions": 4, "talk": 0.5, "clip": {"seconds": 8}}], look=LOOK)
    part |= {"steps": 6, "save_steps": 3, "rates": {0: 0, 2: 1, 6: 0}}
    small.train_part("read", tmp_path / "whole", recipe=part)
    calls, step = 0, small._step

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return step(*args)

    small._step = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            small.train_part("read", tmp_path / "parts", recipe=part)
    finally:
        small._step = step
    assert small.State(tmp_path / "parts", "read").facts["step"] == 3
    small.train_part("read", tmp_path / "parts", recipe=part)
    whole, parts = (small.State(tmp_path / name, "read") for name in ("whole", "parts"))
    assert whole.tensors.keys() == parts.tensors.keys() and whole.facts["step"] == parts.facts["step"] == 6
    assert all(torch.equal(whole.tensors[key], parts.tensors[key]) for key in whole.tensors)
    # A part that is finished stays what it is, and one whose time is up says so.
    small.train_part("read", tmp_path / "parts", recipe=part)
    assert small.State(tmp_path / "parts", "read").facts["step"] == 6
    late = small.train_part("late", tmp_path, until=0.0, recipe=part)
    assert late.facts["step"] == 1 and not late.facts["finished"]


def test_what_looks_alike_costs(workshop):
    """Where there is a fact of a kind, cross-entropy: low if it is told, high if another one is."""
    slots, _, _ = workshop
    facts = torch.zeros(1, 9, slots.NUM_FACTS)
    assert slots.confused(torch.rand_like(facts), facts) == 0
    facts[0, 7, slots.STARTS["text"] + 3] = 1
    right, wrong = facts.clone(), facts.roll(1, dims=-1)
    expected = torch.nn.functional.cross_entropy(
        slots.SHARPNESS * right[0, 7, slots.STARTS["text"] :][:26], torch.tensor(3)
    )
    assert slots.confused(right, facts) == pytest.approx(float(expected), rel=1e-5)
    assert slots.confused(wrong, facts) > 100 * slots.confused(right, facts)


def test_looks_go_where_the_answer_is_to_be_seen(workshop, processor):
    """Against the clips themselves: a card's two slots, a shape's slot, from the name or the question's end."""
    slots, _, _ = workshop
    from videoxl.training.looks import LOOKS, looks_of, option_lines
    from videoxl.video_world import make_clip
    from videoxl.video_world.questions import name_of

    seen = dict.fromkeys(LOOKS, 0)
    groups = np.arange(64.0).reshape(-1, 4)
    visual = np.tile([False] + [True] * slots.NUM_SLOTS, 16)
    for seed in range(12):
        clip = make_clip(seed, "held_out", seconds=64, cards=4, chains=1)
        for question in clip.questions:
            looks = looks_of(question, groups, visual)
            for kind, text, places in looks:
                group, slot = np.unravel_index(places.nonzero()[0], (16, 1 + slots.NUM_SLOTS))
                assert len(group), "somewhere"
                seen[kind] += 1
                if kind == "card" or question.type == "card_first":
                    assert set(slot - 1) == set(slots.CARD) and len(set(group)) == 1
                    assert any(card.second // 4 == group[0] for card in clip.cards)
                    assert question.text.startswith(text) or text in ("answer", "article")
                elif question.type in ("sign_word", "sign_digit"):
                    assert set(slot - 1) == {slots.SIGN}
                else:
                    assert len(set(slot)) == 1
                    shape = slots.SHAPES[slot[0] - 1]
                    answer = question.answer if question.choices is None else " ".join(question.choices)
                    assert shape in question.text or shape in answer
                    if question.type in ("first", "longer"):
                        assert text in ("", "article") and shape in answer
            if question.choices is not None:
                for number, (letter, start, stop) in enumerate(option_lines(question)):
                    assert letter.endswith("\n" + "ABCD"[number]) and start == letter + "."
                    assert question.text[len(start) : len(stop)].strip() == question.choices[number]
                    seen["choice"] += 1
                    seen["letter"] += 1
            if question.type == "card_first":
                assert all(any(text.endswith(name_of(card.key)) for card in clip.cards) for _, text, _ in looks[:2])
                assert (looks[2][2] == looks[0][2]).all() or (looks[2][2] == looks[1][2]).all()
    assert all(seen.values()), seen


def test_the_share_of_attention_is_the_heads_own(workshop, processor):
    """Against the weights that eager attention returns for whole sequences."""
    _, data, small = workshop
    reading, _ = small.build(small_part(small, look=LOOK), None)
    reading.eval()
    model = reading.encode.__self__
    model.set_attn_implementation("eager")
    clip = {"seconds": 16, "choice_share": 0.5, "cards": 3, "kinds": ["needle"]}
    # In conversations, too, where a question does not begin its row.
    batch = data.ClipBatches([{"clips": 2, "questions": 4, "talk": 0.7, "clip": clip}], processor, 1)[0]
    shares = {"card": [], "choice": [], "letter": []}
    with torch.no_grad():
        told = reading(**batch)["told"]
        tokens = reading.code.tokens(batch["facts"])
        for part in batch["asked"]:
            for kind, looks in part["looks"].items():
                for row, place, look in zip(looks["rows"], looks["place"], looks["look"], strict=True):
                    clip = part["rows"][row]
                    whole = torch.cat([batch["ids"][clip], part["ids"][row]])
                    embeds = model.get_input_embeddings()(whole)
                    embeds[whole == model.config.video_token_id] = tokens[clip].flatten(0, 1)
                    out = model.model.language_model(inputs_embeds=embeds[None], output_attentions=True)
                    layer, head = reading.look[kind]
                    weights = out.attentions[layer][0, head, len(batch["ids"][clip]) + place]
                    shares[kind].append(float(weights[look].sum()))
    for kind, values in shares.items():
        assert values and told[f"look/{kind}"] == pytest.approx(np.mean(values), rel=1e-3)


def test_a_batch_is_what_the_processor_makes_of_it(workshop, processor):
    """Ids of prompt, turn and conversation, drawn from seed and number alone."""
    _, data, _ = workshop
    source = {
        "clips": 2,
        "questions": 8,
        "talk": 0.6,
        "clip": {"seconds": 8, "choice_share": 0.5},
        "time_offset_max": 5,
    }
    batches = data.ClipBatches([source], processor, 3, frames=True)
    batch, again = batches[4], batches[4]
    assert torch.equal(batch["ids"], again["ids"]) and torch.equal(batch["pixels"], again["pixels"])
    assert not torch.equal(batch["facts"], batches[5]["facts"])
    frames, most = np.zeros((8, 48, 48, 3), np.uint8), 0
    for part in batch["asked"]:
        asked = zip(part["rows"], part["ids"].tolist(), part["labels"].tolist(), part["owners"], strict=True)
        for row, ids, labels, owners in asked:
            numbers = [int(processor.tokenizer.decode([token])) for token in batch["ids"][row].tolist()[15::13]]
            length = max(place for place, label in enumerate(labels) if label != -100) + 1
            turns = processor.tokenizer.decode(ids[:length]).strip("\n").split("<|im_end|>\n<|im_start|>user\n")
            messages = []
            for number, turn in enumerate(turns):
                question, answer = turn.split("<|im_end|>\n<|im_start|>assistant\n")
                content = [{"type": "video"}] * (number == 0) + [{"type": "text", "text": question}]
                answer = answer.removesuffix("<|im_end|>")
                messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            text = processor.render(messages, add_generation_prompt=False)
            video = {"video": frames, "timestamps": [numbers[0] + float(number) for number in range(8)]}
            whole = processor([text], videos=[[video]])["input_ids"][0]
            assert batch["ids"][row].tolist() + ids[:length] == whole[: len(batch["ids"][row]) + length]
            answers = [message["content"] + "<|im_end|>" for message in messages[1::2]]
            assert processor.tokenizer.decode([label for label in labels if label != -100]) == "".join(answers)
            wanted = torch.tensor(labels) != -100
            assert len(owners[wanted].unique()) == len(turns), "each answer counts by itself"
            most = max(most, len(turns))
        assert part["owners"].max() + 1 == len(part["types"])
    assert most > 2


def test_questions_behind_a_clip_see_what_they_would_see_alone(workshop, processor):
    """Losses of many questions behind shared key-values equal those of whole sequences through the model."""
    _, data, small = workshop
    reading, _ = small.build(small_part(small, frames=True), None)
    reading.eval()
    model = reading.encode.__self__
    source = {"clips": 2, "questions": 3, "clip": {"seconds": 8, "choice_share": 0.5}, "stretch": 300}
    batch = data.ClipBatches([source], processor, 1, frames=True)[1]
    with torch.no_grad():
        found = reading(**{key: value for key, value in batch.items() if key != "story"})["loss"]
        total, count = 0.0, 0
        for part in batch["asked"]:
            for row, ids, labels in zip(part["rows"], part["ids"], part["labels"], strict=True):
                whole = torch.cat([batch["ids"][row], ids])
                first = batch["positions"][row, -1] + 1
                positions = torch.cat([batch["positions"][row], first + torch.arange(len(ids))])
                logits = model(
                    input_ids=whole[None],
                    position_ids=positions[None],
                    attention_mask=torch.ones_like(whole)[None],
                    pixel_values_videos=[batch["pixels"][row]],
                    use_cache=False,
                ).logits[0, len(batch["ids"][row]) :]
                wanted = labels[1:] != -100
                losses = torch.nn.functional.cross_entropy(logits[:-1][wanted], labels[1:][wanted], reduction="sum")
                total, count = total + losses, count + int(wanted.sum())
    assert found == pytest.approx(float(total / count), rel=1e-4)


def test_streaming_and_mixed_caches_are_the_models_own(workshop, processor):
    """The mask is the oracle's of the sparse path, pooled keys are those of bi-level decoding."""
    from videoxl.kv_cache import rotate
    from videoxl.sparse_attention import GroupSpan, VisualLayout, dense_mask

    _, data, small = workshop
    reading, _ = small.build(small_part(small), None)
    source = {"clips": 1, "questions": 30, "mix": 0.3, "streaming": [3], "clip": {"seconds": 128, "cards": 6}}
    batch = data.ClipBatches([source], processor, 1)[0]
    assert batch["window"] == 3
    visual = batch["ids"] == reading.config.video_token_id
    places = visual[0].nonzero().flatten().reshape(-1, 9)
    begins = [15 - 1, *(places[:-1, -1] + 1).tolist()]
    spans = [GroupSpan(begin, int(group[0]), int(group[-1]) + 1) for begin, group in zip(begins, places, strict=True)]
    settings = reading.config.resolve_sparse_attention()
    layout = VisualLayout((tuple(spans),), visual.shape[1])
    oracle = dense_mask(layout, "streaming", settings.chunk_groups, 3)
    assert torch.equal(reading._window(visual, 3)[0, 0], oracle) and not oracle.tril().equal(
        torch.ones_like(oracle).tril()
    )
    keys, mix = torch.randn(1, 3, visual.shape[1], 32), batch["mix"]
    ((mixed, values),) = reading._mix([(keys, keys)], batch["positions"], mix)
    frequencies, old, new = (
        reading.language_model.rotary_emb.inv_freq,
        batch["positions"][0],
        torch.arange(mix.shape[1]),
    )
    plain = rotate(keys, old, None, frequencies)
    dense = (mix[0] == 1).any(dim=1)
    expected = torch.stack([plain[:, :, row > 0].mean(dim=2) for row in mix[0]], dim=2)
    assert torch.allclose(mixed, rotate(expected, None, new, frequencies), atol=1e-4)
    assert torch.allclose(values[:, :, dense], keys[:, :, mix[0][dense].argmax(dim=1)])
    pooled = int((~dense).sum())
    assert pooled == 32 - round(0.3 * 32) and mix.shape[1] == visual.shape[1] - 8 * pooled
    # What is asked is to be seen in dense groups, or known at the end.
    for part in batch["asked"]:
        for kind in part["looks"].keys() & {"card", "shape"}:
            assert part["looks"][kind]["look"][:, : mix.shape[1]].any(dim=1).all()


def test_haystacks_ask_only_for_what_is_there_once(workshop, processor):
    _, data, _ = workshop
    source = {"clips": 2, "questions": 8, "segments": 3, "clip": {"seconds": 16, "cards": 3}, "stretch": 4000}
    batches = data.ClipBatches([source], processor, 0)
    asked = 0
    for number in range(4):
        batch = batches[number]
        assert batch["facts"].shape[1] == 12 and "story" not in batch
        assert (batch["positions"].diff() > 0).all()
        asked += sum(len(part["types"]) for part in batch["asked"])
        assert {kind for part in batch["asked"] for kind in part["types"]} <= {"needle", "two_hop", "absent_card"}
    assert asked > 20


def test_reading_learns_and_starts_from_what_was_seen(workshop, tmp_path):
    _, _, small = workshop
    eyes = small_part(small, trains="see", groups=4, data=[{"clip": {"seconds": 4}}], steps=1)
    small.train_part("eyes", tmp_path, recipe=eyes)
    part = small_part(
        small,
        data=[{"clips": 2, "questions": 8, "clip": {"seconds": 8}}],
        held_out=[{"name": "s8", "clips": 2, "questions": 4, "clip": {"seconds": 8}}],
        learning_rate=3e-3,
        steps=24,
        eval_steps=24,
        eval_batches=1,
        look=LOOK,
    )
    part["from"] = ["eyes"]
    small.train_part("read", tmp_path, recipe=part)
    lines = log_of(tmp_path, "read")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0] and "story/time" in lines[1] and "held_out/s8/right" in lines[-1]
    weights = small.State(tmp_path, "read").weights()
    assert {name.split(".")[0] for name in weights} == {"language_model", "story_norm", "story_heads"}
    module, _ = small.build(part | {"from": ["eyes", "read"]}, tmp_path)
    seen = small.State(tmp_path, "eyes").weights()
    tower = dict(module.encode.__self__.model.named_parameters())
    assert all(torch.equal(tower[name], value) for name, value in seen.items() if "_head" not in name)
    assert torch.equal(module.language_model.norm.weight, weights["language_model.norm.weight"])
    with pytest.raises(ValueError, match="nobody is not finished"):
        small.build(part | {"from": ["nobody"]}, tmp_path)


def test_numbers_begin_near_their_neighbours(workshop, processor):
    _, _, small = workshop
    reading, _ = small.build(small_part(small), None)
    weight = reading.language_model.embed_tokens.weight
    rows = torch.stack([weight[processor.tokenizer.encode(f" {number}")[0]] for number in range(60)])
    alike = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(0)
    near = torch.stack([alike[number, number + 1] for number in range(59)]).mean()
    assert near > alike.mean() + 0.1 and alike.max() < 0.97
