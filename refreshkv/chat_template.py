"""The text of a chat, by the template that a tokenizer brings along."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from refreshkv.settings import SettingsError


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], setting: str) -> str:
    """The messages in the tokenizer's chat template, up to the model's next answer.

    Raises `SettingsError` that names `setting` if the template fails, or refuses the messages.
    """
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, whose errors have many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(
            f"{setting}: the tokenizer's chat template does not take the messages ({reason}): mend it, or change them"
        ) from None
    if not text.strip():
        raise SettingsError(f"{setting}: the tokenizer's chat template writes nothing for the messages: mend it")
    return text
