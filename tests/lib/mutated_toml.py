"""Mutated TOML of methods: what is accepted is what the file says."""

import contextlib
import tomllib
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from kvjax import methods
from kvjax.cli import command
from kvjax.generate import parser
from tests.lib import configs
from tests.lib.mutate import DEEP, REFUSED, Kind, dump, edited, mangled, refused


@st.composite
def toml_cases(draw: st.DrawFn) -> bytes:
    """Mutated files of `configs/` for methods; edited ones are written as TOML as far as it has such values."""
    file = draw(st.sampled_from([config.path for config in configs.every() if not config.retrofits]))
    if draw(st.booleans()):
        return draw(mangled(file.read_bytes()))
    changed = draw(edited(tomllib.loads(file.read_text(encoding="utf-8"))))
    arguments = changed.pop("arguments", {})
    table = arguments if isinstance(arguments, dict) else {"x": arguments}
    return b"\n".join([*_lines(changed), b"[arguments]", *_lines(table)])


def _lines(table: dict[str, Any]) -> list[bytes]:
    return [dump(key) + b" = " + dump(value).replace(b"\n", b"") for key, value in table.items()]


def toml_holds(text: bytes, folder: Path) -> None:
    """Accepted options are those of the file, and the method is the one it names."""
    file = folder / "c.toml"
    file.write_bytes(text)

    def read() -> Any:
        args = command.parse(parser(), ["--config", str(file)])
        name = args.method or "full"
        return args, methods.make(name, args.budget or methods.default_budget(name), args.arguments)

    with contextlib.redirect_stderr(None):  # a flag's error is the parser's, which exits
        try:
            found = refused(read)
        except SystemExit as error:
            assert error.code == 2
            return
    if found is REFUSED:
        return
    (args, recipe), expected = found, tomllib.loads(text.decode())
    assert recipe.name.split("+")[0] == expected.get("method", "full")
    own = expected.pop("arguments", {})
    above = {key: expected[key] for key in ("store", "low_store", "kernels", "decode_budget") if key in expected}
    assert args.arguments == own | above and above | own == own | above
    assert all(
        str(getattr(args, key)) == str(value) or getattr(args, key) == [value] for key, value in expected.items()
    )


KINDS = {
    "method.toml": Kind(
        toml_cases(), toml_holds,
        [b"method = 'h2o'\n[arguments]\nrecent = 1" + b"0" * 309, b"method = '--'", b"method = 5", *DEEP],
    ),
}  # fmt: skip
