"""Publish recycled data on the Hub: everything in one commit, or nothing."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset

from ..errors import DataError, HubError, ReflectError, SettingsError
from ..pairs import keys_of
from ..selection import DEFAULTS
from .card import read_card
from .choices import check_selection
from .contents import SHARD, pushed_before, write_tables
from .metadata import Before, check_license
from .provenance import FORMAT
from .refusals import check_token, disk_errors, hub_errors
from .secrets import known_secrets, refuse_secrets
from .tables import published_tables

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import DatasetInfo

logger = logging.getLogger(__name__)

_NO_DATA = re.compile(r"README\.md|\.git\w+|LICENSE[^/]*|[^/]*\.(md|txt)", re.IGNORECASE)  # in any repository
_NEEDED = {"license": ("license", "licence"), "teacher_terms": ("teacher_terms", "terms")}
_TITLE = "Recycled data, written by hf_reflect"


def push_recycled(
    repo_id: str,
    candidates: Dataset,
    selected: Dataset,
    provenance: Mapping[str, Any] | None = None,
    private: bool = True,
    token: str | None = None,
    tokenizer: Any = None,
    encoder: Any = None,
) -> str:
    """Publish a recycled table as a dataset of the Hub; returns the URL of the commit.

    In:  row_id, variant, instruction, input, response; optionally source, history, critique, error, scores, your own
    Out: config `default`: the selected rows, `messages` and all columns of the candidates;
         config `candidates`: all versions, so that another student can choose without paying again;
         statistics.json, provenance.json, checksums.parquet, and a card: in one that is there only our section and our
         metadata are replaced

    One commit: a push that fails leaves the repository as it was, and can be repeated. Nothing is sent before all
    files are written into a temporary folder and no key or token of this machine was found in them. The visibility of
    a repository that exists is never changed.

    Args:
        repo_id: "namespace/name", or "name" for one's own.
        candidates: all versions, with the scores where there are any.
        selected: the rows that were kept; looked up in the candidates by row_id, variant and source.
        provenance: as `provenance_of(run_dir)` gives it, with `license` (of the source data) and `teacher_terms`
            (text or URL), which a public push needs. What it has of rule, ifd_gate, r_ifd_gate, keep, seed says how
            was selected; `select`'s defaults where absent.
        private: who may see a new repository.
        token: of the Hub; that of `hf auth login` or HF_TOKEN where absent.
        tokenizer: the student's, or its name: for lengths in tokens in the statistics.
        encoder: a Sentence-BERT model or its name: for coherence, where the candidates have no such column.

    Raises:
        SettingsError: a name that cannot be one, a repository that is public, or what a public push needs is missing.
        DataError: tables that do not belong together, a repository that holds something else, broken markers in the
            card, a secret in what would be published.
        HubError: no token, no permission, a rate limit, no network, a push by somebody else meanwhile.
    """
    from huggingface_hub import HfApi

    _check_request(repo_id, provenance, private)
    check_token(token)
    with disk_errors():
        tables = published_tables(candidates, selected)  # what is wrong with them is said before anybody is asked
        api = HfApi(token=token)
        to = _destination(api, repo_id, private)
        with TemporaryDirectory(prefix="hf_reflect-") as parent:
            folder = Path(parent) / "contents"
            told = write_tables(folder, tables, provenance, tokenizer, encoder, to.card, to.name, to.before)
            refuse_secrets(folder, known_secrets(told, token))
            _warn(to, told, *tables)
            empty = "" if to.head else f" {to.name} was not made, or is empty: push to it again, or delete it."
            with hub_errors(to.name, f"Nothing was published.{empty}"):
                head = to.head or _made(api, to.name, private)
            return _commit(api, to, folder, head)


def _warn(to: "_Destination", told: Mapping[str, Any], candidates: Dataset, selected: Dataset) -> None:
    """Say what is allowed and perhaps not meant: other data goes, or the choice does not follow from its settings."""
    before, now = ((to.before or ({}, {}))[0].get("source_dataset"), told["source_dataset"])
    if before and before != now:
        logger.warning("%s held rows of %s; these, of %s, replace them. Its history keeps both.", to.name, before, now)
    choice = {name: told[name] for name in DEFAULTS}
    try:
        found = check_selection(candidates, keys_of(selected), told["reflect"], choice, ordered=False)
    except ReflectError as error:
        found = [str(error)]
    if found:
        logger.warning(
            "`verify` will not agree with %s: by %s the choice is another. Give the provenance the settings that the "
            "rows were selected with. %s",
            *(to.name, choice, found[0]),
        )


def check_access(
    repo_id: str, provenance: Mapping[str, Any] | None = None, private: bool = True, token: str | None = None
) -> None:
    """Raise what `push_recycled` would raise for want of a login, a right or a licence, before anything is made."""
    from huggingface_hub import HfApi

    _check_request(repo_id, provenance, private)
    check_token(token)
    with disk_errors():
        to = _destination(HfApi(token=token), repo_id, private)
        check_license(to.card, provenance or {}, to.before)


class _Destination(NamedTuple):
    """A repository as it is before a push."""

    name: str  # with its namespace
    head: str | None  # its latest commit; None where it has yet to be made
    files: set[str]
    card: str | None
    before: Before | None  # what an earlier push said


def _destination(api: "HfApi", repo_id: str, private: bool) -> _Destination:
    """Where the push goes, once it is known that it may."""
    with TemporaryDirectory(prefix="hf_reflect-") as folder:
        with hub_errors(repo_id, "Nothing was sent."):
            who = api.whoami()
            name = _own_name(who, repo_id)
            info = _existing(api, name)
            if info is None:
                _check_namespace(who, name)
                return _Destination(name, None, set(), None, None)
            files = {each.rfilename for each in info.siblings or []}
            old = {
                path: Path(
                    api.hf_hub_download(info.id, path, repo_type="dataset", revision=info.sha, local_dir=folder)
                )
                for path in ("README.md", "provenance.json", "statistics.json")
                if path in files
            }
        _check_visibility(info.id, private, bool(info.private))
        before = pushed_before(Path(folder))
        _check_schema(info.id, files, before)
        card = read_card(old["README.md"].read_bytes()) if "README.md" in old else None
        return _Destination(info.id, info.sha, files, card, before)


def _check_request(repo_id: str, provenance: Mapping[str, Any] | None, private: bool) -> None:
    _check_name(repo_id)
    if not private:
        _check_public(provenance or {})


def _check_name(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(str(repo_id or ""))
    except HFValidationError as error:
        raise SettingsError(
            f"{repo_id!r} cannot be the name of a dataset on the Hub: {error} Say `you/name`."
        ) from error


def _check_public(provenance: Mapping[str, Any]) -> None:
    """Raise a SettingsError unless it says under which terms the rows may be passed on."""
    missing = [name for name, known in _NEEDED.items() if not any(provenance.get(each) for each in known)]
    if missing:
        raise SettingsError(
            f"A public push needs {' and '.join(f'`{name}`' for name in missing)}: the rows come from somebody's "
            "data and a teacher's replies, and both have terms. Add to the provenance, for example "
            '{"license": "cc-by-nc-4.0", "teacher_terms": "https://openai.com/policies/row-terms-of-use/"}, '
            "or push with `private=True`."
        )


def _own_name(who: Mapping[str, Any], repo_id: str) -> str:
    """The name with its namespace; a HubError where the token cannot write anywhere."""
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise HubError(
            f"The token of {who['name']} may only read, so nothing can be pushed to {repo_id}. Make one with write "
            "access at https://huggingface.co/settings/tokens and log in with it: `hf auth login`, or HF_TOKEN."
        )
    return repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"


def _check_namespace(who: Mapping[str, Any], name: str) -> None:
    """Raise a HubError where nothing can be made for want of membership."""
    names = [who["name"], *(each.get("name") for each in who.get("orgs") or [])]
    if name.split("/")[0].lower() not in [str(each).lower() for each in names]:
        raise HubError(
            f"{who['name']} may not write to {name}: there is none to be seen, and no membership to make it by. Push "
            f"under {' or '.join(f'{each}/' for each in names)}, or log in as somebody else. Nothing was sent."
        )


def _existing(api: "HfApi", name: str) -> "DatasetInfo | None":
    """The repository as it is now; None where there is none that this token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.dataset_info(name)
    except RepositoryNotFoundError:
        return None


