"""Look instead of read: the repository as a static site.

    python scripts/site.py                      writes site/; open site/index.html, no server is needed
    python scripts/site.py --out DIR            into another folder; an earlier site there is replaced
    python scripts/site.py --link https://github.com/NAME/REPOSITORY/blob/main

The leaderboard, a page a record, any two scripts side by side, the ladders, and what did not help. Everything
comes from files of the repository: records/, the scripts, their history where lineage.py needs it. No page
loads anything from elsewhere, all of it stays under 5 MB. `--link` is where the repository's files are on the
web; without it, links to files that have no page are words.

A record whose files cannot be read is named with the reason, and so is each part of a page that its files do
not allow. Exit code 0; 1 where there is one of these, the site being written; 2 for misuse.

The work is in scripts/pages/, because this file has the name of a module of Python's own: another tool that
imports `site` gets Python's, which the interpreter has loaded before any tool runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from family import FINDINGS, FINE, ROOT, Misuse, command


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--out", type=Path, default=Path("site"), metavar="DIR", help="(default: %(default)s)")
    option("--link", default="", metavar="URL", help="where the repository's files are on the web")
    option("--json", action="store_true", help="one JSON document instead of lines")
    options = parser.parse_args(argv)
    if options.link and not options.link.startswith(("https://", "http://")):
        raise Misuse(f"--link {options.link}: an address that begins with https:// is needed")

    from pages import build  # here, so that --help needs nothing but Python
    if not build.may_replace(options.out):
        raise Misuse(f"--out {options.out}: there is something else than a site; name a new folder")
    started = time.perf_counter()
    site = build.Site(root, options.link.rstrip("/"))
    site.make()
    if site.size > build.LIMIT:
        raise Misuse(f"{site.size:,} bytes, a site has at most {build.LIMIT:,}")
    site.write(options.out)

    pages = sum(place.endswith(".html") for place in site.files)
    if options.json:
        print(json.dumps({"out": str(options.out), "pages": pages, "bytes": site.size,
                          "problems": site.problems}, indent=1))
    else:
        print("\n".join([f"marked: {problem}" for problem in site.problems] + [
            f"{options.out}/index.html: {pages} pages, {site.size:,} bytes, "
            f"{time.perf_counter() - started:.0f} s"]))
    return FINDINGS if site.problems else FINE


if __name__ == "__main__":
    command(main)
