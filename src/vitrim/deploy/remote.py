"""The Hugging Face Hub: the one place that reads from it and writes to it."""

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from vitrim.words.errors import StoreError
from vitrim.words.plain import reason

__all__ = ["HUB", "fetch", "on_hub", "repository_of", "upload"]

HUB = "hf-hub:"

# The bases bring the errors of the transport, which is another library in each generation of huggingface_hub; a name
# that is no repository's is a ValueError there, and a missing file need not be an OSError.
_FAULTS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError, EntryNotFoundError)


def on_hub(path: str | Path) -> bool:
    """Whether a path names a repository on the Hub."""
    return str(path).startswith(HUB)


def repository_of(name: str) -> tuple[str, str | None]:
    """Repository and revision of ``hf-hub:owner/name[@revision]``."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    return repository, revision or None


def fetch(name: str, file: str) -> Path | None:
    """Fetch a file of a repository, or find it among those fetched before.

    Args:
        name: ``hf-hub:owner/name[@revision]``.
        file: its name there.

    Returns:
        The local file, or None if the repository has no such file.

    Raises:
        StoreError: if there is no such repository, or the Hub cannot be asked.
    """
    repository, revision = repository_of(name)
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except _FAULTS as problem:
        if isinstance(problem, EntryNotFoundError) and not isinstance(problem, LocalEntryNotFoundError):
            return None
        raise StoreError(f"{name}: the repository must be there to read, but {_said(problem)}") from None


def upload(folder: Path, repository: str, *, private: bool = False, revision: str | None = None) -> None:
    """Write all files of a folder to a repository, which is made if it is not there.

    Args:
        folder: the files.
        repository: ``owner/name``.
        private: whether a repository that is made is private.
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
