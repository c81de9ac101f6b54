"""Arrays in a page: compressed, as text that no HTML parser can misread, and back again.

A block is base64 of gzip of: the length of a JSON header (uint32, little-endian), the header, which
lists name, dtype and shape of each array, and the arrays' bytes, each from a multiple of 8 on.
`page/data.js` reads the same.
"""

import base64
import gzip
import json
import struct

import numpy as np

ALIGN = 8
DTYPES = ("uint8", "uint16", "uint32", "int32", "float32")


def encode(arrays: dict[str, np.ndarray]) -> str:
    """A block of named arrays, each of one of DTYPES."""
    entries, parts, offset = [], [], 0
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f"{name}: expected one of {DTYPES}, got {array.dtype}")
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        data += bytes(-len(data) % ALIGN)
        entries.append([name, array.dtype.name, list(array.shape), offset])
        parts.append(data)
        offset += len(data)
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 4) % ALIGN)
    raw = struct.pack("<I", len(header)) + header + b"".join(parts)
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")


def encode_json(value: object) -> str:
    """gzip and base64 of a JSON value."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode("ascii")


def smallest(indices: np.ndarray) -> np.ndarray:
    """Integers >= -1 as uint16 or uint32, -1 as the largest number of that type."""
    kind = np.uint16 if indices.max(initial=0) < 2**16 - 1 else np.uint32
    return np.where(indices < 0, np.iinfo(kind).max, indices).astype(kind)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 with 12 bits after the leading one: three digits are right, and it compresses."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 10)) & np.uint32(0xFFFFF800)).view(np.float32)
