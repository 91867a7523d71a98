"""Run the tutorials and store their outputs in them.

    python docs/tutorials/execute.py [PATH.ipynb ...]

Without paths, all of them. They run on one thread, so that the numbers depend less on
the machine. What the cells print and draw is stored, without times and without the
version of Python.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def execute(path: Path) -> None:
    """Run one notebook in a process of its own; if a cell fails, the file is kept."""
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    NotebookClient(
        notebook, kernel_name="python3", record_timing=False, coalesce_streams=True
    ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in sys.argv[1:] or sorted(Path(__file__).parent.glob("*.ipynb")):
        execute(Path(name))
        print(name)
