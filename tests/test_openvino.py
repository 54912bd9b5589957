"""engines/: the same masks as PyTorch's, without PyTorch, from several threads too; graphs that are made once for each code
and checkpoint; one sentence for all that is missing, damaged or edited.

The packages are optional; without them only a few tests run.
"""

import importlib
import importlib.util
import json
import locale
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import efficientvit
import engines
import model
import segment
from data import CacheEntry
from demo_data import tiny_case
from engines import graphs, openvino_engine, static_info
from engines.__main__ import main as fast_main
from engines.graphs import write_graphs
from engines.openvino_engine import OpenVINOEngine, read_info
from engines.static_int8 import calibration_entries
from formats import InputError
from formats.checkpoints import OUR_CHECKPOINT, lite_medsam_path, save_checkpoint
from formats.npz import write_case, write_training_case
from grid import boxes_from_labels
from presets import PRESETS
from segment import load
from volumes import segment_case

ROOT = Path(__file__).parent.parent

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is optional: pip install -r requirements-fast.txt"
)
needs_both = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("openvino", "nncf")),
    reason="optional packages: pip install -r requirements-fast.txt",
)
needs_weights = pytest.mark.skipif(not OUR_CHECKPOINT.is_file(), reason=f"needs {OUR_CHECKPOINT.name}")


class TinyEncoder(nn.Module):
    """A network that is quick to convert."""

    def __init__(self):
        super().__init__()
        self.patch = efficientvit.ConvNorm(3, 256, 5, stride=4)
        self.norm = efficientvit.LayerNorm2d(256)
        self.patch.norm.running_mean += 0.1 * torch.randn(256)  # so that it matters where the batch norm stands
        self.patch.norm.running_var += torch.rand(256)

    def forward(self, image):
        return self.norm(self.patch(image))


