"""What a cache holds where the question decides what runs: the rows of a sequence that waits for it.

What is surprising:
* The rows stand in `cache.deferred`, and layers that hold no keys of them count them as tokens that went by. So for
  `generate`, for histories and for files such a cache is as long as the sequence, like any other.
* They are embeddings (`defer_rows`), or what some layers made of them (`token_dropping_videoxl`).
* It is a value: a fork of the cache shares it, and appending or rewinding replaces it.

n rows, of the language model's width.
"""

from bisect import bisect_right
from itertools import accumulate

import torch
from transformers.cache_utils import DynamicCache


class DeferredRows:
    """Rows of a sequence that will run through the language model once the question is known.

    A value: `then` and `until` give another one. `rows[start:stop]` gives [n, hidden].

    Attributes:
        begin: Position of the first row in its sequence.
    """

    def __init__(self, parts: tuple[torch.Tensor, ...] = (), begin: int = 0):
        self.parts, self.begin = parts, begin
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, wanted: slice) -> torch.Tensor:
        start, stop, step = wanted.indices(len(self))
        assert step == 1 and start < stop, "rows are read as non-empty runs"
        found = []
        for number in range(bisect_right(self.ends, start), len(self.parts)):
            begin = self.ends[number] - len(self.parts[number])
            if begin >= stop:
                break
            found.append(self.parts[number][max(start - begin, 0) : stop - begin])
        return torch.cat(found) if len(found) > 1 else found[0]

    def then(self, rows: torch.Tensor) -> "DeferredRows":
        """These rows followed by [n, hidden] others."""
        return DeferredRows((*self.parts, rows), self.begin)

    def until(self, length: int) -> "DeferredRows":
        """These rows up to the position `length` of their sequence."""
        length -= self.begin
        begins = (end - len(part) for end, part in zip(self.ends, self.parts, strict=True))
        kept = [part[: length - begin] for begin, part in zip(begins, self.parts, strict=True) if begin < length]
        return DeferredRows(tuple(kept), self.begin)

    def since(self, start: int) -> "DeferredRows":
        """The rows from `start` on."""
        begins = [end - len(part) for end, part in zip(self.ends, self.parts, strict=True)]
        parts = zip(self.ends, begins, self.parts, strict=True)
        return DeferredRows(tuple(part[max(start - begin, 0) :] for end, begin, part in parts if end > start))

    def select(self, places: torch.Tensor) -> "DeferredRows":
        """The rows at some places, ascending."""
        bounds = torch.searchsorted(places, torch.tensor([0, *self.ends])).tolist()
        pieces = zip(self.ends, self.parts, bounds, bounds[1:], strict=False)
        chosen = [
            part.index_select(0, (places[first:last] - end + len(part)).to(part.device))
            for end, part, first, last in pieces
        ]
        return DeferredRows(tuple(chosen), self.begin)

    def to(self, device) -> "DeferredRows":
        """The rows on a device."""
        return DeferredRows(tuple(part.to(device) for part in self.parts), self.begin)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(part.nbytes for part in self.parts)


def defer_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Appends rows [n, hidden] to those of a cache that wait for the question, in place."""
    earlier = getattr(cache, "deferred", None)
    if cache.layers[0].held or earlier is None and cache.get_seq_length():
        raise ValueError(
            "a video cannot follow text whose visual tokens were chosen already: give the whole prompt, with all its "
            "videos, at once"
        )
    cache.deferred = (earlier or DeferredRows()).then(rows)
    for layer in cache.layers:
        layer.pass_by(len(rows))
