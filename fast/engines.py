"""The five engines: what can run a network. `load` builds a segmenter for any of them. docs/speed.md compares them.

torch and torch-int8 are model.py as written (segment.load). The other three compute the same in other ways, while model.py may
be edited. So each is compared with it, and refuses to load if it differs by more than rounding (compare.py):
- fast, when it loads: encoder and decoder, on fixed random inputs;
- openvino: the same, when its graphs are made, in float32. Beside them is kept what they were made of: the checkpoint's hash, and a
  hash of the network's code. Where these differ, the graphs are made anew and the old ones removed;
- openvino-int8: its decoder, when it is made by step 3. When it loads, the hash of the code is compared. If it differs, what the
  code computes with seeded random weights, then and now. The int8 layers themselves cannot be compared: they do not equal the
  float ones.
PyTorch is imported for torch, torch-int8 and fast, and where a graph has to be made or compared. It takes longer to import than
an image takes to be segmented.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import fast
import segment
from fast.openvino_engine import OpenVINOEngine, import_openvino, read_info
from files import InputError
from files.checkpoints import LITE_MEDSAM_FILE, OUR_CHECKPOINT
from files.writing import save_text
from segment import Segmenter

ENGINES = (*segment.ENGINES, *fast.ENGINES)
NETWORK_CODE = ("efficientvit", "model", "baseline")  # modules; and that of the model's encoder, see segment.MODELS
GRAPH_CODE = ("decoder", "graphs")  # of this room: what graphs are traced from


def load(
    model: str,
    weights: Path | None = None,
    preset: str | None = None,
    engine: str = "fast",
    force: bool = False,
    settings: Sequence[str] = (),
    cache: Path | None = None,
    precision: str = "auto",
    threads: int | None = None,
) -> Segmenter:
    """A model by name with its weights and preset, ready to segment, as `segment.load`, for every engine of ENGINES.

    weights: a checkpoint, or for openvino-int8 the folder NAME.static (default: the model's own).
    cache: folder in which OpenVINO's engines keep graphs (default: `cache_folder`).
    precision: of the OpenVINO engines, see fast.PRECISIONS.   threads: of OpenVINO (default: all cores).
    Raises InputError, one sentence, for all that segment.load refuses, for a package that is not installed, and if the
    engine computes something else than model.py.
    """
    row, cache = segment.architecture(model), cache or cache_folder()
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r}: unknown; choose one of {', '.join(ENGINES)}")
    if engine in segment.ENGINES:
        return segment.load(model, weights, preset, engine, force, settings)
    if engine == "openvino-int8":
        path = weights or default_static(model)
        info = static_info(path, model)
        made = OpenVINOEngine(path, compiled_of(path, cache), precision, threads)
        return Segmenter(made, segment.chosen_preset(path, preset, info.get("preset"), force, settings), row.enhanced)
    path = weights or row.weights()
    if engine == "openvino":
        folder, info = float_graphs(path, model, cache)
        made = OpenVINOEngine(folder, folder / "compiled", precision, threads)
        return Segmenter(made, segment.chosen_preset(path, preset, info.get("preset"), force, settings), row.enhanced)
    from fast.torch_engine import fast_engine

    network, _, chosen = segment.load_network(model, path, preset, "torch", force, settings)
    return Segmenter(fast_engine(network), chosen, row.enhanced)


def cache_folder() -> Path:
    """Where graphs are kept if no folder is named: ~/.cache/grays_anatomy_sam, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grays_anatomy_sam"


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
    return [
        *network_sources(model),
        *(Path(__file__).with_name(f"{name}.py").read_text("utf-8") for name in GRAPH_CODE),
    ]


def text_hash(sources: Iterable[str]) -> str:
    """A hash of texts as they are: quick to compute."""
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def code_hash(sources: Iterable[str]) -> str:
    """A hash of Python source texts that comments, docstrings and layout do not change."""
    found = hashlib.sha256()
    for text in sources:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        found.update(ast.dump(tree).encode())
    return found.hexdigest()


def same_code(info: dict, sources: list[str]) -> bool:
    """Whether the code is that of info.json, but for comments and layout."""
    return info.get("text") == text_hash(sources) or info.get("code") == code_hash(sources)


# ---------------------------------------------------------------- openvino


def float_graphs(path: Path, model: str, cache: Path) -> tuple[Path, dict]:
    """The graphs of a checkpoint, made if they are not there or not of this checkpoint, code and OpenVINO. -> their folder, its info"""
    version = import_openvino().__version__
    folder, sources = folder_for(path, cache), graph_sources(model)
    info = read_info(folder)
    if info.get("architecture") == model and info.get("openvino") == version and same_code(info, sources):
        if same_file(info, path):
            now = info | {"text": text_hash(sources)} | state_of(path)
            if now != info:  # a comment was edited, or the file touched: next time a look at both is enough
                save_text(folder / "info.json", json.dumps(now, indent=1))
            return folder, info
    from fast.graphs import write_graphs  # here and below: they bring PyTorch

    network, rest, _ = segment.load_network(model, path, None, "torch", True, ())
    info = {"architecture": model, "openvino": version, "text": text_hash(sources), "code": code_hash(sources)}
    info |= {"preset": rest.get("preset")} | state_of(path) | {"sha256": sha256_of(path)}
    write_graphs(folder, network, info, "openvino")
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
    from fast.compare import probe

    sources = network_sources(model)
    return {"text": text_hash(sources), "code": code_hash(sources), "probe": probe(model)}


def static_info(path: Path, model: str) -> dict:
    """The info.json of a folder NAME.static. InputError if it is missing, another model's, or if the network's code computes
    something else now than when it was made."""
    import_openvino()
    if path.suffix != ".static":
        raise InputError(
            f"{path}: is no static int8 network; make one with 03_quantize.py --method static and give its folder "
            "NAME.static with --weights"
        )
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; make it with 03_quantize.py --method static")
    info = read_info(path)
    if not isinstance(info.get("probe"), dict) or "architecture" not in info:
        raise InputError(
            f"{path}: is incomplete, or of an earlier form; make it again with 03_quantize.py --method static"
        )
    if info["architecture"] != model:
        raise InputError(f"{path}: is the {info['architecture']} model, not {model}; name it with --model")
    if not same_code(info, network_sources(model)):
        from fast.compare import probe, probes_differ

        if probes_differ(probe(model), info["probe"]):
            raise InputError(
                f"{path}: was made before the network's code was edited, and that computes something else now; make it "
                "again with 03_quantize.py --method static, or use --engine torch"
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
