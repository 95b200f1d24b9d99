"""Fixtures shared by all tests.

With the root on `sys.path`, `videoxl` is the package that `pip install .` would install, see `videoxl.py`.
"""

import atexit
import contextlib
import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT))


# Read when transformers is imported, and by every process that a test starts. Of their own: of two workers that copy
# remote code into one folder, one could import what the other has half written.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="videoxl-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, which is the root of the Hub repository."""
    return ROOT


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of outside material; tests that need it skip without it."""
    folder = os.environ.get("VIDEOXL_TEST_DATA")
    if not folder:
        pytest.skip("VIDEOXL_TEST_DATA is not set: the goldens, videos and the real tokenizer are not here")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"VIDEOXL_TEST_DATA={folder} is not a folder")
    return path


@pytest.fixture(autouse=True)
def clear_leads(request):
    """Fails a test whose greedy answers hang on a near tie, see margins.py."""
    yield
    if (margins := sys.modules.get("margins")) is None:
        return
    least = min(margins.leads, default=1)
    margins.leads.clear()
    if least < margins.TIE and request.node.get_closest_marker("ties") is None:
        pytest.fail(f"a word of an answer leads by {least:.2g} only: choose another seed or question (margins.py)")


@pytest.fixture(scope="session")
def bundle(root):
    """The bundled checkpoint as users load it: (model, tokenizer, processor)."""
    from margins import watch_answers
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    watch_answers()
    model = AutoModel.from_pretrained(root, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=True)
    return model, tokenizer, AutoProcessor.from_pretrained(root, trust_remote_code=True)


@pytest.fixture(scope="session")
def random_model(root, bundle):
    """The bundled architecture at a size of its own, with random weights of high variance, the same in every run.

    Its answers hang on every frame and word, so two ways that must agree and do not are told apart; and they stay what
    they are when the bundled checkpoint is trained anew.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(root, trust_remote_code=True)
    config.text_config.initializer_range = 0.2
    text = config.text_config.to_dict()
    text.pop("layer_types")
    # Fewer key-value heads than heads, as in the published models.
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    text |= sizes | {"num_attention_heads": 6, "num_key_value_heads": 2}
    config.text_config = type(config.text_config)(**text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, trust_remote_code=True).eval()
    model.generation_config = bundle[0].generation_config
    return model


# How VideoChat-Flash samples, resizes and words.
VIDEOCHAT_FLASH_DOORS = {
    "frame_sampler": "dynamic_fps1",
    "exact_resize": True,
    "video_message": (
        "The video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled from it. "
    ),
}
# What the other family members change of the bundled config: the tower, what is compressed, what is selected.
FAMILY_CHANGES = {
    "videoxl1": {
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 256,
                          "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 48, "patch_size": 8},
        "compressor_config": {"compressor_type": "none", "hidden_size": 96, "frames_per_group": 1, "grid_size": 6},
        "time_format": None, "time_start_token_id": None, "time_end_token_id": None, "frame_fit": "crop",
        "beacon_window": 36, "beacon_ratio": [3, 9],
    },
    "videoxlpro": {"token_selector": "timed_query", "keep_ratio": 0.8, "time_format": "Time {seconds:06.1f}s:"},
    "videoxlpro_march": {
        "time_format": None, "time_start_token_id": None, "time_end_token_id": None,
        "token_selector": "query", "max_visual_tokens": 48, "beacon_window": 32, "beacon_ratio": 4,
    },
    "videochatflash": {
        "vision_config": {"model_type": "videoxl_umt", "hidden_size": 96, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "image_size": 48, "patch_size": 8},
        "compressor_config": {"compressor_type": "tome", "hidden_size": 96, "frames_per_group": 4, "grid_size": 3,
                              "projector_pool_size": 1, "merge_heads": 4},
        "time_format": None, "time_start_token_id": None, "time_end_token_id": None, "image_tiling": "overview",
        **VIDEOCHAT_FLASH_DOORS,
    },
    "videochatflash_internvideo2": {
        "vision_config": {"model_type": "videoxl_internvideo2", "hidden_size": 96, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "image_size": 48, "patch_size": 8},
        "compressor_config": {"compressor_type": "tome", "hidden_size": 96, "frames_per_group": 4, "grid_size": 3,
                              "projector_pool_size": 1, "merge_heads": 4},
        "time_format": None, "time_start_token_id": None, "time_end_token_id": None, "image_tiling": "overview",
        **VIDEOCHAT_FLASH_DOORS,
    },
}  # fmt: skip
# As many stages as four layers have room for, one uniform and one by attention.
FAMILY_CHANGES["videochatflash_dropping"] = FAMILY_CHANGES["videochatflash"] | {
    "mm_llm_compress": True, "llm_compress_type": "uniform0_attention", "llm_compress_layer_list": [1, 3],
    "llm_image_token_ratio_list": [1, 0.75, 0.25],
}  # fmt: skip


@pytest.fixture(scope="session")
def family_models(random_model):
    """Models of the other family members at the bundled checkpoint's size, with random weights: name -> model."""
    import torch
    from transformers import AutoModel

    models, base = {}, random_model.config.to_dict()
    for name, changes in FAMILY_CHANGES.items():
        config = type(random_model.config).from_dict({**base, **changes})
        config.auto_map = random_model.config.auto_map
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models[name] = AutoModel.from_config(config, trust_remote_code=True).eval()
        models[name].generation_config = random_model.generation_config
    return models


@pytest.fixture(params=FAMILY_CHANGES)
def member(request, family_models):
    """The model of one other family member; what a test sets on its config is undone."""
    with _undone(family_models[request.param]) as model:
        yield model


@contextlib.contextmanager
def _undone(model):
    """Whatever is set on the model's config meanwhile is undone."""
    before = dict(model.config.__dict__)
    model.config.sparse_attention = {}
    model.config.frames_config = copy.deepcopy(before["frames_config"])
    yield model
    model.config.__dict__.clear()
    model.config.__dict__.update(before)
    model.eval()


@pytest.fixture
def model(random_model):
    """A model of the bundled architecture, see `random_model`; dense, and what a test sets on its config is undone."""
    with _undone(random_model) as model:
        yield model


@pytest.fixture
def bundled_model(bundle):
    """The bundled checkpoint, whatever it was trained to; dense, and what a test sets on its config is undone."""
    with _undone(bundle[0]) as model:
        yield model


@pytest.fixture
def tokenizer(bundle):
    return bundle[1]


@pytest.fixture
def processor(bundle):
    return bundle[2]


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Two short H.264 files that differ: (path, path)."""
    import av
    import numpy as np

    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for name, seed in (("a.mp4", 1), ("b.mp4", 2)):
        picture = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for index in range(70 + 20 * seed):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * index, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        paths.append(str(folder / name))
    return tuple(paths)


@pytest.fixture
def warnings(monkeypatch):
    """What reading videos warns of while the test runs, in order."""
    from videoxl import video_decoding_videoxl, video_index_videoxl, video_processing_videoxl

    said = []
    for module in (video_processing_videoxl, video_decoding_videoxl, video_index_videoxl):
        monkeypatch.setattr(module.logger, "warning", lambda text, *_: said.append(text))
        monkeypatch.setattr(module.logger, "warning_once", lambda text, *_: said.append(text))
    return said
