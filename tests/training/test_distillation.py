"""Teachers: what a student learns of them, and that a run with teachers stops, resumes and leaves files as any other does."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from hyperfaiss.errors import InvalidParameterError
from tests.training.test_train import (
    CONFIG,
    LABELS,
    D,
    NoisyViews,
    assert_same,
    state,
    stopped_and_resumed,
    without_seconds,
    written,
)
from training.checkpoint import Checkpoint
from training.distillation import Student, Teacher, finish_codewords
from training.losses import distillation_loss
from training.model import HiHPQ
from training.recipes import recipe
from training.train import TrainingInterrupted, train

TAUGHT = CONFIG.replace(teachers=2, teacher_bits=16, tau_teacher=0.2, epochs=3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(NoisyViews(), TAUGHT, tmp_path_factory.mktemp("taught"), labels=LABELS, progress=False)


def test_the_loss_is_the_formula():
    rng = np.random.default_rng(0)
    student, teachers = rng.uniform(0, 2, size=(2, 5, 5))
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        p = np.exp(-teachers[i, others] / 0.1)
        q = np.exp(-student[i, others] / 0.3)
        expected -= (p / p.sum()) @ np.log(q / q.sum()) / 5
    found = distillation_loss(torch.from_numpy(student), torch.from_numpy(teachers), 0.3, 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_least_where_the_student_agrees():
    teachers = torch.from_numpy(np.random.default_rng(1).uniform(0, 2, size=(6, 6)))
    distances = (3 * teachers).requires_grad_()  # over three times the temperature
    loss = distillation_loss(distances, teachers, 0.6, 0.2)
    (gradient,) = torch.autograd.grad(loss, distances)
    assert gradient.abs().max() < 1e-12
    assert distillation_loss(2 * teachers, teachers, 0.6, 0.2) > loss


@pytest.mark.parametrize("changes", [{}, {"asymmetric": True}, {"geometry": "cosine"}])
def test_a_student_compares_views_where_its_teachers_compare_items(changes):
    torch.manual_seed(0)
    config = TAUGHT.replace(**changes)
    models = [HiHPQ(D, config.replace(M=4, teachers=0)) for _ in range(2)]
    x = NoisyViews().features()
    teachers = [Teacher.of(model, x) for model in models]
    student = Student(D, config, teachers=teachers)
    batch = np.arange(6)
    view1, view2, partners = NoisyViews().views(batch, np.random.default_rng(0))
    items = np.concatenate([batch, partners])
    views = torch.cat([view1, view2])
    points = student.points(student.tangents(views))
    quantized = student.quantize(points)
    distances = student.space.distances(points if config.asymmetric else quantized, quantized)
    theirs = [m.eval().space.distances(p, p) for m in models for p in [m.points(m.tangents(torch.from_numpy(x[items])))]]
    expected = distillation_loss(distances, (theirs[0] + theirs[1]) / 2, config.tau_qc, config.tau_teacher)
    total = student(view1, view2, items=torch.from_numpy(items))["total"]
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)

    total.backward()
    assert all(p.grad is not None for p in student.parameters() if p is not student.log_theta)
    assert all(p.grad is None for model in models for p in model.parameters())
    assert student.state_dict().keys() == HiHPQ(D, config).state_dict().keys()


def test_teachers_are_runs_of_their_own_and_the_student_learns_from_them(undisturbed):
    folders = sorted((undisturbed.out / "teachers").iterdir())
    configs = [recipe(folder / "config.json") for folder in folders]
    assert {(c.M, c.teachers, c.epochs) for c in configs} == {(4, 0, 3)}
    assert len({TAUGHT.seed, *(c.seed for c in configs)}) == 3
    alone = train(NoisyViews(), configs[0], labels=LABELS, progress=False)
    assert_same(state(alone), {k: v.clone() for k, v in Checkpoint.load(folders[0]).build().state_dict().items()})

    totals = [row["total"] for row in undisturbed.history]
    assert totals[-1] < totals[0]
    assert set(undisturbed.history[0]) & {"contrastive", "prototype", "instance"} == set()
    assert undisturbed.hierarchy is not None  # for the exported model
    assert undisturbed.checkpoint.build().config == TAUGHT


# Each epoch is 4 steps and a call for the validation's views: the first teacher has calls 1 to 15, the student the last.
@pytest.mark.parametrize("call", [7, 15, 16, 30, 38])
def test_resuming_is_exact_wherever_it_was_stopped(call, undisturbed, tmp_path):
    comp = stopped_and_resumed(TAUGHT, call, tmp_path)
    assert_same(state(comp), state(undisturbed))
    assert without_seconds(comp.history) == without_seconds(undisturbed.history)


def test_runs_share_teachers(undisturbed, tmp_path):
    school = undisturbed.out / "teachers"
    before = written(school)
    assert sum(path.name == "best.pt" for path in before) == 2
    smaller = train(NoisyViews(), TAUGHT.replace(M=1), tmp_path, labels=LABELS, teachers=school, progress=False)
    assert written(school) == before
    assert not (tmp_path / "teachers").exists()
    alone = train(NoisyViews(), TAUGHT.replace(M=1), labels=LABELS, progress=False)
    assert_same(state(smaller), state(alone))
    with pytest.raises(InvalidParameterError, match="trained on other data"):
        train(NoisyViews(seed=1), TAUGHT.replace(M=1), tmp_path / "other", labels=LABELS, teachers=school, progress=False)


def test_each_model_trains_the_backbone_from_where_it_was():
    def source():
        torch.manual_seed(0)
        return NoisyViews(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(D, D)))

    config = TAUGHT.replace(epochs=1, teachers=1, lr_backbone=0.1, lr_codebook=0)
    seen = []
    whole = source()
    start = whole.backbone[1].weight.clone()
    whole.after, whole.action = 6, lambda: seen.append(whole.backbone[1].weight.clone())  # the student's first batch
    train(whole, config, progress=False)
    assert torch.equal(seen[0], start)
    assert not torch.equal(whole.backbone[1].weight, start)


def test_a_teachers_configuration():
    assert TAUGHT.teacher(7) == CONFIG.replace(epochs=3, M=4, seed=7, teacher_bits=16, tau_teacher=0.2)
    assert TAUGHT.replace(nbits=5).teacher(7).M == 4  # 16 bits and no fewer
    with pytest.raises(InvalidParameterError, match="teachers are for HiHPQ, got 2 of 'spq'"):
        TAUGHT.replace(method="spq")


FINISHED = CONFIG.replace(refit=True, finish_steps=20, epochs=2, val_fraction=0)


def test_a_last_phase_teaches_codewords_of_hard_codes():
    model = train(NoisyViews(), FINISHED.replace(finish_steps=0), progress=False).model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = NoisyViews().features()
    own = Teacher.of(model, x)

    def loss():
        codebooks = model.codebooks()
        codes = model.space.to_codewords(own.points, codebooks).argmin(-1)
        hard = torch.stack([book[code] for book, code in zip(codebooks, codes, strict=True)], dim=1)
        theirs = own.distances(torch.arange(len(x)))
        distances = model.space.distances(own.points, hard)
        return float(distillation_loss(distances, theirs, FINISHED.tau_qc, FINISHED.tau_teacher).detach())

    first, losses = loss(), []
    finish_codewords(
        model, [own], model.encode(x), np.arange(len(x)), steps=20, rng=np.random.default_rng(0), after_step=losses.append
    )
    assert len(losses) == 20
    assert losses[0] == pytest.approx(first, rel=1e-5)  # of all items: there are fewer than a step draws
    assert loss() < first - 0.01
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == ["codewords"]


def test_a_last_phase_that_was_stopped_starts_anew(tmp_path, monkeypatch):
    undisturbed = train(NoisyViews(), FINISHED, tmp_path / "one", progress=False)
    plain = train(NoisyViews(), FINISHED.replace(finish_steps=0), progress=False)
    changed = [name for name, tensor in state(plain).items() if not torch.equal(tensor, state(undisturbed)[name])]
    assert changed == ["codewords"]

    calls = iter(range(100))
    distances = Teacher.distances

    def stopping(teacher, items):
        if next(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return distances(teacher, items)

    monkeypatch.setattr(Teacher, "distances", stopping)
    with pytest.raises(TrainingInterrupted, match="stopped in the last phase, which will start anew; saved"):
        train(NoisyViews(), FINISHED, tmp_path / "two", progress=False)
    assert not (tmp_path / "two" / "summary.json").exists()
    resumed = train(NoisyViews(), None, tmp_path / "two", resume=True, progress=False)
    assert_same(state(resumed), state(undisturbed))
    assert resumed.hierarchy.sizes == undisturbed.hierarchy.sizes


def test_what_a_last_phase_is_for():
    with pytest.raises(InvalidParameterError, match="finish_steps starts from a refit, got 5 with refit = False"):
        CONFIG.replace(finish_steps=5)
    assert FINISHED.teacher(7).finish_steps == 0  # nobody searches a teacher's codes
