"""The latent-attention net as its document writes it: what a plain script would run.

The same parameters as our seed variant, the operations in the document's order and in torch's own
modules: NCHW, ReLU before the maximum, `nn.MultiheadAttention` with its weights, no folding.

    python -m benchmarks.tutorial BUNDLE      # the net with random weights, for benchmarks.peers
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, relu

import models

CLASSES = 11


class AsWritten(nn.Module):
    """Logits_BKhw of the document's net with the weights of ours."""

    task = "segment"

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            _in_order(conv) for conv in (ours.encoder.conv1, ours.encoder.conv2)
        )
        read, ask = ours.latent_attn, ours.expert_seg
        self.latents, self.head = read.latents, ask.segmentation_head
        self.key, self.value, self.query = read.key_proj, read.value_proj, read.query_proj
        self.pixel = ask.pixel_proj
        self.reading, self.asking = _attention(read.attention), _attention(ask.attention)

    def forward(self, x_BCHW: Tensor, *, native: bool = False) -> Tensor:
        """One step after the other."""
        x_BFHW = max_pool2d(relu(self.conv1(x_BCHW)), 2)
        x_BFhw = max_pool2d(relu(self.conv2(x_BFHW)), 2)
        x_BTF = x_BFhw.flatten(2).transpose(1, 2)
        query_BMD = self.query(self.latents.unsqueeze(0).expand(len(x_BTF), -1, -1))
        experts_BMD, _ = self.reading(query_BMD, self.key(x_BTF), self.value(x_BTF))
        told_BTD, _ = self.asking(self.pixel(x_BTF), experts_BMD, experts_BMD)
        logits_BKhw = self.head(told_BTD).transpose(1, 2).unflatten(2, x_BFhw.shape[-2:])
        if native:
            return logits_BKhw
        return interpolate(logits_BKhw, x_BCHW.shape[-2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def _in_order(conv: nn.Conv2d) -> nn.Conv2d:
    """A copy whose weights lie in memory as torch makes them."""
    made = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    made.load_state_dict(conv.state_dict())
    return made


@torch.no_grad()
def _attention(ours: nn.Module) -> nn.MultiheadAttention:
    width = ours.out_proj.weight.shape[0]
    made = nn.MultiheadAttention(width, ours.heads, batch_first=True)
    made.load_state_dict(ours.state_dict())
    return made.eval()


def main() -> None:
    """Write a bundle whose pixels do not all get the same answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = models.build("latent_attention", classes=CLASSES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.9)
    card = models.Bundle(
        architecture="latent_attention",
        config=model.config.to_json(),
        classes=tuple(models.ClassInfo(k, f"class {k}", (20 * k, 0, 0)) for k in range(CLASSES)),
        input=models.InputInfo(channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        stride=model.stride,
        receptive_field=model.receptive_field,
        provenance={"data": "none: random weights, for benchmarks"},
        metrics={},
    )
    models.save_bundle(given.bundle, model, card)


if __name__ == "__main__":
    main()
