"""notebooks/drawing.py with a mouse that matplotlib is told of. A real page with a real mouse: assets/drawing.png."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
from fake_model import BrightModel
from matplotlib.backend_bases import LocationEvent, MouseEvent

from notebooks import drawing as module
from notebooks.drawing import FIXED, HINT, TOO_SMALL, draw_boxes
from presets import PRESETS
from segment import Segmenter

pytestmark = pytest.mark.filterwarnings("ignore:Passing unrecognized arguments")  # ipympl's tool bar
FIXED_BOX = [10, 12, 29, 31]
LIVE = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def image():
    """Two bright squares on a dark ground, (60, 100)."""
    picture = np.full((60, 100), 20, np.uint8)
    picture[14:30, 12:28] = picture[20:50, 60:90] = 220
    return picture


@pytest.fixture
def drawing(image):
    made = draw_boxes(Segmenter(BrightModel(), PRESETS["fixed"], enhanced=False), image, [FIXED_BOX], names=["square"])
    made.canvas.draw()
    return made


def tell(drawing, kind, x, y, **more):
    place = drawing.ax.transData.transform((x, y))
    MouseEvent(f"{kind}_event", drawing.canvas, *place, **more)._process()


def drag(drawing, start, end):
    tell(drawing, "button_press", *start, button=1)
    for part in (0.3, 0.7, 1):
        tell(drawing, "motion_notify", *(np.array(start) + part * (np.array(end) - start)), buttons={1})
    tell(drawing, "button_release", *end, button=1)


def tinted(drawing):
    """Of each pixel of the gray image, whether the picture shows a colour in its middle."""
    shown, (rows, columns) = np.asarray(drawing.picture.get_array()), drawing.image.shape
    y, x = ((np.arange(size) + 0.5) * n / size for size, n in zip((rows, columns), shown.shape, strict=False))
    return np.ptp(shown[y.astype(int)][:, x.astype(int)].astype(int), axis=-1) > 20


def test_the_fixed_boxes_are_shown_with_their_masks(drawing, image):
    assert drawing.boxes.tolist() == [FIXED_BOX]
    assert (drawing.found.own(0) == (image > 100) & (np.arange(100) < 40)).all()
    assert [text.get_text() for text in drawing.labels] == ["square 1.00"]


@pytest.mark.parametrize("start, end", [((57, 16), (93, 54)), ((93, 54), (57, 16)), ((57, 54), (93, 16))])
def test_a_drag_in_any_direction_shows_the_mask_of_its_box_and_nothing_else(drawing, image, start, end):
    drag(drawing, start, end)
    assert drawing.boxes.tolist() == [[57, 16, 93, 54]]
    big = (image > 100) & (np.arange(100) > 40)
    assert (drawing.found.own(0) == big).all()
    seen = tinted(drawing)
    assert seen[big].all() and not seen[:, :50].any(), "the fixed box and its mask are gone"
    assert drawing.labels == [] and len(drawing.ax.texts) == 0
    assert f"{drawing.found.iou[0]:.2f}" in drawing.ax.get_title() and " ms" in drawing.ax.get_title()


def test_each_further_drag_replaces_the_one_before_and_the_image_is_embedded_once(drawing):
    engine = drawing.segmenter.engine
    for start, end in (((57, 16), (93, 54)), ((9, 9), (32, 33)), ((50, 16), (93, 54))):
        drag(drawing, start, end)
        assert drawing.boxes.tolist() == [[*start, *end]]
    assert (engine.encoded, engine.decoded) == (1, 4)


def test_a_selector_is_kept_from_the_garbage(image):
    made = draw_boxes(Segmenter(BrightModel(), PRESETS["fixed"], enhanced=False), image, [FIXED_BOX])
    gc.collect()
    drag(made, (57, 16), (93, 54))
    assert made.boxes.tolist() == [[57, 16, 93, 54]]


def test_a_drag_that_begins_and_ends_beside_the_image_is_cut(drawing):
    drag(drawing, (-2, -2), (101.9, 61.9))
    assert drawing.boxes.tolist() == [[0, 0, 99, 59]]
    drag(drawing, (50, 10), (400, 30))
    assert drawing.boxes.tolist() == [[50, 10, 99, 30]]


@pytest.mark.parametrize("start, end", [((20, 20), (20, 20)), ((20, 20), (21.5, 40)), ((20, 20), (50, 21)), ((-2, 5), (-1, 50))])  # fmt: skip
def test_a_tiny_drag_gives_a_sentence_and_leaves_what_is_shown(drawing, start, end):
    before = np.asarray(drawing.picture.get_array()).copy()
    drag(drawing, start, end)
    assert drawing.ax.get_title() == TOO_SMALL
    assert drawing.boxes.tolist() == [FIXED_BOX] and (before == drawing.picture.get_array()).all()
    drag(drawing, (20, 20), (22, 22))  # two pixels each way are enough
    assert drawing.boxes.tolist() == [[20, 20, 22, 22]]


def test_a_drag_that_leaves_the_canvas_ends_there(drawing):
    tell(drawing, "button_press", 57, 16, button=1)
    tell(drawing, "motion_notify", 80, 40, buttons={1})
    place = drawing.ax.transData.transform((93, 80))
    LocationEvent("figure_leave_event", drawing.canvas, *place)._process()
    assert drawing.boxes.tolist() == [[57, 16, 93, 59]]
    tell(drawing, "motion_notify", 20, 20, buttons=set())
    assert not drawing.selector.artists[0].get_visible(), "no box follows a mouse whose button is up"


def test_a_drag_too_quick_for_the_moves_ends_where_the_mouse_is_released(drawing):
    tell(drawing, "button_press", 57, 16, button=1)
    tell(drawing, "button_release", 93, 54, button=1)
    assert drawing.boxes.tolist() == [[57, 16, 93, 54]]


def test_a_double_click_starts_no_drag(drawing):
    for _ in range(2):
        drag(drawing, (20, 20), (20, 20))
    tell(drawing, "button_press", 20, 20, button=1, dblclick=True)
    tell(drawing, "motion_notify", 60, 50, buttons=set())
    assert not drawing.selector.artists[0].get_visible() and drawing.ax.get_title() == TOO_SMALL


@pytest.mark.parametrize("someone", [False, True])
def test_without_a_mouse_a_picture_stands_there_with_a_text_and_nothing_that_changes(drawing, monkeypatch, someone):
    shown = []
    monkeypatch.setattr(module, "someone_is_there", lambda: someone)
    monkeypatch.setattr(module, "display", lambda kinds, metadata, raw: shown.append((kinds, metadata)))
    drawing._ipython_display_()
    drawing._ipython_display_()
    assert shown[0] == shown[1]
    kinds, metadata = shown[0]
    assert set(kinds) == {"text/plain", "image/png"} | ({LIVE} if someone else set())
    assert kinds["text/plain"] == metadata["image/png"]["alt"] and "square 1.00" in kinds["text/plain"]
    assert drawing.ax.get_title() == (HINT if someone else FIXED)
    assert not drawing.canvas.toolbar_visible


@pytest.mark.parametrize("message, want", [({}, False), ({"content": {"allow_stdin": False}}, False), ({"content": {"allow_stdin": True}}, True)])  # fmt: skip
def test_a_runner_of_notebooks_is_told_from_a_page_by_whether_it_can_answer_questions(monkeypatch, message, want):
    kernel = SimpleNamespace(get_parent=lambda channel: message)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=kernel))
    assert module.someone_is_there() is want
