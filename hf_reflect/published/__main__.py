"""Check what the authors published: `python -m hf_reflect.published [NAME]`."""

import argparse
import sys

from ..errors import DataError
from .checking import check_published, told
from .tables import PUBLISHED, load_published


def main(argv: list[str] | None = None) -> int:
    """Check one published selection, or all.

    Returns the exit code: 0 where all agree, 1 where one does not, 2 where one could not be checked.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hf_reflect.published",
        description="Load what the authors published, and see whether the paper rule keeps as many rows as they say.",
    )
    parser.add_argument("name", nargs="?", default="all", choices=[*PUBLISHED, "all"], help="which (default: all)")
    parser.add_argument("--texts", metavar="TABLE", help="its texts, a folder or a Hub id; the authors' unless given")
    parser.add_argument("--scores", metavar="TABLE", help="its scores, likewise")
    arguments = parser.parse_args(argv)
    if arguments.name == "all" and (arguments.texts or arguments.scores):
        parser.error("--texts and --scores are those of one table: name it")
    codes = set()
    for name in PUBLISHED if arguments.name == "all" else [arguments.name]:
        published = PUBLISHED[name]
        try:
            table = load_published(arguments.texts or published.texts, arguments.scores or published.scores)
            found = check_published(table, published.rows)
        except DataError as error:
            print(f"{name}: not run: {' '.join(str(error).split())}", flush=True)
            codes.add(2)
            continue
        print(f"{name}: the paper rule keeps {told(found)}", flush=True)
        codes.add(1 if found["agrees"] is False else 0)
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
