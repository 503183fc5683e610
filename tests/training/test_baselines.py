"""The baselines against their papers' formulas written out in float64 loops, and what each promises beside its loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from tests import naive_training as naive
from training.baselines import bihalf, mecoq
from training.baselines.bihalf import bi_half, similarity_loss
from training.baselines.cibhash import BETA, draw_bits
from training.baselines.hamming import HammingIndex
from training.baselines.mecoq import debiased_loss
from training.checkpoint import load_state, state_of
from training.config import TrainConfig
from training.methods import build
from training.train import train
from training.views import EmbeddingViews

M, DSUB, D_IN, B = 2, 3, 6, 5


def config(method, **changes):
    fields = {"M": M, "nbits": 4, "dsub": DSUB, "hidden": 7, "tau": 0.15, "tau_qc": 0.4, "batch_size": B, "epochs": 4}
    return TrainConfig(method=method, **(fields | changes))


def model_of(method, **changes):
    torch.manual_seed(0)
    model = build(D_IN, config(method, **changes)).double()
    model.fit_inputs(items(30))
    return model


def items(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, D_IN)).astype(np.float32)


def views(seed=1, n=B):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(2, n, D_IN)))


def outputs(model, batch):
    """The head's outputs, as lists."""
    with torch.no_grad():
        return [model.tangents(view).tolist() for view in batch]


def parts(row):
    return [row[m * DSUB : (m + 1) * DSUB] for m in range(M)]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def unit(x):
    return [a / math.sqrt(dot(x, x)) for a in x]


def cosine(x, y):
    return dot(unit(x), unit(y))


def mixture(weights, codewords):
    return [sum(w * c[i] for w, c in zip(weights, codewords, strict=True)) for i in range(DSUB)]


# ---------------------------------------------------------------------------------------------- SPQ


def spq_quantized(model, row):
    out = []
    for part, book in zip(parts(row), model.codewords.tolist(), strict=True):
        squared = [sum((a - b) ** 2 for a, b in zip(part, c, strict=True)) for c in book]
        out += mixture(naive.softmax([-s / model.config.tau for s in squared]), book)
    return out


def test_spq_equals_the_formula():
    model, batch = model_of("spq"), views()
    with torch.no_grad():
        model.codewords.mul_(torch.rand(model.codewords.shape[:2])[..., None] + 0.5)  # codewords have norms of their own
    x1, x2 = outputs(model, batch)
    z1, z2 = ([spq_quantized(model, row) for row in x] for x in (x1, x2))
    ref = 0.0
    for x, z in ((x1, z2), (x2, z1)):
        for n in range(B):
            powers = [math.exp(cosine(x[n], other) / model.config.tau_qc) for other in z]
            ref -= math.log(powers[n] / sum(powers)) / B
    assert model(*batch)["total"].item() == pytest.approx(ref, rel=1e-9)


# ---------------------------------------------------------------------------------------------- MeCoQ


def mecoq_codes(model, row):
    out = []
    for part, book in zip(parts(row), model.codewords.tolist(), strict=True):
        out.append(naive.softmax([dot(unit(part), c) / model.config.tau for c in book]))
    return out


def mecoq_reconstruction(model, codes):
    mixed = [mixture(p, book) for p, book in zip(codes, model.codewords.tolist(), strict=True)]
    return unit([a for part in mixed for a in part])


