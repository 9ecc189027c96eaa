"""A small tokenizer that is built here, without any download, for pipelines with synthetic weights.

It has the form of umT5's: Unigram over SentencePiece-style pieces, `<pad>` 0, `</s>` 1 at the end of every text. Common
words are one piece each, anything else falls back to bytes, so that every text in any script has its own tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPACE = "\u2581"  # what stands for a space at the start of a piece

WORDS = (
    "a an and animal are art as astronaut at autumn be beach bear bird black blue boat bright brown by camera car "
    "cat child cinematic city close cloud color cup dance dark day detailed dog dragon field fire fish floating "
    "flower flying for forest from glass golden grass green hand high hill horse house ice in into is it its "
    "jumping lake landscape large light little looking man moon morning motion mountain moving night ocean of old "
    "on or orange over panda people person playing quality rain red river road robot rock room running sailing "
    "scene sea shot sitting sky slow small snow space standing star street style summer sun sunset table the "
    "their through to tree turning two under up video view walking wall water wave while white wind window winter "
    "with wolf woman wooden yellow young"
)

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"


def _pieces(words: str) -> list[tuple[str, float]]:
    """Pieces with their log probabilities: longer ones are dearer, and still cheaper than the letters they replace."""
    pieces = [(PAD, 0.0), (EOS, 0.0), (UNK, 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(SPACE + word, -6.0) for word in sorted(set(words.split()))]
    pieces += [(piece, -8.0) for piece in (SPACE, *_LETTERS)]
    return pieces


VOCAB_SIZE = len(_pieces(WORDS))


def vocab_size(words: str) -> int:
    """How many pieces `build_tokenizer(words)` has."""
    return len(_pieces(words))


def build_tokenizer(words: str = WORDS) -> Tokenizer:
    """The tokenizer, as the tokenizers library has it. words: what is one piece each, separated by spaces."""
    tokenizer = Tokenizer(models.Unigram(_pieces(words), unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement=SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    return tokenizer


def _settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both know
        "model_max_length": 512,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
    }


def save_tokenizer(folder: Path, words: str = WORDS) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Written here rather than by transformers: version 5 records a class name that version 4 does not know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(words).save(str(folder / "tokenizer.json"))
    special = {key: value for key, value in _settings().items() if key in ("pad_token", "eos_token", "unk_token")}
    for name, values in (("tokenizer_config.json", _settings()), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
