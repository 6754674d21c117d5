"""What a model returns: a tensor, a tuple, a dict or an object; which of it answers, and whether that is classes or features.

Whether an answer is features is found out by running: a `TorchFunctionMode` follows what depends on the image, module hooks say
which modules' output is the answer. Classes are the product of features with weights of the model; the answer of a model whose
head is an identity, or that ends in a norm, a pooling or a residual, is features. To decide it yourself, set
`model.vitreous_embeds = True` (features) or `False` (classes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .copies.own import run, still
from .errors import VitreousError

CLASSES = ("logits", "cls_logits", "scores", "pred_logits", "probs")
FEATURES = ("image_embeds", "image_features", "pooler_output", "x_norm_clstoken", "embeddings", "features", "last_hidden_state")


def tensors(out: Any) -> dict[str, Tensor]:
    """All tensors in what a model returned, by name and in order: "output" for a single tensor, "0", "1" … in a tuple or list,
    keys of a dict, fields of an object, joined by dots where they are nested. What is no tensor is passed over."""
    return dict(_named(out, ""))


def answer(out: Any) -> Tensor:
    """The tensor that answers: by name `logits`, else `image_embeds`, `pooler_output` and the like, else the first.

    Raises `VitreousError` when there is no tensor in it.
    """
    return _answer(out)[1]


def embeds(model: Callable[..., Any], x: Tensor) -> bool:
    """Whether the answer of `model` to images `x` `[B, C, H, W]` is features and not scores of classes.

    Runs it on the first image in evaluation mode, once for a model whose modules stay the same. In this order: what the model
    says by an attribute `vitreous_embeds`; the name of the output; more or fewer axes than `[B, K]` are features; `num_classes`
    of 0 in a module whose output is the answer; what computed it: a product with weights of the model gives classes, unless the
    weights are called a projection ("proj"). A scripted module with two axes, and any callable that is no module where the
    first three do not tell, is taken for a classifier.
    """
    asked = getattr(model, "vitreous_embeds", None)
    if asked is not None:
        return bool(asked)
    if not isinstance(model, nn.Module):
        with torch.no_grad():
            name, y = _answer(model(x[:1]))
        return name in FEATURES or (name not in CLASSES and y.ndim != 2)
    state = _state(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != state:
        known = _KNOWN[model] = state, _find_out(model, x[:1])
    return known[1]


_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[Any], bool]] = WeakKeyDictionary()


def _state(model: nn.Module) -> list[Any]:
    """All modules and their plain settings, to see whether they are still the same; keeps nothing of the model alive."""
    return [
        (n, ref(m), {k: id(v) if k == "forward" else v for k, v in vars(m).items() if k == "forward" or _plain(k, v)})
        for n, m in model.named_modules()
    ]


def _plain(name: str, value: Any) -> bool:
    return name != "training" and isinstance(value, (str, int, float, type(None)))


def _named(out: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(out, Tensor):
        return [(name or "output", out)]
    if isinstance(out, Mapping):
        parts = list(out.items())
    elif isinstance(out, (tuple, list)):
        parts = list(zip(getattr(out, "_fields", range(len(out))), out, strict=True))
    elif dataclasses.is_dataclass(out) or (
        hasattr(out, "__dict__") and not isinstance(out, (nn.Module, type)) and not callable(out)
    ):
        parts = list(vars(out).items())
    else:
        return []
    return [found for key, part in parts for found in _named(part, f"{name}.{key}" if name else str(key))]


def _answer(out: Any) -> tuple[str, Tensor]:
    found = tensors(out)
    if not found:
        raise VitreousError(f"the model returns {type(out).__name__}, with no tensor in it: wrap it in one that returns a tensor")
    name = next((n for n in (*CLASSES, *FEATURES) if n in found), next(iter(found)))
    return name, found[name]


# ---- finding out


@dataclass(eq=False)
class Made:
    """How one tensor that depends on the image came about."""

    shape: tuple[int, ...]
    func: Any = None
    by: list[Made] = field(default_factory=list)  # what of its operands depends on the image
    weights: list[Tensor] = field(default_factory=list)  # and what does not
    modules: list[nn.Module] = field(default_factory=list)  # whose output it is, the innermost first
    names: list[str] = field(default_factory=list)  # what they call it


# One by one, or rearranged: such a call makes no classes out of features, and no features out of classes.
PASSES = {
    "add", "sub", "mul", "div", "true_divide", "neg", "softmax", "log_softmax", "sigmoid", "logsigmoid", "normalize", "clamp",
    "clamp_min", "clip", "tanh", "exp", "log", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda",
    "view", "reshape", "squeeze", "unsqueeze", "flatten", "contiguous", "clone", "detach", "dropout", "alpha_dropout", "mean",
    "sum", "amax", "max", "stack", "cat", "concat", "unbind", "chunk", "split", "expand", "expand_as", "select", "getitem",
    "rsub", "rmul", "radd", "rdiv", "rtruediv", "truediv", "iadd", "isub", "imul", "itruediv", "requires_grad_", "transpose",
    "permute", "t",
}  # fmt: skip
PRODUCTS = {
    "linear", "matmul", "rmatmul", "mm", "bmm", "addmm", "einsum", "cosine_similarity", "cdist", "conv1d", "conv2d", "bilinear",
}  # fmt: skip


class Follow(TorchFunctionMode):
    """Notes how each tensor came about that depends on `x`; keeps no tensor alive but weights."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.made: Any = WeakIdKeyDictionary()
        self.made[x] = Made(tuple(x.shape))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = list(tensors([args, kwargs or {}]).values())
        by = [m for t in given if (m := self.made.get(t)) is not None]
        if by:
            weights = [t for t in given if t not in self.made]
            for t in tensors(out).values():
                if t not in self.made or _in_place(func):  # dropout gives back what it got
                    self.made[t] = Made(tuple(t.shape), func, by, weights)
        return out


