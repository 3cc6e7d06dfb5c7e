"""Captions to vectors: BERT's last hidden state at [CLS] (Xin et al. 2023, on the pipeline of Mei et al. 2022)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from harken.errors import DataError
from harken.models import weights

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PUNCTUATION = re.compile(r'[,.!?;:"]')


def clean(caption: str) -> str:
    """Lower case, `, . ! ? ; : "` to blanks, single blanks: Mei et al.'s captions."""
    return " ".join(PUNCTUATION.sub(" ", caption.lower()).split())


def word_pieces(captions: Sequence[str], *, min_count: int = 1) -> dict[str, int]:
    """A WordPiece vocabulary of the captions' words, plus single letters so that any other word can be spelt."""
    words = Counter(word for c in captions for word in re.findall(r"\w+|[^\w\s]", clean(c)))
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz0123456789'-"))
    known = [w for w in sorted(words) if words[w] >= min_count]
    pieces = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *known])
    return {piece: i for i, piece in enumerate(pieces)}


class Bert(nn.Module):
    """Tokens to (caption, dim). No pooler, no mean: the state at [CLS]. No caption is cut but by BERT's own limit."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.dim = int(model.config.hidden_size)
        self.max_tokens = int(model.config.max_position_embeddings)

    @classmethod
    def pretrained(cls, name_or_folder: str | Path, *, dropout: float = 0.2) -> Bert:
        """`bert-base-uncased` or another BERT, by name or from a folder, with hidden and attention `dropout`."""
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return cls(*weights.bert_pretrained(str(name_or_folder), **rates))

    @classmethod
    def small(
        cls,
        captions: Sequence[str],
        *,
        dim: int = 128,
        layers: int = 2,
        heads: int = 4,
        max_tokens: int = 64,
        dropout: float = 0.2,
    ) -> Bert:
        """An untrained BERT with the vocabulary of `captions`, for small corpora and tests: nothing is downloaded.

        Its weights are drawn from torch's generator: seed it first.
        """
        from transformers import BertConfig, BertModel, BertTokenizer

        vocabulary = word_pieces(captions)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * dim,
            max_position_embeddings=max_tokens,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=vocabulary["[PAD]"],
        )
        return cls(BertModel(config, add_pooling_layer=False), BertTokenizer(vocab=vocabulary))

    def train_masked(self, captions: Sequence[str], *, steps: int, batch: int, lr: float, seed: int) -> float:
        """Train to guess words that are hidden (Devlin et al. 2019), as the released BERTs were; the last step's loss.

        Of the tokens but the special ones 15 % are guessed: 80 % of these are hidden, 10 % another word stands for, and
        10 % are as they were. No next sentences: captions have none. The rate warms up over a tenth of the steps and
        falls to zero; the guessing head is dropped.
        """
        if not captions:
            raise DataError("there is no caption to train BERT on. Give it some, or start it untrained.")
        tokens = [self.tokenize([c])["input_ids"][0] for c in captions]
        n_words, hidden = int(self.model.config.vocab_size), self.tokenizer.mask_token_id
        head = nn.Linear(self.dim, n_words)
        parameters = [*self.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
        draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        self.train()
        loss = torch.zeros(())
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(10 * (step + 1) / steps, 1) * (1 - step / steps)
            taken = torch.randint(len(tokens), (batch,), generator=draw).tolist()
            ids = nn.utils.rnn.pad_sequence([tokens[i] for i in taken], batch_first=True)  # [PAD] is 0
            guessed = (ids >= len(SPECIAL)) & (torch.rand(ids.shape, generator=draw) < 0.15)
            if not guessed.any():
                continue
            how, other = torch.rand(ids.shape, generator=draw), torch.randint(n_words, ids.shape, generator=draw)
            shown = torch.where(guessed & (how < 0.8), hidden, torch.where(guessed & (how >= 0.9), other, ids))
            states = self.model(input_ids=shown, attention_mask=(ids != 0).long()).last_hidden_state
            loss = nn.functional.cross_entropy(head(states[guessed]), ids[guessed])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        self.eval()
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """Write config, weights and tokenizer so that `Bert.pretrained(folder)` has them back."""
        weights.save_bert(folder, self.model, self.tokenizer)

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, both (caption, token), padded to the longest caption of these.

        Raises DataError for a caption that is empty, or longer than the model can read.
        """
        if empty := [i for i, c in enumerate(captions) if not clean(c)]:
            raise DataError(
                f"caption {empty[0]} of {len(captions)} is empty: {captions[empty[0]]!r}. Say what is heard."
            )
        batch = self.tokenizer([clean(c) for c in captions], padding=True, return_tensors="pt")
        n_tokens = batch["input_ids"].shape[1]
        if n_tokens > self.max_tokens:
            longest = max(captions, key=len)
            raise DataError(f"a caption has {n_tokens} tokens and BERT reads {self.max_tokens}: {longest[:80]!r}...")
        return {k: batch[k] for k in ("input_ids", "attention_mask")}

    def forward(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "caption dim"]:
        """The last hidden state at [CLS], not normalised. Padding is not attended to."""
        out = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return out.last_hidden_state[:, 0]

    @torch.no_grad()
    def embed(self, captions: Sequence[str], *, batch: int = 128) -> Float[Tensor, "caption dim"]:
        """Embeddings of captions, `batch` at a time, on the model's device, without gradient."""
        device = next(self.parameters()).device
        parts = [self.tokenize(captions[i : i + batch]) for i in range(0, len(captions), batch)]
        return torch.cat([self({k: v.to(device) for k, v in tokens.items()}) for tokens in parts])
