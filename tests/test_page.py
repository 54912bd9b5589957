"""page/: what is drawn and followed, ten visitors at once, who is let in, and at the end a real mouse in a real browser."""

import asyncio
import base64
import contextlib
import csv
import importlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
from fake_model import BrightModel
from test_dicom import series

from formats.case import Case
from formats.readers import Asked, read_case
from formats.writing import save_image
from page.objects import Drawn
from presets import PRESETS
from segment import Segmenter
from volumes import OVER, follow

pytest.importorskip("nicegui", reason="the page needs nicegui: pip install -r requirements-page.txt")
from nicegui.testing import user_simulation
from starlette.datastructures import UploadFile

from page import app as module
from page.app import MOST_BYTES, Desk, Visitor, guard

ROOT = Path(__file__).parent.parent
infer = importlib.import_module("04_infer")
SMALL, BIG, WHOLE = (10, 12, 29, 31), (57, 16, 93, 54), (5, 5, 97, 57)
SETTINGS = {"model": "proposed", "boxes_are": "drawn", "overlap": "keep"}


def fake(model="proposed"):
    """A segmenter that finds what is bright; "baseline" finds what is very bright."""
    return Segmenter(BrightModel(0.5 if model == "proposed" else 0.9), PRESETS["fixed"], enhanced=False)


def squares(slices=None):
    """Two bright squares on a dark ground, (60, 100). slices: of a volume, on which slices they are, of how many."""
    picture = np.full((60, 100), 20, np.uint8)
    shown = picture.copy()
    shown[14:30, 12:28] = shown[20:50, 60:90] = 220
    if slices is None:
        return Case("squares", shown, None, None, None, False)
    there, depth = slices
    volume = np.stack([shown if z in there else picture for z in range(depth)])
    return Case("squares", volume, None, None, (5.0, 1.0, 1.0), True)


def is_big():
    return (squares().image > 100) & (np.arange(100) > 40)


def finish(drawing, shown=0):
    while job := drawing.to_do(shown):
        drawing.work(job)
    return drawing


def drawing_of(case, *boxes, **settings):
    """What a person drew: (number, slice, box) each."""
    drawing = Drawn(fake, case, SETTINGS | settings)
    for number, z, box in boxes:
        drawing.mark(number, z, box)
    return finish(drawing)


def labels_of(drawing, z=0):
    return drawing.paint({i: drawing.masks(i) for i in range(len(drawing.objects))}, z)


# ---------------------------------------------------------------- through the slices


def followed(volume, boxes, model=None):
    model = model or BrightModel()
    steps = list(follow(Segmenter(model, PRESETS["fixed"], enhanced=False), volume, boxes))
    assert len({z for z, _, _ in steps}) == len(steps), "a slice is asked once"
    return {z: mask for z, mask, _ in steps}


@pytest.mark.parametrize("start", [3, 5, 8])
def test_a_box_of_any_slice_is_followed_to_both_ends_of_its_object(start):
    volume = squares((range(3, 9), 12)).image
    found = followed(volume, {start: BIG})
    assert {z for z, mask in found.items() if (mask.values > 0).any()} == set(range(3, 9))
    assert set(found) == set(range(2, 10)), "it ends beside the object, not at the volume's end"
    for z in range(3, 9):
        mask = np.zeros(volume.shape[1:], bool)
        mask[found[z].rows, found[z].columns] = found[z].values > 0
        assert (mask == is_big()).all()


def test_an_object_that_moves_leaves_its_first_box():
    volume = np.full((12, 60, 100), 20, np.uint8)
    for z in range(12):
        volume[z, 20:50, 2 + z : 32 + z] = 220
    found = followed(volume, {0: (0, 17, 36, 52)})
    assert len(found) == 12
    last = np.zeros((60, 100), bool)
    last[found[11].rows, found[11].columns] = found[11].values > 0
    assert (last == (volume[11] > 100)).all() and last[:, 37:].any()


def test_a_mark_that_it_is_not_there_ends_the_walk_and_the_nearer_box_is_followed():
    volume = squares((range(12), 12)).image
    assert set(followed(volume, {5: BIG, 8: None, 2: None})) == set(range(3, 8))
    engine = BrightModel()
    steps = list(follow(Segmenter(engine, PRESETS["fixed"], enhanced=False), volume, {2: SMALL, 7: BIG}))
    assert [z for z, _, _ in steps] == [7, 8, 9, 10, 11, 6, 5, 2, 3, 4, 1, 0], "the later box first; 4 is nearer to 2"
    assert all((mask.columns.start > 40) == (z > 4) for z, mask, _ in steps)


