"""Files of text that users give: what is wrong with them is one line that a terminal can show."""

import pytest

from kvjax.cli.command import run
from kvjax.errors import LONGEST, InputError
from kvjax.files import text

NESTED = 100_000
WRONG = {
    "file.json is not UTF-8 text": b'{"a": "\xff"}',
    "file.json is not JSON: Expecting value": b"[1, ",
    "file.json is nested too deeply: at most 100 levels": b"[" * NESTED,
    "file.json is nested too deeply: at most 100 levels are read": b"[" * 101 + b"]" * 101,
    "file.json is nested too deeply: ": b'{"a":' * 101 + b"1" + b"}" * 101,
    "file.json has an integer of too many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "file.json holds a list, expected a JSON object": b"[]",
    "file.json holds a NoneType": b"null",
    "file.toml is not UTF-8 text": b'a = "\xff"',
    "file.toml is not TOML: ": b"a = ",
    "file.toml is nested too deeply: at most 100 levels": b"a = " + b"[" * NESTED,
    "file.toml is nested too deeply: at most 100 levels are read": b".".join([b"a"] * 101) + b" = 1",
    "file.toml has an integer of too many digits": b"a = " + b"9" * 5000,
}
READ = {".json": text.read_json, ".toml": text.read_toml}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_is_one_line(message, tmp_path):
    path = tmp_path / message.split()[0]
    path.write_bytes(WRONG[message])
    with pytest.raises(InputError) as error:
        READ[path.suffix](path)
    assert message in str(error.value) and str(error.value).startswith(str(path))


@pytest.mark.parametrize("name", ["missing", "a" * 300, "a\0b", "."])
@pytest.mark.parametrize("suffix", READ)
def test_a_file_that_cannot_be_read(name, suffix, tmp_path):
    with pytest.raises(InputError, match="cannot read "):
        READ[suffix](tmp_path / name)


def test_what_honest_files_hold(tmp_path):
    (tmp_path / "a.json").write_text('{"deep": ' + "[" * 99 + "]" * 99 + ', "text": "\u00e9", "none": null}')
    found = text.read_json(tmp_path / "a.json")
    assert (found["text"], found["none"]) == ("\u00e9", None)
    assert text.parse_json(b"null", "line 1") is None
    assert text.parse_json("[1, 2.5]", "line 1") == [1, 2.5]
    (tmp_path / "a.toml").write_text("[b]\nc = 1")
    assert text.read_toml(tmp_path / "a.toml") == {"b": {"c": 1}}


def test_messages_are_printable_and_bounded(capsys):
    shown = str(InputError("a\n b\t\x1b[31mred\x07 \u202e\ud800 caf\u00e9"))
    assert shown == "a b \\x1b[31mred\\x07 \\u202e\\ud800 caf\u00e9"
    message = str(InputError("first " + "x" * 10**6 + " last"))
    assert len(message) <= LONGEST + 10 and message.startswith("first x") and message.endswith("x last")

    def main():
        raise InputError("\x1b[2J" + "y" * 10**6)

    with pytest.raises(SystemExit) as end:
        run("prog", main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.isascii() and said.startswith("prog: error: \\x1b[2Jyyy")
    assert said[:-1].isprintable() and len(said) <= LONGEST + 40
