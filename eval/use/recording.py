"""`--learn` of chat and serve: a recorder for a loaded model."""

from __future__ import annotations

from drafter.use.log import use_folder
from drafter.use.recorder import UseRecorder
from eval.cli.session import Session


def open_recorder(session: Session, limit: int) -> UseRecorder:
    """Return what keeps the texts of the model of `session`, in at most `limit` bytes.

    Raises OSError: there is no cache folder, or it cannot be written.
    """
    folder = use_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return UseRecorder(session.model.decoder, session.settings.model, folder, limit)


def say(recorder: UseRecorder) -> str:
    """Return a sentence about what is kept."""
    return f"conversations are kept in {recorder.folder}, for train --from-use; `learned` shows and erases them"