plain_tiny, plain_decoder = TinyEncoder.forward, model.MaskDecoder.forward


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model "tiny" in segment.MODELS, with random weights in a checkpoint. -> its path"""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(segment.MODELS, "tiny", segment.Architecture(__name__, "TinyEncoder", lambda: path, True))
        torch.manual_seed(0)
        save_checkpoint(path, {"model": segment.build("tiny").state_dict(), "preset": "paper"})
        yield path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("engine_cache")


@pytest.fixture(scope="module")
def static(tiny, tmp_path_factory):
    """A folder in the form of a static network, its layers float. What is in it does not matter to the reader."""
    folder = tmp_path_factory.mktemp("static") / "ours.static"
    network = load("tiny").engine.network
    info = {"architecture": "tiny", "preset": "paper", "code": engines.code_hash("tiny")}
    write_graphs(folder, network, info, graphs.encoder_graph(network))
    return folder


def eight_boxes():
    """An image and eight boxes: one chunk and a rest."""
    case = tiny_case()
    box = boxes_from_labels(case.labels)[1][:1]
    return case.image, box + np.arange(8)[:, None] * np.array([1, 0, 1, 0])


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for engine in ("openvino", "openvino-int8"):
        with pytest.raises(InputError, match=r"^OpenVINO is not installed.*requirements-fast\.txt$"):
            load("tiny", Path("ours.static") if "int8" in engine else None, engine=engine)


def test_without_pytorch_and_without_graphs_one_sentence_says_what_to_install(monkeypatch, tiny, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    for engine in segment.ENGINES if importlib.util.find_spec("openvino") else ("torch", "torch-int8"):
        if engine != "openvino-int8":
            options = {"cache": tmp_path} if engine == "openvino" else {}
            with pytest.raises(InputError, match=r"tiny\.pt: .* PyTorch is not installed; run: pip install") as error:
                load("tiny", engine=engine, **options)
            assert "\n" not in str(error.value)


# ---------------------------------------------------------------- without PyTorch

# what a picture or a volume must not load
HEAVY = {"torch", "matplotlib", "pydicom", "skimage", "scipy", "nibabel", "PIL", "tqdm", "openvino.tools.ovc"}


def loaded_by_step_4(folder, engine, cache, cases, *more):
    """Modules that 04_infer.py has loaded at its end."""
    arguments = ["-i", str(cases), "-o", str(folder), *map(str, more)]
    arguments += ["--engine", engine, f"cache={cache}", "precision=f32"]
    code = f"import importlib, sys\nimportlib.import_module('04_infer').main({arguments})\nprint(*sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@needs_openvino
@needs_weights
@pytest.mark.long
def test_step_4_runs_pictures_and_volumes_without_pytorch(tmp_path, cache):
    for dims in (2, 3):
        write_case(tmp_path, tiny_case(dims=dims))
    network = load("proposed").engine.network
    int8 = tmp_path / "ours.static"  # which layers are int8 does not matter here
    info = {"architecture": "proposed", "preset": "fixed", "code": engines.code_hash("proposed")}
    write_graphs(int8, network, info, graphs.encoder_graph(network))
    load("proposed", engine="openvino", cache=cache)  # where there is no graph yet, PyTorch makes it
    segs = tmp_path / "segs"
    for engine, more in (("openvino", ()), ("openvino-int8", ("--model", int8))):
        found = loaded_by_step_4(segs, engine, cache, tmp_path / "imgs", *more)
        assert {"openvino", "numpy", "cv2"} <= found and not HEAVY & found, HEAVY & found
    wanted = load("proposed")
    for path in sorted(segs.glob("*.npz")):
        case = tiny_case(dims=3 if "3D" in path.name else 2)
        boxed = segment_boxes(case)
        differ = (np.load(path)["segs"] != segment_case(wanted, boxed)).mean()
        assert differ < 1e-4, f"{path.name}: {differ}"
    assert len(list(segs.glob("*.npz"))) == 2


def segment_boxes(case):
    return replace(case, boxes=boxes_from_labels(case.labels)[1].astype(float))


# ---------------------------------------------------------------- openvino


@needs_openvino
@needs_weights
def test_masks_are_pytorchs_and_the_graph_is_made_once(cache, monkeypatch):
    image, boxes = eight_boxes()
    want = load("proposed").segment_image(image, boxes)
    found = load("proposed", engine="openvino", cache=cache, precision="f32")
    assert want.any() and (found.segment_image(image, boxes) != want).mean() < 1e-4
    one = found.segment_image(image, boxes[:1])  # another way to run the same graph
    assert np.array_equal(one > 0, found.masks(found.embed(image), boxes[:2], image.shape[:2]).own(0))
    monkeypatch.setattr(graphs, "encoder_graph", lambda network: pytest.fail("converted again"))
    encoding = locale.getpreferredencoding(False)
    again = load("proposed", engine="openvino", cache=cache, precision="f32")
    assert np.array_equal(again.segment_image(image, boxes), found.segment_image(image, boxes))
    assert again.preset == found.preset
    short = load("proposed", engine="openvino", cache=cache)  # bfloat16 where the processor has it
    assert ((short.segment_image(image, boxes) > 0) != (want > 0)).mean() < 5e-3  # which of eight alike wins may change
    assert locale.getpreferredencoding(False) == encoding, "files are read and written as before"


@needs_openvino
def test_graphs_of_the_proposed_network_answer_as_pytorch(tmp_path):
    torch.manual_seed(0)
    network = segment.build("proposed", ("drawn",)).eval()
    write_graphs(tmp_path / "made", network, {})
    engine, plain = OpenVINOEngine(tmp_path / "made"), model.TorchEngine(network)
    rng = np.random.default_rng(0)
    images = rng.random((2, 3, 256, 256), np.float32)
    first = engine.encode(images[0])
    kept = first.copy()
    second = engine.encode(images[1])
    assert np.array_equal(first, kept), "the next image must not overwrite an embedding"
    boxes = np.float32([[20, 30, 120, 140], [0, 0, 255, 255], [-3, 200, 60, 259], [7, 9, 7, 9], [9, 9, 250.5, 99.25]])
    for image, embedding in ((images[0], first), (images[1], second), (images[0], first)):
        in_torch = plain.encode(image)
        assert np.allclose(embedding, in_torch.flatten(2)[0].T, atol=1e-3)
        logits, iou = plain.decode(in_torch, boxes)
        for n in (1, 5):
            found, sure = engine.decode(embedding, boxes[:n])
            assert np.abs(found - logits[:n]).max() < 1e-4 * np.abs(logits).max() and np.allclose(
                sure, iou[:n], atol=1e-4
            )
    assert engine.kinds == plain.kinds == ("exact", "drawn")
    wanted = plain.decode(plain.encode(images[0]), boxes, boxes_are="drawn")
    found = engine.decode(first, boxes, boxes_are="drawn")
    assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(found, wanted, strict=True)), "the other decoder answers"
    assert not np.allclose(found[1], engine.decode(first, boxes)[1], atol=1e-3)
    unknown = engine.decode(first, boxes, boxes_are="by a detector")[1]
    assert np.array_equal(unknown, engine.decode(first, boxes)[1]), "as exact ones"
    assert [values.shape for values in engine.decode(first, np.zeros((0, 4)))] == [(0, 256, 256), (0,)]
    within = np.float32([[10, 12, 31.9, 200], [-50, -50, -40, 300]])
    part, whole = engine.decode(first, boxes[:2], within)[0], engine.decode(first, boxes[:2])[0]
    assert np.allclose(part[0, 12:204, 8:32], whole[0, 12:204, 8:32], atol=1e-4) and (part[0, :, 32:] == -100).all()
    assert np.allclose(part[1, :, :4], whole[1, :, :4], atol=1e-4) and (part[1, :, 4:] == -100).all()


@needs_openvino
def test_precisions_are_refused_elsewhere_and_on_a_processor_without_bfloat16_mean_float32(tiny, cache):
    image, boxes = eight_boxes()
    loaded = [load("tiny", engine="openvino", cache=cache, precision=name) for name in ("f32", "auto", "bf16")]
    exact, auto, short = (segmenter.segment_image(image, boxes) for segmenter in loaded)
    assert np.array_equal(auto, short)
    corners = [one.engine.decoders["exact"][1]([np.float32([[100.3, 7.6, 201.2, 250.9]])])[0] for one in loaded]
    assert np.array_equal(corners[0], corners[1]) and np.array_equal(corners[0], corners[2]), "eight bits are too few"
    if not openvino_engine.has_bfloat16():
        assert np.array_equal(exact, auto)
    infer = importlib.import_module("04_infer")
    with pytest.raises(SystemExit):
        infer.main(["-i", "scan.png", "--box", "1", "2", "30", "40", "--engine", "torch", "precision=bf16"])


@needs_openvino
@pytest.mark.long
def test_graphs_are_made_anew_for_edited_code_and_replace_the_old_ones(tiny, tmp_path, monkeypatch):
    def made():
        load("tiny", engine="openvino", cache=tmp_path)
        (folder,) = tmp_path.iterdir()
        return read_info(folder)["code"], (folder / "encoder.xml").stat().st_mtime_ns

    first = made()
    assert made() == first
    monkeypatch.setattr(engines, "code_hash", lambda *names: "of edited code")
    second = made()
    assert second[0] != first[0] and second[1] > first[1] and made() == second


@needs_openvino
@pytest.mark.long
def test_graphs_are_made_anew_for_other_weights_and_another_openvino_and_else_not(tiny, tmp_path, monkeypatch):
    image, boxes = eight_boxes()
    path, cache = tmp_path / "best.pt", tmp_path / "cache"
    shutil.copy(tiny, path)
    first = load("tiny", path, engine="openvino", cache=cache).segment_image(image, boxes)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "write_graphs", lambda *a: pytest.fail("made again"))
        load("tiny", path, engine="openvino", cache=cache)
        load(path, engine="openvino", cache=cache)
        patch.setattr(sys.modules["openvino"], "__version__", "another")
        with pytest.raises(pytest.fail.Exception, match="made again"):
            load("tiny", path, engine="openvino", cache=cache)
    torch.manual_seed(1)
    save_checkpoint(path, {"model": segment.build("tiny").state_dict(), "preset": "fixed"})
    found = load("tiny", path, engine="openvino", cache=cache, precision="f32")
    assert np.array_equal(found.segment_image(image, boxes), load("tiny", path).segment_image(image, boxes))
    assert not np.array_equal(found.segment_image(image, boxes), first) and found.preset == PRESETS["fixed"]
    assert len(list(cache.iterdir())) == 1
    path.unlink()
    with pytest.raises(InputError, match="best.pt: no such checkpoint"):
        load("tiny", path, engine="openvino", cache=cache)


@needs_openvino
@pytest.mark.parametrize("name", ["encoder.bin", "box-exact.xml"])
def test_a_damaged_graph_is_told(name, tiny, tmp_path):
    load("tiny", engine="openvino", cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-100])
    with pytest.raises(InputError, match="damaged or incomplete; delete the folder$"):
        load("tiny", engine="openvino", cache=tmp_path)
    (folder / name).write_bytes(b"x" * len(content))
    if name.endswith(".xml"):
        shutil.rmtree(folder / "compiled")
        with pytest.raises(InputError, match="damaged or incomplete; delete the folder$"):
            load("tiny", engine="openvino", cache=tmp_path)


@needs_openvino
@pytest.mark.long
def test_openvino_follows_an_edit_of_the_encoder_or_refuses_and_keeps_nothing(tiny, tmp_path, monkeypatch):
    image = np.random.default_rng(0).random((3, 256, 256), np.float32)

    def cells(embedding):
        return np.asarray(embedding.flatten(2)[0].T)

    before = cells(load("tiny").engine.encode(image))
    edited = lambda self, x: self.act(self.norm(self.conv(x)) + 1)  # noqa: E731
    monkeypatch.setattr(efficientvit.ConvNorm, "forward", edited)
    wanted = cells(load("tiny").engine.encode(image))
    found = load("tiny", engine="openvino", cache=tmp_path / "a", precision="f32").engine.encode(image)
    assert np.allclose(found, wanted, atol=1e-3)
    assert np.linalg.norm(wanted - before) > 0.01 * np.linalg.norm(before)

    swapped = lambda self, x: self.norm(self.act(self.conv(x)))  # noqa: E731
    for part, edited in (
        (efficientvit.ConvNorm, swapped),  # folding is not for this order
        (
            TinyEncoder,
            lambda self, image: self.norm(torch.linalg.qr(self.patch(image))[0]),
        ),  # OpenVINO has no such thing
    ):
        with monkeypatch.context() as patch:
            patch.setattr(part, "forward", edited)
            with pytest.raises(InputError, match="^engine openvino: .* image encoder .* use --engine torch$") as error:
                load("tiny", engine="openvino", cache=tmp_path / "b")
            assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("b/*"))


def louder(self, *prompt, **options):
    logits, iou = plain_decoder(self, *prompt, **options)
    return logits * 1.1, iou


def one_layer_less(network):
    del network.mask_decoder.transformer.layers[1]


def one_layer_more(network):
    network.mask_decoder.transformer.layers.append(model.TwoWayLayer(first=False))


def another_activation(network):
    network.mask_decoder.output_upscaling[4] = nn.ReLU()


@needs_openvino
@pytest.mark.parametrize("edit", [one_layer_less, one_layer_more])
def test_openvino_follows_an_edit_of_the_transformers_layers(edit, tmp_path):
    torch.manual_seed(0)
    network = model.BoxSegmenter(TinyEncoder())
    before = graphs.answers(model.TorchEngine(network))
    edit(network)
    wanted = graphs.answers(model.TorchEngine(network))
    assert "mask decoder" in graphs.differing(before, wanted)
    write_graphs(tmp_path / "made", network, {})
    assert not graphs.differing(graphs.answers(OpenVINOEngine(tmp_path / "made")), wanted)


@needs_openvino
@pytest.mark.parametrize("edit", [another_activation, louder])
def test_openvino_refuses_an_edited_decoder_and_keeps_nothing(edit, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = model.BoxSegmenter(TinyEncoder())
    if edit is louder:
        monkeypatch.setattr(model.MaskDecoder, "forward", louder)
    else:
        edit(network)
    with pytest.raises(InputError, match="^engine openvino: .* mask decoder .* use --engine torch$"):
        write_graphs(tmp_path / "made", network, {})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- threads


@needs_openvino
@pytest.mark.long
def test_eight_threads_on_one_segmenter_get_the_masks_that_one_gets(tiny, cache):
    image, boxes = eight_boxes()
    images = [np.roll(image, 5 * i, axis=1) for i in range(4)]
    one = load("tiny", engine="openvino", cache=cache, precision="f32")

    def masks(i):
        return one.segment_image(images[i % 4], boxes[: 1 + i % 8])

    wanted = [masks(i) for i in range(16)]
    assert wanted[0].any() and not np.array_equal(wanted[0], wanted[8 + 1])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(masks, range(16)))
    assert all(map(np.array_equal, found, wanted))


# ---------------------------------------------------------------- static int8 networks


@needs_openvino
def test_a_static_network_brings_its_preset_and_says_whose_it_is(static, cache):
    segmenter = load("tiny", static, engine="openvino-int8", cache=cache)
    assert segmenter.preset == PRESETS["paper"] and segmenter.enhanced
    image, boxes = eight_boxes()
    assert segmenter.segment_image(image, boxes).shape == image.shape[:2]
    with pytest.raises(InputError, match="trained with preset paper, not fixed"):
        load("tiny", static, "fixed", "openvino-int8", cache=cache)


@needs_openvino
def test_a_static_network_is_refused_after_an_edit_of_the_networks_code(static, cache, monkeypatch):
    load("tiny", static, engine="openvino-int8", cache=cache)
    monkeypatch.setattr(engines, "code_hash", lambda name: "of edited code")
    wanted = "was made before .* was edited.* make it again .* use --engine torch$"
    with pytest.raises(InputError, match=wanted) as error:
        load("tiny", static, engine="openvino-int8", cache=cache)
    assert "\n" not in str(error.value)


@needs_openvino
def test_bad_folders_are_told_in_one_sentence(static, tmp_path):
    for name, change in (("whose", ["architecture"]), ("old", ["form"]), ("code", ["code"])):
        shutil.copytree(static, tmp_path / f"{name}.static")
        info = json.loads((static / "info.json").read_text())
        for key in change:
            del info[key]
        (tmp_path / f"{name}.static" / "info.json").write_text(json.dumps(info))
    (tmp_path / "empty.static").mkdir()
    for path, architecture, message in (
        (static, "baseline", "is the tiny model, not baseline; name it with --model"),
        (Path("best.pt"), "tiny", "no such folder of a static int8 network, NAME.static; make it again with"),
        (tmp_path / "none.static", "tiny", "no such folder of a static int8 network, NAME.static; make it again with"),
        *((tmp_path / f"{name}.static", "tiny", "make it again") for name in ("whose", "old", "code", "empty")),
    ):
        with pytest.raises(InputError, match=message) as error:
            static_info(path, architecture)
        assert "\n" not in str(error.value)
    shutil.copytree(static, tmp_path / "cut.static")
    (tmp_path / "cut.static" / "box-exact.bin").unlink()
    with pytest.raises(InputError, match="make it again with python -m engines static --cache CACHE$"):
        load("tiny", tmp_path / "cut.static", engine="openvino-int8", cache=tmp_path / "cache")


def test_other_engines_refuse_a_graph():
    for engine in ("torch", "torch-int8"):
        with pytest.raises(InputError, match="add --engine openvino-int8"):
            load("proposed", Path("ours.static"), engine=engine)
    with pytest.raises(InputError, match="no such folder of a static int8 network|not installed"):
        load("baseline", lite_medsam_path(), engine="openvino-int8")


@needs_openvino
def test_openvino_refuses_a_folder_for_a_checkpoint(static, cache):
    with pytest.raises(InputError, match="add --engine openvino-int8"):
        load("tiny", static, engine="openvino", cache=cache)


def test_the_static_network_of_a_model_is_named_after_its_checkpoint(tiny):
    found = [engines.default_static(name) for name in ("baseline", "proposed", "tiny")]
    assert [path.name for path in found] == ["lite_medsam.static", "grays_anatomy_sam_l0.static", "tiny.static"]
    assert {path.parent for path in found} == {OUR_CHECKPOINT.parent}


# ---------------------------------------------------------------- calibration, and the script


def entry(name, modality, split="train"):
    return CacheEntry(name, modality, modality, name, name, 256, 256, split, 1)


def test_every_modality_calibrates_with_as_many_images_and_no_validation_image_does():
    entries = [entry(f"ct{i}", "CT") for i in range(9)] + [entry(f"us{i}", "US") for i in range(2)]
    entries += [entry("mr0", "MR", "val")]
    chosen = calibration_entries(entries, 8)
    assert [e.modality for e in chosen].count("CT") == 4 == [e.modality for e in chosen].count("US")
    assert len({e.name for e in chosen if e.modality == "CT"}) == 4 and chosen == calibration_entries(entries, 8)
    assert calibration_entries([entry("mr0", "MR", "val")], 8) == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags that name a cache of one image."""
    folder = tmp_path_factory.mktemp("inputs")
    write_training_case(folder / "train", tiny_case())
    importlib.import_module("01_preprocess").main(["-i", str(folder / "train"), "-o", str(folder / "cache")])
    return ["static", "--cache", str(folder / "cache"), "--calibration", "2"]


