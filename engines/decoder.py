"""The mask decoder for OpenVINO's graphs: model.py's transformer, whose attentions take their sums in another order. (D19)

A box is 7 tokens (IoU, four masks, two corners), an image is 4,096 cells. model.py, like every SAM, projects all cells
to keys, queries and values anew in each layer and for each box. The layers here give the same results but for rounding:
- The scores of attention are products q . (W x) of a token's query q and a cell x, which equal (W^T q) . x. So the few
  tokens are projected, not the many cells. In the same way, a weighted sum of values W x is W times the sum of x.
- What the first layer projects of the cells is computed once an image: no box has changed the cells yet.
- In the last attention only the two tokens look that are used afterwards: those of the IoU and of the mask.
- Upscaling makes 4x4 pixels of each cell, without its neighbours. So only cells that the mask may reach are upscaled.
A box takes about a sixth of the time that it takes in a graph of model.py's decoder. Measured, each left out alone: without
the first a box takes 2.6 times as long, without the second up to 1.3 times, without the third 1.1 times.

Biases: attention weights sum to 1, so a bias of the values is added once, behind the sum. A bias of the keys adds the
same to all scores of a query, which softmax does not see: it is left out.
Letters: T tokens of a box, 4,096 = 64x64 cells, row by row; "by head" is (heads, T or cells, width).
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit import EMBED_GRID
from model import Attention, BoxSegmenter

USED = 2  # tokens that are used after the transformer, the first ones: IoU and mask


def by_head(x: Tensor, heads: int) -> Tensor:
    """(T, heads * width) -> (heads, T, width)"""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def weight_by_head(layer: nn.Linear, heads: int) -> Tensor:
    """The weight of a projection, (heads, width, 256)."""
    return layer.weight.unflatten(0, (heads, -1))


def softmax_sum(scores: Tensor, values: Tensor) -> Tensor:
    """scores (..., T, 4096), values (..., 4096, width) -> `scores.softmax(-1) @ values`

    OpenVINO would make one step of these three, which takes three times as long for so few tokens."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights @ values) / weights.sum(-1, keepdim=True)


