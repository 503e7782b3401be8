"""Convert a Hugging Face checkpoint to Orbax, once: `python -m kvjax.convert SRC DST`."""

from pathlib import Path

import jax

from kvjax import command
from kvjax.checkpoint.convert import DTYPES, convert
from kvjax.errors import InputError


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = command.Parser(prog="kvjax.convert", description=__doc__)
    parser.add_argument("src", metavar="SRC", help="a Hugging Face directory with safetensors, or a hub id org/name")
    parser.add_argument("dst", metavar="DST", type=Path, help="the directory to make; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights in DST (default: as stored in SRC)")
    parser.add_argument(
        "--ignore-config",
        action="append",
        default=[],
        metavar="FIELD",
        help="treat this field of config.json as absent; may be given several times",
    )
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # an accelerator's memory is of no use here
    try:
        convert(args.src, args.dst, args.dtype, args.ignore_config)
    except InputError as error:
        command.fail(parser.prog, str(error))


if __name__ == "__main__":
    main()
