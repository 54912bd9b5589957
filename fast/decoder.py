"""The mask decoder of model.py with its sums in another order: the same logits but for rounding, sooner. [P 4.3] (D19)

A box is 7 tokens (IoU, four masks, two corners), an image is 4,096 cells. model.py, like every SAM, projects all cells
to keys, queries and values anew in each layer and for each box. Here most of that is done once. Nothing is approximated.

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

Letters: N boxes, T tokens of a box. Cells are 4,096 = 64x64, row by row; a cell is 4x4 pixels of the grid. "By head" is
(heads, width, cells) of cells and (heads, T, width) of tokens. Layers have the names of model.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit import EMBED_GRID
from fast.cells import OUTSIDE, cell_range, pixels
from grid import GRID
from model import Attention, BoxSegmenter


def by_head(x: Tensor, heads: int) -> Tensor:
    """(..., T, heads * width) -> (..., heads, T, width)"""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def scaled_by_head(projection: nn.Linear, tokens: Tensor, heads: int) -> Tensor:
    """Queries or keys of tokens (N, T, 256), divided by the root of the width, as attention divides its scores.
    -> (N, heads, T, width)"""
    return by_head(projection(tokens), heads) * (projection.out_features // heads) ** -0.5


def messages(tokens: Tensor, layer: Attention) -> Tensor:
    """What each token adds, by each head, to a cell that looks at it alone: (N, T, 256) -> (N, heads * T, 256).

    The weights of one head sum to 1, so each head brings its share of the bias."""
    out = layer.out_proj.weight.T.unflatten(0, (layer.heads, -1))  # (heads, width, 256)
    return (by_head(layer.v_proj(tokens), layer.heads) @ out + layer.out_proj.bias / layer.heads).flatten(1, 2)


def softmax_sum(scores: Tensor, values: Tensor) -> Tensor:
    """scores (..., T, 4096), values (..., 4096, width) -> `scores.softmax(-1) @ values`"""
    if not torch.jit.is_tracing():
        return scores.softmax(-1) @ values
    weights = (scores - scores.amax(-1, keepdim=True)).exp()  # for a graph: OpenVINO would make one step of all three,
    return (weights @ values) / weights.sum(-1, keepdim=True)  # which takes three times as long for so few tokens


def sum_of_values(scores: Tensor, cells: Tensor, projection: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Attention's weighted sums of values, before `out_proj`. scores (heads * T, 4096), cells (4096, 256), projection: weight and
    bias -> (T, heads * width). The cells are summed first, and the sums projected."""
    weight, bias = projection
    sums = softmax_sum(scores, cells).unflatten(0, (heads, -1))  # (heads, T, 256)
    values = weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (heads, 256, width)
    return (sums @ values).transpose(0, 1).flatten(1) + bias


