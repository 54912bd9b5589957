"""The page of `04_infer.py --page`: open an image, drag boxes, see the masks, save them. On nicegui, loopback only.

`serve` starts it. A `Visitor` is one open tab, with one drawing (objects.py). The visitors share the networks, which
answer one slice at a time, in a thread and in turn: a volume that is followed keeps nobody waiting.
"""

import asyncio
import base64
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from formats import InputError
from formats.case import Case, told_in_a_sentence
from formats.intensity import parse_window
from formats.readers import Asked, read_case, window_of
from formats.results import files_to_do, told_apart
from page.objects import OVERLAPS, SMALLEST, Drawn
from segment import BOX_KINDS, MODELS, Segmenter

try:
    from nicegui import app, background_tasks, native, run, ui
    from starlette.datastructures import Headers
    from starlette.responses import PlainTextResponse
    from starlette.websockets import WebSocketClose
except ImportError as error:
    raise InputError("--page needs nicegui, which is missing; run: pip install -r requirements-page.txt") from error

MOST_BYTES = 2**30  # of one upload
HOST, HOSTS, PORT = "127.0.0.1", ("127.0.0.1", "localhost", "[::1]"), 8080
STYLE = """.view { position: relative; touch-action: none; cursor: crosshair; background: black; width: 100%; }
.view img { width: 100%; height: 100%; display: block; } .view img:not([src]), .q-uploader__subtitle, .q-uploader__list { display: none; }
.rubber { position: absolute; display: none; border: 2px solid #fd0; outline: 1px solid black; pointer-events: none; }
.q-field, .q-uploader { width: 100%; } .q-radio { display: flex; } .q-slider { margin-top: 1.5rem; }"""
HINT = """Drag: a new object. Shift+drag, or the switch (C): another box for the selected one, on any slice.
Wheel, ↑ ↓, Page ↑ ↓: slices. U: undo. Delete: remove. X: not on this slice, nor beyond. S: save."""
DROP = "Drop a picture, a NIfTI, or all files of a DICOM series"
BUTTONS = {"Undo": "u", "Remove": "Delete", "Not on this slice": "x", "Save": "s"}  # their text, and their key
STEPS = {"ArrowUp": 1, "ArrowDown": -1, "PageUp": 10, "PageDown": -10}


@dataclass
class Desk:
    """What all visitors share."""

    load: Callable[[str], Segmenter]  # name of a model -> its segmenter
    asked: Asked  # what --read says
    settings: dict[str, str]  # model, boxes_are and overlap that a page begins with
    opened: Path | None = None  # the file that step 4 was given. Its results go to `folder`, others to the browser
    folder: Path = Path("segs")
    arguments: dict = field(default_factory=dict)  # for arguments.json
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # whoever has it may ask a network
    uploads: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)


class Guard:
    """ASGI middleware: lets in what a page from here asks for, on a loopback name, in bodies of a stated, bounded size.

    Else any page of the web that is open in the same browser could send requests to this one.
    """

    def __init__(self, guarded) -> None:
        self.guarded = guarded

    async def __call__(self, scope, receive, send) -> None:
        answer, headers = self.guarded, Headers(scope=scope) if scope["type"] != "lifespan" else {"host": HOST}
        host, size = headers.get("host", ""), headers.get("content-length", "0")
        known = re.sub(r":\d+$", "", host) in HOSTS and headers.get("origin") in (None, f"http://{host}")
        if not known or "transfer-encoding" in headers or not size.isdecimal() or int(size) > MOST_BYTES:
            refused = PlainTextResponse(f"Refused: from another page, or more than {MOST_BYTES >> 20} MB.", 403)
            answer = WebSocketClose(1008) if scope["type"] == "websocket" else refused
        await answer(scope, receive, send)


def serve(load: Callable[[str], Segmenter], arguments: dict) -> list:
    """Serve the page until ctrl+C. InputError for a file that can't be read, or a model that is not there.

    load: see Desk.   arguments: step 4's flags by name.
    """
    arguments = told_apart(arguments)
    settings = {"model": arguments["model"], "boxes_are": arguments["boxes"] or "drawn", "overlap": "keep"}
    asked, files = window_of(arguments["read"]), (arguments["input"], arguments["output"])
    desk = Desk(load, asked, settings, *files, arguments)
    if desk.opened:
        (desk.opened,) = files_to_do(desk.opened, desk.folder, "--page", with_boxes=False)
        read(desk.opened, desk.asked)
    desk.load = cache(desk.load)
    desk.load(settings["model"]).kind_to_ask(settings["boxes_are"])
    port = native.find_open_port(PORT)
    app.add_middleware(Guard)
    app.on_shutdown(desk.uploads.cleanup)
    print(f"04_infer.py: the page is at http://{HOST}:{port} (ctrl+C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        ui.run(partial(Visitor, desk), host=HOST, port=port, title="Gray's Anatomy SAM", reload=False, show=False,
               show_welcome_message=False, reconnect_timeout=60)  # fmt: skip
    return []


