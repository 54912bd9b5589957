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
except ImportError as error:
    raise InputError("--page needs nicegui, which is missing; run: pip install -r requirements-page.txt") from error

MOST_BYTES = 2**30  # of one upload
HOST, PORT = "127.0.0.1", 8080
STYLE = """.view { position: relative; touch-action: none; cursor: crosshair; background: black; width: 100%; }
.view img { width: 100%; height: 100%; display: block; } .view img:not([src]), .q-uploader__subtitle, .q-uploader__list { display: none; }
.rubber { position: absolute; display: none; border: 2px solid #fd0; outline: 1px solid black; pointer-events: none; }
.q-field, .q-uploader { width: 100%; } .q-radio { display: flex; } .q-slider { margin-top: 1.5rem; }"""
HINT = """Drag: a new object. Shift+drag, or the switch (C): another box for the selected one, on any slice.
Wheel, ↑ ↓, Page ↑ ↓: slices. U: undo. Delete: remove. X: not on this slice, nor beyond. S: save."""
BUTTONS = {"Undo": "u", "Remove": "Delete", "Not on this slice": "x", "Save": "s"}  # their text, and their key


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

    def read(self, path: Path, window: str, flag: str) -> tuple[Path, Case]:
        """The only case of a file or a folder -> its path, the case. Or InputError.   window: "" asks for no other one."""
        asked = self.asked._replace(window=parse_window(window)) if window else self.asked
        (path,) = files_to_do(path, self.folder, flag, with_boxes=False)
        with told_in_a_sentence(path):
            return path, read_case(path, window=asked, labels=False, boxes=False)


