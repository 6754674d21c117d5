"""The record of a search that several processes or machines share: a study in Optuna's storage, each finding a trial of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import VitreousError

BEAT = 5.0  # seconds between the signs of life of who works on a finding
DEAD = 60.0  # seconds without one, by the clock of who waits, after which the finding is anybody's again
STUDY = "vitreous search"


class SharedRecord:
    """Findings by kind and key, as `Record`, in `storage`: a database's URL as Optuna takes it, or a file that all can reach.

    A finding is claimed by a trial that is running; of two for one key the one with the lower number counts. Its process gives
    signs of life; where they end, because it was killed, the trial is marked as failed and the finding made again. A measured
    recipe's values are milliseconds and loss, so that Optuna's tools show the front.
    """

    def __init__(self, storage: str, about: dict[str, Any], beat: float = BEAT, dead: float = DEAD) -> None:
        self.beat, self.dead = beat, dead
        self.found: dict[tuple[str, str], Any] = {}
        self.busy: set[tuple[str, str]] = set()
        self.mine: dict[tuple[str, str], tuple[int, threading.Event]] = {}
        self.seen: dict[int, tuple[Any, float]] = {}
        self.storage, self.study = opened(storage)
        first = self._create("about", "", about, self.states.PRUNED)
        told = min((t for t in self._trials() if t.user_attrs["kind"] == "about"), key=lambda t: t.number, default=first)
        for name, value in about.items():
            if (there := told.user_attrs["value"].get(name)) != value:
                raise VitreousError(f"{storage} holds a search of another {name} ({there}, not {value}): give another --storage")
        self.refresh()

    # ---- as `Record`

    def get(self, kind: str, key: str) -> Any:
        return self.found.get((kind, key))

    def all(self, kind: str) -> dict[str, Any]:
        return {key: value for (k, key), value in self.found.items() if k == kind}

    def spent(self) -> float:
        """Every process has minutes of its own."""
        return 0.0

    def refresh(self) -> None:
        """See what others found, and at what they are; what nobody works on any more is free again."""
        taken = set[tuple[str, str]]()
        for trial in self._trials():
            place = trial.user_attrs["kind"], trial.user_attrs["key"]
            if place in self.mine:
                continue
            if trial.state == self.states.RUNNING:
                beat, since = self.seen.get(trial.number, (None, 0.0))
                if beat != trial.user_attrs.get("beat", 0) or not since:
                    self.seen[trial.number] = (trial.user_attrs.get("beat", 0), time.monotonic())
                elif time.monotonic() - since > self.dead:
                    self._end(trial._trial_id, self.states.FAIL)
                    continue
                taken.add(place)
            elif trial.state != self.states.FAIL and "value" in trial.user_attrs:
                self.found.setdefault(place, trial.user_attrs["value"])
        self.busy = taken - self.found.keys()

    def claim(self, kind: str, key: str) -> bool:
        """Whether it is this process that is to find it."""
        self.refresh()
        place = kind, key
        if place in self.found or place in self.busy:
            return False
        trial = self._create(kind, key, None, self.states.RUNNING)
        live = [t for t in self._trials() if (t.user_attrs["kind"], t.user_attrs["key"]) == place and t.state != self.states.FAIL]
        if min(t.number for t in live) < trial.number:
            self._end(trial._trial_id, self.states.FAIL)
            return False
        over = threading.Event()
        threading.Thread(target=self._live, args=(trial._trial_id, over), daemon=True).start()
        self.mine[place] = trial._trial_id, over
        return True

    def release(self, kind: str, key: str) -> None:
        """Give a claim back unfulfilled."""
        if (held := self.mine.pop((kind, key), None)) is not None:
            held[1].set()
            self._end(held[0], self.states.FAIL)

    def add(self, kind: str, key: str, value: Any) -> Any:
        """Keep what was claimed; gives back what counts, which is another's where this process was taken for dead."""
        trial, over = self.mine.pop((kind, key))
        over.set()
        value = json.loads(json.dumps(value))
        runs = [(run["ms"][0], run["lost"]) for run in value.get("runs", {}).values()]
        with _told(f"keeping {kind}"):
            try:
                self.storage.set_trial_user_attr(trial, "value", value)
                self._end(trial, self.states.COMPLETE if runs else self.states.PRUNED, min(runs, default=None))
            except RuntimeError:  # it is over: others waited too long
                self.refresh()
                if (kind, key) not in self.found:
                    self._create(kind, key, value, self.states.PRUNED)
        return self.found.setdefault((kind, key), value)

    # ---- trials of the study

    @property
    def states(self) -> Any:
        from optuna.trial import TrialState

        return TrialState

    def _trials(self) -> list[Any]:
        """Ours, by number: what else lies in the study does not concern us."""
        with _told("reading the storage"):
            return [t for t in self.storage.get_all_trials(self.study, deepcopy=False) if {"kind", "key"} <= t.user_attrs.keys()]

    def _create(self, kind: str, key: str, value: Any, state: Any) -> Any:
        """A trial that has its attributes from the beginning, for others to see."""
        from optuna.trial import create_trial

        given = {"kind": kind, "key": key} | ({} if value is None else {"value": value})
        with _told("writing into the storage"):
            made = self.storage.create_new_trial(self.study, template_trial=create_trial(state=state, user_attrs=given))
            return self.storage.get_trial(made)

    def _end(self, trial: int, state: Any, values: Any = None) -> None:
        with _told("writing into the storage"):
            try:
                self.storage.set_trial_state_values(trial, state, values)
            except RuntimeError:
                if values is not None or state != self.states.FAIL:
                    raise  # FAIL says no more than that it is over

    def _live(self, trial: int, over: threading.Event) -> None:
        beats = 0
        while not over.wait(self.beat):
            beats += 1
            try:
                self.storage.set_trial_user_attr(trial, "beat", beats)
            except Exception:  # over, or the storage is away: who claimed it will hear of that
                return


def opened(storage: str) -> tuple[Any, int]:
    """Optuna's storage and the number of the study in it, made where there is none. Raises `VitreousError` where it cannot be
    reached, and without Optuna."""
    try:
        import optuna
        from optuna.storages import JournalStorage, RDBStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise VitreousError("sharing a search needs Optuna: pip install 'vitreous[share]'") from None
    place = Path(storage)
    if "://" not in storage and (not storage or place.is_dir() or not place.absolute().parent.is_dir()):
        raise VitreousError(f"opening --storage {storage!r}: give a file in a folder that is there, or a database's URL")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _told(f"opening --storage {storage}"):
        held: Any = RDBStorage(storage) if "://" in storage else JournalStorage(JournalFileBackend(storage))
        study = optuna.create_study(storage=held, study_name=STUDY, directions=["minimize", "minimize"], load_if_exists=True)
        return held, held.get_study_id_from_name(study.study_name)


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """What a database says is told in a line; that a trial is over stays a RuntimeError."""
    try:
        yield
    except (VitreousError, RuntimeError):
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VitreousError(f"{doing} failed: {said}") from error