def test_a_walk_ends_where_almost_nothing_of_the_object_is_left():
    volume = squares((range(6), 6)).image
    volume[3, 20:50, 60:90] = 20
    volume[3, 34:37, 74:77] = 220  # a hundredth of it
    assert 9 < OVER * 900 and max(followed(volume, {0: BIG})) == 3


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("ends", [[0.575, 0.27, 0.935, 0.91], [0.935, 0.91, 0.575, 0.27], [0.575, 0.91, 0.935, 0.27]])
def test_a_drag_in_any_direction_is_a_box_of_the_pixels_that_it_touched(ends):
    assert Drawn(fake, squares(), SETTINGS).box_of(ends) == (57, 16, 93, 54)


def test_a_drag_is_cut_to_the_image_and_a_tiny_one_is_none():
    drawing = Drawn(fake, squares(), SETTINGS)
    assert drawing.box_of([-2, -1, 1.5, 7]) == (0, 0, 99, 59)
    assert drawing.box_of([0.2, 0.5, 0.215, 0.9]) is None and drawing.box_of([-3, 0, -1, 1]) is None
    assert drawing.box_of([0.2, 0.5, 0.22, 0.54]) == (20, 30, 22, 32)


def test_several_boxes_are_several_objects_with_their_own_masks():
    drawing = drawing_of(squares(), (0, 0, SMALL), (1, 0, BIG))
    assert (labels_of(drawing) == 2 * is_big() + ((squares().image > 100) & ~is_big())).all()
    image = squares().image
    found = fake().masks(fake().embed(image), np.array([SMALL, BIG], float), image.shape, "drawn")
    assert [mine[0][1] for mine in map(drawing.masks, (0, 1))] == found.iou.astype(float).tolist()


def test_an_image_is_embedded_once_and_what_is_undone_is_not_asked_again():
    engine = BrightModel()
    drawing = Drawn(lambda model: Segmenter(engine, PRESETS["fixed"], enhanced=False), squares(), SETTINGS)
    finish(drawing)
    assert (engine.encoded, engine.decoded) == (1, 0), "before there is any box, so that it is answered at once"
    for change in (lambda: drawing.mark(0, 0, BIG), drawing.history.pop, lambda: drawing.mark(0, 0, BIG)):
        change()
        finish(drawing)
    assert (engine.encoded, engine.decoded) == (1, 1)


def test_boxes_come_first_then_the_slice_that_is_shown_then_the_others():
    drawing = Drawn(fake, squares((range(9), 9)), SETTINGS)
    drawing.mark(0, 4, BIG)
    first = drawing.to_do(7)
    assert first == drawing.key(0)
    drawing.work(first)
    assert drawing.to_do(7) == ("proposed", 7)
    drawing.work(("proposed", 7))
    assert drawing.to_do(7) == first and list(drawing.masks(0)) == [4]
    drawing.mark(1, 7, SMALL)
    assert drawing.to_do(7) == drawing.key(1), "a new box does not wait for the slices of another object"


def test_an_object_is_corrected_on_any_slice_and_ends_where_a_person_says():
    drawing = drawing_of(squares((range(9), 9)), (0, 4, SMALL), (0, 7, BIG))
    assert list(drawing.masks(0)) == list(range(9))
    assert not labels_of(drawing, 5)[is_big()].any() and (labels_of(drawing, 6)[is_big()] == 1).all()
    drawing.mark(0, 8, None)
    assert list(finish(drawing).masks(0)) == list(range(8))
    drawing.mark(0, 7, None)
    assert list(finish(drawing).masks(0)) == list(range(7)) and not labels_of(drawing, 6)[is_big()].any()
    drawing.mark(0, 4, None)
    assert drawing.objects == (), "an object without a box is gone"


