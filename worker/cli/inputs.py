"""The input of `local` and `submit`: the options that name it, and how it is opened."""

import argparse
from collections.abc import Callable

from worker.client.errors import InputError
from worker.client.io.tables import Form, Source, form_of, open_source, read_template
from worker.errors import SettingsError


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add the input and the options that say what is in it."""
    parser.add_argument(
        "input", metavar="INPUT", help="requests, one per line, or a table; - is standard input; .gz and .zst work"
    )
    parser.add_argument(
        "--template",
        metavar="FILE",
        help="JSON, or a file of it, in which {column} stands for a value: the request that each row of the input "
        "becomes; for .csv, .tsv, .parquet, and lines of any JSON objects",
    )
    parser.add_argument(
        "--input-format",
        metavar="FORMAT",
        choices=[form.value for form in Form],
        help="jsonl, csv, tsv or parquet (default: what the name of the file says)",
    )


def input_of(namespace: argparse.Namespace) -> Callable[[], Source]:
    """
    Return what opens the input that the options of `add_input` name, as often as it is called.

    Raises:
        SettingsError: The template cannot be used, or a table has none.
    """
    form = Form(namespace.input_format) if namespace.input_format else form_of(namespace.input)
    if form is not Form.JSONL and not namespace.template:
        raise SettingsError([f"--template: {namespace.input} is a table; say what request each row becomes"])
    try:
        template = read_template(namespace.template) if namespace.template else None
    except InputError as error:
        raise SettingsError([f"--template: {error}"]) from None
    return lambda: open_source(namespace.input, template=template, form=form)
