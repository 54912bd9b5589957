"""A network run by Intel's OpenVINO: graphs in a folder, behind the two calls of model.TorchEngine. No PyTorch.

OpenVINO takes a network as graphs and fits them to the processor: neighbouring layers become one,
weights are laid out as the processor reads them. A graph is two files, NAME.xml (its nodes) and
NAME.bin (its weights). Ours are four (graphs.py makes them), the last three for each kind of boxes:
    encoder      image (1, 3, 256, 256)                     -> embedding (4096, 256), cell by cell
    image-KIND   embedding                                  -> what decoder.py's `of_image` computes
    prompt-KIND  boxes (N, 4)                               -> their prompts (N, 2, 256)
    box-KIND     a prompt, cells that are wanted, of image  -> logits of their pixels, predicted IoU (1, 1)
A cell is 4x4 pixels of the grid. Beside the graphs lies info.json, which says what they were made of (__init__.py).
The package is optional and imported only where it is used: pip install -r requirements-fast.txt
"""

import json
import locale
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np

from formats import InputError, usable_cores
from grid import GRID

INSTALL = "pip install -r requirements-fast.txt"
MAKE_STATIC = "make it again with python -m engines static --cache CACHE"
FORM = 5  # of a folder: what the graphs take and return, and what info.json holds. Another number: made anew
CELL = 4  # pixels of the grid along a cell's side
CELLS = GRID // CELL  # cells along the grid's side
OUTSIDE = -100.0  # the logit of pixels that were not asked for
# Of `prompt`. OpenVINO's own choice is bfloat16 where the processor has it, which would move a box's corner by up to
# half a pixel.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
# At most so many boxes run at once, each on its thread: those of a chunk, segment.BOX_CHUNK
AT_ONCE = 6


def import_openvino():
    """The package `openvino`, what runs graphs of it. InputError says how to install it.

    OpenVINO and NNCF report over the network that they are used, if the package `openvino_telemetry`
    can be imported. It is hidden here: a program for patients' images sends nothing. So is the
    converter, `openvino.tools.ovc`, which takes as long to import as all the rest; graphs.py brings it back."""
    sys.modules.setdefault("openvino_telemetry", None)
    hidden = "openvino" not in sys.modules and "openvino.tools.ovc" not in sys.modules
    if hidden:
        sys.modules["openvino.tools.ovc"] = None
    try:
        import openvino
    except ImportError as error:
        raise InputError(f"OpenVINO is not installed, which this engine runs on; run: {INSTALL}") from error
    finally:
        if hidden:
            del sys.modules["openvino.tools.ovc"]
    return openvino


