"""tiny-oss's tokenizer: 8 harmony specials, 256 bytes, and whole words of the prompt's boilerplate.

Digits and content stay one token per character, so that spelling, counting and carrying are local
look-ups. The vocabulary words are data words too (``WORDS``): the model learns to spell them.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = (
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
STRUCTURE = (
    "system user assistant developer analysis final commentary functions json"
    " Reasoning Tools Instructions namespace type any string number"
).split()
# Words a question is made of; content words are spelled in bytes.
WORDS = (
    "what is the word how many times does letter appear in please compute add and from subtract"
    " reverse write backwards spell spelled do you count make json object with give me call use"
    " run of to plus minus sum result can words letters functions am tiny"
).split()
# Words, numbers of up to three digits, punctuation, white space: as in GPT-4o's tokenizer.
PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def build() -> Tokenizer:
    """The tokenizer, from nothing but this file."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    boilerplate = [*STRUCTURE, *(" " + word for word in STRUCTURE)]
    for word in WORDS:
        boilerplate += [" " + word, word.capitalize()]
    boilerplate += ["##", " =>", "_:", "=", "});", "//", "\n\n", ",\n", "{\n", "})", " (_:"]
    for piece in boilerplate:
        (encoded, _), *rest = byte_level.pre_tokenize_str(piece)
        assert not rest
        if encoded not in pieces:
            pieces.append(encoded)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(special, special=True, normalized=False) for special in SPECIALS]
    )
    return tokenizer


def padded_vocabulary(tokenizer: Tokenizer) -> int:
    """Vocabulary size of the model: the tokenizer's, up to a multiple of 32."""
    return (int(tokenizer.get_vocab_size()) + 31) // 32 * 32
