"""The whole network of Figure 1: image (B, 3, 256, 256) and boxes (N, 4) -> mask logits (N, 1, 256, 256).

Read top to bottom, as Figure 1 does from left to right:
    image -> ImageEncoder (efficientvit.py)  -> embedding (B, 256, 64, 64)
    boxes -> PromptEncoder                   -> tokens (N, 2, 256)
    embedding + tokens -> MaskDecoder        -> logits (N, 1, 256, 256), predicted IoU (N, 1)
Letters: B images, N prompts, T tokens of a prompt, C channels, H, W height and width.
Module names are those of the published checkpoints, so that they load without a map.

Sources: [P] Lee, Ku, Choi, "Gray's Anatomy for Segment Anything Model", CVPR 2024 challenge on laptops;
[SAM] Kirillov et al., "Segment Anything", arXiv:2304.02643 (prompt encoder and mask decoder, kept by MedSAM).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientvit import EMBED_DIM, EMBED_GRID, LayerNorm2d
from grid import GRID

# ---------------------------------------------------------------- prompt encoder


class FourierFeatures(nn.Module):
    """Positions as sines and cosines of random frequencies. (..., 2) in 0..1 -> (..., 256) [SAM, appendix A]"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, EMBED_DIM // 2))

    def forward(self, xy: Tensor) -> Tensor:
        angle = 2 * math.pi * ((2 * xy - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Boxes -> tokens (N, 2, 256) and the dense prompt (1, 256, 64, 64). [P 2.2; SAM 3]

    Frame: pixels of the 256 grid, (x, y); floats welcome. SAM also takes points and masks, the paper does not. Their
    weights are here so that every name of a checkpoint has its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pe_layer = FourierFeatures()
        # one learnt vector a kind of point: background, foreground, a box's top left, its bottom right
        self.point_embeddings = nn.ModuleList([nn.Embedding(1, EMBED_DIM) for _ in range(4)])
        self.not_a_point_embed = nn.Embedding(1, EMBED_DIM)  # unused
        self.mask_downscaling = nn.Sequential(  # unused
            nn.Conv2d(1, 4, 2, stride=2), LayerNorm2d(4), nn.GELU(),
            nn.Conv2d(4, 16, 2, stride=2), LayerNorm2d(16), nn.GELU(),
            nn.Conv2d(16, EMBED_DIM, 1),
        )  # fmt: skip
        self.no_mask_embed = nn.Embedding(1, EMBED_DIM)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """boxes (N, 4) x0 y0 x1 y1 -> a token for each of two corners (N, 2, 256); the dense prompt (1, 256, 64, 64)

        SAM adds a dense prompt to the embedding. Without a mask to start from it is one learnt vector in every cell.
        """
        corners = self.pe_layer((boxes.reshape(-1, 2, 2) + 0.5) / GRID)  # +0.5: the centre of the pixel
        kinds = torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight])  # (2, 256)
        dense = self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, EMBED_GRID, EMBED_GRID)
        return corners + kinds, dense

    def dense_positions(self) -> Tensor:
        """Position code of every embedding cell. -> (1, 256, 64, 64)"""
        centre = (torch.arange(EMBED_GRID, device=self.no_mask_embed.weight.device) + 0.5) / EMBED_GRID
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        return self.pe_layer(torch.stack([x, y], dim=-1)).permute(2, 0, 1).unsqueeze(0)


# ---------------------------------------------------------------- mask decoder


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than its outer one. [SAM, appendix A]"""

    def __init__(self, inner: int = EMBED_DIM, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(EMBED_DIM, inner)
        self.k_proj = nn.Linear(EMBED_DIM, inner)
        self.v_proj = nn.Linear(EMBED_DIM, inner)
        self.out_proj = nn.Linear(inner, EMBED_DIM)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, Q, 256), k and v (N, K, 256) -> (N, Q, 256). One row instead of N serves all: it is projected once."""
        n = q.shape[0] if k.shape[0] == 1 else k.shape[0]
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).expand(n, -1, -1, -1)  # (N, heads, Q or K, width)
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The transformer layer's two linear layers (named apart from `MLP` because the checkpoint names them so)."""

    def __init__(self, hidden: int = 2048) -> None:
        super().__init__()
        self.lin1 = nn.Linear(EMBED_DIM, hidden)
        self.lin2 = nn.Linear(hidden, EMBED_DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.lin1(x).relu())


