"""The network's results sooner, on a CPU: OpenVINO's graphs. The paper's steps do not need this room.

__init__.py         makes the engines openvino and openvino-int8: are a folder's graphs still right?
openvino_engine.py  runs graphs with Intel's OpenVINO, without PyTorch
graphs.py           makes graphs: traces PyTorch's network, and compares the two
decoder.py          what the decoder's graphs are traced from: its sums in another order
static_int8.py      the encoder's graph with int8 layers
__main__.py         `python -m engines static` writes such a network, and a report

model.py may be edited, and the graphs must follow. So each folder of graphs has a hash of the
network's code and, for openvino, the size and the time of the checkpoint.
- openvino: where one of them differs, the graphs are made anew. They are compared with the network's
  code in float32, and refused if they differ by more than rounding.
- openvino-int8: making it again takes training images. So where the code's hash differs, the edited
  code runs with seeded random weights. The graphs are refused if the results are no longer those
  from before the edit.
PyTorch is imported only where graphs are made or compared: importing it takes longer than
segmenting an image.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import segment
from engines.openvino_engine import MAKE_STATIC, OpenVINOEngine, import_openvino, read_info
from formats import InputError
from formats.checkpoints import LITE_MEDSAM_FILE, OUR_CHECKPOINT
from formats.writing import save_text

NETWORK_CODE = ("efficientvit", "model", "baseline")  # modules; and that of the model's encoder, see segment.MODELS
GRAPH_CODE = ("engines.decoder", "engines.graphs")  # what graphs are traced from


def load_openvino(
    engine: str,
    name: str | None,
    path: Path | None,
    choose: Callable,
    precision: str = "auto",
    cache: Path | None = None,
    threads: int | None = None,
) -> tuple:
    """Makes the engines openvino and openvino-int8; parameters and result: see segment.load_torch.

    path: a checkpoint, or for openvino-int8 the folder NAME.static (default: the model's own).
    precision: see OpenVINOEngine.   cache: where graphs, and what OpenVINO compiles of them, are kept (default:
    ~/.cache/grays_anatomy_sam, or under XDG_CACHE_HOME).   threads: default all cores.
    """
    int8 = engine == "openvino-int8"
    path = path or (default_static(name) if int8 else segment.architecture(name).weights())
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grays_anatomy_sam"
    kept = cache / f"{path.name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    info = static_info(path, name) if int8 else float_graphs(kept, path, name)
    if int8 and read_info(kept) != info:  # what was compiled of an earlier folder of this name goes
        shutil.rmtree(kept, ignore_errors=True)
        save_text(kept / "info.json", json.dumps(info))
    preset = choose(path, info.get("preset"))
    return info["architecture"], OpenVINOEngine(path if int8 else kept, kept / "compiled", precision, threads), preset


# ---------------------------------------------------------------- the code of a network


def sources(model: str, *more: str) -> list[str]:
    """The texts of the modules that say what a model's network computes, and of more. No network's is imported."""
    names = [*sorted({*NETWORK_CODE, segment.architecture(model).module}), *more]
    return [Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in names]


def code_hash(texts: list[str]) -> str:
    """A hash of Python texts without comments and blank lines."""
    lines = re.sub(r"(^|\s)#.*", "", "\n".join(texts), flags=re.MULTILINE).splitlines()
    return hashlib.sha256("\n".join(line.rstrip() for line in lines if line.strip()).encode()).hexdigest()


# ---------------------------------------------------------------- openvino


def float_graphs(folder: Path, path: Path, model: str | None) -> dict:
    """The info.json of a checkpoint's graphs, which are made if they are not there or not of what is there now.

    model: of MODELS, None if the checkpoint tells it.
    """
    info = read_info(folder)
    name = info.get("architecture")
    known = name in segment.MODELS and model in (None, name) and path.is_file()
    if known and made_of(name, path).items() <= info.items():
        return info
    import_openvino()
    trained_with = []
    name, made, _ = segment.load_torch("torch", model, path, lambda _, preset: trained_with.append(preset))
    from engines.graphs import write_graphs  # here and below: they bring PyTorch

    write_graphs(folder, made.network, made_of(name, path) | {"architecture": name, "preset": trained_with[0]})
    return read_info(folder)


def made_of(model: str, path: Path) -> dict:
    """What graphs are made of: this code, by this OpenVINO, of the checkpoint of this size that was written then."""
    file = path.stat()
    made = {"code": code_hash(sources(model, *GRAPH_CODE)), "openvino": import_openvino().__version__}
    return made | {"bytes": file.st_size, "written_ns": file.st_mtime_ns}


# ---------------------------------------------------------------- openvino-int8


def default_static(model: str) -> Path:
    """The static int8 network of a model when none is named: in the folder checkpoints/, named after its checkpoint."""
    known = {"baseline": Path(LITE_MEDSAM_FILE), "proposed": OUR_CHECKPOINT}  # also if the checkpoint is not there
    checkpoint = known.get(model) or segment.architecture(model).weights()
    return OUR_CHECKPOINT.with_name(f"{checkpoint.stem}.static")


def code_info(model: str) -> dict:
    """What a static int8 network keeps of the code that it was made from."""
    from engines.graphs import probe

    return {"code": code_hash(sources(model)), "probe": probe(model)}


def static_info(path: Path, model: str | None) -> dict:
    """The info.json of a folder NAME.static. InputError if it is missing, another model's, or refused, see the header."""
    import_openvino()
    info = read_info(path)
    name = info.get("architecture")
    if path.suffix != ".static" or not path.is_dir():
        raise InputError(f"{path}: no such folder of a static int8 network, NAME.static; {MAKE_STATIC}")
    if name not in segment.MODELS or "probe" not in info:
        raise InputError(f"{path}: is incomplete, of an earlier form or of an unknown model; {MAKE_STATIC}")
    if model not in (None, name):
        raise InputError(f"{path}: is the {name} model, not {model}; name it with --model")
    if info["code"] != code_hash(sources(name)):
        from engines.graphs import differing, probe

        if differing(probe(name), info["probe"]):
            raise InputError(
                f"{path}: was made before the network's code was edited, and that computes something else now; "
                f"{MAKE_STATIC}, or use --engine torch"
            )
    return info
