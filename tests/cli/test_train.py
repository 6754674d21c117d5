"""`vitreous train` and `vitreous merge`, as a person calls them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vitreous as vt
from vitreous import cli

SMALL = [
    "vit_tiny_patch16_224", "--img-size", "16",
    *(w for a in ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3") for w in ("--model-arg", a)),
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes by colour; one file is broken."""
    home, g = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c, name in enumerate(("blue", "green", "red")):
        (home / name).mkdir()
        for i in range(20):
            pixels = g.integers(0, 120, (16, 16, 3)) + 120 * np.eye(3, dtype=int)[2 - c]
            Image.fromarray(pixels.astype(np.uint8)).save(home / name / f"{i}.png")
    (home / "red" / "broken.png").write_bytes(b"no picture")
    return home


def vitreous(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["vitreous", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


def test_train_twice_and_merge(photos, tmp_path, monkeypatch, capsys):
    runs = []
    for seed in (1, 2):
        runs.append(tmp_path / f"run{seed}")
        words = ["train", *SMALL, "--data", photos, "--batch", 16, "--epochs", 6, "--augment", "shift", "--out", runs[-1]]
        status, out, err = vitreous(monkeypatch, capsys, *words, "--optimiser", "AdamW(lr=3e-3)", "--seed", seed)
        assert status == 0, err
        assert "12 images right" in out and "1 files skipped" in err and "broken.png" in err
    made = {p.name for p in runs[0].iterdir()}
    assert {"best.safetensors", "last.pt", "log.csv", "model.safetensors", "report.html", "run.json"} <= made
    taught = vt.load(runs[0] / "model.safetensors")
    assert taught.num_classes == 3
    data = vt.data.open_data(photos, taught)
    assert data.classes == ("blue", "green", "red")
    right = np.mean([int(taught(x).argmax(1)[0]) == int(y[0]) for x, y in data.batches(1)])
    assert right > 0.8
    soup = tmp_path / "soup.safetensors"
    files = [r / "model.safetensors" for r in runs]
    status, out, err = vitreous(monkeypatch, capsys, "merge", *files, "--data", photos, "--out", soup)
    assert status == 0, err
    assert "kept" in out and "soup.safetensors:" in out
    assert vt.load(soup).num_classes == 3
    for words, said in (
        (["merge", *files, "--rule", "Blend()", "--out", tmp_path / "x.safetensors"], "unknown rule 'Blend'"),
        (["merge", *files, "--rule", "OPCM()", "--data", photos, "--out", tmp_path / "x.safetensors"], "give base="),
        (["merge", *files, "--data", photos, "--out", soup], "exists"),
        (["train", files[0], "--data", photos, "--batch", 16, "--seed", 9, "--out", runs[0]], "holds a run with other"),
    ):
        status, _, err = vitreous(monkeypatch, capsys, *words)
        assert status == 2 and said in err.replace("\n", " "), err


def saved(home, name, **arguments):
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3} | arguments
    vt.save(vt.open("vit_tiny_patch16_224", **size), home / f"{name}.safetensors")
    return home / f"{name}.safetensors"


RULES = [*(f"{name}()" for name in vt.learn.merging.RULES if name != "LearnedSoup"), "LearnedSoup(steps=2)", "PLeaS(ratio=0.5)"]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_merges_from_the_command_line(rule, photos, tmp_path, monkeypatch, capsys):
    files = []
    for i in range(3 if rule == "OPCM()" else 2):
        torch.manual_seed(i)
        files.append(saved(tmp_path, f"model{i}"))
    base = ["--base", files.pop()] if rule == "OPCM()" else []
    made = tmp_path / "soup.safetensors"
    status, out, err = vitreous(monkeypatch, capsys, "merge", *files, *base, "--rule", rule, "--data", photos, "--out", made)
    assert status == 0 and "soup.safetensors:" in out, err
    a, b, soup = (vt.load(f) for f in (*files, made))
    x = vt.data.open_data(photos, a).tensor(range(2))
    assert soup(x).shape == (2, 3) and not torch.allclose(soup(x), a(x))  # of PLeaS in another order, so not compared by name
    if rule == "UniformSoup()":
        assert torch.allclose(soup.head.weight, (a.head.weight + b.head.weight) / 2)
    if "ratio" in rule:
        assert soup.blocks[0].mlp.fc1.out_features == 144  # 96, of which a half twice


def test_a_soup_of_batch_norms_counts_them_anew(photos, tmp_path, monkeypatch, capsys):
    for i in range(2):
        torch.manual_seed(i)
        vt.save(vt.open("test_resnet", num_classes=3), tmp_path / f"{i}.safetensors")
    files, made = [tmp_path / f"{i}.safetensors" for i in range(2)], tmp_path / "soup.safetensors"
    words = ["merge", *files, "--rule", "UniformSoup()", "--data", photos, "--out", made]
    status, _, err = vitreous(monkeypatch, capsys, *words)
    assert status == 0, err
    assert float(vt.load(made).bn1.running_mean.abs().max()) > 0  # 0 in both: their mean is not what the soup sees


def test_train_on_shards_with_curves_for_tensorboard(photos, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from webdataset.writer import ShardWriter

    with ShardWriter(str(tmp_path / "shards-%04d.tar"), maxcount=20, verbose=0) as sink:
        for i, path in enumerate(sorted(photos.glob("*/*.png"))):
            sink.write({"__key__": f"{i:04d}", "png": path.read_bytes(), "cls": path.parent.name})
    words = ["--data", tmp_path / "shards-{0000..0003}.tar", "--batch", 16, "--epochs", 2, "--augment", "none"]
    status, out, err = vitreous(monkeypatch, capsys, "train", *SMALL, *words, "--tensorboard", "--out", tmp_path / "run")
    assert status == 0 and "images right" in out, err
    assert "1 files skipped" in err and "shards-0003.tar/" in err  # the broken one is named by its shard
    assert vt.load(tmp_path / "run" / "model.safetensors").num_classes == 3
    told = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    told.Reload()
    assert [e.step for e in told.Scalars("loss")] == [0, 1] and len(told.Scalars("accuracy")) == 2
    curves = (tmp_path / "run" / "report.html").read_text()
    assert "train_accuracy" in curves and "plotly" in curves


def test_models_that_do_not_go_together(photos, tmp_path, monkeypatch, capsys):
    """A teacher of other classes, merging of other shapes, another base, an objective for another architecture."""
    three, five, deep = (
        saved(tmp_path, n, **a) for n, a in (("three", {}), ("five", {"num_classes": 5}), ("deep", {"depth": 3}))
    )
    data, out = ["--data", photos], ["--out", tmp_path / "made"]
    for words, said in (
        (["train", three, "--teacher", five, "--batch", 16, *data, *out], "give a teacher of the same classes"),
        (["train", three, "--teacher", deep, "--objective", "FRD()", "--batch", 16, *data, *out], "TokenSlimming first"),
        (["train", three, "--teacher", five, "--objective", "DeiTLT()", "--batch", 16, *data, *out], "distillation token"),
        (["train", five, "--objective", "NKD()", "--batch", 16, *data, *out], "NKD needs a teacher"),
        (["merge", three, five, *data, *out], "model 2 differs from the first at 'head."),
        (["merge", three, deep, *data, *out], "model 2 differs from the first at 'blocks.2"),
        (["merge", three, three, "--rule", "OPCM()", "--base", five, *data, *out], "the base differs from the first at 'head."),
        (["merge", three, *data, *out], "nothing to merge"),
        (["merge", three, three, three, "--rule", "PLeaS()", *data, *out], "two models"),
        (["merge", three, three, "--rule", "PLeaS(ratio=2)", *data, *out], "ratio"),
        (["merge", three, tmp_path / "absent.safetensors", *data, *out], "absent.safetensors"),
    ):
        status, _, err = vitreous(monkeypatch, capsys, *words)
        assert status == 2 and said in " ".join(err.split()) and "not foreseen" not in err, err
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective", "NKX()"], "unknown objective 'NKX'"),
        (["--objective", "NKD()"], "needs a teacher"),
        (["--optimiser", "AdamW(lr=-1)"], "lr must be above 0"),
        (["--batch", "600"], "fewer than a batch of 600"),
        (["--augment", "twirl"], "no augmentation 'twirl'"),
        (["--epochs", "inf"], "both must be above 0, and finite"),
        (["--teacher-checkpoint", "absent.pth"], "name it too"),
        (["--num-classes", "0"], "no classes to learn"),
        (["--optimiser", "SGD(lr=1e12)", "--augment", "none"], "not finite at step"),
        (["--teacher", "vit_tiny_patch16_224"], "cannot take the student's pictures of 3 × 16 × 16"),
        (["--objective", "TokenReductionConsistency()"], "needs a model that fuses tokens"),
        (["--objective", "CrossEntropy(smoothing=3)"], "smoothing must lie between 0 and 1"),
        (["--num-classes", "2"], "3 classes but the model only 2"),
        (["--checkpoint", "resnet.pt"], "do not fit VisionTransformer"),
        (["--precision", "17-mixed"], "cannot train with accelerator=cpu, precision=17-mixed"),
        (["--precision", "transformer-engine"], "precision=transformer-engine: it is one of 32-true"),
        (["--ema", "1"], "ema, the decay of the averaged weights"),
        (["--objective", "ScaleKD(names=('blocks.7',))", "--teacher", "vit_tiny_patch16_224"], "blocks.7"),
        (["--objective", "Connectivity()"], "needs a model with a predictor"),
        (["--objective", "KeepRate()"], "needs a model with EViT"),
        (["--objective", "EWA()"], "no objective has a loss"),
        (["--optimiser", "AdamW(lr=nan)"], "parameters must be plain values"),
        (["--data", "shards-{0..3}.tar"], "no shard shards-0.tar"),
        (["--data", "labels.csv"], "labels.csv: No such file"),
    ],
)
def test_bad_words(words, said, photos, tmp_path, monkeypatch, capsys):
    torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), tmp_path / "resnet.pt")
    monkeypatch.chdir(tmp_path)
    status, _, err = vitreous(
        monkeypatch, capsys, "train", *SMALL, "--data", photos, "--batch", 16, *words, "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()
    assert status == 2 and said in " ".join(err.split()) and "Traceback" not in err and "not foreseen" not in err


def test_adapters_train_from_the_command_line(photos, tmp_path, monkeypatch, capsys):
    words = ["train", *SMALL, "--data", photos, "--batch", 16, "--epochs", 1, "--augment", "none", "--out"]
    status, out, err = vitreous(monkeypatch, capsys, *words, tmp_path / "vpt", "--steps", "VPT(prompts=2)")
    assert status == 0 and "images right" in out, err
    taught = vt.load(tmp_path / "vpt" / "model.safetensors")
    assert taught.blocks[1].prompts.shape == (2, 24)
    steps = ["--steps", "VPT(prompts=2), Embed(dims=8)", "--objective", "SemanticProxies(classes=3)"]
    status, out, err = vitreous(monkeypatch, capsys, *words, tmp_path / "found", *steps)
    assert status == 0 and "find one of their class" in out, err
    status, _, err = vitreous(monkeypatch, capsys, *words, tmp_path / "no", "--steps", "VPT(prompts=0)")
    assert status == 2 and "prompts must lie in" in err


def test_labels_of_crops_and_a_partner(photos, tmp_path, monkeypatch, capsys):
    labels = tmp_path / "labels.safetensors"
    teach = ["label", *SMALL, "--num-classes", 3, "--data", photos, "--crops", 2, "--out", labels]
    status, out, err = vitreous(monkeypatch, capsys, *teach)
    assert status == 0, err
    assert "2 crops of each of 48 pictures" in out and "% kept" in out
    words = ["train", *SMALL, "--data", photos, "--batch", 16, "--epochs", 1]
    status, _, err = vitreous(monkeypatch, capsys, *words, "--augment", f"FerKD(labels='{labels}')", "--out", tmp_path / "a")
    assert status == 0, err
    status, _, err = vitreous(
        monkeypatch, capsys, *words, "--augment", f"FerKD(labels='{labels}')", "--seed", 5, "--out", tmp_path / "b"
    )
    assert status == 2 and "other pictures" in err
    status, _, err = vitreous(monkeypatch, capsys, *words, "--partner", "resnet18", "--out", tmp_path / "c")
    assert status == 0, err
    assert {"cnn.safetensors", "vit.safetensors"} <= {p.name for p in (tmp_path / "c").iterdir()}
    assert vt.load(tmp_path / "c" / "vit.safetensors").num_classes == 3
