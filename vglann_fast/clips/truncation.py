"""Tell a file that was cut off from a whole one, by the sizes that its own structure declares.

FFmpeg plays what is there of a file that was cut off, and for most containers it says nothing; the length in
seconds that a header declares does not tell either, since the last frame of a whole file may be held for long. So
the outermost elements (boxes, chunks, pages, tags) are walked through, from one header to the next, and the last of
them has to end inside the file. What is not understood is not held against the file: it ends the walk.

A file that was cut exactly between two elements of a container that has no outer size (MPEG, Ogg, FLV) is a whole
shorter file.
"""

import mmap
import re
from collections.abc import Callable
from typing import BinaryIO

_HEAD = 300  # bytes: an Ogg page has the longest header, 27 + 255
# A step gets the head of an element and where it is. It returns where the next element begins, which may be inside
# this one, and how far the file must reach; None if the element is not known.
_Step = Callable[[bytes, int], tuple[int, int] | None]


def truncation(file: BinaryIO, container: str) -> str:
    """Return why a file of this container (the name FFmpeg gives it) is not whole, in words; "" if it is, as far as
    can be told.
    """
    size = file.seek(0, 2)
    check, step = _CHECKS.get(container), _STEPS.get(container)
    if check is not None:
        return check(file, size)
    if step is None:
        return ""
    at = reach = 0
    while at < size:
        file.seek(at)
        head = file.read(_HEAD)
        element = step(head, at)
        if element is None:
            return f"is damaged: nothing but zeros from byte {at}" if at < reach and not any(head) else ""
        at, end = element
        reach = max(reach, end)
        if reach > size:
            return f"is cut off: of at least {reach} bytes {size} are there"
    return ""


def _box(head: bytes, at: int) -> tuple[int, int] | None:
    """MP4, MOV, 3GP: ISO/IEC 14496-12, 4.2."""
    size = int.from_bytes(head[:4], "big")
    if size == 1:
        size = int.from_bytes(head[8:16], "big")
    if head[4:8] not in _BOXES or size < 8:  # 0: to the end of the file
        return None
    return at + size, at + size


_BOXES = set(b"ftyp styp moov moof mdat sidx free skip wide uuid meta mfra pnot udta emsg prft".split())


def _ebml(head: bytes, at: int) -> tuple[int, int] | None:
    """Matroska, WebM: RFC 8794. Segments, and clusters of unknown size as live recordings have, are walked into."""
    id_length = 9 - head[0].bit_length()
    if head[:id_length] not in _EBML_IDS:
        return None
    if len(head) <= id_length or len(head) < id_length + 9 - head[id_length].bit_length():
        return at + 12, at + 12  # its header is not all there
    length = 9 - head[id_length].bit_length()
    size = int.from_bytes(head[id_length : id_length + length], "big") & ((1 << 7 * length) - 1)
    content = at + id_length + length
    unknown = length > 8 or size == (1 << 7 * length) - 1
    if unknown:
        return (content, content) if head[:id_length] in (_SEGMENT, _CLUSTER) else None
    return content if head[:id_length] == _SEGMENT else content + size, content + size


_SEGMENT, _CLUSTER = bytes.fromhex("18538067"), bytes.fromhex("1f43b675")
# fmt: off
_EBML_IDS = {_SEGMENT, _CLUSTER} | set(map(bytes.fromhex, (
    "1a45dfa3",  # the header
    "114d9b74", "1549a966", "1654ae6b", "1c53bb6b",  # seek head, info, tracks, cues
    "1941a469", "1043a770", "1254c367",  # attachments, chapters, tags
    "ec", "bf",  # void, CRC-32
    "e7", "a3", "a0", "a7", "ab", "af", "5854",  # in a cluster: timestamp, blocks, its position and size
)))
# fmt: on


def _riff(head: bytes, at: int) -> tuple[int, int] | None:
    """AVI. A size of 0 was never filled in: the recording was not closed."""
    size = int.from_bytes(head[4:8], "little")
    if head[:4] not in (b"RIFF", b"LIST", b"JUNK", b"idx1") or size == 0:
        return None
    end = at + 8 + size
    if head[:4] == b"RIFF":  # some writers count its own 8 bytes
        return at + 12, end - 8
    return end + size % 2, end


def _flv_tag(head: bytes, at: int) -> tuple[int, int] | None:
    if at == 0:
        end = int.from_bytes(head[5:9], "big") + 4
    elif len(head) >= 15 and head[0] & 0x1F not in (8, 9, 18):
        return None
    else:
        end = at + 11 + int.from_bytes(head[1:4], "big") + 4
    return end, end


def _asf_object(head: bytes, at: int) -> tuple[int, int] | None:
    """WMV, ASF: the header object and the data object, whose size is 0 in a broadcast."""
    size = int.from_bytes(head[16:24], "little")
    if head[:4] not in (b"\x30\x26\xb2\x75", b"\x36\x26\xb2\x75") or size < 24:
        return None
    return at + size, at + size


