"""page/ with a mouse that matplotlib is told of, 04_infer.py --draw, and at the end the real window with a real mouse."""

import csv
import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_model import BrightModel
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from demo_data import tiny_case
from formats import InputError
from formats.case import Case
from formats.npz import write_case
from formats.writing import save_image
from page import objects
from page.objects import TOO_SMALL, Drag, Drawn, boxes_by_slice
from page.window import HINT, HINT_3D, SIZE, BoxWindow, interactive_pyplot, outline_of
from presets import PRESETS
from segment import Segmenter, load

ROOT = Path(__file__).parent.parent
infer = importlib.import_module("04_infer")
SMALL, BIG = [10, 12, 29, 31], [57, 16, 93, 54]


def fake():
    return Segmenter(BrightModel(), PRESETS["fixed"], enhanced=False)


def squares(depth=None):
    """Two bright squares on a dark ground, (60, 100), in 3D the same on each slice."""
    picture = np.full((60, 100), 20, np.uint8)
    picture[14:30, 12:28] = picture[20:50, 60:90] = 220
    image = picture if depth is None else np.stack([picture] * depth)
    return Case("squares", image, None, None, None if depth is None else (5.0, 1.0, 1.0), depth is not None)


def window_of(case, save=lambda drawn: "Saved."):
    figure = Figure(figsize=SIZE, dpi=100)
    FigureCanvasAgg(figure)
    made = BoxWindow(figure, fake(), case, save)
    made.canvas.draw()
    return made


@pytest.fixture
def flat():
    return window_of(squares())


@pytest.fixture
def deep():
    return window_of(squares(depth=9))


def tell(window, kind, x, y, **more):
    place = window.ax.transData.transform((x, y))
    MouseEvent(f"{kind}_event", window.canvas, *place, **more)._process()


def drag(window, start, end, modifiers=()):
    tell(window, "button_press", *start, button=1, modifiers=modifiers)
    for part in (0.3, 0.7, 1):
        at = np.array(start) + part * (np.array(end) - start)
        tell(window, "motion_notify", *at, buttons={1}, modifiers=modifiers)
    tell(window, "button_release", *end, button=1, modifiers=modifiers)


def box(window, sides, modifiers=()):
    drag(window, sides[:2], sides[2:], modifiers)


def key(window, name):
    KeyEvent("key_press_event", window.canvas, name, 10, 10)._process()


def wheel(window, step):
    tell(window, "scroll", 50, 30, step=step)


def work(window):
    """What the timer of a real window does, until nothing is left to do."""
    window.moved = 0.0
    window.tick()
    while window.job is not None:
        window.job.result()
        window.tick()


def said(window):
    return window.message.get_text()


def texts(window):
    return [artist.get_text() for artist in window.artists if hasattr(artist, "get_text")]


def is_big(case):
    return (case.image > 100) & (np.arange(100) > 40)


# ---------------------------------------------------------------- boxes and masks


@pytest.mark.parametrize("start, end", [((57, 16), (93, 54)), ((93, 54), (57, 16)), ((57, 54), (93, 16))])
def test_a_drag_in_any_direction_is_a_box_of_the_pixels_that_it_touched(flat, start, end):
    drag(flat, start, end)
    drawn = flat.objects.drawn()
    assert drawn.boxes.tolist() == [BIG] and drawn.boxes.dtype == np.float64
    assert drawn.labels.dtype == np.uint16 and drawn.labels.shape == (60, 100)
    assert ((drawn.labels == 1) == is_big(squares())).all()
    assert drawn.iou.dtype == np.float32 and texts(flat) == [f"1: {drawn.iou[0]:.2f}"]
    assert f"Object 1: predicted IoU {drawn.iou[0]:.2f}, 900 pixels" in said(flat)