def test_what_is_shown_follows_the_model_and_the_kind_of_boxes():
    image = squares()
    image.image[14:30, 12:28] = 170  # too dark for the baseline
    drawing = drawing_of(image, (0, 0, SMALL))
    assert labels_of(drawing).any()
    drawing.settings["model"] = "baseline"
    assert not drawing.masks(0) and not labels_of(finish(drawing)).any()
    drawing.settings["model"] = "proposed"
    assert labels_of(drawing).any(), "and back at once"


@pytest.mark.parametrize("overlap, owner", [("keep", 1), ("overwrite", 2), ("separate", 1)])
def test_where_objects_overlap_the_choice_says_whose_a_pixel_is(tmp_path, overlap, owner):
    case, source = squares(), tmp_path / "squares.png"
    save_image(source, case.image)
    drawing = drawing_of(case, (0, 0, BIG), (1, 0, WHOLE), overlap=overlap)
    assert set(labels_of(drawing)[is_big()]) == {owner}
    names = drawing.save(tmp_path / "out", source, {"preset": "fixed"})
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out").iterdir())
    rows = list(csv.DictReader((tmp_path / "out" / "objects.csv").read_text().splitlines()))
    settings = json.loads((tmp_path / "out" / "arguments.json").read_text())
    assert settings["preset_fields"]["overlap"] == "logit", (
        "the preset's own fields, and beside them what the page chose"
    )
    assert settings["overlap"] == overlap and [row["label"] for row in rows] == ["1", "2"]
    if overlap == "separate":
        for number, own in ((1, 900), (2, 900 + 256)):
            with np.load(tmp_path / "out" / f"squares_object{number}.npz") as saved:
                assert (saved["segs"] == number).sum() == own and set(np.unique(saved["segs"])) == {0, number}
        assert [row["pixels"] for row in rows] == ["900", "1156"]
    else:
        with np.load(tmp_path / "out" / "squares.npz") as saved:
            assert (saved["segs"] == labels_of(drawing)).all()


# ---------------------------------------------------------------- visitors, without a browser


def visit(steps, visitors=1, **desk):
    """Run `steps(users, visitors, desk)` on the page, in nicegui's simulation."""
    made = []

    class Known(Visitor):
        def __init__(self, desk):
            made.append(self)
            super().__init__(desk)

    async def whole():
        shared = Desk(**{"load": fake, "asked": Asked(), "settings": SETTINGS} | desk)
        async with user_simulation(root=lambda: Known(shared)) as user:
            for _ in range(visitors):
                await user.open("/")
            await steps(made, shared)
            for one in made:
                one.leave()

    asyncio.run(asyncio.wait_for(whole(), 60))


def drag(visitor, box, shift=False):
    """The drag that touches just the pixels of a box."""
    height, width = visitor.drawing.slices.shape[1:3]
    x0, y0, x1, y1 = np.add(box, 0.5) / [width, height, width, height]
    return visitor.drag(SimpleNamespace(args={"ends": [x0, y0, x1, y1], "shift": shift}))


async def drop(visitor, *paths):
    """Files, uploaded as nicegui hands them on."""
    from nicegui.elements.upload_files import create_file_upload

    files = [await create_file_upload(UploadFile(io.BytesIO(path.read_bytes()), filename=path.name)) for path in paths]
    await visitor.receive(SimpleNamespace(files=files))
    await visitor.task


@pytest.fixture
def scan(tmp_path):
    save_image(tmp_path / "scan.png", squares().image)
    return tmp_path / "scan.png"


def test_a_box_shows_its_mask_number_iou_and_seconds(scan):
    async def steps(visitors, desk):
        (one,) = visitors
        await drop(one, scan)
        assert (
            one.message.text == "scan: drag a box round an object."
            and not one.slider.visible
            and not one.window.visible
        )
        await drag(one, BIG)
        await one.task
        assert re.fullmatch(r"Object 1: predicted IoU 1\.00, 900 pixels, \d\.\d\d s", one.message.text)
        assert one.list.options == {0: "1: predicted IoU 1.00, 900 pixels"} and one.list.value == 0
        assert one.image.props["src"].startswith("data:image/png;base64,") and "1 objects" in one.image.props["alt"]
        await drag(one, (20, 20, 21, 40))
        assert "Too small" in one.message.text
        await drag(one, SMALL)
        assert one.list.value == 1
        await one.do("Delete")
        assert len(one.drawing.objects) == 1
        await one.do("u")
        await one.do("u")
        assert [dict(marks) for marks in one.drawing.objects] == [{0: BIG}]
        one.list.value = 0
        await drag(one, SMALL, shift=True)
        assert [dict(marks) for marks in one.drawing.objects] == [{0: SMALL}]
        await one.do("c")
        await drag(one, BIG)
        assert [dict(marks) for marks in one.drawing.objects] == [{0: BIG}] and not one.again.value
        for _ in range(9):
            await one.do("u")
        assert one.drawing.objects == ()

    visit(steps)


