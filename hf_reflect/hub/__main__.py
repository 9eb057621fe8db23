"""Publish a run's tables with their provenance, and check what was published: `python -m hf_reflect.hub COMMAND`."""

import argparse
import sys

from ..errors import ReflectError


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0; 1 where `verify` finds something, or after an error whose words went to stderr; 2 where
    `verify` could not check anything.
    """
    parser = argparse.ArgumentParser(prog="python -m hf_reflect.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, words: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=words, description=words)

    sub = command("verify", "Compute again what can be, and say what does not agree.")
    sub.add_argument("what", metavar="REPO_OR_PATH", help="a dataset's id on the Hub, its files, or a run's folder")
    push = command("push", "Publish a run's candidates and selected rows as a dataset on the Hub, in one commit.")
    write = command("write", "Write the files that `push` would publish into a folder, to be looked at first.")
    for sub in (push, write):
        sub.add_argument("run", metavar="RUN_DIR", help="the `output_dir` of a recipe")
    push.add_argument("repo", metavar="REPO_ID", help="where to, as name/dataset")
    push.add_argument("--public", action="store_true", help="everybody may see it; private unless given")
    write.add_argument("folder", metavar="FOLDER", help="where to; it is made")
    for sub in (push, write):
        sub.add_argument("--license", help="of the source dataset, as the Hub writes it: apache-2.0, cc-by-nc-4.0, …")
        sub.add_argument("--teacher_terms", help="what the teacher's terms say of its replies: words, or a link")
        sub.add_argument(
            "--tokenizer", help="for lengths in tokens: the student's folder or id; the run's own unless given"
        )
    arguments = parser.parse_args(argv)
    if arguments.command == "push" and arguments.public and not (arguments.license and arguments.teacher_terms):
        parser.error(
            "--public needs --license (of the source data) and --teacher_terms (what the teacher's terms say of its "
            "replies, in words or as a link): others must know what they may do with the rows"
        )
    try:
        if arguments.command == "verify":
            return _verify(arguments.what)
        _publish(arguments)
    except ReflectError as error:
        print(error, file=sys.stderr)
        return 2 if arguments.command == "verify" else 1
    return 0


def _verify(what: str) -> int:
    from .verifying import examine

    found, counts = examine(what)
    for sentence in found:
        print(sentence)
    if found:
        print(f"\n{what} does not agree with what it says of itself: {len(found)} found.", file=sys.stderr)
        return 1
    candidates, selected = counts["candidates"], counts.get("selected")
    words = f"{candidates['versions']:,} versions of {candidates['rows']:,} rows"
    if selected:
        variants = ", ".join(f"{name} {number:,}" for name, number in selected["by_variant"].items())
        words += f", {selected['rows']:,} selected ({variants})"
    print(f"OK: {words}.")
    return 0


def _publish(arguments: argparse.Namespace) -> None:
    from .runs import push_run, write_run

    given = {"license": arguments.license, "teacher_terms": arguments.teacher_terms}
    if arguments.command == "push":
        private, tokenizer = not arguments.public, arguments.tokenizer
        print(push_run(arguments.run, arguments.repo, given, private, tokenizer=tokenizer))
    else:
        write_run(arguments.run, arguments.folder, given, arguments.tokenizer)
        print(arguments.folder)


if __name__ == "__main__":
    sys.exit(main())
