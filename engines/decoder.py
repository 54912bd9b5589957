"""The mask decoder of model.py with its sums in another order: the same logits but for rounding, sooner. [P 4.3] (D19)

A box is 7 tokens (IoU, four masks, two corners), an image is 4,096 cells. model.py, like every SAM, projects all cells
to keys, queries and values anew in each layer and for each box. Here most of that is done once. Nothing is approximated.
OpenVINO's graphs are traced from this (graphs.py).

Once a network:  What the layers project of the cells' positions, which are the same in every image.
Once an image:   Keys, queries and values that the first layer projects of the cells: no box has changed the cells yet.
                 Also what the second layer projects of them, as if the first layer left them as they are.
Once a box, in this order:
1. The first layer's tokens look at the image. Its keys and values are there already.
2. The first layer changes the cells. It adds to each cell a weighted sum of 56 vectors (7 tokens by 8 heads), then
   normalizes it. Of a changed cell the second layer needs W norm(cell + sum of w_j v_j). A layer norm subtracts the
   cell's mean, divides by its deviation, and multiplies channel by channel. The multiplication can move into W. So
   can the subtraction, if each row of W is centred. What is left is linear:
       W norm(cell + sum of w_j v_j) = (W' cell + sum of w_j (W' v_j)) / deviation + a constant
   W' cell is there already, once an image. So 56 vectors are projected in place of 4,096 cells.
3. The second layer changes the cells too. Their new values are computed, as they become the mask.
4. The tokens look once more. Their scores are products q . (W x) of a token's query q and a cell x, which equals
   (W^T q) . x: the few tokens are projected, not the many cells. In the same way, a weighted sum of values W x is W
   times the weighted sum of x. Only the two tokens that are used afterwards look: those of the IoU and of the mask.
5. Upscaling makes 4x4 pixels of each cell, without its neighbours. So only cells that the mask may reach are upscaled.

Biases: attention weights sum to 1, so a bias of the values is added once, behind the sum. A bias of the keys adds the
same to all scores of a query, which softmax does not see: it is left out. The last norm of the cells only centres and
scales: its own weights and bias are moved into the layers behind it.

Letters: T tokens of a box. Cells are 4,096 = 64x64, row by row; a cell is 4x4 pixels of the grid. "By head" is (heads,
width, cells) of cells and (heads, T, width) of tokens. Layers have the names of model.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit import EMBED_GRID
from model import Attention, BoxSegmenter


def by_head(x: Tensor, heads: int) -> Tensor:
    """(T, heads * width) -> (heads, T, width)"""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def joined(x: Tensor) -> Tensor:
    """(heads, T, width) -> (T, heads * width)"""
    return x.transpose(0, 1).flatten(1)


def scaled_by_head(projection: nn.Linear, tokens: Tensor, heads: int) -> Tensor:
    """Queries or keys of tokens (T, 256), divided by the root of the width, as attention divides its scores.
    -> (heads, T, width)"""
    return by_head(projection(tokens), heads) * (projection.out_features // heads) ** -0.5


def messages(tokens: Tensor, layer: Attention) -> Tensor:
    """What each token adds, by each head, to a cell that looks at it alone: (T, 256) -> (heads * T, 256).

    The weights of one head sum to 1, so each head brings its share of the bias."""
    out = layer.out_proj.weight.T.unflatten(0, (layer.heads, -1))  # (heads, width, 256)
    return (by_head(layer.v_proj(tokens), layer.heads) @ out + layer.out_proj.bias / layer.heads).flatten(0, 1)


def softmax_sum(scores: Tensor, values: Tensor) -> Tensor:
    """scores (..., T, 4096), values (..., 4096, width) -> `scores.softmax(-1) @ values`

    OpenVINO would make one step of these three, which takes three times as long for so few tokens."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights @ values) / weights.sum(-1, keepdim=True)


