"""Run notebooks and their solutions from top to bottom, and write their outputs into them: python -m notebooks

python -m notebooks                  all of them, one after the other
python -m notebooks 03 05 --small    these two, with the switch SMALL on; nothing is written
"""

import argparse
import base64
import io
import re
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
from jinja2 import DictLoader
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from PIL import Image

from formats.writing import save_image, save_text

FOLDER = Path(__file__).parent
SWITCH = re.compile(r"^SMALL = False", re.MULTILINE)
LARGEST = 1_500_000  # bytes of a notebook with its outputs, so that it reads well where it is hosted
SLOWEST = 600  # seconds a cell may take

BEST = {  # the picture that README shows of each notebook: how its text begins
    "01_preprocess": "Six views",
    "02_train": "Figure 1 as boxes",
    "03_quantize": "Speed-ups",
    "04_infer": "Figure 3",
    "05_evaluate": "DSC and NSD of box",
    "06_paper_vs_code": "Change of DSC and NSD with",
    "07_fork": "NSD of five",
}
THUMBNAIL = 360  # pixels of its longer side


def list_notebooks(wanted: list[str]) -> list[Path]:
    paths = sorted(FOLDER.glob("[0-9]*.ipynb")) + sorted((FOLDER / "solutions").glob("[0-9]*.ipynb"))
    return [path for path in paths if not wanted or any(path.name.startswith(word) for word in wanted)]


def execute(path: Path, small: bool) -> tuple[str, float]:
    """Run one notebook. -> its text with outputs, seconds. The kernel starts in the notebook's folder, as Jupyter does."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells if small else ():
        cell.source = SWITCH.sub("SMALL = True", cell.source)
    start = time.perf_counter()
    place = {"metadata": {"path": path.parent}}
    client = NotebookClient(notebook, timeout=SLOWEST, kernel_name="python3", resources=place)
    # else it warns of its unencrypted socket, which does not leave this computer
    client.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
    client.execute()
    seconds = time.perf_counter() - start
    # what changes from run to run, or holds this computer's versions, is left out
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
    return nbformat.writes(notebook) + "\n", seconds


def write_picture(path: Path, text: str) -> None:
    """README's picture of a notebook, small, into assets/notebooks."""
    cells = nbformat.reads(text, as_version=4).cells
    shown = [out for cell in cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    pictures = [out.data["image/png"] for out in shown if out.metadata["image/png"]["alt"].startswith(BEST[path.stem])]
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    save_image(FOLDER.parent / "assets" / "notebooks" / f"{path.stem[:2]}.png", np.asarray(picture))


# nbconvert's page for JupyterLab's look leaves out the texts for readers who cannot see a picture; this puts them in
TEMPLATE = """{% extends "lab/index.html.j2" %}
{% block data_png scoped %}<div class="jp-RenderedImage jp-OutputArea-output">
<img src="data:image/png;base64,{{ output.data["image/png"] }}" alt="{{ output.metadata["image/png"]["alt"] | escape_html }}">
</div>{% endblock %}"""


def write_page(path: Path, folder: Path) -> Path:
    """A notebook with its stored outputs as one HTML file. The links between notebooks lead from page to page."""
    exporter = HTMLExporter(extra_loaders=[DictLoader({"page.html.j2": TEMPLATE})], template_file="page.html.j2")
    text, _ = exporter.from_filename(str(path))
    target = folder / path.relative_to(FOLDER).with_suffix(".html")
    save_text(target, text.replace('.ipynb"', '.html"'))
    return target


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m notebooks", description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", help="how the file names begin, 03 for example; default: all")
    p.add_argument("--check", action="store_true", help="run only, write nothing")
    p.add_argument("--small", action="store_true", help="with SMALL = True, a quick try; writes nothing")
    p.add_argument("--html", type=Path, metavar="FOLDER", help="write web pages there; runs nothing")
    args = p.parse_args(argv)
    paths, total = list_notebooks(args.names), 0.0
    if not paths:
        sys.exit(f"notebooks: no file in {FOLDER} begins with {' or '.join(args.names)}; see --help")
    if args.html:
        print(*(write_page(path, args.html) for path in paths), sep="\n")
        return
    for path in paths:
        name = path.relative_to(FOLDER)
        try:
            text, seconds = execute(path, args.small)
        except CellExecutionError as error:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without the colours of a terminal
            sys.exit(f"notebooks: {name} stopped.\n{plain}")
        if len(text) > LARGEST:
            sys.exit(
                f"notebooks: {name} would have {len(text):,} bytes, {LARGEST:,} are allowed; make its pictures smaller"
            )
        if not (args.check or args.small):
            save_text(path, text)
            if path.parent == FOLDER:
                write_picture(path, text)
        total += seconds
        print(f"{seconds:6.1f} s  {len(text) / 1e3:7.0f} kB  {name}", flush=True)
    print(f"{total:6.1f} s  in all")


if __name__ == "__main__":
    main()
