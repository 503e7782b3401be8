"""Tasks whose answer lies in many places of the prompt: RULER's variable tracking, common words and frequent words.

In the short form words are keys of the demo model, without anything between them, and answers are keys in order:

    river: 217 130        variable_tracking: the chain is hidden in noise; `apple:river:` assigns river's value to
    apple:river:          apple. The question is a value, the answer its variables in the order of the chain.
    !  217 130
    river:apple:

    apple:river:fox:apple:apple:river:oak:     common_words: in the order of their first appearance
    ! apple:river:                             frequent_words: the most frequent first; the noise is `.`
"""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvjax.errors import InputError
from kvjax.tasks import vocabulary, words
from kvjax.tasks.needles import PIECES
from kvjax.tasks.synthetic import LAST, Case, Written, at_least, hide, match_all, noise, synthetic, value
from kvjax.tasks.task import Form, Task

CODE = 6  # letters of a coded word
TOP = 3  # frequent words that are asked for
OFTEN = 1000  # times that a common word is in a list, at most
LONG = 4096  # tokens from which common_words repeats as in RULER's configuration


class Chains(NamedTuple):
    """Variables that get their value from one another; the first chain is asked for."""

    names: Sequence[Sequence[str]]  # of each chain, in the order of assignment; distinct
    values: Sequence[str]  # of each chain; distinct


def draw_chains(rng: np.random.Generator, form: Form, chains: int, hops: int, length: int = 5) -> Chains:
    """Random chains of `hops` + 1 variables; natural names have `length` letters, values 5 digits."""
    count = chains * (hops + 1)
    if form == "short":
        names = [vocabulary.keys()[key] for key in rng.permutation(vocabulary.NUM_KEYS)[:count]]
        drawn = rng.choice(vocabulary.NUM_NUMBERS**2, chains, replace=False).tolist()
        values = [value(divmod(number, vocabulary.NUM_NUMBERS)) for number in drawn]
    else:
        names = [name.upper() for name in words.letters(rng, count, length)]
        values = [str(10000 + number) for number in rng.choice(89999, chains, replace=False).tolist()]
    return Chains([names[start : start + hops + 1] for start in range(0, count, hops + 1)], values)


def scatter_chains(rng: np.random.Generator, form: Form, content: Chains, pieces: Sequence[str]) -> str:
    """A haystack with the assignments at random depths, each chain's in their order."""
    first, hop = ("{}{}\n", "{}{}\n") if form == "short" else ("VAR {} = {}\n", "VAR {} = VAR {} \n")
    placed: list[tuple[float, str]] = []
    for names, start in zip(content.names, content.values, strict=True):
        assignments = [first.format(names[0], start)]
        assignments += [hop.format(name, source) for source, name in itertools.pairwise(names)]
        placed += zip(np.sort(rng.random(len(names))).tolist(), assignments, strict=True)
    depths, assignments = zip(*sorted(placed), strict=True)
    return hide(pieces, assignments, depths)


def write_chains(form: Form, content: Chains, text: str) -> Written:
    """The question for the first chain's variables, after the text of `scatter_chains`."""
    names, asked = content.names[0], content.values[0]
    if form == "short":
        return Written(text, f"{LAST}{asked}\n", names)
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    question = f"Question: Find all variables that are assigned the value {asked} in the text above."
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {asked}, they are: "
    )
    return Written(head + text, question, names, prefix, 30)


def variable_tracking(chains: int = 1, hops: int = 4, example: bool = True) -> Task:
    """Variable tracking: which variables have a value, directly or through others? The default is RULER's vt.

    Args:
      chains: of variables; the first is asked for.
      hops: assignments of a chain after its first.
      example: begin with an answered example; natural form only.

    Source: Hsieh et al., RULER (2024): definition, wording, score (`match_all`).
    Differs: values are distinct; assignments may follow one another without noise between them; the example has 5
      lines of noise instead of as many as fit into 500 tokens, and at most 10 hops as there.
    """
    at_least("variable_tracking", "chains", chains, 1)
    at_least("variable_tracking", "hops", hops, 1)
    if chains * (hops + 1) > vocabulary.NUM_KEYS:
        raise InputError(
            f"task variable_tracking: chains={chains} of hops={hops} need {chains * (hops + 1)} variables: "
            f"there are {vocabulary.NUM_KEYS}"
        )

    def write(case: Case, size: int) -> Written:
        rng, form = case.rng(), case.form
        content = draw_chains(rng, form, chains, hops)
        text = write_chains(form, content, scatter_chains(rng, form, content, noise(size)))
        if form == "short" or not example:
            return text
        shown = draw_chains(rng, form, chains, min(10, hops), length=3)
        return _after_example(write_chains(form, shown, scatter_chains(rng, form, shown, noise(5))), text, "\n\n")

    return synthetic("variable_tracking", write, lambda form: (1, PIECES), match_all)


def _after_example(shown: Written, text: Written, end: str) -> Written:
    example = f"{shown.context}{shown.question}{shown.prefix} {' '.join(shown.answers)}{end}"
    return text._replace(context=example + text.context)


class Common(NamedTuple):
    """A list of words of which some are repeated more often than others."""

    words: Sequence[str]  # the list
    common: Sequence[str]  # the most frequent


def draw_common(
    rng: np.random.Generator, choices: Sequence[str], distinct: int, common: int, often: int, seldom: int
) -> Common:
    """A shuffled list of `distinct` words, the `common` first ones `often` times and the others `seldom` times."""
    chosen = [choices[int(index)] for index in rng.choice(len(choices), distinct, replace=False)]
    listed = chosen[:common] * often + chosen[common:] * seldom
    return Common([listed[index] for index in rng.permutation(len(listed)).tolist()], chosen[:common])


