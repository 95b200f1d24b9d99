"""Gives a small language model heads of attention that it would take long to find: `hand_over` in a recipe.

A model of four layers that answers about clips with several shapes has to learn to look at the shape that is asked
for, and at the timestamp in front of what it sees. Until it does, answers are guessed from everything in the clip, and
the loss says little about where to look: in our runs nothing came of it in 3,000 steps. So three heads are written
into it, and training goes on from there.

* `reading`: for each shape a query that finds its tokens, and values that name colour, size, way and frames. All of it
  is the head that asked in the vision stage (`vision_facts.AskingHead`).
* `clock`: visual tokens look at the last number in front of them, their group's timestamp, and take it over.
* `looking`: as reading, with three queries: for the first, the last and any group that shows the shape. Values are the
  clock's time, and the shape's frames and way.

What is surprising:
* Hidden states are neither embeddings nor visual tokens any more. Keys, queries and values are fitted to the states of
  some batches by ridge regression.
* Scores stand in the slowest dimensions of the rotary embedding and so hold at any distance; the clock's distance
  stands in faster ones, whose sum is largest in the middle of a token's own group.

V visual tokens, X text tokens, L all positions of all batches, C width of the language model.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.batches import videos_of
from training.vision_facts import DIRECTIONS, AskingHead
from video_world import SHAPES

PARTS = ("reading", "clock", "looking")
NAMES = (*SHAPES, "sign", "card")
# Scores of visual tokens are kept within these, and text gets the lower one.
LOWEST, HIGHEST = -6.0, 1.0
READING_SHARPNESS, LOOKING_SHARPNESS = 2.5, 9.0  # queries are fitted to less than their axes
TIME_SLOPE = 2.0  # nats from one group to the next, towards the first or the last
# What a head adds, as a share of the residual stream.
READING_LOUDNESS, CLOCK_LOUDNESS = 0.5, 0.1
NUMBERS = 101  # timestamps that the clock is fitted to: 0 .. 100 s
PERIODS = (4, 8, 16, 32, 64, 128)  # seconds, of the sines and cosines that write a time
# Nats at the clock's best distance by the rotary embedding's pair: fast ones tell neighbours apart, slow ones repeats.
CLOCK_NATS = {2: 14.0, 3: 7.0, 4: 6.0, 5: 6.0, 6: 6.0, 7: 6.0}
RIDGE = 1e-5  # of the mean of the inputs' squares
EXACT_RIDGE = 1e-9


def load_asking_head(path: str | Path, hidden_size: int, frames_per_group: int) -> AskingHead:
    """The head that the vision stage has written beside its model.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such heads; pretrain_vision.py writes heads.safetensors")
    head, prefix = AskingHead(hidden_size, frames_per_group), "asking_head."
    state = {name.removeprefix(prefix): t for name, t in load_file(path).items() if name.startswith(prefix)}
    head.load_state_dict(state)
    return head.eval()


@torch.no_grad()
def hand_over(model, processor, batches: list[dict], heads: str | Path, **places: list[int]) -> None:
    """Writes heads into the language model, in place.

    Args:
        model: A Video-XL model in float32.
        processor: Its processor.
        batches: A collator's batches with videos, to fit the weights to.
        heads: See `load_asking_head`.
        **places: `reading`, `clock`, `looking`, each [layer, key-value head]. The head there, with all its query
            heads, is overwritten.

    Raises:
        ValueError: On another name, or a head that is too small.
    """
    if not places or not set(places) <= set(PARTS):
        raise ValueError(f"hand_over takes {', '.join(PARTS)} as [layer, key-value head], got {places}")
    config, was_training = model.config, model.training
    asking = load_asking_head(heads, config.text_config.hidden_size, processor.frames_per_group)
    model.eval()
    for part, give in (("clock", _give_clock), ("reading", _give_reading), ("looking", _give_looking)):
        if part in places:
            layer, number = places[part]
            give(_States(model, processor, batches, layer), _Head(model, layer, number), asking)
    model.train(was_training)


