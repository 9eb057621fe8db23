"""Write a run's page: `python -m hf_reflect.report RUN_DIR [--output FILE]`."""

import argparse
import sys

from ..errors import ReflectError
from .page import build_report


def main(argv: list[str] | None = None) -> int:
    """Write the page and say where it is; the exit code is 1, with the reason, where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_reflect.report", description="Write one HTML page of what happened in a run."
    )
    parser.add_argument("run_dir", help="the run's output_dir")
    parser.add_argument(
        "--output", metavar="FILE", help="where to write it (default: report.html in the run's folder)"
    )
    arguments = parser.parse_args(argv)
    try:
        path = build_report(arguments.run_dir, arguments.output)
    except (ReflectError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser; it needs no network.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