def _check_visibility(name: str, private: bool, is_private: bool) -> None:
    if private and not is_private:
        raise SettingsError(
            f"{name} exists and is public, so this push would publish the rows. Make the repository private in its "
            "settings on the Hub, name another, or say that this is wanted with `private=False`."
        )
    if is_private and not private:
        logger.warning(
            "%s exists and is private; it stays so. Make it public in its settings on the Hub when you want that.",
            name,
        )


def _check_schema(name: str, there: set[str], before: Before | None) -> None:
    """Raise a DataError where the repository holds other data than ours."""
    if before is not None and before[0]["format"] > FORMAT:
        raise DataError(
            f"{name} was written by a newer hf_reflect (format {before[0]['format']}, this one knows {FORMAT}). "
            "Update hf_reflect, or push under another name."
        )
    others = sorted(path for path in there if not _NO_DATA.fullmatch(path))
    if before is None and others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise DataError(
            f"{name} holds data with another schema: {shown}, and no provenance.json of hf_reflect. It was left as it "
            "is. Push under another name, or empty the repository first."
        )


def _made(api: "HfApi", name: str, private: bool) -> str:
    """A new repository; returns its first commit."""
    api.create_repo(name, repo_type="dataset", private=private, exist_ok=False)
    info = api.dataset_info(name)
    if not info.sha:
        raise HubError(f"{name} was made, but the Hub names no commit of it. Run the same call again.")
    return info.sha


def _commit(api: "HfApi", to: _Destination, folder: Path, head: str) -> str:
    """Send the files of the folder as one commit onto this one, without our shards that are no longer; its URL."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    name = to.name
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    gone = [path for path in sorted(to.files - files.keys()) if re.fullmatch(SHARD, path)]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()),
        *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in gone),
    ]
    state = f"{name} is as it was" if to.head else f"{name} was made, and is empty: push to it again, or delete it"
    try:
        with hub_errors(name, ""):
            done = api.create_commit(
                name, operations, commit_message=_TITLE, repo_type="dataset", revision="main", parent_commit=head
            )
            return done.commit_url
    except HubError as error:
        try:
            now, ours = _state(api, name, files["provenance.json"], head)
        except HubError:
            raise HubError(f"{error} Either all of the push arrived, which is one commit, or {state}.") from error
        if ours:  # the Hub did it, and only its answer was lost
            return f"{api.endpoint}/datasets/{name}/commit/{now}"
        raise HubError(f"{error} {state}." if now == head else str(error)) from error
    except DataError as error:
        raise DataError(f"{error} {state}.") from error


def _state(api: "HfApi", name: str, provenance: Path, head: str) -> tuple[str | None, bool]:
    """The latest commit now, and whether it is the push with this provenance onto that head."""
    with hub_errors(name, ""), TemporaryDirectory() as folder:
        now = api.dataset_info(name).sha
        if now == head or "provenance.json" not in api.list_repo_files(name, repo_type="dataset", revision=now):
            return now, False
        found = api.hf_hub_download(name, "provenance.json", repo_type="dataset", revision=now, local_dir=folder)
        return now, Path(found).read_bytes() == provenance.read_bytes()
