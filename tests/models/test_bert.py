"""BERT on captions: cleaning, padding, and a small one that needs no download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harken.errors import DataError
from harken.models.bert import Bert, clean, word_pieces

CAPTIONS = ["A dog barks, twice!", "rain falls on a roof", "a bell rings; people talk"]


@pytest.fixture(scope="module")
def bert() -> Bert:
    torch.manual_seed(0)
    return Bert.small(CAPTIONS, dim=16, layers=1, heads=2, max_tokens=32).eval()


def test_cleaning() -> None:
    assert clean('A dog, "Rex": barks!  Twice? Yes; loudly.') == "a dog rex barks twice yes loudly"


def test_known_words_are_one_token_and_others_are_spelt(bert: Bert) -> None:
    tokens = bert.tokenizer.convert_ids_to_tokens(bert.tokenize(["The dog barks"])["input_ids"][0])
    assert tokens == ["[CLS]", "t", "##h", "##e", "dog", "barks", "[SEP]"]
    assert "[UNK]" not in bert.tokenizer.convert_ids_to_tokens(bert.tokenize(["zebra's 42 x-rays"])["input_ids"][0])


def test_the_vocabulary_is_a_function_of_the_set_of_captions() -> None:
    assert word_pieces(CAPTIONS) == word_pieces(CAPTIONS[::-1])
    assert "twice" not in word_pieces(CAPTIONS, min_count=2)


def test_padding_and_companions_do_not_matter(bert: Bert) -> None:
    tokens = bert.tokenize(CAPTIONS)
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (3, 7)
    together = bert(tokens)
    assert together.shape == (3, bert.dim) == (3, 16)
    torch.testing.assert_close(together[0], bert(bert.tokenize(CAPTIONS[:1]))[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bert.embed(CAPTIONS, batch=2), together.detach(), atol=1e-5, rtol=1e-5)


def test_it_is_the_state_at_cls_without_a_pooler(bert: Bert) -> None:
    tokens = bert.tokenize(CAPTIONS[:1])
    assert torch.equal(bert(tokens), bert.model(**tokens).last_hidden_state[:, 0])
    assert not [k for k in bert.state_dict() if "pooler" in k]


def test_a_caption_beyond_the_limit_is_refused_and_not_cut(bert: Bert) -> None:
    with pytest.raises(DataError, match="BERT reads 32"):
        bert.tokenize(["dog " * 40])


@pytest.mark.parametrize("empty", ["", "  ", "...", ' ,;:"!? ', "\n\t"])
def test_a_caption_that_says_nothing_is_refused_and_its_place_told(empty: str, bert: Bert) -> None:
    """It would be [CLS] [SEP], the same embedding for all such, and a clip's positive."""
    with pytest.raises(DataError, match=r"caption 1 of 3 is empty: .*\. Say what is heard\."):
        bert.tokenize([CAPTIONS[0], empty, ""])
    with pytest.raises(DataError, match="caption 0 of 1 is empty"):
        bert.embed([empty])
    assert bert.tokenize(["a", "-", "7"])["input_ids"].shape == (3, 3)


def test_saved_and_loaded_it_is_the_same(bert: Bert, tmp_path: Path) -> None:
    bert.save(tmp_path / "bert")
    back = Bert.pretrained(tmp_path / "bert", dropout=0.1).eval()
    assert torch.equal(back.embed(CAPTIONS), bert.embed(CAPTIONS))
    assert back.model.config.hidden_dropout_prob == back.model.config.attention_probs_dropout_prob == 0.1
    with pytest.raises(DataError, match="could not be loaded"):
        Bert.pretrained(tmp_path / "none")


def test_gradients_are_finite(bert: Bert) -> None:
    bert(bert.tokenize(CAPTIONS)).square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in bert.parameters() if p.grad is not None)
    bert.zero_grad()


def test_the_base_model_has_the_papers_size() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        assert sum(p.numel() for p in BertModel(BertConfig(), add_pooling_layer=False).parameters()) == 108_891_648
