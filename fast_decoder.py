"""The mask decoder's sums in another order: the same masks in less than half the time, for inference on a CPU. [P 4.3]

Nothing is approximated; logits differ from those of model.py by rounding. A box is 7 tokens, the image 4,096 cells, and
model.py, like every SAM, projects all cells to keys, queries and values for each box: 1.40 G multiply-adds. Four remarks
make that 0.37 G, and up to 0.40 G for upscaling, as the mask is large:

1. A score is a product q . (W x): token's query, weights, cell. Taken as (W^T q) . x the few tokens are projected and
   not the many cells. Likewise values: a weighted sum of W x is W times the weighted sum of x.
2. Softmax weights sum to 1, so a bias of the values can be added behind the sum; and a bias of the keys adds
   the same to all scores of a query, which softmax does not see.
3. What the first layer projects of the image does not depend on the box: once an image, not once a box. Nor does what
   any layer projects of the cells' positions depend on the image: once a network.
4. Two of the 7 tokens are asked for at the end, the mask's and the IoU's; and from there on a cell becomes its 4x4 pixels
   without its neighbours, so that only cells need to be upscaled that the mask can reach.

Letters: N boxes, T tokens of a box, cells 4,096 = 64x64 row by row, each 4x4 pixels of the grid. Names of layers: model.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientvit import EMBED_GRID
from model import GRID, Attention, BoxSegmenter

CELL = GRID // EMBED_GRID  # pixels of the grid along a cell's side
OUTSIDE = -100.0  # the logit of pixels that were not asked for


def by_head(x: Tensor, heads: int) -> Tensor:
    """(..., T, heads * width) -> (..., heads, T, width)"""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


class TokensLook:
    """Tokens gather from the cells: a cross_attn_token_to_image, with its keys and values projected on the tokens' side."""

    def __init__(self, layer: Attention, place: Tensor) -> None:
        """place: the cells' position codes (4096, 256), which keys have and values do not."""
        self.layer = layer
        self.keys = layer.k_proj.weight.unflatten(0, (layer.heads, -1))  # (heads, width, 256)
        self.values = layer.v_proj.weight.unflatten(0, (layer.heads, -1)).transpose(1, 2)  # (heads, 256, width)
        self.place = by_head(F.linear(place, layer.k_proj.weight), layer.heads).transpose(1, 2).contiguous()
        self.scale = self.keys.shape[1] ** -0.5

    def queries(self, tokens: Tensor) -> Tensor:
        """Tokens with their positions (N, T, 256) -> (N, heads, T, width)"""
        return by_head(self.layer.q_proj(tokens), self.layer.heads) * self.scale

    def seen(self, queries: Tensor, cells: Tensor) -> Tensor:
        """What the tokens of one box gather, before `out_proj`: (heads, T, width), (4096, 256) -> (T, heads * width)"""
        of_place = (queries @ self.place).flatten(0, 1)  # (heads * T, 4096)
        scores = of_place.addmm_((queries @ self.keys).flatten(0, 1), cells.T)
        sums = (scores.softmax(dim=-1) @ cells).unflatten(0, (self.layer.heads, -1))  # (heads, T, 256)
        return (sums @ self.values).transpose(0, 1).flatten(1) + self.layer.v_proj.bias


