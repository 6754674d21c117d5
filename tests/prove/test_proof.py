import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vitreous.errors import VitreousError
from vitreous.prove import Interval, Proof, prove, verdict
from vitreous.prove.drift import total_variation
from vitreous.prove.verdict import _accuracy, _speed


class Fixed(nn.Module):
    """Answers class `answers[i]` for the image whose pixels are `i`."""

    def __init__(self, answers):
        super().__init__()
        self.register_buffer("answers", torch.tensor(answers))

    def forward(self, x):
        return 5 * nn.functional.one_hot(self.answers[x[:, 0, 0, 0].long()], 3).float()


def flat(model, x):
    return torch.ones(len(x), 2, 2)


def numbered(n):
    return torch.arange(n).float().reshape(n, 1, 1, 1).expand(n, 1, 2, 2)


def test_answers_by_hand(quick):
    truth = [0, 0, 0, 1, 1, 1, 2, 2]
    before = [0, 0, 1, 1, 1, 1, 2, 0]
    after = [0, 1, 0, 1, 0, 0, 2, 1]

    class Toys:
        name, classes, skipped, note = "toys", ("cup", "ball", "car"), [], "few"

        def __len__(self):
            return 8

        def batches(self, size):
            yield numbered(8)[:5], torch.tensor(truth[:5])
            yield numbered(8)[5:], np.array(truth[5:])

    proof = prove({"before": Fixed(before), "after": Fixed(after)}, Toys(), explain=flat, **quick)
    a = proof["after"].answers
    assert proof["before"].answers.accuracy.value == 6 / 8
    assert a.accuracy.value == 4 / 8
    assert (a.lost, a.gained) == (3, 1)
    assert a.difference.value == -2 / 8
    assert a.mcnemar == pytest.approx(2 * (1 + 4) / 2**4)
    assert a.agreement.value == 3 / 8
    assert [(c.name, c.images, c.before, c.after) for c in a.classes] == [
        ("ball", 3, 1.0, pytest.approx(1 / 3)),
        ("cup", 3, pytest.approx(2 / 3), pytest.approx(2 / 3)),
        ("car", 2, 0.5, 0.5),
    ]
    assert [c.index for c in a.changed] == [1, 2, 4, 5, 7]
    first = a.changed[0]
    assert (first.label, first.before.name, first.after.name) == ("cup", "cup", "ball")
    assert first.before.probability == pytest.approx(np.exp(5) / (np.exp(5) + 2))
    assert (proof.data, proof.images, proof.note) == ("toys", 8, "few")


def test_a_shuffling_iterable_is_still_paired(vit, explain, quick):
    class Shuffled:
        def __iter__(self):
            for _ in range(3):
                yield torch.randn(8, 3, 32, 32), None

    proof = prove({"a": vit, "b": copy.deepcopy(vit)}, Shuffled(), explain=explain, **quick)
    assert proof["b"].answers.agreement.value == 1.0
    assert proof["b"].answers.features.worst == 0.0
    assert proof["b"].answers.accuracy is None


def test_same_model_has_no_drift_and_no_damage(vit, images, explain, quick):
    proof = prove({"a": vit, "b": copy.deepcopy(vit)}, images, explain=explain, **quick)
    drift = proof["b"].drift
    assert drift.total_variation.value == drift.total_variation.high == 0
    assert drift.rank_correlation.value == pytest.approx(1)
    assert drift.images == 40
    assert proof["b"].answers.difference.value == 0 and proof["b"].answers.changed == []
    assert proof["a"].drift is None and proof["a"].drift_missing is None


def test_drift_is_the_share_that_moved(vit, images, quick):
    left, right = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    other = copy.deepcopy(vit)
    proof = prove(
        {"a": vit, "b": other},
        images,
        explain=lambda model, x: (left if model is vit else right).expand(len(x), 1, 2),
        **quick,
    )
    assert proof["b"].drift.total_variation.value == pytest.approx(0.25)
    assert proof["b"].drift.rank_correlation is None  # a constant heatmap has no ranks
    assert total_variation(np.array([[[1.0, 0.0]]]), np.array([[[0.0, 5.0]]])) == 1.0
    assert total_variation(np.zeros((1, 1, 4)), np.array([[[2.0, 0, 0, 0]]])) == 0.75  # what says nothing is uniform


def test_drift_in_ranks_asks_for_the_order_alone(vit, images, quick):
    even, steep = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0, 999.0]])
    models = {"a": vit, "b": copy.deepcopy(vit)}
    proof = prove(models, images, explain=lambda model, x: (even if model is vit else steep).expand(len(x), 1, 4), **quick)
    assert proof["b"].drift.rank_correlation.value == pytest.approx(1)


def test_why_there_is_no_drift_is_kept(vit, other, images, explain, quick):
    def fussy(model, x):
        if model is other:
            raise VitreousError("no attention in block 1")
        return explain(model, x)

    proof = prove({"a": vit, "b": other, "shipped": lambda x: vit(x)}, images, explain=fussy, **quick)
    assert proof["b"].drift is None and proof["b"].drift_missing == "no attention in block 1"
    assert "no attention" in proof["shipped"].drift_missing
    json.dumps(proof.to_dict(), allow_nan=False)


