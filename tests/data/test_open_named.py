from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, FashionMNIST

from vitreous.data import calibration, fashion, open_data, sets
from vitreous.data.fashion import CLASSES, fashion_arrays
from vitreous.errors import VitreousError


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 10
        self.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}


@pytest.fixture(autouse=True)
def no_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's own copies must not decide a test."""
    monkeypatch.setattr(fashion, "PLACES", (str(tmp_path / "cache/FashionMNIST/raw"),))
    monkeypatch.setattr(sets, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_fashion(raw: Path, gz: bool = False) -> dict[str, np.ndarray]:
    raw.mkdir(parents=True)
    made = {}
    for seed, (stem, n) in enumerate((("train", 30), ("t10k", 20))):
        made[stem] = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", made[stem]), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(d.to_bytes(4, "big") for d in array.shape)
            body = head + array.tobytes()
            (raw / f"{stem}-{name}-ubyte{'.gz' if gz else ''}").write_bytes(gzip.compress(body) if gz else body)
    return made


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A small CIFAR-10 in the official layout, with torchvision told its checksums."""
    home = root / CIFAR10.base_folder
    home.mkdir(parents=True)

    def write(name: str, content: object) -> str:
        (home / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((home / name).read_bytes()).hexdigest()

    made = {}
    for seed, (part, name) in enumerate((("train", "data_batch_1"), ("test", "test_batch"))):
        made[part] = np.random.default_rng(seed).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
        content = {"data": made[part].reshape(20, -1), "labels": [i % 10 for i in range(20)]}
        monkeypatch.setattr(CIFAR10, f"{part}_list", [[name, write(name, content)]])
    meta = {
        "filename": "batches.meta",
        "key": "label_names",
        "md5": write("batches.meta", {"label_names": list("abcdefghij")}),
    }
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return made


@pytest.mark.parametrize("gz", [False, True])
def test_fashion_mnist_from_a_local_copy(no_usual_places: Path, gz: bool) -> None:
    made = write_fashion(no_usual_places / "own", gz)
    data = open_data("fashion-mnist", root=no_usual_places / "own")
    assert data.classes == CLASSES and len(data) == 20
    assert (np.asarray(data.picture(7)) == made["t10k"][7]).all()
    x = calibration("fashion-mnist", n=30, root=no_usual_places / "own")
    values = {p.tobytes() for p in ((x[:, 0] * 0.3530 + 0.2860) * 255).round().to(torch.uint8).numpy()}
    assert values == {p.tobytes() for p in made["train"]}


def test_fashion_mnist_from_torchvisions_layout(no_usual_places: Path) -> None:
    write_fashion(no_usual_places / "own/FashionMNIST/raw")
    assert len(open_data("fashion-mnist", root=no_usual_places / "own")) == 20


def test_nothing_downloads_unasked(no_usual_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FashionMNIST, "download", lambda self: pytest.fail("downloaded"))
    monkeypatch.setattr(CIFAR10, "download", lambda self: pytest.fail("downloaded"))
    with pytest.raises(VitreousError, match="no copy of Fashion-MNIST"):
        open_data("fashion-mnist")
    with pytest.raises(VitreousError, match="no whole copy of CIFAR-10"):
        open_data("cifar10", Model())


def test_download_leaves_the_whole_set_or_nothing(no_usual_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = no_usual_places / "cache"

    def breaks(self: FashionMNIST) -> None:
        Path(self.raw_folder).mkdir(parents=True)
        Path(self.raw_folder, "train-images-idx3-ubyte").write_bytes(b"half")
        raise RuntimeError("the line went dead")

    monkeypatch.setattr(FashionMNIST, "download", breaks)
    with pytest.raises(VitreousError, match=r"could not download FashionMNIST.*the line went dead"):
        open_data("fashion-mnist", download=True)
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(FashionMNIST, "download", lambda self: write_fashion(Path(self.raw_folder)))
    assert len(open_data("fashion-mnist", download=True)) == 20
    assert [p.name for p in cache.iterdir()] == ["FashionMNIST"]
    monkeypatch.setattr(FashionMNIST, "download", breaks)
    assert len(open_data("fashion-mnist", download=True)) == 20  # from the copy now there


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x03\x00", b"\x1f\x8b broken", bytes([0, 0, 8, 1, 0, 0, 0, 9, 1])])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, ending: str) -> None:
    for name in ("images-idx3", "labels-idx1"):
        (tmp_path / f"t10k-{name}-ubyte{ending}").write_bytes(content)
    with pytest.raises(VitreousError, match=r"t10k-images-idx3-ubyte.*damaged"):
        fashion_arrays("test", tmp_path)


def test_cifar10_from_a_local_copy(no_usual_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_cifar(no_usual_places / "own", monkeypatch)
    data = open_data("cifar10", Model(), root=no_usual_places / "own")
    assert data.classes == tuple("abcdefghij") and data.labels.tolist() == [i % 10 for i in range(20)]
    assert torch.equal((data.tensor(range(20)) * 255).round().to(torch.uint8), torch.from_numpy(made["test"]))
    x = (calibration("cifar10", Model(), 20, root=no_usual_places / "own") * 255).round().to(torch.uint8)
    assert {p.numpy().tobytes() for p in x} == {p.tobytes() for p in made["train"]}
    assert open_data("cifar10", root=no_usual_places / "own", limit=1).tensor([0]).shape == (1, 1, 28, 28)


def test_a_changed_cifar10_file_is_never_unpickled(no_usual_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(no_usual_places / "own", monkeypatch)
    (no_usual_places / "own" / CIFAR10.base_folder / "test_batch").write_bytes(pickle.dumps(print))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(VitreousError, match="no whole copy of CIFAR-10"):
        open_data("cifar10", Model(), root=no_usual_places / "own")


def test_cifar10_download(no_usual_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "download", lambda self: write_cifar(Path(self.root), monkeypatch))
    assert len(open_data("cifar10", Model(), download=True)) == 20
    assert [p.name for p in (no_usual_places / "cache").iterdir()] == [CIFAR10.base_folder]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("fashion_mnist", "did you mean fashion-mnist"),
        ("CIFAR10", "did you mean cifar10"),
        ("zzz", "the data sets are sample, fashion-mnist, cifar10"),
        ("some/where", "some/where does not exist"),
        ("./sample", "./sample does not exist"),
        (Path("sample"), "sample does not exist"),
    ],
)
def test_what_is_neither_a_name_nor_a_folder(source: str | Path, message: str) -> None:
    for ask in (lambda: open_data(source), lambda: calibration(source, n=2)):
        with pytest.raises(VitreousError, match=message):
            ask()


def test_a_head_that_is_too_small_is_refused() -> None:
    model = Model()
    model.num_classes = 3
    with pytest.raises(VitreousError, match="10 classes but the model only 3 logits"):
        open_data("sample", model)
