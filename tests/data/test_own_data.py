"""Data sets that a user's own Python makes: what a factory may give, and what is refused, in one line."""

import gzip
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from awp_engine.data import DataError, Dataset, Loading, load_dataset
from awp_engine.data.loaders.framing import Framing
from awp_engine.data.sets.own import OwnData

RNG = np.random.default_rng(0)
PIXELS = {"train": RNG.integers(0, 256, (70, 6, 5, 3), dtype=np.uint8)}
PIXELS["test"] = RNG.integers(0, 256, (9, 6, 5, 3), dtype=np.uint8)
SPLITS = ("train", "test")


def labels(split: str) -> np.ndarray:
    return np.arange(len(PIXELS[split])) % 3


class Maps(torch.utils.data.Dataset):
    """A map-style data set of tensors [C, H, W] in [0, 1], as torchvision's with ToTensor gives them."""

    classes = ("ant", "bee", "cat")

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(PIXELS[self.split])

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        image = torch.from_numpy(PIXELS[self.split][number]).permute(2, 0, 1)
        return image.float() / 255, int(labels(self.split)[number])


class Streams(torch.utils.data.IterableDataset):
    def __init__(self, split: str) -> None:
        self.items = [Maps(split)[n] for n in range(len(Maps(split)))]

    def __iter__(self):
        return iter(self.items)


class AsTorchvision(Maps):
    def __init__(self, root: Path, train: bool = True, transform: object = None) -> None:
        assert root == Path("/somewhere")
        super().__init__("train" if train else "test")

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return Image.fromarray(PIXELS[self.split][number]), int(labels(self.split)[number])


def subset(split: str):
    return torch.utils.data.Subset(Maps(split), range(len(PIXELS[split])))


def generator(split: str):
    yield from ((image, torch.tensor(label)) for image, label in zip(PIXELS[split], labels(split), strict=True))


def arrays(split: str):
    return PIXELS[split], labels(split)


def tensors(where: Path, split: str):
    return torch.from_numpy(PIXELS[split]).permute(0, 3, 1, 2), torch.from_numpy(labels(split))


def both():
    return {split: arrays(split) for split in SPLITS} | {"class_names": ["ant", "bee", "cat"]}


def rows(split: str):
    return [{"image": image, "label": label[None]} for image, label in zip(PIXELS[split], labels(split), strict=True)]


def read_only(split: str):
    """Grey, and as files are read."""
    grey = PIXELS[split][..., :1]
    return np.frombuffer(grey.tobytes(), np.uint8).reshape(grey.shape), labels(split)


TAKEN = {
    "Maps": (None, True),
    "Streams": (None, False),
    "AsTorchvision": (Path("/somewhere"), True),
    "subset": (None, True),
    "generator": (None, False),
    "arrays": (None, False),
    "tensors": (Path("/anywhere"), False),
    "both": (None, True),
    "rows": (None, False),
}


def load(name: str, root: Path | None = None, **given: Any) -> Dataset:
    return load_dataset(name, root=root, held_out_fraction=0.0, seed=0, **given)


def own(name: str) -> str:
    return f"{__name__}:{name}"


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_factory_may_give(name: str) -> None:
    """The same bytes and labels, whatever they come as; names where the data have them; one fingerprint."""
    root, named = TAKEN[name]
    data = load(own(name), root)
    for split, part in (("train", data.train), ("test", data.test)):
        assert torch.equal(part.resident().images, torch.from_numpy(PIXELS[split]).permute(0, 3, 1, 2))
        assert part.labels.tolist() == labels(split).tolist()
    assert data.test.ids.tolist() == list(range(70, 79))
    assert data.class_names == (("ant", "bee", "cat") if named else ("0", "1", "2"))
    assert data.named == named
    assert data.fingerprint == load(own("Maps" if named else "arrays")).fingerprint
    alone = load(own(name), root, need_train=False)
    assert torch.equal(alone.test.resident().images, data.test.resident().images)
    assert len(alone.train) == 0
    # noise is keyed by id: an evaluation of the test part alone is that of the run
    assert name in ("Streams", "generator") or torch.equal(alone.test.ids, data.test.ids)


def test_memory_that_cannot_be_written_to_is_taken_without_a_warning() -> None:
    images = load(own("read_only")).test.resident().images
    assert torch.equal(images, torch.from_numpy(PIXELS["test"][..., 0]).unsqueeze(1))


def test_a_factory_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside the file can be imported; a module of the same name keeps its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text("CLASSES = ['dark', 'light']\n")
    file = tmp_path / "json.py"
    file.write_text(
        "import numpy as np\nimport beside_it\n\n\n"
        "class Two(list):\n    classes = beside_it.CLASSES\n\n\n"
        "def make(split):\n    return Two((np.full((4, 4), n % 2 * 200 + 3, np.uint8), n % 2) for n in range(6))\n"
    )
    data = load(f"{file}:make")
    assert (data.class_names, data.train.shape, len(data.test)) == (("dark", "light"), (1, 4, 4), 6)
    assert sys.modules["json"].__file__ != str(file)
    file.write_text("import beside_it\n\n\ndef make(split):\n    return beside_it.nothing[split]\n")
    with pytest.raises(
        DataError, match=r"make: its call for train images raised AttributeError: .*'nothing' \(.*json.py, line 5\)$"
    ):
        load(f"{file}:make")
    file.write_text("def make(:\n")
    with pytest.raises(DataError, match="SyntaxError"):
        load(f"{file}:make")