class TokensLook(nn.Module):
    """In place of a model.Attention by which tokens look at cells."""

    def __init__(self, layer: Attention, used: int | None = None) -> None:
        """used: how many tokens look; the others get zeros."""
        super().__init__()
        self.layer, self.heads, self.used = layer, layer.heads, used
        self.projected: list[Tensor] = []  # where `project` was called before: what it returned

    def project(self, at: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (heads, 4096, width) of cells with and without their positions, (4096, 256), without bias."""
        keys, values = at @ self.layer.k_proj.weight.T, cells @ self.layer.v_proj.weight.T
        return by_head(keys, self.heads), by_head(values, self.heads)

    def forward(self, tokens: Tensor, at: Tensor, cells: Tensor) -> Tensor:
        """tokens (1, T, 256); at, cells (1, 4096, 256) with and without their positions -> (1, T, 256)"""
        layer, heads = self.layer, self.heads
        queries = by_head(layer.q_proj(tokens[0, : self.used]), heads) * (layer.q_proj.out_features // heads) ** -0.5
        if self.projected:
            keys, values = self.projected
            seen = softmax_sum(queries @ keys.transpose(1, 2), values)
        else:
            asked = (queries @ weight_by_head(layer.k_proj, heads)).flatten(0, 1)  # (heads * T, 256)
            sums = softmax_sum(asked @ at[0].T, cells[0]).unflatten(0, (heads, -1))  # (heads, T, 256)
            seen = sums @ weight_by_head(layer.v_proj, heads).transpose(1, 2)  # (heads, T, width)
        out = layer.out_proj(seen.transpose(0, 1).flatten(1) + layer.v_proj.bias)
        return F.pad(out, (0, 0, 0, tokens.shape[1] - len(out)))[None]


class CellsLook(nn.Module):
    """In place of a model.Attention by which cells look at tokens."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer, self.heads = layer, layer.heads
        self.projected: Tensor | None = None  # where `project` was called before: what it returned

    def project(self, at: Tensor) -> Tensor:
        """Queries (heads, 4096, width) of cells with their positions (4096, 256)."""
        return by_head(self.layer.q_proj(at), self.heads)

    def forward(self, at: Tensor, tokens_at: Tensor, tokens: Tensor) -> Tensor:
        """at (1, 4096, 256), tokens_at (1, T, 256) with their positions; tokens without -> (1, 4096, 256)"""
        layer, heads = self.layer, self.heads
        keys = by_head(layer.k_proj(tokens_at[0]), heads) * (layer.k_proj.out_features // heads) ** -0.5
        if self.projected is not None:
            scores = keys @ self.projected.transpose(1, 2)  # (heads, T, 4096)
        else:
            asked = (keys @ weight_by_head(layer.q_proj, heads)).flatten(0, 1)  # (heads * T, 256)
            of_bias = keys @ layer.q_proj.bias.unflatten(0, (heads, -1, 1))  # (heads, T, 1)
            scores = (asked @ at[0].T).unflatten(0, (heads, -1)) + of_bias
        # What each token adds, by each head, to a cell that looks at it alone. The weights of one head sum to 1, so each
        # head brings its share of the bias.
        out = layer.out_proj.weight.T.unflatten(0, (heads, -1))  # (heads, width, 256)
        messages = by_head(layer.v_proj(tokens[0]), heads) @ out + layer.out_proj.bias / heads  # (heads, T, 256)
        return (scores.softmax(1).flatten(0, 1).T @ messages.flatten(0, 1))[None]


def linear_of(up: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution of stride 2 as a linear layer to four pixels: weight (4 * outputs, inputs), bias."""
    return up.weight.permute(2, 3, 1, 0).flatten(0, 2), up.bias.repeat(4)


class ReorderedDecoder:
    """Prompt encoder and mask decoder of a network for a kind of boxes. The network stays as it is."""

    @torch.no_grad()
    def __init__(self, network: BoxSegmenter, kind: str = "exact") -> None:
        # a graph's constants cannot be trained
        self.prompts, self.decoder = (copy.deepcopy(part).requires_grad_(False) for part in network.decoder_of(kind))
        self.transformer = self.decoder.transformer
        for layer in self.transformer.layers:
            layer.cross_attn_token_to_image = TokensLook(layer.cross_attn_token_to_image)
            layer.cross_attn_image_to_token = CellsLook(layer.cross_attn_image_to_token)
        self.transformer.final_attn_token_to_image = TokensLook(self.transformer.final_attn_token_to_image, USED)
        self.place = self.prompts.dense_positions().flatten(2).transpose(1, 2).contiguous()  # (1, 4096, 256)
        coarse, self.norm, _, fine, _ = self.decoder.output_upscaling
        self.coarse, self.fine = linear_of(coarse), linear_of(fine)

    def of_boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4) on the grid -> their prompts (N, 2, 256)"""
        return self.prompts(boxes)[0]

    def of_image(self, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """An embedding (4096, 256) -> its cells (1, 4096, 256) with the dense prompt, and what the first layer projects
        of them: keys, values, queries, each (heads, 4096, width)"""
        first, cells = self.transformer.layers[0], (embedding + self.prompts.no_mask_embed.weight)[None]
        at = cells + self.place
        keys, values = first.cross_attn_token_to_image.project(at[0], cells[0])
        return cells, keys, values, first.cross_attn_image_to_token.project(at[0])

    def of_box(self, prompt: Tensor, corners: Tensor, cells: Tensor, *projected: Tensor) -> tuple[Tensor, Tensor]:
        """prompt (1, 2, 256) of a box; corners (4,) of the cells that are wanted: first row, row after the last, the
        same of columns; what `of_image` returns -> logits of these cells' pixels (4 R, 4 C), predicted IoU (1, 1)"""
        first = self.transformer.layers[0]
        *first.cross_attn_token_to_image.projected, first.cross_attn_image_to_token.projected = projected
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])[None]
        tokens, cells = self.transformer(cells, self.place, torch.cat([own, prompt], dim=1))
        top, bottom, left, right = corners
        wanted = cells[0].unflatten(0, (EMBED_GRID, EMBED_GRID))[top:bottom, left:right]
        weights = self.decoder.output_hypernetworks_mlps[0](tokens[0, 1])  # (32,) of the maps whose sum is the mask
        return self.upscale(wanted) @ weights, self.decoder.iou_prediction_head(tokens[:, 0])[:, :1]

    def upscale(self, cells: Tensor) -> Tensor:
        """`output_upscaling` of a rectangle of cells (R, C, 256) -> 32 maps of its pixels (4 R, 4 C, 32)"""
        cells = F.linear(cells, *self.coarse).unflatten(-1, (4, -1))
        cells = F.gelu(F.layer_norm(cells, self.norm.weight.shape, self.norm.weight, self.norm.bias, 1e-6))
        pixels = F.gelu(F.linear(cells, *self.fine))  # (R, C, 4, 4 * 32)
        pixels = pixels.unflatten(-1, (2, 2, -1)).unflatten(2, (2, 2))  # (R, C, y, x, finer y, finer x, 32)
        return pixels.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(0, 2)
