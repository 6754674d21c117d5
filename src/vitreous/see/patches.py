"""What every explanation needs: the grid of patches, an undisturbed run, and the way from tokens back to patches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import Anatomy, read
from ..blocks import Reduction
from ..copies.own import exact, run, still
from ..errors import VitreousError
from ..outputs import answer
from ..processor import free_memory
from ..score import Target, targets

MAPS = 2**19  # numbers in one head's map of the images that go together
LAST = 4  # attentions among which the last one over the whole sequence is: what pools by attention comes behind it


def grid_of(model: nn.Module, x: Tensor, purpose: str) -> tuple[Anatomy, tuple[int, int]]:
    """The anatomy of `model`, and the patch rows and columns that images like `x` give.

    Raises `VitreousError` for a model with no attention or no single grid of patches, and for `x` that is no batch of
    images.
    """
    check_images(x)
    anatomy = read(model)
    if not anatomy.attention:
        raise VitreousError(f"{purpose} shows attention, and {anatomy.kind} has none: use see.grad_cam")
    if anatomy.behind:
        raise VitreousError(
            f"{purpose} reads patches after all other tokens, but {anatomy.kind} has {anatomy.behind}, or use see.grad_cam"
        )
    grid = grid_seen(model, x, anatomy)
    if grid is None:
        tell = "tell it by vitreous.read(model, grid=(rows, columns), prefix=…), or " if _alike(anatomy) else ""
        raise VitreousError(f"{purpose} needs one grid of patches, and {anatomy.kind} tells of none: {tell}use see.grad_cam")
    refuse_vast(model, x)
    return replace(anatomy, grid=grid), grid


def refuse_vast(model: nn.Module, x: Tensor) -> None:
    """Raise `VitreousError` where one layer's map of one image would not fit into the memory that is free.

    What looks at such attention would end, after hours, without an answer. Windows of attention have no such limit.
    """
    anatomy = read(model)
    if not anatomy.plain or (grid := grid_seen(model, x, anatomy)) is None:
        return
    tokens = grid[0] * grid[1] + anatomy.prefix
    needed = 4 * max(a.heads or 1 for a in anatomy.attention) * tokens**2
    if needed > free_memory():
        size = f"{needed / 2**30:.0f} GiB, of which {free_memory() / 2**30:.0f} are free"
        raise VitreousError(f"images of {x.shape[2]} × {x.shape[3]} are {tokens} tokens, and one layer's attention takes {size}: "
                            "build the model for smaller images (img_size)")  # fmt: skip


class _Enough(Exception):
    """The first attention was reached: what comes after is not needed."""


_SEEN: WeakKeyDictionary[nn.Module, dict[Any, tuple[int, int] | None]] = WeakKeyDictionary()


def grid_seen(model: nn.Module, x: Tensor, anatomy: Anatomy) -> tuple[int, int] | None:
    """Rows and columns of the patches that enter the first attention for images like `x`, found out by running up to there.

    Rows times columns and the prefix are the tokens that enter; which rows and columns is told by the convolution that made them,
    else by the proportions of the image. Where the anatomy knows no grid, the convolution alone tells it. None where nothing
    does, or attention does not see one sequence of it.
    """
    if anatomy.grid is None and (anatomy.behind or not _alike(anatomy)):
        return None
    key, known = (tuple(x.shape[1:]), anatomy.grid, anatomy.prefix), _SEEN.setdefault(model, {})
    if key not in known:
        known[key] = _find_grid(model, x[:1], anatomy, anatomy.grid)
    return known[key]


def _alike(anatomy: Anatomy) -> bool:
    """Whether the blocks may all work on one grid, as those of a pyramid do not, and of convolutions that end in attention."""
    one_stage = len({s.reduction for s in anatomy.stages}) < 2 and all(s.blocks for s in anatomy.stages)
    return one_stage and len({b.why_not for b in anatomy.blocks}) == 1


def _find_grid(model: nn.Module, x: Tensor, anatomy: Anatomy, told: tuple[int, int] | None) -> tuple[int, int] | None:
    maps: list[tuple[int, int]] = []
    tokens: list[int] = []

    def convolved(_: nn.Module, __: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim == 4:
            maps.append((out.shape[2], out.shape[3]))

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        axis = sequence_axis(attention)
        if given is not None and given.ndim == 3 and given.shape[1 - axis] == 1:  # windows are many
            tokens.append(given.shape[axis])
        raise _Enough

    with torch.no_grad(), still(model) as own:
        handles = [m.register_forward_hook(convolved) for m in own.modules() if isinstance(m, nn.Conv2d)]
        attention = own.get_submodule(anatomy.attention[0].name)
        ahead = anatomy.blocks[0] if anatomy.blocks and anatomy.blocks[0].attention.name == anatomy.attention[0].name else None
        first = own.get_submodule(ahead.name) if ahead and ahead.plain else attention  # a block of ours may add tokens inside
        handles.append(first.register_forward_pre_hook(entered, with_kwargs=True))
        try:
            run(own, x)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
    if not tokens:  # windows, or maps of places
        return told
    n = tokens[0] - anatomy.prefix
    if maps and maps[-1][0] * maps[-1][1] == n:
        return maps[-1]
    if told is None or told[0] * told[1] == n:
        return told
    high, wide = x.shape[2:]
    fits = [(h, n // h) for h in range(1, n + 1) if n % h == 0]
    grid = min(fits, key=lambda hw: abs(math.log(hw[0] * wide / (hw[1] * high))), default=None)
    # A few pixels that fill no patch are cut or padded; proportions that are far off are another sequence.
    return grid if grid and abs(math.log(grid[0] * wide / (grid[1] * high))) < 0.2 else told


def sequence_axis(attention: nn.Module) -> int:
    """Where an attention module has its tokens: `[B, N, C]`, or as `nn.MultiheadAttention` by default `[N, B, C]`."""
    return 1 if getattr(attention, "batch_first", True) else 0


def check_images(x: Any) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or not len(x):
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise VitreousError(f"images must be a tensor [B, C, H, W], not {shape}: x[None] adds a batch axis")


def parts(x: Tensor, target: Target, tokens: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and their targets, as many at a time as their maps of attention `[tokens, tokens]` leave memory for."""
    size = max(1, MAPS // tokens**2)
    size = size if most is None else min(size, most)
    index = targets(target, len(x))
    yield from zip(x.split(size), [None] * -(-len(x) // size) if index is None else index.split(size), strict=True)


def per_patch(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values of pixels `[B, H, W]` summed over each patch, `[B, h, w]`."""
    size = pixels.shape[1] * pixels.shape[2] / (grid[0] * grid[1])
    return F.adaptive_avg_pool2d(pixels[:, None], grid)[:, 0] * size


class Reading:
    """Which tokens the answer is made of: `with Reading(own, anatomy) as reading:` run the model, then ask `groups`.

    Told by gradients of the answer with respect to what the last attention over the whole sequence gives: a residual, norms and
    MLPs behind it work on each token by itself. The answer is weighed by random numbers, so that none of it cancels.
    """

    def __init__(self, own: nn.Module, anatomy: Anatomy) -> None:
        self.prefix, self.class_token = anatomy.prefix, anatomy.class_token
        self.modules = [own.get_submodule(a.name) for a in anatomy.attention[-LAST:]]
        self.leaves: list[tuple[Tensor, int]] = []

    def __enter__(self) -> Reading:
        self._grad = torch.is_grad_enabled()
        self._handles = [m.register_forward_hook(self._cut, with_kwargs=True) for m in self.modules]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        torch.set_grad_enabled(self._grad)

    def _cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        first, axis = out[0] if isinstance(out, tuple) else out, sequence_axis(module)
        sizes = [t.shape[axis] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim == 3]
        # Pooling by attention gives a few of many tokens, a token step most of them.
        if not isinstance(first, Tensor) or first.ndim != 3 or 2 * first.shape[axis] < max(sizes, default=0):
            return None
        if first.requires_grad and torch.is_grad_enabled():  # in a graph already, which must stay whole
            self.leaves.append((first, axis))
            return None
        torch.set_grad_enabled(True)
        leaf = first.detach().requires_grad_()
        self.leaves.append((leaf, axis))
        return (leaf, *out[1:]) if isinstance(out, tuple) else leaf

    def groups(self, out: Any) -> Tensor:
        """`[B, prefix + 1]`, summing to 1: the shares of each prefix token, and of all patches together, in what is read."""
        y = answer(out)
        found = torch.zeros(len(y), self.prefix + 1)
        if self.leaves and y.requires_grad:
            weigh = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(0)).to(y)
            leaf, axis = self.leaves[-1]
            slope = torch.autograd.grad((weigh * y).sum(), leaf, allow_unused=True, retain_graph=True)[0]
            if slope is not None and slope.shape[1 - axis] == len(y):  # not windows
                slope = slope.detach().float().movedim(axis, 1)
                summed = torch.cat([slope[:, : self.prefix], slope[:, self.prefix :].sum(1, keepdim=True)], 1)
                found = summed.norm(dim=2).cpu()
        unknown = ~(found.isfinite().all(1) & (found.amax(1) > 0))
        found[unknown] = 0
        found[unknown, 0 if self.class_token and self.prefix else -1] = 1  # by its name, then
        found[found < 1e-4 * found.amax(1, keepdim=True)] = 0
        return found / found.sum(1, keepdim=True)


def before(trace: Sequence[Reduction], anatomy: Anatomy, block: str) -> list[Reduction]:
    """The reductions that ran before the attention of `block`; all of them for a name that is no block."""
    order = [b.name for b in anatomy.blocks]
    return [r for r in trace if block not in order or order.index(r.layer) < order.index(block)]


@exact
@torch.no_grad()
def shares(trace: Sequence[Reduction], like: Tensor, tokens: int) -> Tensor:
    """`[B, tokens left, tokens]`: the shares, summing to 1, of the first tokens in those that are left."""
    m = torch.eye(tokens, device=like.device).expand(len(like), -1, -1)
    for r in trace:
        m = r.matrix().float() @ m
    return m


@exact
@torch.no_grad()
def painting(trace: Sequence[Reduction], like: Tensor, tokens: int) -> Tensor:
    """`[B, tokens left, tokens]`: 1 where a token is part of one that is left: values per token paint all patches.

    What was given up is painted with its share of the token that gathers it, or 0 when there is none.
    """
    m = torch.eye(tokens, device=like.device).expand(len(like), -1, -1)
    for r in trace:
        share = r.matrix().float()
        part = (share > 0).float()
        if r.rest is not None and r.rest < r.tokens:
            part[:, r.rest] = share[:, r.rest]
        m = part @ m
    return m


def places(trace: Sequence[Reduction], like: Tensor, tokens: int) -> list[Tensor]:
    """At first and after each reduction `[B, tokens]`: which token each first token is part of, -1 once given up."""
    now = torch.arange(tokens, device=like.device).expand(len(like), -1)
    found = [now]
    for r in trace:
        new = r.into.gather(1, now.clamp_min(0))
        gone = now < 0 if r.rest is None else (now < 0) | (new == r.rest)
        now = new.masked_fill(gone, -1)
        found.append(now)
    return found


def on_grid(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, tokens]` to `[B, h, w]`: the patches come last in every sequence."""
    h, w = grid
    return values[:, -h * w :].unflatten(1, (h, w))
