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

import google_crc32c

from cluster.errors import DamageError

FRAME_BYTES = 16  # length, its checksum, the checksum of the data
MOST_RECORD_BYTES = 8192  # a crop, and what is told of it; no more memory is taken for a record, whatever it claims

Value = bytes | Sequence[int]


def encode_example(features: Mapping[str, Value]) -> bytes:
    """Bytes of a `tf.train.Example`, features in the order of their names (protobuf leaves the order of a map open)."""
    entries = (_field(1, _key(name) + _field(2, _encode_feature(value))) for name, value in sorted(features.items()))
    return _field(1, b"".join(entries))


@cache
def _key(name: str) -> bytes:
    return _field(1, name.encode())


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


def _encode_feature(value: Value) -> bytes:
    if isinstance(value, bytes):
        return _field(1, _field(1, value))  # bytes_list
    return _field(3, _field(1, b"".join(_varint(number) for number in value)))  # int64_list, packed


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _header(number, len(payload)) + payload


@lru_cache(maxsize=1 << 14)  # what records are made of is of few lengths
def _header(number: int, length: int) -> bytes:
    return _varint(number << 3 | 2) + _varint(length)


@lru_cache(maxsize=1 << 14)  # so are labels and boxes of few numbers
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
