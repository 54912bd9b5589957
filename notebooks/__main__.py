"""Run the notebooks, and make those to be worked through from the solved ones: python -m notebooks

python -m notebooks                  all of them, one after the other
python -m notebooks 03 05 --check    these two, and nothing is written

notebooks/solutions/NAME.ipynb is the source, kept without outputs. It is run, and written as notebooks/NAME.ipynb with
its outputs; there `...  # your code` stands for the lines between `# begin solution` and `# end solution`. The cell after
an exercise begins with `# Check`. It must pass where the exercise is solved and fail where it is not.
"""

import argparse
import base64
import copy
import io
import re
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from formats.writing import save_image, save_text

FOLDER = Path(__file__).parent
SOLUTION = re.compile(r"^( *)# begin solution\n.*?^ *# end solution$", re.MULTILINE | re.DOTALL)
SLOWEST = 600  # seconds a cell may take
THUMBNAIL = 360  # pixels of the longer side of README's picture of a notebook, which is the notebook's first


def list_solved(wanted: list[str]) -> list[Path]:
    """Sources of the notebooks whose names begin with one of these words, or of all."""
    paths = sorted((FOLDER / "solutions").glob("[0-9]*.ipynb"))
    return [path for path in paths if not wanted or any(path.name.startswith(word) for word in wanted)]


def is_check(cell) -> bool:
    return cell.cell_type == "code" and cell.source.startswith("# Check")


def blank(cell):
    """A cell of a solved notebook as who works through it finds it: the solution is left out, and so are its outputs."""
    cell = copy.deepcopy(cell)
    if cell.cell_type == "code" and (SOLUTION.search(cell.source) or is_check(cell)):
        cell.source = SOLUTION.sub(r"\1...  # your code", cell.source)
        cell.outputs, cell.execution_count = [], None
    return cell


def with_blanks(cells: list) -> list:
    """The cells to be run: each exercise once more in front of itself, blank, with its check, which has to fail there."""
    run, start = [], None
    for i, cell in enumerate(cells):
        if is_check(cell):
            start = next(k for k in range(i, -1, -1) if SOLUTION.search(cells[k].source))
            trial = [blank(one) for one in cells[start : i + 1] if one.cell_type == "code"]
            for one in trial:
                one.metadata = {"tags": ["raises-exception"], "trial": True}
            run = run[: len(run) - (i - start)] + trial + cells[start:i]
        run.append(cell)
    return run


def run_notebook(path: Path) -> tuple[str, float]:
    """Run a solved notebook. -> the text of the one to be worked through, with outputs; seconds

    The kernel starts in the folder of the notebooks, as Jupyter does. Or CellExecutionError, or ValueError for a check
    that passes on a blank exercise.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = with_blanks(notebook.cells)
    start = time.perf_counter()
    place = {"metadata": {"path": FOLDER}}
    client = NotebookClient(notebook, timeout=SLOWEST, startup_timeout=SLOWEST, kernel_name="python3", resources=place)
    # else it warns of its unencrypted socket, which does not leave this computer
    client.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
    client.execute()
    seconds = time.perf_counter() - start
    for cell in notebook.cells:
        if "trial" in cell.metadata and is_check(cell):
            errors = [output.ename for output in cell.outputs if output.output_type == "error"]
            if errors in ([], ["NameError"]):
                found = errors[0] if errors else "nothing"
                raise ValueError(f"this check says {found} where the exercise is blank:\n{cell.source}")
    # what changes from run to run, or holds this computer's versions, is left out
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook.cells = [blank(cell) for cell in notebook.cells if "trial" not in cell.metadata]
    for i, cell in enumerate(notebook.cells):
        # the answer to a guess is folded where a notebook is only read
        cell.id, cell.metadata = f"cell-{i}", {"jupyter": {"outputs_hidden": True}} if "off_by(" in cell.source else {}
        if cell.cell_type == "code" and cell.outputs:
            cell.execution_count = 1 + sum(one.cell_type == "code" for one in notebook.cells[:i])
    return nbformat.writes(notebook) + "\n", seconds


def write_picture(name: str, text: str) -> None:
    """README's picture of a notebook, small, into assets/notebooks."""
    cells = nbformat.reads(text, as_version=4).cells
    shown = [out for cell in cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    picture = Image.open(io.BytesIO(base64.b64decode(shown[0].data["image/png"]))).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    save_image(FOLDER.parent / "assets" / "notebooks" / f"{name[:2]}.png", np.asarray(picture))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m notebooks", description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", help="how the file names begin, 03 for example; default: all")
    p.add_argument("--check", action="store_true", help="run only, write nothing")
    args = p.parse_args(argv)
    paths, total = list_solved(args.names), 0.0
    if not paths:
        sys.exit(f"notebooks: no file in {FOLDER} begins with {' or '.join(args.names)}; see --help")
    for path in paths:
        try:
            text, seconds = run_notebook(path)
        except (CellExecutionError, ValueError) as error:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without the colours of a terminal
            sys.exit(f"notebooks: {path.name} stopped.\n{plain}")
        if not args.check:
            save_text(FOLDER / path.name, text)
            write_picture(path.stem, text)
        total += seconds
        print(f"{seconds:6.1f} s  {len(text) / 1e3:7.0f} kB  {path.name}", flush=True)
    print(f"{total:6.1f} s  in all")


if __name__ == "__main__":
    main()
