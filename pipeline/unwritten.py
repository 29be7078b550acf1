"""The line of a run that is never written: all the legs need is in its ledger's memory."""

from dataclasses import asdict

from models import Bundle
from pipeline.config import SegmentConfig
from pipeline.create import grid_for
from pipeline.layout import Layout
from pipeline.ledger import Ledger, frozen
from pipeline.line import Line
from pipeline.place import Found
from pipeline.room import Room
from pipeline.storage import open_store


def unwritten(asked: SegmentConfig, card: Bundle, found: Found, layout: Layout) -> Line:
    """The line of a run of this config that answers pictures and keeps nothing.

    Args:
        asked: what a run would be asked for.
        card: of the model.
        found: what the place says of the model.
        layout: where answers would lie.
    """
    grid = grid_for(asked, card, found)
    run = {
        "config": asked.identity(),
        "bundle": {"classes": [asdict(entry) for entry in card.classes]},
        "frozen": frozen(layout, grid, found.budget, found.device),
    }
    ledger, room = Ledger(open_store(asked.out), run), Room(asked.batch.window_mb * 1024**2)
    return Line(ledger, open_store(asked.source), asked, grid, room)
