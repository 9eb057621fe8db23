"""Publish recycled data with where it comes from, and check what was published.

    push_recycled(repo_id, candidates, selected, provenance=provenance_of(run_dir)) -> commit URL
    push_run(run_dir, repo_id) -> the same, of a run's folder
    verify(repo_id_or_path) -> what does not agree

Names load on first use. `contents` has which files a repository holds, `card` its README, `digests` what a table says
as numbers, `provenance` where it comes from; `verifying` puts `reading`, `checks` and `choices` together.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .provenance import provenance_of as provenance_of
    from .pushing import push_recycled as push_recycled
    from .runs import push_run as push_run
    from .verifying import verify as verify

_HOME = {"provenance_of": "provenance", "push_recycled": "pushing", "push_run": "runs", "verify": "verifying"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
