"""Every loader gives the same samples, each once, at any place to go on from; bad files end it by their names."""

import dataclasses
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import picture, write_images
from PIL import Image

from awp_engine.data import (
    Augmentation,
    Batch,
    Batches,
    DataError,
    Framing,
    Loading,
    Split,
    eval_batches,
    load_dataset,
    load_extra,
    place_extra,
)
from awp_engine.data.loaders.ahead import ahead
from awp_engine.data.loaders.choose import LoaderName, default_workers, free_memory
from awp_engine.data.loaders.dali_loader import let_go
from awp_engine.data.loaders.framing import Framing as _Framing
from awp_engine.data.loaders.workers import process_all
from awp_engine.data.split import StreamedSplit
from awp_engine.data.tools.pack import pack_folder

pytest.importorskip("nvidia.dali", reason="the extra `dali` is for Linux")

_CROPPED = Augmentation(pad=1, flip=True)
_LIGHT = Augmentation(pad=2, flip=True, cutout=3, fill=(0.5, 0.25, 0.75), cutmix=0.5, num_classes=3)
_HEAVY = dataclasses.replace(_LIGHT, mixup=0.4, rand_augment=9.0, erase=0.5, erase_std=(0.2, 0.2, 0.2))
_POLICY = Augmentation(pad=2, flip=True, cutout=3, fill=(0.5, 0.25, 0.75), policy="autoaugment-svhn", policy_first=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    write_images(root, 47)
    return root


def _open(root: Path, loader: LoaderName, name: str = "folder", **loading):
    return load_dataset(
        name, root=root, held_out_fraction=0.1, seed=0, loading=Loading(loader=loader, workers=2, **loading)
    )


def _equal(ours: Batch, expected: Batch) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(ours[:3], expected[:3], strict=True))
    return same and ours.whole_size == expected.whole_size


def _shards(root: Path, folder: Path) -> Path:
    data = _open(folder, "resident")
    for part in ("train", "test"):
        split = load_dataset("folder", root=folder, held_out_fraction=0, seed=0)
        images = getattr(split, part)
        (root / part).mkdir(parents=True)
        for number, rows in enumerate(torch.arange(len(images)).split(20)):
            np.save(root / part / f"images-{number:05}.npy", images.images[rows].permute(0, 2, 3, 1).numpy())
            np.save(root / part / f"labels-{number:05}.npy", images.labels[rows].numpy())
    assert len(data.class_names) == 3
    return root


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_loaders_give_equal_batches(tmp_path: Path, suffix: str) -> None:
    """From files of one size: to the bit, whatever decodes; with all that mixes images."""
    write_images(tmp_path, 31, suffix=suffix)
    sets = {loader: _open(tmp_path, loader) for loader in ("resident", "dali", "torch")}
    assert {data.loader for data in sets.values()} == {"resident", "dali", "torch"}
    assert isinstance(sets["resident"].train, Split)
    assert isinstance(sets["dali"].train, StreamedSplit)
    assert len({(data.fingerprint, data.mean, data.std) for data in sets.values()}) == 1
    for augmentation in (Augmentation(), _LIGHT, _HEAVY, _POLICY):
        found = {
            loader: list(Batches(data.train, augmentation, global_batch_size=8, seed=5))
            for loader, data in sets.items()
        }
        for loader in ("dali", "torch"):
            for ours, expected in zip(found[loader], found["resident"], strict=True):
                assert _equal(ours, expected)
    for part in ("held_out", "test"):
        expected = list(eval_batches(getattr(sets["resident"], part), 4))
        for loader in ("dali", "torch"):
            for ours, theirs in zip(eval_batches(getattr(sets[loader], part), 4), expected, strict=True):
                assert _equal(ours, theirs)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_arrays_are_streamed(tmp_path: Path, folder: Path, loader: LoaderName) -> None:
    root = _shards(tmp_path / "shards", folder)
    resident, streamed = _open(root, "resident", "shards"), _open(root, loader, "shards")
    assert resident.fingerprint == streamed.fingerprint
    batches = [Batches(data.train, _LIGHT, global_batch_size=8, seed=1) for data in (resident, streamed)]
    for ours, expected in zip(*batches, strict=True):
        assert _equal(ours, expected)
    digits = load_dataset("digits", root=None, held_out_fraction=0.1, seed=0, loading=Loading(loader=loader, workers=1))
    own = load_dataset("digits", root=None, held_out_fraction=0.1, seed=0)
    ours, expected = (next(iter(Batches(d.train, _CROPPED, global_batch_size=99, seed=0))) for d in (digits, own))
    assert _equal(ours, expected)


