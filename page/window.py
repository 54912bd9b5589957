"""The window of `04_infer.py --draw`: drag a box on an image or a slice of a volume, and see its mask at once.

`draw_case` opens it and saves what it shows, in the files that step 4 writes of boxes given otherwise.
`BoxWindow` is what it shows and how it answers mouse and keys, on any matplotlib figure.

An object of a volume begins with one drag on one slice. Shift+drag on another slice gives the same object
a box there; the slices between two drawn boxes get the boxes in between, one after another while nothing
else is to be done.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.figure import Figure
from matplotlib.widgets import RectangleSelector

from figures import PALETTE, YELLOW, flat_view, overlay
from formats import InputError
from formats.case import Case
from formats.readers import read_case, window_of
from formats.results import OBJECT_COLUMNS, files_to_do, object_rows, save_label_map
from formats.writing import csv_text, save_image, save_json, save_text
from page.objects import TOO_SMALL, Drawn, Objects, box_of_drag
from segment import Segmenter

CLICK = 3  # pixels of the screen that the mouse may move in a click
PAUSE = 0.15  # seconds that a slice is looked at before it is embedded
TICK = 40  # milliseconds between two looks for work
SIZE = (10, 6.8)  # inches of 100 pixels: fits the screen of a small laptop
WINDOWS = ("macosx", "qtagg", "gtk4agg", "gtk3agg", "tkagg", "wxagg")  # matplotlib's window systems, in its own order
HINT = "Drag: new object · Shift+drag: its box again · Click: select · Right click: remove · U: undo · S: save"
HINT_3D = f"Wheel, ↑ ↓: slice, where shift+drag continues the object · {HINT}"


def draw_case(
    source: Path, folder: Path, read: list[str], load: Callable[[], Segmenter], arguments: dict
) -> list[dict]:
    """Show one case in a window until it is closed, and write its results whenever the window says save.

    source, folder: of the input and of the results.   read: see `readers.window_of`.
    load: makes the segmenter.   arguments: what arguments.json says of the run.
    Returns the case's name and number of objects, or nothing if nothing was saved.
    Raises InputError, one sentence, for no case, several, or where no window can be opened.
    """
    (path,) = files_to_do(source, folder, "--draw", with_boxes=False)
    case = read_case(path, window=window_of(read), labels=False, boxes=False)
    segmenter, saved = load(), []

    def save(drawn: Drawn) -> str:
        boxed, count = replace(case, boxes=drawn.boxes, label_names=None), len(drawn.boxes)
        names = save_label_map(folder, boxed, drawn.labels, path, PALETTE)
        names += [f"{case.name}_overlay.png", "objects.csv"]
        picture = overlay(*flat_view(case.image, drawn.labels, drawn.boxes), numbers=True)
        save_image(folder / f"{case.name}_overlay.png", picture)
        rows = object_rows(boxed, drawn, np.arange(1, count + 1), None)
        save_text(folder / "objects.csv", csv_text(rows, OBJECT_COLUMNS))
        save_json(folder / "arguments.json", arguments)
        saved[:] = [drawn]
        what = f"{count} object{'s' * (count > 1)}"
        print(f"04_infer.py: {what}, wrote {', '.join(names)} to {folder}")
        return f"Saved {what} in {folder}: {', '.join(names)}."

    drawn = draw_window(segmenter, case, save)
    if len(drawn.boxes) and not (saved and all(map(np.array_equal, saved[0], drawn))):
        print("04_infer.py: the window was closed without saving the last changes")
    return [{"case": case.name, "objects": len(one.boxes)} for one in saved]


def draw_window(segmenter: Segmenter, case: Case, save: Callable[[Drawn], str]) -> Drawn:
    """Show a case in a window until it is closed. -> what was drawn

    save: writes what was drawn, and returns the line that the window then shows.
    Raises InputError, one sentence, where no window can be opened.
    """
    plt = interactive_pyplot()
    with plt.rc_context({"toolbar": "None"}):
        figure = plt.figure(num=case.name, figsize=SIZE, dpi=100)
    canvas = figure.canvas
    canvas.mpl_disconnect(canvas.manager.key_press_handler_id)  # matplotlib's own keys: "s" would save the picture
    window = BoxWindow(figure, segmenter, case, save)
    timer = canvas.new_timer(interval=TICK, callbacks=[(window.tick, (), {})])
    canvas.mpl_connect("close_event", lambda event: timer.stop())
    timer.start()
    try:
        plt.show(block=True)
    finally:
        window.objects.worker.shutdown(cancel_futures=True)
    return window.objects.drawn(finish=False)


def interactive_pyplot():
    """matplotlib.pyplot with a window system. InputError if there is none."""
    import matplotlib.pyplot as plt  # only here: it keeps figures and a window system

    for name in WINDOWS:
        try:
            plt.switch_backend(name)
            return plt
        except ImportError:
            continue
    raise InputError(
        "no window can be opened: there is no screen (DISPLAY names none), or this Python has none of Qt, GTK, Tk and wx "
        "(pip install PyQt6 brings one); in Jupyter, notebooks/04_infer.ipynb does the same"
    )


def place_label(ax, box, text: str, colour):
    """A text above a box, or below one in the lower half, away from the image's middle, moved until it is inside."""
    left, high = box[0] + box[2] < sum(ax.get_xlim()), 2 * box[1] < sum(ax.get_ylim())
    x, y = box[2] + 0.5 if left else box[0] - 0.5, box[1] - 1 if high else box[3] + 1
    frame = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
    sides = {"ha": "right" if left else "left", "va": "bottom" if high else "top"}
    label = ax.text(x, y, text, fontsize=9, bbox=frame, **sides)
    drawn, room = label.get_window_extent().padded(3), ax.bbox
    shift = np.maximum(room.min - drawn.min, 0) - np.maximum(drawn.max - room.max, 0)
    label.set_position(ax.transData.inverted().transform(ax.transData.transform((x, y)) + shift))
    return label


