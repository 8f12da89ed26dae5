"""Files made wrong: what is in them is dropped, retyped, scaled, nested, cut or flipped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 77, 4096, 10**6, 2**31 - 1, 2**31, 2**32, 2**53, 10**9, 2**60,
    2**63, 2**64, 10**30, -(2**63), 0.5, 1.5, 1e-300, 1e308, float("nan"), float("inf"), "", "x", "7", "\0",
    "../x", "/etc/passwd", "x" * 300, "é", "\ud800", [], {}, [[]], [0], ["a"], [1, 2], {"a": 1}, {"id": 1},
    "none", "SD3Transformer2DModel",
]  # fmt: skip
"""Values that take the place of others."""
FACTORS = (0, -1, 2, 3, 1000, 10**6, 10**9, 2**40)
Document = Any


def _places(value: Document, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something lies in a document, of long lists and tables the first few."""
    pairs = enumerate(value) if isinstance(value, list) else ()
    inner: Any = value.items() if isinstance(value, dict) else pairs
    for number, (key, each) in enumerate(inner):
        if number >= 40:
            return
        yield (*at, key)
        yield from _places(each, (*at, key))


def _change(draw: Callable[..., Any], document: Document) -> None:
    """One change of a document in its place."""
    places = list(_places(document))
    if not places:
        return
    place = draw(st.sampled_from(places))
    within = document
    for key in place[:-1]:
        within = within[key]
    key, old = place[-1], within[place[-1]]
    change = draw(st.sampled_from(["odd", "odd", "odd", "drop", "scale", "nest", "other", "more"]))
    if change == "drop":
        del within[key]
    elif change == "other":
        other = document
        for step in draw(st.sampled_from(places)):
            other = other[step]
        within[key] = copy.deepcopy(other)
    elif change == "scale" and isinstance(old, int | float):
        within[key] = old * draw(st.sampled_from(FACTORS))
    elif change == "more" and isinstance(old, list | str):
        within[key] = old * draw(st.sampled_from([2, 5, 100]))
    elif change == "nest":
        within[key] = {"a": [old]} if draw(st.booleans()) else [old] * draw(st.integers(1, 3))
    else:
        within[key] = copy.deepcopy(draw(st.sampled_from(ODD)))  # it may be changed in its turn


@st.composite
def documents(draw: Callable[..., Any], valid: Document) -> bytes:
    """JSON of ``valid``, one to three things in it changed; now and then no such document at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(broken(json.dumps(valid).encode()))
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        if isinstance(document, dict | list):
            _change(draw, document)
    return json.dumps(document).encode()


DEPTHS = (50, 900, 100_000)


@st.composite
def broken(draw: Callable[..., Any], valid: bytes) -> bytes:
    """``valid`` cut, flipped, filled, or something else instead."""
    way = draw(st.sampled_from(["cut", "flip", "flip", "zero", "put", "twice", "else", "deep"]))
    if way == "else":
        return draw(
            st.sampled_from(
                [b"", b"\0", b"[]", b"null", b"{}", b"7", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"NaN"]
            )
        )
    if way == "deep":
        depth = draw(st.sampled_from(DEPTHS))
        opened, closed = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), (b'{"latent":', b"}")]))
        return opened * depth + (b"1" + closed * depth if draw(st.booleans()) else b"")
    if not valid:
        return b"x"
    at = draw(st.integers(0, len(valid) - 1))
    if way == "cut":
        return valid[:at]
    if way == "flip":
        data = bytearray(valid)
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(data)
    if way == "zero":
        size = draw(st.integers(1, max(1, len(valid) // 4)))
        return valid[:at] + bytes(min(size, len(valid) - at)) + valid[at + size :]
    if way == "twice":
        return valid + valid[at:]
    filler = draw(
        st.sampled_from([b"\xff" * 8, b"\xff\xff\xff\x7f", b"9" * 30, b"[" * 50, b"\0" * 100, b"-", b"e999"])
    )
    return valid[:at] + filler + valid[at + (len(filler) if draw(st.booleans()) else 0) :]
