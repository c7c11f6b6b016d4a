"""The digits of the demo, which ship with scikit-learn."""

from typing import Any

from PIL import Image
from torch.utils.data import Dataset


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's bundled 8x8 scans of handwritten digits (UCI, 1797 images), a fifth of each class held out."""

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ValueError("data.dataset=digits needs scikit-learn: pip install 'sgconvnext[demo]'") from error
        digits = load_digits()
        indices = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        chosen = indices[0 if train else 1]
        self.images = [Image.fromarray((digits.images[i] * (255 / 16)).astype("uint8")) for i in chosen]
        self.targets = [int(digits.target[i]) for i in chosen]
        self.class_to_idx = {str(digit): digit for digit in range(10)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.targets[index]