def test_several_boxes_are_several_objects_with_the_label_map_that_segment_gives(flat):
    whole = [5, 5, 97, 57]  # overlaps the others
    for sides in (SMALL, BIG, whole):
        box(flat, sides)
    segmenter, image = fake(), squares().image
    found = segmenter.masks(segmenter.embed(image), np.array([SMALL, BIG, whole], float), image.shape)
    drawn = flat.objects.drawn()
    assert (drawn.labels == found.labels).all() and len(np.unique(drawn.labels)) > 2
    assert drawn.iou.tolist() == found.iou.tolist() and drawn.boxes.tolist() == [SMALL, BIG, whole]
    assert [text[:2] for text in texts(flat)] == ["1:", "2:", "3:"]


def test_an_image_is_embedded_once_and_a_box_is_decoded_once(flat):
    work(flat)
    for sides in (SMALL, BIG, SMALL):
        box(flat, sides)
    flat.objects.drawn()
    engine = flat.objects.segmenter.engine
    assert (engine.encoded, engine.decoded) == (1, 2)


def test_a_drag_that_leaves_the_image_or_the_view_is_cut(flat):
    drag(flat, (-2, -2), (101.9, 61.9))
    drag(flat, (50, 10), (400, 30))
    tell(flat, "button_press", 50, 10, button=1)
    tell(flat, "button_release", -400, 300, button=1)  # so quick that no move is told
    assert flat.objects.drawn().boxes.tolist() == [[0, 0, 99, 59], [50, 10, 99, 30], [0, 10, 50, 59]]
    assert flat.canvas.mouse_grabber is None, "the mouse is free again, for the buttons"


@pytest.mark.parametrize("start, end", [((20, 20), (21.5, 40)), ((20, 20), (50, 21)), ((-2, 5), (-1, 50))])
def test_a_tiny_drag_gives_a_sentence_and_no_object(flat, start, end):
    drag(flat, start, end)
    assert said(flat) == TOO_SMALL and len(flat.objects.drawn().boxes) == 0
    drag(flat, (20, 20), (22, 22))
    assert flat.objects.drawn().boxes.tolist() == [[20, 20, 22, 22]]


def test_shift_gives_the_selected_object_another_box_and_a_click_selects(flat):
    box(flat, [9, 10, 20, 20])
    box(flat, SMALL, {"shift"})
    assert flat.objects.drawn().boxes.tolist() == [SMALL]
    box(flat, [57, 16, 80, 30])
    drag(flat, (15, 20), (15, 20))
    assert said(flat).startswith("Object 1: predicted IoU") and said(flat).endswith("Selected.")
    drag(flat, (62, 25), (62, 25))
    box(flat, BIG, {"shift"})
    assert flat.objects.drawn().boxes.tolist() == [SMALL, BIG]
    drag(flat, (45, 5), (45, 5))
    box(flat, [50, 10, 95, 55], {"shift"})  # nothing is selected: a new object
    assert len(flat.objects.drawn().boxes) == 3


# ---------------------------------------------------------------- undo, remove, save


def test_undo_takes_drags_and_removals_back_one_by_one(flat):
    box(flat, SMALL)
    box(flat, BIG)
    tell(flat, "button_press", 20, 20, button=3)
    drawn = flat.objects.drawn()
    assert drawn.boxes.tolist() == [BIG] and set(np.unique(drawn.labels)) == {0, 1} and "Object 1 removed" in said(flat)
    key(flat, "u")
    assert flat.objects.drawn().boxes.tolist() == [SMALL, BIG] and said(flat) == "Taken back: the removal."
    key(flat, "ctrl+z")
    assert flat.objects.drawn().boxes.tolist() == [SMALL] and said(flat) == "Taken back: the box of object 2."
    assert texts(flat)[0].startswith("1:") and len(texts(flat)) == 1
    press(flat, "Undo")
    assert len(flat.objects.drawn().boxes) == 0 and not flat.objects.drawn().labels.any() and not flat.artists
    key(flat, "u")
    assert said(flat) == "Nothing to take back."


