"""The training engine: Lightning Fabric runs the loop on one or many devices; objectives say what is learnt.

Whatever is drawn at random is drawn anew from the seed, the step and the piece of the batch. So a run that was killed goes on to
the same weights bit for bit, and two processes compute what one computes that accumulates.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from ..anatomy import steady
from ..data import Data
from ..errors import VitreousError
from ..outputs import embeds
from ..steps import refuse_nan
from ..store.expects import class_names, expect
from .augment import transform_for
from .batches import Batches, Pair, planned, seed_everything
from .classify import by_labels
from .fabric import cut, fabric_for, gather, like, like_optimiser, whole
from .ferkd import FerKD
from .measure import Meter, accuracy_on
from .objective import Batch, Now, Objective, Seen, look
from .optimisers import AdamW, Optimiser
from .run import Run
from .sam import SAM, ascend

Progress = Callable[[str, float], None]


class Lesson(nn.Module):
    """Student and what is trained beside it: one module, so that one backward pass synchronises all of it."""

    def __init__(self, student: nn.Module, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.student, self.objectives = student, tuple(objectives)
        self.parts = nn.ModuleList(o.parts(student) or nn.Identity() for o in objectives)
        self.wants = {w for o in objectives for w in o.wants}
        self.blocks = {i for o in objectives for i in o.blocks(student)}
        self.layers = {name for o in objectives for name in o.layers(student)}

    def forward(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor], Seen]:
        seen = Seen(batch.images.new_zeros(0))
        with ExitStack() as running:
            for objective, parts in zip(self.objectives, self.parts, strict=True):
                now.model, now.parts = self.student, parts
                running.enter_context(objective.around(now))
            if self.wants:
                seen = look(self.student, batch.images, self.wants, self.blocks, self.layers)
        terms: dict[str, Tensor] = {}
        for objective, parts in zip(self.objectives, self.parts, strict=True):
            now.model, now.parts = self.student, parts
            for name, term in objective(seen, batch, now).items():
                terms[name if name not in terms else f"{type(objective).__name__}.{name}"] = term
        if not terms:
            raise VitreousError("nothing is learnt: no objective has a loss; add CrossEntropy, or KD with a teacher")
        return torch.stack([t.float() for t in terms.values()]).sum(), terms, seen


def train(
    model: nn.Module,
    data: Data | Pair,
    objective: Objective | Sequence[Objective] = (),
    optimiser: Optimiser | SAM | None = None,
    *,
    epochs: float = 10,
    batch: int = 128,
    micro: int | None = None,
    warmup: float = 0.05,
    augment: str | Callable[[Any], Tensor] | FerKD | None = "crop",
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    mix_until: float = 1.0,
    ema: float | None = None,
    clip: float | None = 1.0,
    precision: Any = "32-true",
    compiled: bool = False,
    check: Data | Pair | None = None,
    out: str | Path | None = None,
    every: float = 300.0,
    seed: int = 0,
    workers: int = 0,
    accelerator: str = "cpu",
    devices: int | str | list[int] = 1,
    fsdp: bool = False,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Train a copy of `model` on `data`; returns it in eval mode. The argument is not touched.

    Args:
        data: a `vitreous.data.Data`, or `(images [N, C, H, W], labels [N] or [N, K] or None)` as tensors.
        objective: what is learnt; their terms are added up. When none is given, cross-entropy, binary where labels mark several.
        optimiser: AdamW when None; the rate rises over the share `warmup` of the steps, then falls along half a cosine.
        batch, micro: images a step over all processes, and how many of them go through the model at once (default: all that
            fall to a process); gradients of the rest are accumulated.
        augment: "crop" (random resized crop and flip), "shift" (pad by an eighth, crop, flip: for small pictures), "randaugment"
            (with "crop"), None for the model's own preparation, a function of a picture (of a batch, where data are tensors), or
            `FerKD`, stored crops with their labels.
        mixup, cutmix: strengths, as timm's; labels become shares. `mix` is another way to mix images and labels, such as
            `PatchMixing`; none of them after the share `mix_until` of the run.
        ema: decay of an average of the weights, which is then what is checked and returned.
        clip: largest norm of the gradient; None for any.
        precision: "32-true", "64-true", "bf16-mixed" or "16-mixed", as Fabric calls them.
        check: labelled images on which accuracy is measured after each epoch (where the model gives features, recall@1 among
            them); the best weights are kept in `out` too.
        out: folder for checkpoints (every `every` seconds and after each epoch), curves and the result. If it holds an unfinished
            run of the same settings, that run goes on, to the same weights bit for bit.
        accelerator, devices: as Fabric's; under `torchrun` every process takes part (DDP).
        fsdp: each of several processes keeps a share alone of weights, gradients and the optimiser's numbers, for a model that
            does not fit; checkpoints are whole, and go on with any number of processes, cut or not.
        tensorboard: write the curves for TensorBoard too, into `out`, after each epoch.
        progress: told what is done, in one line, and the share of it.

    Raises `VitreousError` for what cannot be trained: no trainable parameter, labels that are no class of the model, fewer images
    than a batch, a teacher of other classes, a folder that holds another run, and a loss that is not finite (with the step).
    """
    objectives = (objective,) if isinstance(objective, Objective) else tuple(objective)
    objectives = objectives or (by_labels(data.labels if isinstance(data, Data) else data[1]),)
    optimiser = optimiser or AdamW()
    sam = optimiser if isinstance(optimiser, SAM) else None
    base = sam.base if sam else optimiser
    assert isinstance(base, Optimiser)
    refuse_nan(model)
    if ema is not None and not 0 < ema < 1:
        raise VitreousError(f"ema, the decay of the averaged weights, must lie between 0 and 1, as 0.999; not {ema}")
    fabric = fabric_for(accelerator, devices, precision, fsdp)
    fsdp = fsdp and fabric.world_size > 1
    settings = dict(
        epochs=epochs, batch=batch, micro=micro, warmup=warmup, augment=str(augment), mixup=mixup, cutmix=cutmix, mix=str(mix),
        mix_until=mix_until, ema=ema,
        clip=clip, precision=str(precision), seed=seed, optimiser=str(optimiser), objectives=[str(o) for o in objectives],
    )  # fmt: skip
    with (
        Run(out, model, data, objectives, settings, tensorboard)
        if out is not None and fabric.is_global_zero
        else nullcontext() as run,
        steady(),
    ):
        place = torch.device("cpu") if fsdp else fabric.device  # whole, it may not fit on the device
        student = copy.deepcopy(model).to(place)
        seed_everything(seed)
        lesson = Lesson(student, objectives).to(place)
        teachers = _Teachers(objectives, fabric.device)
        count = len(data) if isinstance(data, Data) else len(data[0])
        shards = data.shards if isinstance(data, Data) else None
        order = planned(count, batch, micro, fabric.world_size, epochs, seed, shards)
        if order.pieces > fabric.world_size and (compares := next((o for o in objectives if o.whole_batch), None)):
            raise VitreousError(f"{type(compares).__name__} compares the images of a batch with each other: leave micro out")
        _labels_fit(student, data, objectives)
        if mixup or cutmix:
            if order.size % 2 or mix is not None:
                raise VitreousError(f"mixup needs an even number of images at once, not {order.size}, and no other mix=")
            mix = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=max(2, _outputs(student, data)))

        some = (data.tensor([0]) if isinstance(data, Data) else data[0][:1]).to(place)
        judges = not embeds(student.eval(), some)
        average = ModelEmaV3(student, decay=ema) if ema else None
        if compiled:
            student.compile()
        if fsdp:
            _can_be_cut(lesson)
            for net in (student, *([average.module] if average else [])):
                cut(fabric, net)
        opt = base.make(student, lesson.parts)
        schedule = CosineLRScheduler(
            opt, order.steps, lr_min=base.lr / 100, warmup_t=round(warmup * order.steps), warmup_lr_init=base.lr / 100,
            t_in_epochs=False,
        )  # fmt: skip
        wrapped, opt = fabric.setup_module(lesson), fabric.setup_optimizers(opt)
        first = 0
        state = run.last() if run is not None else None
        state = fabric.broadcast(state) if fabric.world_size > 1 else state
        if state is not None:
            first = state["step"]
            lesson.load_state_dict(like(state["lesson"], lesson.state_dict()))
            opt.load_state_dict(like_optimiser(state["optimiser"], opt))
            if average is not None:
                average.module.load_state_dict(like(state["average"], average.module.state_dict()))
            if (scaler := getattr(fabric._precision, "scaler", None)) is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])

        mine = range(fabric.global_rank, order.pieces, fabric.world_size)
        batches = Batches(data, transform_for(model, data, augment), order, first, mine, mix, mix_until, workers, fabric.device)
        parameters = [p for p in lesson.parameters() if p.requires_grad]
        now = Now(student, gather=lambda x: gather(fabric, x), teach=teachers)
        began, done_before = time.monotonic(), first
        saved = time.monotonic()
        meter, second = Meter(judges), Meter(False)

        def save(step: int) -> None:
            scaler = getattr(fabric._precision, "scaler", None)
            state = {
                "step": step,
                "lesson": lesson.state_dict(),
                "optimiser": opt.state_dict(),
                "average": average.module.state_dict() if average else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            state = whole(state) if fsdp else state
            if run is not None:
                run.save(state)

        for step, pieces in zip(range(first, order.steps), batches, strict=True):
            now.share, now.epoch = step / order.steps, step / order.steps_an_epoch
            schedule.step_update(step)
            lesson.train()
            for o, now.parts in zip(objectives, lesson.parts, strict=True):
                o.before_step(now)

            def gradients(counted: Meter, pieces: list[tuple[int, Batch]] = pieces, step: int = step) -> None:
                opt.zero_grad()
                for i, (piece, part) in enumerate(pieces):
                    seed_everything(seed, step, piece)
                    teachers.clear()
                    with fabric.no_backward_sync(wrapped, enabled=i < len(pieces) - 1):
                        loss, terms, seen = wrapped(part, now)
                        counted.add(loss, terms, seen, part, step)
                        fabric.backward(loss / len(pieces))

            gradients(meter)
            if sam is not None:
                restore = ascend(parameters, sam.rho, sam.adaptive)
                with _statistics_kept(lesson):
                    gradients(second)
                restore()
            if clip is not None:
                fabric.clip_gradients(wrapped, opt, max_norm=clip, error_if_nonfinite=False)
            opt.step()
            for o, now.parts in zip(objectives, lesson.parts, strict=True):
                o.after_step(now)
            if average is not None:  # of what the objectives left, as zeros that are kept
                average.update(student)
            done = step + 1
            ends = done % order.steps_an_epoch == 0 or done == order.steps
            due = ends or time.monotonic() - saved > every
            due = fabric.broadcast(due) if fsdp else due and run is not None  # all must take part, and clocks differ
            if due or ends or progress is not None:
                meter.settle()
                second.settle()
            if progress is not None and fabric.is_global_zero:
                progress(_line(meter, done, done_before, order, began), done / order.steps)
            if ends:
                judged = average.module if average else student
                accuracy = accuracy_on(judged, check, order.size) if check is not None else None
                judged = _joined(judged, model) if fsdp else judged
                if run is not None:
                    run.note(done / order.steps_an_epoch, meter, accuracy, opt.param_groups[0]["lr"], judged)
                meter = Meter(judges)
            if due:
                save(done)
                saved = time.monotonic()
        result = average.module if average else student
        result = _joined(result, model) if fsdp else result.cpu()
        if compiled:
            result._compiled_call_impl = None
        if (
            isinstance(data, Data)
            and data.labels is not None
            and not class_names(result)
            and _outputs(result, data) == len(data.classes)
        ):
            expect(result, classes=data.classes)
        refuse_nan(result)
        if run is not None:
            run.finish(result.eval())
        return result.eval()


def _can_be_cut(lesson: Lesson) -> None:
    for o, parts in zip(lesson.objectives, lesson.parts, strict=True):
        own = any(getattr(type(o), name) is not getattr(Objective, name) for name in ("after_step", "around"))
        if own or next(parts.parameters(), None) is not None:
            raise VitreousError(f"{type(o).__name__} has weights of its own, or changes the student's: leave fsdp out")


def _joined(cut: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of `model` with the weights of one that is cut over processes."""
    joined = copy.deepcopy(model)
    joined.load_state_dict(whole(cut.state_dict()))
    return joined


class _Teachers:
    """Runs each teacher once a piece, whoever asks."""

    def __init__(self, objectives: Sequence[Objective], device: torch.device) -> None:
        self.seen: dict[Any, tuple[Tensor, Seen]] = {}  # with the images, so that their id stays their own
        for o in objectives:
            for teacher in vars(o).values():
                if isinstance(teacher, nn.Module):
                    teacher.to(device).eval()

    def clear(self) -> None:
        self.seen.clear()

    @torch.no_grad()
    def __call__(
        self,
        teacher: nn.Module,
        images: Tensor,
        wants: Sequence[str] = ("logits",),
        blocks: Sequence[int] = (),
        layers: Sequence[str] = (),
    ) -> Seen:
        key = id(teacher), id(images), tuple(sorted(wants)), tuple(blocks), tuple(layers)
        if key not in self.seen:
            try:
                self.seen[key] = images, look(teacher, images, wants, blocks, layers)
            except (AssertionError, RuntimeError) as error:  # timm asserts the size, others fail at a shape
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                shape = " × ".join(str(n) for n in images.shape[1:])
                raise VitreousError(
                    f"the teacher {type(teacher).__name__} cannot take the student's pictures of {shape} ({error}): "
                    "give a teacher, or a student, for pictures of the same size"
                ) from error
        return self.seen[key][1]


def _outputs(model: nn.Module, data: Data | Pair) -> int:
    images = data.tensor([0]) if isinstance(data, Data) else data[0][:1]
    device = next(model.parameters()).device
    training = model.training
    with torch.inference_mode():
        logits = look(model.eval(), images.to(device)).logits
    model.train(training)
    return logits.shape[-1]


def _labels_fit(model: nn.Module, data: Data | Pair, objectives: Sequence[Objective]) -> None:
    labels = data.labels if isinstance(data, Data) else data[1]
    labels = None if labels is None else torch.as_tensor(labels)
    if labels is None or labels.ndim != 1 or not any("logits" in o.wants for o in objectives):
        return
    outputs = max(2, _outputs(model, data))  # one logit says yes or no
    wrong = (labels < 0) | (labels >= outputs)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise VitreousError(
            f"image {i} has the label {int(labels[i])}, and the model answers with the classes 0 to {outputs - 1}: "
            "mend the labels, or give the model a head of as many classes (--num-classes)"
        )


def _statistics_kept(model: nn.Module) -> Any:
    """Batch norms do not count the second pass of a step."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return nullcontext()

    class Kept:
        def __enter__(self) -> None:
            self.was = [m.momentum for m in norms]
            self.counted = [copy.deepcopy(m.num_batches_tracked) for m in norms]
            for m in norms:
                m.momentum = 0.0

        def __exit__(self, *_: object) -> None:
            for m, momentum, counted in zip(norms, self.was, self.counted, strict=True):
                m.momentum, m.num_batches_tracked = momentum, counted

    return Kept()


def _line(meter: Meter, done: int, before: int, order: Any, began: float) -> str:
    took = time.monotonic() - began
    speed = (done - before) * order.pieces * order.size / max(took, 1e-9)
    left = (order.steps - done) * took / max(done - before, 1)
    accuracy = "" if meter.accuracy is None else f", accuracy {100 * meter.accuracy:.1f} %"
    epoch = math.ceil(done / order.steps_an_epoch)
    return (
        f"epoch {epoch} of {math.ceil(order.steps / order.steps_an_epoch)}: loss {meter.loss / max(meter.images, 1):.3f}"
        f"{accuracy}, {speed:.0f} images/s, {left / 60:.1f} min left"
    )