def test_ten_visitors_at_once_each_get_their_own_mask_and_the_network_works_for_one_at_a_time(tmp_path):
    at_work = []

    class Alone(BrightModel):
        def encode(self, image):
            at_work.append(1)
            assert len(at_work) == 1, "two visitors in the network at once"
            time.sleep(0.01)
            at_work.pop()
            return super().encode(image)

    engine = Segmenter(Alone(), PRESETS["fixed"], enhanced=False)
    for i in range(10):
        picture = np.full((60, 100), 20, np.uint8)
        picture[10:40, 5 * i : 5 * i + 30] = 220
        save_image(tmp_path / f"p{i}.png", picture)

    async def steps(visitors, desk):
        async def one(i, visitor):
            await drop(visitor, tmp_path / f"p{i}.png")
            await drag(visitor, (max(5 * i - 3, 0), 6, 5 * i + 33, 44))
            await visitor.task
            return labels_of(visitor.drawing)

        for i, labels in enumerate(await asyncio.gather(*(one(i, v) for i, v in enumerate(visitors)))):
            want = np.zeros((60, 100), np.uint16)
            want[10:40, 5 * i : 5 * i + 30] = 1
            assert (labels == want).all(), i

    visit(steps, visitors=10, load=lambda model: engine)


def test_a_long_walk_does_not_keep_another_visitor_waiting(tmp_path):
    class Slow(BrightModel):
        def encode(self, image):
            time.sleep(0.02)
            return super().encode(image)

    engine = Segmenter(Slow(), PRESETS["fixed"], enhanced=False)
    volume = squares((range(80), 80)).image
    nibabel.save(nibabel.Nifti1Image(volume.transpose(2, 1, 0), np.diag([-1, -1, 3, 1.0])), tmp_path / "long.nii")
    save_image(tmp_path / "short.png", squares().image)

    async def steps(visitors, desk):
        long, short = visitors
        await drop(long, tmp_path / "long.nii")
        await drag(long, BIG)
        await drop(short, tmp_path / "short.png")
        await drag(short, BIG)
        await short.task
        assert labels_of(short.drawing).any() and len(long.drawing.masks(0)) < 40
        await long.task
        assert len(long.drawing.masks(0)) == 80

    visit(steps, visitors=2, load=lambda model: engine)


def test_what_step_4_was_given_is_open_and_its_results_go_to_the_folder(scan):
    async def steps(visitors, desk):
        (one,) = visitors
        while one.drawing is None or not one.task.done():
            await asyncio.sleep(0.05)
        await one.do("s")
        assert not desk.folder.exists(), "there is nothing to save yet"
        await drag(one, BIG)
        await one.do("s")
        assert one.message.text.startswith(f"Saved in {desk.folder}: scan.npz, scan_mask.png")
        with np.load(desk.folder / "scan.npz") as saved:
            assert (saved["segs"] == is_big()).all()

    visit(steps, opened=scan, folder=scan.parent / "out")


def test_another_window_is_what_the_network_sees_and_boxes_stay(tmp_path):
    values = np.zeros((60, 100, 4), np.int16)
    values[20:50, 60:90] = 300
    values[2:8, 2:8] = 2000
    nibabel.save(nibabel.Nifti1Image(values.transpose(1, 0, 2), np.diag([-1, -1, 3, 1.0])), tmp_path / "CT_a.nii.gz")

    async def steps(visitors, desk):
        (one,) = visitors
        await drop(one, tmp_path / "CT_a.nii.gz")
        assert one.window.visible and one.window.value == "400/40"
        await drag(one, BIG)
        await one.task
        assert one.drawing.masks(0)
        await one.open(one.source, "100/5000")
        assert one.message.text.startswith("Not opened: CT_a.nii.gz: ") and one.drawing.masks(0), "all would be black"
        await one.open(one.source, "4000/900")
        await one.task
        assert one.window.value == "4000/900" and len(one.drawing.objects) == 1 and not one.drawing.masks(0)
        await one.open(one.source)
        await one.task
        assert one.window.value == "400/40" and one.drawing.masks(0), "nothing stands for the file's own"
        await one.open(one.source, "wide")
        assert "'wide' is not known" in one.message.text

    visit(steps)


