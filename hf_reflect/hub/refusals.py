"""What the Hub's errors mean for whoever pushes or reads: what happened, what is as it was, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError, HubError, ReflectError

_AGAIN = "Run the same call again: your tables are untouched, and files that arrived are not sent twice."


@contextmanager
def hub_errors(repo_id: str, state: str) -> Iterator[None]:
    """Turn whatever goes wrong between us and the Hub into a HubError.

    Args:
        repo_id: the repository that this is about.
        state: what can be said of it, whatever goes wrong.
    """
    try:
        yield
    except ReflectError:
        raise
    except Exception as error:  # requests go through httpx, files through hf_xet: their errors have no common base
        kind, text = _told(error, repo_id)
        raise kind(" ".join(part for part in (text, state) if part)) from error


def _told(error: Exception, repo_id: str) -> tuple[type[ReflectError], str]:
    """Which error of ours, and what it says first."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    chain = [error]  # a failed upload is wrapped
    while (cause := chain[-1].__cause__) is not None and isinstance(cause, Exception):
        chain.append(cause)
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return HubError, "HF_HUB_OFFLINE=1 is set, so the Hub cannot be reached. Unset it before Python starts."
    if isinstance(error, LocalTokenNotFoundError):
        return HubError, (
            "There is no token of the Hub here. Log in with `hf auth login`, or set HF_TOKEN; it needs write access."
        )
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
        words = " ".join(str(error).split())
        return DataError, f"The Hub does not take the card of {repo_id}. {words} Mend the metadata or `license`."
    refused = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    if refused is not None:
        return _refused(refused, repo_id)
    return HubError, f"The Hub was not reached, or went away ({_last(chain)}). {_AGAIN}"


def _refused(error: Exception, repo_id: str) -> tuple[type[ReflectError], str]:
    """By the status that the Hub answered."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return HubError, (
            "The Hub does not know this token, or it has ended. Log in again with `hf auth login`, or set HF_TOKEN."
        )
    if status == 403:
        return HubError, (
            f"This token may not write to {repo_id}: the namespace is somebody else's, or the token only reads. Push "
            "to your own, or make a token with write access at https://huggingface.co/settings/tokens."
        )
    if status == 404:
        return HubError, f"{repo_id} is not there, or this token may not see it. Look at its name and at the token."
    if status in (409, 412):
        return HubError, f"Somebody else changed {repo_id} meanwhile. Run the same call again: it starts from theirs."
    if status == 429:
        return HubError, f"The Hub takes no more requests for now; try again {_when(response)}. {_AGAIN}"
    if status is not None and status >= 500:
        return HubError, f"The Hub has trouble of its own (status {status}). {_AGAIN}"
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
