"""Pieces of text -> token ids, with the separators and the chat template of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from conmoe.documents import Piece, first_line
from conmoe.types import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece], wanted: int, *, apart: bool
) -> tuple[list[int], list[str]]:
    """The first ``wanted`` tokens of ``pieces`` (fewer if there are no more) and the hashes of the pieces used.

    Documents are divided as the tokenizer does it; with ``apart`` every piece counts as a document of its own.
    """
    before, after = _separators(tokenizer)
    ids: list[int] = []
    digests: dict[str, None] = {}
    begins = True
    for piece in pieces:
        if len(ids) >= wanted:
            break
        blank = isinstance(piece.content, str) and not piece.content.strip()
        new = [] if blank else _piece_ids(tokenizer, piece)
        if new:
            lead = before if begins and new[: len(before)] != before else []
            ids += [*lead, *new]
            digests[piece.digest] = None
        ends = apart or piece.ends
        # A chat template may end with the separator and a line break.
        if ends and (new or not begins) and not (after and after[0] in new[-2:]):
            ids += after
        begins = ends if new else begins or ends
    return ids[:wanted], list(digests)


def _piece_ids(tokenizer: PreTrainedTokenizerBase, piece: Piece) -> list[int]:
    text = piece.content if isinstance(piece.content, str) else _chat_text(tokenizer, piece.content)
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    if not tokenizer.chat_template:
        raise UsageError("The data holds chats (messages), but the model's tokenizer has no chat template; pass text.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise whatever they like
        raise UsageError(f"The tokenizer's chat template refuses a chat of the data: {first_line(error)}.") from error


def _separators(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What stands before and after a document: what the tokenizer adds of itself, else its end-of-text token."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a"))
    extra = len(full) - len(bare)
    start = next((i for i in range(extra + 1) if full[i : i + len(bare)] == bare), 0)
    before, after = full[:start], full[start + len(bare) :]
    if not before and not after:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        after = [] if end is None else [int(end)]
    return before, after
