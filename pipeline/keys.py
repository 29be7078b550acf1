"""The names of images: unique, printable, and reversible to the path they came from.

A key is the path below the source root, plus ``#member`` for a tar member or a table row.
Inside a part, ``#``, ``%``, control characters and bytes that are not UTF-8 are percent-escaped,
so the first ``#`` of a key always separates path from member and no two images share a key.
"""

import os
import re

_MUST_ESCAPE = re.compile(r"[#%\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ESCAPE = re.compile(r"%([0-9A-F]{2})")
_REPEAT = re.compile(r";(\d+)$")


def escape(part: str) -> str:
    """Percent-escape one part (a path or a member name; ``/`` stays).

    Args:
        part: text in which undecodable bytes are surrogates (``os.fsdecode``).
    """

    def quoted(match: re.Match[str]) -> str:
        raw = match.group().encode("utf-8", "surrogateescape")
        return "".join(f"%{byte:02X}" for byte in raw)

    if part.isascii() and part.isprintable() and "%" not in part and "#" not in part:
        return part  # nearly all are like this, and asking so costs a quarter of looking
    try:
        return _MUST_ESCAPE.sub(quoted, part)
    except UnicodeEncodeError:  # a lone surrogate that came from no byte: name its code point
        return _MUST_ESCAPE.sub(
            lambda m: "".join(f"%{b:02X}" for b in m.group().encode("utf-16-be")), part
        )


def unescape(part: str) -> str:
    """Undo `escape`; undecodable bytes come back as surrogates."""
    raw = b"".join(
        bytes([int(piece, 16)]) if odd else piece.encode("utf-8")
        for odd, piece in ((i % 2, p) for i, p in enumerate(_ESCAPE.split(part)))
    )
    return os.fsdecode(raw)


def path_of(key: str) -> str:
    """The path below the source root that a key names, as the store knows it."""
    return unescape(key.partition("#")[0])


def member_part(name: str, seen: dict[str, int]) -> str:
    """The key part of a shard member; a repeated name gets ``;2``, then ``;3`` and so on.

    Args:
        name: member name as stored in the shard.
        seen: how often each name came before in this shard; updated.
    """
    part = _REPEAT.sub(lambda m: f"%3B{m.group(1)}", escape(name))
    seen[part] = seen.get(part, 0) + 1
    return part if seen[part] == 1 else f"{part};{seen[part]}"


def printable(text: str, limit: int = 200) -> str:
    """Text made safe for a log line or an error: no control characters, bounded length."""
    clean = "".join(
        c if c.isprintable() else "�" for c in text.encode("utf-8", "replace").decode("utf-8")
    )
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
