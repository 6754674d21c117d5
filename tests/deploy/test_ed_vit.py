"""ED-ViT: pruning by divergence, assignment, fusion, and parts that run in processes of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import command, small_vit
from torch import Tensor, nn

import vitreous as vt
from vitreous.blocks import plain_blocks
from vitreous.data import Data, open_data
from vitreous.deploy import Apart, assigned, class_sets, ed_vit, open_split, save_split
from vitreous.deploy.ed_vit import size_of
from vitreous.prune import Divergence
from vitreous.prune.divergence import divergences
from vitreous.steps import history_of


def tiny() -> nn.Module:
    return small_vit(depth=2, embed_dim=24)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    for i in range(42):
        home = tmp_path / "photos" / "abcdefg"[i % 7]
        home.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i % 7).integers(0, 255, (4, 4, 3), np.uint8)
        Image.fromarray(noise).resize((32, 32)).save(home / f"{i}.png")
    return open_data(tmp_path / "photos", tiny())


def test_divergence_of_each_unit_is_about_what_removing_it_costs(images: Tensor) -> None:
    """Ranked as by KL(softmax(full) ‖ softmax(without)), one unit at a time."""
    net = small_vit(depth=2)
    found = divergences(small_vit(depth=2), images, "test")
    blocks = plain_blocks(net, "test")
    with torch.no_grad():
        whole = F.log_softmax(net(images), 1)
        exact, guessed = [], []
        for i, block in enumerate(blocks):
            column = block.attn.proj.weight
            for h in range(3):
                kept = column.clone()
                column[:, 16 * h : 16 * (h + 1)] = 0
                out = F.log_softmax(net(images), 1)
                column.copy_(kept)
                exact.append(float(F.kl_div(out, whole, reduction="batchmean", log_target=True)))
                guessed.append(float(found["heads"][i][h]))
    assert np.corrcoef(np.argsort(np.argsort(exact)), np.argsort(np.argsort(guessed)))[0, 1] > 0.6


def test_pruned_for_the_images_that_are_given(images: Tensor) -> None:
    """What is left depends on them, is equal in all blocks, and is gone from the weights."""
    net = small_vit()
    one, two = (Divergence(keep=0.5).apply(net, x) for x in (images[:2], images[4:]))
    plans = [history_of(m).done[0][1] for m in (one, two)]
    assert plans[0]["mlp"] != plans[1]["mlp"]
    assert one.embed_dim == 24 and {b.attn.num_heads for b in one.blocks} == {2}
    assert {b.mlp.fc1.out_features for b in one.blocks} == {96}
    assert sum(p.numel() for p in one.parameters()) < 0.5 * sum(p.numel() for p in net.parameters())
    features = small_vit(num_classes=0)
    with pytest.raises(vt.VitreousError, match="gives features"):
        Divergence().apply(features, images)
    with pytest.raises(vt.VitreousError, match="keep must lie"):
        Divergence(keep=0.0)


def test_assigned() -> None:
    assert class_sets(10, 3) == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert assigned([2, 3, 5], [5, 5]) == [1, 1, 0], "the largest first, or it finds no room"
    assert assigned([5, 3, 2], [5, 5]) == [0, 1, 1] and assigned([5, 3, 3], [5, 5]) is None
    with pytest.raises(vt.VitreousError, match="cannot be split"):
        class_sets(3, 4)


def test_split_fits_the_devices_and_runs_apart(data: Data, tmp_path: Path) -> None:
    net = tiny()
    small = size_of(net) // 3
    whole, device = ed_vit(net, data, 2, memory=[small, small], keep=0.9, epochs=0, fusion_epochs=60)
    assert device in ([0, 1], [1, 0]) and all(size_of(p) <= small for p in whole.parts)
    assert whole.classes == [[0, 1, 2, 3], [4, 5, 6]]
    x = data.tensor(range(6))
    save_split(whole, device, tmp_path / "split")
    with torch.no_grad():
        wanted = whole(x)
        assert torch.equal(open_split(tmp_path / "split", base=net)(x), wanted)
    right = (whole(data.tensor(range(len(data)))).argmax(1).numpy() == data.labels).mean()
    assert right > 0.5, "the fusion tells the classes of all parts"
    with Apart(whole, start="fork") as devices:
        torch.testing.assert_close(devices(x), wanted)
        assert devices.received == 6 * 4 * sum(whole.widths) and devices.sent == 2 * (32 + x.nbytes)
        devices.processes[0].kill()
        devices.processes[0].join()
        with pytest.raises(vt.VitreousError, match="a device is gone"):
            devices(x)
    with pytest.raises(vt.VitreousError, match="fit no devices"):
        ed_vit(net, data, 2, memory=[100, 100], epochs=0)
    with pytest.raises(vt.VitreousError, match="no model split"):
        open_split(tmp_path)


def test_from_the_command_line(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vt.save(tiny(), tmp_path / "m.safetensors")
    monkeypatch.setattr("vitreous.deploy.Apart.__init__.__defaults__", ("fork",))
    how = ["split", "vit_tiny_patch16_224", "--num-classes", "7", "--img-size", "32", "--data", str(tmp_path / "photos")]
    how += [a for k, v in dict(patch_size=8, embed_dim=24, depth=1, num_heads=3).items() for a in ("--model-arg", f"{k}={v}")]
    how += ["--epochs", "0", "--fusion-epochs", "1", "--out", str(tmp_path / "split")]
    status, out, err = command(monkeypatch, capsys, *how)
    assert status == 0 and "part 1: classes 4, 5, 6" in out and "bytes an image" in out, err
    for words, said in (
        (["--memory", "x"], "--memory must be"),
        (["--parts", "8", "--overwrite"], "cannot be split"),
        ([], "not empty"),
    ):
        status, _, err = command(monkeypatch, capsys, *how, *words)
        assert status == 2 and said in err
