"""The ``fastgan`` command: one module per subcommand, imported only when it is the one that is asked for.

To add a subcommand, give its module ``add_arguments(parser) -> None`` and ``run(args) -> int`` (the exit status), and
add a line to :data:`COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import fastgan

# Subcommand -> (module, one line of help).
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("fastgan.doctor", "print versions, devices and which backends are available"),
    "gpu-report": (
        "fastgan.profile.gpu_report",
        "compile the Triton kernels for GPUs that need not be here; read, model, predict",
    ),
    "quickstart": ("fastgan.quickstart", "train a small sketch-to-photo generator here and measure the fused layers"),
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of ``argv``: every subcommand by name, and the arguments of the one that ``argv`` starts with."""
    parser = argparse.ArgumentParser(prog="fastgan", description=fastgan.__doc__)
    parser.add_argument("--version", action="version", version=f"fastgan {fastgan.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, help_line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line, description=help_line)
        if argv and argv[0] == name:
            importlib.import_module(module).add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status (2 for a wrong command line)."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv).parse_args(argv)
    return importlib.import_module(COMMANDS[args.command][0]).run(args)


if __name__ == "__main__":
    sys.exit(main())
