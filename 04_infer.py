"""Step 4 of 5, infer: boxes to masks, and the seconds that it takes. [P 2.2, 4.3]

The image encoder does nine tenths of the network's multiply-adds, and it sees no box. So an image is encoded
once, and each of its boxes then costs one pass of the light mask decoder (Figure 1 of the paper):

    image (H, W) -> 256 grid, three channels -> image encoder -> embedding (1, 256, 64, 64), kept
    box (4,) -> 256 grid -> prompt encoder, and with the embedding the mask decoder
             -> logits (256, 256) and a predicted IoU -> upsampled to (H, W), a mask where above 0; it ends
             near its box (D18)
             -> painted onto the label map: box i becomes label i + 1

With e seconds for the encoder and d for the decoder an image with N boxes takes e + N d, and not N (e + d).
The paper's encoder, EfficientViT-SAM-L0, has a smaller e than that of the baseline, which is LiteMedSAM; their
decoders are alike. So it gains most where there are many images and few boxes [P Table 5, in seconds]:

                                                 baseline   proposed
    CT, 287 slices of 512 x 512, 6 objects         210.98      51.85    many images (the code encodes each anew, #44)
    microscopy, 1920 x 2560, 241 objects             6.27       6.19    one image, many boxes
    dermoscopy, 3024 x 4032, 1 object                1.41       2.09    perhaps the channels, made at full size (#7)

The paper's text does not say how a box becomes masks in a volume. The released code goes slice by slice, from
the middle of the box outwards. So does this step, by a loop of our own that also uses the box's ends (D6); the
presets `paper` and `released` have the released one, without and with its faults (volumes.py).

    python 04_infer.py -i examples -o out          a folder of images with boxes.csv, or of .npz cases
    python 04_infer.py -i examples/retina.jpg -o out --box 44 200 112 274     (or --page: in a browser)

What it reads, how boxes may be made (--boxes), and every file that it writes: docs/formats.md.
"""

import argparse
import os
from pathlib import Path

# NumPy's own threads, waiting for work, would take cores from the network's
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np

import segment
from enhance import network_input
from figures import PALETTE, flat_view, overlay
from formats import results, writing
from formats.case import Case
from presets import preset_options
from volumes import Found, segment_volume

# Where the seconds of a case go: the columns of efficiency.csv. Running time is the paper's third measure, as
# the challenge is for laptops without a GPU; the paper's Table 5 has it case by case [P 3.1, 4.3]. The challenge's
# clock runs from file to file and counts loading the network; here one process does all cases, and it does not
STAGES = (
    "read",  # a file to an image and its boxes
    "enhance",  # 256 grid, three channels
    "encode",  # e, once an image or slice
    "decode",  # d, once a box; six boxes are asked at a time
    "upsample",  # masks at the image's size
    "write",  # the label map to a file
    "total",
)


def find_masks(segmenter: segment.Segmenter, case: Case) -> Found:
    """The masks of a case's boxes: one embedding, and from it a mask for each box. [P 2.2]"""
    if case.is_3d:
        # Of each box the middle slice first, asked with the box itself. Then the slices above and below, each
        # asked with the box of the mask on the slice before, made a little larger, as the object may grow; until
        # the box ends. Where the network is unsure, the ellipsoid in the box decides. A slice that several boxes
        # reach is encoded once
        return segment_volume(segmenter, case, lambda z: writing.progress(z, case.name, unit="slice", leave=False))

    # [P 2.1] The image on the 256 grid, as the network saw images in training: of one gray channel three
    with segmenter.stage("enhance"):
        channels = network_input(case.image, segmenter.preset, segmenter.enhanced)  # (3, 256, 256) in [0, 1]

    # [P 2.2] The image encoder, once. MBConv layers make the image smaller, EfficientViT modules let distant
    # parts see one another: 64 x 64 places with 256 features each
    with segmenter.stage("encode"):
        embedding = segmenter.engine.encode(channels)

    # [P 2.2] For each box MedSAM's two parts with that one embedding: the prompt encoder makes tokens of the
    # box's corners, and the mask decoder, in which tokens and features attend to one another, a mask. It comes
    # on the 256 grid, is upsampled to the image, and painted. Where two overlap, the higher logit wins (D5)
    canvas = segmenter.new_canvas(np.zeros(case.grid_shape, np.uint16), len(case.boxes))
    decoded = segmenter.decode_boxes(embedding, case.boxes, case.grid_shape, case.boxes_are)
    predicted_iou, own_pixels = [], []
    for label, (mask, iou) in enumerate(decoded, start=1):
        with segmenter.stage("upsample"):
            canvas.paint(label, mask)
        # How well it overlaps the truth, as the network expects: the squared error in training taught it
        predicted_iou.append(iou)
        # Also pixels that another object covers
        own_pixels.append(np.count_nonzero(mask.values > 0))
    return Found(canvas.labels, np.array(predicted_iou), np.array(own_pixels))