def press(window, name):
    button = next(button for button in window.buttons if button.label.get_text() == name)
    place = button.ax.bbox.get_points().mean(axis=0)
    for kind in ("press", "release"):
        MouseEvent(f"button_{kind}_event", window.canvas, *place, button=1)._process()


def test_a_right_click_beside_all_objects_removes_none(flat):
    box(flat, SMALL)
    tell(flat, "button_press", 70, 30, button=3)
    tell(flat, "button_press", -3, 30, button=3)
    assert len(flat.objects.drawn().boxes) == 1


@pytest.mark.parametrize("way", [lambda window: key(window, "s"), lambda window: press(window, "Save")])
def test_saving_gives_what_was_drawn_and_shows_the_message(way):
    saved = []
    window = window_of(squares(), lambda drawn: saved.append(drawn) or "Wrote two files.")
    way(window)
    assert saved == [] and "Nothing to save" in said(window)
    box(window, BIG)
    way(window)
    assert len(saved) == 1 and isinstance(saved[0], Drawn) and saved[0].boxes.tolist() == [BIG]
    assert said(window) == "Wrote two files."


def test_a_disk_that_is_full_costs_no_drawing():
    def full(drawn):
        raise OSError("no space left")

    window = window_of(squares(), full)
    box(window, BIG)
    key(window, "s")
    assert said(window) == "Not saved: no space left" and len(window.objects.drawn().boxes) == 1


# ---------------------------------------------------------------- volumes


def test_scrolling_stops_at_both_ends(deep):
    assert (deep.z, said(deep)) == (4, "Slice 4 (0 to 8). Drag a box round an object.")
    wheel(deep, 1)
    assert deep.z == 5
    for name, z in (("up", 6), ("down", 5), ("pageup", 8), ("up", 8), ("pagedown", 0), ("down", 0)):
        key(deep, name)
        assert deep.z == z
    wheel(deep, -3)
    assert deep.z == 0
    for _ in range(20):
        wheel(deep, 1)
    assert deep.z == 8 and said(deep).startswith("Slice 8")


def test_each_slice_shows_its_own_image_and_objects():
    case = squares(depth=3)
    case.image[0] = 77
    window = window_of(case)
    box(window, BIG)
    assert len(texts(window)) == 1
    wheel(window, -1)
    assert texts(window) == [] and (np.asarray(window.picture.get_array()) == 77).all()


def test_shift_on_another_slice_continues_the_object_through_the_slices_between(deep):
    box(deep, [55, 15, 93, 54])
    wheel(deep, 4)
    assert "Shift+drag continues object 1" in said(deep)
    box(deep, [59, 19, 91, 52], {"shift"})
    assert "slices 4 to 8" in said(deep) and "Slices between to do: 3." in said(deep)
    wheel(deep, -2)
    assert texts(deep) == ["1"], "a box, but no mask yet"
    work(deep)
    assert texts(deep)[0].startswith("1: ") and "to do" not in said(deep)
    drawn = deep.objects.drawn()
    assert deep.objects.boxes[0][6] == (57, 17, 92, 53), "the box in between"
    assert drawn.boxes.tolist() == [[55, 15, 4, 93, 54, 8]]
    assert [bool(plane.any()) for plane in drawn.labels] == [False] * 4 + [True] * 5
    assert (drawn.labels[4:] == is_big(squares())).all()
    key(deep, "u")
    assert said(deep).endswith("Taken back: the box of object 1 on slice 8.")
    assert deep.objects.drawn().boxes.tolist() == [[55, 15, 4, 93, 54, 4]]


def test_a_drag_without_shift_is_a_new_object_also_on_another_slice(deep):
    box(deep, BIG)
    wheel(deep, 1)
    box(deep, SMALL)
    box(deep, SMALL, {"shift"})
    drawn = deep.objects.drawn()
    assert drawn.boxes.tolist() == [[57, 16, 4, 93, 54, 4], [10, 12, 5, 29, 31, 5]]
    assert set(np.unique(drawn.labels[4])) == {0, 1} and set(np.unique(drawn.labels[5])) == {0, 2}


