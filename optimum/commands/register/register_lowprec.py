"""`optimum-cli lowprec ...`: lowprec's own command line as a command of optimum's.

optimum loads every file of the namespace package optimum.commands.register and takes its REGISTER_COMMANDS. No folder
on the way here has an __init__.py (PEP 420): optimum's own files and these lie in one package.

Source: optimum 2.x, optimum/commands/optimum_cli.py.
"""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LowprecCommand(BaseOptimumCLICommand):
    """Hands everything that follows `lowprec` to lowprec: arguments, help and exit codes are its own."""

    COMMAND = CommandInfo(
        name="lowprec", help="Find the cheapest precision of each layer within a loss budget; export it."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """All that follows is kept as it stands."""
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        # Otherwise argparse would answer a leading --help or --version itself.
        parser.prefix_chars = "\0"

    def run(self) -> None:
        """Ends with lowprec's exit code."""
        # optimum loads this file for each of its commands, so what is heavy is imported here.
        from lowprec.cli import main

        main(self.args.arguments, program="optimum-cli lowprec")


REGISTER_COMMANDS = [LowprecCommand]
