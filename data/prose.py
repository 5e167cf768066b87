"""English prose out of manuals and books: HTML and plain text become long documents without markup."""

import gzip
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import lxml.etree  # pyright: ignore[reportMissingImports]
import lxml.html  # pyright: ignore[reportMissingImports]
from inscriptis import Inscriptis  # pyright: ignore[reportMissingImports]

from refreshkv.data.r_strings import character_vectors
from refreshkv.settings import SettingsError

PAGES = (".html", ".xhtml", ".htm")
R_DATA = ".rdb"
TEXTS = (".txt", ".rst", ".text")

NAVIGATION = frozenset(
    "nav navbar navigation navheader navfooter nav-panel navset navsettop navsetbottom tocset toc toctree-wrapper "
    "tocview table-of-contents contents sidebar sphinxsidebar wy-nav-side rst-footer-buttons breadcrumb breadcrumbs "
    "related header footer headerlink menu navi nav_header nav_footer search".split()
)
"""Classes, ids and roles of HTML elements that lead to other pages and are no part of the text."""

OUTSIDE_TEXT = ("head", "script", "style", "nav", "header", "footer", "form", "svg", "math", "button")

FUNCTION_WORDS = frozenset(
    "the of and to a in is that it for as with be this are on by or an not from at which can you if will has have was "
    "he his but they we when their there its may all one would so more no who been than such only use other".split()
)
LEAST_FUNCTION_WORDS = 0.2
"""Share of function words among a page's words: running English has 0.35 to 0.5, tables and references less."""

REPEATED_CHARACTERS = 40
"""Paragraphs from this length on are kept once in a corpus: licences, warnings and headers return on many pages."""


def prose_documents(root: Path, paths: list[str], seen: set[bytes]) -> Iterator[dict[str, str]]:
    """The English prose in the folders or files `paths` of `root`, one document per directory: {"text", "path"}.

    A document is its directory's pages in the order of their names, numbers counted (page 2 before page 10). Left out
    are pages that are not running English, navigation, and paragraphs whose hash is in `seen`; new ones are added.
    Raises `SettingsError` for a path that is not there.
    """
    for path in paths:
        if not (root / path).exists():
            raise SettingsError(f"packages: {root.name} holds no {path}")
        for directory, texts in _texts(root / path):
            pages = (_unseen(text, seen) for text in texts)
            text = "\n\n".join(page for page in pages if is_running_english(page))
            if text:
                yield {"text": text + "\n", "path": directory.relative_to(root).as_posix()}


def read_text(file: Path) -> str:
    """The text of an HTML page or a plain file, gzipped or not, in UTF-8 or else Latin-1."""
    content = file.read_bytes()
    content = gzip.decompress(content) if file.suffix == ".gz" else content
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return html_text(text) if _kind(file) in PAGES else text


def html_text(page: str) -> str:
    """The text of an HTML page, laid out as a text browser shows it, without its navigation."""
    page = re.sub(r"^\s*<\?xml[^>]*\?>", "", page)  # lxml refuses a string that declares an encoding
    try:
        tree = lxml.html.document_fromstring(page)
    except lxml.etree.ParserError:  # nothing in it but space or a comment
        return ""
    named = [element for element in tree.xpath("//*[@class or @id or @role]") if _is_navigation(element)]
    for element in [*named, *tree.iter(*OUTSIDE_TEXT)]:
        if element.getparent() is not None:
            element.drop_tree()
    return Inscriptis(tree).get_text()


def is_running_english(text: str) -> bool:
    """Whether at least `LEAST_FUNCTION_WORDS` of the words are English function words."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in FUNCTION_WORDS for word in words) >= max(1, LEAST_FUNCTION_WORDS * len(words))


def _is_navigation(element: lxml.html.HtmlElement) -> bool:
    names = " ".join(element.get(name, "") for name in ("class", "id", "role"))
    return element.tag not in ("html", "body") and not NAVIGATION.isdisjoint(names.lower().split())


def _unseen(text: str, seen: set[bytes]) -> str:
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [re.sub(r"[ \t\u00a0]{3,}", "  ", line).rstrip() for line in paragraph.splitlines()]
        words = " ".join(paragraph.split())
        digest = hashlib.sha256(words.encode(errors="surrogatepass")).digest()
        if words and (len(words) < REPEATED_CHARACTERS or digest not in seen):
            kept.append("\n".join(line.strip("\r") for line in lines if line))
            seen.add(digest)
    return "\n\n".join(kept)


def _texts(path: Path) -> Iterator[tuple[Path, Iterator[str]]]:
    """The documents at `path`: each directory below it with the texts of its pages in order, or a file by itself."""
    if path.suffix == R_DATA:
        for text in character_vectors(path):
            yield path, iter([text])
    elif path.is_file():
        yield path, iter([read_text(path)])
    else:
        files = [file for file in path.rglob("*") if file.is_file() and _kind(file) in (*PAGES, *TEXTS)]
        for directory in sorted({file.parent for file in files}, key=_order):
            ordered = sorted((file for file in files if file.parent == directory), key=_order)
            yield directory, map(read_text, ordered)


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _order(path: Path) -> list[tuple[int, str]]:
    """A sort key that compares the numbers in a path as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.as_posix())]
