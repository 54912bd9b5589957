"""The image encoder of Figure 1: EfficientViT-SAM-L0, image (B, 3, 256, 256) -> embedding (B, 256, 64, 64).

Read top to bottom: the convolution blocks -> LinearAttention -> EfficientViTBlock -> Backbone -> Neck -> ImageEncoder.
Letters: B images, C channels, H, W height and width, HW their product.
Module names are those of the published checkpoint `efficientvit_sam_l0.pt`, so that it loads without a map;
that is why a stage keeps its blocks in `op_list` and a residual block keeps its branch in `main`.

Sources: [P] Lee, Ku, Choi, "Gray's Anatomy for Segment Anything Model", CVPR 2024 challenge on laptops;
[EV] Cai et al., "EfficientViT", arXiv:2205.14756; [EVS] Zhang et al., "EfficientViT-SAM", arXiv:2402.05008.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBED_GRID = 64  # side of the image embedding: the decoder was trained on 64x64, whatever the input [EVS]
EMBED_DIM = 256  # channels of the image embedding and of every prompt token


class ConvNorm(nn.Module):
    """Convolution, batch normalization, GELU; the last two can be left out.
    (B, C, H, W) -> (B, C', H/stride, W/stride)"""

    def __init__(self, c_in, c_out, kernel=1, stride=1, groups=1, norm=True, act=True, bias=None) -> None:
        super().__init__()
        bias = not norm if bias is None else bias  # a norm brings its own bias
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(c_out, eps=1e-6) if norm else nn.Identity()
        self.act = nn.GELU(approximate="tanh") if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ResBlock(nn.Module):
    """Two 3x3 convolutions. [EVS, stem]"""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(c, c, 3)
        self.conv2 = ConvNorm(c, c, 3, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class FusedMBConv(nn.Module):
    """Expand with a full 3x3 convolution, project back: fast on early, large maps. [EVS]"""

    def __init__(self, c_in: int, c_out: int, expand: int, stride: int = 1) -> None:
        super().__init__()
        self.spatial_conv = ConvNorm(c_in, c_in * expand, 3, stride)
        self.point_conv = ConvNorm(c_in * expand, c_out, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.spatial_conv(x))


class MBConv(nn.Module):
    """Mobile inverted bottleneck: expand 1x1, depthwise 3x3, project 1x1. [P 2.2: "MBConvolution"]"""

    def __init__(self, c_in: int, c_out: int, expand: int, stride: int = 1) -> None:
        super().__init__()
        mid = c_in * expand
        self.inverted_conv = ConvNorm(c_in, mid, norm=False)  # L0 normalizes only the projection in its late stages
        self.depth_conv = ConvNorm(mid, mid, 3, stride, groups=mid, norm=False)
        self.point_conv = ConvNorm(mid, c_out, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


class LinearAttention(nn.Module):
    """ReLU linear attention at two scales. [EV 3.1; "LiteMLA" in its code]

    Each pixel i has a query q_i, a key k_i and a value v_i, vectors of d numbers. The output of
    pixel i is a weighted mean of the values of all pixels j. A weight says how similar query i and
    key j are:
        o_i = sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j)      sim(q, k) = ReLU(q) . ReLU(k)
    Softmax attention has sim(q, k) = exp(q . k / sqrt(d)): (H W)^2 similarities, one for each pair.
    Here it is a plain product, so ReLU(q_i), which does not depend on j, can leave the sums:
        o_i = S ReLU(q_i) / (z . ReLU(q_i))      S = sum_j v_j ReLU(k_j)^T      z = sum_j ReLU(k_j)
    S, d x d numbers, and z, d numbers, are computed once for all queries: the cost grows with H W.
    """

    def __init__(self, c: int, head_dim: int = 32, kernel: int = 5) -> None:
        super().__init__()
        self.head_dim = head_dim
        heads = c // head_dim
        self.qkv = ConvNorm(c, 3 * c, norm=False, act=False, bias=False)
        # second scale: before attention each pixel also sees a neighbourhood of kernel x kernel
        around = nn.Conv2d(3 * c, 3 * c, kernel, padding=kernel // 2, groups=3 * c, bias=False)
        mixed = nn.Conv2d(3 * c, 3 * c, 1, groups=3 * heads, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(around, mixed)])
        self.proj = ConvNorm(2 * c, c, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        b, _, h, w = x.shape
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, self.aggreg[0](qkv)], dim=1)  # (B, 2 scales * 3C, H, W)
        # in float32 also where the rest runs in float16: the sums over keys overflow it
        with torch.autocast(x.device.type, enabled=False):
            qkv = qkv.float().reshape(b, -1, 3 * self.head_dim, h * w)  # (B, 2 * heads, 3 * head_dim, HW)
            q, k, v = qkv.chunk(3, dim=2)  # each (B, 2 * heads, head_dim, HW): column i is q_i, k_i, v_i
            q, k = q.relu(), k.relu()
            S = v @ k.transpose(2, 3)  # (B, 2 * heads, head_dim, head_dim)
            z = k.sum(dim=-1).unsqueeze(-2)  # (B, 2 * heads, 1, head_dim)
            # where all of ReLU(q_i) is 0, the tiny number makes o_i 0 instead of 0 / 0
            out = (S @ q) / (z @ q).clamp(min=1e-15)  # (B, 2 * heads, head_dim, HW)
        return self.proj(out.reshape(b, -1, h, w).to(x.dtype))


class Residual(nn.Module):
    """x + main(x), or main(x) alone where the size changes."""

    def __init__(self, main: nn.Module, shortcut: bool = True) -> None:
        super().__init__()
        self.main, self.shortcut = main, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x) if self.shortcut else self.main(x)


class EfficientViTBlock(nn.Module):
    """Global context by linear attention, local detail by an MBConv, both residual. [EV Fig. 5]"""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.context_module = Residual(LinearAttention(c))
        self.local_module = Residual(MBConv(c, c, expand=6))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class Chain(nn.Module):
    """Blocks in a row."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.op_list(x)


class Backbone(nn.Module):
    """EfficientViT-L0: (B, 3, H, W) -> maps at 1/8, 1/16 and 1/32 with 128, 256 and 512 channels. [EVS Fig. 2]"""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([
            Chain(ConvNorm(3, 32, 3, stride=2), Residual(ResBlock(32))),  # 1/2
            Chain(Residual(FusedMBConv(32, 64, 16, 2), False), Residual(FusedMBConv(64, 64, 4))),  # 1/4
            Chain(Residual(FusedMBConv(64, 128, 16, 2), False), Residual(FusedMBConv(128, 128, 4))),  # 1/8
            Chain(Residual(MBConv(128, 256, 16, 2), False), *(Residual(MBConv(256, 256, 4)) for _ in range(4))),  # 1/16
            Chain(Residual(MBConv(256, 512, 24, 2), False), *(EfficientViTBlock(512) for _ in range(4))),  # 1/32
        ])  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[2], maps[3], maps[4]


class Neck(nn.Module):
    """Three maps, brought to one size and added, then four fused MBConvs: the 64x64 embedding. [EVS Fig. 2]

    The size is 64 whatever the input: at 256x256 pixels these layers are 65 % of the encoder's work.
    """

    def __init__(self) -> None:
        super().__init__()
        c = EMBED_DIM
        self.input_ops = nn.ModuleList([Chain(ConvNorm(width, c, act=False)) for width in (512, 256, 128)])
        self.middle = Chain(*(Residual(FusedMBConv(c, c, expand=1)) for _ in range(4)))
        self.output_ops = nn.ModuleList([Chain(ConvNorm(c, c, norm=False, act=False))])

    def forward(self, maps: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        size = (EMBED_GRID, EMBED_GRID)
        # coarsest first, as the original adds them: rounding is the same
        total = sum(
            F.interpolate(op(x), size=size, mode="bicubic", align_corners=False)
            for op, x in zip(self.input_ops, reversed(maps), strict=True)
        )
        return self.output_ops[0](self.middle(total))


class LayerNorm2d(nn.Module):
    """Layer normalization over the channels of each pixel. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))
        self.bias = nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # (B, H * W, C)
        return F.layer_norm(pixels, self.weight.shape, self.weight, self.bias, 1e-6).transpose(1, 2).reshape(x.shape)


class ImageEncoder(nn.Module):
    """Image (B, 3, 256, 256), min-max normalized to 0..1 -> embedding (B, 256, 64, 64). [P 2.2; Fig. 1]"""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = Neck()
        self.norm = LayerNorm2d(EMBED_DIM)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.neck(self.backbone(image)))
