"""What a dataset's card tells the Hub, at its head: licence, size, sources."""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from .markdown import ON_HUB
from .merging import metadata_of

Before = tuple[Mapping[str, Any], Mapping[str, Any]]  # provenance and statistics of the push before
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")


def dataset_metadata(provenance: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that follow the data, unless somebody says it otherwise; None where there is nothing to say."""
    license, name = _license(provenance.get("license"))
    source, versions = provenance.get("source_dataset"), statistics.get("versions")
    return {
        "license": license,
        "license_name": name,
        "language": provenance.get("language"),
        "task_categories": ["text-generation"],
        "size_categories": [_size(versions)] if isinstance(versions, int) else None,
        "source_datasets": [source] if isinstance(source, str) and ON_HUB.fullmatch(source) else None,
    }


def check_license(card: str | None, provenance: Mapping[str, Any], before: Before | None = None) -> None:
    """Raise a DataError where somebody wrote another licence into the card than the provenance has.

    Args:
        card: the one that is there, or None.
        provenance: of what is to be pushed.
        before: of the push before: what that wrote is nobody's word against it.
    """
    there = metadata_of(card)
    found, name = there.get("license"), there.get("license_name")
    given = provenance.get("license") or provenance.get("licence")
    license, license_name = _license(given)
    if not license or not found or (before and (found, name) == _license(before[0].get("license"))):
        return
    names = [str(each).lower() for each in (found if isinstance(found, list) else [found])]
    if license not in names or (license_name and name and license_name != name):
        raise DataError(
            f"The card that is there says `license: {name or ', '.join(names)}`, and the provenance says {given!r}. "
            "One of them is wrong: mend the card, or the provenance's `license`. Nothing was sent."
        )


def _license(text: Any) -> tuple[str | None, str | None]:
    """What the Hub calls a licence, and its name where the Hub has none for it."""
    if not text:
        return None, None
    if re.fullmatch(r"[A-Za-z0-9.+-]+", str(text)):
        return str(text).lower(), None
    return "other", str(text)


def _size(rows: int) -> str:
    return next((size for power, size in enumerate(_SIZES) if rows < 1000 * 10**power), "n>100M")
