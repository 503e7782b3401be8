"""What a cache kept: the tokens that each layer and head holds, as marked text and as a picture."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.cells import cell_len
from rich.text import Text

from kvjax.cache import layout
from kvjax.cache.store import KVStore
from kvjax.generation.model import Model
from kvjax.generation.results import Generation
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies.layers import layer_recipe

# How many rows kept a token: no row, fewer than half, half or more, every row.
STYLES = ("dim", "", "bold", "bold underline")
MARKS = " .+#"
LOW = 0.4  # shade of a token in another than the best tier
COLUMNS = 1500  # of a picture; longer sequences put several positions into one


class HeldTokens(NamedTuple):
    """The tokens that the rows of one sequence's cache hold."""

    held: Bool[np.ndarray, "L K T"]  # whether a row holds the token at a position, in its best tier
    low: Bool[np.ndarray, "L K T"]  # whether it holds it in another tier
    stores: tuple[str, ...]  # number formats of both; one where there is no other tier
    budget: Int[np.ndarray, "L K"]  # slots that a row may keep
    layers: tuple[int, ...]  # which the first axis stands for
    heads: tuple[int, ...]  # which the second axis stands for
    tokens: list[int]  # by position: the prompt's, then the generated ones that were read
    prompt: int  # tokens of the prompt

    @property
    def slots(self) -> Int[np.ndarray, "L K"]:
        """Tokens that each row holds in its best tier."""
        return self.held.sum(axis=-1)

    @property
    def rows(self) -> int:
        """Layers x heads."""
        return self.held.shape[0] * self.held.shape[1]

    def levels(self) -> list[int]:
        """By position: in the best tier of how many rows the token is, as an index into `STYLES` and `MARKS`."""
        count = self.held.sum(axis=(0, 1))
        return np.sum([count > 0, 2 * count >= self.rows, count == self.rows], axis=0).tolist()


def read(model: Model, out: Generation, prompt: Sequence[int]) -> HeldTokens:
    """What the cache of a generation from one prompt holds. The last generated token was never read: it has no place.

    >>> import kvjax
    >>> model, prompt = kvjax.load(), list(range(20))
    >>> out = model.generate([prompt], kvjax.methods.streaming_llm(budget=6), max_new_tokens=1)
    >>> read(model, out, prompt).held[0, 0].nonzero()[0].tolist()
    [0, 1, 2, 3, 18, 19]
    """
    (sequence,), stores, spec = out.sequences, out.recipe.stores, model.spec
    tokens = [*prompt, *sequence.tokens[:-1]]
    layers, heads = spec.num_layers, spec.num_rows
    order = _best_first(stores)
    held = np.zeros((2, layers, heads, len(tokens) + 1), bool)
    budget = np.zeros((layers, heads), int)
    for group, tiers in zip(layout.layer_groups(spec), out.cache, strict=True):
        own = _best_first(layer_recipe(spec, out.recipe, group.index[0]).stores)
        budget[list(group.index)] = np.asarray(tiers[own[0]].budget)[:, 0]
        for place, tier in enumerate(own):
            for i, layer in enumerate(group.index):
                positions = np.asarray(layout.positions(tiers[tier], i))[0]
                np.put_along_axis(held[place, layer], positions, True, axis=-1)  # empty ones, -1: the spare column
    best, low = held[..., :-1]
    names = tuple(stores[tier].name for tier in order)
    return HeldTokens(best, low, names, budget, tuple(range(layers)), tuple(range(heads)), tokens, len(prompt))


def _best_first(stores: Sequence[KVStore]) -> list[int]:
    """Tiers by their stores: a dense one is the best."""
    return sorted(range(len(stores)), key=lambda tier: not stores[tier].is_dense)


def only(kept: HeldTokens, layer: int | None, head: int | None) -> HeldTokens:
    """One layer, one head, or both; None = all of them."""
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    heads = slice(None) if head is None else slice(head, head + 1)
    return kept._replace(
        held=kept.held[layers, heads],
        low=kept.low[layers, heads],
        budget=kept.budget[layers, heads],
        layers=kept.layers[layers],
        heads=kept.heads[heads],
    )