def _ogg_page(head: bytes, at: int) -> tuple[int, int] | None:
    """RFC 3533, 6."""
    if len(head) >= 4 and head[:4] != b"OggS":
        return None
    segments = head[26] if len(head) > 26 else 1
    end = at + 27 + segments + sum(head[27 : 27 + segments])
    return end, end


def _program_pack(head: bytes, at: int) -> tuple[int, int] | None:
    """MPEG program streams: pack headers, system headers, packets with their length. Zeros may stand between."""
    if len(head) < 4 and any(head):
        return at + 4, at + 4
    kind = head[3] if head[:3] == b"\0\0\1" else 0
    if kind == 0xB9:  # the end code
        return at + 4, at + 4
    if kind == 0xBA:
        mpeg2 = head[4:5] >= b"\x40"
        length = 14 + (head[13] & 7 if len(head) > 13 else 0) if mpeg2 else 12
        return at + length, at + length
    if kind < 0xBB:
        return None
    end = at + 6 + int.from_bytes(head[4:6], "big")
    return end, end


def _transport_stream(file: BinaryIO, size: int) -> str:
    """MPEG-TS: packets of one size, 188 bytes, 192 with times (M2TS), or 204 with parity."""
    file.seek(0)
    head = file.read(5 * 204)
    for length, sync in ((188, 0), (192, 4), (204, 0)):
        if len(head) > 4 * length + sync and all(head[sync + i * length] == 0x47 for i in range(5)):
            if size % length:
                return f"is cut off: its last packet has {size % length} of {length} bytes"
            file.seek(size - length + sync)
            return "" if file.read(1) == b"\x47" else "is damaged: its last packet has no sync byte"
    return ""


def _gif(file: BinaryIO, size: int) -> str:
    """GIF89a. A missing trailer alone does no harm."""
    if size < 13:
        return "is cut off"
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 13 + _color_table(data[10])
        while at < size and data[at] != 0x3B:
            kind = data[at]
            if kind == 0x2C and at + 10 <= size:
                at += 11 + _color_table(data[at + 9])
            elif kind == 0x21:
                at += 2
            elif kind == 0x2C:
                return "is cut off in the head of an image"
            else:
                return "" if any(data[at : at + _HEAD]) else f"is damaged: nothing but zeros from byte {at}"
            while at < size and data[at]:
                at += data[at] + 1
            at += 1
    return f"is cut off: of at least {at} bytes {size} are there" if at > size else ""


def _color_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _y4m(file: BinaryIO, size: int) -> str:
    """YUV4MPEG2: a line, then frames of one size, each behind a line of its own."""
    file.seek(0)
    line = file.readline(4096)
    fields = {field[:1]: field[1:] for field in line.split()[1:]}
    shape = re.fullmatch(rb"(mono|[0-9]{3})(alpha|jpeg|mpeg2|paldv)?p?([0-9]+)?", fields.get(b"C", b"420"))
    sides = fields.get(b"W", b""), fields.get(b"H", b"")
    if shape is None or not all(side.isdigit() for side in sides):
        return ""
    width, height = map(int, sides)
    # Chroma columns and rows for each of luma, rounded up, of two planes.
    across, down = {b"444": (1, 1), b"422": (2, 1), b"411": (4, 1), b"410": (4, 4)}.get(shape[1], (2, 2))
    chroma = 0 if shape[1] == b"mono" else 2 * -(-width // across) * -(-height // down)
    pixels = width * height * (2 if shape[2] == b"alpha" else 1) + chroma
    length = pixels * (2 if shape[3] and int(shape[3]) > 8 else 1)
    at = len(line)
    while at < size:
        file.seek(at)
        line = file.readline(4096)
        if not line.startswith(b"FRAME"):
            return f"is cut off or damaged: no frame begins at byte {at}"
        at += len(line) + length
    return f"is cut off: of at least {at} bytes {size} are there" if at > size else ""


def _jpeg(file: BinaryIO, size: int) -> str:
    """JPEG: the end mark comes after the first scan. The thumbnail in the head of a photo has one too."""
    file.seek(0)
    data = file.read()
    at = 2
    while at + 4 <= size and data[at] == 0xFF and data[at + 1] != 0xDA:
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return "" if b"\xff\xd9" in data[at:] else "is cut off: it has no end mark"


_STEPS: dict[str, _Step] = {
    "mov,mp4,m4a,3gp,3g2,mj2": _box,
    "matroska,webm": _ebml,
    "avi": _riff,
    "flv": _flv_tag,
    "asf": _asf_object,
    "ogg": _ogg_page,
    "mpeg": _program_pack,
}
_CHECKS: dict[str, Callable[[BinaryIO, int], str]] = {
    "mpegts": _transport_stream,
    "gif": _gif,
    "yuv4mpegpipe": _y4m,
    "jpeg_pipe": _jpeg,
}
