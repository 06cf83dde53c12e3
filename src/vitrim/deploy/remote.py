"""Read from and write to the Hugging Face Hub; no other module does."""

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError, safe_open

from vitrim.words.errors import StoreError
from vitrim.words.plain import reason

__all__ = ["HUB", "cached", "fetch", "header", "on_hub", "repository_of", "upload"]

HUB = "hf-hub:"

# The base classes include the errors of the HTTP library, which differs between versions of huggingface_hub. An invalid
# repository name is a ValueError there, and a missing file need not be an OSError.
_FAULTS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError, EntryNotFoundError)

_UNREAD: tuple[type[Exception], ...] = (*_FAULTS, SafetensorsParsingError)


def on_hub(path: str | Path) -> bool:
    """Return whether a path names a repository on the Hub."""
    return str(path).startswith(HUB)


def repository_of(name: str) -> tuple[str, str | None]:
    """Return repository and revision of ``hf-hub:owner/name[@revision]``."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    return repository, revision or None


def fetch(name: str, file: str) -> Path | None:
    """Download a file of a repository, or find it in the cache.

    Args:
        name: ``hf-hub:owner/name[@revision]``.
        file: its name in the repository.

    Returns:
        The local file, or None if the repository has no such file.

    Raises:
        StoreError: if there is no such repository, or the Hub cannot be reached.
    """
    repository, revision = repository_of(name)
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except _FAULTS as problem:
        if isinstance(problem, EntryNotFoundError) and not isinstance(problem, LocalEntryNotFoundError):
            return None
        raise StoreError(f"{name}: the repository must be there to read, but {_said(problem)}") from None


def header(name: str, file: str) -> dict[str, str] | None:
    """Return the metadata in the header of a safetensors file; only this part of the file is downloaded.

    Without a connection the header of the file in the cache is read.

    Args:
        name: ``hf-hub:owner/name[@revision]``.
        file: its name in the repository.

    Returns:
        The metadata, empty if the file has none, or None if the repository has no such file.

    Raises:
        StoreError: if there is no such repository, the Hub cannot be reached, or the file is not safetensors.
    """
    repository, revision = repository_of(name)
    try:
        return dict(HfApi().parse_safetensors_file_metadata(repository, file, revision=revision).metadata or {})
    except EntryNotFoundError:
        return None
    except _UNREAD:
        path = fetch(name, file)  # from the cache, or with an error that says why not
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as problem:
        raise StoreError(f"{name}: {file} must be whole safetensors, but {reason(problem)}; push it again") from None


def cached(repository: str, file: str) -> Path | None:
    """Return the file of a repository ``owner/name`` if it was downloaded before; nothing is downloaded now."""
    try:
        found = try_to_load_from_cache(repository, file)
    except _FAULTS:  # a name that no repository can have
        return None
    return Path(found) if isinstance(found, str) else None


def upload(folder: Path, repository: str, *, private: bool = False, revision: str | None = None) -> None:
    """Upload all files of a folder to a repository, which is created if it does not exist.

    Args:
        folder: the files.
        repository: ``owner/name``.
        private: whether a newly created repository is private.
        revision: branch to write to.

    Raises:
        StoreError: if the Hub refuses or cannot be reached.
    """
    try:
        hub = HfApi()
        hub.create_repo(repository, exist_ok=True, private=private)
        hub.upload_folder(folder_path=folder, repo_id=repository, revision=revision, commit_message="Pushed by vitrim")
    except _FAULTS as problem:
        raise StoreError(
            f"{repository}: the repository must be there to write, but {_said(problem)}; see `hf auth login`, or write "
            "to a local place"
        ) from None


def _said(problem: BaseException) -> str:
    lines = [line.strip().rstrip(".") for line in str(problem).splitlines() if line.strip()]
    if isinstance(problem, HfHubHTTPError) and len(lines) > 1:
        return lines[1]  # the first is the status and a request id
    return reason(problem)