def test_verdict_of_a_shipped_file_tells_the_drift_of_what_it_came_from(vit, other, images, explain, quick):
    proof = prove({"a": vit, "slim": other, "slim.onnx": lambda x: other(x)}, images, explain=explain, **quick)
    for measured in proof["slim.onnx"].latency:
        measured.__dict__["ratio"] = Interval(99.0, 98.0, 100.0)
    proof = dataclasses.replace(proof, load=0.5)
    said = verdict(proof)
    assert said.model.name == "slim.onnx" and "99 times" in said.headline
    assert "attention of “slim” moved" in said.sentences[-1]
    # Narrow as the interval is: threads that wait for each other on a full machine are late by the same time every round.
    full = dataclasses.replace(proof, load=3.0 * int(proof.machine["cores"]))
    assert "99" not in verdict(full).headline and "cannot be told" in verdict(full).headline
    assert "No speed can be told" in str(full) and "No speed can be told" not in str(proof)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([(3.0, 2.9, 3.1)], "3.0 times the speed"),
        ([(2.0, 1.9, 2.1), (4.0, 3.9, 4.1)], "2.0 to 4.0 times the speed"),
        ([(2.4, 2.0, 2.9)], "2 times the speed"),
        ([(2.4, 2.0, 3.1)], "2.0 to 3 times the speed, on a busy machine"),
        ([(3.0, 2.9, 3.1), (1.2, 0.9, 1.5)], "speed cannot be told on this busy machine"),
        ([(1.05, 0.95, 1.1), (0.98, 0.9, 1.05)], "as fast, as far as can be told"),
        ([(1.05, 0.95, 1.1), (1.2, 1.1, 1.3)], "1.1 to 1.2 times the speed"),
    ],
)
def test_speed_is_said_no_more_exactly_than_it_is_known(ratios, said):
    assert _speed([Interval(*r) for r in ratios]) == said


@pytest.mark.parametrize(("low", "high", "meaning"), [
    (0.001, 0.02, "a real gain"), (-0.02, -0.001, "a real loss"),
    (-0.001, 0.02, "which 800 images cannot tell from no change"), (-0.02, 0.001, "which 800 images cannot tell from no change"),
])  # fmt: skip
def test_a_change_of_accuracy_is_real_when_its_interval_leaves_out_zero(low, high, meaning):
    accuracy, difference = Interval(0.8, 0.77, 0.83), Interval((low + high) / 2, low, high)
    _accuracy(
        SimpleNamespace(answers=SimpleNamespace(accuracy=accuracy, difference=difference, lost=9, gained=9)), 800, said := []
    )
    assert f"), {meaning}: " in said[0]


def test_threads_of_a_runtime_are_its_own(vit, images, explain, quick):
    def shipped(x):
        return vit(x)

    shipped.threads = 7
    proof = prove({"a": vit, "b": shipped}, images, explain=explain, threads=1, **quick)
    assert (proof.threads, proof["a"].threads, proof["b"].threads) == (1, 1, 7)


def test_simulated_is_never_timed(vit, other, images, explain, quick):
    calls = []

    def shipped(x):
        calls.append(len(x))
        return vit(x)

    shipped.simulated = True
    other.head.vitreous_simulated = "no 4 bit kernel"  # deep inside, and wrapped once more
    wrapped = nn.Sequential(other)
    explain_inner = lambda model, x: explain(model[0] if isinstance(model, nn.Sequential) else model, x)
    proof = prove({"a": vit, "b": wrapped, "c": shipped}, images, explain=explain_inner, **quick)
    assert proof["b"].simulated == "no 4 bit kernel" and proof["c"].simulated
    assert proof["b"].latency == proof["c"].latency == []
    assert proof["a"].latency
    assert sum(calls) == 40  # the accuracy pass, nothing more
    assert str(proof).count("simulated") == 4
    assert "simulat" in " ".join(verdict(proof).sentences)


def test_nan_is_refused_by_name_and_place(vit, images, explain, quick):
    def sick(x):
        out = vit(x).clone()
        if x[0, 0, 0, 0] == images[0][32, 0, 0, 0]:
            out[3, 1] = float("nan")
        return out

    batches = list(zip(images[0].split(16), images[1].split(16), strict=True))
    with pytest.raises(VitreousError, match=r"'sick' gives NaN .* 1 of 8 images in batch 2, the first is image 35"):
        prove({"a": vit, "sick": sick}, batches, explain=explain, **quick)


def test_masked_classes_are_not_nan(vit, images, explain, quick):
    def masked(x):
        return vit(x).index_fill(1, torch.tensor([4]), float("-inf"))

    assert prove({"a": vit, "b": masked}, images, explain=explain, **quick)["b"].answers.accuracy


