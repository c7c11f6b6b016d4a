"""Train a feature pyramid over a timm backbone to segment drawn scenes: the comparison in docs/results.md.

    python docs/segmentation.py convnext_atto --data data --seed 0

A scene is a noisy canvas of 64 x 96 pixels, on which 4 to 10 images of Fashion-MNIST lie at random places, each with
sides of 20 to 40 pixels. Later ones cover earlier ones. Every pixel is of one of ten kinds of clothing, or of
the ground. Scenes of the training are made of training images, those of the evaluation of test images. --data holds
FashionMNIST/raw/*-ubyte, torchvision's layout.
"""

import argparse

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST

import sgconvnext  # noqa: F401  registers the models

SIZE, CLASSES, BATCH = (64, 96), 11, 8
SMALL = {"depths": (2, 2, 2, 2), "dims": (16, 32, 64, 128)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="timm's name of a ConvNeXt or SGConvNeXt; its widths and depths are replaced")
    parser.add_argument("--data", default="data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--scenes", type=int, default=2000, help="of the training; the evaluation has at most 500")
    args = parser.parse_args()
    if args.scenes < BATCH:
        parser.error(f"--scenes {args.scenes} is less than a batch; use at least {BATCH}")
    return args


def main() -> None:
    args = parse_args()
    train, test = (FashionMNIST(args.data, train=part) for part in (True, False))
    training = scenes(train.data, train.targets, args.scenes, seed=0)
    evaluation = scenes(test.data, test.targets, min(500, args.scenes), seed=1)
    torch.manual_seed(args.seed)
    model = network(args.backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    steps = args.scenes // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.epochs * steps)
    for epoch in range(args.epochs):
        for batch in torch.randperm(args.scenes)[: steps * BATCH].view(steps, BATCH):
            images, masks = (part[batch] for part in training)
            loss = F.cross_entropy(model.train()(images), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{args.backbone}, seed {args.seed}, epoch {epoch}: {evaluate(model, evaluation)}", flush=True)


def scenes(items: Tensor, kinds: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, H, W) in 0 .. 1 and the class of every pixel (count, H, W), 0 being the ground."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    images = 0.3 * torch.rand((count, 1, *SIZE), generator=generator)
    masks = torch.zeros((count, *SIZE), dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        for _ in range(draw(4, 11)):
            index, side = draw(0, len(items)), draw(20, 41)
            item = F.interpolate(items[index][None, None] / 255, size=(side, side), mode="bilinear")[0, 0]
            top, left = (draw(0, length - side + 1) for length in SIZE)
            place = ..., slice(top, top + side), slice(left, left + side)
            covered = item > 0.15
            image[place] = torch.where(covered, item, image[place])
            mask[place] = torch.where(covered, kinds[index] + 1, mask[place])
    return images, masks


def network(backbone: str) -> nn.Module:
    built = {} if backbone.startswith("convnext") else {"img_size": SIZE}
    return smp.FPN(
        f"tu-{backbone}",
        encoder_weights=None,
        decoder_pyramid_channels=64,
        decoder_segmentation_channels=32,
        in_channels=1,
        classes=CLASSES,
        **SMALL,
        **built,
    )


def evaluate(model: nn.Module, data: tuple[Tensor, Tensor]) -> str:
    """Mean of intersection / union over the classes that occur, and the share of right pixels, in percent."""
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    with torch.inference_mode():
        for images, masks in zip(*(part.split(50) for part in data), strict=True):
            guessed = model.eval()(images).argmax(1)
            confusion += torch.bincount((masks * CLASSES + guessed).flatten(), minlength=CLASSES**2).view(CLASSES, -1)
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    return f"mIoU {100 * (right / union).nanmean():.2f}, pixels {100 * right.sum() / confusion.sum():.2f} %"


if __name__ == "__main__":
    main()
