"""What a frozen vision tower sees, kept on disk, so that a video is decoded and runs through the tower once.

What is surprising:
* A video's file is named by what its features hang on: the video's path, size and time of change, how it is sampled,
  the processor and the tower's weights. Whatever of these changes makes another file; old ones are never deleted.
* The ids of a conversation are kept too, so that a sample that was seen once needs no video at all. Its file is named
  by the record beside the above.
* Images are not kept: a sample that has one is read anew each time.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from videoxl.training.collator import SOURCES


class FeatureCache:
    """Features of videos and ids of conversations, in a folder.

    Args:
        folder: Is made if it is missing.
        model: Whose tower the features are of.
        processor: That makes the tower's input.
        video: How video files are sampled.
    """

    def __init__(self, folder: str | Path, model, processor, video: dict):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.frames_per_group = processor.frames_per_group
        digest = hashlib.sha256()
        for name, tensor in sorted(model.get_vision_tower().state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        settings = json.dumps([processor.to_dict(), video], sort_keys=True, default=str)
        self.base = digest.hexdigest() + hashlib.sha256(settings.encode()).hexdigest()

    def key(self, identity) -> str:
        """The name of a file, from anything that JSON takes."""
        told = json.dumps([self.base, identity], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()

    def load_sample(self, key: str) -> dict | None:
        """A sample as the dataset gives it, with features [F, P, C] for pixels; None if something is missing."""
        path = self.folder / f"{key}.sample"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            sample = {name: file.get_tensor(name) for name in ("input_ids", "labels")}
        files = [self.folder / f"{name}.features" for name in facts["videos"]]
        if not all(file.is_file() for file in files):
            return None
        features = []
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                features.append(tensors.get_tensor("features"))
        return sample | {"answers": facts["answers"], "pixel_values_videos": features}

    def save_sample(self, key: str, sample: dict, videos: list[str]) -> None:
        facts = {"videos": videos, "answers": sample["answers"]}
        tensors = {name: sample[name] for name in ("input_ids", "labels")}
        self._write(f"{key}.sample", tensors, {"facts": json.dumps(facts)})

    @torch.no_grad()
    def features(self, model, pixels: torch.Tensor, key: str) -> torch.Tensor:
        """The tower's output [F, P, C] for a video [F, 3, S, S], in whole groups; written down for the next time."""
        if (missing := -len(pixels) % self.frames_per_group) and model.config.frame_padding == "last":
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])  # as the model would
        features = model.get_video_features([pixels], output_tower_features=True).tower_features[0]
        self._write(f"{key}.features", {"features": features.detach().cpu().contiguous()})
        return features

    def _write(self, name, tensors, metadata=None):
        # Two processes may write the same file: each its own, and the last one to be done stays.
        own = self.folder / f"{name}.{os.getpid()}"
        save_file(tensors, own, metadata=metadata)
        own.replace(self.folder / name)


def identity_of(item: dict):
    """What tells a video from others without reading it: its item, with size and time of change of its files."""
    said = {}
    for name, value in item.items():
        if name in SOURCES["video"]:
            files = value if isinstance(value, list) else [value]
            value = [_file_identity(file) for file in files]
        said[name] = value
    return said


def _file_identity(file):
    path = getattr(file, "filename", file)
    if not isinstance(path, str) or not os.path.isfile(path):
        raise ValueError(f"feature_cache keeps videos in files; of {type(file).__name__} nothing tells what is in it")
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