def test_saving_finds_the_masks_that_are_missing(deep):
    box(deep, BIG)
    key(deep, "pagedown")
    box(deep, BIG, {"shift"})
    assert len(deep.objects.missing()) == 3
    key(deep, "s")
    assert said(deep).endswith("Saved.") and deep.objects.missing() == []


def test_a_slice_is_embedded_after_a_pause_and_once(deep):
    engine = deep.objects.segmenter.engine
    wheel(deep, 1)
    deep.tick()
    assert deep.job is None, "while people scroll nothing is embedded"
    work(deep)
    assert list(deep.objects.embeddings) == [5] and engine.encoded == 1
    box(deep, SMALL)
    box(deep, BIG)
    assert engine.encoded == 1
    for _ in range(3):
        wheel(deep, 1)
        wheel(deep, -1)
        work(deep)
    assert engine.encoded == 1


def test_embeddings_that_are_kept_have_a_bound_and_the_one_used_longest_ago_goes(deep, monkeypatch):
    monkeypatch.setattr(objects, "EMBEDDINGS_KEPT", 3)
    for z in (0, 1, 2, 0, 3):
        deep.objects.embed_slice(z)
    assert list(deep.objects.embeddings) == [2, 0, 3]


def test_of_two_drags_on_one_slice_the_later_one_counts():
    drags = (Drag(0, 1, (0, 0, 9, 9)), Drag(0, 3, (0, 0, 9, 9)), Drag(0, 1, (4, 4, 9, 9)))
    assert boxes_by_slice(drags) == [{1: (4, 4, 9, 9), 2: (2, 2, 9, 9), 3: (0, 0, 9, 9)}]


# ---------------------------------------------------------------- what is shown


def test_an_outline_runs_along_the_borders_of_the_pixels():
    labels = np.zeros((9, 9), np.uint16)
    labels[2:5, 3:8] = 7
    extents = outline_of(labels, 7, slice(1, 6), slice(2, 9)).get_extents()
    assert extents.extents.tolist() == [2.5, 1.5, 7.5, 4.5]
    big = labels.repeat(4, axis=0).repeat(4, axis=1)
    coarse = outline_of(big, 7, slice(4, 24), slice(8, 36), step=4).get_extents()
    assert coarse.extents.tolist() == [4 * 2.5 + 1.5, 4 * 1.5 + 1.5, 4 * 7.5 + 1.5, 4 * 4.5 + 1.5]
    assert outline_of(labels, 1, slice(0, 9), slice(0, 9)) is None


def test_a_small_object_has_thin_lines_and_a_small_number(flat):
    box(flat, [14, 16, 19, 21])
    box(flat, BIG)
    drag(flat, (45, 5), (45, 5))  # none is selected, which has thicker lines
    small, big = flat.artists[:3], flat.artists[3:]
    assert all(a.get_linewidth() < b.get_linewidth() for a, b in zip(small[:2], big[:2], strict=True))
    assert small[2].get_fontsize() < big[2].get_fontsize()


def test_zoom_stays_round_the_mouse_and_boxes_are_still_right(flat):
    for _ in range(6):
        tell(flat, "scroll", 70, 35, step=1)
    assert np.allclose(flat.ax.transData.inverted().transform(flat.ax.transData.transform((70, 35))), (70, 35))
    assert abs(np.diff(flat.ax.get_xlim())[0]) < 50
    box(flat, [65, 30, 75, 40])
    for _ in range(9):
        tell(flat, "scroll", 70, 35, step=-1)
    assert (flat.limits == flat.whole).all()
    box(flat, BIG)
    assert flat.objects.drawn().boxes.tolist() == [[65, 30, 75, 40], BIG]


