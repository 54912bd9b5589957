"""The window of `04_infer.py --draw` with the files that it saves: the same as of boxes that were given otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from figures import PALETTE, flat_view, overlay
from files.case import Case
from files.results import OBJECT_COLUMNS, object_rows, save_label_map
from files.writing import csv_text, save_image, save_text
from segment import Segmenter
from views.objects import Drawn
from views.window import draw_window


def draw_and_save(segmenter: Segmenter, case: Case, path: Path, folder: Path) -> list[dict]:
    """Show a case in a window until it is closed. -> rows of objects.csv, as last saved; none if nothing was saved

    path: the file of the case.   folder: of the results, made if it is missing.
    Raises InputError, one sentence, where no window can be opened.
    """
    saved, rows = [], []

    def save(drawn: Drawn) -> str:
        boxed, objects = replace(case, boxes=drawn.boxes, label_names=None), len(drawn.boxes)
        names = save_label_map(folder, boxed, drawn.labels, path, PALETTE)
        names += [f"{case.name}_overlay.png", "objects.csv"]
        view = flat_view(case.image, drawn.labels, drawn.boxes)
        save_image(folder / f"{case.name}_overlay.png", overlay(*view, numbers=True))
        own = np.bincount(drawn.labels.ravel(), minlength=objects + 1)[1:]
        rows[:] = object_rows(boxed, drawn.labels, np.arange(1, objects + 1), drawn.iou, own, None)
        save_text(folder / "objects.csv", csv_text(rows, OBJECT_COLUMNS))
        saved[:] = [drawn]
        what = f"{objects} object{'s' * (objects > 1)}"
        print(f"04_infer.py: {what}, wrote {', '.join(names)} to {folder}")
        return f"Saved {what} in {folder}: {', '.join(names)}."

    drawn = draw_window(segmenter, case, save)
    if len(drawn.boxes) and not (saved and all(map(np.array_equal, saved[0], drawn))):
        print("04_infer.py: the window was closed without saving the last changes")
    return rows
