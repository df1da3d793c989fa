"""All pages into one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pages import board, compare, ladders, negative, record
from pages.figures import as_json
from pages.found import Repository
from pages.prose import Prose

HERE = Path(__file__).resolve().parent
STATIC = HERE / "static"
LIMIT = 5_000_000  # bytes of the whole site
MARK = "made-by-site.py"  # in a folder that may be replaced


def environment() -> Environment:
    """Templates escape whatever they show; a name that they misspell is an error."""
    loader = FileSystemLoader(HERE / "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)
    made.filters["signed"] = lambda value: f"{value:+.4f}"
    made.filters["commas"] = lambda value: f"{value:,}"
    return made


@dataclass
class Site:
    """The pages of a repository as texts, {place below the site's folder: content}, and what is wrong."""

    root: Path
    link: str = ""  # the repository's files on the web, as https://host/name/blob/main
    files: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def make(self) -> None:
        repository = Repository.read(self.root)
        found = board.page(repository)
        self.problems += [f"records/{name}: {why}" for name, why in found["unreadable"].items()]
        self.page("index.html", "board.html", found)

        for entry in repository.entries:
            shown = record.page(entry, repository, self.prose(repository, entry.record.folder, 1))
            self.problems += [f"{entry.record.name}: {each}" for each in shown["problems"]]
            self.page(entry.href, "record.html", shown)

        scripts = compare.page(repository)
        self.problems += scripts["problems"]
        self.files["compare-data.js"] = f"window.FAMILY = {as_json(scripts['family'])};\n"
        self.page("compare.html", "compare.html", scripts)

        climbed = ladders.page(self.root, self.prose(repository, self.root / "records" / "ladder", 0))
        self.problems += climbed["problems"]
        self.page("ladder.html", "ladder.html", climbed)
        self.page("negative.html", "negative.html",
                  negative.page(repository, self.prose(repository, self.root, 0)))
        for path in STATIC.iterdir():
            self.files[path.name] = path.read_text()

    def page(self, place: str, template: str, values: dict) -> None:
        up = "../" * place.count("/")
        self.files[place] = self.templates.get_template(template).render(
            up=up, here=place, commit=self.commit, **values)

    @cached_property
    def templates(self) -> Environment:
        return environment()

    @cached_property
    def commit(self) -> str:
        """Short name of the commit that the pages show; empty without git."""
        call = ["git", "-C", str(self.root), "rev-parse", "--short", "HEAD"]
        try:
            return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    def prose(self, repository: Repository, folder: Path, depth: int) -> Prose:
        """Markdown of a folder of the repository, for a page `depth` folders below the site's."""
        pages = {entry.record.folder.resolve(): entry.href for entry in repository.entries}
        ladder = (self.root / "records" / "ladder").resolve()

        def resolve(link: str) -> str | None:
            if link.startswith(("https://", "http://")):
                return link
            path = (folder / link.partition("#")[0]).resolve()
            if "#" in link[:1] or not path.is_relative_to(self.root.resolve()):
                return None
            place = path.parent if path.name in ("README.md", "train_gpt.py") else path
            if place in pages:
                return "../" * depth + pages[place]
            if place == ladder or place.parent == ladder:
                return "../" * depth + "ladder.html"
            inside = path.relative_to(self.root.resolve()).as_posix()
            return f"{self.link}/{inside}" if self.link and path.exists() else None
        return Prose(resolve)

    @property
    def size(self) -> int:
        return sum(len(text.encode()) for text in self.files.values())

    def write(self, out: Path) -> None:
        """Into a new folder, which then takes the place of the old one: a reader never meets half a site."""
        fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            for place, text in {**self.files, MARK: ""}.items():
                path = fresh / place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            if out.exists():
                shutil.rmtree(out)
            fresh.rename(out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def may_replace(out: Path) -> bool:
    """Whether nothing but an earlier site is lost."""
    return not out.exists() or out.is_dir() and ((out / MARK).is_file() or not any(out.iterdir()))