class _States:
    """What a layer gets to see in some batches."""

    def __init__(self, model, processor, batches, layer):
        self.tokenizer, self.model = processor.tokenizer, model
        block, hidden, residual, tokens = model.model.language_model.layers[layer], [], [], []
        hooks = (
            block.input_layernorm.register_forward_hook(lambda module, given, out: hidden.append(out.flatten(0, 1))),
            block.register_forward_pre_hook(lambda module, given: residual.append(given[0].flatten(0, 1))),
        )
        try:
            for batch in batches:
                videos = videos_of(batch)
                tokens += [part.flatten(0, 1) for part in model.get_video_features(videos).pooler_output]
                model(input_ids=batch["input_ids"], pixel_values_videos=videos, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        self.ids = torch.cat([batch["input_ids"].flatten() for batch in batches])  # [L]
        self.hidden, self.residual = torch.cat(hidden), torch.cat(residual)  # [L, C]; hidden is normalised
        tokens = torch.cat(tokens)
        self.tokens = tokens / tokens.pow(2).mean(dim=-1, keepdim=True).sqrt()  # [V, C], as the asking head sees them
        self.visual = self.ids == model.config.video_token_id
        self.text = ~self.visual & (self.ids != self.tokenizer.pad_token_id)

    def token(self, text: str) -> int:
        return self.tokenizer.encode(text)[0]

    def loudness(self, of: torch.Tensor) -> torch.Tensor:
        """The median root mean square of the residual stream at some positions [L]."""
        return self.residual[of].pow(2).mean(dim=-1).sqrt().median()

    def times(self) -> torch.Tensor:
        """The number in front of each visual token, [V]."""
        numbers = {self.token(f" {number}"): number for number in range(NUMBERS)}
        times, last = [], 0
        for token in self.ids.tolist():
            times.append(last)
            last = numbers.get(token, last)
        return torch.tensor(times)[self.visual]


class _Head:
    """A key-value head of a layer, with its query heads, to be written into."""

    def __init__(self, model, layer, number):
        attention = model.model.language_model.layers[layer].self_attn
        self.attention, self.number = attention, number
        self.size, self.queries = attention.head_dim, attention.num_key_value_groups
        rope = model.config.text_config.rope_parameters
        self.rates = [rope["rope_theta"] ** (-2 * pair / self.size) for pair in range(self.size // 2)]  # per position
        columns = slice(number * self.queries * self.size, (number + 1) * self.queries * self.size)
        self.out = attention.o_proj.weight[:, columns]
        self.out.zero_()
        for query in range(self.queries):
            self.write_query(query, [], (self.out.new_zeros(0, len(self.out)), self.out.new_zeros(0)))

    def slow_axes(self, count: int) -> list[int]:
        """Dimensions that the rotary embedding turns least, in both halves of its pairs."""
        half, pairs = self.size // 2, -(-count // 2)
        if pairs > half // 2:
            raise ValueError(f"{count} queries do not fit into the slower half of a head of {self.size}")
        slow = list(range(half - pairs, half))
        return [axis + shift for axis in slow for shift in (0, half)][:count]

    def write_key(self, axes, fitted):
        _write(self.attention.k_proj, self.number, self.size, axes, fitted)

    def write_value(self, fitted):
        _write(self.attention.v_proj, self.number, self.size, list(range(len(fitted[1]))), fitted)

    def write_query(self, query, axes, fitted):
        # The softmax divides by the root of the size.
        scaled = [part * math.sqrt(self.size) for part in fitted]
        _write(self.attention.q_proj, self.number * self.queries + query, self.size, axes, scaled)

    def write_out(self, count: int, queries: int, loudness) -> None:
        """Lets the first `count` values of some query heads into directions of their own of the residual stream."""
        if count > self.size:
            raise ValueError(f"{count} values do not fit into a head of {self.size}")
        width, generator = len(self.out), torch.Generator().manual_seed(0)
        directions, _ = torch.linalg.qr(torch.randn(width, count * queries, generator=generator))
        directions *= loudness * math.sqrt(width / count)
        for query in range(queries):
            self.out[:, query * self.size : query * self.size + count] = directions[:, query * count :][:, :count]


def _give_reading(states, head, asking) -> None:
    axes = head.slow_axes(len(NAMES))
    head.write_key(axes, _fit_scores(states, asking, highest=float("inf")))
    weight, bias = _fit_names(states)
    head.write_query(0, axes, (READING_SHARPNESS * weight, READING_SHARPNESS * bias))
    found = _found(states, asking)
    head.write_value(_fit((states.hidden[states.visual], found, 1)))
    head.write_out(found.shape[1], 1, READING_LOUDNESS * states.loudness(states.text))


def _give_clock(states, head, asking) -> None:
    embedded = states.model.model.language_model.embed_tokens.weight
    embedded = states.model.model.language_model.layers[0].input_layernorm(embedded)
    numbers = torch.tensor([states.token(f" {number}") for number in range(NUMBERS)])
    used = states.ids[states.text].unique()
    others = used[~torch.isin(used, numbers)]
    visual = states.hidden[states.visual]
    one, zero = torch.ones(NUMBERS, 1), torch.zeros(1, 1)
    # A number that is a little less of a number than its neighbour would lose to it: their fit is all but exact.
    weight, bias = _fit(
        (embedded[numbers], one, 300), (embedded[others], zero, 1), (visual, zero, 1), ridge=EXACT_RIDGE
    )
    query, query_bias = _fit((embedded[used], zero, 1), (visual, torch.ones(1, 1), 1))
    middle = (states.model.model.tokens_per_group + 5) / 2  # a number is 3 tokens in front of its group's first
    half, key_axes, query_axes, scales = head.size // 2, [], [], []
    for pair, nats in CLOCK_NATS.items():
        key_axes.append(pair)
        query_axes += [pair, pair + half]
        turn = -middle * head.rates[pair]
        scales += [nats * math.cos(turn), nats * math.sin(turn)]
    scales = torch.tensor(scales)[:, None]
    head.write_key(key_axes, (weight.expand(len(key_axes), -1), bias.expand(len(key_axes))))
    head.write_query(0, query_axes, (query * scales, query_bias * scales[:, 0]))
    codes = time_codes(torch.arange(NUMBERS))
    silent = torch.zeros(1, codes.shape[1])
    head.write_value(
        _fit((embedded[numbers], codes, 30), (embedded[others], silent, 1), (visual, silent, 1), ridge=EXACT_RIDGE)
    )
    head.write_out(codes.shape[1], 1, CLOCK_LOUDNESS * states.loudness(states.text))


def _give_looking(states, head, asking) -> None:
    times = states.times()
    axes = head.slow_axes(len(NAMES) + 1)
    weight, bias = _fit_scores(states, asking, HIGHEST)
    seconds = states.model.config.compressor_config.frames_per_group  # of a group at one frame a second
    visual, text = states.hidden[states.visual], states.hidden[states.text]
    late, late_bias = _fit((visual, times[:, None] / seconds, 4), (text, torch.zeros(1, 1), 1))
    head.write_key(axes, (torch.cat([weight, late]), torch.cat([bias, late_bias])))
    weight, bias = _fit_names(states)
    for query, slope in zip(range(head.queries), (-TIME_SLOPE, TIME_SLOPE, 0.0), strict=False):
        whole = torch.cat([LOOKING_SHARPNESS * weight, weight.new_zeros(1, weight.shape[1])])
        head.write_query(query, axes, (whole, torch.cat([LOOKING_SHARPNESS * bias, bias.new_tensor([slope])])))
    course = _found(states, asking)[:, -(len(DIRECTIONS) + seconds) :]
    seen = torch.cat([time_codes(times), course], dim=1)
    head.write_value(_fit((visual, seen, 1)))
    head.write_out(seen.shape[1], min(head.queries, 3), CLOCK_LOUDNESS * states.loudness(states.text))


def time_codes(seconds: torch.Tensor) -> torch.Tensor:
    """Times as numbers near one: the time itself, then its sines and cosines. [...] -> [..., 1 + 2 * periods]."""
    turns = 2 * math.pi * seconds[..., None].double() / torch.tensor(PERIODS)
    waves = torch.stack([turns.sin(), turns.cos()], dim=-1).flatten(-2)
    return 1.4 * torch.cat([seconds[..., None].double() / 32 - 1, waves], dim=-1).float()


def _found(states, asking):
    """What the asking head reads from each visual token, [V, facts], with a spread of one."""
    found = asking.shape(asking.value(states.tokens))
    return found / found.std()


def _fit_scores(states, asking, highest):
    """Keys that give visual tokens the asking head's scores, and text a low one."""
    scores = (asking.key(states.tokens) @ asking.queries.T - asking.thresholds).clamp(LOWEST, highest)
    low = scores.new_full((1, scores.shape[1]), LOWEST + 1)
    return _fit((states.hidden[states.visual], scores, 4), (states.hidden[states.text], low, 1))


def _fit_names(states):
    """Queries that stand on a thing's axis where the text names it."""
    ids, hidden = states.ids[states.text], states.hidden[states.text]
    parts = [(hidden, hidden.new_zeros(1, len(NAMES)), 1)]
    for number, name in enumerate(NAMES):
        there = ids == states.token(f" {name}")
        if there.any():
            axis = hidden.new_zeros(1, len(NAMES))
            axis[0, number] = 1
            parts.append((hidden[there], axis, 0.3))
    return _fit(*parts)


def _fit(*parts, ridge: float = RIDGE):
    """Ridge regression to (inputs [rows, C], wanted [rows or 1, outputs], weight of the part) at once.

    Returns:
        Weight [outputs, C] and bias [outputs].
    """
    inputs = torch.cat([part for part, _, _ in parts]).double()
    wanted = torch.cat([wanted.expand(len(part), -1) for part, wanted, _ in parts]).double()
    weights = torch.cat([torch.full((len(part),), weight / len(part)) for part, _, weight in parts]).double()
    extended = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    weighted = extended * weights[:, None]
    gram = extended.T @ weighted
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, weighted.T @ wanted).float()
    return solution[:-1].T, solution[-1]


def _write(projection, number, size, axes, fitted) -> None:
    """Puts a fitted map into some axes of a head's rows of a projection; its other axes become zero."""
    rows = slice(number * size, (number + 1) * size)
    for target, given in zip((projection.weight, projection.bias), fitted, strict=True):
        part = torch.zeros_like(target[rows])
        part[axes] = given
        target[rows] = part
