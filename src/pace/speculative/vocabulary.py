"""Whether a draft speaks the target's tokens."""

from __future__ import annotations

from pace.checkpoint.files import ModelFiles, ModelFolder
from pace.errors import ConfigError, show
from pace.log import logger
from pace.text.tokenizer import Tokenizer
from pace.text.tokenizer_json import MAX_TOKENIZER_BYTES, load

__all__ = ["check_same_tokens"]

SHOWN = 3  # differing ids that an error names


def check_same_tokens(
    target: Tokenizer | None, draft: ModelFiles, n_ids: int, *, trusted: bool = False
) -> None:
    """Compare the tokens of two checkpoints id by id; what only one of them has, as padding or additions, does not matter.

    Args:
        target: the target's tokenizer; None: it was loaded without one, and nothing can be compared.
        draft: the draft's files.
        n_ids: ids that both models know.
        trusted: don't probe an unusual tokenizer of the draft.

    Raises:
        ConfigError: an id stands for one token here and for another one there; the first ones are named.
        TokenizerError: the draft's tokenizer can't be read.
    """
    data = draft.read("tokenizer.json", MAX_TOKENIZER_BYTES)
    if target is None or data is None:
        logger.warning("the tokens of the draft %s can't be compared: %s", draft.path, _missing(target))
        return
    if ModelFolder(target.directory).read("tokenizer.json", MAX_TOKENIZER_BYTES) == data:
        return
    rust = load(draft.where("tokenizer.json"), data, trusted=trusted)
    theirs = {i: token for token, i in rust.get_vocab(with_added_tokens=True).items()}
    ours = {i: token for token, i in target.vocabulary().items()}
    wrong = sorted(i for i, token in theirs.items() if i < n_ids and ours.get(i, token) != token)
    if wrong:
        listed = ", ".join(f"{i} is {show(theirs[i])} and {show(ours[i])}" for i in wrong[:SHOWN])
        raise ConfigError(
            f"the draft {draft.path} has other tokens than the target: of its ids {listed}, {len(wrong)} differ in all; "
            "choose a draft of the target's family"
        )


def _missing(target: Tokenizer | None) -> str:
    return "the target was loaded without a tokenizer" if target is None else "it has no tokenizer.json"
