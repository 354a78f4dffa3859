"""Chooses tokens as transformers' `generate` does, from random numbers of the trace's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from insitu_shard.engine.transformers_internals import PreparedGeneration


class Chooser:
    """The tokens of one trace: what each step's logits make of them, and when its rows end.

    Attributes:
        token_ids: prompts, padded on the left, and what was chosen, [rows, length].
        num_chosen: how many tokens each row has got.
    """

    def __init__(self, prepared: PreparedGeneration, seed: int, max_new_tokens: int) -> None:
        """Begins.

        Args:
            prepared: what transformers has made of the trace's rows and options.
            seed: of the random numbers.
            max_new_tokens: how many tokens each row gets at most.
        """
        self.token_ids = prepared.token_ids
        self.num_chosen = 0
        self._max_new_tokens = max_new_tokens
        self._process = prepared.logits_processor
        self._criteria = prepared.stopping_criteria
        self._config = prepared.config
        self._unfinished = torch.ones_like(self.token_ids[:, 0])
        self._generator = torch.Generator(self.token_ids.device).manual_seed(seed)
        pad = prepared.pad_token_id
        self._pad = 0 if pad is None else pad

    @property
    def is_over(self) -> bool:
        """Whether no row gets a further token."""
        return self.num_chosen == self._max_new_tokens or not self._unfinished.any()

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Gives the next token of each row.

        Args:
            logits: of the last position, [rows, vocabulary].
        """
        own = logits.to(self.token_ids.device, torch.float32, copy=True)
        scores: torch.Tensor = self._process(self.token_ids, own)  # type: ignore[arg-type]
        if self._config.do_sample:
            likelihoods = scores.softmax(-1)
            chosen = torch.multinomial(likelihoods, 1, generator=self._generator).squeeze(1)
        else:
            chosen = scores.argmax(-1)
        return torch.where(self._unfinished.bool(), chosen, self._pad)

    def take(self, tokens: torch.Tensor) -> None:
        """Adds a token to each row."""
        self.token_ids = torch.cat([self.token_ids, tokens[:, None]], dim=-1)
        self.num_chosen += 1
        has_ended = self._criteria(self.token_ids, None)
        self._unfinished = self._unfinished & ~has_ended

    def end(self, rows: torch.Tensor) -> None:
        """Lets rows get no further token.

        Args:
            rows: whether each does.
        """
        self._unfinished = self._unfinished & ~rows.to(self._unfinished.device)
