"""Sends a folder of weights to the Hugging Face hub. Needs no torch, which is slow."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resnest_imagenet.errors import ConfigError, StorageError, UserError, first_line

FILES = ("model.safetensors", "config.json", "README.md")  # what is sent, whatever else is in the folder
_TOKEN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


def require_token(repository: str) -> None:
    """Raise a ConfigError if the hub cannot be asked to take a repository: there is no token, or it is set offline.

    Args:
        repository: OWNER/NAME, for the message.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push={repository}: HF_HUB_OFFLINE is set: unset it")
    if get_token() is None:
        raise ConfigError(f"push={repository}: no token of the hub: {_TOKEN}")


def push_folder(folder: Path, repository: str) -> str:
    """Send the files of an exported folder to a repository of the hub, as one commit; return a line about it.

    A repository that is not there is made, and is private. The environment's HF_ENDPOINT chooses another hub.

    Args:
        folder: of `resnest-export format=hub`.
        repository: OWNER/NAME.

    Raises:
        ConfigError: there is no token, or the hub refuses it.
        StorageError: the hub does not answer, or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    require_token(repository)
    had_bars = not are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi()
    try:
        with _explaining(folder, repository):
            is_new = not hub.repo_exists(repository)
            hub.create_repo(repository, private=True, exist_ok=True)
            added = [CommitOperationAdd(name, folder / name) for name in FILES]
            commit = hub.create_commit(repository, added, commit_message=f"Upload {folder.resolve().name}")
    finally:
        if had_bars:
            enable_progress_bars()
    kind = "a new private repository" if is_new else "its repository"
    return f"sent {folder} to {hub.endpoint}/{repository}, {kind}: commit {commit.oid[:12]}"


@contextmanager
def _explaining(folder: Path, repository: str) -> Iterator[None]:
    """Turn the hub's refusals and failures into one line."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise _explain(error, folder, repository) from error


def _explain(error: Exception, folder: Path, repository: str) -> UserError:
    from huggingface_hub.errors import HfHubHTTPError

    where = f"push={repository}: {folder} is written, but not sent"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return ConfigError(f"{where}: the hub refuses the token (401): {_TOKEN}")
    if status == 403:
        return ConfigError(f"{where}: the token may not write there (403): choose another OWNER or token")
    return StorageError(f"{where} ({first_line(error)}): run the command again")