def test_pixels_have_the_shape_that_the_spacing_says():
    case = squares(depth=2)
    window = window_of(Case("tall", case.image, None, None, (1.0, 2.0, 1.0), True))
    (x0, y0), (x1, y1) = window.ax.transData.transform([(0, 0), (1, 1)])
    assert (y0 - y1) / (x1 - x0) == pytest.approx(2)


@pytest.mark.parametrize("case, hint", [(squares(), HINT), (squares(depth=2), HINT_3D)])
def test_the_help_is_one_line_that_fits(case, hint):
    window = window_of(case)
    line = next(text for text in window.canvas.figure.texts if text.get_text() == hint)
    assert "\n" not in hint and line.get_window_extent().x1 < window.canvas.figure.bbox.width
    assert window.ax.get_position().y0 > line.get_window_extent().y1 / window.canvas.figure.bbox.height


# ---------------------------------------------------------------- 04_infer.py --draw


def sentence(*args):
    with pytest.raises(SystemExit) as stop:
        infer.main([str(arg) for arg in args])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


@pytest.fixture
def picture(tmp_path):
    save_image(tmp_path / "scan.png", squares().image)
    return tmp_path / "scan.png"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a screen")
def test_without_a_screen_one_sentence_says_so(picture, monkeypatch):
    monkeypatch.setattr("segment.load", lambda *args, **options: fake())
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    text = sentence("-i", picture, "-o", picture.parent / "out", "--draw")
    assert "no screen" in text and "notebooks/04_infer.ipynb" in text
    assert not (picture.parent / "out").exists()