def _table(root: Path, folder: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `huggingface` is not installed")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for part in ("train", "test"):
        files = sorted((folder / part).glob("*/*"))
        rows = {
            "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
            "label": ["abc".index(file.parent.name) for file in files],
        }
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root / part))


@pytest.mark.parametrize("name", ["webdataset", "huggingface", "tiny-imagenet", "imagenet"])
def test_every_source_by_every_loader(tmp_path: Path, folder: Path, name: str) -> None:
    """The same images and labels as in the folder, in batches; processes read the sources too."""
    root = tmp_path / name
    if name == "webdataset":
        pack_folder(folder, root, shard_bytes=8192)
    elif name == "huggingface":
        _table(root, folder)
    elif name == "imagenet":
        shutil.copytree(folder / "train", root / "train")
        shutil.copytree(folder / "test", root / "val")
    else:
        notes = []
        (root / "val" / "images").mkdir(parents=True)
        for file in sorted((folder / "test").glob("*/*")):
            shutil.copy(file, root / "val" / "images")
            notes.append("\t".join([file.name, file.parent.name, "0", "0", "1", "1"]))
        (root / "val" / "val_annotations.txt").write_text("\n".join(notes) + "\n")
        for label in "abc":
            shutil.copytree(folder / "train" / label, root / "train" / label / "images")
    expected = load_dataset("folder", root=folder, held_out_fraction=0, seed=0)
    for part in ("train", "test"):
        wanted = _contents(getattr(expected, part))
        for loader in ("resident", "dali", "torch"):
            data = load_dataset(name, root=root, held_out_fraction=0, seed=0, loading=Loading(loader=loader, workers=1))
            assert _contents(getattr(data, part)) == wanted


def _contents(split: Split | StreamedSplit) -> list[tuple[bytes, int]]:
    """Images and labels, in the order of their bytes."""
    batches = list(eval_batches(split, 16))
    found = [(x.numpy().tobytes(), int(y)) for b in batches for x, y in zip(b.images, b.labels, strict=True)]
    assert len(found) == len(split)
    return sorted(found)


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_image_once_whoever_and_wherever(folder: Path, loader: LoaderName, ranks: int) -> None:
    """Ranks' shares are what one rank has; going on at any batch gives exactly what was not seen."""
    split = _open(folder, loader).train
    whole = list(Batches(split, _CROPPED, global_batch_size=9, seed=2))
    assert sorted(torch.cat([batch.ids for batch in whole]).tolist()) == sorted(split.ids.tolist())
    parts = [Batches(split, _CROPPED, global_batch_size=9, seed=2, rank=r, ranks=ranks) for r in range(ranks)]
    for whole_batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([share.ids for share in shares]), whole_batch.ids)
        assert torch.equal(torch.cat([share.images for share in shares]), whole_batch.images)
        assert (
            [share.whole_size for share in shares] == [whole_batch.whole_size] * ranks == [len(whole_batch.ids)] * ranks
        )
    for stop in range(len(whole) + 1):
        batches = Batches(split, _CROPPED, global_batch_size=9, seed=2)
        seen = [batch.ids for _, batch in zip(range(stop), batches, strict=False)]
        later = Batches(split, _CROPPED, global_batch_size=9, seed=2)
        later.load_state_dict(batches.state_dict())
        rest = list(later)
        assert len(seen) + len(rest) == len(whole)
        for ours, expected in zip(rest, whole[stop:], strict=True):
            assert torch.equal(ours.images, expected.images)
            assert torch.equal(ours.ids, expected.ids)


