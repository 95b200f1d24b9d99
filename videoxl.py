"""Makes a clone importable as the package `videoxl` that `pip install .` installs, wherever its root is on `sys.path`.

Programs in folders put the root there themselves; whoever runs `python cli.py` or `python -m videoxl.demo` has it.
"""

import sys
from importlib import util
from pathlib import Path

_root = Path(__file__).resolve().parent
_spec = util.spec_from_file_location("videoxl", _root / "__init__.py", submodule_search_locations=[str(_root)])
# The import that has led here gives what is in `sys.modules` when this file is through.
sys.modules["videoxl"] = util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["videoxl"])
