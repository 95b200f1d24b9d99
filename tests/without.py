"""Runs the tests in a copy of this environment that lacks one package: `python tests/without.py accelerate -q`.

The copy is a virtual environment of links, made for the run. A package that is merely hidden (by an import hook, say)
would still be found by those who ask the metadata. What requires the package goes with it, as pip would have it.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def dependents(name: str) -> set[str]:
    """The package, and the installed ones that need it, directly or not."""
    needs = {}
    for distribution in importlib.metadata.distributions():
        wanted = (line for line in distribution.requires or () if "extra ==" not in line)
        needs[canonical(distribution.metadata["Name"])] = {
            canonical(re.split(r"[\s<>=!~;\[(]", line)[0]) for line in wanted
        }
    found = {canonical(name)}
    while more := {other for other, wanted in needs.items() if wanted & found} - found:
        found |= more
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def copy_environment(folder: Path, left_out: set[str]) -> Path:
    """Makes a virtual environment of links to this one's packages, without some; returns its interpreter."""
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib"))
    hidden = {
        Path(file).parts[0]
        for name in left_out
        for file in importlib.metadata.distribution(name).files or ()
        if Path(file).parts[0] not in ("..", "__pycache__")
    }
    target = next((folder / "lib").glob("python*/site-packages"))
    for entry in site.iterdir():
        if entry.name not in hidden and entry.suffix != ".pth" and entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def main(arguments: list[str]) -> int:
    """Runs pytest; returns its exit status."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        importlib.metadata.distribution(arguments[0])
    except importlib.metadata.PackageNotFoundError:
        print(f"{arguments[0]} is not installed: the tests run without it anyway", file=sys.stderr)
        return 2
    left_out = dependents(arguments[0])
    with tempfile.TemporaryDirectory() as folder:
        python = copy_environment(Path(folder), left_out)
        print(f"without {', '.join(sorted(left_out))}", flush=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run([python, "-m", "pytest", *arguments[1:]], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
