"""English words for synthetic prompts: nouns of the demo model's vocabulary, adjectives and verbs.

Source: the lists are written for this project. Benchmarks take theirs from the package `wonderwords`.
"""

import functools

import numpy as np

from kvjax.tasks import vocabulary

ADJECTIVES: tuple[str, ...] = tuple(
    """
    able absent active actual agile alert alive ample ancient angry annual awake aware awkward bald basic bitter blank
    bleak blind blue blunt bold bored bouncy brave brief bright brisk broad broken brown bulky busy calm careful
    careless central certain cheap cheerful chilly civil clean clear clever cloudy clumsy cold colorful common complex
    cool correct costly cozy cruel crude curious curly curved daily damp dark dear decent deep delicate dense different
    dim direct dirty distant dizzy double dry dull dusty eager early easy elegant empty enormous equal even exact
    exotic expensive extra faint fair famous fancy fast fatal feeble fierce final fine firm flat fluffy foolish foreign
    formal fragile frank free frequent fresh friendly full funny fuzzy gentle genuine glad gloomy golden good
    graceful grand grateful great greedy green grim grumpy handy happy hard harsh hasty healthy heavy helpful hidden
    high hollow honest hot huge humble hungry icy ideal idle immense innocent jolly joyful juicy keen kind large late
    lazy lean lively lonely long loose loud lovely loyal lucky mad major mean mellow merry mild minor misty modern
    modest moist muddy narrow nasty native naughty near neat nervous new nice nimble noble noisy normal odd old open
    ordinary pale patient perfect playful pleasant polite poor popular precious pretty private proper proud
    pure purple quaint quick quiet rapid rare raw ready real recent red regular rich rigid ripe rough round royal rude
    rural rusty sad safe salty secure serious severe shallow sharp shiny short shy silent silly simple slender slim
    slow small smart smooth soft solar solid sour spare special spicy steady steep stiff strange strict strong sudden
    sweet swift tall tame tasty tender tense thick thin thirsty tidy tight tiny tired total tough tricky true ugly
    unusual upset urban urgent useful usual vague vain valid vast vivid warm weak wealthy weary weird wet white whole
    wicked wide wild wise witty wooden worried yellow young
    """.split()
)

VERBS: tuple[str, ...] = tuple(
    """
    accept achieve adapt admire admit adopt advise afford agree allow announce appear applaud apply approve argue
    arrange arrive ask assist attach attend avoid bake balance begin believe belong blend blink boil borrow bounce
    breathe bring build bury buy calculate call carry carve catch celebrate change chase chew choose clap climb close
    collect combine compare complain compose confess connect consider contain continue cook copy correspond cough count
    cover crawl create cross cry cure dance dare decide decorate defend deliver depend describe deserve develop dig
    discover discuss divide dive doubt drag draw drift drive earn eat educate embrace employ encourage enjoy enter
    escape examine excuse exercise exist expand expect explain explore extend fail fasten fetch fill find finish fix
    float fold follow forget forgive gather give grab greet grow guess guide hang happen hear
    heat help hesitate hide hire hope hug hunt hurry imagine improve include inform inspect introduce invent invite
    join juggle jump keep kick kneel knit knock know laugh launch lead learn lend lift listen live load look lose
    manage measure meet mend mix move multiply notice obey observe obtain occur offer order organize own pack pause
    perform permit persuade pick play please point polish pour practice praise prefer prepare present pretend
    prevent print produce promise protect prove provide publish pull push question raise reach read receive recognize
    recommend reflect refuse relax remain remember remind remove repair repeat replace reply report request
    rescue respond rest return reveal ride row rub run sacrifice save scatter scold search sell send separate
    serve settle shake shape share shelter shine shiver shout show shrug sigh sign sing sit sketch sleep slide smile
    sneeze solve sort speak spend spill spread squeeze stand stare start stay stir stitch stop stretch stroll study
    succeed suggest supply support suppose surprise surround suspect swim switch talk teach tell thank think throw
    touch trace trade translate trap travel tremble trust try tumble type understand unite unlock use vanish visit
    volunteer vote wait wake walk wander warn wash watch wear weave weigh welcome whirl win wish wrap wrestle write
    yawn yell
    """.split()
)


@functools.cache
def nouns() -> tuple[str, ...]:
    """The words of the demo model's keys."""
    return tuple(key.removesuffix(":") for key in vocabulary.keys())


@functools.cache
def single() -> tuple[str, ...]:
    """Distinct words of which none is part of another, since an answer is found by looking for it in a text."""
    words = sorted({*nouns(), *ADJECTIVES, *VERBS})
    together = "\n".join(words)
    return tuple(word for word in words if together.count(word) == 1)


def num_pairs() -> int:
    """How many pairs of an adjective and a noun there are."""
    return len(ADJECTIVES) * len(nouns())


def pairs(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct words such as `brave-otter`."""
    chosen = rng.choice(num_pairs(), count, replace=False).tolist()
    return [f"{ADJECTIVES[index // len(nouns())]}-{nouns()[index % len(nouns())]}" for index in chosen]


def letters(rng: np.random.Generator, count: int, length: int) -> list[str]:
    """Distinct strings of random lower-case letters."""
    chosen = rng.choice(26**length, count, replace=False)[:, None] // 26 ** np.arange(length) % 26
    return ["".join(map(chr, row)) for row in (chosen + ord("a")).tolist()]
