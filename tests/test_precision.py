"""benchmarks/precision.py: bfloat16's rounding by hand, and the table's verdict."""

import numpy as np
import precision
import pytest
import torch

import efficientvit
import tables


def test_numbers_keep_eight_bits():
    values = torch.tensor([1.0, 1 + 2**-7, 1 + 2**-9, 3.14159, 1e38, -0.1])
    wanted = [1.0, 1.0078125, 1.0, 3.140625, 1e38, -0.1]
    found = precision.rounded(values)
    assert found.dtype == torch.float32 and torch.allclose(found, torch.tensor(wanted), rtol=2**-8)
    assert found[:4].tolist() == wanted[:4]


class Tiny(torch.nn.Module):
    """One convolution and the norm."""

    def __init__(self):
        super().__init__()
        self.patch = efficientvit.ConvNorm(3, 256, 5, stride=4)
        self.norm = efficientvit.LayerNorm2d(256)

    def forward(self, image):
        return self.norm(self.patch(image))


def test_an_imitated_encoder_answers_in_bfloat16_and_close_to_the_exact_one():
    torch.manual_seed(0)
    encoder = Tiny().eval()
    image = np.random.default_rng(0).random((3, 256, 256), np.float32)
    with torch.inference_mode():
        exact = encoder(torch.from_numpy(image)[None]).flatten(2)[0].T.numpy()
    found = precision.ImitatedEngine(encoder, None).encode(image)
    assert found.shape == (4096, 256) and np.array_equal(found, precision.rounded(torch.from_numpy(found)).numpy())
    off = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < off < 1e-2, off


def test_the_table_says_whether_the_means_stay_within_what_is_allowed():
    rows = []
    for system, dsc, nsd in (("float32", 0.9, 0.7), ("bfloat16", 0.8995, 0.7015), ("int8", 0.901, 0.68)):
        for case, modality in (("2D_US_a", "US"), ("2D_CT_b", "CT")):
            row = {name: float("nan") for name in tables.score_names()}
            row |= {"case": case, "modality": modality, "system": system, "objects": 1}
            rows.append(row | {"dsc_strict": dsc, "nsd_strict": nsd})
    text = precision.precision_table(rows, ["float32", "bfloat16", "int8"])
    assert "| US | 1 | 90.00 | 89.95 | 90.10 | 70.00 | 70.15 | 68.00 |" in text
    assert "- bfloat16: -0.050 DSC, +0.150 NSD, within 0.1 and 0.2." in text
    assert "- int8: +0.100 DSC, -2.000 NSD, beyond 0.1 and 0.2." in text
    assert pytest.approx(0.1) == precision.ALLOWED["dsc_strict"]