@needs_both
@pytest.mark.long  # NNCF takes half a minute
def test_the_command_writes_files_that_step_4_reads(inputs, cache, tmp_path, capsys):
    case, out = tiny_case(), tmp_path / "lite.static"
    fast_main([*inputs, "--model", "baseline", "-o", str(out)])
    assert f"Wrote {out}, calibrated on 1 images. Next: python 04_infer.py --model {out}" in capsys.readouterr().out
    graph = openvino_engine.import_openvino().Core().read_model(out / "encoder.xml")
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    int8 = [node.get_data().size for node in constants if node.get_element_type().get_type_name() in ("i8", "u8")]
    network = segment.build("baseline")
    assert 0.4 < sum(int8) / sum(weight.numel() for weight in network.parameters()) < 0.7 and len(int8) > 50
    # of the encoder: the decoder's graphs carry tables of all positions, 20 MB
    float_bytes = 4 * sum(weight.numel() for weight in network.image_encoder.parameters())
    assert 0.2 < (out / "encoder.bin").stat().st_size / float_bytes < 0.75
    found = load(out, engine="openvino-int8", cache=cache)
    want = load("baseline")
    assert not found.enhanced and found.preset == want.preset
    boxes = np.repeat(boxes_from_labels(case.labels)[1], 4, axis=0)  # eight: a chunk of six and one of two
    masks = [one.segment_image(case.image, boxes) > 0 for one in (found, want)]
    assert masks[1].any() and (masks[0] != masks[1]).mean() < 0.02


@needs_both
@pytest.mark.long
def test_the_static_network_of_a_file_stands_beside_it_and_has_its_preset(inputs, tiny):
    fast_main([*inputs, "--model", str(tiny)])
    assert load(tiny.with_name("tiny.static"), engine="openvino-int8").preset == PRESETS["paper"]


def test_the_commands_bad_input_is_told_in_one_sentence(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    common = ["static", "--cache", "nowhere"]
    for arguments, message in (
        (["--model", "none.pt"], "none.pt: no such checkpoint"),
        (["--model", str(tiny), "-o", "a.pt"], r"is a folder NAME\.static; change --out"),
        (["--model", str(tiny)], "nowhere.*01_preprocess"),
    ):
        with pytest.raises(SystemExit, match=message):
            fast_main([*common, *arguments])