def test_what_cannot_be_opened_is_told_in_a_sentence_and_nothing_leaves_the_visitors_folder(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name, squares().image)

    async def steps(visitors, desk):
        (one,) = visitors
        await drop_bad(one, tmp_path / "notes.png")
        assert one.message.text.startswith("Not opened: notes.png: ") and one.drawing is None
        await drop_bad(one, tmp_path / "a.png", tmp_path / "b.png")
        assert "an upload takes one image or volume; 2 are here" in one.message.text
        files = [SimpleNamespace(name=name, save=note) for name in ("../../x.png", "C:\\y\\.hidden", "..")]
        await one.receive(SimpleNamespace(files=files))
        assert all(path.parent.parent.parent == Path(one.folder.name) for path in noted)
        assert [path.name for path in noted] == ["x.png", "hidden", "unnamed"]
        place = Path(one.folder.name)
        assert any(place.iterdir())
        one.leave()
        assert not place.exists(), "uploads go when the tab is closed"

    noted = []

    async def note(path):
        noted.append(path)

    async def drop_bad(visitor, *paths):
        visitor.task = asyncio.create_task(asyncio.sleep(0))
        await drop(visitor, *paths)

    visit(steps)


# ---------------------------------------------------------------- who is let in


@pytest.mark.parametrize(
    "kind, headers, good",
    [
        ("http", {"host": "127.0.0.1:8080"}, True),
        ("http", {"host": "localhost:9000", "origin": "http://localhost:9000"}, True),
        ("http", {"host": "[::1]:8080"}, True),
        ("http", {"host": "127.0.0.1:8080", "origin": "http://evil.example"}, False),
        ("websocket", {"host": "127.0.0.1:8080", "origin": "http://evil.example"}, False),
        ("websocket", {"host": "127.0.0.1:8080", "origin": "http://127.0.0.1:8080"}, True),
        ("http", {"host": "127.0.0.1:8080", "origin": "null"}, False),
        ("http", {"host": "127.0.0.1:8080", "origin": "http://127.0.0.1:9999"}, False),
        ("http", {"host": "evil.example"}, False),  # a name that its owner lets point to 127.0.0.1
        ("http", {}, False),
        ("http", {"host": "127.0.0.1", "content-length": str(MOST_BYTES)}, True),
        ("http", {"host": "127.0.0.1", "content-length": str(MOST_BYTES + 1)}, False),
        ("http", {"host": "127.0.0.1", "transfer-encoding": "chunked"}, False),
        ("lifespan", {}, True),
    ],
)
def test_only_a_page_from_here_is_let_in_and_bodies_are_bounded(kind, headers, good):
    sent, inside = [], []

    async def answer(scope, receive, send):
        inside.append(scope)

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(guard(answer)(scope, None, send))
    assert bool(inside) is good
    refused = {"http": ("http.response.start", 403), "websocket": ("websocket.close", 1008)}
    if not good:
        assert (sent[0]["type"], sent[0].get("status", sent[0].get("code"))) == refused[kind]


# ---------------------------------------------------------------- 04_infer.py --page


