"""What the Hub and the disk refuse, in words for whoever pushes or reads: what happened, what is as it was, what next.

Also the one way to read from the Hub: the files of a published dataset.
"""

import json
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataError, HubError, ReflectError, SettingsError
from ..launch import hub_without_retries_on_screen

_OURS = ["README.md", "*.json", "checksums.parquet", "data/*.parquet", "candidates/*.parquet"]
_AGAIN = "Run the same call again: your tables are untouched, and files that arrived are not sent twice."
_READ_AGAIN = "Run the same call again: files that arrived are not asked for twice."
_HTTP = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}  # whatever huggingface_hub asks with
_BETWEEN = {*_HTTP, "huggingface_hub", "hf_xet"}
Words = tuple[type[ReflectError], str]


def downloaded(repo_id: str) -> tuple[Path, list[str]]:
    """A folder with our files of the latest commit, and the names of all its files.

    Raises:
        DataError: the id is none, or no dataset is known by it to whom we are logged in as.
        HubError: the Hub does not let us read it, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    hub_without_retries_on_screen()
    check_token(None)
    nowhere = f"There is no such folder either (seen from {Path.cwd()})."
    with disk_errors(), hub_errors(repo_id, nowhere, reading=True):
        info = HfApi().dataset_info(repo_id, timeout=30)
        names = sorted(each.rfilename for each in info.siblings or [])
        # by its id, so that no older snapshot of the cache is taken for the latest one
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=info.sha, allow_patterns=_OURS)), names


def check_token(token: str | None) -> None:
    """Raise a SettingsError where a token cannot be sent; without its words, as the HTTP library would show it."""
    from huggingface_hub import get_token

    value = get_token() if token is None else token
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[!-~]+", value)):
        raise SettingsError(
            "The token of the Hub is empty, or holds a space, a line end or a character that no token has. Copy it "
            "once more: give it as `token`, set HF_TOKEN, or log in with `hf auth login`."
        )


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a disk that is full, or a folder that cannot be written, into a DataError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, _NETWORK) or _library(error) in _BETWEEN:  # of somebody else's download
            raise
        raise DataError(
            f"The files cannot be written: {error}. Make room there, give a folder that may be written to, or set "
            "TMPDIR (for what is temporary) or HF_HOME (for what is downloaded) to one."
        ) from error


@contextmanager
def hub_errors(repo_id: str, state: str, reading: bool = False) -> Iterator[None]:
    """Turn what goes wrong between us and the Hub into errors that say so; anything else stays what it is.

    Args:
        repo_id: the repository that this is about.
        state: what can be said of it, whatever goes wrong.
        reading: whether it is only read.
    """
    try:
        yield
    except ReflectError:
        raise
    except Exception as error:  # requests go through httpx, files through hf_xet: their errors have no common base
        words = _told(error, repo_id, reading)
        if words is None:
            raise
        kind, text = words
        text = f"The dataset {repo_id!r} could not be read from the Hub. {text}" if reading else text
        raise kind(" ".join(part for part in (text, state) if part)) from error


def _told(error: Exception, repo_id: str, reading: bool) -> Words | None:
    """Which error of ours, and what it says first; None where the Hub has nothing to do with it."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    chain = [error]  # a failed upload is wrapped
    while (cause := chain[-1].__cause__) is not None and isinstance(cause, Exception):
        chain.append(cause)
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return HubError, "HF_HUB_OFFLINE=1 is set, so the Hub cannot be reached. Unset it before Python starts."
    if isinstance(error, LocalTokenNotFoundError):
        return HubError, (
            "There is no token of the Hub here. Log in with `hf auth login`, or set HF_TOKEN; it needs write access."
        )
    if isinstance(error, HFValidationError):
        return DataError, f"It is neither a folder nor the id of a dataset: {' '.join(str(error).split())}"
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
        words = " ".join(str(error).split())
        return DataError, f"The Hub does not take the card of {repo_id}. {words} Mend the metadata or `license`."
    refused = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    if refused is not None:
        return _refused(refused, repo_id, reading)
    again = _READ_AGAIN if reading else _AGAIN
    if any(isinstance(each, _NETWORK) or _library(each) in _HTTP for each in chain):
        return HubError, f"The Hub was not reached, or went away ({_last(chain)}). {again}"
    if any(_library(each) in _BETWEEN or type(each) is RuntimeError for each in chain):  # hf_xet raises the latter
        return HubError, f"The exchange with the Hub failed ({_last(chain)}). {again}"
    if isinstance(chain[-1], json.JSONDecodeError):
        return HubError, f"What answered for the Hub is none ({_last(chain)}). Look at HF_ENDPOINT and at your proxy."
    return None


_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)


def _library(error: Exception) -> str:
    return type(error).__module__.partition(".")[0]


def _refused(error: Exception, repo_id: str, reading: bool) -> Words:
    """By the status that the Hub answered."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, GatedRepoError):
        return HubError, (
            f"The owner of {repo_id} asks for consent. Accept the conditions on its page, log in with `hf auth "
            "login`, and try again."
        )
    if reading and isinstance(error, RepositoryNotFoundError):
        return DataError, (
            "There is no dataset of this id that we may read. Check the id; if it is private, log in as who may read "
            "it: `hf auth login`, or HF_TOKEN."
        )
    if status == 401:
        return HubError, (
            "The Hub does not know this token, or it has ended. Log in again with `hf auth login`, or set HF_TOKEN."
        )
    if status == 403:
        own = getattr(error, "server_message", None)
        said = f" The Hub says: {' '.join(own.split()).rstrip('.')}." if own else ""
        if reading:
            return HubError, f"This token may not read {repo_id}.{said}"
        return HubError, (
            f"This token may not write to {repo_id}: the namespace is somebody else's, or the token only reads.{said} "
            "Push to your own, or make a token with write access at https://huggingface.co/settings/tokens."
        )
    if status == 404:
        return HubError, f"{repo_id} is not there, or this token may not see it. Look at its name and at the token."
    if status in (409, 412):
        return HubError, f"Somebody else changed {repo_id} meanwhile. Run the same call again: it starts from theirs."
    again = _READ_AGAIN if reading else _AGAIN
    if status == 429:
        return HubError, f"The Hub takes no more requests for now; try again {_when(response)}. {again}"
    if status is not None and status >= 500:
        return HubError, f"The Hub has trouble of its own (status {status}). {again}"
    return HubError, f"The Hub refused this for {repo_id}: {' '.join(str(error).split())}."


def _when(response: object) -> str:
    """When a rate limit ends, as far as the answer says."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(response, "headers", {})
    limit = parse_ratelimit_headers(headers)
    seconds = str(limit.reset_in_seconds) if limit else headers.get("Retry-After", "")
    return f"in {seconds} seconds" if seconds.isdigit() else f"after {seconds}" if seconds else "in some minutes"


def _last(chain: list[Exception]) -> str:
    text = " ".join(str(chain[-1]).split())
    return f"{type(chain[-1]).__name__}{text and ': '}{text}"[:300]
