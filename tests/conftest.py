"""Fixtures shared by all tests.

The flat root is imported as a package `videoxl`, so that `from videoxl import sparse_attention` and the relative imports
between the remote files work without installing anything.
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