def sentence(*args):
    with pytest.raises(SystemExit) as stop:
        infer.main([str(arg) for arg in args])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def test_without_nicegui_one_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "nicegui"] + ["page.app"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert "needs nicegui, which is missing; run: pip install -r requirements-page.txt" in sentence("--page")


def test_a_file_that_cannot_be_drawn_on_ends_it_before_the_page_is_there(scan, monkeypatch):
    monkeypatch.setattr(module.ui, "run", lambda *args, **options: pytest.fail("the page was started"))
    assert "no such file" in sentence("--page", "-i", scan.with_name("missing.png"))
    assert "would replace files of yours" in sentence("--page", "-i", scan, "-o", scan.parent)
    save_image(scan.with_name("other.png"), squares().image)
    assert "--page takes one image or volume; 2 are here" in sentence("--page", "-i", scan.parent)
    assert "model 'none': unknown" in sentence("--page", "-i", scan, "-o", scan.parent / "out", "--model", "none")


def test_the_page_is_loaded_only_when_it_is_asked_for():
    code = "import importlib, sys; importlib.import_module('04_infer'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"page", "page.app", "nicegui"} & set(loaded.split())


# ---------------------------------------------------------------- a real mouse in a real browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Headless Chromium, told what to do over its debugging port: no package but websockets, which nicegui brings."""

    def __init__(self, url, folder, width):
        from websockets.sync.client import connect

        size = f"--window-size={width},900"
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--remote-debugging-port=0", size]
        command += [f"--user-data-dir={folder}/profile", "--disable-gpu", "--no-first-run", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        port = next(m[1] for line in self.process.stderr if (m := re.search(r"ws://[^:]+:(\d+)/", line)))
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self.socket, self.calls, self.errors = connect(address, max_size=None).__enter__(), 0, []
        self("Page.enable")
        self("Runtime.enable")
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self("Page.navigate", url=url)
        self.wait("!!document.querySelector('.view')")

    def __call__(self, method, **params):
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=120))
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message)

    def value(self, script):
        return self("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script, seconds=120):
        end = time.monotonic() + seconds
        while not (value := self.value(script)):
            assert time.monotonic() < end, (script, self.value("document.body.innerText"), self.errors)
            time.sleep(0.05)
        return value

    def text(self, pattern):
        """Wait until the page shows it."""
        return self.wait(f"(document.body.innerText.match({pattern}) || [''])[0]")

    def place(self, selector):
        box = self.value(f"JSON.stringify(document.querySelector({selector!r}).getBoundingClientRect())")
        return [json.loads(box)[name] for name in ("x", "y", "width", "height")]

    def drop(self, *paths):
        """Files dropped on the page, as from a file manager."""
        x, y, width, height = self.place(".q-uploader")
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self("Input.dispatchDragEvent", type=kind, x=x + width / 2, y=y + height / 2, data=data)
        self.text("/: drag a box round an object/")
        self.wait("document.querySelector('.view img').naturalWidth > 0")

    def drag(self, box, shape, shift=False):
        """The mouse over just the pixels of a box of an image (H, W)."""
        x, y, width, height = self.place(".view img")
        ends = np.add(box, 0.5).reshape(2, 2) / shape[::-1] * [width, height] + [x, y]
        for kind, share, pressed in (
            ("mousePressed", 0, 1), ("mouseMoved", 0.4, 1), ("mouseMoved", 1, 1), ("mouseReleased", 1, 0),
        ):  # fmt: skip
            at = ends[0] + share * (ends[1] - ends[0])
            self("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", buttons=pressed, clickCount=1,
                 modifiers=8 * shift)  # fmt: skip

    def key(self, name, code=0):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code)

    def seconds_of(self, box, shape, number):
        """Seconds from the mouse's release to the mask of a box, object `number` from 1, being drawn."""
        self.value(
            "addEventListener('pointerup', () => window.released = performance.now());"
            "const look = () => {"
            f"  if (/Object {number}/.test(document.body.innerText) && document.querySelector('.view img').complete)"
            "    window.drawn = performance.now(); else requestAnimationFrame(look); }; look();"
        )
        self.drag(box, shape)
        return self.wait("window.drawn && (window.drawn - window.released) / 1000")

    def picture(self):
        return base64.b64decode(self("Page.captureScreenshot")["data"])

    def close(self):
        self("Browser.close")
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The real page, with our checkpoint. When it has ended, nothing that was uploaded is left."""
    uploads = tmp_path_factory.mktemp("uploads")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-u", "04_infer.py", "--page"]
    environment["TMPDIR"] = str(uploads)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        url = next(m[0] for line in process.stdout if (m := re.search(r"http://\S+", line)))
        for _ in range(100):  # the address is told just before the server listens
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)
    assert not list(uploads.iterdir())


def saved_by(browser, folder, name):
    browser.key("s", 83)
    browser.text("/Saved in .*/")
    path, end = folder / f"{name}_masks.zip", time.monotonic() + 30
    while not path.is_file():
        assert time.monotonic() < end, list(folder.iterdir())
        time.sleep(0.1)
    zipfile.ZipFile(path).extractall(folder / "saved")
    return folder / "saved"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine: apt-get install chromium")
@pytest.mark.parametrize("kind, width", [("picture", 1280), ("nifti", 1280), ("dicom", 400)])
def test_from_a_dropped_file_to_a_saved_mask_with_a_real_mouse(server, tmp_path, kind, width):
    shape = (60, 100)
    if kind == "picture":
        save_image(tmp_path / "scan.png", squares().image)
        files, name, source = [tmp_path / "scan.png"], "scan", tmp_path / "scan.png"
        asked = BIG
    elif kind == "nifti":
        affine = np.array([[-0.9, 0, 0, 40], [0, -0.8, 0, 30], [0, 0, 3, -7], [0, 0, 0, 1]])
        volume = np.zeros((5, 60, 100), np.int16) - 1000
        volume[:, 10:56, 10:95] = 30
        volume[1:4, 20:50, 60:90] = 150
        nibabel.save(nibabel.Nifti1Image(volume.transpose(2, 1, 0), affine), tmp_path / "CT_a.nii.gz")
        files, name, source = [tmp_path / "CT_a.nii.gz"], "CT_a", tmp_path / "CT_a.nii.gz"
        asked = BIG
    else:
        files = sorted(series(tmp_path / "series", np.arange(5) * 3.0).iterdir())
        source, name, shape, asked = tmp_path / "series", "", (40, 50), (14, 12, 25, 21)
    browser = Browser(server, tmp_path, width)
    try:
        browser.drop(*files)
        name = name or browser.text("/\\S+(?=: drag a box)/")
        assert browser.value("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
        if kind != "picture":
            assert browser.value("document.querySelector('.q-slider').ariaValueNow") == "2", "the middle of 5 slices"
        browser.drag(asked, shape)
        browser.text("/Object 1.*predicted IoU [\\d.]+, [\\d,]+ pixels, [\\d.]+ s/")
        if kind != "picture":
            browser.key("ArrowUp", 38)
            browser.drag(np.add(asked, 1), shape, shift=True)
            browser.text("/Object 1.* s$/m")
            browser.key("u", 85)
        # pytest -s shows it; a bound would fail on a busy machine
        seconds = browser.seconds_of(np.add(asked, [1, 1, 0, 0]), shape, number=2)
        print(f"{kind}: the mask of a second box was drawn {seconds:.2f} s after its release")
        browser.key("u", 85)
        saved = saved_by(browser, tmp_path, name)
        if folder := os.environ.get("PAGE_PICTURES"):
            (Path(folder) / f"{kind}.png").write_bytes(browser.picture())
        assert not browser.errors
    finally:
        browser.close()
    (row,) = csv.DictReader((saved / "objects.csv").read_text().splitlines())
    box = [float(side) for side in row["box"].split()]
    assert np.abs(np.subtract(box if kind == "picture" else np.array(box)[[0, 1, 3, 4]], asked)).max() <= 1
    assert row["boxes_are"] == "drawn" and int(row["pixels"]) > 0
    with np.load(saved / f"{name}.npz") as arrays:
        labels = arrays["segs"]
    case = read_case(source, labels=False, boxes=False)
    assert labels.shape == case.grid_shape and labels.any()
    if kind == "picture":
        from segment import load

        assert (labels == load("proposed").segment_image(case.image, [box], "drawn")).all()
    else:
        assert (labels.reshape(5, -1).any(axis=1)).sum() > 1, "the box of one slice was followed"
        image = nibabel.load(saved / f"{name}.nii.gz")
        again = read_case(saved / f"{name}.nii.gz", labels=False, boxes=False)
        assert np.allclose(again.affine, case.affine) and (np.asarray(image.dataobj) > 0).sum() == (labels > 0).sum()
    if kind == "nifti":
        assert np.allclose(image.affine, affine), "in the geometry of the input"
    if kind == "dicom" and importlib.util.find_spec("highdicom"):
        assert pydicom.dcmread(saved / f"{name}_seg.dcm").Modality == "SEG"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine: apt-get install chromium")
def test_the_real_server_refuses_other_pages_and_listens_on_the_loopback_address_alone(server):
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(server, headers=headers))
    assert urllib.request.urlopen(server).status == 200 and server.startswith("http://127.0.0.1:")
