"""Neighbours: brute force, list by list, tables of the caller's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from tests.training.toys import brute_force_neighbours
from training import neighbours
from training.config import TrainConfig
from training.neighbours import checked_neighbours, diffusion_map, nearest_neighbours
from training.views import VIEW_FIELDS, EmbeddingViews, source_of


def test_neighbours_equal_brute_force() -> None:
    features = np.random.default_rng(0).gamma(1, size=(200, 12)).astype(np.float32) + 5  # centring matters
    comp = nearest_neighbours(features, 7)
    assert comp.dtype == np.int64
    np.testing.assert_array_equal(comp, brute_force_neighbours(features, 7))


def test_neighbours_after_a_power() -> None:
    features = np.random.default_rng(1).standard_normal((60, 6)).astype(np.float32)
    comp = nearest_neighbours(features, 4, power=0.5)
    np.testing.assert_array_equal(comp, brute_force_neighbours(np.sign(features) * np.abs(features) ** 0.5, 4))
    assert not np.array_equal(comp, nearest_neighbours(features, 4))
    with pytest.raises(InvalidParameterError, match="power must be in"):
        nearest_neighbours(features, 4, power=0)


def test_an_item_is_never_its_own_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.zeros((40, 4), np.float32)
    features[20:] = 1  # twenty equal items, twice
    for all_pairs in (40, 39):
        monkeypatch.setattr(neighbours, "_ALL_PAIRS", all_pairs)
        found = nearest_neighbours(features, 5)
        assert (found != np.arange(40)[:, None]).all()
        assert ((found < 20) == (np.arange(40) < 20)[:, None]).all()
        assert all(len(set(row)) == 5 for row in found.tolist())
    for k in (0, 40):
        with pytest.raises(InvalidParameterError, match=rf"1\.\.39 for 40 items, got {k}"):
            nearest_neighbours(features, k)


def test_list_by_list_finds_nearly_all(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).standard_normal((4000, 6)).astype(np.float32)
    ref = nearest_neighbours(features, 10)
    monkeypatch.setattr(neighbours, "_ALL_PAIRS", 100)
    comp = nearest_neighbours(features, 10)
    assert (comp != np.arange(4000)[:, None]).all()
    kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(comp.tolist(), ref.tolist(), strict=True)])
    assert 0.9 < kept < 1  # 1 would mean that all pairs were compared
    np.testing.assert_array_equal(comp, nearest_neighbours(features, 10))


def test_a_table_says_whom_the_second_view_shows() -> None:
    features = np.arange(60, dtype=np.float32).reshape(30, 2)
    table = np.stack([(np.arange(30) + 5) % 30, (np.arange(30) + 7) % 30], axis=1)
    source = EmbeddingViews(features, neighbours=table)
    seen: list[set[int]] = [set() for _ in range(30)]
    for seed in range(20):
        two = source.views(np.arange(30), np.random.default_rng(seed))[1].numpy()
        for i, row in enumerate(two):
            seen[i].add(int(row[0]) // 2)
    assert seen == [set(row) for row in table.tolist()]


@pytest.mark.parametrize("table", [[[0], [1]], [[3], [0], [1]], [[-1], [0], [1]], [0, 1, 2], [[0.5], [1], [2]], [[], [], []]])
def test_other_tables_are_refused(table) -> None:
    with pytest.raises(InvalidVectorsError, match="neighbours must be in"):
        checked_neighbours(table, 3)


def test_a_configuration_makes_its_views() -> None:
    features = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    config = TrainConfig(neighbours=100, dropout=0.0, power=1.0)  # more neighbours than there are items
    one, two, _ = source_of(config, features).views(np.arange(8), np.random.default_rng(0))
    np.testing.assert_array_equal(one, features)
    assert (two.numpy() != features).any(axis=1).all()
    one, two, _ = source_of(config, features, np.stack([features, features + 1])).views(np.arange(8), np.random.default_rng(0))
    assert np.isin(one.numpy() - features, [0, 1]).all() or np.abs(one.numpy() - features).max() <= 1 + 1e-6


def test_views_depend_on_the_named_fields_alone() -> None:
    features = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    fields = TrainConfig(neighbours=3, diffusion=1, mixup=0.5, noise=0.1).to_dict()
    read = SimpleNamespace(**{name: fields[name] for name in VIEW_FIELDS})  # any other is an AttributeError
    source_of(read, features)  # type: ignore[arg-type]
    source_of(read, features, np.stack([features, features]))  # type: ignore[arg-type]


# Diffusion


def test_diffusion_distances_are_those_of_random_walks() -> None:
    features = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    table = nearest_neighbours(features, 6)
    coordinates = diffusion_map(table, 8, dimensions=39).astype(np.float64)
    weights = np.zeros((40, 40))
    weights[np.arange(40)[:, None], table] = 1
    weights += weights.T
    degrees = weights.sum(1)
    walk = np.linalg.matrix_power(weights / degrees[:, None], 8)  # by 8 steps negative eigenvalues are gone
    # Coifman and Lafon: the distance of two rows of the walk, each coordinate weighted by 1 / its stationary probability.
    rows = walk / np.sqrt(degrees)
    ref = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    comp = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=2)
    np.testing.assert_allclose(comp / comp.max(), ref / ref.max(), atol=0.01)


def test_diffusion_follows_the_shape_of_the_data() -> None:
    rng = np.random.default_rng(0)
    along, arc = rng.uniform(-1, 1, 400), np.arange(400) % 2  # two arcs on the sphere, closer to each other than they are long
    across = 0.3 * arc + 0.03 * rng.standard_normal(400)
    arcs = np.stack([np.cos(along) * np.cos(across), np.sin(along) * np.cos(across), np.sin(across)], axis=1)
    features = np.concatenate([arcs, -arcs]).astype(np.float32)  # opposite ones, so that centring moves nothing
    arc = np.concatenate([arc, arc + 2])
    share = {d: float((arc[nearest_neighbours(features, 100, diffusion=d)] == arc[:, None]).mean()) for d in (0, 8)}
    assert share[0] < 0.9
    assert share[8] > 0.99
    with pytest.raises(InvalidParameterError, match="diffusion must be at least 0, got -1"):
        nearest_neighbours(features, 5, diffusion=-1)
