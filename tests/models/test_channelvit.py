"""ChannelViT: channels as tokens, and hierarchical channel sampling."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL

from vitreous import VitreousError
from vitreous.models.channelvit import sample_channels


def test_a_channel_is_known_by_its_embedding_not_by_its_place() -> None:
    model = SMALL["channelvit"].make(num_classes=0)
    x = SMALL["channelvit"].images()
    with torch.no_grad():
        some = model(x[:, [2, 0]], channels=[2, 0])
        torch.testing.assert_close(model(x[:, [0, 2]], channels=[0, 2]), some)
        assert not torch.allclose(model(x[:, [2, 0]], channels=[0, 2]), some, atol=1e-4)
        assert model.forward_features(x).shape[1] == 1 + 3 * 16
    with pytest.raises(VitreousError, match="knows 3 channels"):
        model(x[:, :2])


def test_every_number_of_channels_is_as_likely() -> None:
    torch.manual_seed(0)
    samples = [sample_channels(4).tolist() for _ in range(2000)]
    assert all(len(set(s)) == len(s) for s in samples)
    for n in (1, 2, 3, 4):
        assert abs(sum(len(s) == n for s in samples) - 500) < 100
    assert {s[0] for s in samples if len(s) == 1} == {0, 1, 2, 3}


def test_sampling_is_for_training() -> None:
    torch.manual_seed(0)
    model = SMALL["channelvit"].make(hcs=True).train()
    x = SMALL["channelvit"].images()
    lengths = {model.forward_features(x).shape[1] for _ in range(30)}
    assert lengths == {1 + 16, 1 + 32, 1 + 48}
    assert {model.eval().forward_features(x).shape[1] for _ in range(5)} == {1 + 48}
