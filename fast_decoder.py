"""The mask decoder's sums in another order: the same masks in less than half the time, for inference on a CPU. [P 4.3]

Nothing is approximated; logits differ from those of model.py by rounding. A box is 7 tokens, the image 4,096 cells, and
model.py, like every SAM, projects all cells to keys, queries and values for each box: 1.40 G multiply-adds. Five remarks
make that 0.25 G, and up to 0.40 G for upscaling, as the mask is large:

1. A score is a product q . (W x): token's query, weights, cell. Taken as (W^T q) . x the few tokens are projected and
   not the many cells. Likewise values: a weighted sum of W x is W times the weighted sum of x.
2. Softmax weights sum to 1, so a bias of the values can be added behind the sum; and a bias of the keys adds
   the same to all scores of a query, which softmax does not see.
3. What the first layer projects of the image does not depend on the box: once an image, not once a box. Nor does what
   any layer projects of the cells' positions depend on the image: once a network.
4. The first layer adds to the image's cells no more than a weighted sum of 56 vectors, what 7 tokens write by 8 heads. So what
   the second projects of the sum is a projection of the image, once, and of 56 vectors; the norm between scales it (`folded`).
   Its scores come of that, and, as weighted sums of such projections, what its tokens gather.
5. Two of the 7 tokens are asked for at the end, the mask's and the IoU's; and from there on a cell becomes its 4x4 pixels
   without its neighbours, so that only cells need to be upscaled that the mask can reach.

Letters: N boxes, T tokens of a box, cells 4,096 = 64x64 row by row, each 4x4 pixels of the grid; by head: (heads, width,
cells), or (heads, T, width) of tokens. Names of layers: model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit import EMBED_GRID
from model import GRID, Attention, BoxSegmenter

CELL = GRID // EMBED_GRID  # pixels of the grid along a cell's side
OUTSIDE = -100.0  # the logit of pixels that were not asked for


def by_head(x: Tensor, heads: int) -> Tensor:
    """(..., T, heads * width) -> (..., heads, T, width)"""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def asking(projection: nn.Linear, tokens: Tensor, heads: int) -> Tensor:
    """Queries or keys of tokens (N, T, 256), scaled as attention scales its scores: (N, heads, T, width)"""
    return by_head(projection(tokens), heads) * (projection.out_features // heads) ** -0.5


def folded(weight: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A projection of normalized cells, but for a constant and the division by their deviation, as one of the cells before:
    the norm's weights are in it, and it is centered, which subtracts the cells' mean. (M, 256) -> (M, 256)"""
    scaled = weight * norm.weight
    return scaled - scaled.mean(dim=1, keepdim=True)


@dataclass
class Change:
    """What the first layer does to a box's cells, of which layer norm then makes those of the second layer."""

    weights: Tensor  # (heads * T, 4096) of what each token writes by each head
    vectors: Tensor  # (heads * T, 256) what they write
    scale: Tensor  # (4096,) one over the deviation of the sum


class Reading:
    """A projection of the second layer's cells, taken from that of the image's cells and a `Change`."""

    def __init__(self, projection: nn.Linear, norm: nn.LayerNorm, heads: int, place: Tensor | None = None) -> None:
        """place: the cells' position codes (4096, 256), which are added after the norm; values have none."""
        self.weight = folded(projection.weight, norm)  # (heads * width, 256)
        self.by_head = self.weight.unflatten(0, (heads, -1))
        self.bias = projection(norm.bias)
        if place is not None:
            self.place = projection(place + norm.bias).T.unflatten(0, (heads, -1)).contiguous()

    def scores(self, queries: Tensor, of_image: Tensor, change: Change) -> Tensor:
        """queries (heads, T, width), of_image: this weight of the image's cells, by head -> (heads * T, 4096)"""
        of_vectors = (queries @ self.by_head).flatten(0, 1) @ change.vectors.T  # (heads * T, heads * T)
        before = (queries @ of_image).flatten(0, 1).addmm_(of_vectors, change.weights)
        return (queries @ self.place).flatten(0, 1).addcmul_(before, change.scale)

    def gathered(self, scores: Tensor, of_image: Tensor, change: Change) -> Tensor:
        """What tokens gather by scores (heads * T, 4096). of_image: (heads, 4096, width) -> (T, heads * width)"""
        weights = scores.softmax(dim=-1).mul_(change.scale)
        of_vectors = change.vectors @ self.by_head.mT  # (heads, heads * T, width)
        of_change = (weights @ change.weights.T).unflatten(0, (len(of_image), -1)) @ of_vectors
        sums = weights.unflatten(0, (len(of_image), -1)) @ of_image + of_change  # (heads, T, width)
        return sums.transpose(0, 1).flatten(1) + self.bias


