"""k-NN, the linear layer, fine-tuning, and collapse, in Python and as a person calls them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning import pictures, vit
from PIL import Image
from support import GOLDENS, command

import vitreous as vt
from vitreous.learn.pretrain.probe import area_under_curve, collapsed, knn, linear, rank_me, spread

SMALL = [
    "vit_tiny_patch16_224", "--img-size", "16",
    *(w for a in ("patch_size=4", "embed_dim=24", "depth=2", "num_heads=3") for w in ("--model-arg", a)),
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes by colour."""
    home, g = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c, name in enumerate(("blue", "red")):
        (home / name).mkdir()
        for i in range(20):
            pixels = g.integers(0, 120, (16, 16, 3)) + 120 * np.eye(3, dtype=int)[2 - 2 * c]
            Image.fromarray(pixels.astype(np.uint8)).save(home / name / f"{i}.png")
    return home


def test_neighbours() -> None:
    held = np.load(GOLDENS / "semaim--knn.npz")
    r = np.random.default_rng(0)
    centres, y, truth = r.standard_normal((12, 24)), r.integers(0, 12, 600), r.integers(0, 12, 200)
    ours = [torch.from_numpy(centres[c] + 1.6 * r.standard_normal((len(c), 24))) for c in (y, truth)]
    for setting, theirs in zip(json.loads(bytes(held["info"]))["order"], held["top1_top5"], strict=True):
        k, temperature = setting[1:].split("_T")
        votes = knn(ours[0], torch.from_numpy(y), ours[1], 12, int(k), float(temperature))
        right = votes.topk(5, 1).indices == torch.from_numpy(truth)[:, None]
        assert 100 * right[:, 0].double().mean() == pytest.approx(theirs[0])
        if int(k) > 5:  # of fewer neighbours than classes many have no vote, and no order
            assert 100 * right.any(1).double().mean() == pytest.approx(theirs[1])


def test_area_under_the_curve() -> None:
    scores = torch.tensor([[0.9, 0.0], [0.4, 1.0], [0.5, 0.0], [0.5, 0.0]])
    labels = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0]])
    assert area_under_curve(scores, labels) == [0.875, None]  # 0.5 ties with 0.5: half


def test_rank_and_collapse() -> None:
    full = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    assert 7.5 < rank_me(full) <= 8.001 and spread(full) == pytest.approx(1, abs=0.02) and collapsed(full) is None
    assert rank_me(full[:, :3] @ full[:3]) < 3.1
    assert "same features" in (collapsed(torch.ones(50, 8) + 1e-4 * full[:50]) or "")
    assert "one direction" in (collapsed(full[:, :1] * full[:1] + 1e-6 * full) or "")


def test_linear_layer() -> None:
    x, y = pictures(64)
    flat = x.flatten(1)
    assert (linear(flat, y, flat, 4).argmax(1) == y).float().mean() > 0.95
    shares = F.one_hot(y, 4)
    assert area_under_curve(linear(flat, shares, flat, 4), shares)[0] > 0.95


def test_a_collapse_is_said() -> None:
    model, said = vit(patch_size=4, classes=0), []
    data = (pictures(32)[0], None)
    vt.pretrain(model, data, "SimMIM(cell=4)", epochs=2, batch=16, augment=None, say=said.append)
    assert not said
    torch.nn.init.zeros_(model.norm.weight)  # what leaves the encoder is its bias, whatever the picture
    torch.nn.init.ones_(model.norm.bias)
    vt.pretrain(model, data, "SimMIM(cell=4)", epochs=2, batch=16, augment=None, say=said.append)
    assert len(said) == 2 and "after 1 epochs the encoder has collapsed" in said[0]


def test_pretrain_and_probe(photos, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    words = ["pretrain", *SMALL, "--data", str(photos), "--method", "SimMIM(mask=0.5)", "--batch", "16", "--out", str(run)]
    status, out, err = command(monkeypatch, capsys, *words, "--epochs", "2")
    assert status == 0, err
    assert "last.safetensors" in out
    encoder = vt.load(run / "last.safetensors")
    assert encoder.num_classes == 0
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder(x), vt.load(run / "model.safetensors")(x))
    words = ["probe", str(run / "last.safetensors"), "--data", str(photos), "--protocol", "knn,linear,finetune", "--json"]
    status, out, err = command(monkeypatch, capsys, *words, "--epochs", "2", "--batch", "8")
    assert status == 0, err
    found = json.loads(out)
    assert {"knn", "linear", "finetune", "rankme", "spread"} <= found.keys() and found["linear"] > 0.8