def as_tensors(split: str):
    return [(torch.full((3, 4, 3), level), number % 2) for number, level in enumerate((0.1, 0.4999, 0.999))]


def as_arrays(split: str):
    return [(image.numpy(), label) for image, label in as_tensors(split)]


@pytest.mark.parametrize(("name", "shape"), [("as_tensors", (3, 4, 3)), ("as_arrays", (3, 3, 4))])
def test_orders_of_axes_and_rounding(name: str, shape: tuple[int, ...]) -> None:
    """Where both orders fit, tensors have channels first and arrays last; values go to the nearest of 256 levels."""
    data = load(own(name))
    assert data.train.shape == shape
    assert data.train.resident().images[1:, 0, 0, 0].tolist() == [127, 255]


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (tmp_path / "photos.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    for split in SPLITS:
        for number in range(4):
            Image.fromarray(PIXELS[split][number]).save(tmp_path / f"{split}{number}.png")
        (tmp_path / f"{split}.csv").write_text("".join(f"{split}{n}.png,{n % 2}\n" for n in range(4)))
    data = load(f"{tmp_path / 'photos.py'}:Photos", tmp_path)
    assert (data.class_names, data.train.labels.tolist()) == (("cat", "dog"), [0, 1, 0, 1])
    assert torch.equal(data.train.resident().images[3], torch.from_numpy(PIXELS["train"][3]).permute(2, 0, 1))


def test_images_are_resized_as_those_of_files_are(tmp_path: Path) -> None:
    for split, count in (("train", 9), ("test", 3)):
        for number in range(count):
            folder = tmp_path / split / "abc"[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS[split][number]).save(folder / f"{number}.png")
    # DALI, where it is installed, rounds otherwise
    loading = Loading(loader="torch", workers=0, framing=Framing(size=4, central=0.8))
    files = load("folder", tmp_path, loading=loading)
    mine = load(own("Maps"), loading=loading)
    assert mine.train.shape == (3, 4, 4)
    nine = mine.train.select(torch.arange(9)).resident()
    by_label = torch.argsort(nine.labels, stable=True)
    assert torch.equal(nine.images[by_label], files.train.resident().images)
    assert nine.labels[by_label].tolist() == files.train.labels.tolist()
    with pytest.raises(DataError, match=r"--data\.crop resized"):
        load(own("Maps"), loading=Loading(framing=Framing(size=4, least_area=0.5)))


def shuffled(split: str):
    return [Maps(split)[int(n)] for n in np.random.default_rng().permutation(len(PIXELS[split]))]


class Augmented(Maps):
    def __getitem__(self, number: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(number)
        return image.roll(int(torch.randint(0, 5, ())), -1), label


def growing(split: str, seen: list[int] = []):  # noqa: B006
    seen.append(1)
    return [Maps(split)[n] for n in range(3 + len(seen))]


def changed(change: Any):
    return lambda split: [change(*item) for item in map(Maps(split).__getitem__, range(4))]


normalised = changed(lambda image, label: ((image - 0.5) / 0.25, label))
up_to_255 = changed(lambda image, label: (image * 255, label))
twice_divided = changed(lambda image, label: (image / 255, label))
not_finite = changed(lambda image, label: (image * float("nan"), label))
whole_numbers = changed(lambda image, label: ((image * 255).long(), label))
transparent = changed(lambda image, label: (Image.new("RGBA", (4, 4)), label))
four_channels = changed(lambda image, label: (torch.rand(4, 6, 5), label))
named_labels = changed(lambda image, label: (image, f"class {label}"))
float_labels = changed(lambda image, label: (image, float(label)))
negative = changed(lambda image, label: (image, -1))
triples = changed(lambda image, label: (image, label, 0))
unlike = changed(lambda image, label: (image[:, : 6 - label], label))
nothing = changed(lambda image, label: None)


def fewer_labels(split: str):
    return PIXELS[split], labels(split)[1:]


def batches(split: str):
    return torch.utils.data.DataLoader(Maps(split), batch_size=2)


def empty(split: str):
    return []


def no_split():
    return Maps("train")


def one_part():
    return {"train": arrays("train")}


def three(a, b, c):
    return []


def raises(split: str):
    raise FileNotFoundError(2, "No such file", "images.bin")


number = 7
REFUSED = {
    "shuffled": "is another one on a second reading",
    "Augmented": "is another one on a second reading: is it augmented",
    "growing": "train has 4 images, and 5 on a second reading",
    "normalised": "train image 0 has values from -2 to [0-9.]*; expected 0 to 1: leave out Normalize",
    "up_to_255": "expected 0 to 1: divide by the largest value",
    "twice_divided": "were they divided by 255 twice",
    "not_finite": "values from nan to nan",
    "whole_numbers": "train image 0 is int64, 0 to 248; expected uint8",
    "transparent": r"has mode RGBA; expected L or RGB: image.convert\('RGB'\)",
    "four_channels": r"is \[4, 6, 5\]; expected \[H, W\]",
    "named_labels": "has the label 'class 0'; expected a whole number",
    "float_labels": "has the label 0.0; expected a whole number",
    "negative": "has the label -1; expected 0 to",
    "triples": r"train item 0 is 3 values; expected pairs \(image, label\)",
    "unlike": "train image 1 is 3x5x5, the ones before it 3x6x5; make them one, or give --data.image-size",
    "nothing": "train item 0 is a NoneType; expected pairs",
    "fewer_labels": "70 images and 69 labels",
    "batches": "is a batch .* not a DataLoader",
    "empty": "train has no images",
    "no_split": "takes no split and gives a Maps",
    "one_part": "gives a mapping of 'train'; expected 'train' and 'test'",
    "three": "asks for a, b, c; expected a function",
    "raises": r"raised FileNotFoundError: \[Errno 2\] No such file: 'images.bin' \(.*test_own_data.py, line",
    "number": "is of type int; expected a function",
    "missing": "has no missing; expected the name of a function or a class",
    "tensors": "asks for a root: give --data.root",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name]) as raised:
        load(own(name))
    assert str(raised.value).startswith(("--data.name: " + own(name), "--data.name: " + __file__))
    assert "\n" not in str(raised.value)


def test_a_root_that_nobody_asks_for_is_refused_and_so_is_what_does_not_fit() -> None:
    with pytest.raises(DataError, match=r"takes no root: leave out --data\.root"):
        load(own("arrays"), Path("/somewhere"))
    for name in ("arrays", "generator"):
        told: list[str] = []
        with pytest.raises(DataError, match=r"takes .* of memory, and .* are free; write it as images-"):
            OwnData(own(name), None, available=100, say=told.append).read()
    OwnData(own("arrays"), None, say=told.append).read()
    assert told[-2].endswith("reading 70 train images of 3x6x5, 0.0 MB")


IDX = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8),
    "train-labels-idx1-ubyte": np.arange(20, dtype=np.uint8) % 10,
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
}