def write_common(form: Form, content: Common) -> Written:
    """The question for the most common words of a list."""
    if form == "short":
        return Written("".join(content.words) + "\n", LAST, sorted(content.common, key=content.words.index))
    count = len(content.common)
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = f"Question: What are the {count} most common words in the above list?"
    prefix = f" Answer: The top {count} words that appear most often in the list are:"
    return Written(f"{head}{_numbered(content.words)}\n", question, content.common, prefix, 120)


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1))


def common_words(common: int = 10, often: int = 0, seldom: int = 0, example: bool = True) -> Task:
    """Common words extraction: the most frequent words of a list. The default is RULER's cwe.

    Args:
      common: words that are asked for.
      often: how often each of them is in the list; 0 = RULER's: 30, and 6 in prompts of less than 4096 tokens.
      seldom: how often each other word is; 0 = RULER's: 3, and 1 in prompts of less than 4096 tokens.
      example: begin with an answered example; natural form only.

    Source: Hsieh et al., RULER (2024): definition, wording, score (`match_all`).
    Differs: words are ours (`words.single`, and pairs such as `brave-otter` where those are too few), and none is
      part of another.
    """
    for name, given, least in (("common", common, 1), ("often", often, 0), ("seldom", seldom, 0)):
        at_least("common_words", name, given, least)
    if max(often, seldom) > OFTEN:
        raise InputError(f"task common_words: often={often} or seldom={seldom} is too large: give {OFTEN:,} or less")
    if (often or 6) <= (seldom or 3):
        raise InputError(f"task common_words: often={often or 6} must be more than seldom={seldom or 3}")
    if common >= vocabulary.NUM_KEYS:
        raise InputError(f"task common_words: common={common} is too large: there are {vocabulary.NUM_KEYS} words")

    def write(case: Case, size: int) -> Written:
        rng, long = case.rng(), case.length >= LONG
        counts = (often or (30 if long else 6), seldom or (3 if long else 1))
        if case.form == "short":
            return write_common("short", draw_common(rng, vocabulary.keys(), size, common, *counts))
        needed = max(size, 4 * common)
        choices = words.single() if needed <= len(words.single()) else words.pairs(rng, needed)
        text = write_common("natural", draw_common(rng, choices, size, common, *counts))
        if not example:
            return text
        few = (4 * common, common, 10, 3) if long else (2 * common, common, 3, 1)
        shown = write_common("natural", draw_common(rng, choices, *few))
        return _after_example(shown._replace(answers=[_numbered(shown.answers)]), text, "\n")

    def sizes(form: Form) -> tuple[int, int]:
        return common + 1, vocabulary.NUM_KEYS if form == "short" else words.num_pairs()

    return synthetic("common_words", write, sizes, match_all)


class Frequent(NamedTuple):
    """A text whose words have Zipf's frequencies."""

    words: Sequence[str]  # the text; the most frequent is noise
    top: Sequence[str]  # the next ones, the most frequent first


def zipf_counts(distinct: int, total: int, alpha: float) -> np.ndarray:
    """How often each of the words is in a text of about `total` words, by rank: floor(total rank^-alpha / zeta(alpha)).

    Source: RULER, frequent words extraction.
    Differs: the words that are asked for are in the text, and no rarer one is as frequent as they are.
    """
    from scipy.special import zeta

    counts = np.floor(total * np.arange(1, distinct + 1) ** -alpha / zeta(alpha)).astype(int)
    counts[: TOP + 1] = np.maximum(counts[: TOP + 1], np.arange(TOP + 1, 0, -1))
    counts[TOP + 1 :] = np.minimum(counts[TOP + 1 :], counts[TOP] - 1)
    return counts


def draw_frequent(rng: np.random.Generator, ranked: Sequence[str], total: int, alpha: float) -> Frequent:
    """A shuffled text of about `total` words; `ranked` begins with the noise, the most frequent word."""
    counts = zipf_counts(len(ranked), total, alpha)
    listed = list(collections.Counter(dict(zip(ranked, counts.tolist(), strict=True))).elements())
    return Frequent([listed[index] for index in rng.permutation(len(listed)).tolist()], ranked[1 : TOP + 1])


def write_frequent(form: Form, content: Frequent) -> Written:
    """The question for the most frequent words of a text."""
    if form == "short":
        return Written("".join(content.words) + "\n", LAST, content.top)
    head = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    question = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Written(f"{head}{' '.join(content.words)}\n", question, content.top, prefix, 50)


def frequent_words(alpha: float = 2.0) -> Task:
    """Frequent words extraction: the three most frequent coded words after the noise. The default is RULER's fwe.

    The text has a 50th as many distinct words as the prompt has tokens.

    Args:
      alpha: exponent of Zipf's law, more than 1: the smaller, the harder.

    Source: Hsieh et al., RULER (2024): definition, wording, score (`match_all`).
    Differs: `zipf_counts`.
    """
    if alpha <= 1:
        raise InputError(f"task frequent_words: alpha={alpha} is too small: give more than 1")

    def write(case: Case, size: int) -> Written:
        rng, distinct = case.rng(), max(TOP + 1, (case.length - 50) // 50)
        if case.form == "short":
            ranked = [".", *(vocabulary.keys()[key] for key in rng.permutation(vocabulary.NUM_KEYS)[: distinct - 1])]
        else:
            ranked = ["...", *words.letters(rng, distinct - 1, CODE)]
        return write_frequent(case.form, draw_frequent(rng, ranked, size, alpha))

    return synthetic("frequent_words", write, lambda form: (1, PIECES), match_all)
