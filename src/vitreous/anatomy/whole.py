"""The model around its blocks: the vision transformer inside of wrappers, its grid of patches, prefix tokens, and classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .parts import here

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls")
PREFIX = (*CLASS_TOKENS, "dist_token", "distillation_token", "register_tokens", "reg_token", "reg_tokens")
NOT_CLASSES = ("proj", "pool", "neck", "embed")  # what a last layer is called that gives no classes


def told(model: nn.Module) -> dict[str, Any]:
    """What the user said of the model by `read(model, grid=…)`, also of one that wraps or is wrapped."""
    found: dict[str, Any] = {}
    for module in (*_inner(model), model):
        found |= module.__dict__.get("_vitreous_told", {})
    return found


def _inner(model: nn.Module) -> Iterator[nn.Module]:
    """What DataParallel, DDP and torch.compile wrap."""
    for name in ("module", "_orig_mod"):
        if isinstance(inner := model._modules.get(name), nn.Module):
            yield from _inner(inner)
            yield inner


class _Enough(Exception):
    """The first block was reached."""


class Whole:
    """What lies around `blocks`; they, and attention outside of blocks (`pooling`), are given by their dotted names."""

    def __init__(self, model: nn.Module, blocks: list[str], pooling: list[str]) -> None:
        self.model, self.blocks = model, blocks
        self.modules = dict(model.named_modules())
        first, final = (min(blocks).split("."), max(blocks).split(".")) if blocks else ([], [])
        alike = next((i for i, (a, b) in enumerate(zip(first, final, strict=False)) if a != b), len(first) - 1)
        common = first[: max(alike, 0)]
        # From what holds all blocks outwards; without blocks, from what a wrapper holds.
        self.path = [".".join(common[:i]) for i in range(len(common), -1, -1)] if blocks else [*self._wrapped(), ""]
        self.vit_name = next((n for n in self.path if self._embeds_patches(self.modules[n])), self.path[-1])
        self.vit = self.modules[self.vit_name]
        # What attends outside of blocks, with what else its head holds: no layer in there is asked for classes or tokens.
        heads = (n.rpartition(".")[0] for n in pooling)
        self.pooling = [*pooling, *(n for n in heads if n and n not in self.path and n not in blocks)]
        self.behind = ""
        self.configured: tuple[int, int] | None = None  # the size of images that Hugging Face's configuration tells
        self.around: list[Any] = [self.modules[n] for n in self.path[self.path.index(self.vit_name) :]]

    def _wrapped(self) -> Iterator[str]:
        """The modules that a wrapper with one child holds, the innermost first."""
        name, names, module = "", [], self.model
        while len(children := list(module.named_children())) == 1 and not hasattr(module, "get_classifier"):
            name = f"{name}.{children[0][0]}".strip(".")
            module = children[0][1]
            names.append(name)
        return reversed(names)

    def _embeds_patches(self, module: nn.Module) -> bool:
        named = ("patch_embed", "patch_embeddings", "embeddings", "to_patch_embedding", "conv_proj", "embeds", "stem")
        return any(isinstance(getattr(module, n, None), nn.Module) for n in named) or any(
            isinstance(m, nn.Conv2d) and m.kernel_size == m.stride != (1, 1) for m in module.children()
        )

    def _first(self, *names: str) -> Any:
        """The first of these attributes that the vision transformer has, or what holds it."""
        for module in self.around:
            for name in names:
                if (value := getattr(module, name, None)) is not None and not isinstance(value, nn.Module):
                    return value
        return None

    def width(self) -> int | None:
        found = self._first("embed_dim", "hidden_dim", "num_features")
        if isinstance(found, int):
            return found
        config = self._first("config")
        config = getattr(config, "vision_config", config)
        if isinstance(size := getattr(config, "hidden_size", None), int):
            return size
        norms = (m for b in self.blocks[:1] for m in self.modules[b].modules() if "norm" in type(m).__name__.lower())
        return next((p.numel() for m in norms for p in m.parameters(recurse=False)), None)

    def pool(self) -> str | None:
        found = self._first("global_pool", "pool")
        return found if isinstance(found, str) else None

    # ---- tokens

    def tokens(self, one_grid: bool) -> tuple[tuple[int, int] | None, int, bool]:
        """Patch rows and columns, the number of prefix tokens, and whether one of them is a class token."""
        grid, prefix = self._by_name()
        class_token = self._class_token()
        if one_grid and (prefix is None or not self._counted(grid, prefix)):
            grid, prefix = self._by_running(grid, prefix)
            class_token = class_token or (prefix > 0 and not self._special())
        said = told(self.model)
        return said.get("grid", grid), said.get("prefix", prefix or 0), class_token and said.get("prefix") != 0

    def _counted(self, grid: tuple[int, int] | None, prefix: int) -> bool:
        """Whether as many tokens enter the first block as Hugging Face's configuration and what is known by name make."""
        if self.configured is None or grid is None:
            return True
        entered = self._entering(*self.configured)
        return entered is None or entered[0].shape[1] == grid[0] * grid[1] + prefix

    def _class_token(self) -> bool:
        own = getattr(self.vit, "cls_token", None)
        held = {**self._special(), **({"cls_token": own} if isinstance(own, Tensor) else {})}
        return any(n in CLASS_TOKENS and t.numel() for n, t in held.items())

    def _special(self) -> dict[str, Tensor]:
        """The parameters that are tokens before the patches, by the last part of their name."""
        inside = tuple(f"{b}." for b in (*self.blocks, *self.pooling))
        named = ((n, t) for n, t in self.model.named_parameters() if n.startswith(self.vit_name) and not n.startswith(inside))
        return {n.rsplit(".")[-1]: t for n, t in named if n.rsplit(".")[-1] in PREFIX}

    def _by_name(self) -> tuple[tuple[int, int] | None, int | None]:
        """What timm, Hugging Face and torchvision tell."""
        m: Any = self.vit
        grid = getattr(getattr(m, "patch_embed", None), "grid_size", None)
        prefix = getattr(m, "num_prefix_tokens", None)
        if hasattr(m, "blocks_token_only"):  # CaiT: the class token joins after the patch blocks
            prefix = 0
        if grid is not None or prefix is not None:
            tokens = any(getattr(part, "cls_token", None) is not None for part in (m, getattr(m, "embeds", None)))
            return (int(grid[0]), int(grid[1])) if grid is not None else None, int(tokens) if prefix is None else int(prefix)
        config = self._first("config")
        config = getattr(config, "vision_config", config)
        if hasattr(config, "patch_size") and hasattr(config, "image_size"):  # Hugging Face
            (h, w), (p, r) = (s if isinstance(s, (tuple, list)) else (s, s) for s in (config.image_size, config.patch_size))
            self.configured = h, w
            counted = sum(t.shape[-2] if t.ndim > 1 else 1 for t in self._special().values() if t.numel())
            return (h // p, w // r), counted
        if hasattr(m, "image_size") and hasattr(m, "patch_size") and hasattr(m, "class_token"):  # torchvision
            side = m.image_size // m.patch_size
            return (side, side), 1
        return None, None

    def _by_running(self, grid: tuple[int, int] | None, prefix: int | None) -> tuple[tuple[int, int] | None, int]:
        """The tokens that enter the first block, for an image of each size that the model may be made for."""
        special = sum(t.shape[-2] if t.ndim > 1 else 1 for t in self._special().values() if t.numel())
        for h, w in dict.fromkeys(self._sizes(special)):
            found = self._entering(h, w)
            if found is None:
                continue
            tokens, shape = found
            n = tokens.shape[1]
            if self._behind(tokens, h, w):
                return None, 0
            if shape is not None and 0 <= n - shape[0] * shape[1] <= 64:
                return shape, n - shape[0] * shape[1]
            left = n - special
            if left > 0 and math.isqrt(left * w // h) and (columns := math.isqrt(left * w // h)) * (left // columns) == left:
                return (left // columns, columns), special
        return grid, special if prefix is None else prefix

    def _behind(self, empty: Tensor, h: int, w: int) -> bool:
        """Whether tokens that no image changes, which are no patches, stand behind some that it changes. `empty`: of no image."""
        other = self._entering(h, w, noise=True)
        if other is None or other[0].shape != empty.shape:
            return False
        fixed = (other[0] == empty).all(-1)[0]
        first = int(fixed.int().argmin())
        if late := int(fixed[first:].sum()) if not fixed.all() else 0:
            self.behind = f"{late} of {len(fixed)} tokens, no patches, behind the patches: put class and other tokens first"
        return bool(late)

    def _sizes(self, special: int) -> Iterator[tuple[int, int]]:
        asked = self._first("img_size", "image_size", "input_size")
        for owner in self.around:
            cfg = getattr(owner, "pretrained_cfg", None) or getattr(owner, "default_cfg", None)
            if isinstance(cfg, dict) and isinstance(cfg.get("input_size"), tuple):
                yield cast(Any, cfg["input_size"][-2:])
        if isinstance(asked, int):
            yield asked, asked
        elif isinstance(asked, (tuple, list)) and len(asked) == 2:
            yield int(asked[0]), int(asked[1])
        patch = self._patch()
        for name, t in self.vit.named_parameters():
            places = t.shape[-2] - special if "pos" in name.lower() and t.ndim > 1 else 0
            if patch and places > 0 and math.isqrt(places) ** 2 == places:
                yield math.isqrt(places) * patch, math.isqrt(places) * patch
        yield from ((s, s) for s in (224, 32, 64, 128, 256, 384))

    def _patch(self) -> int:
        conv = next((m for m in self.vit.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride != (1, 1)), None)
        if conv is not None:
            return cast(int, conv.stride[0])
        size = self._first("patch_size")
        return int(size[0] if isinstance(size, (tuple, list)) else size) if size else 0

    def _entering(self, h: int, w: int, noise: bool = False) -> tuple[Tensor, tuple[int, int] | None] | None:
        """The tokens `[1, N, C]` that enter the first block, of an empty image or of noise, and the rows and columns of the patch
        embedding where a convolution makes it."""
        block = self.modules[self.blocks[0]]
        entered: list[Tensor] = []
        shapes: list[tuple[int, int]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if x is not None and x.ndim == 3:
                entered.append(x.detach().clone())
            raise _Enough

        def seen(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim == 4:
                shapes.append((out.shape[-2], out.shape[-1]))

        reached = next(iter(block.children())) if isinstance(block, nn.ModuleList) else block
        handles: list[Any] = [reached.register_forward_pre_hook(here(stop), with_kwargs=True)]
        handles += [m.register_forward_hook(here(seen)) for m in self.vit.modules() if isinstance(m, nn.Conv2d)]
        conv = next((m for m in self.vit.modules() if isinstance(m, nn.Conv2d)), None)
        reference = next(self.model.parameters())
        shape = 1, 3 if conv is None else conv.in_channels, h, w
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) if noise else torch.zeros(shape)
        x = x.to(reference)
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(x)
        except Exception:  # _Enough, or whatever a stranger's model does with an image of this size
            pass
        finally:
            for handle in handles:
                handle.remove()
            for m in training:
                m.training = True
        if not entered:
            return None
        return entered[0], shapes[-1] if shapes else None

    # ---- classifier

    def classifier(self) -> str | None:
        """The layer whose outputs are the classes, whatever its name; None for a model of features."""
        said = told(self.model)
        if "classifier" in said:
            return said["classifier"] or None
        names = list(self.modules)
        own = [n for n in names if not self._within(n, self.vit_name)] if self.vit_name else []
        behind = [n for n in own if names.index(n) > names.index(self.vit_name)]
        if found := self._last_layer(behind):  # a backbone with a head of the user's
            return found
        get = getattr(self.vit, "get_classifier", None)
        if callable(get):
            head = get()
            if isinstance(head, nn.Linear):
                return next((n for n, m in self.modules.items() if m is head), None)
            if isinstance(head, nn.Identity):
                return None
        prefix = f"{self.vit_name}." if self.vit_name else ""
        pooling = self.pooling
        named = [n for n, m in self.modules.items() if isinstance(m, nn.Linear) and not any(self._within(n, p) for p in pooling)]
        heads = ("head", "heads", "fc", "classifier", "cls_classifier", "mlp_head")
        if known := next((n for n in reversed(named) if n.removeprefix(prefix).split(".")[0] in heads), None):
            return known
        if not self.blocks:
            return None
        last = max(i for i, n in enumerate(names) if self._within(n, self.blocks[-1]))
        return self._last_layer(names[last + 1 :])

    def _within(self, name: str, outer: str) -> bool:
        return not outer or name == outer or name.startswith(outer + ".")

    def _last_layer(self, names: list[str]) -> str | None:
        """The last of these modules with a matrix of its own (a linear layer, or a cosine head's), if it may give classes."""
        for name in reversed(names):
            module = self.modules[name]
            if isinstance(module, (nn.Embedding, nn.Conv2d)) or any(self._within(name, p) for p in self.pooling):
                continue
            if any(p.ndim == 2 for p in module.parameters(recurse=False)):
                words = name.removeprefix(self.vit_name).lower()
                return None if any(w in words for w in NOT_CLASSES) or "attention" in words else name
        return None
