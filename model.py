"""The report's network: a ResNet of 3, 6, 4 and 3 basic blocks for CIFAR-10, 4,883,626 parameters.

    python model.py     # every parameter with its shape and count, and the totals

Details that reproductions get wrong: the stem has 32 channels and no max pool follows it; layer 1
keeps stride 1 and projects nowhere; in layers 2 to 4 only the first block projects.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    """Convolution, then batch norm; the norm's shift makes the convolution's bias superfluous."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions with batch norm (report, Figure 3).

    float [n, in_channels, h, w] -> float [n, out_channels, h / stride, w / stride]

    The skip is the identity, or with `project` a 1x1 convolution with batch norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, project: bool = False):
        super().__init__()
        self.conv1 = conv_bn(in_channels, out_channels, 3, stride)
        self.conv2 = conv_bn(out_channels, out_channels, 3, 1)
        self.skip = conv_bn(in_channels, out_channels, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x))
        return F.relu(self.conv2(out) + self.skip(x))


def downsampling_layer(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    """Residual layer whose first block halves height and width (report, Model Architecture)."""
    first = BasicBlock(in_channels, out_channels, stride=2, project=True)
    rest = [BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class ResNet(nn.Module):
    """The report's network (Table 1, Figure 2) with PyTorch's default initialisation.

    float [n, 3, 32, 32] in 0..1 -> logits, float [n, 10]

    The report counts its parameters twice. 4.884 million (Conclusion) is this network and the one
    behind the tables. 4.887 million (Model Architecture) is `project_layer1=True`: Figure 3's
    projection on the three stride-1 blocks of layer 1 too, 3,264 parameters more.
    """

    def __init__(self, project_layer1: bool = False):
        super().__init__()
        self.stem = conv_bn(3, 32, 3, 1)
        self.layer1 = nn.Sequential(*[BasicBlock(32, 32, project=project_layer1) for _ in range(3)])
        self.layer2 = downsampling_layer(32, 64, blocks=6)
        self.layer3 = downsampling_layer(64, 128, blocks=4)
        self.layer4 = downsampling_layer(128, 256, blocks=3)
        self.pool = nn.AvgPool2d(4)
        self.linear = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.pool(x).flatten(1))


def count_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def main() -> None:
    model = ResNet()
    for name, parameter in model.named_parameters():
        shape = "x".join(map(str, parameter.shape))
        print(f"{name:<24} {shape:>14} {parameter.numel():>9,}")
    print()
    for name, child in model.named_children():
        print(f"{name:<39} {count_parameters(child):>9,}")
    print(f"{'total':<39} {count_parameters(model):>9,}")


if __name__ == "__main__":
    main()
