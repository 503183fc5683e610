"""Encoding: parts hold what the codec gives, for embeddings and for images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer, Model, Projector, read_index
from hyperfaiss.batch import Images, build, encode, info, open_source
from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError


def rows(folder, column):
    table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])
    return table, np.array(table[column].to_pylist())


def test_codes_of_embeddings(tmp_path, xb, codec, whole, parquet, contents):
    keys = pa.array([f"key {i}" for i in range(len(xb))])
    source = open_source(parquet(tmp_path / "x", xb, key=keys), id_column="key")
    summary = encode(source, str(tmp_path / "e"), codec=str(codec), part_rows=700)
    table, codes = rows(tmp_path / "e", "code")
    np.testing.assert_array_equal(codes, whole.codes)
    assert table["id"].to_pylist() == keys.to_pylist()
    assert table.schema.field("code").type == pa.list_(pa.uint8(), 2)
    assert (summary.all_parts, summary.details) == (5, {"vectors": 3000, "bytes_per_vector": 2})
    assert open_source(str(tmp_path / "e"), id_column="id").d == 2
    assert info(str(tmp_path / "e"))["parts_done"] == 5


def test_codes_of_lists_carry_the_list(tmp_path, xb, codec, saved):
    x = str(saved(tmp_path / "x.npy", xb))
    build(x, str(tmp_path / "s"), codec=str(codec), nlist=5)
    template = str(tmp_path / "s" / "template.index")
    encode(x, str(tmp_path / "e"), codec=template)
    _, codes = rows(tmp_path / "e", "code")
    np.testing.assert_array_equal(codes, read_index(template).sa_encode(xb))
    build(str(tmp_path / "e"), str(tmp_path / "again"), codec=template, content="codes")
    assert (tmp_path / "again" / "shard-00000.index").read_bytes() == (tmp_path / "s" / "shard-00000.index").read_bytes()


def test_tangents_as_matrices(tmp_path, xb, codec, saved):
    rng = np.random.default_rng(0)
    projector = Projector([(rng.normal(size=(12, 12)) / 4, rng.normal(size=12))], normalize=True)
    Model(projector, HyperbolicProductQuantizer.load(codec)).save(tmp_path / "m.safetensors")
    x = str(saved(tmp_path / "x.npy", xb))
    encode(x, str(tmp_path / "e"), codec=str(tmp_path / "m.safetensors"), content="tangents", format="npy", part_rows=2000)
    comp = np.concatenate([np.load(path) for path in sorted((tmp_path / "e").glob("*.tangents.npy"))])
    np.testing.assert_array_equal(comp, projector.transform(xb))
    assert comp.dtype == np.float32
    ids = np.concatenate([np.load(path) for path in sorted((tmp_path / "e").glob("*.ids.npy"))])
    np.testing.assert_array_equal(ids, np.arange(3000))


def test_images_go_through_the_models_backbone(tmp_path, parquet):
    from sklearn.datasets import load_digits

    from training.backbones import extract_features, load_backbone
    from training.data import load_images

    collection, backbone = load_images("digits"), load_backbone("pixels", image_size=8)
    features = extract_features(backbone, collection, progress=False)
    rng = np.random.default_rng(0)
    quantizer = HyperbolicProductQuantizer(8, 4, 4)
    projector = Projector([(rng.normal(size=(8, 64)) / 100, np.zeros(8))])
    quantizer.train(projector.transform(features))
    path, facts = tmp_path / "m.safetensors", backbone.facts()
    model = Model(projector, quantizer, backbone="pixels", metadata={"features": facts})
    model.save(path)
    encode(Images("digits"), str(tmp_path / "e"), codec=str(path), part_rows=1024)
    table, codes = rows(tmp_path / "e", "code")
    np.testing.assert_array_equal(codes, HyperbolicPQIndex.from_model(model).sa_encode(features))
    np.testing.assert_array_equal(table["label"].to_numpy(), load_digits().target)
    encode(Images("digits", image_size=8, backbone="pixels"), str(tmp_path / "f"), content="embeddings")
    np.testing.assert_array_equal(rows(tmp_path / "f", "embedding")[1], features)


def test_what_does_not_fit_is_refused(tmp_path, xb, codec, saved, parquet):
    from training.backbones import load_backbone

    x = str(saved(tmp_path / "x.npy", xb))
    of_pixels = {"codec": str(tmp_path / "m.safetensors")}
    facts = load_backbone("pixels", image_size=8).facts()
    projector = Projector([(np.zeros((5, 64)), np.zeros(5))])
    codec4 = HyperbolicProductQuantizer.from_codebooks(np.zeros((1, 16, 5)), [0.0])
    Model(projector, codec4, backbone="pixels", metadata={"features": facts}).save(of_pixels["codec"])
    strings = open_source(parquet(tmp_path / "s", xb, key=pa.array([str(i) for i in range(len(xb))])), id_column="key")
    for source, options, error, message in (
        (x, {}, InvalidParameterError, "codes need a codec"),
        (x, {"codec": str(codec), "content": "pixels"}, InvalidParameterError, "content must be"),
        (x, {"codec": str(codec), "format": "ibin"}, InvalidParameterError, "format must be"),
        (x, {"codec": str(codec), "content": "embeddings"}, InvalidParameterError, "embeddings already"),
        (strings, {"codec": str(codec), "format": "npy"}, InvalidParameterError, "no room for string ids"),
        (
            str(saved(tmp_path / "n.npy", xb[:, :3])),
            {"codec": str(codec)},
            InvalidVectorsError,
            "have 3 dimensions, .* takes 12",
        ),
        (Images("digits"), {"codec": str(codec)}, InvalidParameterError, "names no backbone"),
        (Images("digits", backbone="vgg16"), of_pixels, InvalidParameterError, "takes features of pixels, not of vgg16"),
        (Images("digits", image_size=9), of_pixels, InvalidParameterError, r"at another size than 9 \(its own: 8\)"),
    ):
        with pytest.raises(error, match=message):
            encode(source, str(tmp_path / "e"), **options)


def test_embeddings_need_no_torch(tmp_path, xb, codec, saved, python):
    code = (
        "import sys; from hyperfaiss import batch\n"
        "batch.encode(sys.argv[1], sys.argv[2], codec=sys.argv[3])\n"
        "assert not {'torch', 'training', 'sklearn', 'ray'} & set(sys.modules)"
    )
    python(code, str(saved(tmp_path / "x.npy", xb)), str(tmp_path / "e"), str(codec))
