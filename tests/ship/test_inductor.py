"""AOTInductor packages: what is handed to the compiler, and what is refused. The compiler itself takes too long for a test."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import small_vit
from torch import nn

import vitreous as vt
from vitreous.errors import VitreousError
from vitreous.ship.inductor import SHAPES, load_inductor, ship_inductor

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_package_computes_in_its_precision_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch._inductor, "aoti_compile_and_package", lambda program, package_path: torch.export.save(program, package_path)
    )
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path, **_: torch.export.load(path).module())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    parity = ship_inductor(model, tmp_path / "m.pt2", X, dtype=torch.bfloat16)
    assert 1e-4 < parity.mean < 1e-2 and model[1].weight.dtype == torch.float32
    out = load_inductor(tmp_path / "m.pt2")(X[:3])
    assert out.dtype == torch.float32 and out.shape == (3, 5)
    assert ship_inductor(model, tmp_path / "f.pt2", X, dtype=torch.float32).mean < 1e-6
    with pytest.raises(VitreousError, match="not shipped"):
        ship_inductor(model, tmp_path / "n.pt2", X, tolerance=1e-6)
    with pytest.raises(VitreousError, match="exists"):
        ship_inductor(model, tmp_path / "m.pt2", X)
    with pytest.raises(VitreousError, match=r"\.pt2"):
        ship_inductor(model, tmp_path / "m.so", X)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.pt2", "m.pt2"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
def test_what_is_recorded_on_a_gpu_is_what_is_launched(tmp_path: Path) -> None:
    model = vt.slim(small_vit(), vt.tokens.ToMe(r=2)).cuda()
    x = torch.randn(SHAPES + 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()
    ship_inductor(model, tmp_path / "m.pt2", x[:4], dtype=torch.float32)
    recorded, launched = load_inductor(tmp_path / "m.pt2"), load_inductor(tmp_path / "m.pt2", graphs=False)
    with torch.no_grad():
        first = recorded(x[:1])
        for n in [*range(1, len(x) + 1), 1]:  # more sizes than are held, and one that was let go
            assert torch.allclose(recorded(x[:n]), launched(x[:n]), atol=1e-5)
            assert torch.allclose(recorded(x[-n:]), model(x[-n:]), atol=1e-4)
        assert torch.allclose(first, model(x[:1]), atol=1e-4)  # an answer stays when others are computed
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(recorded, [x[i : i + 1] for i in range(len(x))] * 4))
        assert torch.allclose(torch.cat(answers), model(x).repeat(4, 1), atol=1e-4)
