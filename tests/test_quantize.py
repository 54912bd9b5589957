"""quantize.py and 03_quantize.py: int8 by hand, against the slow way, and against PyTorch's own."""

import copy
import importlib
import json
import platform
import warnings

import metric_rows
import numpy as np
import pytest
import torch
from fake_model import BrightModel
from torch import nn

import quantize
import segment
from demo_data import real_cases, tiny_case
from formats import InputError
from formats.checkpoints import lite_medsam_path, read_checkpoint, save_checkpoint
from formats.npz import write_case
from grid import boxes_from_labels
from model import MaskDecoder, TorchEngine
from presets import PRESETS
from quantize import Int8Linear, int_matmul, quantize_activation, quantize_linear_layers
from quantize import quantize_weight as to_int8
from segment import Segmenter
from tables import finish_int8, scores_in

script = importlib.import_module("03_quantize")


def linear(weight, bias=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


def pytorchs(model):
    """PyTorch's dynamic int8 form of a copy of the model; skips where PyTorch has it no more."""
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError:
        pytest.skip("this PyTorch has torch.ao.quantization.quantize_dynamic no more")
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip(f"engine {torch.backends.quantized.engine} on {platform.machine()} rounds in another way than x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


@pytest.fixture(scope="module")
def baseline():
    return segment.load("baseline").engine.network


@pytest.fixture(scope="module")
def int8_file(baseline, tmp_path_factory):
    """(path of the baseline's int8 file, per tensor; the model that was saved)"""
    model = copy.deepcopy(baseline)
    quantize_linear_layers(model, "tensor")
    path = tmp_path_factory.mktemp("int8") / "lite.dynamic.pt"
    quantize.save_int8(path, model, "tensor", architecture="baseline")
    return path, model


# ---------------------------------------------------------------- the layer


def test_a_layer_of_two_by_two_by_hand():
    layer = Int8Linear(linear([[127.5, -63.0], [2.0, 1.0]], [10.0, 0.0]), "tensor")
    assert float(layer.scale) == 1 and layer.weight.tolist() == [[127, -63], [2, 1]]  # 127.5 -> 128, cut to 127
    assert layer.row_sums.tolist() == [64, 3]
    x = torch.tensor([[-1.0, 126.0]])  # range 127 in 127 steps of 1: -1 becomes 0, 0 becomes 1, 126 becomes 127
    whole, scale, zero_point = quantize_activation(x, bits=7)
    assert (whole.tolist(), scale, zero_point) == ([[0, 127]], 1.0, 1)
    # 0 * 127 + 127 * -63 - 1 * 64 + 10 = -8055 (exact: -8055.5);  0 * 2 + 127 * 1 - 1 * 3 = 124
    assert layer(x).tolist() == [[-8055.0, 124.0]]
    whole, scale, zero_point = quantize_activation(torch.tensor([-1.0, 0.0, 254.0]))
    assert (whole.tolist(), scale, zero_point) == ([-128, -127, 127], 1.0, -127)


def test_a_scale_per_channel_and_8_bits_err_less():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(50, 64)
    layer.weight.data *= torch.logspace(-2, 0, 32)[:, None]  # channels of very different size
    error = {per: (Int8Linear(layer, per)(x) - layer(x)).norm().item() for per in quantize.BITS}
    assert error["channel"] < 0.6 * error["tensor"]
    for per in quantize.BITS:
        whole, scale = to_int8(layer.weight, per)
        off = (whole * scale[:, None] - layer.weight).abs()
        assert (off <= scale[:, None] * 0.5001).all()  # no weight is off by more than half a step


@pytest.mark.parametrize("n, k, o", [(1, 256, 4), (7, 2048, 256), (3, 1025, 5), (0, 8, 3)])
def test_integer_sums_equal_the_float_fallback_exactly(n, k, o, monkeypatch):
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (n, o))
    a[:1], b[:1] = -128, -128  # the largest sum there is
    exact = a.long() @ b.long().T
    assert torch.equal(int_matmul(a, b).long(), exact) and int_matmul(a, b).dtype == torch.int32
    with monkeypatch.context() as without_vnni:
        without_vnni.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
        without_vnni.setattr(torch, "_int_mm", None, raising=False)  # calling it would fail
        assert torch.equal(int_matmul(a, b).long(), exact) and int_matmul(a, b).dtype == torch.int32
    monkeypatch.delattr(torch, "_int_mm", raising=False)
    assert torch.equal(int_matmul(a, b).long(), exact)


@pytest.mark.parametrize("per", quantize.BITS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
def test_constant_input_and_zero_weights(per, value):
    layer = nn.Linear(16, 3)
    x = torch.full((5, 16), value)
    assert torch.allclose(Int8Linear(layer, per)(x), layer(x), atol=0.01 + abs(value) * 0.02)
    layer.weight.data.zero_()
    assert torch.equal(Int8Linear(layer, per)(x), layer.bias.expand(5, 3))
    whole, scale, zero_point = quantize_activation(x)
    assert torch.allclose((whole.float() - zero_point) * scale, x)


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 7, 16), (2, 3, 4, 16), (0, 16)])
def test_any_number_of_leading_dimensions(shape):
    layer = nn.Linear(16, 6, bias=False)
    int8, x = Int8Linear(layer), torch.randn(shape)
    assert int8(x).shape == layer(x).shape and int8(x).dtype == torch.float32
    if x.dim() > 2:
        assert torch.equal(int8(x), int8(x.flatten(0, -2)).reshape(*shape[:-1], 6))


