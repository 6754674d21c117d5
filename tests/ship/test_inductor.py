"""AOTInductor packages: what is handed to the compiler, and what is refused. The compiler itself takes too long for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vitreous.errors import VitreousError
from vitreous.ship.inductor import load_inductor, ship_inductor

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