def idx(values: np.ndarray) -> bytes:
    header = [0x800 + values.ndim, *values.shape]
    return b"".join(number.to_bytes(4, "big") for number in header) + values.tobytes()


def write_mnist(root: Path, *, compressed: bool = False) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, values in IDX.items():
        content = idx(values)
        (root / (name + ".gz" * compressed)).write_bytes(gzip.compress(content) if compressed else content)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", ".")])
def test_mnist(tmp_path: Path, name: str, folder: str) -> None:
    write_mnist(tmp_path / folder, compressed=folder == ".")
    data = load(name, tmp_path)
    assert np.array_equal(data.train.resident().images[:, 0].numpy(), IDX["train-images-idx3-ubyte"])
    assert np.array_equal(data.test.labels.numpy(), IDX["t10k-labels-idx1-ubyte"])
    assert data.class_names[9] == ("9" if name == "mnist" else "Ankle boot")
    for file in (tmp_path / folder).glob("train*"):
        file.unlink()
    assert len(load(name, tmp_path, need_train=False).test) == 10
    with pytest.raises(DataError, match=rf"holds no train images of {name}; .*to get it: awp data get"):
        load(name, tmp_path)


def test_damaged_idx_files_end_in_one_line(tmp_path: Path) -> None:
    images, numbers = idx(IDX["train-images-idx3-ubyte"]), idx(IDX["train-labels-idx1-ubyte"])
    for name, content, message in (
        ("train-images-idx3-ubyte", images[:-1], "15679 bytes after a header that promises 15680"),
        ("train-images-idx3-ubyte", images + b"0", "more after a header that promises 15680"),
        ("train-images-idx3-ubyte", numbers, "begins with 00 00 08 01; expected the IDX header of 3-dim"),
        ("train-images-idx3-ubyte", images[:10], "cannot be read"),
        ("train-images-idx3-ubyte", b"", "begins with nothing"),
        ("train-images-idx3-ubyte", images[:4] + b"\xff" * 12 + images[16:], "promises 79228162"),
        ("train-images-idx3-ubyte", idx(IDX["train-images-idx3-ubyte"][:, :9]), "images of 28x9; expected 28x28"),
        ("train-images-idx3-ubyte", idx(IDX["train-images-idx3-ubyte"][:9]), "9 images and .* 20 labels"),
        ("train-labels-idx1-ubyte", numbers[:-1] + b"\x0a", "label 10 of image 19; expected 0 to 9"),
    ):
        write_mnist(tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as raised:
            load("mnist", tmp_path)
        assert re.search(r"[\n\r]", str(raised.value)) is None
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    for content in (gzip.compress(numbers)[:-9], b"no gzip", gzip.compress(numbers[:9])):
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz (cannot be read|holds)"):
            load("mnist", tmp_path)