def naive_debiased(x, memory, tau, rho, broadcast=False):
    n = len(x)
    positive = [math.exp(dot(x[i], x[(i + n // 2) % n]) / tau) for i in range(n)]
    negatives = []
    for i in range(n):
        others = [x[j] for j in range(n) if j not in (i, (i + n // 2) % n)]
        negatives.append(sum(math.exp(dot(x[i], y) / tau) for y in others + memory))
    pairs = [(i, j) for i in range(n) for j in range(n) if broadcast or i == j]
    total = 0.0
    for i, j in pairs:
        estimate = (negatives[j] - rho * (n - 2) * positive[i]) / (1 - rho)
        estimate = max(estimate, (n - 2) * math.exp(-1 / tau))
        total -= math.log(positive[i] / (positive[i] + estimate))
    return total / len(pairs)


@pytest.mark.parametrize("quirks", [(), ("mecoq-broadcast",)])
@pytest.mark.parametrize("with_memory", [False, True])
def test_mecoq_equals_the_formulas(quirks, with_memory):
    model, batch = model_of("mecoq", quirks=quirks), views()
    model.after_step()  # codewords of unit norm in float64, too
    remembered = []
    if with_memory:
        earlier = views(seed=2, n=4)
        model(*earlier)
        model.after_step()
        model.start_epoch(2)  # of 4
        remembered = [mecoq_codes(model, row) for view in outputs(model, earlier) for row in view]
    codes = [mecoq_codes(model, row) for view in outputs(model, batch) for row in view]
    x, memory = ([mecoq_reconstruction(model, c) for c in some] for some in (codes, remembered))
    contrastive = naive_debiased(x, memory, model.config.tau_qc, mecoq.RHO, broadcast=bool(quirks))
    entropies = [-sum(a * math.log(a) for a in p) for row in codes for p in row]
    entropy = sum(entropies) / len(entropies)
    books = model.codewords.tolist()
    diversity = sum(dot(a, b) for book in books for a in book for b in book) / (M * len(books[0]) ** 2)
    comp = {name: loss.item() for name, loss in model(*batch).items()}
    ref = {"contrastive": contrastive, "entropy": entropy, "diversity": diversity}
    ref = {"total": contrastive + mecoq.LAMBDA * entropy + mecoq.GAMMA * diversity, **ref}
    assert list(comp) == list(ref)
    assert comp == pytest.approx(ref, rel=1e-9)


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("tau", [0.05, 0.4])
def test_debiased_loss_on_both_sides_of_its_floor(tau, broadcast):
    # At tau = 0.05 positives this close outweigh the negatives, and the floor holds; at 0.4 it doesn't.
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 8))
    x = [unit(list(r)) for r in (*rows, *(rows + 0.3 * rng.normal(size=(6, 8))))]
    memory = [unit(list(r)) for r in rng.normal(size=(7, 8))]
    ref = naive_debiased(x, memory, tau, 0.3, broadcast)
    at_floor = naive_debiased(x, memory, tau, 0.3 - 1e-6, broadcast) == pytest.approx(ref, rel=1e-12)
    comp = debiased_loss(torch.tensor(x).double(), torch.tensor(memory).double(), tau, 0.3, broadcast=broadcast)
    assert float(comp) == pytest.approx(ref, rel=1e-6)
    assert at_floor == (tau == 0.05)


def test_debiased_loss_is_finite_at_small_temperatures():
    x = torch.eye(4).repeat(2, 1).requires_grad_()  # exp(1 / 0.02) alone is 5e21, times the batch
    loss = debiased_loss(x, torch.eye(4), 0.02, 0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_the_quirk_freezes_the_codebooks_but_not_the_head():
    for quirks, trained in (((), True), (("mecoq-frozen-codebooks",), False)):
        model = model_of("mecoq", quirks=quirks)
        assert ("codebook" in {group for group, _ in model.groups()}) == trained
        model(*views())["total"].backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        assert "codewords" in state_of(model)  # or a resumed run would draw others


def test_diversity_spreads_codewords_and_they_stay_unit():
    model = model_of("mecoq")
    with torch.no_grad():
        model.codewords[:] = torch.nn.functional.normalize(model.codewords + 2, dim=-1)  # all to one side
    before = model(*views())["diversity"].item()
    for _ in range(20):
        model.zero_grad()
        model(*views())["diversity"].backward()
        with torch.no_grad():
            model.codewords -= 5 * model.codewords.grad
        model.after_step()
    assert model(*views())["diversity"].item() < 0.5 * before
    torch.testing.assert_close(model.codewords.norm(dim=-1), torch.ones(M, 16, dtype=torch.float64))


def test_memory_keeps_the_most_recent_codes(monkeypatch):
    monkeypatch.setattr(mecoq, "MEMORY", 8)
    model = model_of("mecoq")
    seen = []
    for step, n in enumerate([2, 2, 1, 7, 1]):  # 4, 4, 2, 14, 2 codes
        batch = views(seed=step, n=n)
        with torch.no_grad():
            model(*batch)
            seen += [model.codes(model.vectors(model.tangents(row[None])))[0] for view in batch for row in view]
        assert int(model.written) == len(seen) - 2 * n  # nothing is remembered before the step is done
        model.after_step()
        assert int(model.written) == len(seen)
        kept = min(len(seen), 8)
        comp = sorted(float(c[0, 0]) for c in model.memory[:kept])
        assert comp == pytest.approx(sorted(float(c[0, 0]) for c in seen[-kept:]))


def test_memory_serves_from_its_epoch_on_in_training_only():
    model = model_of("mecoq", epochs=10)
    model(*views())
    model.after_step()
    for epoch in range(10):
        model.start_epoch(epoch)
        assert len(model.train().remembered()) == (2 * B if epoch >= 3 else 0)
        assert len(model.eval().remembered()) == 0
    written = int(model.written)
    model(*views(seed=3))
    model.after_step()
    assert int(model.written) == written  # evaluation leaves no trace


def test_memory_is_reconstructed_by_the_codewords_of_the_moment():
    model = model_of("mecoq")
    model(*views())
    model.after_step()
    model.start_epoch(3)
    before = model.reconstruct(model.remembered())
    assert before.requires_grad
    with torch.no_grad():
        model.codewords[:] = model.codewords.flip(1)
    assert not torch.allclose(model.reconstruct(model.remembered()), before)


def test_a_state_dict_carries_the_memory():
    torch.manual_seed(0)
    one = build(D_IN, config("mecoq"))
    for step in range(3):
        one(*views(seed=step).float())
        one.after_step()
    two = build(D_IN, one.config)
    load_state(two, state_of(one))
    for model in (one, two):
        model.start_epoch(3)
    for step in range(3, 6):
        losses = []
        for model in (one, two):
            loss = model(*views(seed=step).float())["total"]
            losses.append(loss)
            model.after_step()
        assert losses[0].item() == losses[1].item()
    torch.testing.assert_close(one.memory, two.memory, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- CIBHash


def test_cibhash_equals_the_formulas():
    model, batch = model_of("cibhash"), views()
    logits = [row for view in outputs(model, batch) for row in view]
    p = [[1 / (1 + math.exp(-a)) for a in row] for row in logits]
    torch.manual_seed(3)
    comp = {name: loss.item() for name, loss in model(*batch).items()}
    torch.manual_seed(3)
    u = torch.rand(2 * B, 8, dtype=torch.float64).tolist()
    codes = [[1 if a > b else -1 for a, b in zip(*rows, strict=True)] for rows in zip(p, u, strict=True)]
    contrastive = naive.contrastive([[-cosine(a, b) for b in codes] for a in codes], model.config.tau_qc)

    def kl(one, two):
        return sum(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(one, two, strict=True))

    divergence = sum(kl(p[i], p[i + B]) + kl(p[i + B], p[i]) for i in range(B)) / (2 * B)
    ref = {"total": contrastive + BETA * divergence, "contrastive": contrastive, "divergence": divergence}
    assert comp == pytest.approx(ref, rel=1e-9)


def test_cibhash_draws_bits_in_training_only():
    model, batch = model_of("cibhash"), views()
    assert len({model(*batch)["contrastive"].item() for _ in range(5)}) > 1
    model.eval()
    torch.manual_seed(0)
    codes = torch.sign(torch.cat([model.tangents(view) for view in batch])).tolist()
    ref = naive.contrastive([[-cosine(a, b) for b in codes] for a in codes], model.config.tau_qc)
    assert model(*batch)["contrastive"].item() == pytest.approx(ref, rel=1e-9)


def test_bits_are_drawn_with_their_probabilities_and_pass_their_gradients():
    logits = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    uniform = torch.from_numpy(np.random.default_rng(0).random((4000, 3)))
    bits = draw_bits(logits.expand(4000, 3), uniform)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(bits.mean(0), torch.sigmoid(logits), rtol=0, atol=0.03)
    logits.requires_grad_()
    draw_bits(logits, uniform[0]).sum().backward()
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, p * (1 - p))


def test_divergence_pulls_one_view_at_a_time():
    from training.baselines.cibhash import bernoulli_divergence

    one, two = torch.randn(2, 4, 8, dtype=torch.float64).requires_grad_().unbind()
    one.retain_grad(), two.retain_grad()
    bernoulli_divergence(one, two).backward()
    assert one.grad.abs().max() > 0
    assert two.grad is None
    far = bernoulli_divergence(torch.tensor([[300.0]], requires_grad=True), torch.tensor([[-300.0]]))
    assert far.item() == pytest.approx(300)  # where log σ done in two steps would be -inf


# ---------------------------------------------------------------------------------------------- Bi-half Net


@pytest.mark.parametrize("n", [2, 10, 11])
def test_the_layer_halves_each_bit(n):
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(n, 5))) + 3  # by sign, all would be +1
    codes = bi_half(logits)
    for column, values in zip(codes.T.tolist(), logits.T.tolist(), strict=True):
        top = sorted(range(n), key=lambda i: -values[i])[: n // 2]
        assert column == [1.0 if i in top else -1.0 for i in range(n)]


def test_the_layer_halves_ties_too():
    assert bi_half(torch.zeros(4, 2)).tolist() == [[1, 1], [1, 1], [-1, -1], [-1, -1]]


def test_the_layer_shows_that_training_diverged():
    codes = bi_half(torch.tensor([[1.0, 2.0], [math.inf, 0.0], [3.0, math.nan], [4.0, 1.0]]))
    assert codes.isnan().tolist() == [[False, False], [True, False], [False, True], [False, False]]


def test_gradient_of_the_layer():
    logits = torch.tensor([[0.3, -2.0], [0.1, 0.5], [-0.2, 0.7], [0.9, 1.5]], requires_grad=True)
    codes = bi_half(logits)
    g = torch.arange(8.0).view(4, 2)
    (codes * g).sum().backward()
    for i in range(4):
        for j in range(2):
            ref = float(g[i, j]) + bihalf.GAMMA * (logits[i, j].item() - codes[i, j].item()) / 8
            assert logits.grad[i, j].item() == pytest.approx(ref)


def test_bihalf_equals_the_formula():
    model, batch = model_of("bihalf"), views()
    logits = [row for view in outputs(model, batch) for row in view]
    columns = []
    for values in zip(*logits, strict=True):
        top = sorted(range(2 * B), key=lambda i: -values[i])[:B]
        columns.append([1 if i in top else -1 for i in range(2 * B)])
    codes = list(zip(*columns, strict=True))
    mean = model.preprocessing.mean.tolist()
    raw = [row for view in batch.tolist() for row in view]
    features = [[math.copysign(math.sqrt(abs(a)), a) - m for a, m in zip(row, mean, strict=True)] for row in raw]
    pairs = [(i, j) for i in range(2 * B) for j in range(2 * B) if i != j]
    ref = sum((cosine(features[i], features[j]) - cosine(codes[i], codes[j])) ** 2 for i, j in pairs) / len(pairs)
    assert model(*batch)["total"].item() == pytest.approx(ref, rel=1e-9)


def test_similarity_loss_is_zero_for_codes_as_alike_as_the_features():
    codes = torch.tensor([[1.0, 1], [1, -1], [-1, 1]])
    assert float(similarity_loss(3 * codes, codes)) == pytest.approx(0, abs=1e-12)
    assert float(similarity_loss(codes.abs(), codes)) > 0.1


def test_bihalf_trains_a_backbone_through_the_head_only():
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, D_IN))
    model = build(D_IN, config("bihalf"), backbone)
    model.fit_inputs(items(30))
    images = torch.randn(2, B, 3, 2, 2)
    loss = model(*images)["total"]
    loss.backward()
    assert backbone[1].weight.grad.abs().max() > 0
    features = backbone(torch.cat([*images])).detach()
    assert loss.item() == pytest.approx(model(features[:B], features[B:])["total"].item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------- all of them

METHODS = ("spq", "mecoq", "cibhash", "bihalf")


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns_and_losses_have_their_names(method):
    model = model_of(method)
    losses = model(*views())
    assert tuple(losses) == model.loss_names
    assert losses["total"].ndim == 0
    losses["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert ("codewords" in dict(model.named_parameters())) == (method in {"spq", "mecoq"})
    assert not model.uses_clusters
    assert len(model.theta) == 0


@pytest.mark.parametrize("method", ["spq", "mecoq"])
def test_smooth_losses_have_the_gradients_of_finite_differences(method):
    model, batch, step = model_of(method), views(), 1e-6
    model(*batch)["total"].backward()
    rng = np.random.default_rng(2)
    for name, parameter in model.named_parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in rng.choice(len(flat), size=min(4, len(flat)), replace=False):
            value, sides = float(flat[i]), []
            for moved in (value + step, value - step):
                flat[i] = moved
                with torch.no_grad():
                    sides.append(model(*batch)["total"].item())
            flat[i] = value
            assert gradient[i].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-8), (name, i)


@pytest.mark.parametrize("method", ["spq", "mecoq"])
def test_codebooks_can_start_from_data(method):
    model = model_of(method, codebook_init="data")
    vectors = model.encode(items(30)).reshape(30, M, DSUB)
    for m in range(M):
        distances = np.linalg.norm(model.codewords[m].detach().numpy()[:, None] - vectors[None, :, m], axis=-1)
        assert distances.min(1).max() < 1e-6
    assert len(np.unique(distances.argmin(1))) == 16


def spq_score(part, codeword):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(part, codeword, strict=True)))


def mecoq_score(part, codeword):
    return -dot(part, codeword)


@pytest.mark.parametrize(("method", "score"), [("spq", spq_score), ("mecoq", mecoq_score)])
def test_search_of_the_product_quantisers_is_as_published(method, score):
    model = model_of(method)
    index, queries = model.index(), model.encode(items(7, seed=9))
    if method == "mecoq":
        np.testing.assert_allclose(np.linalg.norm(queries.reshape(-1, DSUB), axis=1), 1, rtol=1e-6)
    database = model.encode(items(40, seed=8))
    index.add(database)
    D, I = index.search(queries, 40)  # noqa: E741
    books = model.codewords.tolist()
    codes = [
        [min(range(16), key=lambda k: score(p, book[k])) for p, book in zip(parts(list(row)), books, strict=True)]
        for row in database.tolist()
    ]
    for q, query in enumerate(queries.tolist()):
        ref = [sum(score(p, books[m][c[m]]) for m, p in enumerate(parts(query))) for c in codes]
        np.testing.assert_allclose(D[q], sorted(ref), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([ref[i] for i in I[q]], D[q], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["cibhash", "bihalf"])
def test_hashes_search_by_hamming_distance_and_ids(method):
    model = model_of(method)
    index, database, queries = model.index(), model.encode(items(60, seed=8)), model.encode(items(7, seed=9))
    assert database.shape == (60, model.config.bits)
    assert database.dtype == np.float32
    index.add(database[:25])
    index.add(database[25:])
    assert index.ntotal == 60
    D, I = index.search(queries, 20)  # noqa: E741
    assert (D.dtype, I.dtype) == (np.float32, np.int64)
    for q, row in enumerate(queries):
        distances = [sum((a > 0) != (b > 0) for a, b in zip(row, x, strict=True)) for x in database]
        ref = sorted((d, i) for i, d in enumerate(distances))[:20]
        assert list(zip(D[q], I[q], strict=True)) == ref


def test_a_hash_holds_whole_bytes():
    with pytest.raises(InvalidParameterError, match="multiple of 8, got 12"):
        build(D_IN, config("bihalf", M=3))
    with pytest.raises(InvalidParameterError, match="cibhash has no codec"):
        model_of("cibhash").codec()


def test_an_index_of_few_or_none():
    index = HammingIndex(8)
    for n in (0, 2):
        D, I = index.search(np.ones((3, 8)), 4)  # noqa: E741
        assert (I[:, n:] == -1).all()
        assert np.isinf(D[:, n:]).all()
        assert (I[:, :n] == np.arange(n)).all()
        index.add(np.ones((2, 8)))
    with pytest.raises(InvalidVectorsError):
        index.add(np.ones((2, 9)))
    with pytest.raises(InvalidParameterError):
        index.search(np.ones((1, 8)), 0)
    assert index.ntotal == 4


@pytest.mark.parametrize("method", METHODS)
def test_training_resumes_to_the_bit(method, tmp_path):
    def source():
        return EmbeddingViews(items(60), noise=0.3)

    # The trainer's own interruption is tested elsewhere; here, that a run stopped between epochs and in the middle of one
    # goes on with the same bits drawn and the same codes remembered.
    settings = config(method, batch_size=16, epochs=5, lr=0.05, lr_codebook=0.1)
    whole = train(source(), settings, progress=False)
    stopper = Stopping(source(), after=3 * 3 + 1)
    with pytest.raises(KeyboardInterrupt):
        train(stopper, settings, tmp_path, progress=False)
    resumed = train(source(), settings, tmp_path, resume=True, progress=False)
    for row, other in zip(whole.history, resumed.history, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    states = [result.model.state_dict() for result in (whole, resumed)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=0)


class Stopping:
    """A source that raises a signal's flag after some batches, as Ctrl-C would."""

    def __init__(self, source, after):
        self._source, self._left = source, after
        self.n, self.d_in, self.backbone = source.n, source.d_in, None

    def features(self):
        return self._source.features()

    def views(self, indices, rng):
        import signal

        self._left -= 1
        if self._left == 0:
            signal.raise_signal(signal.SIGINT)
        return self._source.views(indices, rng)