def _find_out(model: nn.Module, x: Tensor) -> bool:
    first = next((p for p in model.parameters() if p.is_floating_point()), x)
    follow = Follow(x := x.detach().to(first.device))

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        for name, t in tensors(out).items():
            made = follow.made.get(t)
            if made is None:  # computed where no mode sees it, as in a scripted module
                by = [m for g in tensors([args, kwargs]).values() if (m := follow.made.get(g)) is not None]
                made = follow.made[t] = Made(tuple(t.shape), None, by)
            made.modules.append(module)
            made.names.append(name)

    with torch.no_grad(), still(model) as own:
        handles = [m.register_forward_hook(note, with_kwargs=True) for m in own.modules() if not isinstance(m, ScriptModule)]
        try:
            with follow:
                name, y = _answer(run(own, x))
        finally:
            for handle in handles:
                handle.remove()
        weights = {id(t): n for n, t in (*own.named_parameters(), *own.named_buffers())}
    if name in CLASSES or name in FEATURES:
        return name in FEATURES
    if y.ndim != 2:
        return True
    source = follow.made.get(y)
    way = _back(source)
    chain = [m for made in way for m in made.modules]
    asked = next((a for m in reversed(chain) if (a := getattr(m, "vitreous_embeds", None)) is not None), None)
    if asked is not None:
        return bool(asked)
    called = [n for made in way for n in made.names if n in CLASSES or n in FEATURES]
    if called:
        return called[0] in FEATURES
    counts = [c for m in chain if isinstance(c := getattr(m, "num_classes", None), int)]
    if 0 in counts:
        return True
    if source is None or _classes(source, weights) or any(_owns(m, y.shape[1], weights) for m in chain):
        return False
    # A head that computes in a way of its own, as in integers; but one that was taken off leaves the number of classes behind.
    if y.shape[-1] in counts and any(getattr(m, "out_features", None) == y.shape[-1] for m in chain):
        return False
    off = any(isinstance(m, nn.Identity) for m in chain)
    return off or (y.shape[1] not in counts and way[-1].func is not None)


def _owns(module: nn.Module, classes: int, names: dict[int, str]) -> bool:
    """Whether a module without children has a vector for each class, whatever it does with them."""
    held = () if next(module.children(), None) is not None else module.parameters()
    return any(t.ndim == 2 and classes in t.shape and not _projects(t, names) for t in held)


def _projects(weight: Tensor, names: dict[int, str]) -> bool:
    return "proj" in names.get(id(weight), "").removesuffix(".weight").rsplit(".", 1)[-1]


def _in_place(func: Any) -> bool:
    called = getattr(func, "__name__", "")
    return called.startswith("__i") or (called.endswith("_") and not called.endswith("__"))


def _name(func: Any) -> str:
    return getattr(func, "__name__", "").strip("_")


def _back(made: Made | None) -> list[Made]:
    """`made` and all that it came from with nothing but passing in between."""
    found: list[Made] = []
    todo = [made] if made is not None else []
    while todo:
        m = todo.pop(0)
        if any(m is f for f in found):
            continue
        found.append(m)
        if _passes(m):
            todo += [b for b in m.by if b.shape[-1:] == m.shape[-1:]]
    return found


def _passes(made: Made) -> bool:
    residual = _name(made.func) in ("add", "iadd", "radd") and len(made.by) > 1 and len(made.shape) > 2
    return _name(made.func) in PASSES and not residual


def _classes(made: Made, names: dict[int, str]) -> bool:
    """Whether every way back ends in a product with weights that are not called a projection."""
    if _name(made.func) in PRODUCTS:
        weights = [t for t in made.weights if t.ndim > 1]
        return bool(weights) and not any(_projects(t, names) for t in weights)
    ways = [b for b in made.by if b.shape[-1:] == made.shape[-1:]] if _passes(made) else []
    return bool(ways) and all(_classes(b, names) for b in ways)
