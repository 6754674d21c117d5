"""Operators that ONNX lacks are taken apart one by one: the same graph as by torch's own way, without tracing all of it anew."""

from __future__ import annotations

import contextlib
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from vitreous.ship import export
from vitreous.ship.lowering import Lowering


class Composed(nn.Module):
    """Of what is taken apart: norms, layouts, a write in place, several outputs, another size, dropout; integers meet floats."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.rms = nn.RMSNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.interpolate(x, scale_factor=2.0)
        tokens = F.dropout(self.rms(x.flatten(2).mT), 0.5, self.training)
        a, b = tokens.unflatten(-1, (2, 4)).chunk(2, 2)
        return torch.rsub(a, 1.0).flatten(1), (b * torch.arange(4) + (b > 0)).mean(1)


class Writes(nn.Module):
    """Into a part of what is read again."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = 2 * x
        y[:, 0].add_(1)
        return (y.sum(1),)


def traced(model: nn.Module) -> tuple[ExportedProgram, Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    return export.trace(model.eval(), x[:2], dynamic=True), x, model(x)


def check(graph: onnx.ModelProto, x: Tensor, wanted: tuple[Tensor, ...]) -> None:
    """On a batch that was not the traced one."""
    answers = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"images": x.numpy()})
    for got, told in zip(answers, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), told)


def test_the_same_graph_without_tracing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x, wanted = traced(Composed())
    nodes = [str(node) for node in program.graph.nodes]
    run, computed = torch.fx.Interpreter.run_node, []
    monkeypatch.setattr(torch.fx.Interpreter, "run_node", lambda self, node: (computed.append(node), run(self, node))[1])
    with monkeypatch.context() as patch:
        patch.setattr(export, "Lowering", lambda program: program)
        patch.setattr(export, "shapes_known", contextlib.nullcontext)
        theirs = export.to_onnx(program, ("a", "b"))
    anew = len(computed)
    computed.clear()
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *_, **__: pytest.fail("traced anew"))
    ours = export.to_onnx(program, ("a", "b"))
    kinds = [Counter(node.op_type for node in graph.graph.node) for graph in (ours, theirs)]
    assert kinds[0] == kinds[1] and [str(node) for node in program.graph.nodes] == nodes, "the program stays as it was"
    assert len(computed) < 0.7 * anew, "shapes that are known are not computed"
    check(ours, x, wanted)


def test_what_writes_into_what_others_see_is_left_to_torch() -> None:
    program, x, wanted = traced(Writes())
    assert type(Lowering(program).run_decompositions()) is ExportedProgram
    check(export.to_onnx(program), x, wanted)