def test_features_of_a_model_that_embeds(vit, images, explain, quick):
    vit.reset_classifier(0)
    turned = lambda x: vit(x) * 1.1
    proof = prove({"a": vit, "b": turned}, images, explain=explain, **quick)  # labels are there, and left aside
    found = proof["b"].answers
    assert found.accuracy is None and found.agreement is None and found.changed == []
    assert found.features.mean == pytest.approx(0.1, rel=1e-4) and found.features.worst == pytest.approx(0.1, rel=1e-4)
    assert found.features.worst_cosine == pytest.approx(1)
    assert len(found.features.errors) == 40
    assert "output error" in str(proof)


def test_threads_and_modes_are_put_back(vit, images, explain, quick):
    seen = set()
    before = torch.get_num_threads()

    def watching(x):
        seen.add(torch.get_num_threads())
        return vit(x)

    vit.train()
    vit.blocks[0].eval()
    torch.set_num_threads(before + 1)
    proof = prove({"a": vit, "b": watching}, images, explain=explain, threads=1, **quick)
    back = torch.get_num_threads()
    torch.set_num_threads(before)
    assert seen == {1} and proof.threads == 1
    assert back == before + 1
    assert vit.training and vit.blocks[1].training and not vit.blocks[0].training


def test_json_round_trip(vit, other, images, explain, tmp_path, quick):
    proof = prove({"a": vit, "b": other}, images, explain=explain, **quick)
    proof["b"].cost.__dict__["macs"] = np.int64(5)
    proof["b"].latency[0].samples.append(float("nan"))
    path = tmp_path / "proof.json"
    proof.save(path)
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == proof.to_dict()
    b = read["models"][1]
    assert b["cost"]["macs"] == 5 and b["latency"][0]["samples"][-1] is None
    assert b["answers"]["difference"]["value"] == proof["b"].answers.difference.value
    assert len(b["latency"][1]["samples"]) == 5
    assert {"cpu", "cores", "system", "python", "versions"} <= set(read["machine"])
    assert {"torch", "timm", "openvino", "onnxruntime", "numpy"} <= set(read["machine"]["versions"])
    assert read["date"] and read["seed"] == 0 and read["threads"] == torch.get_num_threads()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(vit, images, explain, tmp_path, quick):
    proof = prove({"a": vit}, images, explain=explain, **quick)
    with pytest.raises(VitreousError, match="cannot write"):
        proof.save(tmp_path / "missing" / "proof.json")
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(VitreousError, match="is a folder"):
        proof.save(taken)
    assert list(tmp_path.iterdir()) == [taken]


def test_table_has_every_measure(vit, other, images, explain, quick):
    proof = prove({"before": vit, "after": other}, images, explain=explain, **quick)
    text = str(proof)
    for label in (
        "accuracy",
        "Δ accuracy",
        "agreement",
        "ms / image, b1",
        "speed, b4",
        "parameters",
        "MACs",
        "size",
        "drift",
    ):
        assert label in text, label
    assert "553 k" in text and "40 images" in text


def test_progress_names_the_tasks_and_ends_full(vit, images, explain, quick):
    said = []
    prove({"a": vit}, images, explain=explain, progress=lambda task, f: said.append((task, f)), **quick)
    assert list(dict.fromkeys(task for task, _ in said)) == ["accuracy", "cost", "attention drift", "latency"]
    last = dict(said)
    assert all(f == 1 for f in last.values()) and all(0 <= f <= 1 for _, f in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(models={}), "nothing to prove"),
        (dict(batches=()), "batches"),
        (dict(batches=(0,)), "batches"),
        (dict(threads=0), "threads"),
        (dict(data=[]), "no images"),
        (dict(data=[torch.zeros(2, 3, 32, 32)]), r"\(images, labels\)"),
        (dict(data=(torch.zeros(2, 3, 32), None)), r"\[B, C, H, W\]"),
        (dict(data=(torch.zeros(2, 3, 32, 32), torch.tensor([0, 9]))), "below 5"),
        (dict(data=(torch.zeros(2, 3, 30, 30), None)), "'vit' fails on images of shape"),
        (dict(models={"odd": lambda x: {"logits": "cat"}}), "'odd' gives"),
    ],
)
def test_bad_input(vit, images, explain, change, message, quick):
    given = dict(models={"vit": vit}, data=images, explain=explain) | quick | change
    with pytest.raises(VitreousError, match=message):
        prove(given.pop("models"), given.pop("data"), **given)


def test_models_that_do_not_pair(vit, images, explain, quick):
    with pytest.raises(VitreousError, match="'b' has 3 outputs and 'a' has 5"):
        prove({"a": vit, "b": lambda x: vit(x)[:, :3]}, images, explain=explain, **quick)


def test_one_model_alone(vit, images, explain, quick):
    proof = prove({"a": vit}, images, explain=explain, **quick)
    assert isinstance(proof, Proof) and "alone" in verdict(proof).headline
