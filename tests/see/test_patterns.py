"""Pattern classes of heads whose kind is known by construction; the autoencoder and its clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_heads import known_heads
from support import small_vit
from torch import Tensor

from vitreous import see
from vitreous.errors import VitreousError
from vitreous.prune import Heads
from vitreous.see.patterns import _label, _measures, _summary
from vitreous.steps import slim
from vitreous.tokens import EViT

KNOWN = [("self", "left", "global"), ("sink", "content", "local"), ("ring", "up", "down right"), ("corner", "right", "down")]
EXPECTED = [
    ["self", "neighbour: left", "global"],
    ["sink", "content", "local"],
    ["ring", "neighbour: up", "neighbour: down right"],
    ["sink", "neighbour: right", "neighbour: down"],
]


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def found(pictures: Tensor) -> see.Patterns:
    return see.patterns(known_heads(KNOWN), pictures, clusters=9, batch=10)


def test_heads_of_known_kinds_get_their_names(found: see.Patterns) -> None:
    assert found.labels.tolist() == EXPECTED
    assert found.shares["sink"] == pytest.approx(2 / 12) and sum(found.shares.values()) == pytest.approx(1)


def test_the_names_follow_the_attention_and_not_the_layer(pictures: Tensor) -> None:
    swapped = see.patterns(known_heads([("content", "self", "up"), ("global", "ring", "sink")]), pictures)
    assert swapped.labels.tolist() == [["content", "self", "neighbour: up"], ["global", "ring", "sink"]]


def test_content_is_what_images_change(pictures: Tensor) -> None:
    """The same head on one image many times over depends on the place alone."""
    model = known_heads([("content", "left", "global")])
    varied, same = see.patterns(model, pictures), see.patterns(model, pictures[:1].repeat(24, 1, 1, 1))
    assert varied.measures["content"][0, 0] > 0.9 > 0.1 > same.measures["content"][0, 0]
    assert varied.measures["content"][0, 1] < 0.5
    assert same.labels[0, 0] == "sink", "then one patch receives everything"
    assert np.isnan(see.patterns(model, pictures[:1]).measures["content"]).all(), "one image says nothing of it"


def test_offsets_are_means_over_the_queries_that_have_one_there(found: see.Patterns) -> None:
    offsets = found.offsets[0]
    assert offsets.shape == (3, 7, 7)
    assert offsets[0, 3, 3] > 0.95 and offsets[1, 3, 2] > 0.95, "self, and left even though the first column has no left"
    np.testing.assert_allclose(offsets[2], 1 / 16, rtol=0.05)


def test_codes_bring_equal_heads_together(found: see.Patterns, pictures: Tensor) -> None:
    assert found.error < 0.2
    assert found.latent.shape == (4, 3, 8) and found.at.shape == (4, 3, 2)
    spread = np.linalg.eigvalsh(np.cov(found.latent.reshape(12, 8).T, bias=True))
    np.testing.assert_allclose(found.at.reshape(12, 2).var(0), spread[:-3:-1], rtol=1e-6, err_msg="two principal components")
    twice = see.patterns(known_heads([("left", "self", "content"), ("left", "self", "global")]), pictures, clusters=4)
    np.testing.assert_array_equal(twice.clusters[0, :2], twice.clusters[1, :2])
    assert len(set(twice.clusters.ravel().tolist())) == 4
    np.testing.assert_allclose(twice.at[0, :2], twice.at[1, :2], atol=1e-5)


def test_the_same_seed_gives_the_same_codes_and_disturbs_no_other_randomness(pictures: Tensor) -> None:
    model = small_vit(depth=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = see.patterns(model, pictures)
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(one.latent, see.patterns(model, pictures).latent)
    assert not np.array_equal(one.latent, see.patterns(model, pictures, seed=1).latent)


def test_measures_do_not_depend_on_batches(pictures: Tensor) -> None:
    model = small_vit(depth=2)
    whole, parts = see.patterns(model, pictures), see.patterns(model, pictures, batch=5)
    for name, values in whole.measures.items():
        np.testing.assert_allclose(parts.measures[name], values, rtol=1e-3, err_msg=name)


def test_slimmed_models_and_pruned_heads(pictures: Tensor) -> None:
    model = known_heads([("left", "self", "global"), ("left", "self", "global")])
    small = slim(model, EViT(keep=0.5, at=(0,)))
    assert see.patterns(small, pictures).labels[0].tolist() == ["neighbour: left", "self", "global"]
    pruned = slim(small_vit(), Heads(share=0.34), pictures)
    found = see.patterns(pruned, pictures)
    left = [len(pruned.get_submodule(n).proj.weight[0]) // 16 for n in found.layers]
    assert [int((row > 0).sum()) for row in found.clusters] == left and sum(left) == 8
    assert np.isnan(found.at[found.clusters == 0]).all() and (found.labels[found.clusters == 0] == "").all()
    assert len(found.rows()) == 8 and all(r["pattern"] for r in found.rows())


def test_refusals(pictures: Tensor) -> None:
    with pytest.raises(VitreousError, match="clusters must be at least 1"):
        see.patterns(small_vit(), pictures, clusters=0)
    with pytest.raises(VitreousError, match="tensor"):
        see.patterns(small_vit(), pictures[0])


def test_what_a_uniform_head_has_by_itself_is_no_pattern() -> None:
    """On 3 × 3 patches 49 of 81 pairs lie within a hop and 40 at one: enough for "local" and "ring", were it not for chance."""
    patches, images, (h, w) = 9, 2.0, (3, 3)
    among = torch.full((1, 1, patches, patches), images / patches)
    told = images * torch.tensor([0.0, float(np.log(patches)), 1 / patches, 1.0])  # prefix, entropy, squares, and how many asked
    total = torch.cat([among, told.expand(1, 1, patches, 4)], -1).double()
    offsets = torch.full((1, 1, 2 * h - 1, 2 * w - 1), 1 / patches)
    found = {name: float(v[0, 0]) for name, v in _measures(total, torch.arange(patches), (h, w), offsets).items()}
    assert (found["near"], found["near_over_uniform"], found["ring"]) == (pytest.approx(49 / 81), pytest.approx(1), 0)
    assert _label(found, offsets[0, 0].numpy(), (h, w)) == "global"


def test_what_images_change_is_told_without_bias() -> None:
    """Of two patches the first pays [1, 0] in one image and [0.8, 0.2] in the other, the second [0.5, 0.5] in both."""
    images = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.8, 0.2], [0.5, 0.5]]]).double()
    told = torch.stack([torch.zeros(2, 2), torch.special.entr(images).sum(-1), images.square().sum(-1), torch.ones(2, 2)], -1)
    total = torch.cat([images, told], -1).sum(0)[None, None]
    found = _measures(total, torch.arange(2), (1, 2), torch.zeros(1, 1, 1, 3))
    # The unbiased variance of the first row is 0.02 + 0.02, and the mean of two images strays from the place's map by half of it.
    changed, placed = 0.04, 0.4**2 + 0.4**2 - 0.04 / 2
    assert found["content"][0, 0] == pytest.approx(changed / (changed + placed))


def test_the_autoencoder_sees_roots_of_shares() -> None:
    """Two patches that pay themselves 0.36 and each other 0.64, and a tenth of all to the prefix."""
    among, told = torch.tensor([[0.36, 0.64], [0.64, 0.36]]), torch.tensor([0.1, 0.0, 0.0, 1.0]).expand(2, 4)
    offsets, features = _summary(torch.cat([among, told], -1).double()[None, None], torch.arange(2), (1, 2))
    assert offsets[0, 0].tolist() == [pytest.approx([0.64, 0.36, 0.64])]
    np.testing.assert_allclose(features[0, 0].square(), [0.32, 0.36, 0.32, 0.5, 0.5, 0.1], rtol=1e-6)
