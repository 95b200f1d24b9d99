"""Goldens: numbers of the public reference implementations at tiny size, for the tests that compare with them.

A family's golden lies in two places: a few cases in `tests/fixtures/`, which everyone has ("shipped"), and all of them
in the folder of outside material ("full"). Either way its checkpoint goes through the converter and `AutoModel`.
"""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from margins import watch_answers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel
from videoxl.convert_weights import convert
from videoxl.image_processing_videoxl import choose_grid, cut_tiles
from videoxl.video_processing_videoxl import normalize_frames

FIXTURES = Path(__file__).resolve().parent / "fixtures"

# A match, for every family whose notes do not say otherwise: absolute on logits and tower features, relative to the
# largest absolute value on visual tokens.
LOGITS_TOLERANCE = TOWER_TOLERANCE = 2e-4
TOKENS_TOLERANCE = 1e-4
# Stands for the video in the prompts of Video-XL and Video-XL-Pro.
SENTINEL = -200

# VideoChat-Flash's tiny checkpoints by tower: the folder of the config, and that of the weights.
FLASH_CHECKPOINTS = {
    "umt-large": ("checkpoint_res224", "checkpoint_res224"),
    "umt-hd-large": ("checkpoint_res448", "checkpoint_res224"),
    "internvideo2": ("checkpoint_internvideo2", "checkpoint_internvideo2"),
}

_opened = {}


@dataclass(frozen=True)
class Golden:
    """One folder of goldens: its settings (golden.json), its tensors and the converted checkpoint, loaded."""

    settings: dict
    tensors: dict[str, torch.Tensor]
    model: torch.nn.Module

    def case(self, name):
        """The case `name`, such as `c0`."""
        settings = next(settings for settings in self.settings["cases"] if settings["case"] == name)
        return (FlashCase if "tower" in settings else Case)(self, name, settings)


@dataclass(frozen=True)
class Case:
    """One video and question of a golden."""

    golden: Golden
    name: str
    settings: dict

    @property
    def model(self):
        return self.golden.model

    def tensor(self, name):
        """A tensor of this case, such as `logits.full`."""
        return self.golden.tensors[f"{self.name}.{name}"]

    @property
    def pixels(self):
        """Pixels of the case's video [F, 3, S, S], or of its image's tiles [T, 1, 3, S, S]."""
        if self.settings.get("kind") == "image":
            return self.tensor("pixel_values")[1:, None]  # the squashed whole image yields no visual tokens
        if "pool_frames" not in self.settings:
            return self.tensor("pixel_values")
        frames = self.golden.tensors["pixel_values"][slice(*self.settings["pool_frames"])]
        return frames[self.settings.get("frame_order_after_padding", slice(None))]

    @property
    def inputs(self):
        """What the model takes: `input_ids` [1, L] and `pixel_values_videos`, a list of one video or image."""
        ids = self.tensor("input_ids")
        if SENTINEL in ids:
            place = ids.tolist().index(SENTINEL)
            block = self.golden.tensors.get(f"{self.name}.time_embedding")
            if block is None:
                block = torch.full((self.settings["visual_tokens"],), self.model.config.video_token_id)
            ids = torch.cat([ids[:place], block, ids[place + 1 :]])
        return {"input_ids": ids[None], "pixel_values_videos": [self.pixels]}

    def assert_tiles(self, tolerance):
        """The processor's way cuts the case's image into the reference's tiles."""
        config = self.model.config
        image = Image.fromarray(self.tensor("image").numpy())
        tiles = cut_tiles(image, config.vision_config.image_size, config.image_grid_pinpoints)
        assert_close(normalize_frames(tiles, config.image_mean, config.image_std)[:, None], self.pixels, tolerance)

    def decode_logits(self, past_key_values, tokens):
        """[n, vocabulary] logits after feeding each of `tokens` behind a prefilled cache."""
        rows = []
        with torch.inference_mode():
            for token in tokens:
                output = self.model(input_ids=torch.tensor([[token]]), past_key_values=past_key_values)
                rows.append(output.logits[0, -1])
        return torch.stack(rows)

    def leads(self, outputs, greedy):
        """By how much each word of the reference's answer leads over all others, behind a prefill: [n]."""
        logits = torch.cat([outputs.logits[0, -1:], self.decode_logits(outputs.past_key_values, greedy[:-1])])
        words = torch.tensor(greedy)[:, None]
        return logits.gather(1, words)[:, 0] - logits.scatter(1, words, -torch.inf).amax(1)


