"""Recipes: the library's, the authors', and a user's own file."""

from __future__ import annotations

import json

import pytest

from hyperfaiss.errors import InvalidParameterError
from training.recipes import RECIPES, recipe


def test_default_recipe_takes_bits_and_changes():
    assert recipe() == recipe("default", bits=32)
    assert recipe(bits=64).M == 8
    assert recipe(bits=24, nbits=6, lr=0.5) == recipe(M=4, nbits=6, lr=0.5)


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        (
            "paper",
            32,
            {"M": 4, "dsub": 15, "tau": 1.0, "clip_radius": 1.5, "levels": (100, 50, 25), "tau_qc": 0.2, "warmup": 3},
        ),
        ("paper-cifar10-i", 32, {"tau": 0.2, "clip_radius": 0.6, "levels": (200, 100, 50), "warmup": 5}),
        ("paper-cifar10-ii", 64, {"M": 8, "dsub": 7, "tau": 1.0, "clip_radius": 1.5}),
        ("paper-flickr25k", 64, {"tau": 1 / 15, "clip_radius": 0.5, "levels": (50, 20), "tau_qc": 0.5, "warmup": 1}),
        ("paper-nus-wide", 16, {"M": 2, "dsub": 15, "tau_qc": 0.2, "levels": (200, 100, 75)}),
        ("paper-nus-wide", 64, {"M": 8, "dsub": 15, "tau_qc": 0.5}),
    ],
)
def test_paper_recipes_hold_the_table_of_the_authors_runs(name, bits, expected):
    fields = recipe(name, bits=bits).__dict__
    shared = {"lambda1": 1.0, "lambda2": 0.1, "epochs": 50, "lr": 0.01, "weight_decay": 5e-3, "hidden": 0}
    shared["quirks"] = ("one-learning-rate", "decay-all")
    assert {k: fields[k] for k in expected | shared} == expected | shared


def test_recipes_refuse_what_they_do_not_have():
    assert "paper" in RECIPES
    with pytest.raises(
        InvalidParameterError, match="no recipe 'papr'; there are default, embeddings, embeddings-large, large, paper"
    ):
        recipe("papr")
    with pytest.raises(InvalidParameterError, match="for 16, 32, 64 bits, got M = 3"):
        recipe("paper", bits=24)
    with pytest.raises(InvalidParameterError, match="multiple of nbits = 8, got 20"):
        recipe(bits=20)
    with pytest.raises(InvalidParameterError, match="bits or M"):
        recipe(bits=32, M=4)
    with pytest.raises(InvalidParameterError, match="nbits"):
        recipe(bits=32, nbits=0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_configuration(name):
    assert recipe(name, bits=32).bits == 32


def test_the_base_comes_first_then_the_file_then_its_bits_then_the_changes(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'base = "paper-cifar10-ii"\nabout = "mine"\n[all]\nlr = 0.5\ntau_qc = 0.4\n[bits.64]\ntau_qc = 0.6\n'
    )
    mine = recipe(tmp_path / "mine.toml", bits=64, seed=3)
    assert (mine.lr, mine.tau_qc, mine.seed, mine.dsub, mine.epochs) == (0.5, 0.6, 3, 7, 50)
    assert recipe(tmp_path / "mine.toml", bits=32).tau_qc == 0.4
    assert recipe(tmp_path / "mine.toml", bits=64, tau_qc=0.7).tau_qc == 0.7


def test_a_runs_config_is_a_recipe(tmp_path):
    config = recipe("paper-nus-wide", bits=16, geometry="euclidean", seed=7)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert recipe(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "can't be read as a recipe"),
        ("lr = 0.1\n", r"has \['lr'\]; a recipe has .*its fields in \[all\]"),
        ("[all]\nlearning_rate = 0.1\n", "learning_rate"),
        ('base = "papr"\n', "no recipe 'papr'"),
        ('[all]\nquirks = ["decay"]\n', r"no quirks \['decay'\]; there are one-learning-rate"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(InvalidParameterError, match=message):
        recipe(tmp_path / "bad.toml")
    with pytest.raises(InvalidParameterError, match="no recipe at"):
        recipe(tmp_path / "absent.toml")
