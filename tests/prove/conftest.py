import pytest
import timm
import torch

SHAPE = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SHAPE).eval()


@pytest.fixture
def other():
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", **SHAPE).eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(40, 3, 32, 32, generator=generator), torch.randint(5, (40,), generator=generator)


@pytest.fixture
def explain():
    """Heatmaps that depend on the model, cheap."""

    def norms(model, x):
        with torch.no_grad():
            return model.forward_features(x)[:, 1:].norm(dim=-1).reshape(-1, 4, 4)

    return norms


@pytest.fixture
def quick():
    return dict(batches=(1, 4), rounds=5, seed=0)
