"""What `python -m kvjax.generate` shows without arguments: one scene, several questions, two caches side by side."""

from importlib import resources
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvjax.cache.policy import Recipe
from kvjax.demo import lines
from kvjax.evaluation import needles, synthetic
from kvjax.generation import Generation, Model, generate
from kvjax.methods import full
from kvjax.report import heading, summary
from kvjax.sampling import Sampling

METHOD = "snapkv"
SEED, ROWS, NOTES, QUESTIONS, NEW_TOKENS = 7, 90, 12, 6, 6
SHOWN = 12  # rows


class Showcase(NamedTuple):
    """Prompts that end in a question, and what each should be answered with."""

    texts: list[str]
    answers: list[str]


def prompts() -> Showcase:
    """A scene of a play with notes between its lines, and several questions about them, each a prompt of its own."""
    rng, text = lines.scoring_rng(SEED), resources.files("kvjax.evaluation").joinpath("text.txt").read_text("utf-8")
    scene = synthetic.essay(rng, "short", text, ROWS)
    notes, depths = needles.draw_needles(rng, "short", "words", "numbers", NOTES), needles.draw_depths(rng, NOTES)
    asked = rng.permutation(NOTES)[:QUESTIONS].tolist()
    each = [needles.write_needles("short", notes._replace(asked=[i]), "numbers", scene, depths) for i in asked]
    return Showcase([f"{one.context}{one.question}" for one in each], [one.answers[0].strip() for one in each])


def run(console: Console, model: Model, recipe: Recipe, budget: str | int | None, new: int, how: Sampling) -> None:
    """Answer the questions with the full cache and with `recipe`, and print both."""
    shown = prompts()
    rows = shown.texts[0].splitlines()[:-1]
    console.print(
        f"A scene of {len(rows)} lines with {NOTES} notes hidden in it, and questions about them:\n", highlight=False
    )
    console.print("\n".join(["    " + row for row in [*rows[:SHOWN], "..."]]) + "\n", highlight=False, markup=False)
    outs = [generate(model, shown.texts, each, max_new_tokens=new, how=how) for each in (full(), recipe)]
    names = ["full", heading(recipe, budget)]
    console.print(_answers(shown, outs, names))
    console.print(summary(outs, names))


def _answers(shown: Showcase, outs: list[Generation], names: list[str]) -> Table:
    table = Table("question", "expected", *names, title="generated answers", title_justify="left")
    for i, (text, answer) in enumerate(zip(*shown, strict=True)):
        given = [(out.sequences[i].text or "").strip() for out in outs]
        marked = [Text(words, style="" if words == answer else "red") for words in given]
        table.add_row(text.splitlines()[-1], answer, *marked)
    return table