@pytest.mark.parametrize("k, o, n, bias", [(256, 128, 4096, True), (2048, 256, 7, True), (256, 4, 1, False)])
def test_per_tensor_is_pytorchs_layer(k, o, n, bias):
    torch.manual_seed(k)
    layer, x = nn.Linear(k, o, bias=bias), torch.randn(n, k) * 2 + 0.3
    theirs, ours = pytorchs(nn.Sequential(layer)), Int8Linear(layer, "tensor")
    assert torch.equal(theirs[0].weight().int_repr(), ours.weight)
    want, found = theirs(x), ours(x)
    assert float((found - want).norm() / want.norm()) < 1e-3  # on the processors that we tried: 0


# ---------------------------------------------------------------- models and files


@pytest.mark.parametrize("name", ["2DBox_Fundus_retina", "2DBox_CT_vertebra"])
def test_masks_of_the_paper_preset_are_those_of_pytorchs_quantization_bit_for_bit(baseline, int8_file, name):
    case = next(case for case in real_cases() if case.name == name)
    boxes = boxes_from_labels(case.labels)[1]
    found = [
        Segmenter(TorchEngine(model), PRESETS["paper"], enhanced=False).segment_image(case.image, boxes)
        for model in (pytorchs(baseline), int8_file[1])
    ]
    assert found[0].any() and np.array_equal(*found)


def test_every_linear_layer_is_replaced_and_no_float_copy_is_kept():
    decoder = MaskDecoder()
    names = quantize_linear_layers(decoder)
    assert len(names) == 47 and "transformer.layers.0.self_attn.q_proj" in names
    assert not any(isinstance(layer, nn.Linear) for layer in decoder.modules())
    state = decoder.state_dict()
    for name in names:
        assert state[f"{name}.weight"].dtype == torch.int8 and f"{name}.weight" not in dict(decoder.named_parameters())
    assert f"{names[0]}.row_sums" not in state


def test_a_saved_int8_model_gives_the_same_masks(int8_file):
    path, saved = int8_file
    case = tiny_case()
    boxes = boxes_from_labels(case.labels)[1]
    loaded = segment.load("baseline", path, "fixed", "torch-int8")
    assert loaded.preset.weight_int8 == "tensor"  # the file's, whatever the preset says
    for a, b in zip(loaded.engine.network.state_dict().values(), saved.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    want = Segmenter(TorchEngine(saved), PRESETS["fixed"], enhanced=False).segment_image(case.image, boxes)
    assert want.any() and np.array_equal(loaded.segment_image(case.image, boxes), want)
    assert path.stat().st_size < 0.4 * lite_medsam_path().stat().st_size


def test_engine_torch_int8_quantizes_a_float_checkpoint_as_the_preset_says(int8_file):
    for settings, scales in (((), 384), (("weight_int8=tensor",), 1)):
        segmenter = segment.load("baseline", engine="torch-int8", settings=settings)
        layer = segmenter.engine.network.image_encoder.layers[1].blocks[0].attn.qkv
        assert isinstance(layer, Int8Linear) and len(layer.scale) == scales
    wanted = int8_file[1].state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in segmenter.engine.network.state_dict().items())