def test_pictures_without_classes(photos, tmp_path, monkeypatch, capsys) -> None:
    words = ["pretrain", *SMALL, "--data", str(photos / "red"), "--method", "MAE(width=16, depth=1, heads=2)", "--epochs", "1"]
    status, _, err = command(monkeypatch, capsys, *words, "--batch", "10", "--out", str(tmp_path / "run"))
    assert status == 0, err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--method", "SimMIM(mask=0.99)"], "leave some"),
        (["--method", "SimMM()"], "did you mean"),
        (["--method", "MAE(mask=0.99)"], "must show some"),
        (["--method", "GMML(mask=1)"], "leaves nothing"),
        (["--method", "SelfPatch(k=9)"], "8 neighbours"),
        (["--method", "EVA(mask=0.4)", "--teacher", "vit_tiny_patch16_224"], r"(14, 14) patches and the student (4, 4)"),
        (["--method", "SimMIM()", "--model-arg", "in_chans=4"], "takes images of 4 channels"),
        (["--method", "SimMIM()", "--img-size", "18"], "do not divide: open it with img_size=16 or 20"),
        (["--method", "MaskAndMatch()", "--img-size", "18"], "do not divide"),
    ],
)
def test_refusals(words, match, photos, tmp_path, monkeypatch, capsys) -> None:
    status, _, err = command(
        monkeypatch, capsys, "pretrain", *SMALL, "--data", str(photos), "--batch", "8", "--epochs", "1",
        "--out", str(tmp_path / "run"), *words,
    )  # fmt: skip
    assert status == 2 and match in err and not (tmp_path / "run").exists()


def test_pyramids_and_pictures_of_one_colour(tmp_path, monkeypatch, capsys) -> None:
    home = tmp_path / "pictures"
    home.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (9 * i, 30, 20)).save(home / f"{i}.png")
    words = ["--data", str(home), "--batch", "4", "--epochs", "1"]
    small = ("embed_dim=12", "depths=(1,1)", "num_heads=(1,2)", "window_size=2")
    swin = ["swin_tiny_patch4_window7_224", "--img-size", "32", *(w for a in small for w in ("--model-arg", a))]
    words += ["--optimiser", "AdamW(lr=0.1)"]
    run = tmp_path / "a"
    status, _, err = command(monkeypatch, capsys, "pretrain", *swin, *words, "--method", "SimMIM(cell=8)", "--out", str(run))
    assert status == 0, err
    first, last = (vt.load(run / f"{name}.safetensors").patch_embed.proj.weight for name in ("first", "last"))
    assert not torch.equal(first, last)
    status, _, err = command(
        monkeypatch, capsys, "pretrain", *swin, *words, "--method", "SimMIM()", "--out", str(tmp_path / "b"), "--img-size", "36"
    )
    assert status == 2 and "img_size=32 or 40" in err  # patches of 4 divide it, the tokens of the last stage do not
    method = "MAE(width=16, depth=1, heads=2)"
    status, _, err = command(monkeypatch, capsys, "pretrain", *SMALL, *words, "--method", method, "--out", str(tmp_path / "c"))
    assert status == 0 and "nan" not in (tmp_path / "c" / "log.csv").read_text(), err


def test_unknown_protocol(photos, monkeypatch, capsys) -> None:
    status, _, err = command(monkeypatch, capsys, "probe", *SMALL, "--data", str(photos), "--protocol", "kn")
    assert status == 2 and "knn" in err


@pytest.mark.parametrize("method", ["SimMIM(mask=0.5)", "MAE(width=16, depth=1, heads=2)", "GMML(align=4)", "SemAIM()"])
def test_reconstructions_are_seen(method, photos, tmp_path, monkeypatch, capsys) -> None:
    run, picture = tmp_path / "run", tmp_path / "p.png"
    Image.open(photos / "red" / "0.png").save(picture)
    words = ["pretrain", *SMALL, "--data", str(photos), "--method", method, "--batch", "16", "--out", str(run), "--epochs", "1"]
    status, _, err = command(monkeypatch, capsys, *words, "--augment", "shift")
    if method.startswith("GMML"):  # rectangles of 4 pixels and more have no room in 16
        assert status == 2 and "do not fit" in err
        return
    assert status == 0, err
    status, out, err = command(monkeypatch, capsys, "see", str(picture), str(run), "--reconstruct")
    assert status == 0, err
    drawn = Image.open(tmp_path / "p.reconstructed.png")
    assert "reconstructed written" in out and drawn.width > 4.9 * drawn.height and "attention before" in out
    first = vt.load(run / "first.safetensors")  # as it was drawn from its seed
    assert not torch.equal(first.norm.bias, vt.load(run / "last.safetensors").norm.bias) and not first.norm.bias.any()
    status, _, err = command(monkeypatch, capsys, "see", str(picture), str(tmp_path), "--reconstruct", "--overwrite")
    assert status == 2 and "holds no run" in err


def test_several_labels_a_picture() -> None:
    x, y = pictures(32)
    shares = torch.cat([F.one_hot(y, 4), torch.ones(32, 1, dtype=torch.long)], 1)
    found = vt.probe(
        vit(patch_size=8, classes=0), (x, shares), (x, shares), ("knn", "linear", "finetune"), epochs=1, batch=16, augment=None
    )
    assert found["linear_auc_0"] > 0.9 and "linear_auc_4" not in found and "knn" not in found and "finetune_auc" in found


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(8, 4, 16, 16), "takes 3 channels and the pictures have 4"),
        (torch.zeros(8, 3, 18, 16), "do not divide"),
        (torch.zeros(8, 3, 32, 32), "takes pictures of 16 × 16"),
    ],
)
def test_inputs_that_do_not_fit(images, match) -> None:
    with pytest.raises(vt.VitreousError, match=match):
        vt.pretrain(vit(patch_size=4, classes=0), (images, None), "SimMIM()", epochs=1, batch=8)
