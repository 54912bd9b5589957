"""LiteMedSAM, the baseline of Tables 4 and 5 [P 4.1] and the teacher of distillation: a TinyViT image encoder
in front of the same prompt encoder and mask decoder as the proposed model's.

Read top to bottom: ConvBN -> MBConv -> WindowAttention -> TinyViTBlock -> Downsample -> TinyViT.
Letters: B images, N tokens of a window, C channels, H, W height and width, h heads, D width of a head.
Names are those of the published `lite_medsam.pth`. Dropout and stochastic depth act only in training: left out.
Sources: Wu et al., "TinyViT", arXiv:2207.10666; Ma et al., "Segment anything in medical images", Nat Commun 15:654
(2024), branch LiteMedSAM of its repository, whose stem keeps full resolution so that 256 pixels give 64x64 cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit import EMBED_DIM, LayerNorm2d


class ConvBN(nn.Module):
    """Convolution and batch normalization. (B, C, H, W) -> (B, C', H/stride, W/stride)"""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class Stem(nn.Module):
    """Two 1x1 convolutions at full resolution. (B, 3, H, W) -> (B, C, H, W)"""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvBN(3, c // 2), nn.GELU(), ConvBN(c // 2, c))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class TinyMBConv(nn.Module):
    """Inverted bottleneck with a shortcut and a GELU after the sum. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, c: int, expand: int = 4) -> None:
        super().__init__()
        self.conv1 = ConvBN(c, c * expand)
        self.conv2 = ConvBN(c * expand, c * expand, 3, groups=c * expand)
        self.conv3 = ConvBN(c * expand, c)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Downsample(nn.Module):
    """Between stages: widen, and halve the map unless the stage already works on 64x64. (B, C, H, W)"""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(c_in, c_out)
        self.conv2 = ConvBN(c_out, c_out, 3, stride, groups=c_out)
        self.conv3 = ConvBN(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Softmax attention within one window, with a learnt bias for each distance (|dy|, |dx|)."""

    def __init__(self, c: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(c)
        self.qkv = nn.Linear(c, 3 * c)
        self.proj = nn.Linear(c, c)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        cell = torch.arange(window * window)
        y, x = cell // window, cell % window
        # distances are numbered |dy| * window + |dx|
        distance = (y[:, None] - y[None]).abs() * window + (x[:, None] - x[None]).abs()  # (N, N)
        self.register_buffer("distance", distance, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, N, C) -> (windows, N, C)"""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.heads, 3, -1))  # (windows, N, h, 3, D)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each (windows, h, N, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.attention_biases[:, self.distance])
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Normalize, widen four times, GELU, narrow."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.fc1 = nn.Linear(c, 4 * c)
        self.fc2 = nn.Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Window attention, a depthwise 3x3 convolution that joins the windows, an MLP. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, c: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(c, heads, window)
        self.local_conv = ConvBN(c, c, 3, groups=c)
        self.mlp = Mlp(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(x)
        x = self.local_conv(x)
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        side = self.window
        x = F.pad(x, (0, -w % side, 0, -h % side))  # zeros at the right and bottom up to whole windows
        rows, columns = x.shape[2] // side, x.shape[3] // side
        x = x.reshape(b, c, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, side, side, C)
        x = self.attn(x.reshape(-1, side * side, c))  # every window on its own
        x = x.reshape(b, rows, columns, side, side, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * side, -1)
        return x[:, :, :h, :w]


class Stage(nn.Module):
    """Blocks of one width, then the way to the next stage."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.Sequential(*blocks), downsample

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """LiteMedSAM's image encoder: (B, 3, 256, 256), min-max normalized to 0..1 -> embedding (B, 256, 64, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Stem(64)  # (B, 64, 256, 256)
        self.layers = nn.Sequential(
            Stage([TinyMBConv(64) for _ in range(2)], Downsample(64, 128, 2)),  # (B, 128, 128, 128)
            Stage([TinyViTBlock(128, 4, 7) for _ in range(2)], Downsample(128, 160, 2)),  # (B, 160, 64, 64)
            Stage([TinyViTBlock(160, 5, 14) for _ in range(6)], Downsample(160, 320, 1)),  # (B, 320, 64, 64)
            Stage([TinyViTBlock(320, 10, 7) for _ in range(2)], None),
        )  # fmt: skip
        self.neck = nn.Sequential(
            nn.Conv2d(320, EMBED_DIM, 1, bias=False), LayerNorm2d(EMBED_DIM),
            nn.Conv2d(EMBED_DIM, EMBED_DIM, 3, padding=1, bias=False), LayerNorm2d(EMBED_DIM),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.neck(self.layers(self.patch_embed(image)))