def test_heavy_augmentation_does_not_depend_on_the_batch(folder: Path) -> None:
    """Nor on the ranks; labels are shares that add up to one, and MixUp's are not CutMix's."""
    split = _open(folder, "resident").train
    whole = {
        int(i): (x, y)
        for b in Batches(split, _HEAVY, global_batch_size=64, seed=3)
        for x, y, i in zip(*b[:3], strict=True)
    }
    for size, ranks in ((7, 1), (10, 3)):
        for rank in range(ranks):
            for batch in Batches(split, _HEAVY, global_batch_size=size, seed=3, rank=rank, ranks=ranks):
                for image, label, number in zip(*batch[:3], strict=True):
                    expected_image, expected_label = whole[int(number)]
                    assert torch.equal(image, expected_image)
                    assert torch.equal(label, expected_label)
                    assert float(label.sum()) == pytest.approx(1, abs=1e-6)
    light = {
        int(i): x for b in Batches(split, _LIGHT, global_batch_size=64, seed=3) for x, _, i in zip(*b[:3], strict=True)
    }
    assert sum(not torch.equal(light[number], image) for number, (image, _) in whole.items()) > len(split) // 2


def test_extra_images_are_streamed(tmp_path: Path, folder: Path) -> None:
    """From memory-mapped shards into every rank's batches, as those in memory; all come before any comes again."""
    shards = _shards(tmp_path / "shards", folder) / "train"
    data = _open(folder, "resident")
    images = load_extra(shards, like=data)
    ways = {name: place_extra(images, Loading(loader=name)) for name in ("resident", "torch", "dali")}
    assert {name: extra.loader for name, extra in ways.items()} == {name: name for name in ways}
    assert len({extra.fingerprint for extra in ways.values()}) == 1
    options = {"global_batch_size": 10, "seed": 4, "extra_fraction": 0.7}
    for rank, ranks in ((0, 1), (1, 3)):
        batches = {
            name: Batches(data.train, _HEAVY, extra=extra.split, rank=rank, ranks=ranks, **options)
            for name, extra in ways.items()
        }
        for expected, *others in zip(*(batches[name] for name in ways), strict=True):
            for ours in others:
                assert _equal(ours, expected)
    taken = [
        number
        for epoch in (1, 2)
        for batch in Batches(data.train, _HEAVY, extra=ways["torch"].split, **options).epoch(epoch)
        for number in batch.ids.tolist()
        if number >= data.first_extra_id
    ]
    counts = [taken.count(number) for number in range(data.first_extra_id, data.first_extra_id + len(images))]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("resized", [False, True])
def test_images_of_any_size(tmp_path: Path, resized: bool) -> None:
    """DALI and Pillow resize the same windows: within two levels, and a tenth of one on average."""
    write_images(tmp_path, 20, None)
    framing = Framing(size=16, least_area=0.2 if resized else None, central=0.875)
    sets = {loader: _open(tmp_path, loader, framing=framing) for loader in ("dali", "torch")}
    assert sets["dali"].fingerprint == sets["torch"].fingerprint
    ways = [Batches(d.train, Augmentation(flip=True), global_batch_size=6, seed=0) for d in sets.values()]
    ways = [*zip(*ways, strict=True), *zip(*(eval_batches(d.test, 6) for d in sets.values()), strict=True)]
    assert len(ways) > 4
    for by_dali, by_pillow in ways:
        assert by_dali.images.shape[1:] == (3, 16, 16)
        assert torch.equal(by_dali.ids, by_pillow.ids)
        difference = (by_dali.images - by_pillow.images).abs() * 255
        assert difference.max() <= 2.01
        assert difference.mean() <= 0.2


