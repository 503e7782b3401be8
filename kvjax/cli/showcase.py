"""What `python -m kvjax.generate` shows without arguments: one list, several questions, two caches side by side."""

from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvjax.cli.tables import dtype_of, heading, summary
from kvjax.generation.model import Model
from kvjax.generation.results import Generation
from kvjax.generation.sampling import Sampling
from kvjax.methods import full
from kvjax.policies.base import Recipe
from kvjax.tasks import lines

TOKENS, QUESTIONS = 1000, 6


class Showcase(NamedTuple):
    """Prompts that end in a question, and what each should be answered with."""

    texts: list[str]
    answers: list[str]


def prompts() -> Showcase:
    """One long list and several questions about it, each a prompt of its own."""
    doc = lines.draw(lines.scoring_rng(seed=2), lines.fitting_lines(TOKENS, 1, ending=0), QUESTIONS)
    each = [doc._replace(asked=doc.asked[i : i + 1]) for i in range(QUESTIONS)]
    answers = [lines.answers(one)[0] for one in each]
    texts = [lines.text(one).removesuffix(answer + "\n") for one, answer in zip(each, answers, strict=True)]
    return Showcase(texts, [answer.strip() for answer in answers])


def run(console: Console, model: Model, recipe: Recipe, budget: str | int | None, new: int, sampling: Sampling) -> None:
    """Answer the questions with the full cache and with `recipe`, and print both."""
    shown = prompts()
    rows = shown.texts[0].splitlines()[:-1]
    console.print(f"A list of {len(rows)} lines, and questions about it:\n", highlight=False)
    console.print("\n".join(["    " + row for row in [*rows[:3], "...", *rows[-2:]]]) + "\n", highlight=False)
    outs = [model.generate(shown.texts, each, max_new_tokens=new, sampling=sampling) for each in (full(), recipe)]
    names = ["full", heading(recipe, budget)]
    console.print(_answers(shown, outs, names))
    console.print(summary(outs, names, dtype_of(model)))


def _answers(shown: Showcase, outs: list[Generation], names: list[str]) -> Table:
    table = Table("question", "expected", *names, title="generated answers", title_justify="left")
    for i, (text, answer) in enumerate(zip(*shown, strict=True)):
        given = [(out.sequences[i].text or "").strip() for out in outs]
        marked = [Text(words, style="" if words == answer else "red") for words in given]
        table.add_row(text.splitlines()[-1], answer, *marked)
    return table
