"""What does a shorter number cost? DSC and NSD of the encoder in float32, bfloat16 and int8, by modality. (D17)

    python benchmarks/precision.py --cases val --static NAME.static           20 min on 2 cores

Engine openvino in float32 and bfloat16, and openvino-int8; decoders are float32 in all three. Where the processor has no
bfloat16, it is imitated in PyTorch: weights, and what goes into and comes out of each layer, are rounded to bfloat16 (8 bits of
precision), and sums stay float32, as a processor that has it does. Exact boxes. Writes results/precision/cases.csv and table.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from choices import exact_cases, scores_of  # it puts the repository on the path too
from torch import Tensor, nn

import segment
import tables
from fast import engines
from fast.openvino_engine import OpenVINOEngine, has_bfloat16
from fast.torch_engine import fold_batch_norms
from files import InputError
from files.checkpoints import OUR_CHECKPOINT
from files.writing import csv_text, save_text
from segment import Segmenter

FLOAT = "float32"
ALLOWED = {"dsc_strict": 0.1, "nsd_strict": 0.2}  # points that bfloat16 may move the means and still be the default


def rounded(value: Tensor) -> Tensor:
    """A tensor with the precision of bfloat16, in float32."""
    return value.bfloat16().float()


class ImitatedEngine:
    """The two calls of an engine: an encoder with bfloat16's rounding, OpenVINO's decoder."""

    def __init__(self, encoder: nn.Module, decoder: OpenVINOEngine) -> None:
        self.encoder, self.decoder = fold_batch_norms(encoder), decoder
        for value in self.encoder.state_dict().values():
            value.copy_(rounded(value))
        for layer in self.encoder.modules():
            layer.register_forward_pre_hook(lambda _, inputs: tuple(map(self.rounded_all, inputs)))
            layer.register_forward_hook(lambda _, inputs, output: self.rounded_all(output))

    def rounded_all(self, value):
        """A tensor, or each of several."""
        return rounded(value) if isinstance(value, Tensor) else tuple(map(rounded, value))

    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> np.ndarray:
        """image (3, 256, 256) -> embedding (4096, 256), as OpenVINOEngine has it"""
        return np.ascontiguousarray(self.encoder(torch.from_numpy(image)[None]).flatten(2)[0].T.numpy())

    def decode(self, *prompt):
        """See OpenVINOEngine.decode."""
        return self.decoder.decode(*prompt)


def forms_of(args: argparse.Namespace) -> dict[str, Segmenter]:
    """name of a number's form -> what segments with it"""
    found = {FLOAT: engines.load("proposed", args.weights, engine="openvino", cache=args.engine_cache)}
    if has_bfloat16():
        found["bfloat16"] = engines.load(
            "proposed", args.weights, engine="openvino", cache=args.engine_cache, precision="bf16"
        )
    else:
        network, _, preset = segment.load_network("proposed", args.weights, None, "torch", False, ())
        imitated = ImitatedEngine(network.image_encoder, found[FLOAT].engine)
        found["bfloat16, imitated"] = Segmenter(imitated, preset, enhanced=True)
    if args.static:
        found["int8"] = engines.load("proposed", args.static, engine="openvino-int8", cache=args.engine_cache)
    return found


def precision_table(rows: list[dict], names: list[str]) -> str:
    """table.md: a row a modality; DSC and NSD of each form, and what it moves the means by."""
    summary = tables.summarize(rows)
    modalities = list(dict.fromkeys(modality for _, modality in summary))
    lines = [["modality", "cases", *(f"{score} {name}" for score in ("DSC", "NSD") for name in names)]]
    for modality in modalities:
        found = [summary[name, modality] for name in names]
        cells = [f"{100 * line[score]:.2f}" for score in ALLOWED for line in found]
        lines.append([modality, str(found[0]["cases"]), *cells])
    told = []
    for name in names[1:]:
        moved = {s: 100 * (summary[name, tables.AVERAGE][s] - summary[FLOAT, tables.AVERAGE][s]) for s in ALLOWED}
        within = all(abs(moved[score]) < limit for score, limit in ALLOWED.items())
        told.append(
            f"- {name}: {moved['dsc_strict']:+.3f} DSC, {moved['nsd_strict']:+.3f} NSD, {'within' if within else 'beyond'} "
            "0.1 and 0.2."
        )
    note = "Per cent, protocol strict, exact boxes. Means of the modalities, and how far from float32:"
    return "\n".join([f"# {__doc__.splitlines()[0]}", "", tables.pipe_table(lines), "", note, "", *told, ""])


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--cases", type=Path, nargs="+", required=True, help="folders of .npz cases with imgs and gts")
    p.add_argument("--weights", type=Path, default=OUR_CHECKPOINT, help="checkpoint of the proposed model")
    p.add_argument("--static", type=Path, help="its int8 form, NAME.static (default: int8 is left out)")
    p.add_argument("--engine-cache", type=Path, default=Path("out/precision"), help="where OpenVINO keeps graphs")
    p.add_argument("-o", "--out", type=Path, default=Path("results/precision"), help="folder for the tables")
    args = p.parse_args(argv)
    try:
        rows, systems = [], forms_of(args)
        with tempfile.TemporaryDirectory() as work:
            cases = exact_cases(args.cases, Path(work), only_2d=False)
            for name, segmenter in systems.items():
                rows += scores_of(segmenter, cases, name, Path(work))
        columns = ("system", "case", "modality", "objects", *tables.score_names())
        save_text(args.out / "cases.csv", csv_text(rows, columns))
        save_text(args.out / "table.md", precision_table(rows, list(systems)))
    except (InputError, OSError) as error:
        sys.exit(f"precision.py: {error}")
    print(precision_table(rows, list(systems)))


if __name__ == "__main__":
    main()