class CellsLook:
    """Cells gather from the tokens: a cross_attn_image_to_token, with its queries and output projected there too."""

    def __init__(self, layer: Attention, place: Tensor) -> None:
        """place: the cells' position codes (4096, 256)."""
        self.layer = layer
        self.queries = layer.q_proj.weight.unflatten(0, (layer.heads, -1))  # (heads, width, 256)
        self.out = layer.out_proj.weight.T.unflatten(0, (layer.heads, -1))  # (heads, width, 256)
        self.bias = layer.out_proj.bias / layer.heads  # a share a head, whose weights sum to 1
        self.place = by_head(layer.q_proj(place), layer.heads).transpose(1, 2).contiguous()  # (heads, width, 4096)
        self.scale = self.queries.shape[1] ** -0.5

    def tokens_side(self, tokens: Tensor, token_pe: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, 256) and their positions -> keys (N, heads, T, width) and what each writes to a cell (N, heads * T, 256)"""
        keys = by_head(self.layer.k_proj(tokens + token_pe), self.layer.heads) * self.scale
        values = by_head(self.layer.v_proj(tokens), self.layer.heads)
        return keys, (values @ self.out + self.bias).flatten(1, 2)

    def scores(self, keys: Tensor, cells: Tensor) -> Tensor:
        """(heads, T, width), (4096, 256) -> (heads, T, 4096)"""
        of_place = (keys @ self.place).flatten(0, 1)
        return of_place.addmm_((keys @ self.queries).flatten(0, 1), cells.T).unflatten(0, keys.shape[:2])


class FastDecoder:
    """Prompt encoder and mask decoder of a network that is not trained any more. For one thread: it remembers an image."""

    @torch.no_grad()
    def __init__(self, network: BoxSegmenter) -> None:
        self.prompts, self.decoder = network.prompt_encoder, network.mask_decoder
        self.place = self.prompts.dense_positions().flatten(2)[0].T.contiguous()  # (4096, 256)
        self.first, self.second = self.decoder.transformer.layers
        self.tokens_look = TokensLook(self.second.cross_attn_token_to_image, self.place)
        self.cells_look = [CellsLook(a.cross_attn_image_to_token, self.place) for a in (self.first, self.second)]
        self.last_look = TokensLook(self.decoder.transformer.final_attn_token_to_image, self.place)
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
        """All that does not depend on a box: cells, and the first layer's keys, values and queries by head, width before
        cells but in values."""
        cells = embedding.flatten(2)[0].T.contiguous() + self.prompts.no_mask_embed.weight  # (4096, 256)
        at = cells + self.place
        look, back = self.first.cross_attn_token_to_image, self.first.cross_attn_image_to_token
        keys, queries = (
            by_head(p(at), look.heads).transpose(1, 2).contiguous() for p in (look.k_proj, back.q_proj)
        )  # (heads, width, 4096)
        return cells, keys, by_head(look.v_proj(cells), look.heads).contiguous(), queries

    def transform(self, sparse: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`TwoWayTransformer` for prompts (N, 2, 256): tokens of IoU and mask (N, 2, 256), cells N times (4096, 256)."""
        image, keys, values, queries = self.image_side
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight]).expand(len(sparse), -1, -1)
        pe = tokens = torch.cat([own, sparse], dim=1)  # (N, T, 256)

        layer, look = self.first, self.first.cross_attn_token_to_image
        tokens = layer.norm1(layer.self_attn(tokens, tokens, tokens))
        asked = by_head(look.q_proj(tokens + pe), look.heads) * self.tokens_look.scale
        seen = [((query @ keys).softmax(-1) @ values).transpose(0, 1).flatten(1) for query in asked]
        tokens = layer.norm2(tokens + look.out_proj(torch.stack(seen)))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        told, written = self.cells_look[0].tokens_side(tokens, pe)

        # The next look's queries do not wait for the cells, so a box's map of cells, 4 MB, is used while in the cache
        before, layer, back = self.first, self.second, self.cells_look[1]
        asked = tokens + pe
        tokens = layer.norm1(tokens + layer.self_attn(asked, asked, tokens))
        cells, seen = [], []
        for k, w, asked in zip(told, written, self.tokens_look.queries(tokens + pe), strict=True):
            cells.append(before.norm4(torch.addmm(image, (k @ queries).softmax(1).flatten(0, 1).T, w)))
            seen.append(self.tokens_look.seen(asked, cells[-1]))
        tokens = layer.norm2(tokens + self.tokens_look.layer.out_proj(torch.stack(seen)))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        told, written = back.tokens_side(tokens, pe)

        tokens, pe, seen = tokens[:, :2], pe[:, :2], []
        for i, (k, w, asked) in enumerate(zip(told, written, self.last_look.queries(tokens + pe), strict=True)):
            scores = back.scores(k, cells[i]).softmax(1).flatten(0, 1)
            cells[i] = layer.norm4(cells[i].addmm_(scores.T, w))
            seen.append(self.last_look.seen(asked, cells[i]))
        tokens = tokens + self.last_look.layer.out_proj(torch.stack(seen))
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