def gathered(scores: Tensor, cells: Tensor, layer: Attention) -> Tensor:
    """What tokens gather of cells (4096, 256) by scores (heads * T, 4096), before `out_proj`. -> (T, heads * width)"""
    sums = (scores.softmax(dim=-1) @ cells).unflatten(0, (layer.heads, -1))  # (heads, T, 256)
    values = layer.v_proj.weight.unflatten(0, (layer.heads, -1)).transpose(1, 2)  # (heads, 256, width)
    return (sums @ values).transpose(0, 1).flatten(1) + layer.v_proj.bias


def written(tokens: Tensor, layer: Attention) -> Tensor:
    """What tokens (N, T, 256) write to cells: (N, heads * T, 256). A head's weights sum to 1, so it takes a share of the bias."""
    out = layer.out_proj.weight.T.unflatten(0, (layer.heads, -1))  # (heads, width, 256)
    return (by_head(layer.v_proj(tokens), layer.heads) @ out + layer.out_proj.bias / layer.heads).flatten(1, 2)


class FastDecoder:
    """Prompt encoder and mask decoder of a network that is not trained any more. For one thread: it remembers an image."""

    @torch.no_grad()
    def __init__(self, network: BoxSegmenter) -> None:
        self.prompts, self.decoder = network.prompt_encoder, network.mask_decoder
        self.first, self.second = self.decoder.transformer.layers
        self.last = self.decoder.transformer.final_attn_token_to_image
        self.heads = self.last.heads
        place = self.prompts.dense_positions().flatten(2)[0].T.contiguous()  # (4096, 256)
        look, back = self.first.cross_attn_token_to_image, self.first.cross_attn_image_to_token
        norm = self.first.norm4
        self.looking = Reading(self.second.cross_attn_token_to_image.k_proj, norm, self.heads, place)
        self.values = Reading(self.second.cross_attn_token_to_image.v_proj, norm, self.heads)
        self.backing = Reading(self.second.cross_attn_image_to_token.q_proj, norm, self.heads, place)
        self.last_place = F.linear(place, self.last.k_proj.weight).T.unflatten(0, (self.heads, -1)).contiguous()
        # the projections of the image's cells that give keys, or queries: one product for all four
        self.weights = torch.cat([look.k_proj.weight, back.q_proj.weight, self.looking.weight, self.backing.weight])
        of_place = torch.cat([F.linear(place, look.k_proj.weight), back.q_proj(place)], dim=1).T
        self.of_place = torch.cat([of_place, torch.zeros_like(of_place)])  # (512, 4096)
        self.value_weights = torch.cat([look.v_proj.weight, self.values.weight])
        # Linux's malloc hands freed maps back to the system and asks for them anew, up to a quarter of a box's time, until
        # it has seen a large block freed; from then on it keeps as much
        torch.empty(31 << 20, dtype=torch.uint8)
        self.seen: Tensor | None = None  # the embedding that `image_side` was last computed of
        self.image_side: tuple[Tensor, ...] = ()

    @torch.inference_mode()
    def decode(self, embedding: Tensor, boxes: Tensor, within: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """embedding (1, 256, 64, 64), boxes (N, 4) on the grid -> logits (N, 1, 256, 256), predicted IoU (N, 1)

        within: (N, 4), x0 y0 x1 y1 on the grid: where each mask's logits are wanted, all of the grid by default. Those
        of cells that lie elsewhere are OUTSIDE.
        """
        if embedding is not self.seen:  # chunks of boxes of one image come one after another
            self.image_side, self.seen = self.of_image(embedding), embedding
        logits = embedding.new_full((len(boxes), 1, GRID, GRID), OUTSIDE)
        if len(boxes) == 0:
            return logits, embedding.new_zeros(0, 1)
        tokens, cells = self.transform(self.prompts(boxes)[0])
        weights = self.decoder.output_hypernetworks_mlps[0](tokens[:, 1])  # (N, 32)
        for i, (cell, weight) in enumerate(zip(cells, weights, strict=True)):
            rows, columns = cell_range(None if within is None else within[i].tolist())
            fine = self.upscale(cell.unflatten(0, (EMBED_GRID, EMBED_GRID))[rows, columns], weight)
            logits[i, 0, pixels(rows), pixels(columns)] = fine
        return logits, self.decoder.iou_prediction_head(tokens[:, 0])[:, :1]

    def of_image(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """All that does not depend on a box: cells (4096, 256); by head, (heads, 16, 4096), keys and queries of the first
        layer and what `looking` and `backing` read; (heads, 4096, 16) the first layer's values, without
        their bias, and what `values` reads."""
        cells = embedding.flatten(2)[0].T.contiguous() + self.prompts.no_mask_embed.weight
        projected = (self.weights @ cells.T).add_(self.of_place).unflatten(0, (4, self.heads, -1))
        values = by_head(cells @ self.value_weights.T, 2 * self.heads).contiguous()
        return cells, *projected, *values.unflatten(0, (2, self.heads))

    def transform(self, sparse: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`TwoWayTransformer` for prompts (N, 2, 256): tokens of IoU and mask (N, 2, 256), cells N times (4096, 256).

        In each step all tokens come first, then the cells box by box: a map of cells is 4 MB, and is used while in the cache.
        """
        image, keys, queries, for_look, for_back, values, for_values = self.image_side
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight]).expand(len(sparse), -1, -1)
        pe = tokens = torch.cat([own, sparse], dim=1)  # (N, T, 256)

        layer, look, back = self.first, self.first.cross_attn_token_to_image, self.first.cross_attn_image_to_token
        tokens = layer.norm1(layer.self_attn(tokens, tokens, tokens))
        asked = asking(look.q_proj, tokens + pe, self.heads)
        seen = (asked.transpose(0, 1).flatten(1, 2) @ keys).softmax(-1) @ values  # (heads, N * T, width)
        seen = seen.unflatten(1, (len(sparse), -1)).permute(1, 2, 0, 3).flatten(2) + look.v_proj.bias
        tokens = layer.norm2(tokens + look.out_proj(seen))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        told, vectors = asking(back.k_proj, tokens + pe, self.heads), written(tokens, back)

        norm, layer = self.first.norm4, self.second
        look, back = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        asked = tokens + pe
        tokens = layer.norm1(tokens + layer.self_attn(asked, asked, tokens))
        changes, cells, seen = [], [], []
        for key, vector, query in zip(told, vectors, asking(look.q_proj, tokens + pe, self.heads), strict=True):
            weights = (key @ queries).softmax(1).flatten(0, 1)  # (heads * T, 4096)
            summed = torch.addmm(image, weights.T, vector)
            cell, _, scale = torch.native_layer_norm(summed, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            changes.append(Change(weights, vector, scale[:, 0]))
            cells.append(cell)
            scores = self.looking.scores(query, for_look, changes[-1])
            seen.append(self.values.gathered(scores, for_values, changes[-1]))
        tokens = layer.norm2(tokens + look.out_proj(torch.stack(seen)))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        told, vectors = asking(back.k_proj, tokens + pe, self.heads), written(tokens, back)

        tokens, seen = tokens[:, :2], []
        last_keys = self.last.k_proj.weight.unflatten(0, (self.heads, -1))
        for i, query in enumerate(asking(self.last.q_proj, tokens + pe[:, :2], self.heads)):
            scores = self.backing.scores(told[i], for_back, changes[i])
            weights = scores.unflatten(0, (self.heads, -1)).softmax(1).flatten(0, 1)
            cells[i] = layer.norm4(cells[i].addmm_(weights.T, vectors[i]))
            of_cells = F.linear(cells[i], (query @ last_keys).flatten(0, 1)).T
            scores = (query @ self.last_place).flatten(0, 1).add_(of_cells)
            seen.append(gathered(scores, cells[i], self.last))
        tokens = tokens + self.last.out_proj(torch.stack(seen))
        return self.decoder.transformer.norm_final_attn(tokens), cells

    def upscale(self, cells: Tensor, weight: Tensor) -> Tensor:
        """`output_upscaling` and the mask's weights (32,), for a rectangle of cells (R, C, 256) -> logits (4 R, 4 C)."""
        coarse, norm, _, fine, _ = self.decoder.output_upscaling
        for up in (coarse, fine):  # a 2x2 transposed convolution of stride 2 is a linear layer to four pixels
            cells = (cells @ up.weight.permute(0, 2, 3, 1).flatten(1)).unflatten(-1, (4, -1)) + up.bias
            if up is coarse:
                cells = F.layer_norm(cells, norm.weight.shape, norm.weight, norm.bias, 1e-6)
            cells = F.gelu(cells)
        logits = (cells @ weight).unflatten(-1, (2, 2)).unflatten(2, (2, 2))  # (R, C, y, x, finer y, finer x)
        return logits.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(0, 2)


def cell_range(within: list[float] | None) -> tuple[slice, slice]:
    """Rows and columns of the cells that hold pixels x0 y0 x1 y1 of the grid, at least one of each; None: all."""
    if within is None:
        return slice(0, EMBED_GRID), slice(0, EMBED_GRID)
    x0, y0, x1, y1 = (min(max(int(value // CELL), 0), EMBED_GRID - 1) for value in within)
    return slice(y0, y1 + 1), slice(x0, x1 + 1)


def pixels(cells: slice) -> slice:
    """Cells along one axis -> their pixels of the grid."""
    return slice(CELL * cells.start, CELL * cells.stop)


class FastModel:
    """An image encoder of any engine and `FastDecoder`, behind the calls that `Segmenter` makes of a model."""

    def __init__(self, image_encoder: Callable[[Tensor], Tensor], network: BoxSegmenter) -> None:
        """image_encoder: images (B, 3, 256, 256) -> embedding (B, 256, 64, 64).   network: its decoder is used."""
        self.image_encoder, self.decoder = image_encoder, FastDecoder(network)

    def eval(self) -> FastModel:
        """Segmenter says it to every model; this one knows no training."""
        return self

    def decode(self, embedding: Tensor, boxes: Tensor, within: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`FastDecoder.decode`"""
        return self.decoder.decode(embedding, boxes, within)