class TwoWayLayer(nn.Module):
    """Tokens attend to themselves, tokens to image, feed-forward, image to tokens. [SAM Fig. 14]"""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first  # in the first layer the tokens *are* their position codes
        self.self_attn = Attention()
        self.norm1 = nn.LayerNorm(EMBED_DIM)
        self.cross_attn_token_to_image = Attention(EMBED_DIM // 2)
        self.norm2 = nn.LayerNorm(EMBED_DIM)
        self.mlp = FeedForward()
        self.norm3 = nn.LayerNorm(EMBED_DIM)
        self.norm4 = nn.LayerNorm(EMBED_DIM)
        self.cross_attn_image_to_token = Attention(EMBED_DIM // 2)

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, token_pe (N, T, 256); image (N or 1, 4096, 256); image_pe (1, 4096, 256) -> tokens, image (N, ...)"""
        image_at = image + image_pe  # each cell with its position
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image_at, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image_at, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two two-way layers and a last look of the tokens at the image. [SAM Fig. 14]"""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoWayLayer(first=True), TwoWayLayer(first=False)])
        self.final_attn_token_to_image = Attention(EMBED_DIM // 2)
        self.norm_final_attn = nn.LayerNorm(EMBED_DIM)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """image (N or 1, 4096, 256), image_pe (1, 4096, 256), tokens (N, T, 256) -> tokens, image (N, 4096, 256)

        Until the first layer's last line nothing has told the image which box is asked for. So if all boxes are of one
        image, one row of `image` serves them all: what the first layer projects of it is computed once, not N times.
        """
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        seen = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + seen), image


