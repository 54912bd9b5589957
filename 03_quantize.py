"""Step 3 of 5, quantize: linear layers to int8, and what that buys. [P 2.3]

Quantization gives each number fewer bits: less memory, and sums of small integers in place of floats. Of
the weights W this is done once, before deployment. Of the activations x there are two ways. Static
quantization fixes their range beforehand, on some training images; it is fast, but less accurate for an
image with other values. Dynamic quantization takes the range from the x that is there, anew at every call. The paper
chooses it, as medical images vary, and as nothing has to be calibrated. A linear layer y = W x + b becomes

    W ~ s_w Q_w          once: s_w = max |W| / 127.5, Q_w in -128..127; W is a layer, or (`fixed`) one output
    x ~ s_x (Q_x - z)    every x: s_x = (max x - min x) / 255, z = -128 - min x / s_x, rounded
    y = s_w s_x (Q_w Q_x - z sum_k Q_w) + b

max and min also count 0. The sums are of products of small integers, exact in int32 (quantize.py). Linear
layers alone are reached: most of the mask decoder, but nothing of the proposed image encoder, whose weights are all
of convolutions and norms (#39).

The paper says that int8 takes less memory, is faster, and loses neither DSC nor NSD [P 2.3, 4.1, 4.3].
This step measures all three, for float, for int8 by the layers of quantize.py, and in time also for
PyTorch's own, torch.qint8, which the paper names. With weight_int8=tensor the two give equal masks, bit for bit.

    python 03_quantize.py                                   LiteMedSAM, the baseline -> checkpoints/
    python 03_quantize.py --model runs/table3/best.pt -i demo/cache/cases/imgs      with scores on cases

Writes NAME.dynamic.pt for step 4, and a report. Static int8, for comparison: python -m engines static.
"""

import copy
from argparse import ArgumentParser, Namespace
from pathlib import Path

from torch import nn

import segment
from demo_data import tiny_folder
from formats import checkpoints, readers, truth, writing
from metrics import case_scores
from presets import preset_options
from quantize import Int8Linear, compare_speed, int8_reach, pytorchs_int8, save_int8
from tables import finish_int8, score_cases
from volumes import segment_case

TIMED_BOXES = (1, 6, 16)  # boxes that the timed decoder is asked at once


def run(args: Namespace, cases: list[Path]) -> dict:
    # 1. The float network, trained: quantization comes last, and trains nothing
    model, path, stored = segment.read_model(args.model)
    preset, force, settings = preset_options(args.preset)
    floats = segment.load(model, path, preset, force=force, settings=settings)
    network, preset = floats.engine.network, floats.preset

    # 2. Every linear layer gives way to one of int8, its weights rounded to whole steps of s_w: one s_w for the
    #    layer, as PyTorch, or one for each of its outputs, as the preset says. Convolutions and norms stay
    #    float32, 31 of the proposed network's 35 million weights, and so do attention's products. PyTorch's
    #    quantize_dynamic, which the released code calls, has the same reach (#39)
    quantized, layers = copy.deepcopy(network), []
    for name, layer in network.named_modules():
        if type(layer) is nn.Linear:
            quantized.set_submodule(name, Int8Linear(layer, preset.weight_int8))
            layers.append(name)

    # 3. Less memory [P 2.3]? An int8 weight has one byte, a float32 weight four. What share of all weights
    #    was reached, and of the multiply-adds of encoder and decoder, which could become faster? Of the
    #    baseline it is more: its image encoder, TinyViT, has linear layers
    reach = int8_reach(network)
    int8_bytes = save_int8(args.out, quantized, preset.weight_int8, architecture=model, preset=stored.get("preset"))
    reach["bytes"] = (int8_bytes, sum(value.numel() * value.element_size() for value in network.state_dict().values()))
    # From here on int8 is what the file holds
    int8 = segment.load(model, args.out, preset.name, "torch-int8", force, settings)

    # 4. Faster [P 4.3]? The paper compares its int8 model with the baseline, which has another encoder: up to
    #    five times as fast, three times on average. Here each network is compared with itself: median seconds
    #    of the encoder, and of the decoder with few and many boxes. What lies between our int8 and PyTorch's is
    #    mostly Python: PyTorch has one call for the whole equation, ours has a call for each of its steps
    timed = {"float": floats.engine, "int8": int8.engine, "PyTorch's int8": pytorchs_int8(network)}
    seconds = compare_speed(timed, args.repeats, TIMED_BOXES)

    # 5. As accurate [P 4.1, Table 4]? The paper's averages rise with int8: of the baseline DSC from 83.83 to
    #    84.06, NSD from 95.20 to 95.32; of the proposed model from 88.20 to 88.54 and 98.05 to 98.28. The proposed
    #    model gains most in MR, 80.92 to 82.69 of DSC; in PET it loses, 79.22 to 79.15. Rounding adds no knowledge,
    #    but the released code draws boxes at random when it scores (#19). Here float and int8 get the same boxes
    rows, left_out = score_cases(lambda path: score(path, {"float": floats, "int8": int8}), cases)

    title = f"{model}, dynamic int8, one weight scale per {preset.weight_int8}"
    return finish_int8(args.out, title, layers, reach, seconds, rows, left_out, vars(args))


def score(path: Path, systems: dict[str, segment.Segmenter]) -> list[dict]:
    """One case: DSC and NSD of each system at the same boxes, as tables.summarize takes them. [P 3.1]"""
    (case, true), rows = truth.read_scored(path), []
    for name, segmenter in systems.items():
        # Boxes to masks: an embedding, and from it a mask for each box; int8 measures ranges anew in each call
        found = true.labels_of(segment_case(segmenter, case))
        # DSC, the overlap, and NSD, the share of the contour within 2 px (2 mm): of each object, then the mean
        means = case_scores(found, true.labels, true.spacing_mm).means
        row = {"system": name, "case": case.name, "modality": case.modality, "objects": len(true.ids)}
        rows.append(row | {f"{metric}_strict": mean for metric, mean in means.items()})
    return rows


def main(argv: list[str] | None = None) -> dict:
    """Returns the report."""
    p, models = ArgumentParser(description=__doc__.splitlines()[0]), ", ".join(segment.MODELS)
    p.add_argument("--model", default="baseline", metavar="NAME|FILE", help=f"{models}, or a checkpoint (baseline)")
    p.add_argument("--preset", nargs="+", default=[], metavar="NAME|FIELD=VALUE", help="such as weight_int8=tensor")
    p.add_argument("-i", "--input", type=Path, help="folder of .npz cases to score, whose truth is in ../gts")
    p.add_argument("-o", "--out", type=Path, help="the int8 file (default: beside the float one, or in checkpoints/)")
    p.add_argument("--repeats", type=int, default=9, help="timed runs of each part, of which the median counts (9)")
    p.add_argument("--smoke", action="store_true", help="one tiny case, one repeat")
    args = p.parse_args(argv)
    if not 1 <= args.repeats <= 10_000:
        p.error("--repeats must be 1 or more, and at most 10,000")
    with writing.script("03_quantize.py", args, "demo_data:smoke_quantize") as scratch:
        args.out = args.out or checkpoints.int8_path(segment.file_of(args.model), args.model in segment.MODELS)
        with writing.one_run(args.out.parent, file=args.out.name.removesuffix(".pt")):
            return run(args, readers.list_cases(args.input or tiny_folder(scratch)))


if __name__ == "__main__":
    main()