def test_grey_images_become_colour_where_sizes_differ(tmp_path: Path) -> None:
    write_images(tmp_path, 12, None)
    file = tmp_path / "train" / "b" / "0001.jpg"
    Image.open(file).convert("L").save(file)
    framing = Framing(size=8)
    for loader in ("dali", "torch"):
        images = torch.cat([b.images for b in eval_batches(_open(tmp_path, loader, framing=framing).train, 4)])
        grey = (images[:, 0] == images[:, 1]).flatten(1).all(1) & (images[:, 0] == images[:, 2]).flatten(1).all(1)
        assert grey.sum() == 1


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32 - 1), st.floats(0.01, 1))
@settings(max_examples=100)
def test_windows_lie_inside(height: int, width: int, seed: int, least: float) -> None:
    words = torch.randint(0, 2**32, (22,), generator=torch.Generator().manual_seed(seed)).tolist()
    for given_words in (words, None):
        top, left, rows, columns = _Framing(size=8, least_area=least, central=0.875).window(height, width, given_words)
        assert min(rows, columns) >= 1
        assert min(top, left) >= 0
        assert top + rows <= height
        assert left + columns <= width


def test_windows_have_the_areas_and_ratios_asked_for() -> None:
    framing = _Framing(size=8, least_area=0.25)
    words = torch.randint(0, 2**32, (4000, 22), generator=torch.Generator().manual_seed(0)).tolist()
    windows = np.array([framing.window(400, 400, word) for word in words], dtype=float)
    areas, ratios = windows[:, 2] * windows[:, 3] / 160_000, windows[:, 3] / windows[:, 2]
    assert areas.min() >= 0.245
    assert ratios.min() >= 0.74
    assert ratios.max() <= 1.35
    # large areas fit with fewer ratios: a little below the mean of 0.625
    assert 0.55 < areas.mean() < 0.63
    assert abs(np.log(ratios).mean()) < 0.01
    # every place is as likely as any other
    slack = (400 - windows[:, 2]) > 100
    assert abs((windows[slack, 0] / (400 - windows[slack, 2])).mean() - 0.5) < 0.02


def _all_ended() -> None:
    """Threads and processes of loaders, some of which need a moment."""
    waited = threading.Event()
    for _ in range(100):
        named = [thread.name for thread in threading.enumerate() if thread.name.startswith(("read", "gather", "Queue"))]
        if not named and not multiprocessing.active_children():
            return
        waited.wait(0.1)
    raise AssertionError(f"still there: {named}, {multiprocessing.active_children()}")


_SPOILED = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "no image": lambda content: b"no image at all",
    "another size": None,
}


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("kind", _SPOILED)
def test_a_bad_file_ends_the_epoch_by_its_name(tmp_path: Path, loader: LoaderName, kind: str) -> None:
    write_images(tmp_path, 40)
    data = _open(tmp_path, loader)
    victim = next(name for row in (data.train.rows[20:]).tolist() if (name := data.train.store.name(row)))
    spoil = _SPOILED[kind]
    if spoil is None:
        picture(1, (7, 7)).save(victim)
    else:
        Path(victim).write_bytes(spoil(Path(victim).read_bytes()))
    for _ in range(2):  # and again: the first one left nothing behind
        with pytest.raises(DataError, match=Path(victim).name) as raised:
            list(Batches(data.train, _CROPPED, global_batch_size=4, seed=0))
        assert "\n" not in str(raised.value)
        assert str(victim) in str(raised.value)
    _all_ended()


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_an_epoch_that_is_left_leaves_nothing_behind(folder: Path, loader: LoaderName) -> None:
    split = _open(folder, loader).train
    for _ in range(3):
        epoch = Batches(split, _CROPPED, global_batch_size=4, seed=0).epoch(1)
        next(epoch)
        epoch.close()
    _all_ended()


def test_loaders_leave_the_processs_own_random_numbers_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    for loader in ("resident", "dali", "torch"):
        loading = Loading(loader=loader, workers=0)
        split = load_dataset("folder", root=folder, held_out_fraction=0, seed=0, loading=loading).train
        assert len(list(Batches(split, _CROPPED, global_batch_size=30, seed=0))) == 2
        assert torch.equal(torch.get_rng_state(), before)


