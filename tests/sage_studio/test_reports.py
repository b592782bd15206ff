"""What reports are made of: the machine in words, tables, pictures."""

import sys

import pytest
import torch

from sage_studio.errors import MissingExtraError
from sage_studio.reports import figure, machine, machine_line, markdown, png


def test_the_machine_is_said_with_its_accelerator_where_there_is_one():
    found = machine(torch.device("cpu"))
    assert machine_line(found) == f"{found['threads']} threads of {found['cores']} cores, torch {torch.__version__}"
    assert machine_line({**found, "device": "A GPU"}).startswith("A GPU, ")


def test_a_table_is_markdown():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_figure_is_a_png_and_says_what_it_needs(monkeypatch):
    assert png(figure(1, 1)).startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="pip install 'matplotlib>="):
        figure(1, 1)
