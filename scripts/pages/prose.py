"""Markdown of the repository as HTML of a page. HTML in it is shown, never carried out."""

from __future__ import annotations

import re
from collections.abc import Callable

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

# (a link as it stands in the Markdown) -> where it leads from the page, or None: then its words stay.
Resolve = Callable[[str], "str | None"]


def outside(link: str) -> str | None:
    """Links that need no page of ours."""
    return link if re.match(r"https?://", link) else None


class Prose:
    """Turns Markdown into HTML for one page; tables and code can be reached by keyboard, each by its name."""

    def __init__(self, resolve: Resolve = outside):
        self.resolve, self.tables = resolve, 0
        self.reader = MarkdownIt("commonmark", {"html": False}).enable("table")

    def html(self, text: str, name: str, below: int = 2) -> Markup:
        """name: of tables, for a screen reader; below: the level of the heading above the text."""
        tokens = self.reader.parse(without_comments(text))
        for token in tokens:
            if token.type in ("heading_open", "heading_close"):
                token.tag = f"h{min(6, int(token.tag[1]) + below)}"
            for child in token.children or ():
                self.picture(child)
            self.links(token.children or ())
        shown = self.reader.renderer.render(tokens, self.reader.options, {})
        return Markup(self.reachable(shown, name))

    def picture(self, token: Token) -> None:
        """Pictures stay in the repository: the site draws its own."""
        if token.type == "image":
            token.type, token.content, token.children = "text", f"[picture: {token.content}]", None

    def links(self, tokens: list[Token]) -> None:
        for token in tokens:
            if token.type == "link_open":
                href = self.resolve(str(token.attrs.get("href", "")))
                token.attrs = {"href": href} if href else {}
                token.tag = tag = "a" if href else "span"
            elif token.type == "link_close":
                token.tag = tag

    def reachable(self, html: str, name: str) -> str:
        """What can be wider than a phone scrolls in itself, and a keyboard can get there."""

        def table(match: re.Match) -> str:
            self.tables += 1
            label = escape(f"{name}, table {self.tables}")
            return (f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>'
                    f'<caption class="unseen">{label}</caption>{match[1]}</table></div>')
        html = re.sub(r"<table>(.*?)</table>", table, html, flags=re.S)
        # An empty heading of a column says nothing to a screen reader.
        html = re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)
        return html.replace("<pre>", '<pre tabindex="0">')


def without_comments(text: str) -> str:
    """Without what Markdown hides: marks of tables, notes on numbers."""
    return re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)


def sections(text: str) -> dict[str, str]:
    """{title: text} of the parts below `## TITLE`; what comes before the first one under ''."""
    parts = re.split(r"^## (.+)$", re.sub(r"\A# .*\n", "", text), flags=re.M)
    return {"": parts[0], **{title.strip(): body for title, body in zip(parts[1::2], parts[2::2])}}
