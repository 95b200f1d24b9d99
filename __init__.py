"""The root of this repository as a Python package: what `import videoxl` gives.

What is surprising:
* Names are imported when they are first used, so `import videoxl` takes no time and needs no torch.
* Nothing is registered with `Auto*`: a checkpoint's folder brings its own code there, under `trust_remote_code=True`.
  The classes here load the same folders without it: `videoxl.VideoXLForConditionalGeneration.from_pretrained(folder)`.
* `pip install .` makes this package; in a clone, `videoxl.py` does. The Hub needs neither.
"""

from importlib import import_module

# Where each public name is defined.
PUBLIC = {
    "VideoXLConfig": "configuration_videoxl",
    "VideoXLForConditionalGeneration": "modeling_videoxl",
    "VideoXLProcessor": "processing_videoxl",
    "EncodedVideo": "encoded_video_videoxl",
    "VideoDecodeError": "video_decoding_videoxl",
    "open_video": "video_processing_videoxl",
    "times_in_text": "selection_videoxl",
}
__all__ = list(PUBLIC)


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"videoxl has no {name!r}; it has {', '.join(PUBLIC)}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__():
    return sorted([*globals(), *PUBLIC])
