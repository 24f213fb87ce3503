"""Data sets: the embedded digits, or a folder of images; read with PIL, without Lightning.

`digits` are scikit-learn's bundled handwritten digits (UCI, 1,797 real 8 x 8 grey images), always
split the same way: 1,149 train, 288 validation, 360 test, stratified by class. A folder has
train/<class>/*.jpg and val/<class>/*.jpg, and may have test/ (else val/ serves as the test split).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import UsageError, require

__all__ = ["DataError", "ImageSet", "Split", "eval_loader", "eval_transform", "open_data"]

Split = Literal["train", "val", "test"]
_LAYOUT = "train/<class>/*.jpg and val/<class>/*.jpg"


class DataError(UsageError):
    """A data set that cannot be read; the message names the file or folder."""

    def __init__(self, message: str) -> None:
        # torch wraps an error from a loader process in its traceback: keep our own sentence
        super().__init__(message.strip().splitlines()[-1].rpartition("DataError: ")[2])


class _Images(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """An opened data set: its classes, its usual preprocessing, and its images by split."""

    source: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    images: Callable[[Split], _Images]

    def dataset(self, split: Split, transform: Callable[[Any], Tensor]) -> Dataset[Any]:
        """Return a split as (transformed image, class index) pairs."""
        return _Transformed(self.images(split), transform)


class _Transformed(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: _Images, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


def open_data(source: str) -> ImageSet:
    """Open "digits" or a folder; a wrong layout is a DataError that says what is expected."""
    if source == "digits":
        return _open_digits()
    return _open_folder(Path(source))


def _open_digits() -> ImageSet:
    datasets = require("sklearn.datasets", purpose="the embedded digits", extra="train")
    selection = require("sklearn.model_selection", purpose="the embedded digits", extra="train")
    digits = datasets.load_digits()
    everything = np.arange(len(digits.target))
    rest, test = selection.train_test_split(
        everything, test_size=360, stratify=digits.target, random_state=0
    )
    train, val = selection.train_test_split(
        rest, test_size=288, stratify=digits.target[rest], random_state=0
    )
    indices = {"train": train, "val": val, "test": test}
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)

    def images(split: Split) -> list[tuple[Image.Image, int]]:
        return [(Image.fromarray(pixels[i]), int(digits.target[i])) for i in indices[split]]

    return ImageSet(
        source="digits",
        classes=tuple(str(name) for name in digits.target_names),
        preprocess=Preprocess(
            input_size=(1, 32, 32), crop_pct=1.0, interpolation="bilinear", mean=(0.3,), std=(0.35,)
        ),
        images=images,
    )


class _FolderImages:
    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.samples[index]
        try:
            with Image.open(file) as image:
                return image.convert("RGB"), label
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"cannot read the image {file} ({type(error).__name__}); replace or remove it"
            ) from error


def _open_folder(root: Path) -> ImageSet:
    if not root.is_dir():
        raise DataError(f"no data set {root}; give 'digits' or a folder with {_LAYOUT}")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(f"{root} has no folder {split}/; a data set needs {_LAYOUT}")
    classes = _class_names(root / "train")
    samples = {"train": _scan(root / "train", classes), "val": _scan(root / "val", classes)}
    has_test = (root / "test").is_dir()
    samples["test"] = _scan(root / "test", classes) if has_test else samples["val"]
    return ImageSet(
        source=str(root.resolve()),
        classes=classes,
        preprocess=Preprocess(),
        images=lambda split: _FolderImages(samples[split]),
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if len(names) < 2:
        raise DataError(
            f"{folder} has {len(names)} class folders; it needs two or more, as in {_LAYOUT}"
        )
    return names


def _scan(folder: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    for extra in sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - {*classes}):
        raise DataError(f"{folder / extra} is a class that train/ does not have; remove or add it")
    samples = []
    for label, name in enumerate(classes):
        files = sorted(
            str(file)
            for file in (folder / name).rglob("*")
            if file.suffix.lower() in IMG_EXTENSIONS
        )
        if not files:
            raise DataError(
                f"the class {folder / name} has no image ({', '.join(IMG_EXTENSIONS)}); add some "
                "or remove the class from train/ and val/"
            )
        samples += [(file, label) for file in files]
    return samples


def eval_transform(preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform for a preprocessing record: PIL image to (C, H, W)."""
    from timm.data import create_transform

    transform: Callable[[Image.Image], Tensor] = create_transform(
        preprocess.input_size,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )
    return transform


def eval_loader(
    source: str, preprocess: Preprocess, *, split: Split = "test", most: int, batch_size: int = 64
) -> DataLoader[Any]:
    """Return at most `most` images of a split, evenly spread over it, in batches.

    A batch is images (N, C, H, W) float32, preprocessed as for evaluation, and labels (N,).
    """
    dataset = open_data(source).dataset(split, eval_transform(preprocess))
    total = len(dataset)  # type: ignore[arg-type]
    indices = np.linspace(0, total - 1, min(most, total)).round().astype(int).tolist()
    return DataLoader(Subset(dataset, indices), batch_size=batch_size)
