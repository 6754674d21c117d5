import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from vitreous.errors import VitreousError
from vitreous.prove import Guess, Picture, prove, write_report
from vitreous.prove.drawing import overlay, survival, tokens_left

EVIL = "<script>alert(1)</script>\"'&"


class Seen(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.handlers, self.headings, self.styles, self.alts = [], [], [], [], [], []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "poster", "action")]
        if tag == "img":
            self.alts.append(dict(attrs).get("alt"))

    def handle_data(self, data):
        inside = self.tags[-1][0] if self.tags else ""
        if inside == "style":
            self.styles.append(data)
        elif inside != "script":
            self.text += data


@pytest.fixture
def proof(vit, other, images, explain, quick):
    x, y = images
    shaky = copy.deepcopy(other)
    proof = prove({"before": vit, EVIL: shaky, "shipped": lambda x: vit(x)}, (x, y), explain=explain, **quick)
    answers = proof[EVIL].answers
    answers.changed[:] = [c.__class__(c.index, EVIL, Guess(EVIL, 0.5), Guess("b", 0.4)) for c in answers.changed]
    answers.classes[:] = [c.__class__(EVIL, c.images, c.before, c.after, c.difference) for c in answers.classes]
    proof.skipped.append({"path": EVIL, "reason": EVIL})
    return proof


@pytest.fixture
def picture():
    grid = np.arange(16).reshape(4, 4)
    grid[0] = -1
    grid[3] = 12
    return Picture(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)),
        EVIL,
        label=EVIL,
        before=Guess(EVIL, 0.9),
        after=Guess("b", 0.6),
        attention_before=np.eye(4),
        attention_after=np.eye(4)[::-1],
        survival=[(EVIL, grid)],
    )


def test_report_is_self_contained_and_escaped(proof, picture, tmp_path):
    path = tmp_path / "report.html"
    write_report(proof, path, title=EVIL, recipe=[EVIL], pictures=[picture], notes=[EVIL])
    text = path.read_text("utf-8")
    seen = Seen(text)
    assert seen.loads and all(v.startswith("data:image/png;base64,") for v in seen.loads)
    assert not re.search(r"url\(|@import", "".join(seen.styles))
    assert not seen.handlers and not any(tag in ("link", "iframe", "object") for tag, _ in seen.tags)
    scripts = [attrs for tag, attrs in seen.tags if tag == "script"]
    assert sum(attrs.get("type") == "application/json" for attrs in scripts) == 2
    assert sum("nonce" in attrs for attrs in scripts) == 2 and len(scripts) == 4
    policy = next(a["content"] for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy
    assert "<script>alert" not in text
    assert EVIL in seen.text  # it is shown, as text
    assert all(seen.alts)
    assert list(tmp_path.iterdir()) == [path]


def test_every_section_is_there(proof, picture, tmp_path):
    write_report(proof, tmp_path / "r.html", title="t", recipe=["EViT(keep=0.7)"], pictures=[picture])
    seen = Seen((tmp_path / "r.html").read_text("utf-8"))
    for heading in (
        "All figures", "Latency", "Damage by class", "Images whose prediction changed", "Attention before and after",
        "Token survival", "Recipe", "Machine and versions", "Skipped files",
    ):  # fmt: skip
        assert heading in seen.text, heading
    assert "now wrong" in seen.text
    assert "100.0 % moved" in seen.text  # the two diagonals share no patch
    assert "9 of 16 tokens" in seen.text
    assert [tag for tag, _ in seen.tags].count("h1") == 1
    d = proof[EVIL].answers.difference
    assert f"{abs(d.low) * 100:.1f}" in seen.text and f"{abs(d.high) * 100:.1f}" in seen.text


def test_empty_sections_are_left_out(vit, images, explain, tmp_path, quick):
    vit.simulated = True
    proof = prove({"a": vit}, (images[0], None), explain=explain, **quick)
    write_report(proof, tmp_path / "r.html", title="t")
    text = (tmp_path / "r.html").read_text("utf-8")
    for heading in ("Latency</h2>", "Damage", "prediction changed", "Token survival", "Recipe", "Skipped"):
        assert heading not in text
    assert len(text) < 50_000  # no plotting library without a plot


def test_report_that_cannot_be_written(proof, tmp_path):
    with pytest.raises(VitreousError, match="cannot write"):
        write_report(proof, tmp_path / "no" / "r.html", title="t")


def test_survival_darkens_dropped_and_joins_merged():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    groups = np.array([[-1, 0], [1, 1]])
    drawn = np.asarray(survival(image, groups))
    half = drawn.shape[0] // 2
    big = np.asarray(image.resize(drawn.shape[:2], Image.Resampling.NEAREST))
    assert drawn.shape[2] == 3, "no see-through patches: on a light page they would be lighter than the picture"
    assert (drawn[:half, :half] <= big[:half, :half].max(2, keepdims=True) // 3).all()
    assert (drawn[:half, :half, 0] == drawn[:half, :half, 1]).all()
    assert (drawn[: half - 1, half + 1 :] == big[: half - 1, half + 1 :]).all()  # a token of its own keeps its pixels
    inner = drawn[half + 4 : -4, 4:-4].astype(float)
    assert inner.std() < 0.5 * big[half + 4 : -4, 4:-4].std()
    assert len(np.unique(drawn[-1], axis=0)) == 1  # one outline, one colour
    assert tokens_left(groups) == 2


def test_dropped_patches_of_a_black_picture_are_no_lighter_and_still_to_be_seen():
    drawn = np.asarray(survival(Image.new("L", (32, 32)), np.array([[-1, 0]]))).astype(int).sum(2)
    half = drawn.shape[1] // 2
    assert (drawn[:, :half] == 0).all() and (drawn[2:-2, half + 2 :] == 0).all()
    assert (drawn[:, half] > 300).all(), "the border between them"


def test_what_was_tried_comes_last_and_many_pictures_are_folded(proof, picture, tmp_path):
    said = dict(notes=["a caution"], log=["EViT left out"], facts={"images": "3 to calibrate"})
    write_report(proof, tmp_path / "r.html", title="t", recipe=["ToMe(r=8)"], pictures=[picture] * 8, **said)
    text = (tmp_path / "r.html").read_text("utf-8")
    assert text.index("a caution") < text.index("All figures") < text.index("EViT left out")
    assert text.count("5 more pictures") == 2 and "3 to calibrate" in Seen(text).text


def test_overlay_brightens_where_the_attention_is():
    image = Image.fromarray(np.full((28, 28), 90, np.uint8))
    drawn = np.asarray(overlay(image, np.array([[0.0, 1.0]]), (0.0, 1.0))).astype(float).mean(2)
    assert drawn[:, drawn.shape[1] // 2 :].mean() > 2 * drawn[:, : drawn.shape[1] // 2].mean()
    torch.testing.assert_close(drawn[:, 0], drawn[:, 1])