def test_bad_input_is_told_in_one_sentence(int8_file, tmp_path):
    path, _ = int8_file
    stored = read_checkpoint(path)
    for name, changed in {
        "unknown": stored | {quantize.INT8_KEY: "row"},
        "nan": stored | {"model": stored["model"] | {next(k for k in stored["model"] if "scale" in k): torch.tensor([np.nan])}},
    }.items():  # fmt: skip
        torch.save(changed, tmp_path / f"{name}.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:9000])
    for arguments, message in (
        (("baseline", path), "--engine torch-int8"),
        (("proposed", path, None, "torch-int8"), "another architecture"),
        (("baseline", tmp_path / "none.pt", None, "torch-int8"), "no such checkpoint"),
        (("baseline", tmp_path / "cut.pt", None, "torch-int8"), "cut short"),
        (("baseline", tmp_path / "unknown.pt", None, "torch-int8"), "unknown"),
        (("baseline", tmp_path / "nan.pt", None, "torch-int8"), "NaN"),
        (("baseline", path, None, "torch-int4"), "unknown; choose one of torch, torch-int8"),
    ):
        with pytest.raises(InputError, match=message) as error:
            segment.load(*arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("weight, low, high", [(-1.0, 0.0, 1.0), (-1.0, -1.0, 0.0), (1.0, 0.0, 1.0), (1.0, -1.0, 0.0)])
def test_the_largest_sums_of_the_widest_layer_do_not_overflow(per, weight, low, high):
    k = quantize.MOST_K
    layer = nn.Linear(k, 2)
    layer.weight.data[:], layer.bias.data[:] = weight, 0
    layer.weight.data[1, 0] = 0.0
    x = torch.full((3, k), high if high else low)
    x[2, 0] = 0.0
    int8 = Int8Linear(layer, per)
    q, _, z = quantize_activation(x, quantize.BITS[per])
    exact = (q.long() - z) @ int8.weight.long().mT
    assert exact.abs().max() > 0.49 * 2**31 * (1 if per == "channel" else 0.5) and exact.abs().max() < 2**31
    whole = int_matmul(q, int8.weight) - z * int8.row_sums
    assert whole.dtype == torch.int32 and torch.equal(whole.long(), exact)
    assert torch.allclose(int8(x), layer(x), rtol=0.02)
    with pytest.raises(InputError, match="may overflow int32"):
        Int8Linear(nn.Linear(k + 1, 1), per)


def test_weights_and_activations_with_nan_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="^1: weights hold NaN"):
        quantize_linear_layers(net)
    assert type(net[0]) is nn.Linear  # all or nothing
    with pytest.raises(InputError, match="per 'row': unknown"):
        quantize_linear_layers(net, "row")
    with pytest.raises(ValueError, match="activations hold NaN"):
        Int8Linear(net[0])(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))


# ---------------------------------------------------------------- the report


def test_what_int8_reaches_in_the_proposed_model():
    found = quantize.int8_reach(segment.build("proposed").eval())
    assert found["weights"] == (3_965_952, 34_792_784)
    int8, whole = found["multiply-adds"]
    assert whole == pytest.approx(18.76e9, rel=1e-3) and int8 / whole == pytest.approx(0.073, abs=5e-4)
    assert found["multiply-adds, encoder"][0] == 0 and found["multiply-adds, decoder"][0] == int8
    assert int8 == pytest.approx(1.36e9, rel=3e-3)
    assert int8 / found["multiply-adds, decoder"][1] == pytest.approx(0.755, abs=2e-3)