def run(args: argparse.Namespace) -> list[dict]:
    """Segment every case, write its label map, and note what took how long. -> rows of efficiency.csv"""
    job = results.Job(vars(args))
    segmenter = load_model(args)
    segmenter.kind_to_ask(job.boxes_are or "exact")  # or an InputError, before any case is read
    for path in job.paths():
        with job.or_left_out(path):
            # The clock of one case [P 4.3, Table 5]
            segmenter.seconds.clear()
            with segmenter.stage("total"):
                with segmenter.stage("read"):
                    case = job.read(path)
                found = find_masks(segmenter, case)
                with segmenter.stage("write"):
                    found = job.save(path, case, found, PALETTE)
            job.note(case, found, {f"{stage}_s": segmenter.seconds[stage] for stage in STAGES})

            # Image, boxes and masks in one picture [P Fig. 3]
            if picture := job.picture(path, case):
                writing.save_image(picture, overlay(*flat_view(case.image, found.labels, case.boxes), numbers=True))
    return job.finish(segmenter)


def load_model(args: argparse.Namespace, model: str = "") -> segment.Segmenter:
    # proposed is the paper's network with our weights, baseline is LiteMedSAM; engine torch-int8 has its linear
    # layers in int8 [P 2.3]; a preset is a reading of the paper, where its text and its code differ (presets.py)
    preset, force, settings = preset_options(args.preset)
    engine, options = segment.engine_options(args.engine)
    segmenter = segment.load(model or args.model, None, preset, engine, force, settings, **options)
    writing.tell(f"04_infer.py: {model or args.model}, preset {segmenter.preset.name}, engine {engine}")
    return segmenter


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of efficiency.csv."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-i", "--input", type=Path, help="a folder of cases, a file, or a DICOM folder")
    p.add_argument("-o", "--output", type=Path, default=Path("segs"), help="made if missing (default: segs)")
    boxes = p.add_mutually_exclusive_group()
    boxes.add_argument("--box", type=float, nargs="+", action="append", help="X0 Y0 X1 Y1, in 3D X0 Y0 Z0 X1 Y1 Z1")
    boxes.add_argument("--page", action="store_true", help="a page to draw boxes in, with a browser on this computer")
    p.add_argument("--boxes", "--boxes-from-masks", nargs="?", const="0", action="append", default=[], metavar="KIND|SHARE",
                   help=f"how they were made: {', '.join(segment.BOX_KINDS)}; a number, or nothing: those of labels, loosened")  # fmt: skip
    p.add_argument("--model", default="proposed", metavar="NAME|FILE", help="proposed (default), baseline, or a file")
    p.add_argument("--preset", nargs="+", default=[], metavar=("NAME", "FIELD=VALUE"), help="presets.py; or force=yes")
    p.add_argument("--engine", nargs="+", default=["torch"], help=f"{', '.join(segment.ENGINES)}; then KEY=VALUE")
    p.add_argument("--read", nargs="+", default=[], metavar="KEY=VALUE", help="window=lung or =400/40, modality=CT")
    p.add_argument("--smoke", action="store_true", help="two tiny synthetic cases instead of --input")
    args = p.parse_args(argv)
    with writing.script("04_infer.py", args, "demo_data:smoke_infer"):
        if args.page:
            from page.app import serve  # only here: it needs a package more

            return serve(lambda model: load_model(args, model), vars(args))
        with writing.one_run(args.output, "overlays"):
            return run(args)


if __name__ == "__main__":
    main()