def test_without_a_window_system_one_sentence_names_one(monkeypatch):
    def nothing(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr("matplotlib.pyplot.switch_backend", nothing)
    with pytest.raises(InputError, match="none of Qt, GTK, Tk.*pip install.*ipynb"):
        interactive_pyplot()


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_saved_are_labels_boxes_and_an_overlay(tmp_path, monkeypatch, capsys, dims):
    def instead(segmenter, case, save):
        window = window_of(case, save)
        box(window, [10, 8, 45, 40])
        key(window, "s")
        names = f"{case.name}.npz, {case.name}_overlay.png, objects.csv"
        assert said(window).endswith(f"Saved 1 object in {tmp_path / 'out'}: {names}.")
        box(window, [5, 5, 20, 20])
        return window.objects.drawn()

    monkeypatch.setattr("page.window.draw_window", instead)
    monkeypatch.setattr("segment.load", lambda *args, **options: fake())
    case = tiny_case(dims=dims)
    write_case(tmp_path, case)
    path = next((tmp_path / "imgs").iterdir())
    rows = infer.main(["-i", str(path), "-o", str(tmp_path / "out"), "--draw"])
    with np.load(tmp_path / "out" / path.name) as saved:
        assert saved["segs"].shape == case.image.shape
    (row,) = csv.DictReader((tmp_path / "out" / "objects.csv").read_text().splitlines())
    assert (row["case"], row["label"], len(row["box"].split())) == (path.name, "1", 2 * dims)
    assert (tmp_path / "out" / f"{path.stem}_overlay.png").is_file()
    assert rows == [{"case": path.stem, "objects": 1}] and "without saving the last changes" in capsys.readouterr().out
    assert (tmp_path / "out" / "arguments.json").is_file()


def test_a_broken_boxes_csv_does_not_stop_who_draws(picture, monkeypatch):
    (picture.parent / "boxes.csv").write_text("file,x0,y0,x1\n")
    monkeypatch.setattr("page.window.draw_window", lambda segmenter, case, save: window_of(case, save).objects.drawn())
    monkeypatch.setattr("segment.load", lambda *args, **options: fake())
    assert infer.main(["-i", str(picture), "-o", str(picture.parent / "out"), "--draw"]) == []


def test_draw_takes_one_case_and_does_not_write_over_it(tmp_path):
    write_case(tmp_path, tiny_case())
    path = next((tmp_path / "imgs").iterdir())
    write_case(tmp_path, tiny_case(seed=1))
    assert "--draw takes one image or volume; 2 are here" in sentence("-i", path.parent, "--draw")
    assert "would replace files of yours" in sentence("-i", path, "-o", path.parent, "--draw")


def test_views_are_loaded_only_for_a_window():
    code = "import importlib, sys; importlib.import_module('04_infer'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"page", "page.window", "matplotlib"} & set(loaded.split())


# ---------------------------------------------------------------- a real window


def why_no_window():
    missing = [name for name in ("Xvfb", "xdotool") if shutil.which(name) is None]
    try:
        import tkinter  # noqa: F401
    except ImportError:
        missing.append("tkinter")
    return f"needs {' and '.join(missing)}" if missing else ""


@pytest.mark.skipif(bool(why_no_window()), reason=why_no_window() or "-")
def test_a_real_mouse_draws_in_the_real_window_and_saves(tmp_path):
    image = tiny_case().image
    save_image(tmp_path / "scan.png", image)
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-screen", "0", "1100x800x24"], stdout=subprocess.PIPE, text=True
    )
    screen = dict(os.environ, DISPLAY=f":{server.stdout.readline().strip()}", MPLBACKEND="tkagg", PYTHONUNBUFFERED="1")

    def mouse(*words):
        done = subprocess.run(["xdotool", *map(str, words)], env=screen, capture_output=True, text=True)
        return done.stdout

    command = [sys.executable, "04_infer.py", "-i", tmp_path / "scan.png", "-o", tmp_path / "out", "--draw"]
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        script = subprocess.Popen(command, cwd=ROOT, env=screen, stdout=out, stderr=out)
    try:
        wait_for(lambda: mouse("search", "--onlyvisible", "--name", "^scan$"))
        time.sleep(2)  # until it has its size
        size = dict(
            line.split("=") for line in mouse("search", "--name", "^scan$", "getwindowgeometry", "--shell").split()
        )
        width, height = int(size["WIDTH"]), int(size["HEIGHT"])
        room = np.array(image.shape[::-1]) + 0.04 * max(image.shape)  # the image and its margin
        scale = min(width / room[0], 0.88 * height / room[1])
        asked = np.array([10, 8, 45, 40])
        middle = np.array([width / 2, (0.07 + 0.44) * height])
        corners = (asked.reshape(2, 2) + 0.5 - np.array(image.shape[::-1]) / 2) * scale + middle
        (x0, y0), (x1, y1) = corners.round().astype(int).tolist()
        drawing = ["mousemove", x0, y0, "sleep", 0.2, "mousedown", 1, "mousemove", (x0 + x1) // 2, y1, "sleep", 0.1]
        drawing += ["mousemove", x1, y1, "sleep", 0.3, "mouseup", 1, "sleep", 1, "key", "s"]
        for _ in range(3):  # a machine that is busy may lose a key, or a part of a drag
            mouse(*drawing)
            try:
                wait_for(lambda: "1 object, wrote" in log.read_text(), seconds=20)
                break
            except AssertionError:
                mouse("key", "u", "sleep", 1, "key", "u", "sleep", 1)
        assert "1 object, wrote" in log.read_text()
        with np.load(tmp_path / "out" / "scan.npz") as saved:
            labels = saved["segs"]
        (row,) = csv.DictReader((tmp_path / "out" / "objects.csv").read_text().splitlines())
        boxes = np.array([row["box"].split()], float)
    finally:
        for process in (script, server):
            process.terminate()
            process.wait(10)
    assert np.abs(boxes - asked).max() <= 1
    assert (labels == load("proposed").segment_image(image, boxes, "drawn")).all() and labels.any()
    model, wrote = log.read_text().splitlines()  # two lines: no warning, no traceback
    assert model == "04_infer.py: proposed, preset fixed, engine torch" and "1 object, wrote" in wrote


def wait_for(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "nothing came within a minute"
        time.sleep(0.3)
