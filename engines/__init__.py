"""The network's results sooner, on a CPU: OpenVINO's graphs. The paper's steps do not need this room.

__init__.py         makes the engines openvino and openvino-int8: are a folder's graphs still right?
openvino_engine.py  runs graphs with Intel's OpenVINO, without PyTorch
graphs.py           makes graphs, and ONNX files: traces PyTorch's network, and compares the two
decoder.py          attention with its sums in another order, for the decoder's graphs
static_int8.py      the encoder's graph with int8 layers
__main__.py         `python -m engines static` writes such a network, `python -m engines onnx` ONNX files

model.py may be edited, and the graphs must follow. So each folder of graphs has a hash of the network's code.
- openvino: where it, or the checkpoint, is another one, the graphs are made anew. They are compared with the network's
  code in float32, and refused if they differ by more than rounding.
- openvino-int8: making it again takes training images. So where the hash differs, the folder is refused.
PyTorch is imported only where graphs are made: importing it takes longer than segmenting an image.
"""

import ast
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import segment
from engines.openvino_engine import MAKE_STATIC, OpenVINOEngine, import_openvino, read_info
from formats import InputError
from formats.checkpoints import LITE_MEDSAM_FILE, OUR_CHECKPOINT

NETWORK_CODE = ("efficientvit", "model", "baseline")  # modules; and that of the model's encoder, see segment.MODELS
GRAPH_CODE = ("engines.decoder", "engines.graphs")  # what graphs are traced from


def load_openvino(
    engine: str, name: str | None, path: Path | None, choose: Callable, precision: str = "auto", cache: Path | None = None,
    threads: int | None = None,
) -> tuple:  # fmt: skip
    """Makes the engines openvino and openvino-int8; parameters and result: see segment.load_torch.

    path: a checkpoint, or for openvino-int8 the folder NAME.static (default: the model's own).   cache: where graphs,
    and what OpenVINO compiles of them, are kept (default: ~/.cache/grays_anatomy_sam, or under XDG_CACHE_HOME).
    precision, threads: see OpenVINOEngine."""
    int8 = engine == "openvino-int8"
    path = path or (default_static(name) if int8 else default_checkpoint(name))
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grays_anatomy_sam"
    kept = cache / f"{path.name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    info = static_info(path, name) if int8 else float_graphs(kept, path, name)
    preset = choose(path, info.get("preset"))
    return info["architecture"], OpenVINOEngine(path if int8 else kept, kept / "compiled", precision, threads), preset


def code_hash(model: str, *more: str) -> str:
    """A hash of the modules that say what a model's network computes, and of more, without comments and docstrings.

    The modules are read, not imported."""
    code = []
    for name in [*sorted({*NETWORK_CODE, segment.architecture(model).module}), *more]:
        tree = ast.parse(Path(importlib.util.find_spec(name).origin).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body[0].value.value = ""
        code.append(ast.unparse(tree))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


def float_graphs(folder: Path, path: Path, model: str | None) -> dict:
    """The info.json of a checkpoint's graphs, which are made if they are not there or not of what is there now.

    model: of MODELS, None if the checkpoint tells it."""
    info, openvino, trained_with = read_info(folder), import_openvino(), []

    def made_of(name: str) -> dict:
        """What graphs are made of: this code, by this OpenVINO, of the checkpoint of this size that was written then.
        Where the checkpoint is not there, as in a container, nothing can be said of it."""
        made = {"code": code_hash(name, *GRAPH_CODE), "openvino": openvino.__version__}
        file = path.stat() if path.is_file() else None
        return made | ({"bytes": file.st_size, "written_ns": file.st_mtime_ns} if file else {})

    name = info.get("architecture")
    known = name in segment.MODELS and model in (None, name) and (path.is_file() or path == OUR_CHECKPOINT)
    if known and made_of(name).items() <= info.items():
        return info
    if not path.is_file() and path == OUR_CHECKPOINT:
        segment.architecture("proposed").weights()  # says what to do
    name, made, _ = segment.load_torch("torch", model, path, lambda _, preset: trained_with.append(preset))
    from engines.graphs import write_graphs  # only here: it brings PyTorch

    write_graphs(folder, made.network, made_of(name) | {"architecture": name, "preset": trained_with[0]})
    return read_info(folder)


def default_checkpoint(model: str) -> Path:
    """A model's own checkpoint. Ours need not be there: once its graphs are made they do without it (docker/)."""
    return OUR_CHECKPOINT if model == "proposed" else segment.architecture(model).weights()


def default_static(model: str) -> Path:
    """The static int8 network of a model when none is named: in the folder checkpoints/, named after its checkpoint."""
    # Of LiteMedSAM the name is known also where its weights are not there
    checkpoint = Path(LITE_MEDSAM_FILE) if model == "baseline" else default_checkpoint(model)
    return OUR_CHECKPOINT.with_name(f"{checkpoint.stem}.static")


def static_info(path: Path, model: str | None) -> dict:
    """The info.json of a folder NAME.static. InputError if it is missing, another model's, or of other code."""
    import_openvino()
    info = read_info(path)
    name = info.get("architecture")
    if path.suffix != ".static" or not path.is_dir():
        raise InputError(f"{path}: no such folder of a static int8 network, NAME.static; {MAKE_STATIC}")
    if name not in segment.MODELS or "code" not in info:
        raise InputError(f"{path}: is incomplete, of an earlier form or of an unknown model; {MAKE_STATIC}")
    if model not in (None, name):
        raise InputError(f"{path}: is the {name} model, not {model}; name it with --model")
    if info["code"] != code_hash(name):
        raise InputError(f"{path}: was made before the network's code was edited; {MAKE_STATIC}, or use --engine torch")
    return info
