"""A model as ONNX files, which many runtimes read: the image encoder, and for each kind of boxes a decoder.

    python -m engines onnx --model proposed -o onnx/          examples/onnx_example.py runs them without PyTorch

encoder.onnx        image (1, 3, 256, 256) float32, see enhance.network_input   -> embedding (1, 256, 64, 64)
decoder-KIND.onnx   embedding, boxes (N, 4) x0 y0 x1 y1 on the 256 grid         -> logits (N, 1, 256, 256), iou (N, 1)
Each is run in ONNX Runtime when it is made, and compared with model.py.
Needs: pip install -r requirements-onnx.txt
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import segment
from formats import InputError
from grid import GRID

TOLERANCE = 1e-4  # |found - wanted| / |wanted| of each output


class Decoder(nn.Module):
    """The decoder of a kind of boxes, for any number of them."""

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.decode(embedding, boxes, boxes_are=self.kind)


def export_onnx(model: str | Path, folder: Path) -> list[Path]:
    """Write and check the files. -> their paths.   InputError if a package is missing, or if a file answers differently."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  PyTorch's exporter needs it
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run: pip install -r requirements-onnx.txt") from error
    engine = segment.load(model).engine
    random = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, GRID, GRID, generator=random)
    with torch.no_grad():
        embedding = engine.network.image_encoder(image)
    corner = torch.rand(5, 2, generator=random) * GRID / 2
    boxes = torch.cat([corner, corner + GRID / 3], dim=1)
    any_number = {"embedding": None, "boxes": {0: torch.export.Dim("boxes", min=1)}}
    parts = {"encoder": (engine.network.image_encoder, {"image": image}, ["embedding"], None)}
    for kind in engine.kinds:
        inputs = {"embedding": embedding, "boxes": boxes}
        parts[f"decoder-{kind}"] = (Decoder(engine.network, kind).eval(), inputs, ["logits", "iou"], any_number)

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (module, inputs, outputs, shapes) in parts.items():
        path = folder / f"{name}.onnx"
        with tempfile.TemporaryDirectory(dir=folder) as scratch, torch.no_grad():
            made = Path(scratch) / path.name
            example = {key: value[:2] if key == "boxes" else value for key, value in inputs.items()}
            torch.onnx.export(
                module, tuple(example.values()), made, input_names=list(inputs), output_names=outputs, dynamic_shapes=shapes,
                external_data=False, verbose=False,
            )  # fmt: skip
            wanted = module(*inputs.values())
            found = onnxruntime.InferenceSession(made).run(None, {key: value.numpy() for key, value in inputs.items()})
            for one, other in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
                if not np.linalg.norm(one - other.numpy()) <= TOLERANCE * np.linalg.norm(other.numpy()):  # NaN is not
                    raise InputError(f"{path}: ONNX Runtime computes something else than model.py; it was not written")
            made.replace(path)
        paths.append(path)
    return paths
