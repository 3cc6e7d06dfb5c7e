"""A run's curves as DVCLive keeps them, so that `dvc plots` and its viewers show a run while it trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvclive import Live  # type: ignore[attr-defined]

Rows = Sequence[Mapping[str, float]]
FOLDER = "live"


def curves(folder: Path) -> Callable[[Rows], None]:
    """A function that takes a run's history after every epoch and keeps `folder/live` up to it, and nothing else.

    What lies there is always made from the history, never from what lies there: a run that was killed between an epoch
    and its curve has the same files in the end.
    """
    live: Live | None = None
    n_kept = 0

    def keep(history: Rows) -> None:
        nonlocal live, n_kept
        if live is None:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
            live = _files_alone(folder / FOLDER)
        for step, row in enumerate(history[n_kept:], start=n_kept):
            live.step = step
            for name, value in row.items():
                if name != "epoch":
                    live.log_metric(name, value)
            live.make_summary()  # type: ignore[no-untyped-call]  # next_step would leave a note in .dvc/tmp
        n_kept = len(history)

    return keep


def _files_alone(folder: Path) -> Live:
    """A DVCLive that writes its files and looks at nothing else.

    Told not to save an experiment, it still makes a DVC repository of the Git repository that it is run in, fails in
    one without a commit, and reports to DVC Studio where there is a token.
    """
    from dvclive import Live  # type: ignore[attr-defined]  # here, for it imports half of DVC

    class Alone(Live):
        def _init_dvc(self) -> None:
            pass

        def _init_studio(self) -> None:
            pass

    return Alone(str(folder), report=None, save_dvc_exp=False, dvcyaml=None, monitor_system=False)
