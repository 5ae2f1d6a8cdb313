"""The directive `command-help`: what a command prints of itself, read when the site is built."""

from __future__ import annotations

from docutils import nodes
from docutils.parsers.rst import Directive
from typer.main import get_command

from rlscuda.cli.app import app

WIDTH = 88  # columns of the terminal that the texts are made for


def help_of(words: list[str]) -> str:
    """The help of `rlscuda WORDS`.

    Raises:
        KeyError: There is no such command.
    """
    command = get_command(app)
    context = command.make_context("rlscuda", [], resilient_parsing=True)
    for word in words:
        command = command.commands[word]
        context = command.make_context(word, [], context, resilient_parsing=True)
    context.terminal_width = context.max_content_width = WIDTH
    return command.get_help(context)


class CommandHelp(Directive):
    """`.. command-help:: prune` shows what `rlscuda prune --help` prints."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The text, as a block of what a terminal shows."""
        words = " ".join(self.arguments).split()
        text = f"$ rlscuda {' '.join([*words, '--help'])}\n{help_of(words)}"
        block = nodes.literal_block(text, text, language="text")
        return [block]


def setup(app) -> dict:
    """Registers the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