def pieces(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> list[str]:
    """The text of each token; the pieces join to the text, with special tokens by their names.

    A piece is "" while a character is not complete. Without a tokenizer, tokens show as their ids.
    """
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    stream, out = tokenizer.stream(), []
    for token in tokens:
        if tokenizer.is_special(token):
            _append(out, stream.finish())
            out.append(tokenizer.name(token))
        else:
            out.append(stream.push(token))
    _append(out, stream.finish())
    return out


def _append(out: list[str], text: str) -> None:
    if text:
        out[-1] += text


def styled(texts: Sequence[str], levels: Sequence[int]) -> Text:
    """Text for a terminal, the more emphasis the more rows kept a token."""
    return Text.assemble(*((_visible(text), STYLES[level]) for text, level in _spans(texts, levels)))


def marked(texts: Sequence[str], levels: Sequence[int], width: int) -> Iterator[str]:
    """Lines of text without any style, each followed by a line of marks below its letters, unless that is blank.

    Args:
      texts: from `pieces`.
      levels: from `Kept.levels`.
      width: cells of a line.
    """
    line, marks, used = "", "", 0
    for text, level in _spans(texts, levels):
        for letter in _visible(text):
            cells = cell_len(letter)
            if letter == "\n" or used + cells > width:
                yield from filter(None, (line, marks.rstrip()))
                line, marks, used = "", "", 0
            if letter != "\n":
                line, marks, used = line + letter, marks + MARKS[level] * cells, used + cells
    yield from filter(None, (line, marks.rstrip()))


def legend(kept: HeldTokens, marks: bool) -> Text:
    """What the styles, or the marks, say."""
    best, gone = how_kept(kept)
    names = {3: f"all {kept.rows} rows (layer x head)", 2: "half or more", 1: "fewer", 0: "none"}
    if kept.rows == 1:
        names = {3: f"{best} by layer {kept.layers[0]}, head {kept.heads[0]}", 0: gone}
    sign = lambda level: f"{MARKS[level]} " if MARKS[level].strip() else "no mark: "
    entries = [Text(sign(i) + name) if marks else Text(name, STYLES[i]) for i, name in names.items()]
    return Text("" if kept.rows == 1 else f"{best} in  ") + Text("   ").join(entries)


def how_kept(kept: HeldTokens) -> tuple[str, str]:
    """What is said of tokens in the best tier, and of the others."""
    return ("kept", "evicted") if len(kept.stores) == 1 else (f"kept {kept.stores[0]}", f"kept {kept.stores[1]}")


def _spans(texts: Sequence[str], levels: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Pieces that have letters, and their levels; a character of several tokens counts as its least kept one."""
    parts: list[int] = []
    for text, level in zip(texts, levels, strict=True):
        parts.append(level)
        if text:
            yield text, min(parts)
            parts = []


def _visible(text: str) -> str:
    """Line ends with a sign that can be marked; control characters, which a terminal would obey, as escapes."""
    control = lambda letter: letter < " " or "\x7f" <= letter < "\xa0"
    show = lambda letter: "↵\n" if letter == "\n" else letter.encode("unicode_escape").decode()
    return "".join(show(letter) if control(letter) else letter for letter in text)


def heat(kept: HeldTokens, columns: int = COLUMNS) -> tuple[Float[np.ndarray, "rows bins"], int]:
    """The kept fraction by row and bin of positions, and the positions of a bin: 1 if `columns` suffice.

    A token in another than the best tier counts as `LOW`.
    """
    length = kept.held.shape[-1]
    size = -(-length // columns)
    starts = np.arange(0, length, size)
    shade = np.where(kept.held, 1.0, LOW * kept.low)
    count = np.add.reduceat(shade.reshape(kept.rows, length), starts, axis=-1)
    return count / np.diff(starts, append=length), size


def picture(kept: HeldTokens, title: str) -> Any:
    """A matplotlib `Figure` with a row per layer and head and a column per position: dark = kept, light = evicted.

    With two tiers, dark is the best one and grey the other. Bars beside it show how many slots each row holds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
    from matplotlib.colors import LinearSegmentedColormap  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    image, size = heat(kept)
    shades = LinearSegmentedColormap.from_list("kept", ["0.9", "0.0"])
    figure = Figure(figsize=(12, 1.6 + min(max(0.12 * kept.rows, 1.6), 16)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=(12, 1))
    extent = (-0.5, image.shape[1] * size - 0.5, kept.rows - 0.5, -0.5)
    axes.imshow(image, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    axes.set_xlim(-0.5, len(kept.tokens) - 0.5)
    axes.locator_params(axis="x", integer=True)
    axes.set_title(title, loc="left", fontsize=11, pad=20)
    binned = f" (each column is {size} positions, darker = more of them kept)" if size > 1 else ""
    axes.set_xlabel(f"token position{binned}")
    _label_layers(axes, kept)
    _mark_generated(axes, kept)
    _draw_slots(bars, kept)
    _add_legend(figure, shades, how_kept(kept), LOW if len(kept.stores) > 1 else 0.0)
    return figure


def _label_layers(axes: Any, kept: HeldTokens) -> None:
    heads, last = len(kept.heads), kept.heads[-1]
    for layer in range(1, len(kept.layers)):
        axes.axhline(layer * heads - 0.5, color="0.5", linewidth=0.6)
    shown = range(0, len(kept.layers), -(-len(kept.layers) // 40))
    axes.set_yticks([layer * heads + (heads - 1) / 2 for layer in shown], [str(kept.layers[layer]) for layer in shown])
    axes.set_ylabel(f"layer (in each: heads {kept.heads[0]} to {last})" if heads > 1 else f"layer (head {last})")


def _draw_slots(axes: Any, kept: HeldTokens) -> None:
    """A bar for each row's filled slots."""
    axes.barh(range(kept.rows), kept.slots.reshape(-1), height=1, color="0.45", edgecolor="1.0", linewidth=0.3)
    for layer in range(1, len(kept.layers)):
        axes.axhline(layer * len(kept.heads) - 0.5, color="0.5", linewidth=0.6)
    axes.set_xlabel("slots")
    axes.tick_params(axis="y", left=False)
    axes.locator_params(axis="x", nbins=2, integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_generated(axes: Any, kept: HeldTokens) -> None:
    """A dashed line at the prompt's end, and a bar above the tokens that were generated after it."""
    from matplotlib.transforms import offset_copy  # pyright: ignore[reportMissingImports]

    generated, edge = len(kept.tokens) - kept.prompt, kept.prompt - 0.5
    if generated:
        above = offset_copy(axes.get_xaxis_transform(), axes.figure, y=4, units="points")
        ends = [edge, len(kept.tokens) - 0.5]
        axes.axvline(edge, color="0.5", linestyle="--", linewidth=1)
        axes.plot(ends, [1, 1], color="0.0", linewidth=3, solid_capstyle="butt", transform=above, clip_on=False)
        where = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(f"generated: {generated:,}", (1, 1), (0, 7), fontsize=9, **where)


def _add_legend(figure: Any, shades: Any, names: tuple[str, str], other: float) -> None:
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    looks = zip((1.0, other), names, strict=True)
    patches = [Patch(facecolor=shades(x), edgecolor="0.5", label=name) for x, name in looks]
    figure.legend(handles=patches, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
