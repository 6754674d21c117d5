"""The common contract that every step must keep, and recipes, and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from small_models import SMALL
from support import small_convnet, small_vit
from torch import Tensor, nn

import vitreous as vt
import vitreous.steps
from vitreous.prune import Heads
from vitreous.quant import RepQ
from vitreous.steps import REGISTRY, Recipe, Step, history_of, make_step, slim
from vitreous.tokens import EViT

# Arguments that make a step do something on the small model; a step that is not here is tried with its defaults.
ARGUMENTS = {
    "tokens.EViT": {"keep": 0.5},
    "tokens.ToMe": {"r": 2},
    "tokens.SSMPruning": {"keep": 0.5, "at": (0,)},
    "tokens.UniformPooling": {"at": (0,)},
    "prune.Heads": {"share": 0.34},
    "prune.NViT": {"keep": 0.7, "rounds": 2},
    "prune.Subnet": {"depth": 1, "heads": (2,), "mlp": (96,), "width": 24},
    "prune.LPViT": {"keep": 0.7, "block": (8, 8)},
    "quant.ISViT": {"iterations": 2},
    "quant.GradientPTQ": {"iterations": 2},
}
STEPS = [make_step(name, **ARGUMENTS.get(name, {})) for name in sorted(REGISTRY) if name != "prune.MPCHeads"]
PARTNERS = [make_step("tokens.EViT", keep=0.5), make_step("prune.Heads", share=0.34), make_step("quant.RepQ")]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What a step is tried on where a plain ViT of two blocks will not do: a deeper one, or a network without attention.
VIT = small_vit(depth=2)
OTHERS = {
    "adapt.HST": small_vit(depth=4),
    "adapt.DCLS": small_convnet("convnext_atto"),
    "adapt.ELA": small_convnet("convnext_atto"),
    "tokens.SSMPruning": SMALL["patch-scaling adventurer"].make(img_size=32, depth=2),
}
MADE: dict[tuple[str, int], nn.Module] = {}


@pytest.fixture
def original(request: pytest.FixtureRequest) -> nn.Module:
    """A model of as few blocks as the test's step can do with: most of an export's time goes by blocks."""
    return OTHERS.get(request.node.callspec.params["step"].name, VIT)


def made(step: Step, original: nn.Module, calibration: Tensor) -> nn.Module:
    """What `step` makes of `original`, for tests that only look at it."""
    key = str(step), id(original)
    if key not in MADE:
        MADE[key] = step.apply(original, calibration)
    return MADE[key]


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("step", STEPS, ids=str)
class TestEveryStep:
    def test_changes_a_copy_and_leaves_the_argument(self, step: Step, original: nn.Module, calibration: Tensor) -> None:
        before, given, random = state(original), calibration.clone(), torch.get_rng_state()
        keys = list(vars(original))
        small = step.apply(original, calibration)
        assert same(before, state(original)) and torch.equal(given, calibration)
        assert list(vars(original)) == keys and torch.equal(random, torch.get_rng_state())
        with torch.no_grad():
            assert not torch.equal(small(calibration), original(calibration)), "a step with these arguments must do something"
        assert not {id(p) for p in small.parameters()} & {id(p) for p in original.parameters()}

    def test_same_seed_same_result(self, step: Step, original: nn.Module, calibration: Tensor) -> None:
        a = made(step, original, calibration)
        torch.manual_seed(99)
        b = step.apply(original, calibration)
        assert same(state(a), state(b))

    def test_survives_save_and_load_bit_for_bit(
        self, step: Step, original: nn.Module, calibration: Tensor, tmp_path: Path
    ) -> None:
        small = made(step, original, calibration)
        vt.save(small, tmp_path / "m.safetensors")
        again = vt.load(tmp_path / "m.safetensors", base=original)
        assert same(state(small), state(again))
        assert [s.to_dict() for s in history_of(again).steps()] == [step.to_dict()]
        with torch.no_grad():
            assert torch.equal(small(calibration), again(calibration))
        assert type(small) is type(original), "a slimmed model is still the model it was"

    def test_exports(self, step: Step, original: nn.Module, calibration: Tensor, tmp_path: Path) -> None:
        small = made(step, original, calibration)
        if getattr(small, "simulated", ""):
            with pytest.raises(vt.VitreousError, match="no runtime"):
                vt.ship(small, tmp_path / "m.xml", example=calibration[:4])
            return
        # OpenVINO's CPU plugin has no 64-bit integers, of which I-ViT is made.
        shipment = vt.ship(small, tmp_path / f"m.{'onnx' if step.name == 'quant.IViT' else 'xml'}", example=calibration[:4])
        agreement = shipment.parity.agreement  # None for features, which `ship` compares by their numbers
        assert step.name == "adapt.Embed" if agreement is None else agreement >= 0.75

    @pytest.mark.parametrize("partner", PARTNERS, ids=str)
    @pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
    def test_composes_or_says_why_not(
        self, step: Step, partner: Step, first: bool, original: nn.Module, calibration: Tensor, tmp_path: Path
    ) -> None:
        order = [step, partner] if first else [partner, step]
        try:
            small = slim(made(order[0], original, calibration), order[1], calibration)
        except vt.VitreousError as reason:
            assert len(str(reason)) > 40
            families = (step.family, partner.family)
            late = not first and step.family == "adapt" and partner.family in ("tokens", "quant")
            places = step.name == "adapt.HST" and partner.family == "tokens"  # its side network reads patches in their grid
            other = step.name in OTHERS and step.name != "adapt.HST"  # where there is no attention to cut
            assert step.family == partner.family or set(families) == {"prune", "quant"} or late or places or other
            return
        assert [s.name for s in history_of(small).steps()] == [s.name for s in order]
        with torch.no_grad():
            assert torch.isfinite(small(calibration)).all()
        vt.save(small, tmp_path / "m.safetensors")
        with torch.no_grad():
            assert torch.equal(vt.load(tmp_path / "m.safetensors", base=original)(calibration), small(calibration))

    def test_refuses_what_it_cannot_do(self, step: Step, calibration: Tensor) -> None:
        broken = small_vit()
        with torch.no_grad():
            next(broken.parameters()).fill_(float("nan"))
        with pytest.raises(vt.VitreousError, match="NaN"):
            step.apply(broken, calibration)
        if step.needs_calibration:
            with pytest.raises(vt.VitreousError, match="calibration"):
                step.apply(small_vit(), None)
            with pytest.raises(vt.VitreousError, match="NaN"):
                step.apply(small_vit(), calibration * float("nan"))

    def test_written_as_json_and_as_text(self, step: Step, original: nn.Module, calibration: Tensor) -> None:
        assert Recipe.from_json(Recipe((step,)).to_json()).steps == (step,)
        assert Recipe.parse(str(step)).steps == (step,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("3", "must be a list"),
        ('[{"keep": 0.7}]', "must be a list of objects"),
        ('[{"step": "tokens.EVit2"}]', "did you mean .*EViT"),
        ('[{"step": "EViT", "kep": 0.7}]', "no parameter 'kep'; did you mean keep"),
        ('[{"step": "EViT", "keep": "much"}]', "'keep' must be float, not 'much'"),
        ('[{"step": "EViT", "at": [1, "2"]}]', "'at' must be"),
        ('[{"step": "ToMe", "r": true}]', "'r' must be int"),
        ('[{"step": "EViT", "keep": 2.0}]', "keep must lie in"),
    ],
)
def test_wrong_recipes(text: str, message: str) -> None:
    with pytest.raises(vt.VitreousError, match=message):
        Recipe.from_json(text)


WRONG_TEXTS = {
    "EViT(": "cannot read",
    "EViT(0.7)": "name each parameter",
    "EViT(keep=__import__('os'))": "plain values",
    "Nothing()": "unknown step",
    "EViT] + [RepQ": "a bracket closes",
    "EViT], [RepQ": "a bracket closes",
    "EViT][0:1": "a bracket closes",
    "EViT(name=1)": "no parameter 'name'",
    "EViT(self=1)": "no parameter 'self'",
    "EViT(keep=0.5, keep=0.7)": "'keep' is given twice",
    "EViT(**{'keep': 0.5})": "name each parameter",
    "EViT(*[0.5])": "name each parameter",
    "EViT(keep={[]: 1})": "plain values",
    "EViT(keep=1e999)": "finite",
    "EViT(keep=-1e999)": "finite",
    f"EViT(keep={'9' * 30})": "finite",
    f"EViT(keep={'9' * 400})": "finite",
    f"EViT(keep={'9' * 5000})": "cannot read",
    f"EViT(at=({'9' * 30},))": "must be",
    f"ToMe(r={'9' * 30})": "finite",
    "ToMe(r=True)": "must be int",
    "WeightOnly(bits=8.0)": "must be",
    "EViT(keep=1j)": "must be float",
    "EViT(keep=b'x')": "must be float",
    "EViT\0": "cannot read",
    "\ud800": "cannot read|unknown",
    "x" * 300: "unknown step",
    f"EViT({'k' * 300}=1)": "no parameter",
    "(" * 5000: "cannot read",
    "[" * 150 + "]" * 150: "unknown step",
    "-" * 5000 + "1": "cannot read",
    "1 if": "cannot read",
    "lambda: 1": "unknown step",
    "EViT()()": "unknown step",
    "x := 1": "cannot read|unknown",
    "1is 2": "unknown step",
}


@pytest.mark.parametrize("text", WRONG_TEXTS, ids=lambda text: repr(text[:20]))
@pytest.mark.filterwarnings("error")
def test_wrong_step_texts(text: str) -> None:
    with pytest.raises(vt.VitreousError, match=WRONG_TEXTS[text]) as caught:
        Recipe.parse(text)
    assert len(str(caught.value)) < 1500


def test_recipes_that_are_no_recipes(tmp_path: Path) -> None:
    odd = {
        "nul": b'[{"step": "tokens.EViT\\u0000"}]',
        "not utf-8": b"\xff\xfe\x00",
        "deep": b"[" * 100_000,
        "twice": b'[{"step": "EViT", "keep": 0.5, "keep": 0.7}]',
        "name": b'[{"step": "EViT", "name": 1}]',
        "not a number": b'[{"step": "EViT", "keep": NaN}]',
        "digits": b'[{"step": "EViT", "keep": ' + b"9" * 5000 + b"}]",
        "long": b" " * 2_000_000,
        "empty": b"",
    }
    for name, content in odd.items():
        (tmp_path / name).write_bytes(content)
    for path in (*(tmp_path / name for name in odd), tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300), "/dev/zero"):
        with pytest.raises(vt.VitreousError):
            Recipe.read(path)
    (tmp_path / "marked").write_text('[{"step": "EViT", "keep": 0.5}]', encoding="utf-8-sig")
    assert str(Recipe.read(tmp_path / "marked")) == "tokens.EViT(keep=0.5)"
    assert Recipe.parse("EViT(keep=1), ToMe(r=2)").steps == (make_step("EViT", keep=1.0), make_step("ToMe", r=2))
    assert Recipe.parse("").steps == ()


def test_slim_tells_its_progress_and_takes_an_empty_recipe(vit: nn.Module, images: Tensor) -> None:
    told: list[tuple[str, float]] = []
    slim(vit, [make_step("EViT", keep=0.9), make_step("Heads")], images, lambda s, f: told.append((s, f)))
    assert told == [
        ("tokens.EViT(keep=0.9)", 0.0),
        ("tokens.EViT(keep=0.9)", 1.0),
        ("prune.Heads()", 0.0),
        ("prune.Heads()", 1.0),
    ]
    copied = slim(vit, [])
    assert copied is not vit and same(state(copied), state(vit))


class TestFiles:
    def test_positions_of_a_checkpoint_are_resampled_to_another_size(self, tmp_path: Path) -> None:
        small = dict(embed_dim=32, depth=1, num_heads=2, patch_size=8, num_classes=3)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, **small)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        wide = vt.open("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pt", img_size=(32, 64), **small)
        assert wide.pos_embed.shape == (1, 33, 32) and torch.equal(wide.pos_embed[:, 0], model.pos_embed[:, 0])
        halved = wide.pos_embed[0, 1:].unflatten(0, (16, 2)).mean(1)
        assert (halved - model.pos_embed[0, 1:]).norm() < 0.3 * halved.norm()
        with pytest.raises(vt.VitreousError, match="do not fit"):
            vt.open("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pt", img_size=64, **(small | {"embed_dim": 64}))

    def test_position_of_a_class_token_that_comes_last_is_not_resampled(self, tmp_path: Path) -> None:
        small = dict(embed_dim=32, depth=1, num_heads=2, patch_size=8, num_classes=3)
        model = vt.open("illama_tiny", img_size=32, **small)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        large = vt.open("illama_tiny", checkpoint=tmp_path / "w.pt", img_size=64, **small)
        assert large.pos_embed.shape == (1, 65, 32) and torch.equal(large.pos_embed[:, -1], model.pos_embed[:, -1])
        quarter = large.pos_embed[0, :-1].reshape(4, 2, 4, 2, 32).mean((1, 3)).flatten(0, 1)
        assert (quarter - model.pos_embed[0, :-1]).norm() < 0.3 * quarter.norm()

    def test_bundled_model_round_trip(self, tmp_path: Path) -> None:
        model = vt.open()
        small = slim(model, make_step("EViT"))
        vt.save(small, tmp_path / "s.safetensors")
        x = torch.randn(2, 1, 28, 28)
        with torch.no_grad():
            assert torch.equal(vt.load(tmp_path / "s.safetensors")(x), small(x))
            assert torch.equal(vt.open(tmp_path / "s.safetensors")(x), small(x))

    def test_timm_name_with_arguments(self, tmp_path: Path) -> None:
        model = vt.open("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
        vt.save(model, tmp_path / "m.safetensors")
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(vt.load(tmp_path / "m.safetensors")(x), model(x))

    def test_half_precision_stays(self, vit: nn.Module, tmp_path: Path) -> None:
        half = copy.deepcopy(vit).bfloat16()
        vt.save(slim(half, make_step("EViT")), tmp_path / "m.safetensors")
        again = vt.load(tmp_path / "m.safetensors", base=vit)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}

    def test_unknown_names(self) -> None:
        with pytest.raises(vt.VitreousError, match="did you mean deit_small_patch16_224"):
            vt.open("deit_smal_patch16_224")

    def test_checkpoints(self, tmp_path: Path) -> None:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
        torch.save({"model": model.state_dict()}, tmp_path / "good.pth")
        torch.save(model, tmp_path / "pickled.pth")
        torch.save({"model": {"a": 1}}, tmp_path / "empty.pth")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:1000])
        (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
        arguments = {"img_size": 32, "depth": 1, "num_classes": 4}
        opened = vt.open("vit_tiny_patch16_224", checkpoint=tmp_path / "good.pth", **arguments)
        assert same(state(opened), state(model))
        for name, message in [
            ("pickled.pth", "pickled code"),
            ("empty.pth", "no state dict"),
            ("cut.pth", "not a whole"),
            ("cut.safetensors", "not a whole safetensors"),
            ("absent.pth", "there is no file"),
        ]:
            with pytest.raises(vt.VitreousError, match=message):
                vt.open("vit_tiny_patch16_224", checkpoint=tmp_path / name, **arguments)
        with pytest.raises(vt.VitreousError, match=r"do not fit.*another shape.*head"):
            vt.open("vit_tiny_patch16_224", checkpoint=tmp_path / "good.pth", img_size=32, depth=1, num_classes=5)
        with pytest.raises(vt.VitreousError, match=r"do not fit.*missing"):
            vt.open("vit_tiny_patch16_224", checkpoint=tmp_path / "good.pth", img_size=32, depth=2, num_classes=4)
        bad = {k: v * float("nan") if "head" in k else v for k, v in model.state_dict().items()}
        torch.save(bad, tmp_path / "nan.pth")
        with pytest.raises(vt.VitreousError, match=r"head.* holds NaN"):
            vt.open("vit_tiny_patch16_224", checkpoint=tmp_path / "nan.pth", **arguments)

    def test_damaged_recipe_and_missing_base(self, vit: nn.Module, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        vt.save(vit, tmp_path / "m.safetensors")
        with pytest.raises(vt.VitreousError, match="pass the original model as base"):
            vt.load(tmp_path / "m.safetensors")
        save_file(state(vit), tmp_path / "plain.safetensors")
        with pytest.raises(vt.VitreousError, match="no recipe"):
            vt.load(tmp_path / "plain.safetensors")
        save_file(state(vit), tmp_path / "odd.safetensors", {"vitreous": json.dumps({"base": None, "steps": [{}]})})
        with pytest.raises(vt.VitreousError, match="cannot be read"):
            vt.load(tmp_path / "odd.safetensors")

    def test_a_failed_write_leaves_the_old_file(self, vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "m.safetensors"
        path.write_bytes(b"old")

        def full(self: Path, content: bytes) -> int:
            self.open("wb").write(content[:100])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(vt.VitreousError, match="No space left"):
            vt.save(vit, path)
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_only_the_first_step_of_several_copies_the_model(monkeypatch: pytest.MonkeyPatch, vit: nn.Module, images: Tensor) -> None:
    """What one step made belongs to nobody else: another copy would be another set of weights in memory."""
    real, copied = vitreous.steps.bare, []
    monkeypatch.setattr(vitreous.steps, "bare", lambda model: (copied.append(model), real(model))[1])
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    together = slim(vit, [EViT(keep=0.5), Heads(share=0.3), RepQ()], images)
    assert copied == [vit] and all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    monkeypatch.undo()
    apart = slim(slim(slim(vit, EViT(keep=0.5)), Heads(share=0.3), images), RepQ(), images)
    torch.testing.assert_close(together(images), apart(images))
