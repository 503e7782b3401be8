"""Text, JSON and TOML that users give: whatever is wrong with it is one line.

Python's parsers of JSON and TOML call themselves for each level, and so does whatever later prints or copies what they
found; what is nested deeper than any honest file is refused here, so that nothing behind has to think of it.
"""

import json
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvjax.errors import InputError

DEPTH = 100  # levels of objects and lists in each other


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # a name with a null character
        raise InputError(f"cannot read {path}: {error}") from None


def read_prose(path: Path) -> str:
    """The text of a UTF-8 file that has words in it."""
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def parse_json(text: str | bytes, where: object) -> Any:
    """What a JSON text says.

    Args:
      text: the text; bytes are UTF-8.
      where: the file, or the line of one, for errors.
    """
    return _parse(json.loads, text, where, "JSON")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """The tables in a TOML file."""
    return _parse(tomllib.loads, read_text(path), path, "TOML")


def _parse(parse: Callable[[str], Any], text: str | bytes, where: object, language: str) -> Any:
    deep = f"{where} is nested too deeply: at most {DEPTH} levels are read"
    try:
        content = parse(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8 text") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{where} is not {language}: {error}") from None
    except ValueError:  # `int` refuses more digits than `sys.get_int_max_str_digits`
        raise InputError(f"{where} has an integer of too many digits") from None
    except RecursionError:
        raise InputError(deep) from None
    if _deeper(content, DEPTH):
        raise InputError(deep)
    return content


def _deeper(content: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more levels."""
    level = [content]
    while level and levels:
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, list | dict)]
        levels -= 1
    return bool(level)


def _inside(content: Any) -> Iterable[Any]:
    return content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
