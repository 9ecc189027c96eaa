"""The local tokenizer: umT5's conventions, every text its own tokens, readable by transformers 4 and 5."""

from __future__ import annotations

import json

import pytest

from turbocompile.wan.tokenizer import VOCAB_SIZE, build_tokenizer, save_tokenizer


@pytest.mark.parametrize("text", ["A cat walks on the grass", "zürich 日本 🙂", "tabs\tand  spaces", ""])
def test_texts_come_back_and_end_with_eos(text):
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text).ids
    assert ids[-1] == 1
    assert max(ids) < VOCAB_SIZE
    assert 2 not in ids  # nothing is unknown
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == text.split()


def test_common_words_are_one_token_and_texts_differ():
    tokenizer = build_tokenizer()
    assert len(tokenizer.encode("cat on grass").ids) == 4
    assert tokenizer.encode("日").ids != tokenizer.encode("本").ids


def test_the_saved_form_names_a_class_that_both_versions_know(tmp_path):
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokens = tokenizer(["A cat", "A"], padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    assert tokens.attention_mask.sum(1).tolist() == [(tokens.input_ids[i] != 0).sum() for i in range(2)]
    assert tokenizer.pad_token_id == 0
