"""Files of 12 kinds that cannot be trained on: they end a run by their names, or are left out after a scan."""

import subprocess
from pathlib import Path

import forked
import pytest
from bad_files import make_folder, plant
from places import TRAIN

from awp_engine.data import Augmentation, Batches, DataError, Loading, eval_batches, load_dataset
from awp_engine.data.loaders.choose import LoaderName
from awp_engine.data.sets.scan_list import bad_files, write_scan
from awp_engine.data.tools.scan import scan_folder

pytest.importorskip("nvidia.dali", reason="the extra `dali` is for Linux")

# what can be trained on all the same: another suffix, another name
_HARMLESS = ("wrong-extension", "bad-name")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            _remove(entry)
        path.rmdir()
    else:
        path.unlink()


@pytest.mark.parametrize("loader", ["resident", "dali", "torch"])
def test_each_kind_alone_is_named_or_harmless(tmp_path: Path, loader: LoaderName) -> None:
    root = make_folder(tmp_path / "data", 100)
    planted = plant(root)
    aside = tmp_path / "aside"
    aside.mkdir()
    places = {}
    for number, path in enumerate(planted):
        places[path] = aside / str(number)
        path.rename(places[path])
    for folder in [*root.glob("train/*"), *root.glob("test/*")]:
        if not any(folder.iterdir()):
            folder.rmdir()
    found = {}
    for path in planted:
        path.parent.mkdir(parents=True, exist_ok=True)
        places[path].rename(path)
        try:
            loading = Loading(loader=loader, workers=0 if loader == "torch" else 1)
            data = load_dataset("folder", root=root, held_out_fraction=0.1, seed=0, loading=loading)
            augmentation = Augmentation(pad=1, flip=True)
            seen = sum(len(b.labels) for b in Batches(data.train, augmentation, global_batch_size=20, seed=0))
            seen += sum(len(b.labels) for part in (data.held_out, data.test) for b in eval_batches(part, 20))
            found[path] = f"{seen} images"
        except DataError as error:
            found[path] = str(error)
        _remove(path)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    for path, kind in planted.items():
        if kind in _HARMLESS:
            assert found[path] == "101 images", kind
        else:
            named = path.name if kind != "no-such-class" else path.parent.name
            assert named in found[path], (kind, found[path])
            assert "\n" not in found[path]


def _train(root: Path, run_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = (
        f"digits --data.name folder --data.root {root} --data.pad 1 --epochs 1 --model.width 2 --attack.steps 1 "
        f"--evaluation.steps 1 --global-batch-size 50 --data.workers 1 --run-dir {run_dir}"
    ).split()
    return forked.run(TRAIN, *arguments, *flags)


def test_a_run_ends_by_a_files_name_and_skips_what_a_scan_listed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", 200)
    planted = plant(root)
    # refused before anything is read
    for path, kind in planted.items():
        if kind == "no-such-class":
            _remove(path.parent if path.parent.name not in ("train", "test") else path)
    ended = _train(root, tmp_path / "run", "--data.loader", "dali")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("train.py: error: ")
    assert ended.stderr.count("\n") == 1
    assert any(path.name in ended.stderr for path in planted), ended.stderr
    write_scan(root / "awp-scan.jsonl", scan_folder(root, workers=1))
    with pytest.raises(DataError, match="unusable files are listed"):
        bad_files(root, "refuse")
    assert _train(root, tmp_path / "run", "--data.loader", "dali").returncode == 2
    skipped = _train(root, tmp_path / "skipping", "--data.loader", "dali", "--data.bad-files", "skip")
    assert skipped.returncode == 0, skipped.stderr
