"""Which part of a batch is a rank's."""


def rank_share(count: int, rank: int, ranks: int) -> tuple[slice, float]:
    """Which of a batch's `count` images a rank computes, and what part of the batch's mean they stand for.

    The ranks' parts follow each other and differ by one image at most. A batch with fewer images than there are ranks
    is computed whole by every rank, which then counts as one part in `ranks`: no rank is left without a forward pass.

    >>> [rank_share(10, rank, 4) for rank in (0, 3)], rank_share(3, 1, 4)
    ([(slice(0, 2, None), 0.2), (slice(7, 10, None), 0.3)], (slice(0, 3, None), 0.25))
    """
    if count < ranks:
        return slice(0, count), 1 / ranks
    begin, end = count * rank // ranks, count * (rank + 1) // ranks
    return slice(begin, end), (end - begin) / count