def has_bfloat16() -> bool:
    """Whether this processor adds up bfloat16 numbers, 16 bits with the range of float32. Else bf16 means f32."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def cell_range(within: list[float] | None) -> tuple[slice, slice]:
    """Rows and columns of the cells that hold pixels x0 y0 x1 y1 of the grid, at least one of each; None: all."""
    if within is None:
        return slice(0, CELLS), slice(0, CELLS)
    x0, y0, x1, y1 = (min(max(int(value // CELL), 0), CELLS - 1) for value in within)
    return slice(y0, y1 + 1), slice(x0, x1 + 1)


class OpenVINOEngine:
    """The graphs of a folder, compiled. It serves one call after another, whatever threads they come from: a call takes
    all cores already, and OpenVINO's memory for inputs and results is there once."""

    def __init__(
        self, folder: Path, compiled: Path | None = None, precision: str = "f32", threads: int | None = None
    ) -> None:
        """compiled: where OpenVINO may keep what it compiled, for the next start; nothing is kept by default.
        precision: f32, bf16, or auto: bf16 where the processor has it, else f32. Of all graphs but `prompt`.
        threads: default all cores that this process may use.   InputError if a file is missing or damaged."""
        info = read_info(folder)
        for name, size in info.get("sizes", {}).items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise damaged(folder)
        self.folder, self.core, self.lock = folder, import_openvino().Core(), Lock()
        self.threads, self.kinds = threads or usable_cores(), tuple(info.get("kinds", ("exact",)))
        if compiled is not None:
            self.core.set_property({"CACHE_DIR": str(compiled)})
        # D23: bfloat16 where the processor has it
        self.hint = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
        self.decoders: dict[str, list] = {}  # kind -> its graphs `image` and `prompt`
        self.queues: dict[str, list] = {}  # kind -> how many boxes at once, and requests for them
        self.seen, self.image_side = (None, ""), []  # what graph `image` made last, and of which embedding and kind
        # OpenVINO sets the locale "C" while it reads, then what it found before. With two threads "C" may stay, and then
        # text files are read as ASCII
        before = locale.setlocale(locale.LC_ALL)
        try:
            with ThreadPoolExecutor(1) as pool:  # reading weights and laying them out keeps one core busy
                encoder = pool.submit(self.compile, "encoder")
                self.queue(self.kinds[0], 1)  # other kinds follow when they are asked for: most runs have one
            self.encoder = encoder.result()
        finally:
            locale.setlocale(locale.LC_ALL, before)

    def compile(self, name: str, streams: int = 1):
        """A graph of the folder, ready to run so many times at once.

        Programs beside this one want cores too: no thread is bound to a core."""
        settings = {"INFERENCE_NUM_THREADS": self.threads, "ENABLE_CPU_PINNING": False, "NUM_STREAMS": streams}
        settings |= {"PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT"}
        settings |= EXACT if name.startswith("prompt") else self.hint
        try:
            return self.core.compile_model(str(self.folder / f"{name}.xml"), "CPU", settings)
        except RuntimeError as error:
            raise damaged(self.folder) from error

    def queue(self, kind: str, boxes: int):
        """Requests for so many boxes of a kind: all threads on one box, or several boxes at once, each on its thread."""
        streams, (made, queue) = min(self.threads, AT_ONCE) if boxes > 1 else 1, self.queues.get(kind, (0, None))
        if kind not in self.decoders:
            self.decoders[kind] = [self.compile(f"{name}-{kind}") for name in ("image", "prompt")]
        if made < streams:
            # Twice as many requests as streams: while the result of one is copied, its stream goes on with another
            queue = import_openvino().AsyncInferQueue(self.compile(f"box-{kind}", streams), 2 * streams)
            self.queues[kind] = [streams, queue]
        return queue

    def encode(self, image: np.ndarray) -> np.ndarray:
        """image (3, 256, 256) float32, see enhance.network_input -> its embedding, (4096, 256)"""
        with self.lock:  # the result is a copy: the next call overwrites OpenVINO's own memory
            return self.encoder(image[None], share_inputs=True)[0]

    def decode(
        self, embedding: np.ndarray, boxes: np.ndarray, within: np.ndarray | None = None, boxes_are: str = "exact"
    ) -> tuple[np.ndarray, np.ndarray]:
        """boxes (N, 4) on the grid -> logits (N, 256, 256) on the grid, predicted IoU (N,), float32

        within: (N, 4) x0 y0 x1 y1 on the grid, where each mask is wanted; elsewhere logits are OUTSIDE.
        boxes_are: their kind; where the network has no decoder for it, that of exact boxes answers."""
        logits, iou = np.full((len(boxes), GRID, GRID), OUTSIDE, np.float32), np.zeros(len(boxes), np.float32)
        kind = boxes_are if boxes_are in self.kinds else self.kinds[0]
        ranges = [cell_range(None if within is None else within[i].tolist()) for i in range(len(boxes))]

        def keep(request, i: int) -> None:
            rows, columns = (slice(CELL * cells.start, CELL * cells.stop) for cells in ranges[i])
            pixels, sure = (output.data for output in request.output_tensors)
            logits[i, rows, columns], iou[i] = pixels, sure[0, 0]

        with self.lock:
            queue, (image_side, prompt) = self.queue(kind, len(boxes)), self.decoders[kind]
            # Results are used without a copy, in OpenVINO's own memory, which the next call overwrites
            if self.seen[0] is not embedding or self.seen[1] != kind:  # chunks of boxes of one image follow one another
                self.image_side = list(image_side([embedding], share_inputs=True, share_outputs=True).values())
                self.seen = embedding, kind
            queue.set_callback(keep)
            prompts = prompt([np.float32(boxes)], share_inputs=True, share_outputs=True)[0] if len(boxes) else ()
            # Held here while they are read: OpenVINO does not copy its inputs
            corners = [np.array([r.start, r.stop, c.start, c.stop]) for r, c in ranges]
            for i, corner in enumerate(corners):
                queue.start_async([prompts[i : i + 1], corner, *self.image_side], i, share_inputs=True)
            queue.wait_all()
        return logits, iou


def write_info(folder: Path, info: dict) -> None:
    """info.json, with the sizes of the graphs' files added; their folder is complete then."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "info.json").write_text(json.dumps({"form": FORM, "sizes": sizes} | info, indent=1), encoding="utf-8")


def read_info(folder: Path) -> dict:
    """What info.json says; {} if it is not there or was made in another form."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) and info.get("form") == FORM else {}


def damaged(folder: Path) -> InputError:
    """The sentence for graphs that can't be read."""
    again = MAKE_STATIC if folder.suffix == ".static" else "delete the folder"
    return InputError(f"{folder}: the graphs are damaged or incomplete; {again}")
