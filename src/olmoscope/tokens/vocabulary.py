"""What the tokens of a vocabulary look like to a person."""

import json
from collections.abc import Iterable

import tokenizers


def token_texts(backend: tokenizers.Tokenizer) -> list[str]:
    """The text of every token id from 0 to the highest; bytes that are not UTF-8 by themselves appear as `\\xe2`.

    Tokens of byte-level tokenizers (GPT-2's alphabet) and byte-fallback ones (SentencePiece) are turned back into the
    bytes that they represent; an added token is its own text. Ids without a token have an empty text.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    texts = [""] * (max(vocabulary.values()) + 1)
    decoder = _decoder_types(json.loads(backend.to_str())["decoder"])
    alphabet = {letter: byte for byte, letter in enumerate(_byte_alphabet())}
    for token, number in vocabulary.items():
        if token in added:
            texts[number] = token
        elif "ByteLevel" in decoder:
            texts[number] = _shown(alphabet.get(letter) for letter in token) or token
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">") and "ByteFallback" in decoder:
            texts[number] = _shown([int(token[3:5], 16)]) or token
        else:
            texts[number] = token.replace("▁", " ")
    return texts


def _shown(codes: Iterable[int | None]) -> str:
    """Bytes as text; "" if one of them is None."""
    known = []
    for code in codes:
        if code is None:
            return ""
        known.append(code)
    return bytes(known).decode("utf-8", "backslashreplace")


def _decoder_types(decoder: dict[str, object] | None) -> set[str]:
    """The types of a decoder and of its inner decoders, as tokenizer.json names them."""
    if decoder is None:
        return set()
    inner = decoder.get("decoders", [])
    assert isinstance(inner, list)
    return {str(decoder["type"])}.union(*map(_decoder_types, inner))


def _byte_alphabet() -> list[str]:
    """The character that byte-level tokenizers write for each byte (GPT-2): the byte itself if it is printable, else
    the next character from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]
