"""What `python -m kvjax.generate` shows without arguments: one list, several questions, two caches side by side."""

from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from kvjax.cache.policy import Recipe
from kvjax.demo import lines
from kvjax.generation import Generation, Model, generate
from kvjax.methods import full
from kvjax.report import summary

METHOD, BUDGET = "snapkv", "20%"
TOKENS, QUESTIONS, NEW_TOKENS = 900, 6, 4


class Showcase(NamedTuple):
    """Prompts that end in a question, and what each should be answered with."""

    texts: list[str]
    answers: list[str]


def prompts() -> Showcase:
    """One long list and several questions about it, each a prompt of its own."""
    doc = lines.draw(lines.scoring_rng(seed=1), lines.fitting_lines(TOKENS, 1, ending=1), QUESTIONS)
    each = [doc._replace(asked=doc.asked[i : i + 1]) for i in range(QUESTIONS)]
    answers = [lines.answers(one)[0] for one in each]
    texts = [lines.text(one).removesuffix(answer + "\n") for one, answer in zip(each, answers, strict=True)]
    return Showcase(texts, answers)


def run(console: Console, model: Model, recipe: Recipe, budget: str | None) -> None:
    """Answer the questions with the full cache and with `recipe`, and print both."""
    shown = prompts()
    head, tail = shown.texts[0].splitlines()[:3], shown.texts[0].splitlines()[-2:]
    console.print(
        "\n".join([*head, f"... {len(shown.texts[0].splitlines()) - 5} more lines ...", *tail]), highlight=False
    )
    outs = [generate(model, shown.texts, each, max_new_tokens=NEW_TOKENS) for each in (full(), recipe)]
    labels = ["", budget or ""]
    console.print(_answers(shown, outs, labels))
    console.print(summary(outs, labels))


def _answers(shown: Showcase, outs: list[Generation], labels: list[str]) -> Table:
    table = Table(title="answers")
    for column in ("question", "expected"):
        table.add_column(column)
    for out, label in zip(outs, labels, strict=True):
        table.add_column(f"{out.recipe.name} {label}".strip())
    for i, (text, answer) in enumerate(zip(*shown, strict=True)):
        given = [(out.sequences[i].text or "").strip() for out in outs]
        marked = [word if word == answer.strip() else f"[red]{word}[/red]" for word in given]
        table.add_row(text.splitlines()[-1], answer.strip(), *marked)
    return table