def test_multiply_adds_equal_a_count_by_hand_of_every_layer(baseline):
    found = {"linear": 0, "convolution": 0}

    def count(layer, inputs, out):
        if isinstance(layer, nn.Linear):  # each output value comes from all inputs
            found["linear"] += out.numel() * layer.in_features
        elif isinstance(layer, nn.ConvTranspose2d):  # each input value goes to all cells of the kernel
            found["convolution"] += inputs[0].numel() * layer.weight[0].numel()
        else:  # each output value comes from all cells of the kernel
            found["convolution"] += out.numel() * layer.weight[0].numel()

    layers = [m for m in baseline.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        baseline(torch.zeros(1, 3, 256, 256), torch.tensor([[50.0, 60.0, 180.0, 200.0]]))
    for handle in handles:
        handle.remove()
    ours = quantize.count_macs(baseline)
    for kind, number in found.items():
        assert sum(n for (_, what), n in ours.items() if what == kind) == number
    # two-way attention: 7 tokens, 4096 cells; width 256 among tokens, 128 with cells; three layers look, two answer
    attention = 2 * (2 * 7 * 7 * 256 + 5 * 7 * 4096 * 128)
    assert ours["decoder", "product"] == attention + 32 * 256 * 256, "and the mask's product with 32 maps"


def test_speed_is_measured_in_turns():
    asked = []

    class Engine:
        def __init__(self, name):
            self.name = name

        def encode(self, image):
            asked.append((self.name, "encode"))
            return self.name

        def decode(self, embedding, boxes):
            assert embedding == self.name
            asked.append((self.name, len(boxes)))

    found = script.compare_speed({"float": Engine("float"), "int8": Engine("int8")}, 2, (1, 6))
    assert list(found) == ["encoder, 1 image", "decoder, 1 box", "decoder, 6 boxes"]
    assert all(set(times) == {"float", "int8"} for times in found.values())
    assert asked[-6:] == [("float", 6), ("int8", 6)] * 3, "one more than timed: the first warms up"


def test_the_script_writes_file_and_report_and_its_file_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TIMED_BOXES", (1, 2))
    monkeypatch.setattr("formats.checkpoints.OUR_CHECKPOINT", tmp_path / "ours.pt")
    with pytest.raises(SystemExit, match=r"ours\.pt does not exist: give a checkpoint with --model FILE"):
        script.main(["--model", "proposed"])
    net = segment.build("proposed")
    save_checkpoint(tmp_path / "ours.pt", {"model": net.state_dict(), "preset": "paper", "step": 3})
    write_case(tmp_path, tiny_case())
    (tmp_path / "imgs" / "zz_bad.npz").write_bytes(b"no case")
    arguments = ["--repeats", "1", "-i", str(tmp_path / "imgs")]
    with pytest.raises(SystemExit, match="1 cases scored, 1 left out"):
        script.main([*arguments, "--model", str(tmp_path / "ours.pt"), "-o", str(tmp_path / "other.dynamic.pt")])
    (tmp_path / "imgs" / "zz_bad.npz").unlink()
    report = script.main([*arguments, "--model", "proposed"])  # it finds the checkpoint beside the code
    stored = [read_checkpoint(tmp_path / name) for name in ("ours.dynamic.pt", "other.dynamic.pt")]
    assert all(one["architecture"] == "proposed" and one["preset"] == "paper" for one in stored)
    assert all(map(torch.equal, *(one["model"].values() for one in stored))), "by name or by file"
    int8, whole = report["reach"]["bytes"]
    assert int8 == (tmp_path / "ours.dynamic.pt").stat().st_size and 0.90 < int8 / whole < 0.93
    assert [(row["system"], row["objects"]) for row in report["cases"]] == [("float", 2), ("int8", 2)]
    assert list(report["seconds"]) == ["encoder, 1 image", "decoder, 1 box", "decoder, 2 boxes"]
    assert set(report["seconds"]["decoder, 1 box"]) == {"float", "int8", "PyTorch's int8"}
    text = (tmp_path / "ours.dynamic.md").read_text()
    assert "| weights | 3,965,952 | 34,792,784 | 11.4% |" in text and "one weight scale per tensor" in text
    assert text.count("- `mask_decoder.") == 47
    assert json.loads((tmp_path / "ours.dynamic.json").read_text())["arguments"]["model"] == "proposed"
    loaded = segment.load(tmp_path / "ours.dynamic.pt", engine="torch-int8")
    assert loaded.preset == PRESETS["paper"] and loaded.enhanced
    for path in tmp_path.glob("*.pt"):
        path.unlink()  # 140 MB each


def test_the_report_lists_modalities_in_the_order_of_files(tmp_path, capsys):
    modalities = ("US", "CT", "Dermoscopy", "MR")
    cases = [
        {"system": s, "case": m, "modality": m, "objects": 1, "dsc_strict": 0.5, "nsd_strict": 0.25}
        for m in modalities
        for s in ("float", "int8")
    ]
    seconds, arguments = {"b": {"float": 2.0, "int8": 1.0}}, {"repeats": 1}
    finish_int8(tmp_path / "a.dynamic.pt", "a", ["c"], {"weights": (1, 4)}, seconds, cases, 0, arguments)
    text, told = (tmp_path / "a.dynamic.md").read_text(), capsys.readouterr().out.rpartition("\nWrote ")[0]
    assert (
        told in text
        and f"1 runs, in turns, on {torch.get_num_threads()} threads" in text
        and text.startswith("# a\n")
        and text.endswith("\n- `c`\n")
    )
    rows = [line.split(" | ") for line in text.splitlines() if line.endswith(" | 50.00 | 25.00 | 50.00 | 25.00 |")]
    assert [row[0] for row in rows] == ["| CT", "| MR", "| US", "| Dermoscopy", "| Average"]
    assert "| weights | 1 | 4 | 25.0% |" in text and "| b | 2000 | 1000 | 2.00 |" in text


@pytest.mark.parametrize("rows", metric_rows.TABLES.values(), ids=metric_rows.TABLES)
def test_cases_get_the_scores_that_metrics_has_and_the_report_shows_them(rows, tmp_path, monkeypatch, capsys):
    metric_rows.use(monkeypatch, rows)
    bright = Segmenter(BrightModel(), PRESETS["fixed"], enhanced=False)
    write_case(tmp_path, tiny_case())
    found = script.score(tmp_path / "imgs" / f"{tiny_case().name}.npz", {"float": bright, "int8": bright})
    assert [scores_in(row) for row in found] == [[f"{name}_strict" for name in rows]] * 2
    seconds, arguments = {"b": {"float": 2.0, "int8": 1.0}}, {"repeats": 1}
    finish_int8(tmp_path / "a.dynamic.pt", "a", [], {"weights": (1, 4)}, seconds, found, 0, arguments)
    told = capsys.readouterr().out
    assert all(f"| {system}: {name.upper()} strict" in told for system in ("float", "int8") for name in rows)


def test_no_repeat_is_refused_before_anything_is_done(capsys):
    for value in ("0", "-1", "nan", "inf", "1e9", "99999999999", "x"):
        with pytest.raises(SystemExit) as stop:
            script.main([f"--repeats={value}"])
        told = capsys.readouterr().err.splitlines()[-1]
        wanted = "--repeats must be 1 or more" if value.lstrip("-").isdecimal() else "invalid int value"
        assert stop.value.code == 2 and wanted in told


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "none.pt"], "no such checkpoint"),
        (["--model", "third"], "unknown; choose one of baseline, proposed, or give a checkpoint"),
        (
            ["--model", str(lite_medsam_path()), "-o", str(lite_medsam_path())],
            r"lite_medsam\.pth: the int8 file must end in \.dynamic\.pt",
        ),
        (["-o", "a.pt"], "must end in .dynamic.pt"),
        (["-i", "nowhere"], "no such folder"),
        (["--preset", "weight_int8=row"], "weight_int8 is one of channel, tensor"),
    ],
)
def test_the_script_tells_bad_input_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        script.main(arguments)
