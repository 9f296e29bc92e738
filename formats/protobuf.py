"""
Write protocol buffers by hand: the bytes of a few messages, without the protobuf package.

    message(1, b"cube") + fixed32(2, -10.0) + integer(3, 1)     {1: "cube", 2: -10.0, 3: NORMAL}

A message is the sum of its fields. The .proto file of its format says which number and type each of them has.
Protobuf's own package is not used, as the code that others generated for it runs with some of its versions only.

https://protobuf.dev/programming-guides/encoding
"""

import struct

# How the content of a field is stored
VARINT = 0
LENGTH_DELIMITED = 2
FIXED32 = 5


def varint(n: int) -> bytes:
    """Return n >= 0 as bytes of seven bits each, the lowest first. The top bit of a byte says that another follows."""
    encoded = bytearray()
    while n >= 128:
        encoded.append(n & 127 | 128)
        n >>= 7
    encoded.append(n)
    return bytes(encoded)


def key(number: int, storage: int) -> bytes:
    """Return what stands in front of the content of field `number`."""
    return varint(number << 3 | storage)


def message(number: int, content: bytes) -> bytes:
    """Return field `number` with a message, a text or bytes in it: its key, its length, its content."""
    return key(number, LENGTH_DELIMITED) + varint(len(content)) + content


def integer(number: int, value: int) -> bytes:
    """Return field `number` with an integer, a bool or an enum in it. Negative ones count down from 2 ** 64."""
    return key(number, VARINT) + varint(value % 2**64)


def fixed32(number: int, value: float) -> bytes:
    """Return field `number` with a float32 in it."""
    return key(number, FIXED32) + struct.pack("<f", value)
