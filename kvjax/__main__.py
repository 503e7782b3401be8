"""All commands in one program: `kvjax generate ...` is `python -m kvjax.generate ...`."""

import runpy
import sys

from kvjax import interrupts
from kvjax.errors import one_line

COMMANDS = {
    "generate": "generate text with a compressed key/value cache",
    "chat": "talk with a chat model on one growing, compressed cache",
    "serve": "serve a model to many clients at once, as OpenAI's API has it",
    "convert": "convert a Hugging Face checkpoint to Orbax, once",
    "calibrate": "measure once how a model's layers and heads share a budget",
    "evaluate": "score methods at equal bytes",
    "inspect": "show which tokens a method keeps, or what its cache would cost",
    "plan": "say whether a model fits a chip that need not be there, and how fast it can be at best",
    "bench": "measure speed on this machine",
    "retrofit": "train a model until it decides by itself what its cache merges or evicts",
}


def main() -> None:
    """Run the command that the first argument names."""
    interrupts.listen()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: kvjax COMMAND ...\n\nCOMMAND is one of these; COMMAND --help shows its flags.\n")
        print(*(f"  {command:10}{what}" for command, what in COMMANDS.items()), sep="\n")
        return
    if name not in COMMANDS:
        message = f"no command {name!r}: choose from {', '.join(COMMANDS)} (see --help)"
        print(f"kvjax: error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"kvjax {name}", *rest]
    runpy.run_module(f"kvjax.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
