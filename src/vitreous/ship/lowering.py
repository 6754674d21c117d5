"""From torch's operators to those that ONNX has, operator by operator."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import VitreousError

aten = torch.ops.aten
RESHAPING = (aten.flatten.using_ints, aten.unflatten.int, aten.reshape.default)
SAMPLING = (aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.vec)  # what no table of torch takes apart
Table = dict[Any, Callable[..., Any]]


class Lowering(ExportedProgram):
    """A program that is decomposed where it has to be, for `torch.onnx`, which asks for that by `run_decompositions`.

    torch's own traces the whole program anew, twice, for the sake of the few operators that the table names, which takes as long
    as the first trace did. Here each of these is replaced by what it is made of, and the rest stays as it is.
    """

    def __init__(self, program: ExportedProgram) -> None:
        vars(self).update(vars(program))
        self.whole = program
        # What is done to these stays in here: the program may be written as it is, too.
        self._graph_module, self._graph_signature = copy.deepcopy((program.graph_module, program.graph_signature))

    def run_decompositions(self, decomp_table: Table | None = None, **options: Any) -> ExportedProgram:
        try:
            self._replace_all(dict(torch.export.default_decompositions() if decomp_table is None else decomp_table))
        except Exception:  # whatever it was, torch's own way takes longer and knows more
            return self.whole.run_decompositions(decomp_table, **options)
        return self

    def _replace_all(self, table: Table) -> None:
        # Imported here, where other versions of torch may fail.
        from torch._dispatch.python import enable_python_dispatcher
        from torch._guards import detect_fake_mode

        for node in self.graph.nodes:
            _check(node)
        self.graph.eliminate_dead_code()
        mode = detect_fake_mode([node.meta.get("val") for node in self.graph.nodes])
        if mode is None:
            raise VitreousError("the program does not remember the shapes of what it computes")
        with torch.no_grad(), mode, enable_python_dispatcher():
            for node in [n for n in self.graph.nodes if n.target in table or _composite(n.target)]:
                self.graph_signature.replace_all_uses(node.name, _known(self.graph, node) or _replace(self.graph, node, table))
        self.graph_module.recompile()


@contextlib.contextmanager
def shapes_known() -> Iterator[None]:
    """`torch.onnx` computes all shapes of a program anew to find where types have to be promoted; here it reads those that the
    nodes remember."""
    try:
        from torch.onnx._internal.fx.passes import type_promotion as theirs

        interpreter: Any = theirs._TypePromotionInterpreter
        whole, rule_of = interpreter.run_node, theirs.get_type_promotion_rule
    except (ImportError, AttributeError):  # another version of torch, which may take its time
        yield
        return

    def run_node(self: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return whole(self, node)
        if rule := rule_of(node, self.type_promotion_table):
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    interpreter.run_node = run_node
    try:
        yield
    finally:
        interpreter.run_node = whole


def _check(node: fx.Node) -> None:
    """Raise VitreousError where it holds graphs of its own, or writes into what others see; in place it need not compute."""
    target: Any = node.target
    if node.op not in ("placeholder", "output", "call_function") or isinstance(target, torch._ops.HigherOrderOperator):
        raise VitreousError(f"{node} holds a graph of its own")
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        given, name = node.args[0], target._overloadpacket.__name__
        if not name.endswith("_") or not isinstance(given, fx.Node) or len(given.users) > 1 or not _fresh(given):
            raise VitreousError(f"{node} writes into what others may see")
        if any(n.meta["val"].dtype != given.meta["val"].dtype for n in node.all_input_nodes if "val" in n.meta):
            raise VitreousError(f"{node} computes in another type than it writes")
        node.target = getattr(getattr(aten, name[:-1]), target._overloadname)


def _fresh(node: fx.Node) -> bool:
    """Whether its value lies in memory of its own."""
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and not any(out.alias_info for out in target._schema.returns)


@cache
def _preservable() -> frozenset[Any]:
    """Operators that a table without them keeps whole; torch takes the others apart, as those that share memory, unasked."""
    return frozenset({*torch.export.default_decompositions(), *SAMPLING})


def _composite(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target in _preservable():
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


def _known(graph: fx.Graph, node: fx.Node) -> str | None:
    """`_replace` for the most frequent, which need no tracing."""
    given: Any = node.args[0] if node.args else None
    if node.target is aten.dropout.default and node.args[2:] == (False,):
        node.replace_all_uses_with(given)
    elif node.target in RESHAPING and sum(not isinstance(n, int) for n in node.meta["val"].shape) < 2:
        with graph.inserting_before(node):
            shape = [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]
            given = graph.call_function(aten.reshape.default, (given, shape))
        given.meta = node.meta
        node.replace_all_uses_with(given)
    else:
        return None
    graph.erase_node(node)
    return given.name


def _replace(graph: fx.Graph, node: fx.Node, table: Table) -> str:
    """Put in the place of `node` what it is made of; what its value is called now."""
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    given, form = pytree.tree_flatten((node.args, node.kwargs))
    target: Any = node.target
    inner = [i for i, value in enumerate(given) if isinstance(value, fx.Node)]

    def run(*values: Any) -> Any:
        whole = list(given)
        for i, value in zip(inner, values, strict=True):
            whole[i] = value
        args, kwargs = pytree.tree_unflatten(whole, form)
        return target(*args, **kwargs)

    parts = make_fx(dispatch_functionalize(run), decomposition_table=table)(*(given[i].meta["val"] for i in inner)).graph
    known = dict(zip((n for n in parts.nodes if n.op == "placeholder"), (given[i] for i in inner), strict=True))
    before = set(graph.nodes)
    with graph.inserting_before(node):
        made: Any = graph.graph_copy(parts, known)
    for new in set(graph.nodes) - before:
        new.meta = {**node.meta, **new.meta}
    if isinstance(made, fx.Node):
        node.replace_all_uses_with(made)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(made[user.args[1]])  # torch.export takes tuples apart by indices alone
            graph.erase_node(user)
    graph.erase_node(node)
    return made.name if isinstance(made, fx.Node) else node.name
