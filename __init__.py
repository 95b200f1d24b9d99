"""The root of this repository as a Python package: what `import videoxl` gives.

What is surprising:
* Names are imported when they are first used, so `import videoxl` takes no time and needs no torch.
* Importing it changes nothing in transformers: `Auto*` takes the code in a checkpoint's own folder, which needs
  `trust_remote_code=True`. After `videoxl.register()` it takes the code here, for every folder, and needs no trust.
* `pip install .` makes this package; in a clone, `videoxl.py` does. The Hub needs neither.
* `VideoXLCollator` is not remote code: who trains has this package, and the files that others have to trust stay few.
"""

from importlib import import_module

# Where each public name is defined.
PUBLIC = {
    "VideoXLConfig": "configuration_videoxl",
    "VideoXLForConditionalGeneration": "modeling_videoxl",
    "VideoXLProcessor": "processing_videoxl",
    "EncodedVideo": "encoded_video_videoxl",
    "VideoDecodeError": "video_index_videoxl",
    "open_video": "video_processing_videoxl",
    "times_in_text": "messages_videoxl",
    "Sampling": "frame_sampling_videoxl",
    "VideoXLCollator": "training.collator",
}
__all__ = [*PUBLIC, "register"]


def register() -> None:
    """Lets `AutoModel`, `AutoTokenizer`, `AutoProcessor` ... load checkpoints of the family with the installed code.

    From then on the code in checkpoints' folders is not looked at in this process, `trust_remote_code` or not.
    """
    import transformers

    names = ("VideoXLConfig", "VideoXLForConditionalGeneration", "VideoXLProcessor")
    config, model, processor = (__getattr__(name) for name in names)
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        if auto_class := getattr(transformers, name, None):  # the last one is younger than the oldest release
            auto_class.register(config, model, exist_ok=True)
    transformers.AutoProcessor.register(config, processor, exist_ok=True)


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"videoxl has no {name!r}; it has {', '.join(PUBLIC)}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__():
    return sorted([*globals(), *PUBLIC])