def linear_of(up: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution of stride 2 as a linear layer to four pixels: weight (4 * outputs, inputs), bias."""
    return up.weight.permute(2, 3, 1, 0).flatten(0, 2), up.bias.repeat(4)


def of_normed(weight: Tensor, bias: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """A linear layer that follows a layer norm, with the norm's own weights and bias moved into it: weight, bias."""
    return weight * norm.weight, bias + weight @ norm.bias


def centred(x: Tensor) -> Tensor:
    """(..., 256) less the mean of its 256 values: a layer norm's first step. A sum of such needs it no more."""
    return x - x.mean(dim=-1, keepdim=True)


@dataclass
class Update:
    """How the first layer changes the cells of one box: norm(cell + weights^T vectors)."""

    weights: Tensor  # (heads * T, 4096) how much each cell looks at each token, by each head
    vectors: Tensor  # (heads * T, 256) what is added then
    scale: Tensor  # (4096,) 1 / deviation, by which the norm scales each sum


class UpdatedProjection:
    """A projection of the second layer, of cells after an `Update` (step 2 of the module header)."""

    def __init__(self, projection: nn.Linear, norm: nn.LayerNorm, heads: int, place: Tensor | None = None) -> None:
        """norm: the one that ends the first layer.   place: the cells' position codes (4096, 256), which are added
        after the norm to what gives keys and queries; values have none."""
        scaled = projection.weight * norm.weight
        self.weight = scaled - scaled.mean(dim=1, keepdim=True)  # W', (heads * width, 256)
        self.by_head = self.weight.unflatten(0, (heads, -1))
        self.bias = projection(norm.bias)  # the constant
        if place is not None:
            self.place = projection(place + norm.bias).T.unflatten(0, (heads, -1)).contiguous()

    def scores(self, tokens: Tensor, of_image: Tensor, update: Update) -> Tensor:
        """Products of tokens (heads, T, width) with the projected cells -> (heads * T, 4096)

        of_image: W' of the image's cells, by head."""
        of_vectors = (tokens @ self.by_head).flatten(0, 1) @ update.vectors.T  # (heads * T, heads * T)
        before_norm = (tokens @ of_image).flatten(0, 1) + of_vectors @ update.weights
        return (tokens @ self.place).flatten(0, 1) + before_norm * update.scale

    def sums(self, scores: Tensor, of_image: Tensor, update: Update) -> Tensor:
        """Attention's weighted sums of the projected cells. scores (heads * T, 4096) -> (T, heads * width)

        of_image: W' of the image's cells, (heads, 4096, width)."""
        weights = scores.softmax(dim=-1) * update.scale
        of_vectors = update.vectors @ self.by_head.transpose(1, 2)  # (heads, heads * T, width)
        of_update = (weights @ update.weights.T).unflatten(0, (len(of_image), -1)) @ of_vectors
        return joined(weights.unflatten(0, (len(of_image), -1)) @ of_image + of_update) + self.bias


class ReorderedDecoder:
    """Prompt encoder and mask decoder of a network whose weights stay as they are."""

    @torch.no_grad()
    def __init__(self, network: BoxSegmenter) -> None:
        self.prompts, self.decoder = network.prompt_encoder, network.mask_decoder
        self.first, self.second = self.decoder.transformer.layers
        self.last = self.decoder.transformer.final_attn_token_to_image
        self.heads = self.last.heads
        place = self.prompts.dense_positions().flatten(2)[0].T.contiguous()  # (4096, 256)
        to_image, to_token = self.first.cross_attn_token_to_image, self.first.cross_attn_image_to_token
        norm = self.first.norm4
        self.second_keys = UpdatedProjection(self.second.cross_attn_token_to_image.k_proj, norm, self.heads, place)
        self.second_values = UpdatedProjection(self.second.cross_attn_token_to_image.v_proj, norm, self.heads)
        self.second_queries = UpdatedProjection(self.second.cross_attn_image_to_token.q_proj, norm, self.heads, place)
        self.last_place = F.linear(place, self.last.k_proj.weight).T.unflatten(0, (self.heads, -1)).contiguous()
        last_norm, (coarse, _, _, fine, _) = self.second.norm4, self.decoder.output_upscaling
        self.last_keys = (self.last.k_proj.weight * last_norm.weight).unflatten(0, (self.heads, -1))
        self.last_values = of_normed(self.last.v_proj.weight, self.last.v_proj.bias, last_norm)
        self.coarse, self.fine = of_normed(*linear_of(coarse), last_norm), linear_of(fine)
        # four projections of the image's cells in one product: keys and queries of the first layer, then of the second
        self.weights = torch.cat(
            [to_image.k_proj.weight, to_token.q_proj.weight, self.second_keys.weight, self.second_queries.weight]
        )
        of_place = torch.cat([F.linear(place, to_image.k_proj.weight), to_token.q_proj(place)], dim=1).T
        self.of_place = torch.cat([of_place, torch.zeros_like(of_place)])  # (512, 4096)
        self.value_weights = torch.cat([to_image.v_proj.weight, self.second_values.weight])

    def of_boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4) on the grid -> their prompts (N, 2, 256)"""
        return self.prompts(boxes)[0]

    def of_image(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """All that does not depend on a box, of an embedding (4096, 256):
        cells (4096, 256), each less its mean;
        keys and queries of the first layer, then of the second before its update, each by head (heads, 16, 4096);
        values of the first layer, then of the second before its update, without bias, each (heads, 4096, 16)."""
        cells = embedding + self.prompts.no_mask_embed.weight
        projected = (self.weights @ cells.T + self.of_place).unflatten(0, (4, self.heads, -1))
        values = by_head(cells @ self.value_weights.T, 2 * self.heads)
        return centred(cells), *projected, *values.unflatten(0, (2, self.heads))

    def of_box(self, prompt: Tensor, corners: Tensor, *image_side: Tensor) -> tuple[Tensor, Tensor]:
        """prompt (1, 2, 256) of a box; corners (4,) of the cells that are wanted: first row, row after the last, the
        same of columns; what `of_image` returns -> logits of these cells' pixels (4 R, 4 C), predicted IoU (1, 1)"""
        image, first_keys, first_queries, second_keys, second_queries, first_values, second_values = image_side
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        token_pe = torch.cat([own, prompt[0]])  # (T, 256)
        # 1. The first layer's tokens look at the image
        tokens = self.first.norm1(self.first.self_attn(token_pe[None], token_pe[None], token_pe[None])[0])
        look = self.first.cross_attn_token_to_image
        seen = softmax_sum(scaled_by_head(look.q_proj, tokens + token_pe, self.heads) @ first_keys, first_values)
        tokens = self.first.norm2(tokens + look.out_proj(joined(seen) + look.v_proj.bias))
        tokens = self.first.norm3(tokens + self.first.mlp(tokens))
        # 2. The first layer changes the cells, and the second layer's tokens look at them
        cells, update = self.changed(image, tokens, token_pe, first_queries)
        placed = (tokens + token_pe)[None]
        tokens = self.second.norm1(tokens + self.second.self_attn(placed, placed, tokens[None])[0])
        look = self.second.cross_attn_token_to_image
        queries = scaled_by_head(look.q_proj, tokens + token_pe, self.heads)
        scores = self.second_keys.scores(queries, second_keys, update)
        tokens = self.second.norm2(tokens + look.out_proj(self.second_values.sums(scores, second_values, update)))
        tokens = self.second.norm3(tokens + self.second.mlp(tokens))
        # 3. The second layer changes the cells
        look, norm = self.second.cross_attn_image_to_token, self.second.norm4
        keys = scaled_by_head(look.k_proj, tokens + token_pe, self.heads)
        scores = self.second_queries.scores(keys, second_queries, update).unflatten(0, (self.heads, -1))
        cells = cells + scores.softmax(1).flatten(0, 1).T @ messages(tokens, look)
        cells = F.layer_norm(cells, norm.normalized_shape, eps=norm.eps)
        # 4. The tokens of IoU and mask look once more
        tokens = self.last_look(tokens[:2], token_pe[:2], cells)
        # 5. Upscaling
        weight = self.decoder.output_hypernetworks_mlps[0](tokens[1])
        top, bottom, left, right = corners
        wanted = cells.unflatten(0, (EMBED_GRID, EMBED_GRID))[top:bottom, left:right]
        return self.upscale(wanted, weight), self.decoder.iou_prediction_head(tokens[:1])[:, :1]

    def changed(self, image: Tensor, tokens: Tensor, token_pe: Tensor, queries: Tensor) -> tuple[Tensor, Update]:
        """The image's cells (4096, 256) after the first layer, and how it changed them."""
        look, norm = self.first.cross_attn_image_to_token, self.first.norm4
        keys, vectors = scaled_by_head(look.k_proj, tokens + token_pe, self.heads), centred(messages(tokens, look))
        weights = (keys @ queries).softmax(1).flatten(0, 1)
        cells = image + weights.T @ vectors  # their means are 0
        # by hand: OpenVINO has no layer norm that also says the deviation
        scale = (torch.linalg.vector_norm(cells, dim=1).square() / cells.shape[1] + norm.eps).rsqrt()
        return cells * scale[:, None] * norm.weight + norm.bias, Update(weights, vectors, scale)

    def last_look(self, tokens: Tensor, token_pe: Tensor, cells: Tensor) -> Tensor:
        """The transformer's last attention and norm, for two tokens (2, 256)."""
        queries = scaled_by_head(self.last.q_proj, tokens + token_pe, self.heads)
        of_place, of_cells = (queries @ self.last_place).flatten(0, 1), (queries @ self.last_keys).flatten(0, 1)
        scores = of_place + of_cells @ cells.T  # (heads * T, 4096)
        weight, bias = self.last_values
        sums = softmax_sum(scores, cells).unflatten(0, (self.heads, -1))  # (heads, T, 256)
        seen = joined(sums @ weight.unflatten(0, (self.heads, -1)).transpose(1, 2)) + bias
        return self.decoder.transformer.norm_final_attn(tokens + self.last.out_proj(seen))

    def upscale(self, cells: Tensor, weight: Tensor) -> Tensor:
        """`output_upscaling` of a rectangle of cells (R, C, 256), then the mask's weighted sum of the 32 maps.
        weight: (32,) -> logits (4 R, 4 C)"""
        _, norm, *_ = self.decoder.output_upscaling
        cells = F.linear(cells, *self.coarse).unflatten(-1, (4, -1))
        cells = F.gelu(F.layer_norm(cells, norm.weight.shape, norm.weight, norm.bias, 1e-6))
        cells = F.gelu(F.linear(cells, *self.fine).unflatten(-1, (4, -1)))
        logits = (cells @ weight).unflatten(-1, (2, 2)).unflatten(2, (2, 2))  # (R, C, y, x, finer y, finer x)
        return logits.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(0, 2)
