"""Read and write crops as `tf.train.Example` records in TFRecord files, without TensorFlow.

Importing TensorFlow takes 5 s and 700 MB per process. Features of a record:

    image      6,400 bytes: uint8, 80 x 80, row-major
    label      int64: class index, the line number in label.labels.txt, from 0
    unicode    bytes: the code point of the box, `U+306F`, even if the label is `rare`
    image_id   bytes: the id of the page
    box        4 x int64: x, y, width, height as in the labels

Formats: tensorflow/core/example/{example,feature}.proto, and the TFRecord framing described at
tensorflow.org/tutorials/load_data/tfrecord.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from mmap import mmap
from typing import Any, NamedTuple

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from cluster.errors import DamageError

SIDE = 80  # side of a crop in pixels
FRAME_BYTES = 16  # length (8), checksum of the length (4), checksum of the data (4)
# A crop with its other features fits. Longer records are rejected, so that a corrupt length allocates no memory.
MAX_RECORD_BYTES = 8192

Value = bytes | Sequence[int]

# Protobuf field numbers. FIELD: Example.features, Features.feature, FeatureEntry.key, BytesList.value and
# Int64List.value. VALUE: FeatureEntry.value. BYTES_LIST, INT64_LIST: Feature.bytes_list, Feature.int64_list.
FIELD, VALUE, BYTES_LIST, INT64_LIST = 1, 2, 1, 3

# The message definitions for protobuf's parser. Importing TensorFlow's own definitions would load all of TensorFlow.
_EXAMPLE = """
name: "example.proto" package: "kuzushiji" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
message_type { name: "Int64List" field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type {
  name: "Feature"
  oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: "BytesList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: "Int64List" oneof_index: 0 }
}
message_type {
  name: "Features"
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" }
  }
  field { name: "feature" number: 1 type: TYPE_MESSAGE type_name: "FeatureEntry" label: LABEL_REPEATED }
}
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""


class Record(NamedTuple):
    """The features of a record. Only their types are checked, not their values."""

    image: bytes
    label: int
    code_point: bytes
    image_id: bytes
    box: list[int]


def encode_example(features: Mapping[str, Value]) -> bytes:
    """Serialize a `tf.train.Example`, features sorted by name. Protobuf itself does not define the order of a map."""
    parts = []
    for name, value in sorted(features.items()):
        if isinstance(value, bytes):
            kind, payload = BYTES_LIST, value
        else:
            kind, payload = INT64_LIST, b"".join(map(_varint, value))
        parts += [_feature_header(name, kind, len(payload)), payload]
    return b"".join([_header(FIELD, sum(map(len, parts))), *parts])


@lru_cache(maxsize=1 << 14)  # features have few distinct lengths
def _feature_header(name: str, kind: int, length: int) -> bytes:
    """Return the bytes of a feature's map entry that precede its payload: one bytes value, or packed integers."""
    value = _header(FIELD, length)
    for number in (kind, VALUE):
        value = _header(number, len(value) + length) + value
    key = _header(FIELD, len(name.encode())) + name.encode()
    return _header(FIELD, len(key) + len(value) + length) + key + value


def decode_example(data: bytes) -> Record:
    """Parse a serialized `tf.train.Example`.

    Raises:
        ValueError: the data is not a `tf.train.Example`, or a feature is missing or has another type or length.
    """
    try:
        features = _example().FromString(data).features.feature
        (image,) = features["image"].bytes_list.value
        (label,) = features["label"].int64_list.value
        (code_point,) = features["unicode"].bytes_list.value
        (image_id,) = features["image_id"].bytes_list.value
        x, y, width, height = features["box"].int64_list.value
    except (DecodeError, ValueError) as error:
        raise ValueError("a record without image, label, unicode, image_id and box of the expected types") from error
    return Record(image, label, code_point, image_id, [x, y, width, height])


@cache
def _example() -> Any:
    """Return the message class. Its own descriptor pool prevents conflicts with TensorFlow's definitions."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kuzushiji.Example"))


def frame(data: bytes) -> bytes:
    """Return a TFRecord: the little-endian length and the data, each followed by its masked CRC-32C."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked_crc(length), data, _masked_crc(data)))


def read_frames(shard: bytes | mmap) -> Iterator[bytes]:
    """Yield the data of each TFRecord of a shard.

    The CRCs are not checked: the caller has checked the SHA-256 of the shard.

    Raises:
        DamageError: the shard ends within a record, or a record is longer than `MAX_RECORD_BYTES`.
    """
    start = 0
    while start < len(shard):
        end = start + FRAME_BYTES
        if end <= len(shard):
            end += struct.unpack_from("<Q", shard, start)[0]
        if end > len(shard):
            raise DamageError("a TFRecord file must end with a complete record")
        if end - start > MAX_RECORD_BYTES:
            raise DamageError(f"a record must have at most {MAX_RECORD_BYTES} bytes. Received: {end - start}")
        yield shard[start + 12 : end - 4]
        start = end


def _header(number: int, length: int) -> bytes:
    """Return tag and length of a length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(length)


@lru_cache(maxsize=1 << 14)  # labels and boxes have few distinct numbers
def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF  # negative numbers in two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
