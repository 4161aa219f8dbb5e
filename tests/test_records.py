"""Records: our bytes are what TensorFlow writes and reads."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import DamageError
from preprocessing.records import decode_example, encode_example, frame, read_frames

INT64 = st.integers(-(2**63), 2**63 - 1)
VALUES = st.one_of(st.binary(max_size=300), st.lists(INT64, max_size=5))


@given(st.dictionaries(st.text(min_size=1, max_size=10), VALUES, max_size=6))
def test_an_example_is_read_by_tensorflow_as_it_was_given(features: dict[str, bytes | list[int]]) -> None:
    read = tf.train.Example.FromString(encode_example(features)).features.feature
    assert set(read) == set(features)
    for name, value in features.items():
        got = read[name].bytes_list.value[0] if isinstance(value, bytes) else list(read[name].int64_list.value)
        assert got == value


CROPS = st.fixed_dictionaries(
    {
        "image": st.binary(max_size=300),
        "label": st.lists(INT64, min_size=1, max_size=1),
        "unicode": st.binary(max_size=10),
        "image_id": st.binary(max_size=10),
        "box": st.lists(INT64, min_size=4, max_size=4),
    }
)


@given(CROPS)
def test_a_crop_is_read_back_as_it_was_written(crop: dict[str, Any]) -> None:
    read = decode_example(encode_example(crop))
    assert (read.image, [read.label], read.box) == (crop["image"], crop["label"], crop["box"])
    assert (read.code_point, read.image_id) == (crop["unicode"], crop["image_id"])


@given(CROPS, st.data())
def test_invalid_records_raise_only_value_error(crop: dict[str, Any], data: st.DataObject) -> None:
    whole = encode_example(crop)
    at = data.draw(st.integers(0, len(whole) - 1))
    name = data.draw(st.sampled_from(sorted(crop)))
    without = {key: value for key, value in crop.items() if key != name}
    of_other_kind = crop | {name: [1] if isinstance(crop[name], bytes) else b"1"}
    for other in (b"", encode_example(without), encode_example(of_other_kind), encode_example(crop | {"box": [1, 2]})):
        with pytest.raises(ValueError, match="a record without image, label, unicode, image_id and box"):
            decode_example(other)
    for other in (whole[:at], whole[:at] + data.draw(st.binary(max_size=9)) + whole[at + 1 :]):
        with suppress(ValueError):  # by chance, the bytes may be a crop
            decode_example(other)


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_frames_are_those_of_tensorflow_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, datas: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("records") / "x.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for data in datas:
            writer.write(data)
    ours = b"".join(frame(data) for data in datas)
    assert ours == path.read_bytes()
    assert list(read_frames(ours)) == datas


def test_a_file_that_ends_within_a_record_is_damage() -> None:
    whole = frame(b"one") + frame(b"two")
    for end in (1, 11, 15, len(frame(b"one")) + 1, len(whole) - 1):
        with pytest.raises(DamageError, match="complete record"):
            list(read_frames(whole[:end]))


def test_a_record_that_is_larger_than_any_of_ours_is_damage() -> None:
    with pytest.raises(DamageError, match="at most 8192 bytes. Received: 8193"):
        list(read_frames(frame(bytes(8193 - 16))))


def test_records_can_be_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(frame(b"one"))
    assert [bytes(r.numpy()) for r in tf.data.TFRecordDataset(str(tmp_path / "x"))] == [b"one"]
