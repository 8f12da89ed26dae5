"""Reads and writes the texts about an image in its file: PNG's text chunks, EXIF and XMP.

=============  ==============================  ===================================================
text           PNG                             JPEG and WebP
=============  ==============================  ===================================================
``parameters`` text chunk ``parameters``       EXIF's UserComment, as AUTOMATIC1111's web UI has it
``fewstep``    text chunk ``fewstep``          XMP, property ``record`` of :data:`NAMESPACE`
=============  ==============================  ===================================================
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

CHUNK = "fewstep"
"""Name of fewstep's own text: one JSON object."""
PARAMETERS = "parameters"
"""The text of AUTOMATIC1111's web UI, which most viewers of generated images read."""
NAMESPACE = "urn:fewstep:1.0:"
"""Namespace of fewstep's XMP property."""

_SEGMENT = 65533
"""Bytes that a segment of a JPEG can hold."""
_STANDARD = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"
_NOTE = "http://ns.adobe.com/xmp/note/"
_PART = 65400
"""Bytes of extended XMP in a segment, by its specification."""
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE, _OTHERS = b"UNICODE\0", (b"ASCII\0\0\0", bytes(8))
"""Prefixes of a UserComment: they name the character code, or leave it undefined."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def save_options(texts: Mapping[str, str], kind: str) -> dict[str, Any]:
    """Return the options of Pillow's ``save`` that write texts into the file.

    Args:
        texts: ``parameters`` and ``fewstep``, both or one or none.
        kind: ``PNG``, ``JPEG`` or ``WEBP``.
    """
    texts = {name: _utf8(text) for name, text in texts.items()}
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        for name, text in texts.items():
            chunks.add_text(name, text)
        return {"pnginfo": chunks}
    options: dict[str, Any] = {}
    if PARAMETERS in texts:
        exif = _exif(texts[PARAMETERS])
        # Only prompts of many thousand emoji are longer. The record holds them too.
        if kind != "JPEG" or len(exif) <= _SEGMENT:
            options["exif"] = exif
    if CHUNK in texts:
        xmp = _xmp(f'xmlns:f="{NAMESPACE}"', f"<f:record>{_escaped(texts[CHUNK])}</f:record>")
        options |= {"extra": b"".join(_segments(xmp))} if kind == "JPEG" else {"xmp": _packet(xmp)}
    return options


def texts(image: Image.Image) -> dict[str, str]:
    """Return the texts ``parameters`` and ``fewstep`` of an opened image, if it has them.

    EXIF and XMP that are damaged, or hold something else, count as absent.
    """
    found = {name: str(image.info[name]) for name in (PARAMETERS, CHUNK) if name in image.info}
    comment = _user_comment(image.info.get("exif"))
    if PARAMETERS not in found and comment and "Steps: " in comment:
        found[PARAMETERS] = comment
    if CHUNK not in found:
        segments = [content for name, content in getattr(image, "applist", ()) if name == "APP1"]
        record = _record(image.info.get("xmp"), segments)
        if record is not None:
            found[CHUNK] = record
    return found


def _utf8(text: str) -> str:
    """Replace what UTF-8 cannot hold: a path that is not UTF-8 has lone surrogates."""
    return text.encode(errors="replace").decode()


def _exif(parameters: str) -> bytes:
    from PIL.Image import Exif

    exif = Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + parameters.encode("utf-16-be")
    return exif.tobytes()


def _user_comment(exif: object) -> str | None:
    from PIL.Image import Exif

    if not isinstance(exif, bytes):
        return None
    read = Exif()
    try:
        read.load(exif)
        comment = read.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except Exception:  # Pillow's reader of TIFF tags raises errors of any kind
        return None
    if not isinstance(comment, bytes):
        return None
    prefix, rest = comment[:8], comment[8:]
    if prefix == _UNICODE:
        # Writers use the byte order of the file or another. Latin letters show which.
        order = "utf-16-be" if rest[0::2].count(0) >= rest[1::2].count(0) else "utf-16-le"
        text = rest.decode(order, "replace")
    else:
        text = (rest if prefix in _OTHERS else comment).decode("utf-8", "replace")
    return text.rstrip("\0").removeprefix("\ufeff")


def _xmp(attributes: str, properties: str = "") -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {attributes}>{properties}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def _packet(xmp: bytes) -> bytes:
    start = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    return start.encode() + xmp + b'\n<?xpacket end="r"?>'


def _escaped(text: str) -> str:
    from xml.sax.saxutils import escape

    return escape(_NOT_XML.sub("\ufffd", text))


def _segments(xmp: bytes) -> Iterable[bytes]:
    """Yield the segments of a JPEG with XMP; the rest of a long one is extended XMP."""
    if len(_STANDARD + _packet(xmp)) <= _SEGMENT:
        yield _segment(_STANDARD + _packet(xmp))
        return
    guid = hashlib.md5(xmp, usedforsecurity=False).hexdigest().upper()
    yield _segment(_STANDARD + _packet(_xmp(f'xmlns:n="{_NOTE}" n:HasExtendedXMP="{guid}"')))
    for at in range(0, len(xmp), _PART):
        place = guid.encode() + struct.pack(">II", len(xmp), at)
        yield _segment(_EXTENSION + place + xmp[at : at + _PART])


def _segment(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def _record(xmp: object, segments: Iterable[bytes]) -> str | None:
    if not isinstance(xmp, bytes):
        return None
    guid = _property(xmp, _NOTE, "HasExtendedXMP")
    return _property(xmp if guid is None else _extended(segments, guid), NAMESPACE, "record")


def _extended(segments: Iterable[bytes], guid: str) -> bytes:
    """Return the extended XMP with this hash; empty if a part of it is missing."""
    start = _EXTENSION + guid.encode()
    found = [segment[len(start) :] for segment in segments if segment.startswith(start)]
    parts = {part[4:8]: part[8:] for part in found if len(part) > 8}
    xmp = b"".join(parts[at] for at in sorted(parts))
    return xmp if hashlib.md5(xmp, usedforsecurity=False).hexdigest().upper() == guid else b""


def _property(xmp: bytes, namespace: str, name: str) -> str | None:
    """Return a property of a packet, from an element or an attribute; ``None`` without one."""
    from xml.etree import ElementTree

    try:
        text = xmp.decode()
        if "<!" in text:  # XMP has no declarations; growing entities are an attack
            return None
        tree = ElementTree.fromstring(text.strip("\0\ufeff \r\n\t"))
    except (UnicodeDecodeError, ElementTree.ParseError):
        return None
    key = f"{{{namespace}}}{name}"
    for element in tree.iter():
        if element.tag == key:
            return element.text
        if key in element.attrib:
            return element.attrib[key]
    return None
