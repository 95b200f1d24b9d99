"""Executes a notebook with this Python and saves it with its outputs: `make notebook`.

What is surprising:
* The kernel starts in the notebook's own folder, as it does when the notebook is opened there.
* Nothing else of the run is saved: no times of cells, no version of Python.
* Where nothing but measured seconds has changed, the notebook stays as it is: running it makes no difference to git.

    python notebooks/execute.py notebooks/quickstart.ipynb [--out OTHER.ipynb]
"""

import argparse
import copy
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# Seconds that a cell may take.
CELL_TIMEOUT = 600
# What was measured, in outputs: "1.2 s", "[31 ms]".
MEASURED = re.compile(r"\d[\d.,]*(?= m?s\b)")


def execute(source: Path, target: Path) -> None:
    """Executes the notebook `source` and writes it to `target`; an error in a cell is raised, and nothing written."""
    notebook = nbformat.read(source, as_version=4)
    before = without_measurements(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # Bars of loading, and that they could be prettier, would be saved as text.
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    where = {"metadata": {"path": str(source.resolve().parent)}}
    NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", record_timing=False, resources=where
    ).execute()
    notebook.metadata.get("language_info", {}).pop("version", None)
    if source.resolve() == target.resolve() and without_measurements(notebook) == before:
        return
    target.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def without_measurements(notebook) -> list:
    """All cells, without the seconds that their outputs tell."""
    cells = copy.deepcopy(notebook.cells)
    for cell in cells:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                output["text"] = MEASURED.sub("0", output["text"])
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, help="where to save it (default: in place)")
    options = parser.parse_args()
    if not options.notebook.is_file():
        parser.error(f"{options.notebook}: no such notebook")
    execute(options.notebook, options.out or options.notebook)


if __name__ == "__main__":
    main()
