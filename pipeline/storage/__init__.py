"""Where bytes lie: a folder on this machine or a prefix of a bucket. S3 lives here alone (s3.py).

One primitive carries all commits: `create`, which writes a whole object only if there is none.
S3: one plain PUT with ``If-None-Match: *``, never multipart. Local: fsync, ``link(2)``, fsync the
folder. After a refusal or a lost answer the stored object is compared with ours, so an answer
lost on the way is not mistaken for a defeat.

Credentials and endpoints come from the usual AWS chain (environment, profile, instance role).
A store is cheap to build and holds secrets once built: build it where it is used, pass its URI.
"""

import re
import secrets
from pathlib import Path

from pipeline.errors import RunRefused, StorageDenied, StorageMissing
from pipeline.keys import printable
from pipeline.passwords import without_password
from pipeline.storage.contract import Found, ObjectChanged, ObjectUnreadable, Store
from pipeline.storage.local import LocalStore
from pipeline.storage.s3 import S3Store

__all__ = [
    "PREFLIGHT",
    "Found",
    "LocalStore",
    "ObjectChanged",
    "ObjectUnreadable",
    "S3Store",
    "Store",
    "absolute",
    "check_create_only",
    "open_store",
]

PREFLIGHT = ".preflight-"  # how the names of trial objects begin; a killed driver may leave one


def open_store(uri: str) -> Store:
    """The store at a URI.

    Args:
        uri: a local path, or ``s3://bucket/prefix``. Nothing else is accepted: no credentials,
            query, fragment or chained protocol can hide in it.

    Raises:
        RunRefused: on any other form, naming it.
    """
    if uri.startswith("s3://"):
        match = re.fullmatch(r"s3://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?:/(.*))?", uri, re.DOTALL)
        if not match or "?" in uri or "#" in uri:
            raise RunRefused(
                f"{printable(_without_secrets(uri))} is not s3://bucket/prefix; "
                "give bucket and prefix only"
            )
        return S3Store(match.group(1), (match.group(2) or "").strip("/"))
    if "://" in uri or "::" in uri:
        raise RunRefused(
            f"{printable(_without_secrets(uri))}: "
            "only local paths and s3://bucket/prefix can be read and written"
        )
    return LocalStore(Path(uri))


def _without_secrets(uri: str) -> str:
    # After ? or # may be a signature.
    return re.split("[?#]", without_password(uri), maxsplit=1)[0]


def absolute(uri: str) -> str:
    """The one spelling of a URI: absolute local path or s3:// without a trailing slash."""
    return open_store(uri).uri


def check_create_only(store: Store) -> None:
    """Refuse a store that does not keep the promise commits rest on.

    Raises:
        RunRefused: if a second create overwrites, or the place cannot be written.
    """
    path = f"{PREFLIGHT}{secrets.token_hex(8)}"
    try:
        first = store.create(path, b"first " + path.encode())
        second = store.create(path, b"second " + path.encode())
        kept = store.read(path)
        store.delete(path)
    except StorageMissing as error:
        raise RunRefused(f"cannot write to {store.uri}: {error}") from error
    except StorageDenied as error:
        raise RunRefused(
            f"cannot write to {store.uri}: {error}; check credentials and permissions"
        ) from error
    except OSError as error:
        raise RunRefused(f"cannot write to {store.uri}: {error}") from error
    if not first or second or not kept.startswith(b"first"):
        raise RunRefused(
            f"{store.uri} overwrites an object that must not exist (it ignores If-None-Match: *); "
            "commits would not be safe there. "
            "Use a store with conditional writes (AWS S3, Ceph, a local disk)"
        )
