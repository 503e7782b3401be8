"""Block sizes for loops over a prompt."""


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`.

    >>> divisor(576, 512), divisor(16384, 512)
    (288, 512)
    """
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
