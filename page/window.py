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
from contourpy import contour_generator
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.widgets import Button, RectangleSelector

from figures import PALETTE, YELLOW, flat_view, overlay
from formats import InputError
from formats.case import Case
from formats.readers import read_case, window_of
from formats.results import OBJECT_COLUMNS, files_to_do, object_rows, save_label_map
from formats.writing import csv_text, save_image, save_json, save_text
from page.objects import TOO_SMALL, Drawn, Objects, box_of_drag
from segment import Segmenter

CLICK = 3  # pixels of the screen that the mouse may move in a click
ROOMY = 45  # pixels of the screen: smaller objects have their number alone beside them
CLOSEST = 4  # pixels of the image that stay in view
PAUSE = 0.15  # seconds that a slice is looked at before it is embedded
TICK = 40  # milliseconds between two looks for work
SIZE = (10, 6.8)  # inches of 100 pixels: fits the screen of a small laptop
WINDOWS = ("macosx", "qtagg", "gtk4agg", "gtk3agg", "tkagg", "wxagg")  # matplotlib's window systems, in its own order
BOX = tuple(np.array(YELLOW) / 255)
HINT = "Drag: new object · Shift+drag: its box again · Click: select · Right click: remove · U: undo · Wheel: zoom · S: save"
HINT_3D = (
    "Wheel, ↑ ↓: slice · Drag: new object · Shift+drag on another slice: same object, slices between follow · "
    "Click: select · Right click: remove · U: undo · + −: zoom · S: save"
)


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
    case = replace(case, boxes_are=arguments["boxes"] or "drawn")

    def save(drawn: Drawn) -> str:
        boxed, count = replace(case, boxes=drawn.boxes, label_names=None), len(drawn.boxes)
        names = save_label_map(folder, boxed, drawn.labels, path, PALETTE)
        names += [f"{case.name}_overlay.png", "objects.csv"]
        picture = overlay(*flat_view(case.image, drawn.labels, drawn.boxes), numbers=True)
        save_image(folder / f"{case.name}_overlay.png", picture)
        rows = object_rows(boxed, drawn, np.arange(1, count + 1), None)
        save_text(folder / "objects.csv", csv_text(rows, OBJECT_COLUMNS))
        save_json(folder / "arguments.json", arguments | {"preset_fields": vars(segmenter.preset)})
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
    """matplotlib.pyplot with a window system, the one that is set if it has windows. InputError if there is none."""
    import matplotlib
    import matplotlib.pyplot as plt  # only here: it keeps figures and a window system

    chosen, reasons = (matplotlib.get_backend(auto_select=False) or "").lower(), []
    for name in sorted(WINDOWS, key=lambda name: name != chosen):
        try:
            plt.switch_backend(name)
            return plt
        except ImportError as error:
            reasons.append(str(error))
    found = "matplotlib finds none of Qt, GTK, Tk or wx in this Python (pip install PyQt6 brings one)"
    if any("headless" in reason for reason in reasons):
        found = "this computer has no screen, or DISPLAY does not name it"
    raise InputError(f"no window can be opened: {found}; in Jupyter, notebooks/04_infer.ipynb does the same")


def place_label(ax, box, text: str, colour, size: float = 9):
    """A text above a box, or below one in the lower half, away from the image's middle, moved until it is inside."""
    left, high = box[0] + box[2] < sum(ax.get_xlim()), 2 * box[1] < sum(ax.get_ylim())
    label = ax.text(
        box[2] + 0.5 if left else box[0] - 0.5, box[1] - 1 if high else box[3] + 1, text, fontsize=size,
        ha="right" if left else "left", va="bottom" if high else "top",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": size / 6},
    )  # fmt: skip
    drawn, room, place = label.get_window_extent().padded(3), ax.bbox, label.get_position()
    shift = np.maximum(room.min - drawn.min, 0) - np.maximum(drawn.max - room.max, 0)
    label.set_position(ax.transData.inverted().transform(ax.transData.transform(place) + shift))
    return label


def outline_of(labels: np.ndarray, label: int, rows: slice, columns: slice, step: int = 1) -> Outline | None:
    """The border of an object on a label map (H, W), along its pixels' borders. rows, columns: where it may be.

    step: looks at each step-th pixel, for large pictures whose pixels are smaller than those of the screen.
    """
    mask = np.pad((labels[rows, columns][::step, ::step] == label).astype(np.float32), 1)
    x = columns.start + step * (np.arange(mask.shape[1]) - 1) + (step - 1) / 2  # a pixel's centre has whole coordinates
    y = rows.start + step * (np.arange(mask.shape[0]) - 1) + (step - 1) / 2
    lines = contour_generator(x, y, mask).lines(0.5)
    return Outline.make_compound_path(*(Outline(line, closed=True) for line in lines)) if lines else None


