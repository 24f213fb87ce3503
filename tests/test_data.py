import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from litezoo.export.artifact import preprocess_image
from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import UsageError
from litezoo.recipes.data import DataError, eval_loader, eval_transform, open_data

SMALL = Preprocess(input_size=(3, 32, 32))


def draw(size, *, mode="RGB", seed=0):
    """Return a picture of smooth colours with some noise; size is (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 4), dtype=np.uint8), "RGBA")
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(int) + rng.integers(-20, 21, (size[1], size[0], 4))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def write_folder(root, *, classes=("cat", "dog"), train=3, val=2, test=0, size=(40, 36)):
    """Write a data set of JPEG files, <root>/<split>/<class>/<number>.jpg, and return its root."""
    for split, count in (("train", train), ("val", val), ("test", test)):
        for label, name in enumerate(classes if count else ()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                draw(size, seed=100 * label + number).save(folder / f"{number}.jpg")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pets")


# --------------------------------------------------------------------------- the embedded digits


def labels(images):
    return np.array([label for _, label in images])


def test_the_digits_are_split_into_1149_288_and_360():
    digits = open_data("digits")
    sizes = [len(digits.images(split)) for split in ("train", "val", "test")]
    assert sizes == [1149, 288, 360] and sum(sizes) == 1797
    assert digits.classes == tuple("0123456789")
    assert digits.source == "digits"


def test_the_digits_are_split_the_same_way_every_time():
    first, second = open_data("digits"), open_data("digits")
    for split in ("train", "val", "test"):
        for (a, i), (b, j) in zip(first.images(split), second.images(split), strict=True):
            assert i == j and a.tobytes() == b.tobytes()
    # of this version: a change of the split would make old and new accuracies incomparable
    assert labels(first.images("test"))[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_no_digit_is_in_two_splits_and_none_is_lost():
    from sklearn.datasets import load_digits

    source = load_digits()
    seen = [
        (np.asarray(image).tobytes(), label)
        for split in ("train", "val", "test")
        for image, label in open_data("digits").images(split)
    ]
    every = [
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(source.images, source.target, strict=True)
    ]
    assert sorted(seen) == sorted(every)
    assert len(set(every)) == 1797  # all pictures differ, so the splits are disjoint


def test_each_split_of_the_digits_has_every_class_in_proportion():
    digits = open_data("digits")
    counts = {
        split: np.bincount(labels(digits.images(split)), minlength=10)
        for split in ("train", "val", "test")
    }
    whole = sum(counts.values())
    for own in counts.values():
        share = own.sum() / 1797
        assert np.abs(own - share * whole).max() <= 1


def test_the_digits_come_out_as_one_channel_of_32_pixels():
    digits = open_data("digits")
    image, label = digits.dataset("train", eval_transform(digits.preprocess))[0]
    assert image.shape == (1, 32, 32) and image.dtype == torch.float32
    assert label == digits.images("train")[0][1]


@pytest.mark.parametrize("most", [1, 7, 360, 5000])
def test_part_of_the_test_split_is_spread_evenly_over_it(most):
    digits = open_data("digits")
    images = digits.images("test")
    batches = list(eval_loader("digits", digits.preprocess, most=most, batch_size=64))
    found = torch.cat([y for _, y in batches])
    count = min(most, 360)
    wanted = [images[round(i * 359 / (count - 1)) if count > 1 else 0][1] for i in range(count)]
    assert found.tolist() == wanted
    assert all(len(x) <= 64 for x, _ in batches)


# ------------------------------------------------------------------------------ folders of images


def test_a_folder_gives_its_classes_and_its_splits(folder):
    data = open_data(str(folder))
    assert data.classes == ("cat", "dog")
    assert data.source == str(folder.resolve())
    assert [len(data.images(split)) for split in ("train", "val")] == [6, 4]
    image, label = data.images("train")[5]
    assert (image.mode, image.size, label) == ("RGB", (40, 36), 1)
    assert labels(data.images("val")).tolist() == [0, 0, 1, 1]
    assert data.preprocess.input_size == (3, 224, 224)


def test_without_a_test_folder_val_is_the_test_split(folder):
    data = open_data(str(folder))
    assert data.images("test").samples == data.images("val").samples


def test_a_test_folder_is_the_test_split(tmp_path):
    data = open_data(str(write_folder(tmp_path, test=1)))
    files = [file for file, _ in data.images("test").samples]
    assert files == [str(tmp_path / "test" / name / "0.jpg") for name in ("cat", "dog")]


def test_images_are_found_in_subfolders_and_by_any_usual_suffix(folder):
    deeper = folder / "train" / "cat" / "2024" / "may"
    deeper.mkdir(parents=True)
    for name in ("a.PNG", "b.JPEG", "c.bmp", "d.webp"):
        draw((20, 20)).save(deeper / name)
    (deeper / "notes.txt").write_text("not an image")
    data = open_data(str(folder))
    assert len(data.images("train")) == 10
    assert all(image.mode == "RGB" for image, _ in map(data.images("train").__getitem__, range(10)))


def refusal(source):
    with pytest.raises(DataError) as caught:
        open_data(str(source))
    text = str(caught.value)
    assert "\n" not in text
    assert isinstance(caught.value, UsageError) and caught.value.exit_status == 2
    return text


def test_a_folder_that_is_not_there_is_named(tmp_path):
    text = refusal(tmp_path / "nothing")
    assert text.startswith(f"no data set {tmp_path / 'nothing'};")
    assert "'digits'" in text and "train/<class>/*.jpg and val/<class>/*.jpg" in text


def test_a_file_is_no_data_set(tmp_path):
    (tmp_path / "pets.zip").write_bytes(b"PK")
    assert str(tmp_path / "pets.zip") in refusal(tmp_path / "pets.zip")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(folder, split):
    shutil.rmtree(folder / split)
    text = refusal(folder)
    assert text.startswith(f"{folder} has no folder {split}/;")
    assert "train/<class>/*.jpg and val/<class>/*.jpg" in text


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_classes_are_refused(tmp_path, count):
    write_folder(tmp_path, classes=("cat", "dog")[:count])
    for split in ("train", "val"):
        (tmp_path / split).mkdir(exist_ok=True)
    text = refusal(tmp_path)
    assert text.startswith(f"{tmp_path / 'train'} has {count} class folders; it needs two or more")


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_is_named(folder, split):
    empty = folder / split / "dog"
    for file in empty.iterdir():
        file.rename(file.with_suffix(".txt"))
    assert refusal(folder).startswith(f"the class {empty} has no image (")


def test_a_class_of_train_that_val_lacks_is_named(folder):
    shutil.rmtree(folder / "val" / "cat")
    assert refusal(folder).startswith(f"the class {folder / 'val' / 'cat'} has no image (")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_lacks_is_named(tmp_path, split):
    write_folder(tmp_path, test=1)
    (tmp_path / split / "cow").mkdir()
    draw((20, 20)).save(tmp_path / split / "cow" / "0.jpg")
    text = refusal(tmp_path)
    assert text == (
        f"{tmp_path / split / 'cow'} is a class that train/ does not have; remove or add it"
    )


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


SPOILT = {
    "truncated": truncate,
    "text": lambda file: file.write_text("this is no picture\n"),
    "empty": lambda file: file.write_bytes(b""),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def reading_error(folder, *, workers):
    """Read the training split and return the words of the DataError that this meets."""
    dataset = open_data(str(folder)).dataset("train", eval_transform(SMALL))
    iterator = iter(DataLoader(dataset, batch_size=2, num_workers=workers))
    with pytest.raises(DataError) as caught:
        list(iterator)
    if workers:
        iterator._shutdown_workers()  # left to the garbage collector it waits 5 s for each
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "a folder"])
def test_an_unreadable_image_is_named_in_one_sentence(folder, kind, workers):
    file = folder / "train" / "dog" / "1.jpg"
    SPOILT[kind](file)
    text = reading_error(folder, workers=workers)
    assert text.startswith(f"cannot read the image {file} (")
    assert text.endswith("); replace or remove it")
    assert "\n" not in text and "Traceback" not in text


def test_the_message_is_the_same_from_a_worker(folder):
    truncate(folder / "train" / "cat" / "0.jpg")
    assert reading_error(folder, workers=2) == reading_error(folder, workers=0)


def test_an_image_that_vanished_meanwhile_is_named(folder):
    images = open_data(str(folder)).images("train")
    (folder / "train" / "cat" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"0\.jpg \(FileNotFoundError\); replace or remove it$"):
        images[0]


def test_an_image_beyond_pillows_limit_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"0\.jpg \(DecompressionBombError\); replace"):
        open_data(str(folder)).images("train")[0]


# ------------------------------------------------- the transform of training is that of deployment

SIZES = [(32, 32), (37, 37), (31, 47), (200, 33), (33, 120), (8, 8), (256, 256), (301, 227)]
CROPS = [0.8, 0.875, 0.95, 1.0]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
def test_an_artifact_preprocesses_as_training_evaluated(mode, channels, interpolation):
    preprocess = Preprocess(
        input_size=(channels, 32, 32),
        interpolation=interpolation,
        mean=(0.485, 0.456, 0.406)[:channels],
        std=(0.229, 0.224, 0.225)[:channels],
    )
    for number, size in enumerate(SIZES):
        for crop in CROPS:
            own = dataclasses.replace(preprocess, crop_pct=crop)
            image = draw(size, mode=mode, seed=number)
            wanted = eval_transform(own)(image.convert("L" if channels == 1 else "RGB"))
            got = preprocess_image(image, own)
            assert got.shape == (channels, 32, 32) and got.dtype == np.float32
            assert np.abs(got - wanted.numpy()).max() <= 1e-6, (size, crop)


@pytest.mark.parametrize("side", [24, 65, 160])
def test_it_does_so_at_other_input_sizes(side):
    for crop in CROPS:
        for size in SIZES:
            own = Preprocess(input_size=(3, side, side), crop_pct=crop)
            image = draw(size)
            difference = preprocess_image(image, own) - eval_transform(own)(image).numpy()
            assert np.abs(difference).max() <= 1e-6, (size, crop)


def test_it_reads_a_file_as_the_data_set_does(folder):
    data = open_data(str(folder))
    file = data.images("val").samples[3][0]
    wanted, _ = data.dataset("val", eval_transform(SMALL))[3]
    assert np.abs(preprocess_image(file, SMALL) - wanted.numpy()).max() <= 1e-6


def test_it_gives_the_digits_as_the_data_set_does():
    digits = open_data("digits")
    for index in range(0, 360, 60):
        image, _ = digits.images("test")[index]
        wanted, _ = digits.dataset("test", eval_transform(digits.preprocess))[index]
        difference = preprocess_image(image, digits.preprocess) - wanted.numpy()
        assert np.abs(difference).max() <= 1e-6