_OPEN_EPOCH = """
import os, signal, sys
from pathlib import Path
from awp_engine.data import Augmentation, Batches, Loading, load_dataset
if __name__ == "__main__":
    killed = os.fork()
    loading = Loading(loader="torch", workers=1)
    split = load_dataset("folder", root=Path(sys.argv[1]), held_out_fraction=0, seed=0, loading=loading).train
    epoch = iter(Batches(split, Augmentation(), global_batch_size=2, seed=0))
    next(epoch)
    if not killed:
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    raise ValueError("the step's own")
"""


def test_processes_end_with_the_run_however_that_ends(tmp_path: Path, folder: Path) -> None:
    """Killed, and by an exception, in the middle of an epoch that nobody closes."""
    script = tmp_path / "run.py"
    script.write_text(_OPEN_EPOCH)
    # waits for all that have its output open, such as the run's processes
    run = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "ValueError: the step's own" in run.stderr
    assert run.returncode == 1


def test_what_a_gpu_reads_is_held_until_it_was_read() -> None:
    batches = [torch.zeros(1) for _ in range(4)]
    held = [weakref.ref(batch) for batch in batches]
    waited: list[int] = []

    class Read:
        """As the event of a batch."""

        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            assert held[self.number]() is not None
            waited.append(self.number)

    in_use = deque((batches.pop(0), Read(number)) for number in range(4))
    let_go(in_use, 2)
    assert waited == [0, 1]
    assert [one() is None for one in held] == [True, True, False, False]


def test_results_that_lie_ready_are_in_time() -> None:
    """However long their consumer takes for the one before."""
    seconds, results = [0.0, 0.1, 0.0, 0.1], {}
    for place, result in process_all(seconds, time.sleep, workers=2, chunk=1, limit=1.0):
        results[place] = result
        if place == 2:
            threading.Event().wait(1.1)
    assert results == dict.fromkeys(range(4))


def test_arrays_are_not_cut(tmp_path: Path, folder: Path) -> None:
    """A set of them is refused where windows were asked for; extra images beside files are taken as they are."""
    windows = Framing(size=8, least_area=0.2)
    for framing, option in ((windows, "crop resized"), (Framing(size=8, central=0.5), "center-crop 0.5")):
        with pytest.raises(DataError, match=f"--data.{option}: the images are arrays, which are taken as they are"):
            load_dataset("digits", root=None, held_out_fraction=0, seed=0, loading=Loading(framing=framing))
    extra = load_extra(_shards(tmp_path, folder) / "train", like=_open(folder, "resident"))
    assert place_extra(extra, Loading(loader="auto", framing=windows)).loader == "resident"


@pytest.mark.gpu
def test_a_gpu_without_a_number_is_the_current_one() -> None:
    loading = Loading(device=torch.device("cuda"))
    assert loading.device == torch.zeros(1, device="cuda").device


def test_ahead_is_ahead_by_what_it_may_and_passes_errors_on() -> None:
    made: list[int] = []

    def items():
        for number in range(10):
            made.append(number)
            yield number
        raise OSError("the disk is gone")

    stream = ahead(items(), 2, name="test")
    assert next(stream) == 0
    threading.Event().wait(0.3)
    # one in use, two ready, one in the thread's hands
    assert len(made) <= 4
    assert [next(stream) for _ in range(9)] == list(range(1, 10))
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_auto_takes_what_fits(folder: Path) -> None:
    assert _open(folder, "auto").loader == "resident"
    assert _open(folder, "auto", resident_share=1e-9).loader == "dali"
    framing = Framing(size=8, least_area=0.1)
    assert _open(folder, "auto", framing=framing).loader == "dali"
    with pytest.raises(DataError, match=r"--data.loader resident: random-resized crops"):
        _open(folder, "resident", framing=framing)
    digits = load_dataset(
        "digits", root=None, held_out_fraction=0.1, seed=0, loading=Loading(loader="auto", resident_share=1e-9)
    )
    assert digits.loader == "torch"
    with pytest.raises(DataError, match=r"--data.image-size 9: digits has images of 8x8"):
        load_dataset("digits", root=None, held_out_fraction=0.1, seed=0, loading=Loading(framing=Framing(size=9)))
    assert free_memory(torch.device("cpu")) > 2**20
    assert 1 <= default_workers() <= 16
