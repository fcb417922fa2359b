"""What counting words gives: an interpolated Kneser-Ney model, which the quickstart's base has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 62  # of an n-gram's code


@dataclass(frozen=True)
class _Order:
    grams: Tensor  # codes, ascending
    kept: Tensor  # each one's count, less its discount
    contexts: Tensor  # codes of all but the last token, ascending
    totals: Tensor  # each context's count
    taken: Tensor  # the sum of its discounts, which the shorter context divides


class NGrams:
    """Probabilities of tokens from counts of n-grams (Chen and Goodman's modified Kneser-Ney, all orders interpolated).

    Args:
        tokens: [N] int64, the text that is counted.
        size: of the vocabulary.
        order: longest n-grams; less where their codes would not fit.
    """

    def __init__(self, tokens: Tensor, size: int, order: int = 5) -> None:
        self._bits = max(size - 1, 1).bit_length()
        self.order, self._size = min(order, _BITS // self._bits, len(tokens)), size
        self._orders: list[_Order] = []
        grams, counts = torch.unique(self._codes(tokens, self.order), return_counts=True)
        for length in range(self.order, 0, -1):
            self._orders.insert(0, _discounted(grams, counts, grams >> self._bits))
            # Shorter ones count by how many different tokens stood before them.
            grams, counts = torch.unique(grams & ((1 << self._bits * (length - 1)) - 1), return_counts=True)

    def nats(self, tokens: Tensor) -> Tensor:
        """-log p [N - order + 1] of each token from the `order`-th on, given those before it."""
        p = torch.full((len(tokens) - self.order + 1,), 1 / self._size, dtype=torch.float64)
        for length, counted in enumerate(self._orders, 1):
            codes = self._codes(tokens, length)[self.order - length :]
            gram, known = _find(counted.grams, codes)
            context, seen = _find(counted.contexts, codes >> self._bits)
            share = torch.where(known, counted.kept[gram], 0.0) + counted.taken[context] * p
            p = torch.where(seen, share / counted.totals[context], p)
        return -p.log()

    def _codes(self, tokens: Tensor, length: int) -> Tensor:
        codes = torch.zeros(len(tokens) - length + 1, dtype=torch.int64)
        for i in range(length):
            codes = (codes << self._bits) | tokens[i : i + len(codes)]
        return codes


def _discounted(grams: Tensor, counts: Tensor, contexts: Tensor) -> _Order:
    once, twice, thrice, four = (float((counts == n).sum()) for n in (1, 2, 3, 4))
    discounts = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    if once and twice and thrice:
        y = once / (once + 2 * twice)
        estimates = (1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice)
        discounts = torch.tensor([0.0, *(min(max(d, 0.1), n) for n, d in enumerate(estimates, 1))], dtype=torch.float64)
    discount = discounts[counts.clamp(max=3)]
    contexts, place = torch.unique(contexts, return_inverse=True)
    zeros = torch.zeros(len(contexts), dtype=torch.float64)
    totals, taken = zeros.index_add(0, place, counts.double()), zeros.index_add(0, place, discount)
    return _Order(grams, counts - discount, contexts, totals, taken)


def _find(sorted_codes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Where codes stand, and which of them do."""
    place = torch.searchsorted(sorted_codes, codes).clamp(max=len(sorted_codes) - 1)
    return place, sorted_codes[place] == codes