class MaskDecoder(nn.Module):
    """Embedding and prompt -> mask logits and predicted IoU. [P 2.2; SAM Fig. 14]"""

    def __init__(self, mask_count: int = 4) -> None:
        super().__init__()
        c = EMBED_DIM
        self.transformer = TwoWayTransformer()
        self.iou_token = nn.Embedding(1, c)
        # token 0 asks for the mask of a box; SAM answers a point, which may mean several things, with 1 to 3: unused
        self.mask_tokens = nn.Embedding(mask_count, c)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(c, c // 4, 2, stride=2), LayerNorm2d(c // 4), nn.GELU(),
            nn.ConvTranspose2d(c // 4, c // 8, 2, stride=2), nn.GELU(),
        )  # fmt: skip
        self.output_hypernetworks_mlps = nn.ModuleList([MLP(c, c, c, c // 8) for _ in range(mask_count)])
        self.iou_prediction_head = MLP(c, c, c, mask_count)

    def forward(self, embedding: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """embedding (N, 256, 64, 64), one row a prompt, or one row for all; image_pe (1, 256, 64, 64);
        sparse (N, T, 256); dense (N or 1, 256, 64, 64) -> logits (N, 1, 256, 256), IoU (N, 1)"""
        n = sparse.shape[0]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(n, -1, -1)  # (N, 5, 256)
        image = (embedding + dense).flatten(2).transpose(1, 2)  # (N or 1, 4096, 256)
        tokens, image = self.transformer(image, image_pe.flatten(2).transpose(1, 2), torch.cat([own, sparse], dim=1))
        image = image.transpose(1, 2).reshape(n, EMBED_DIM, EMBED_GRID, EMBED_GRID)
        fine = self.output_upscaling(image)  # (N, 32, 256, 256)
        # the mask is a weighted sum of the 32 maps; its weights come from the mask's token
        weights = self.output_hypernetworks_mlps[0](tokens[:, 1]).unsqueeze(1)  # (N, 1, 32)
        logits = (weights @ fine.flatten(2)).unflatten(2, (GRID, GRID))
        return logits, self.iou_prediction_head(tokens[:, 0])[:, :1]


# ---------------------------------------------------------------- the whole model


class BoxSegmenter(nn.Module):
    """Image encoder, prompt encoder, mask decoder: Figure 1 of [P], and the baseline with another encoder.

    With EfficientViT-SAM-L0 it has 34,792,784 parameters. [P 2.2, Table 3]"""

    def __init__(self, image_encoder: nn.Module, kinds: tuple[str, ...] = ()) -> None:
        """image_encoder: takes (B, 3, 256, 256) and returns (B, 256, 64, 64).
        kinds: names of further kinds of boxes, see segment.BOX_KINDS; each has a decoder of its own, 4,064,816 parameters."""
        super().__init__()
        self.image_encoder = image_encoder
        self.mask_decoder = MaskDecoder()
        self.prompt_encoder = PromptEncoder()
        # D24: the paper has one decoder. A box that touches its object and a box that a hand drew ask for two masks
        self.mask_decoders = nn.ModuleDict({kind: MaskDecoder() for kind in kinds})
        self.prompt_encoders = nn.ModuleDict({kind: PromptEncoder() for kind in kinds})

    def forward(self, images: Tensor, boxes: Tensor, image_of_box: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images (B, 3, 256, 256) in 0..1; boxes (N, 4) x0 y0 x1 y1, pixels of the 256 grid;
        image_of_box (N,) int64, which image each box belongs to (default: box i to image i, or all to the only one)
        -> logits (N, 1, 256, 256), a mask where above 0; predicted IoU (N, 1)"""
        return self.decode(self.image_encoder(images), boxes, image_of_box)

    def decoder_of(self, boxes_are: str) -> tuple[PromptEncoder, MaskDecoder]:
        """What answers a kind of boxes: its own decoder, or, where a network has none for it, that of exact ones."""
        if boxes_are in self.mask_decoders:
            return self.prompt_encoders[boxes_are], self.mask_decoders[boxes_are]
        return self.prompt_encoder, self.mask_decoder

    def decode(
        self, embedding: Tensor, boxes: Tensor, image_of_box: Tensor | None = None, boxes_are: str = "exact"
    ) -> tuple[Tensor, Tensor]:
        """The same from an embedding (B, 256, 64, 64): encode an image once, decode any number of boxes."""
        prompt_encoder, mask_decoder = self.decoder_of(boxes_are)
        if image_of_box is not None:
            embedding = embedding[image_of_box]  # (N, 256, 64, 64)
        elif embedding.shape[0] not in (1, boxes.shape[0]):
            raise ValueError(f"{len(boxes)} boxes for {len(embedding)} images: say which with image_of_box")
        sparse, dense = prompt_encoder(boxes)
        return mask_decoder(embedding, prompt_encoder.dense_positions(), sparse, dense)


class TorchEngine:
    """A network behind the two calls that the rest of the project makes of any engine: encode an image, decode boxes.
    NumPy arrays go in and out. The embedding is opaque: whoever holds one only hands it back."""

    def __init__(self, network: BoxSegmenter) -> None:
        self.network, self.kinds = network.eval(), ("exact", *network.mask_decoders)

    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> Tensor:
        """image (3, 256, 256) float32, see enhance.network_input -> its embedding"""
        return self.network.image_encoder(torch.from_numpy(image).unsqueeze(0))  # (1, 256, 64, 64)

    @torch.inference_mode()
    def decode(
        self, embedding: Tensor, boxes: np.ndarray, within: np.ndarray | None = None, boxes_are: str = "exact"
    ) -> tuple[np.ndarray, np.ndarray]:
        """boxes (N, 4) on the grid -> logits (N, 256, 256) on the grid, predicted IoU (N,), float32

        within: (N, 4) x0 y0 x1 y1 on the grid, where each mask is wanted. An engine may leave out the rest, this one
        does not.   boxes_are: their kind, see segment.BOX_KINDS."""
        logits, iou = self.network.decode(embedding, torch.as_tensor(boxes, dtype=torch.float32), boxes_are=boxes_are)
        return logits[:, 0].numpy(), iou[:, 0].numpy()