class BoxWindow:
    """An image or a slice with what has been drawn on it, and its answers to mouse and keys. `draw_window` makes it real."""

    def __init__(self, figure: Figure, segmenter: Segmenter, case: Case, save: Callable[[Drawn], str]) -> None:
        self.objects, self.save, self.is_3d = Objects(segmenter, case), save, case.is_3d
        self.canvas, self.artists = figure.canvas, []
        self.z = len(self.objects.slices) // 2  # the slice that is shown
        self.selected: int | None = None  # the object that shift continues
        self.moved = 0.0  # when the slice was last changed
        self.job: Future | None = None  # what `tick` gave the worker
        self.filling = False  # whether that is a slice between two drawn boxes
        figure.set_facecolor("0.15")
        self.ax = figure.add_axes((0, 0.05, 1, 0.88), facecolor="0.1", xticks=[], yticks=[])
        rows, columns = self.objects.shape
        self.picture = self.ax.imshow(
            self.objects.slices[self.z], cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="nearest"
        )
        self.pixel = case.spacing_mm[1:] if case.spacing_mm else (1, 1)  # its height and width
        edge = 0.5 + 0.02 * max(rows, columns)  # a drag may begin beside the image
        self.whole = np.array([(-edge, columns - 1 + edge), (rows - 1 + edge, -edge)])
        self.view(self.whole)
        self.message = figure.text(0.01, 0.965, "", color="white", fontsize=11, va="center")
        figure.text(0.01, 0.024, HINT_3D if self.is_3d else HINT, color="0.8", fontsize=8, va="center")
        line = {"edgecolor": BOX, "fill": False, "linewidth": 1.2}
        unused = dict.fromkeys(("move", "clear", "square", "center", "rotate"), "not-applicable")  # shift is ours
        self.canvas.mpl_connect("button_press_event", self.on_press)  # both before the selector's own
        # a box ends where the mouse is released, however few moves were told before
        self.canvas.mpl_connect("button_release_event", lambda event: self.selector.onmove(event))
        self.selector = RectangleSelector(
            self.ax, self.on_drag, useblit=True, button=1, minspanx=-1, minspany=-1, props=line, state_modifier_keys=unused
        )  # fmt: skip
        self.buttons = []  # kept here: a button that nothing refers to is thrown away
        for left, text, action in ((0.83, "Undo", self.undo), (0.915, "Save", self.write)):
            place = figure.add_axes((left, 0.943, 0.075, 0.045))
            self.buttons.append(Button(place, text, color="0.85", hovercolor="0.95"))
            self.buttons[-1].on_clicked(lambda event, action=action: action())
        self.canvas.mpl_connect("scroll_event", self.on_scroll)
        self.canvas.mpl_connect("key_press_event", self.on_key)
        self.canvas.mpl_connect("resize_event", self.on_resize)
        self.show("Drag a box round an object.")

    def show(self, text: str, at_once: bool = False) -> None:
        """Draw the slice with its boxes and masks anew, and a line of text above it. at_once: before this returns."""
        place = f"Slice {self.z} (0 to {len(self.objects.slices) - 1}). " if self.is_3d else ""
        left = len(self.objects.missing())
        self.told = text
        self.message.set_text(place + text + (f" Slices between to do: {left}." if left else ""))
        self.message.set_fontsize(11 if len(self.message.get_text()) < 110 else 8)  # the buttons are beside it
        while self.artists:
            self.artists.pop().remove()
        labels = self.objects.labels_of(self.z)
        for number, boxes in enumerate(self.objects.boxes):
            if self.z in boxes:
                self.show_object(number, boxes[self.z], labels)
        self.canvas.draw() if at_once else self.canvas.draw_idle()

    def show_slice(self) -> None:
        """The part of the slice that is in view, made small once here and not at each drawing: large pictures take long."""
        (x0, x1), (y1, y0) = self.ax.get_xlim(), self.ax.get_ylim()
        ends = np.clip(np.round([(x0, y0), (x1 + 1, y1 + 1)]).astype(int), 0, self.objects.shape[::-1])
        (x0, y0), (x1, y1) = ends
        part = self.objects.slices[self.z][y0:y1, x0:x1]
        if part.size == 0:  # the view lies beside the image
            return
        factor = min(1.0, *(self.ax.bbox.size / part.shape[1::-1]))
        self.picture.set_data(cv2.resize(part, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))
        self.picture.set_extent((x0 - 0.5, x1 - 0.5, y1 - 0.5, y0 - 0.5))

    def show_object(self, number: int, box: tuple, labels: np.ndarray) -> None:
        """A box, its mask's outline and its number, thin and small for a small object."""
        colour = tuple(PALETTE[number % len(PALETTE)] / 255)
        x0, y0, x1, y1 = box
        corners = self.ax.transData.transform([(x0 - 0.5, y1 + 0.5), (x1 + 0.5, y0 - 0.5)])  # pixels of the screen
        if (corners[1] < self.ax.bbox.min).any() or (corners[0] > self.ax.bbox.max).any():
            return  # outside the view: its label would be moved inside
        size = np.sqrt(np.prod(corners[1] - corners[0]))
        width = np.clip(size / 70, 0.6, 1.6) * (1.5 if number == self.selected else 1)
        dashes = "--" if self.objects.is_between(number, self.z) else "-"
        edge = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, ec=BOX, lw=0.7 * width, ls=dashes)
        self.artists.append(self.ax.add_artist(edge))
        text = f"{number + 1}"
        roomy = size > ROOMY or number == self.selected
        if (self.z, box) in self.objects.masks:
            (_, rows, columns), iou = self.objects.masks[self.z, box]
            text += f": {iou:.2f}" if roomy else ""
            step = max(1, int((x1 - x0 + 1) / (corners[1] - corners[0])[0]))  # pixels of the image in one of the screen
            outline = outline_of(labels, number + 1, rows, columns, step)
            if outline is not None:
                self.artists.append(self.ax.add_artist(PathPatch(outline, fc=(*colour, 0.3), ec=colour, lw=width)))
        self.artists.append(place_label(self.ax, box, text, colour, float(np.clip(size / 10, 6, 9))))
        self.artists[-1].set(clip_on=True, color="white" if np.dot(colour, (0.3, 0.6, 0.1)) < 0.4 else "black")

    def view(self, limits: np.ndarray) -> None:
        """Show all between limits ((left, right), (bottom, top)), and what else fits into the window."""
        self.limits, (width, height) = limits, self.ax.bbox.size
        middle, size = limits.mean(axis=1), np.abs(np.diff(limits)[:, 0]) * self.pixel[::-1]  # mm
        reach = max(size / (width, height)) * np.array([width, -height]) / self.pixel[::-1] / 2  # y runs down
        self.ax.set(xlim=middle[0] + reach[0] * np.array([-1, 1]), ylim=middle[1] + reach[1] * np.array([-1, 1]))
        self.show_slice()

    def zoom(self, event, factor: float) -> None:
        """Make the view `factor` times as wide round the mouse, at most the whole image."""
        limits = np.array([self.ax.get_xlim(), self.ax.get_ylim()])
        middle = limits.mean(axis=1, keepdims=True)
        if event.inaxes is self.ax:
            middle = np.array([[event.xdata], [event.ydata]])
        limits = middle + factor * (limits - middle)
        sides = np.abs(np.diff(limits))
        if sides.min() > CLOSEST:
            self.view(self.whole if (sides >= np.abs(np.diff(self.whole))).all() else limits)
            self.show(self.told)

    def on_resize(self, event) -> None:
        """Another size of the window."""
        self.view(self.limits)
        self.show(self.told)

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
        box = box_of_drag(press, release, self.objects.shape)
        if np.hypot(release.x - press.x, release.y - press.y) <= CLICK:
            self.selected = self.objects.object_at(self.z, press.xdata, press.ydata)
            told = (
                "Drag a box round an object." if self.selected is None else f"{self.told_of(self.selected)} Selected."
            )
        elif box is None:
            told = TOO_SMALL
        else:
            again = "shift" in press.modifiers | release.modifiers and self.selected is not None
            self.selected = self.selected if again else len(self.objects.boxes)
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

    def on_scroll(self, event: MouseEvent) -> None:
        """The wheel: another slice, or in a picture a closer look."""
        if self.is_3d:
            self.go(round(event.step) or int(np.sign(event.step)))
        else:
            self.zoom(event, 0.8**event.step)

    def on_key(self, event: KeyEvent) -> None:
        """Keys: slices, zoom, undo, save."""
        steps = {"up": 1, "down": -1, "pageup": 10, "pagedown": -10}
        if event.key in steps:
            self.go(steps[event.key])
        elif event.key in ("+", "=", "-"):
            self.zoom(event, 1.25 if event.key == "-" else 0.8)
        elif event.key in ("u", "ctrl+z", "cmd+z", "backspace"):
            self.undo()
        elif event.key in ("s", "ctrl+s", "cmd+s"):
            self.write()

    def go(self, steps: int) -> None:
        """Show the slice so many further, at most the first or the last one."""
        self.z = min(max(self.z + steps, 0), len(self.objects.slices) - 1)
        self.moved = time.perf_counter()
        self.show_slice()
        self.show("" if self.selected is None else f"Shift+drag continues object {self.selected + 1}.")

    def undo(self) -> None:
        """Take the last drag or removal back."""
        told = self.objects.undo()
        self.selected = len(self.objects.boxes) - 1 if self.objects.boxes else None
        self.show(told)

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
        if self.job is not None and not self.job.done():
            return
        if self.job is not None:
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
