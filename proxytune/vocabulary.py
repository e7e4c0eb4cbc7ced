"""Whether several models have the same vocabulary: compared by content, never by a path, a class or a size."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from proxytune.errors import UserError


def check_same_vocabulary(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Raises `UserError` with the first id at which a tokenizer differs from the first one.

    It compares the token of every id and whether it is special. It does not compare merges and normalisation (one
    tokenizer makes the ids; in the others they only need the same meaning) nor which token is the end or padding token.
    """
    reference_name, reference = next(iter(tokenizers.items()))
    expected = _tokens(reference)
    for name, tokenizer in tokenizers.items():
        found = _tokens(tokenizer)
        if found != expected:
            first = min(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            raise UserError(
                f"{name}: its vocabulary differs from that of '{reference_name}', first at id {first}: "
                f"{_show(found.get(first))} against {_show(expected.get(first))}; mix models of one vocabulary, or ask for a token map"
            )


def check_rows(rows: Mapping[str, int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of output rows that the members have in common.

    Heads are often padded beyond the vocabulary to a round size. Rows that not every member has are cut off: they have no
    token. Raises `UserError` where a head is too short for its vocabulary.
    """
    needed = max(_tokens(tokenizer)) + 1
    for name, count in rows.items():
        if count < needed:
            raise UserError(f"{name}: its head has {count} rows for a vocabulary of {needed} ids; load the tokenizer that belongs to it")
    return min(rows.values())


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[str, bool]]:
    tokens = {identifier: (token, False) for token, identifier in tokenizer.get_vocab().items()}
    added = {identifier: (token.content, token.special) for identifier, token in tokenizer.added_tokens_decoder.items()}
    return tokens | added


def _show(token: tuple[str, bool] | None) -> str:
    if token is None:
        return "no token"
    return f"{'special ' if token[1] else ''}{token[0]!r}"
