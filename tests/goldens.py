"""Goldens: numbers of the public reference implementations at tiny size, for the tests that compare with them.

A family's golden lies in two places: a few cases in `tests/fixtures/`, which everyone has ("shipped"), and all of them
in the folder of outside material ("full"). Either way its checkpoint goes through the converter and `AutoModel`.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel
from videoxl.convert_weights import convert

FIXTURES = Path(__file__).resolve().parent / "fixtures"

# A match, for every family whose notes do not say otherwise: absolute on logits and tower features, relative to the
# largest absolute value on visual tokens.
LOGITS_TOLERANCE = TOWER_TOLERANCE = 2e-4
TOKENS_TOLERANCE = 1e-4

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
        return Case(self, name, settings)


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
    def inputs(self):
        """What the model takes: `input_ids` [1, L] and `pixel_values_videos` [1, F, 3, S, S]."""
        return {
            "input_ids": self.tensor("input_ids")[None],
            "pixel_values_videos": self.tensor("pixel_values")[None],
        }


def open_golden(request, family, source):
    """Opens the golden of a family from `source` ("shipped" or "full"); skips where it is not at hand."""
    if (family, source) not in _opened:
        folder = FIXTURES if source == "shipped" else request.getfixturevalue("test_data") / "golden"
        # The basename must be the golden's own: transformers reuses code of folders that are called the same.
        output = request.getfixturevalue("tmp_path_factory").mktemp("converted") / f"{family}_{source}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # goldens have no tokenizer
            convert(folder / family / "checkpoint", output)
        model = AutoModel.from_pretrained(output, trust_remote_code=True).eval()
        settings = json.loads((folder / family / "golden.json").read_text())
        tensors = load_file(folder / family / "golden.safetensors")
        _opened[family, source] = Golden(settings, tensors, model)
    return _opened[family, source]


def assert_close(actual, expected, tolerance, relative=False):
    """Compares in float32: the largest difference, divided by the largest expected value if `relative`."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual.float() - expected.float()).abs().max().item()
    if relative:
        error /= expected.abs().max().item()
    assert error <= tolerance, f"largest {'relative ' if relative else ''}difference {error:.3g} > {tolerance}"
