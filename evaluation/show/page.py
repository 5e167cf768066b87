"""Writes a recording as one HTML file that needs nothing else, no network either."""

import html
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from refreshkv.evaluation.show.packing import packed
from refreshkv.evaluation.show.recording import Recording

HERE = Path(__file__).resolve().parent
PLAIN = "a"
"""A text in front of each token when its own text is wanted: some tokenizers leave out a space at the beginning."""


def build_page(recording: Recording, texts: list[str], title: str, settings: dict[str, Any]) -> str:
    """The page's content. texts: of each token; settings: what stands below the title, by name."""
    data = {
        "title": title,
        "settings": {name: str(value) for name, value in settings.items()},
        "promptLength": recording.prompt_length,
        "budget": recording.budget,
        "texts": texts,
        "choices": packed(recording),
    }
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _own("page.css"),
        "SCRIPT": _own("page.js"),
        "DATA": embedded.replace("<", "\\u003c"),  # a token may be </script>
    }
    page = _own("page.html")
    for name, content in parts.items():
        before, after = page.split(f"[[{name}]]", 1)
        page = before + content + after
    return page


def token_texts(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token as it stands in the whole text; a part of a character is shown as one."""
    (plain,) = tokenizer.encode(PLAIN, add_special_tokens=False)[:1]
    start = len(tokenizer.decode([plain]))
    texts = (tokenizer.decode([plain, token], clean_up_tokenization_spaces=False) for token in tokens)
    return [str(text)[start:] for text in texts]


def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