def read(path: Path, asked: Asked) -> Case:
    """A case without boxes and labels. InputError if it can't be used."""
    with told_in_a_sentence(path):
        return read_case(path, window=asked, labels=False, boxes=False)


class Visitor:
    """One open tab."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.client, self.settings, self.drawing = desk, ui.context.client, dict(desk.settings), None
        self.z, self.selected, self.task, self.shown, self.released, self.source = 0, None, None, 0, 0.0, None
        self.folder = tempfile.TemporaryDirectory(dir=desk.uploads.name)
        self.client.on_delete(self.leave)
        ui.add_body_html(f"<script>{Path(__file__).with_name('mouse.js').read_text('utf-8')}</script>")
        ui.add_css(STYLE)
        ui.on("drag", self.drag)
        ui.on("key", lambda event: self.do(event.args))
        ui.on("turn", lambda event: self.go(self.z + event.args))
        choices = {  # of the settings: what they are called, and their values
            "boxes_are": ("Boxes are", list(BOX_KINDS)),
            "overlap": ("Where two objects overlap", {name: f"{name}: {what}" for name, what in OVERLAPS.items()}),
            "model": ("Model", list(dict.fromkeys([desk.settings["model"], *MODELS]))),
        }
        with ui.row().classes("w-full gap-4"):
            with ui.column().classes("grow basis-[520px]"):
                self.message = ui.label("Open an image.").props("aria-live=polite")
                with ui.element("div").classes("view") as self.view:
                    self.image = ui.element("img").props("draggable=false")
                    ui.element("div").classes("rubber")
                self.slider = ui.slider(min=0, max=0, on_change=lambda e: self.go(e.value))
                self.slider.props("label-always aria-label=Slice").set_visibility(False)
            with ui.column().classes("grow basis-[260px]"):
                # all files at once, as one series: nicegui does so only where it is told here
                self.upload = ui.upload(label=DROP, multiple=True, auto_upload=True, on_multi_upload=self.receive)
                self.upload.props(f"max-total-size={MOST_BYTES}").on("failed", self.refuse).on("rejected", self.refuse)
                self.list = ui.radio({}, on_change=lambda e: setattr(self, "selected", e.value)).props("dense")
                self.again = ui.switch("The next drag is for the selected object")
                with ui.row().classes("gap-2"):
                    for text, key in BUTTONS.items():
                        ui.button(text, on_click=partial(self.do, key)).props("no-caps dense padding='4px 8px'")
                for name, (label, values) in choices.items():
                    ui.select(values, label=label, on_change=self.changed).bind_value(self.settings, name)
                self.window = ui.input("Window: width/level, then Enter")
                self.window.on("keydown.enter", lambda: self.open(self.source, self.window.value.strip()))
                self.window.set_visibility(False)
                ui.label(HINT)
        if desk.opened:
            background_tasks.create(self.open(desk.opened))

    def say(self, text: str) -> None:
        self.message.set_text(re.sub(rf"{re.escape(self.folder.name)}\W\w+\W(series\W)?", "", text))

    def refuse(self) -> None:
        self.upload.reset()
        self.say(f"Not opened: more than {MOST_BYTES >> 20} MB, or more than 1000 files.")

    def leave(self) -> None:
        self.drawing = None
        self.folder.cleanup()

    async def receive(self, event) -> None:
        """Files were uploaded: a picture, a volume, or those of one series."""
        self.upload.reset()
        place = Path(tempfile.mkdtemp(dir=self.folder.name)) / "series"
        place.mkdir()
        for file in event.files:
            await file.save(place / (re.sub(r".*[/\\]", "", file.name).lstrip(".") or "unnamed"))
        await self.open(next(place.iterdir()) if len(event.files) == 1 else place)
        if self.source and place in (self.source, self.source.parent):  # else what was open before stays
            for old in {*Path(self.folder.name).iterdir()} - {place.parent}:
                shutil.rmtree(old)

    async def open(self, path: Path, window: str = "") -> None:
        """Show a case. What was drawn stays if it is only read again in another window; the network sees that window too."""
        with self.client:
            try:
                asked = self.desk.asked._replace(window=parse_window(window)) if window else self.desk.asked
                if path != self.desk.opened:
                    (path,) = files_to_do(path, self.desk.folder, "an upload", with_boxes=False)
                case = await run.io_bound(read, path, asked)
            except (InputError, OSError) as error:
                return self.say(f"Not opened: {error}")
            before, again, self.source = self.drawing, path == self.source, path
            self.drawing = Drawn(self.desk.load, case, self.settings)
            if again:
                self.drawing.history = before.history
            else:
                self.z, self.selected = len(self.drawing.slices) // 2, None
            (height, width), pixel = self.drawing.slices.shape[1:3], case.spacing_mm[1:] if case.spacing_mm else (1, 1)
            ratio = width * pixel[1] / (height * pixel[0])
            self.view.style(f"aspect-ratio: {ratio:g}; max-width: {80 * ratio:g}vh")
            self.view.classes(**{"add" if case.is_3d else "remove": "deep"})
            self.slider.props["max"] = len(self.drawing.slices) - 1
            self.slider.set_value(self.z)
            self.slider.set_visibility(case.is_3d)
            self.window.set_visibility(case.source_range is not None)
            self.window.value = "{:g}/{:g}".format(*case.window) if case.window and case.window[0] else "percentile"
            self.say(f"{case.name}: drag a box round an object.")
            await self.changed()

    async def changed(self) -> None:
        """Something else is to be shown, and perhaps to be found."""
        await self.show()
        if self.task is None or self.task.done():
            self.task = background_tasks.create(self.work())

    async def work(self) -> None:
        """Let a network do what is to be done, slice by slice, in turn with the other visitors, and show it."""
        with self.client:
            while (drawing := self.drawing) and drawing.to_do(self.z):
                async with self.desk.lock:
                    try:
                        if job := drawing.to_do(self.z):
                            await run.io_bound(drawing.work, job)
                    except InputError as error:  # as of a model that is not there
                        return self.say(str(error))
                await self.show()

    async def show(self) -> None:
        """The slice with its masks, and the list of objects."""
        if not (drawing := self.drawing):
            return
        self.shown += 1
        number, z, picture = self.shown, self.z, await run.io_bound(drawing.picture, self.z)
        if number != self.shown or drawing is not self.drawing or not picture:
            return  # a later call shows what is true now
        self.image.props["src"] = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        self.image.props["alt"] = f"{drawing.case.name}, slice {z}, {len(drawing.objects)} objects"
        self.image.update()
        lines = {}
        for i, masks in enumerate(map(drawing.masks, range(len(drawing.objects)))):
            lines[i] = f"{i + 1}" + (f", slices {min(masks)} to {max(masks)}" if len(masks) > 1 else "")
            if z in masks:
                lines[i] += f": predicted IoU {masks[z][1]:.2f}, {masks[z][0].values.sum():,} pixels"
        self.selected = self.selected if self.selected in lines else None
        self.list.set_options(lines, value=self.selected)
        if self.released and self.selected is not None and drawing.key(self.selected) in drawing.found:
            self.say(f"Object {lines[self.selected]}, {time.perf_counter() - self.released:.2f} s")
            self.released = 0.0

    async def go(self, z: float) -> None:
        """Show another slice, at most the first or the last one."""
        if self.drawing and (z := int(min(max(z, 0), len(self.drawing.slices) - 1))) != self.z:
            self.z = self.slider.value = z
            await self.changed()

    async def drag(self, event) -> None:
        """The mouse was released.   event.args: ends (Drawn.box_of), shift."""
        if not self.drawing or not (box := self.drawing.box_of(event.args["ends"])):
            return self.say(f"Too small: a box needs {SMALLEST} x {SMALLEST} pixels or more.")
        if self.selected is None or not (event.args["shift"] or self.again.value):
            self.selected = len(self.drawing.objects)
        self.again.value, self.released = False, time.perf_counter()
        self.drawing.mark(self.selected, self.z, box)
        await self.changed()

    async def do(self, key: str) -> None:
        """What a key does."""
        if not (drawing := self.drawing):
            return
        if key in STEPS:
            return await self.go(self.z + STEPS[key])
        if key == "c":
            self.again.value = not self.again.value
        elif key == "u":
            del drawing.history[max(1, len(drawing.history) - 1) :]
        elif key == "s" and drawing.objects:
            await self.save(drawing)
        elif self.selected is not None and key == "Delete":
            drawing.history.append((*drawing.objects[: self.selected], *drawing.objects[self.selected + 1 :]))
        elif self.selected is not None and key == "x":
            drawing.mark(self.selected, self.z, None)
        await self.changed()

    async def save(self, drawing: Drawn) -> None:
        """Find what is still to be found, then write all files."""
        self.say("Following to the end, then saving ...")
        await self.changed()
        await self.task
        if drawing is not self.drawing or not drawing.done.issuperset(map(drawing.key, range(len(drawing.objects)))):
            return
        try:
            # results of an upload go to the browser, in one file
            is_upload, place = self.source != self.desk.opened, Path(tempfile.mkdtemp(dir=self.folder.name))
            folder = place / "masks" if is_upload else self.desk.folder
            names, where = await run.io_bound(drawing.save, folder, self.source, self.desk.arguments), str(folder)
            if is_upload:
                packed, file = shutil.make_archive(str(folder), "zip", folder), f"{drawing.case.name}_masks.zip"
                ui.download.content(Path(packed).read_bytes(), file)
                where = f"{file}, in your downloads"
            self.say(f"Saved in {where}: {', '.join(names)}.")
        except (InputError, OSError) as error:  # a full disk should not cost the drawing
            self.say(f"Not saved: {error}")