@dataclass(frozen=True)
class FlashCase(Case):
    """A case of VideoChat-Flash; `golden.model` is that of the case's tower."""

    @property
    def pixels(self):
        """Pixels of a video [F, 3, S, S] or of an image, [1, 1, 3, S, S] or [1 + rows, columns, 3, S, S]."""
        pixels = self.tensor("pixel_values")
        if self.settings["kind"] == "video":
            return pixels
        if self.settings["kind"] == "image":
            return pixels[:, None]
        height, width = self.settings["frame_hw"]
        size = pixels.shape[-1]
        columns = choose_grid((width, height), self.model.config.image_grid_pinpoints)[0] // size
        tiles = pixels[1:].unflatten(0, (-1, columns))
        return torch.cat([pixels[:1].expand(1, columns, -1, -1, -1), tiles])

    @property
    def inputs(self):
        """What the model takes, as of other cases."""
        visual = torch.full((self.settings["sequence"]["visual_len"],), self.model.config.video_token_id)
        ids = torch.cat([self.tensor("prefix_ids"), visual, self.tensor("suffix_ids")])
        return {"input_ids": ids[None], "pixel_values_videos": [self.pixels]}


def open_flash_case(request, source, name):
    """Opens the case `name` of VideoChat-Flash's golden with the model of its tower; see `open_golden`."""
    folder = FIXTURES if source == "shipped" else request.getfixturevalue("test_data") / "golden"
    cases = json.loads((folder / "videochatflash" / "golden.json").read_text())["cases"]
    tower = next(case["tower"] for case in cases if case["case"] == name)
    return open_golden(request, "videochatflash", source, FLASH_CHECKPOINTS[tower]).case(name)


def open_golden(request, family, source, folders=("checkpoint", "checkpoint"), **config):
    """Opens the golden of a family from `source` ("shipped" or "full"); skips where it is not at hand.

    The checkpoint's config and weights may come from two of its `folders`; `config` replaces entries of the published
    config.json.
    """
    watch_answers()
    key = (family, source, *folders, *sorted(config.items()))
    if key not in _opened:
        folder = FIXTURES if source == "shipped" else request.getfixturevalue("test_data") / "golden"
        # The basename must be the golden's own: transformers reuses code of folders that are called the same.
        output = request.getfixturevalue("tmp_path_factory").mktemp("converted") / f"{family}_{source}_{len(_opened)}"
        of_config, of_weights = (folder / family / name for name in folders)
        checkpoint = of_weights
        if config or of_config != of_weights:
            checkpoint = output.with_name("changed")
            shutil.copytree(of_weights, checkpoint, copy_function=shutil.copyfile)
            published = json.loads((of_config / "config.json").read_text())
            (checkpoint / "config.json").unlink()
            (checkpoint / "config.json").write_text(json.dumps(published | config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # goldens have no tokenizer
            convert(checkpoint, output)
        model = AutoModel.from_pretrained(output, trust_remote_code=True).eval()
        settings = json.loads((folder / family / "golden.json").read_text())
        tensors = load_file(folder / family / "golden.safetensors")
        _opened[key] = Golden(settings, tensors, model)
    return _opened[key]


def assert_close(actual, expected, tolerance, relative=False):
    """Compares in float32: the largest difference, divided by the largest expected value if `relative`."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual.float() - expected.float()).abs().max().item()
    if relative:
        error /= expected.abs().max().item()
    assert error <= tolerance, f"largest {'relative ' if relative else ''}difference {error:.3g} > {tolerance}"
