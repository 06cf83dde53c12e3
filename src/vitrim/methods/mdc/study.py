"""Open the Optuna study that stores the trials of a search, in a local file or in a shared storage."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc

from vitrim.methods.mdc import bayes
from vitrim.train import ranks
from vitrim.train.leading import led, together
from vitrim.words.errors import RunError, VitrimError
from vitrim.words.plain import reason
from vitrim.words.private import HIDDEN, hide_passwords

__all__ = ["joined", "kept", "open_study", "reachable"]

_LOCKED = 60
"""Seconds that a process waits for others to release the lock of an SQLite file."""
_TRIES = 5
_BEATS = 4
"""Beats of a running trial within the patience of the other processes."""


_TOLD = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
_OPENING = (*_TOLD, ImportError, OSError, ValueError, optuna.exceptions.OptunaError)


@contextlib.contextmanager
def reachable(url: str, *, opening: bool = False) -> Iterator[None]:
    """Convert errors of a storage to a `RunError` of one sentence.

    Args:
        url: URL of the storage.
        opening: whether the storage is being opened, when a wrong address causes further types of errors.

    Raises:
        RunError: if the storage is locked, unreachable or unknown; its contents are not changed.
    """
    try:
        yield
    except VitrimError:
        raise
    except _OPENING as problem:
        if not opening and not isinstance(problem, _TOLD):
            raise
        cause = problem.__cause__ or problem
        said = hide_passwords(reason(getattr(cause, "orig", None) or cause))
        raise RunError(
            f"{hide_passwords(url)}: the storage must be reachable and free, but {said}; "
            "the trials told so far are kept, so mend it and run the same command again"
        ) from None


def open_study(url: str | None, name: str, identity: Mapping[str, str]) -> optuna.Study:
    """Open a study, or create it.

    Args:
        url: of a relational database (``sqlite:///trials.db``, ``mysql://…``, ``postgresql://…``), of a file that many
            machines append to (``journal:///folder/trials.log``), or of a server (``grpc://host:port``); None keeps it
            in memory.
        name: of the study in its storage.
        identity: texts that identify the model and the space, by name; stored as user attributes of the study.

    Raises:
        RunError: if the storage cannot be used, or the study is of another model or space.
    """
    # A trial that fails is told by the error that it raises; Optuna would print its parameters, too, and the traceback
    # of a storage that cannot be written.
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    if url is None:
        return optuna.create_study(study_name=name, direction="maximize")
    if f"{HIDDEN}@" in url:
        raise RunError(
            f"{url}: the storage must be named with its password, but a recipe does not keep it; give --set "
            "method.storage=URL"
        )
    with reachable(url, opening=True):
        study = _made(url, name)
        known = study.user_attrs
        for key, value in identity.items():
            if known.get(key, value) != value:
                raise RunError(
                    f"{hide_passwords(url)}: study {name} must be of the same {key}, but was made for another; "
                    "name another study or storage"
                )
        for key, value in identity.items():
            if key not in known:
                study.set_user_attr(key, value)
    return study


def joined(
    opened: Callable[[str | None], optuna.Study], storage: str | None, folder: Path | None
) -> tuple[str | None, Any]:
    """Return URL and study of a search, which all processes of a launcher work on where they can.

    Args:
        opened: opens the study at a URL, or in memory.
        storage: the URL that was named, or None for a file in the folder.
        folder: the first process's folder of the search, if it has one.

    Returns:
        Of several processes, each has the study if it is in a storage that was named, or in a file and all are on one
        machine. Else the first measures all policies, and the others get None.
    """
    studies: list[optuna.Study] = []

    def begun() -> tuple[str | None, bool]:
        url = storage or (f"sqlite:///{folder / 'trials.db'}" if folder is not None else None)
        studies.append(opened(url))
        if storage is None and ranks.count() > 1:
            bayes.drop_unfinished(studies[0])
        return url, storage is not None or (url is not None and ranks.on_one_machine())

    url, shared = led(begun)
    if shared:
        together(lambda: None if studies else studies.append(opened(url)))
    return url, studies[0] if studies else None


def _made(url: str, name: str) -> optuna.Study:
    """Create or open a study; several processes may do so at the same time, and the slower ones open it."""
    for attempt in range(_TRIES):
        try:
            return optuna.create_study(
                storage=_storage(url), study_name=name, direction="maximize", load_if_exists=True
            )
        except _TOLD as problem:
            said = f"{problem} {problem.__cause__}".lower()
            if attempt == _TRIES - 1 or not any(word in said for word in ("already exists", "unique", "duplicate")):
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError


def _storage(url: str) -> Any:
    scheme, _, rest = url.partition("://")
    if scheme == "journal":
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(rest))
    if scheme == "grpc":
        host, _, port = rest.partition(":")
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))
    wait = {"connect_args": {"timeout": _LOCKED}} if scheme.startswith("sqlite") else {"pool_pre_ping": True}
    grace = max(1, round(bayes.PATIENCE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # No callback tries a lost trial again: the search uses its position again, so that it stays repeatable.
        return optuna.storages.RDBStorage(
            url, engine_kwargs=wait, heartbeat_interval=max(1, grace // _BEATS), grace_period=grace
        )


def kept(study: optuna.Study, values: Callable[[], Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Return the values stored in the study under `names`; compute and store them if any is missing.

    So processes that share a study share the values that the first of them computed.

    Args:
        study: the study of the search.
        values: a function that computes plain values, by name.
        names: the names that are needed.
    """
    wanted = list(names)
    if any(name not in study.user_attrs for name in wanted):
        made = values()
        for name in wanted:
            study.set_user_attr(name, made[name])
    known = study.user_attrs
    return {name: known[name] for name in wanted}
