"""The network's results sooner, on a CPU: OpenVINO's graphs. The paper's steps do not need this room.

__init__.py         makes the engines openvino and openvino-int8: are a folder's graphs still right?
openvino_engine.py  runs graphs with Intel's OpenVINO, without PyTorch
graphs.py           makes graphs: traces PyTorch's network, and compares the two
decoder.py          what the decoder's graphs are traced from: its sums in another order
static_int8.py      the encoder's graph with int8 layers
__main__.py         `python -m engines static` writes such a network, and a report

model.py may be edited, and the graphs must follow. So each folder of graphs has a hash of the
network's code and, for openvino, of the checkpoint.
- openvino: where a hash differs, the graphs are made anew. They are compared with the network's
  code in float32, and refused if they differ by more than rounding.
- openvino-int8: making it again takes training images. So where the code's hash differs, the edited
  code runs with seeded random weights. The graphs are refused if the results are no longer those
  from before the edit.
PyTorch is imported only where graphs are made or compared: importing it takes longer than
segmenting an image.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import segment
from engines.openvino_engine import MAKE_STATIC, OpenVINOEngine, import_openvino, read_info
from formats import InputError
from formats.checkpoints import LITE_MEDSAM_FILE, OUR_CHECKPOINT
from formats.writing import save_text

NETWORK_CODE = ("efficientvit", "model", "baseline")  # modules; and that of the model's encoder, see segment.MODELS
GRAPH_CODE = ("decoder", "graphs")  # of this room: what graphs are traced from


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
    precision: see OpenVINOEngine.   cache: where graphs are kept (default: ~/.cache/grays_anatomy_sam, or under
    XDG_CACHE_HOME).   threads: default all cores.
    """
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grays_anatomy_sam"
    if engine == "openvino-int8":
        path = path or default_static(name)
        folder, info = path, static_info(path, name)
        compiled = compiled_of(path, cache)
    else:
        path = path or segment.architecture(name).weights()
        folder, info = float_graphs(path, name, cache)
        compiled = folder / "compiled"
    preset = choose(path, info.get("preset"))
    return info["architecture"], OpenVINOEngine(folder, compiled, precision, threads), preset


def folder_for(path: Path, cache: Path) -> Path:
    """The one folder of a cache that belongs to a file's path."""
    return cache / f"{path.name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"


# ---------------------------------------------------------------- the code of a network


def network_sources(model: str) -> list[str]:
    """The source texts that say what a model's network computes. Nothing is imported."""
    modules = {*NETWORK_CODE, segment.architecture(model).module}
    return [Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in sorted(modules)]


def graph_sources(model: str) -> list[str]:
    """The same, and those that say how graphs are made of it."""
    here = Path(__file__)
    return [*network_sources(model), *(here.with_name(f"{name}.py").read_text("utf-8") for name in GRAPH_CODE)]


def code_hashes(sources: Iterable[str]) -> dict[str, str]:
    """Hashes of Python source texts: as they are, and without comments, docstrings and layout."""
    sources, found = list(sources), hashlib.sha256()
    for text in sources:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        found.update(ast.dump(tree).encode())
    return {"text": text_hash(sources), "code": found.hexdigest()}


def text_hash(sources: Iterable[str]) -> str:
    """A hash of texts as they are: quick to compute."""
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def same_code(info: dict, sources: list[str]) -> bool:
    """Whether the code is that of info.json, but for comments and layout."""
    return info.get("text") == text_hash(sources) or info.get("code") == code_hashes(sources)["code"]


# ---------------------------------------------------------------- openvino


def float_graphs(path: Path, model: str | None, cache: Path) -> tuple[Path, dict]:
    """The graphs of a checkpoint, made if they are not there or not of this checkpoint, code and OpenVINO.

    model: of MODELS, None if the checkpoint tells it. -> the folder, its info.json
    """
    version, folder = import_openvino().__version__, folder_for(path, cache)
    info = read_info(folder)
    name = info.get("architecture")
    if name in segment.MODELS and model in (None, name) and info.get("openvino") == version:
        sources = graph_sources(name)
        if same_code(info, sources) and same_file(info, path):
            now = info | {"text": text_hash(sources)} | state_of(path)
            if now != info:  # a comment was edited, or the file touched: next time a look at both is enough
                save_text(folder / "info.json", json.dumps(now, indent=1))
            return folder, info
    trained_with = []
    name, made, _ = segment.load_torch("torch", model, path, lambda _, preset: trained_with.append(preset))
    from engines.graphs import write_graphs  # here and below: they bring PyTorch

    info = {"architecture": name, "openvino": version, "preset": trained_with[0]}
    info |= code_hashes(graph_sources(name)) | state_of(path) | {"sha256": sha256_of(path)}
    write_graphs(folder, made.network, info, "openvino")
    return folder, info


def state_of(path: Path) -> dict:
    """What changes when a file is written: its size and the time."""
    found = path.stat()
    return {"bytes": found.st_size, "written_ns": found.st_mtime_ns}


def same_file(info: dict, path: Path) -> bool:
    """Whether a checkpoint is the one that graphs were made of: written at the same time, or of the same content."""
    if not path.is_file():
        return False  # loading it says what is wrong
    return state_of(path).items() <= info.items() or info.get("sha256") == sha256_of(path)


def sha256_of(path: Path) -> str:
    """A hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- openvino-int8


def default_static(model: str) -> Path:
    """The static int8 network of a model when none is named: in the folder checkpoints/, named after its checkpoint."""
    known = {"baseline": Path(LITE_MEDSAM_FILE), "proposed": OUR_CHECKPOINT}  # also if the checkpoint is not there
    checkpoint = known.get(model) or segment.architecture(model).weights()
    return OUR_CHECKPOINT.with_name(f"{checkpoint.stem}.static")


def code_info(model: str) -> dict:
    """What a static int8 network keeps of the code that it was made from."""
    from engines.graphs import probe

    return code_hashes(network_sources(model)) | {"probe": probe(model)}


def static_info(path: Path, model: str | None) -> dict:
    """The info.json of a folder NAME.static. InputError if it is missing, another model's, or refused, see the header."""
    import_openvino()
    if path.suffix != ".static":
        raise InputError(f"{path}: is no static int8 network; {MAKE_STATIC} and give its folder NAME.static")
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; {MAKE_STATIC}")
    info = read_info(path)
    name = info.get("architecture")
    if name not in segment.MODELS or not isinstance(info.get("probe"), dict):
        raise InputError(f"{path}: is incomplete, of an earlier form or of an unknown model; {MAKE_STATIC}")
    if model not in (None, name):
        raise InputError(f"{path}: is the {name} model, not {model}; name it with --model")
    if not same_code(info, network_sources(name)):
        from engines.graphs import probe, probes_differ

        if probes_differ(probe(name), info["probe"]):
            raise InputError(
                f"{path}: was made before the network's code was edited, and that computes something else now; "
                f"{MAKE_STATIC}, or use --engine torch"
            )
    return info


def compiled_of(path: Path, cache: Path) -> Path:
    """Where OpenVINO keeps what it compiles of a folder NAME.static. What an earlier one of this name left is removed."""
    folder, made = folder_for(path, cache), sha256_of(path / "info.json")
    note = folder / "made_of.txt"
    if not note.is_file() or note.read_text(encoding="utf-8") != made:
        shutil.rmtree(folder, ignore_errors=True)
        save_text(note, made)
    return folder / "compiled"
