"""Configurations: round trips, the recipes' numbers, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hyperfaiss.errors import InvalidParameterError
from training.config import TrainConfig


def test_round_trip_through_json():
    config = TrainConfig(M=8, levels=(30, 10), clip_radius=None, patience=3, geometry="euclidean")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_default_is_valid_and_typed():
    fields = TrainConfig().to_dict()
    assert TrainConfig.from_dict(fields) == TrainConfig()
    assert isinstance(fields["levels"], list)
    assert TrainConfig(levels=[4, 2]).levels == (4, 2)  # lists, as JSON gives them, become tuples
    assert isinstance(TrainConfig(lr=1).lr, float)
    assert TrainConfig(M=np.int64(8)).M == 8


def test_derived_sizes():
    config = TrainConfig(M=3, nbits=6, dsub=5)
    assert (config.ksub, config.d, config.bits) == (64, 15, 18)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"M": 0}, "M must be >= 1, got 0"),
        ({"M": 2.5}, "M must be an integer, got 2.5"),
        ({"M": "4"}, "M must be an integer, got '4'"),
        ({"M": True}, "M must be an integer, got True"),
        ({"nbits": 9}, "nbits must be from 4 to 8, got 9"),
        ({"lr": math.nan}, "lr must be a finite number, got nan"),
        ({"lr": -1}, "lr must be positive, got -1.0"),
        ({"geometry": "spherical"}, "geometry must be one of 'hyperbolic', 'euclidean', 'cosine', got 'spherical'"),
        ({"levels": (5, 5)}, "strictly decreasing, got (5, 5)"),
        ({"levels": 5}, "levels must be a sequence, each an integer, got 5"),
        ({"levels": "54"}, "levels must be a sequence, each an integer, got '54'"),
        ({"levels": (2000, 5)}, "can't be merged from subclusters = 1000"),
        ({"clip_radius": 0}, "clip_radius must be positive, got 0.0"),
        ({"curvature": 0}, "curvature must be from 0.01 to 10, got 0.0"),
        ({"center": 1}, "center must be True or False, got 1"),
        ({"power": 2}, "power must be in (0, 1], got 2.0"),
        ({"val_fraction": 1}, "val_fraction must be in [0, 1), got 1.0"),
        ({"epochs": None}, "epochs must be an integer, got None"),
    ],
)
def test_invalid_values_are_named(changes, message):
    with pytest.raises(InvalidParameterError) as error:
        TrainConfig(**changes)
    assert message in str(error.value)


def test_unknown_fields_are_named():
    with pytest.raises(InvalidParameterError, match=r"\['learning_rate'\].*'lr'"):
        TrainConfig.from_dict({"learning_rate": 1})
    with pytest.raises(InvalidParameterError, match="learning_rate"):
        TrainConfig().replace(learning_rate=1)


def test_frozen():
    with pytest.raises(AttributeError):
        TrainConfig().M = 8
