"""Block sizes: of loops over a prompt, of parts that a kernel may load, of a TPU's memory."""

LANES = 128  # numbers in a row of a TPU's memory


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`.

    >>> divisor(576, 512), divisor(16384, 512)
    (288, 512)
    """
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def powers(width: int, widest: int = 128) -> list[tuple[int, int]]:
    """Parts of a width that are powers of two, at most `widest`: where each starts, and its size.

    >>> powers(96), powers(128), powers(200)
    ([(0, 64), (64, 32)], [(0, 128)], [(0, 128), (128, 64), (192, 8)])
    """
    found, start = [], 0
    while start < width:
        size = min(widest, 1 << (width - start).bit_length() - 1)
        found.append((start, size))
        start += size
    return found
