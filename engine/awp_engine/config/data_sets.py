"""The data sets that `--data.name` knows, and where to get those that somebody hosts. Imports no torch."""

from __future__ import annotations

from awp_engine.config.model_names import is_code

_CIFAR = "https://www.cs.toronto.edu/~kriz"

DATA_SETS: dict[str, str] = {
    "digits": "",
    "cifar10": f"{_CIFAR}/cifar.html",
    "cifar100": f"{_CIFAR}/cifar.html",
    "svhn": "http://ufldl.stanford.edu/housenumbers",
    "mnist": "http://yann.lecun.com/exdb/mnist",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist",
    "folder": "",
    "tiny-imagenet": "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "imagenet": "https://image-net.org/download.php, with an account; unpack ILSVRC2012_img_train.tar and the tar of "
    "every class inside it into train/<wnid>, and sort the images of ILSVRC2012_img_val.tar into val/<wnid>",
    "webdataset": "",
    "shards": "",
    "huggingface": "",
}
"""Name of a data set -> its page; empty where nobody hosts it."""

PUBLIC = ("cifar10", "cifar100", "fashion-mnist", "mnist", "svhn", "tiny-imagenet")
"""Those that `awp data get` fetches."""

CORRUPTED: dict[str, str] = {
    "cifar10-c": "https://zenodo.org/records/2535967; curl -LO https://zenodo.org/records/2535967/files/CIFAR-10-C.tar "
    "&& tar -xf CIFAR-10-C.tar, then --data.root CIFAR-10-C",
    "cifar100-c": "https://zenodo.org/records/3555552; curl -LO "
    "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar && tar -xf CIFAR-100-C.tar, then --data.root CIFAR-100-C",
    "imagenet-c": "https://zenodo.org/records/2235448; curl -LO https://zenodo.org/records/2235448/files/noise.tar && "
    "tar -xf noise.tar, and so on for blur, weather and digital, then --data.root .",
    "folder-c": "",
}
"""The same for corrupted test sets, which are only evaluated on."""

_HENDRYCKS = "https://people.eecs.berkeley.edu/~hendrycks"

SHIFTED: dict[str, str] = {
    "imagenet-a": f"{_HENDRYCKS}/imagenet-a.tar, then --data.root imagenet-a",
    "imagenet-r": f"{_HENDRYCKS}/imagenet-r.tar, then --data.root imagenet-r",
    "imagenet-v2": "https://huggingface.co/datasets/vaishaal/ImageNetV2, imagenetv2-matched-frequency.tar.gz, then "
    "--data.root imagenetv2-matched-frequency-format-val",
    "imagenet-sketch": "https://github.com/HaohanWang/ImageNet-Sketch, then --data.root sketch",
}
"""The same for other images of ImageNet's classes."""

OWN_CLASSES_ALONE = ("imagenet-a", "imagenet-r")
"""Data sets of some of a model's classes, whose logits alone are compared, as their authors do."""

OWN = "package.module:factory or file.py:factory"


GIVEN_IMAGES = "given-images"
"""Images that were given to `awp_engine.fit` or `awp_engine.evaluate` as objects of Python."""


def is_given(name: str) -> bool:
    """Whether a data set's name is `GIVEN_IMAGES`, or what they are called in earlier runs."""
    return name in (GIVEN_IMAGES, "awp_engine.cli.objects:data")


def is_own(name: str) -> bool:
    """Whether a data set's name is that of Python code, `OWN`, or of objects."""
    return is_given(name) or is_code(name)


def own_title(name: str) -> str:
    """A name as titles have it: of code that is named by its path, the file and the factory; others as they are.

    >>> own_title("/home/me/photos.py:make")
    'photos.py:make'
    """
    return name.rpartition("/")[2] if is_own(name.partition(" (")[0]) else name


def data_title(name: str, folder: str | None) -> str:
    """A data set as titles have it, with the last name of its directory where that tells it from others.

    >>> data_title("folder", "photos"), data_title("cifar10", "data")
    ('folder photos', 'cifar10')
    """
    several = (DATA_SETS | CORRUPTED).get(name) == ""
    return f"{own_title(name)} {folder}" if several and folder else own_title(name)


def where_to_get(name: str) -> str:
    """The end of a message about files that are missing; empty for a data set that nobody hosts.

    >>> where_to_get("folder")
    ''
    """
    text = (DATA_SETS | CORRUPTED | SHIFTED).get(name)
    if name in PUBLIC:
        return f"; to get it: awp data get {name} DIR (from {text})"
    return f"; to get it: {text}" if text else ""
