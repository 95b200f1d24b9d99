"""Fixtures shared by all tests.

The flat root is imported as a package `videoxl`, so that `from videoxl import sparse_attention` and the relative
imports between the remote files work without installing anything.
"""

import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_package = types.ModuleType("videoxl")
_package.__path__ = [str(ROOT)]
sys.modules.setdefault("videoxl", _package)


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


@pytest.fixture(scope="session")
def bundle(root):
    """The bundled checkpoint as users load it: (model, tokenizer, processor)."""
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    model = AutoModel.from_pretrained(root, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=True)
    return model, tokenizer, AutoProcessor.from_pretrained(root, trust_remote_code=True)


@pytest.fixture
def model(bundle):
    """The bundled model; whatever a test sets on its config is undone."""
    model = bundle[0]
    before = dict(model.config.__dict__)
    yield model
    model.config.__dict__.clear()
    model.config.__dict__.update(before)
    model.eval()


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