def guard(guarded):
    """ASGI middleware: lets in what a page from here asks for, on a loopback name, in bodies of a stated, bounded size.

    Else any page of the web that is open in the same browser could send requests to this one.
    """

    async def answer(scope, receive, send) -> None:
        headers = Headers(scope=scope) if scope["type"] != "lifespan" else {"host": HOST}
        host, size = headers.get("host", ""), headers.get("content-length", "0")
        known = re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1])(:\d+)?", host)
        is_ours = known and headers.get("origin") in (None, f"http://{host}")
        if is_ours and "transfer-encoding" not in headers and size.isdecimal() and int(size) <= MOST_BYTES:
            return await guarded(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        refused = PlainTextResponse(f"Refused: from another page, or more than {MOST_BYTES >> 20} MB.", 403)
        await refused(scope, receive, send)

    return answer


def serve(load: Callable[[str], Segmenter], arguments: dict) -> list:
    """Serve the page until ctrl+C. InputError for a file that can't be read, or a model that is not there.

    load: see Desk.   arguments: step 4's flags by name.
    """
    arguments = told_apart(arguments)
    settings = {"model": arguments["model"], "boxes_are": arguments["boxes"] or "drawn", "overlap": "keep"}
    asked, files = window_of(arguments["read"]), (arguments["input"], arguments["output"])
    desk = Desk(load, asked, settings, *files, arguments)
    if desk.opened:
        desk.opened, _ = desk.read(desk.opened, "", "--page")
    desk.load = cache(desk.load)
    desk.load(settings["model"]).kind_to_ask(settings["boxes_are"])
    port = native.find_open_port(PORT)
    app.add_middleware(guard)
    print(f"04_infer.py: the page is at http://{HOST}:{port} (ctrl+C ends it)", flush=True)
    with desk.uploads, suppress(KeyboardInterrupt):
        ui.run(partial(Visitor, desk), host=HOST, port=port, title="Gray's Anatomy SAM", reload=False, show=False,
               show_welcome_message=False, reconnect_timeout=60)  # fmt: skip
    return []


class Visitor:
    """One open tab. Its slider holds the slice that is shown, and its list the object that is selected."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.client, self.settings = desk, ui.context.client, dict(desk.settings)
        self.drawing = self.source = self.task = None
        # Pictures that were begun; when the last box was released, 0 if that was told; whether one is being drawn
        self.shown, self.released, self.pressed = 0, 0.0, False
        self.folder = tempfile.TemporaryDirectory(dir=desk.uploads.name)
        self.client.on_delete(self.leave)
        ui.add_body_html(f"<script>{Path(__file__).with_name('mouse.js').read_text('utf-8')}</script>")
        ui.add_css(STYLE)
        ui.on("press", lambda event: setattr(self, "pressed", event.args))
        ui.on("turn", self.turn)
        ui.on("drag", self.drag)
        ui.on("key", lambda event: self.do(event.args))
        choose = partial(ui.select, on_change=self.changed)
        with ui.row().classes("w-full gap-4"):
            with ui.column().classes("grow basis-[520px]"):
                self.message = ui.label("Open an image.").props("aria-live=polite")
                with ui.element("div").classes("view") as self.view:
                    self.image = ui.element("img").props("draggable=false")
                    ui.element("div").classes("rubber")
                self.slider = ui.slider(min=0, max=0, value=0, on_change=self.changed)
                self.slider.props("label-always aria-label=Slice").set_visibility(False)
            with ui.column().classes("grow basis-[260px]"):
                # all files at once, as one series: nicegui does so only where it is told here
                self.upload = ui.upload(
                    label="Drop a picture, a NIfTI, or all files of a DICOM series", multiple=True, auto_upload=True,
                    max_total_size=MOST_BYTES, on_multi_upload=self.receive, on_rejected=self.refuse,
                ).on("failed", self.refuse)  # fmt: skip
                self.list = ui.radio({}).props("dense")
                self.again = ui.switch("The next drag is for the selected object")
                with ui.row().classes("gap-2"):
                    for text, key in BUTTONS.items():
                        ui.button(text, on_click=partial(self.do, key)).props("no-caps dense padding='4px 8px'")
                kinds = {name: f"{name}: {what}" for name, what in OVERLAPS.items()}
                choose([*BOX_KINDS], label="Boxes are").bind_value(self.settings, "boxes_are")
                choose(kinds, label="Where two objects overlap").bind_value(self.settings, "overlap")
                choose([*{desk.settings["model"]: None} | MODELS], label="Model").bind_value(self.settings, "model")
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
        for file in event.files:
            path = place / (re.sub(r".*[/\\]", "", file.name).lstrip(".") or "unnamed")
            await file.save(path)
        if await self.open(path if len(event.files) == 1 else place):  # else what was open before stays
            for old in {*Path(self.folder.name).iterdir()} - {place.parent}:
                shutil.rmtree(old)

    async def open(self, path: Path, window: str = "") -> bool:
        """Show a case, if it can be read. What was drawn stays if it is only read again in another window, which the
        network sees, too."""
        with self.client:
            try:
                path, case = await run.io_bound(self.desk.read, path, window, "an upload")
            except (InputError, OSError) as error:
                self.say(f"Not opened: {error}")
                return False
            drawing = Drawn(self.desk.load, case, self.settings)
            depth, height, width = drawing.slices.shape[:3]
            _, *pixel = case.spacing_mm or (1, 1, 1)
            ratio = width * pixel[1] / (height * pixel[0])
            self.view.style(f"aspect-ratio: {ratio:g}; max-width: {80 * ratio:g}vh")
            self.slider.props["max"] = depth - 1
            self.slider.set_visibility(case.is_3d)
            self.window.set_visibility(case.source_range is not None)
            self.window.value = "{:g}/{:g}".format(*case.window) if case.window and case.window[0] else "percentile"
            if path == self.source:
                drawing.history = self.drawing.history
            else:
                self.list.value, self.slider.value = None, depth // 2
            self.drawing, self.source = drawing, path
            self.say(f"{case.name}: drag a box round an object.")
            await self.changed()
            return True

    async def changed(self) -> None:
        """Something else is to be shown, and perhaps to be found."""
        self.begin()
        await self.show()

    def begin(self) -> None:
        """Wake the worker, which sleeps when nothing is to be done."""
        if self.task is None or self.task.done():
            self.task = background_tasks.create(self.work())

    async def work(self) -> None:
        """Let a network do what is to be done, slice by slice, in turn with the other visitors, and show it."""
        with self.client:
            while True:
                async with self.desk.lock:
                    if not (drawing := self.drawing) or not (job := drawing.to_do(self.slider.value)):
                        return
                    if self.pressed and job in drawing.found:
                        # the box that is being drawn should not wait for the next slice of another one
                        await asyncio.sleep(0.02)
                        continue
                    try:
                        z = await run.io_bound(drawing.work, job)
                    except InputError as error:  # as of a model that is not there
                        return self.say(str(error))
                if z is not None:
                    await self.show(z)

    async def show(self, changed: int | None = None) -> None:
        """The slice with its masks, unless another one changed; the objects, and how long the last box took."""
        if not (drawing := self.drawing):
            return
        z, lines = self.slider.value, {}
        if changed in (None, z):
            self.shown += 1
            number, picture = self.shown, await run.io_bound(drawing.picture, z)
            if number != self.shown or not self.drawing or not picture:
                return  # a later call shows what is true now
            source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            self.image.props.update(src=source, alt=f"{drawing.case.name}, slice {z}, {len(drawing.objects)} objects")
        for i, masks in enumerate(map(drawing.masks, range(len(drawing.objects)))):
            lines[i] = f"{i + 1}" + (f", slices {min(masks)} to {max(masks)}" if len(masks) > 1 else "")
            if z in masks:
                lines[i] += f": predicted IoU {masks[z][1]:.2f}, {masks[z][0].values.sum():,} pixels"
        self.list.set_options(lines)
        if self.released and self.list.value is not None and drawing.key(self.list.value) in drawing.found:
            self.say(f"Object {lines[self.list.value]}, {time.perf_counter() - self.released:.2f} s")
            self.released = 0.0

    def turn(self, event) -> None:
        """Show another slice, at most the first or the last one.   event.args: how many further up."""
        self.slider.value = min(max(self.slider.value + event.args, 0), self.slider.props["max"])

    async def drag(self, event) -> None:
        """The mouse was released.   event.args: ends (Drawn.box_of), shift."""
        drawing, number, z = self.drawing, self.list.value, self.slider.value
        if not drawing or not (box := drawing.box_of(event.args["ends"])):
            return self.say(f"Too small: a box needs {SMALLEST} x {SMALLEST} pixels or more.")
        if number is None or not (event.args["shift"] or self.again.value):
            number = len(drawing.objects)
        self.again.value, self.released = False, time.perf_counter()
        drawing.mark(number, z, box)
        self.list.set_options({**self.list.options, number: f"{number + 1}"}, value=number)
        self.begin()
        # A new mask is shown when it is found; until then the page keeps the rubber band
        if drawing.key(number) in drawing.found:
            await self.show()

    async def do(self, key: str) -> None:
        """What a key does."""
        drawing, number = self.drawing, self.list.value
        if not drawing:
            return
        if key == "c":
            self.again.value = not self.again.value
        elif key == "u" and len(drawing.history) > 1:
            drawing.history.pop()
        elif key == "s" and drawing.objects:
            await self.save(drawing)
        elif key == "Delete" and number is not None:
            drawing.history.append((*drawing.objects[:number], *drawing.objects[number + 1 :]))
        elif key == "x" and number is not None:
            drawing.mark(number, self.slider.value, None)
        await self.changed()

    async def save(self, drawing: Drawn) -> None:
        """Find what is still to be found, then write all files."""
        self.say("Following to the end, then saving ...")
        self.begin()
        await self.task
        if drawing is not self.drawing or not drawing.done.issuperset(map(drawing.key, range(len(drawing.objects)))):
            return
        try:
            with tempfile.TemporaryDirectory(dir=self.desk.uploads.name) as place:
                # results of an upload go to the browser, in one file
                is_upload = self.source != self.desk.opened
                folder = Path(place) / "masks" if is_upload else self.desk.folder
                names, where = await run.io_bound(drawing.save, folder, self.source, self.desk.arguments), str(folder)
                if is_upload:
                    packed, where = shutil.make_archive(where, "zip", where), f"{drawing.case.name}_masks.zip"
                    ui.download.content(Path(packed).read_bytes(), where)
            self.say(f"Saved in {where}: {', '.join(names)}.")
        except (InputError, OSError) as error:  # a full disk should not cost the drawing
            self.say(f"Not saved: {error}")