class BoxWindow:
    """An image or a slice with what has been drawn on it, and its answers to mouse and keys. `draw_window` makes it real."""

    def __init__(self, figure: Figure, segmenter: Segmenter, case: Case, save: Callable[[Drawn], str]) -> None:
        self.objects, self.save, self.is_3d = Objects(segmenter, case), save, case.is_3d
        self.canvas = figure.canvas
        self.z = len(self.objects.slices) // 2  # the slice that is shown
        self.selected: int | None = None  # the object that shift continues
        self.moved = 0.0  # when the slice was last changed
        self.job: Future | None = None  # what `tick` gave the worker
        self.filling = False  # whether that is a slice between two drawn boxes
        figure.set_facecolor("0.15")
        rows, columns = self.objects.shape
        edge = 0.5 + 0.02 * max(rows, columns)  # a drag may begin beside the image
        self.ax = figure.add_axes((0, 0.05, 1, 0.88), facecolor="0.1", xticks=[], yticks=[])
        whole = (-0.5, columns - 0.5, rows - 0.5, -0.5)
        pixel_height, pixel_width = case.spacing_mm[1:] if case.spacing_mm else (1, 1)
        look = {"extent": whole, "aspect": pixel_height / pixel_width, "interpolation": "nearest"}
        self.picture = self.ax.imshow(np.zeros((1, 1, 3), np.uint8), **look)
        self.ax.set(xlim=(-edge, columns - 1 + edge), ylim=(rows - 1 + edge, -edge))
        self.ax.apply_aspect()
        self.message = figure.text(0.01, 0.965, "", color="white", va="center")
        figure.text(0.01, 0.024, HINT_3D if self.is_3d else HINT, color="0.8", fontsize=8, va="center")
        line = {"edgecolor": np.array(YELLOW) / 255, "fill": False, "linewidth": 1.2}
        unused = dict.fromkeys(("move", "clear", "square", "center", "rotate"), "not-applicable")  # shift is ours
        self.canvas.mpl_connect("button_press_event", self.on_press)  # both before the selector's own
        # a box ends where the mouse is released, however few moves were told before
        self.canvas.mpl_connect("button_release_event", lambda event: self.selector.onmove(event))
        how = {"useblit": True, "button": 1, "minspanx": -1, "minspany": -1, "props": line}
        self.selector = RectangleSelector(self.ax, self.on_drag, state_modifier_keys=unused, **how)
        self.canvas.mpl_connect("scroll_event", lambda event: self.go(round(event.step) or int(np.sign(event.step))))
        self.canvas.mpl_connect("key_press_event", self.on_key)
        self.show("Drag a box round an object.")

    def show(self, text: str, at_once: bool = False) -> None:
        """Draw the slice with its boxes and masks anew, and a line of text above it. at_once: before this returns."""
        place = f"Slice {self.z} (0 to {len(self.objects.slices) - 1}). " if self.is_3d else ""
        left = len(self.objects.missing())
        self.told = text
        self.message.set_text(place + text + (f" Slices between to do: {left}." if left else ""))
        self.message.set_fontsize(11 if len(self.message.get_text()) < 110 else 8)

        # at the size of the screen: large pictures take long
        image, labels = self.objects.slices[self.z], self.objects.labels_of(self.z)
        boxes = {number: boxes[self.z] for number, boxes in enumerate(self.objects.boxes) if self.z in boxes}
        factor = min(1.0, *(self.ax.bbox.size / self.objects.shape[::-1]))
        small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        labels = cv2.resize(labels, small.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        self.picture.set_data(overlay(small, labels, np.array(list(boxes.values())) * factor))
        for label in [*self.ax.texts]:
            label.remove()
        for number, box in boxes.items():
            _, iou = self.objects.masks.get((self.z, box), (None, None))
            colour = PALETTE[number % len(PALETTE)] / 255
            place_label(self.ax, box, f"{number + 1}" if iou is None else f"{number + 1}: {iou:.2f}", colour)
        self.canvas.draw() if at_once else self.canvas.draw_idle()

    def on_press(self, event: MouseEvent) -> None:
        """Left: hear of all moves until the release, also of those beside the image. Right: remove an object."""
        if event.inaxes is not self.ax:
            return
        if event.button == 1 and self.canvas.mouse_grabber is None:
            self.canvas.grab_mouse(self.ax)
        number = self.objects.object_at(self.z, event.xdata, event.ydata) if event.button == 3 else None
        if number is not None:
            self.objects.remove(number)
            self.selected = None
            self.show(f"Object {number + 1} removed; later ones have one number less. U brings it back.")

    def on_drag(self, press: MouseEvent, release: MouseEvent) -> None:
        """A drag has ended: find the mask of its box and show it."""
        self.canvas.release_mouse(self.ax)
        box, told = box_of_drag(press, release, self.objects.shape), TOO_SMALL
        if np.hypot(release.x - press.x, release.y - press.y) <= CLICK:
            self.selected = self.objects.object_at(self.z, press.xdata, press.ydata)
            told = "Drag a box round an object."
            if self.selected is not None:
                told = f"{self.told_of(self.selected)} Selected."
        elif box is not None:
            if self.selected is None or "shift" not in press.modifiers | release.modifiers:
                self.selected = len(self.objects.boxes)
            self.objects.add(self.selected, self.z, box)
            told = self.told_of(self.selected)
        self.show(told, at_once=True)

    def told_of(self, number: int) -> str:
        """The sentence about an object on this slice."""
        boxes = self.objects.boxes[number]
        through = f", slices {min(boxes)} to {max(boxes)}" if len(boxes) > 1 else ""
        _, iou = self.objects.masks.get((self.z, boxes[self.z]), (None, np.nan))  # nan: not found yet
        pixels = np.count_nonzero(self.objects.labels_of(self.z) == number + 1)
        return f"Object {number + 1}{through}: predicted IoU {iou:.2f}, {pixels} pixels{' here' * self.is_3d}."

    def on_key(self, event: KeyEvent) -> None:
        """Keys: slices, undo, save."""
        if event.key in ("up", "down"):
            self.go(1 if event.key == "up" else -1)
        elif event.key in ("u", "ctrl+z"):
            told = self.objects.undo()
            self.selected = len(self.objects.boxes) - 1 if self.objects.boxes else None
            self.show(told)
        elif event.key in ("s", "ctrl+s"):
            self.write()

    def go(self, steps: int) -> None:
        """Show the slice so many further, at most the first or the last one."""
        self.z = min(max(self.z + steps, 0), len(self.objects.slices) - 1)
        self.show("" if self.selected is None else f"Shift+drag continues object {self.selected + 1}.")
        self.moved = time.perf_counter()

    def write(self) -> None:
        """Save what has been drawn."""
        if not self.objects.boxes:
            return self.show("Nothing to save yet: drag a box first.")
        try:
            self.show(self.save(self.objects.drawn()))
        except (InputError, OSError) as error:  # a full disk should not cost the drawing
            self.show(f"Not saved: {error}")

    def tick(self) -> None:
        """Called again and again: give the worker its next job, the slice that is shown first, then slices between."""
        if self.job is not None:
            if not self.job.done():
                return
            job, self.job = self.job, None
            job.result()  # raises what went wrong
            if self.filling:
                self.show(self.told)
        self.filling = self.z in self.objects.embeddings
        if not self.filling:
            if time.perf_counter() - self.moved > PAUSE:
                self.job = self.objects.worker.submit(self.objects.embed_slice, self.z)
        elif missing := self.objects.missing():
            self.job = self.objects.worker.submit(self.objects.find, *missing[0])