def linear_of(up: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution of stride 2 as a linear layer to four pixels: weight (4 * outputs, inputs), bias."""
    return up.weight.permute(2, 3, 1, 0).flatten(0, 2), up.bias.repeat(4)


def of_normed(weight: Tensor, bias: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """A linear layer that follows a layer norm, with the norm's own weights and bias moved into it: weight, bias."""
    return weight * norm.weight, bias + weight @ norm.bias


def centred(x: Tensor) -> Tensor:
    """(..., 256) less the mean of its 256 values: a layer norm's first step. A sum of such needs it no more."""
    return x - x.mean(dim=-1, keepdim=True)


def norm_and_scale(cells: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """A layer norm of cells (4096, 256) whose mean is 0, and 1 / deviation of each, (4096,)."""
    if torch.jit.is_tracing():  # for a graph: OpenVINO has no layer norm that also says the deviation
        scale = (torch.linalg.vector_norm(cells, dim=1).square() / cells.shape[1] + norm.eps).rsqrt()
        return cells * scale[:, None] * norm.weight + norm.bias, scale
    normed, _, scale = torch.native_layer_norm(cells, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return normed, scale[:, 0]


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
        before_norm = (tokens @ of_image).flatten(0, 1).addmm_(of_vectors, update.weights)
        return (tokens @ self.place).flatten(0, 1).addcmul_(before_norm, update.scale)

    def sums(self, scores: Tensor, of_image: Tensor, update: Update) -> Tensor:
        """Attention's weighted sums of the projected cells. scores (heads * T, 4096) -> (T, heads * width)

        of_image: W' of the image's cells, (heads, 4096, width)."""
        weights = scores.softmax(dim=-1).mul_(update.scale)
        of_vectors = update.vectors @ self.by_head.transpose(1, 2)  # (heads, heads * T, width)
        of_update = (weights @ update.weights.T).unflatten(0, (len(of_image), -1)) @ of_vectors
        sums = weights.unflatten(0, (len(of_image), -1)) @ of_image + of_update  # (heads, T, width)
        return sums.transpose(0, 1).flatten(1) + self.bias


class FastDecoder:
    """Prompt encoder and mask decoder of a network whose weights stay as they are. It remembers one image, so it serves
    one thread at a time."""

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
        # Linux's malloc gives large blocks back to the system when they are freed, and each new one costs time. Once it
        # has seen a block of this size freed, it keeps blocks up to that size: the maps of cells.
        torch.empty(31 << 20, dtype=torch.uint8)
        self.seen: Tensor | None = None  # the embedding that `image_side` was last computed of
        self.image_side: tuple[Tensor, ...] = ()

    @torch.inference_mode()
    def decode(self, embedding: Tensor, boxes: Tensor, within: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """embedding (1, 256, 64, 64), boxes (N, 4) on the grid -> logits (N, 1, 256, 256), predicted IoU (N, 1)

        within: (N, 4), x0 y0 x1 y1 on the grid: where each mask's logits are wanted; by default everywhere. Logits of
        cells that lie elsewhere are OUTSIDE.
        """
        if embedding is not self.seen:  # chunks of boxes of one image come one after another
            self.image_side, self.seen = self.of_image(embedding.flatten(2)[0].T.contiguous()), embedding
        logits = embedding.new_full((len(boxes), 1, GRID, GRID), OUTSIDE)
        if len(boxes) == 0:
            return logits, embedding.new_zeros(0, 1)
        cells, weights, iou = self.of_prompts(self.prompts(boxes)[0], self.image_side)
        for i, (cell, weight) in enumerate(zip(cells, weights, strict=True)):
            rows, columns = cell_range(None if within is None else within[i].tolist())
            logits[i, 0, pixels(rows), pixels(columns)] = self.upscale(cell[rows, columns], weight)
        return logits, iou

    def of_prompts(self, sparse: Tensor, image_side: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Prompts (N, 2, 256) of boxes; what `of_image` returns -> each box's cells, N of (64, 64, 256), the weights (N, 32) by which
        `upscale` makes its mask of them, predicted IoU (N, 1)"""
        tokens, cells = self.transform(sparse, image_side)
        weights = self.decoder.output_hypernetworks_mlps[0](tokens[:, 1])
        cells = [cell.unflatten(0, (EMBED_GRID, EMBED_GRID)) for cell in cells]
        return cells, weights, self.decoder.iou_prediction_head(tokens[:, 0])[:, :1]

    def of_image(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """All that does not depend on a box, of an embedding (4096, 256):
        cells (4096, 256), each less its mean;
        keys and queries of the first layer, then of the second before its update, each by head (heads, 16, 4096);
        values of the first layer, then of the second before its update, without bias, each (heads, 4096, 16)."""
        cells = embedding + self.prompts.no_mask_embed.weight
        projected = (self.weights @ cells.T).add_(self.of_place).unflatten(0, (4, self.heads, -1))
        values = by_head(cells @ self.value_weights.T, 2 * self.heads).contiguous()
        return centred(cells), *projected, *values.unflatten(0, (2, self.heads))

    def transform(self, sparse: Tensor, image_side: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """`TwoWayTransformer` for prompts (N, 2, 256) -> the tokens of IoU and mask (N, 2, 256); N cells (4096, 256).

        In each step all tokens come first, then the cells box by box: the cells of one box are 4 MB, and what is used
        at once stays in the processor's cache.
        """
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight]).expand(len(sparse), -1, -1)
        token_pe = torch.cat([own, sparse], dim=1)  # (N, T, 256)
        image, first_keys, first_queries, second_keys, second_queries, first_values, second_values = image_side
        tokens, keys, vectors = self.first_layer(token_pe, first_keys, first_values)
        at_cells = (image, first_queries, second_keys, second_values)
        tokens, cells, updates = self.second_layer_tokens(tokens, token_pe, keys, vectors, at_cells)
        return self.last_look(tokens, token_pe, cells, updates, second_queries)

    def first_layer(self, token_pe: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step 1. -> tokens (N, T, 256), and what the cells will see of them: keys (N, heads, T, width) and messages"""
        layer, to_image = self.first, self.first.cross_attn_token_to_image
        to_token = self.first.cross_attn_image_to_token
        tokens = layer.norm1(layer.self_attn(token_pe, token_pe, token_pe))
        queries = scaled_by_head(to_image.q_proj, tokens + token_pe, self.heads)
        seen = softmax_sum(queries.transpose(0, 1).flatten(1, 2) @ keys, values)  # (heads, N * T, width)
        seen = seen.unflatten(1, (len(token_pe), -1)).permute(1, 2, 0, 3).flatten(2) + to_image.v_proj.bias
        tokens = layer.norm2(tokens + to_image.out_proj(seen))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        keys = scaled_by_head(to_token.k_proj, tokens + token_pe, self.heads)
        return tokens, keys, centred(messages(tokens, to_token))

    def second_layer_tokens(
        self, tokens: Tensor, token_pe: Tensor, keys: Tensor, vectors: Tensor, at_cells: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor], list[Update]]:
        """Step 2: the first layer changes the cells, and the second layer's tokens look at them.
        keys, vectors: what `first_layer` returns.   at_cells: of the image side. -> tokens (N, T, 256); N cells (4096, 256); N updates"""
        image, queries, for_keys, for_values = at_cells
        norm, layer, to_image = self.first.norm4, self.second, self.second.cross_attn_token_to_image
        placed = tokens + token_pe
        tokens = layer.norm1(tokens + layer.self_attn(placed, placed, tokens))
        updates, cells, seen = [], [], []
        asked = scaled_by_head(to_image.q_proj, tokens + token_pe, self.heads)
        for key, vector, query in zip(keys, vectors, asked, strict=True):
            weights = (key @ queries).softmax(1).flatten(0, 1)  # (heads * T, 4096)
            cell, scale = norm_and_scale(torch.addmm(image, weights.T, vector), norm)
            updates.append(Update(weights, vector, scale))
            cells.append(cell)
            scores = self.second_keys.scores(query, for_keys, updates[-1])
            seen.append(self.second_values.sums(scores, for_values, updates[-1]))
        tokens = layer.norm2(tokens + to_image.out_proj(torch.stack(seen)))
        return layer.norm3(tokens + layer.mlp(tokens)), cells, updates

    def last_look(
        self, tokens: Tensor, token_pe: Tensor, cells: list[Tensor], updates: list[Update], for_queries: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Steps 3 and 4: the second layer changes the cells, then the tokens of IoU and mask look at them."""
        norm, to_token = self.second.norm4, self.second.cross_attn_image_to_token
        keys = scaled_by_head(to_token.k_proj, tokens + token_pe, self.heads)
        vectors = messages(tokens, to_token)
        tokens, seen = tokens[:, :2], []
        for i, query in enumerate(scaled_by_head(self.last.q_proj, tokens + token_pe[:, :2], self.heads)):
            scores = self.second_queries.scores(keys[i], for_queries, updates[i])
            weights = scores.unflatten(0, (self.heads, -1)).softmax(1).flatten(0, 1)
            cells[i] = F.layer_norm(cells[i].addmm_(weights.T, vectors[i]), norm.normalized_shape, eps=norm.eps)
            of_place, of_cells = (query @ self.last_place).flatten(0, 1), (query @ self.last_keys).flatten(0, 1)
            scores = of_place.addmm_(of_cells, cells[i].T)  # (heads * T, 4096)
            seen.append(sum_of_values(scores, cells[i], self.last_values, self.heads))
        tokens = tokens + self.last.out_proj(torch.stack(seen))
        return self.decoder.transformer.norm_final_attn(tokens), cells

    def upscale(self, cells: Tensor, weight: Tensor) -> Tensor:
        """Step 5: `output_upscaling` of a rectangle of cells (R, C, 256), then the mask's weighted sum of the 32 maps.
        weight: (32,) -> logits (4 R, 4 C)"""
        _, norm, *_ = self.decoder.output_upscaling
        cells = F.linear(cells, *self.coarse).unflatten(-1, (4, -1))
        cells = F.gelu(F.layer_norm(cells, norm.weight.shape, norm.weight, norm.bias, 1e-6))
        cells = F.gelu(F.linear(cells, *self.fine).unflatten(-1, (4, -1)))
        logits = (cells @ weight).unflatten(-1, (2, 2)).unflatten(2, (2, 2))  # (R, C, y, x, finer y, finer x)
        return logits.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(0, 2)
