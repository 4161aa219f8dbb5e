"""One crop as a `tf.train.Example` in a TFRecord file, without TensorFlow (which takes 5 s and 700 MB a process).

    image      6,400 bytes, uint8, 80 x 80 row-major       box    4 x int64: x, y, width, height as in the labels
    label      int64, the line of label.labels.txt         image_id    the page
    unicode    the box's own code point, `U+306F`, also where the label is `rare`

Formats: tensorflow/core/example/{example,feature}.proto, and the framing of
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

SIDE = 80  # pixels, of a crop
FRAME_BYTES = 16  # length, its checksum, the checksum of the data
MOST_RECORD_BYTES = 8192  # a crop, and what is told of it; no more memory is taken for a record, whatever it claims

Value = bytes | Sequence[int]

# Numbers of protobuf fields. The first of each message: Example.features, Features.feature, the key of its entries,
# BytesList.value, Int64List.value. Then: the value of an entry, Feature.bytes_list, Feature.int64_list.
FIELD, VALUE, BYTES_LIST, INT64_LIST = 1, 2, 1, 3

# The same for protobuf's own reader: TensorFlow's description of it loads all of TensorFlow.
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
    """What a record holds, as it came: nothing of it is checked but its kind."""

    image: bytes
    label: int
    code_point: bytes
    image_id: bytes
    box: list[int]


def encode_example(features: Mapping[str, Value]) -> bytes:
    """Bytes of a `tf.train.Example`, features in the order of their names (protobuf leaves the order of a map open)."""
    parts = []
    for name, value in sorted(features.items()):
        if isinstance(value, bytes):
            kind, payload = BYTES_LIST, value
        else:
            kind, payload = INT64_LIST, b"".join(map(_varint, value))
        parts += [_before(name, kind, len(payload)), payload]
    return b"".join([_header(FIELD, sum(map(len, parts))), *parts])


@lru_cache(maxsize=1 << 14)  # what records are made of is of few lengths
def _before(name: str, kind: int, length: int) -> bytes:
    """All that stands in a feature's entry before its payload of so many bytes: a value, or packed numbers."""
    after = _header(FIELD, length)
    for number in (kind, VALUE):
        after = _header(number, len(after) + length) + after
    key = _header(FIELD, len(name.encode())) + name.encode()
    return _header(FIELD, len(key) + len(after) + length) + key + after


def decode_example(data: bytes) -> Record:
    """Read a record.

    Raises:
        ValueError: it is no `tf.train.Example`, or one of its features is missing or of another kind.
    """
    try:
        features = _example().FromString(data).features.feature
        (image,) = features["image"].bytes_list.value
        (label,) = features["label"].int64_list.value
        (code_point,) = features["unicode"].bytes_list.value
        (image_id,) = features["image_id"].bytes_list.value
        x, y, width, height = features["box"].int64_list.value
    except (DecodeError, ValueError):
        raise ValueError("a record without image, label, unicode, image_id and box as they should be") from None
    return Record(image, label, code_point, image_id, [x, y, width, height])


@cache
def _example() -> Any:
    """The class of protobuf's messages. In a pool of its own: nothing of another package is in its way."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kuzushiji.Example"))


def frame(data: bytes) -> bytes:
    """A TFRecord: little-endian length and data, each followed by its masked CRC-32C."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked_crc(length), data, _masked_crc(data)))


def read_frames(shard: bytes | mmap) -> Iterator[bytes]:
    """The data of each TFRecord of a shard whose SHA-256 was checked before (so that the CRCs need not be).

    Raises:
        DamageError: it ends within a record, or one is larger than any of ours.
    """
    at = 0
    while at < len(shard):
        end = at + FRAME_BYTES
        if end <= len(shard):
            end += struct.unpack_from("<Q", shard, at)[0]
        if end > len(shard):
            raise DamageError("a TFRecord file must end with a whole record")
        if end - at > MOST_RECORD_BYTES:
            raise DamageError(f"a record must have at most {MOST_RECORD_BYTES} bytes. Received: {end - at}")
        yield shard[at + 12 : end - 4]
        at = end


def _header(number: int, length: int) -> bytes:
    """What stands before a length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(length)


@lru_cache(maxsize=1 << 14)  # labels and boxes are of few numbers
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
