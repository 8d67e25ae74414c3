"""The data sets that `--data.name` knows, and where to get those that somebody hosts. Imports no torch."""

from __future__ import annotations

import re

_CIFAR = "https://www.cs.toronto.edu/~kriz"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_IDX = "{train-images-idx3,train-labels-idx1,t10k-images-idx3,t10k-labels-idx1}-ubyte.gz"

DATA_SETS: dict[str, str] = {
    "digits": "",
    "cifar10": f"{_CIFAR}/cifar.html; curl -LO {_CIFAR}/cifar-10-binary.tar.gz && tar -xzf cifar-10-binary.tar.gz, "
    "then --data.root cifar-10-batches-bin",
    "cifar100": f"{_CIFAR}/cifar.html; curl -LO {_CIFAR}/cifar-100-binary.tar.gz && tar -xzf cifar-100-binary.tar.gz, "
    "then --data.root cifar-100-binary",
    "svhn": f"{_SVHN}; mkdir svhn && cd svhn && curl -LO '{_SVHN}/{{train,test}}_32x32.mat', then --data.root svhn",
    "mnist": f"http://yann.lecun.com/exdb/mnist; mkdir mnist && cd mnist && curl -LO '{_MNIST}/{_IDX}', then "
    "--data.root mnist",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist; mkdir fashion && cd fashion && curl -LO "
    f"'{_FASHION}/{_IDX}', then --data.root fashion",
    "folder": "",
    "tiny-imagenet": "http://cs231n.stanford.edu/tiny-imagenet-200.zip; curl -LO "
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip && unzip -q tiny-imagenet-200.zip, then --data.root "
    "tiny-imagenet-200",
    "imagenet": "https://image-net.org/download.php, with an account; unpack ILSVRC2012_img_train.tar and the tar of "
    "every class inside it into train/<wnid>, and sort the images of ILSVRC2012_img_val.tar into val/<wnid>",
    "webdataset": "",
    "shards": "",
    "huggingface": "",
}
"""Name of a data set -> its page and the shell lines that fetch it; empty where nobody hosts it."""

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

OWN = "package.module:factory or file.py:factory"
_OWN = re.compile(r"(?:.*\.py|[^\W\d]\w*(?:\.[^\W\d]\w*)*):[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def is_own(name: str) -> bool:
    """Whether a data set's name is that of Python code: `OWN`."""
    return _OWN.fullmatch(name) is not None


def where_to_get(name: str) -> str:
    """The end of a message about files that are missing; empty for a data set that nobody hosts.

    >>> where_to_get("folder")
    ''
    """
    text = DATA_SETS.get(name) or CORRUPTED.get(name)
    return f"; to get it: {text}" if text else ""
