"""Chat messages as text, and which characters of it the assistant wrote."""

from __future__ import annotations

from typing import Any

__all__ = ["ChatError", "render_chat"]


class ChatError(ValueError):
    """Chat data that the tokenizer cannot render."""


def render_chat(
    messages: list[dict[str, Any]], tokenizer: Any
) -> tuple[str, list[tuple[int, int]]] | None:
    """The conversation as the tokenizer's chat template has it, and assistant spans.

    A span is (first, last + 1) in characters: what the model writes in that turn, its
    end-of-turn mark included. None when the template rewrites earlier turns as a
    conversation grows (some drop the reasoning), so that spans cannot be told. Raises
    ChatError without a chat template or when the template refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ChatError(
            "the data has chat messages, but this model's tokenizer has no chat "
            'template; use {"text": ...} lines or a chat model'
        )
    render = tokenizer.apply_chat_template
    try:
        text = render(messages, tokenize=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render(
                messages[:index], tokenize=False, add_generation_prompt=True
            )
            after = render(messages[: index + 1], tokenize=False)
            if not (after.startswith(before) and text.startswith(after)):
                return None
            spans.append((len(before), len(after)))
    # Templates are code: jinja2 and Python errors of any type come out of them.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ChatError(f"the chat template refuses the messages: {reason}") from error
    return text, spans
