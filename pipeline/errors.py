"""Every way a run can end other than well, named for who must act.

MaskfleetError
├── RunRefused        exit 2  the operator changes something; nothing was spent, nothing written
├── RunUnfinished     exit 4  run the same command again; what is committed stays
│   └── RunStuck              the same, but threads of this process hang and must be left behind
└── StorageError              a store did not do what was asked, after bounded retries
    ├── StorageMissing        no such object or bucket
    ├── StorageDenied         wrong or missing credentials, read-only
    └── StorageBusy           throttled, unreachable, full: worth another try later

ImageRejected is not an error of the run: it is the verdict on one image and becomes a row.
"""

from typing import Literal, get_args

Station = Literal["plan", "fetch", "decode", "predict"]
"""Where an image was rejected."""

Reason = Literal[
    "empty",
    "not_an_image",
    "unsupported_format",
    "truncated",
    "corrupt",
    "too_large",
    "timeout",
    "killed_decode",
    "killed_predict",
    "vanished",
    "changed",
    "unreadable",
]
"""Why an image has no mask: the closed list of the output contract."""

REASONS: tuple[str, ...] = get_args(Reason)

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_REFUSED = 2
EXIT_REJECTIONS = 3
EXIT_UNFINISHED = 4
EXIT_NOT_PROMOTED = 5
EXIT_UNDECIDED = 6


class MaskfleetError(Exception):
    """The root of the tree above."""


class RunRefused(MaskfleetError):
    """Asked for something that cannot be done as asked; nothing was spent."""


class RunUnfinished(MaskfleetError):
    """Stopped before the end; the same command goes on from what is committed."""


class RunStuck(RunUnfinished):
    """Nothing moves any more; the process must end without waiting for its threads."""


class StorageError(MaskfleetError):
    """A store did not do what was asked of it."""


class StorageMissing(StorageError, FileNotFoundError):
    """There is no such object, folder or bucket."""


class StorageDenied(StorageError, PermissionError):
    """The store knows us not, or does not let us."""


class StorageBusy(StorageError):
    """The store is throttled, unreachable or full; later may be better."""


def refuse_other_format(what: str, found: object, reads: int) -> None:
    """Refuse what a later (or far older) Maskfleet wrote.

    Args:
        what: its address, or what it is.
        found: the format version that it states.
        reads: the one that this Maskfleet reads.

    Raises:
        RunRefused: they differ.
    """
    if found != reads:
        raise RunRefused(
            f"{what} has format version {found}, this Maskfleet reads {reads}; "
            "use the version that wrote it"
        )


class ImageRejected(MaskfleetError):
    """The verdict on one image that will have no mask.

    Args:
        station: where it was decided.
        reason: one of the closed list.
        detail: a sentence for a person, with the value that decided.
    """

    def __init__(self, station: Station, reason: Reason, detail: str) -> None:
        super().__init__(f"{station}: {reason}: {detail}")
        self.station: Station = station
        self.reason: Reason = reason
        self.detail = detail
