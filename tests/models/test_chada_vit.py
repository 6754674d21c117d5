"""ChAda-ViT: images with different numbers of channels in one batch."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL

from vitreous import VitreousError


def test_images_of_different_channels_do_not_disturb_each_other() -> None:
    model = SMALL["chada-vit"].make()
    one, four = torch.randn(1, 1, 64, 64), torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        both = model(torch.cat([one.transpose(0, 1), four.transpose(0, 1)]), list_num_channels=[[1, 4]])
        torch.testing.assert_close(both, torch.cat([model(one), model(four)]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(four.flip(1)), model(four), atol=1e-5)  # channels are told apart


def test_what_does_not_add_up_is_said() -> None:
    model = SMALL["chada-vit"].make()
    with pytest.raises(VitreousError, match=r"list_num_channels \[1, 2\]"):
        model(torch.zeros(4, 1, 64, 64), list_num_channels=[[1, 2]])
    with pytest.raises(VitreousError, match="11 channels"):
        model(torch.zeros(1, 11, 64, 64))
