"""Names that others chose, in every place where they are shown or kept."""

import json
import os
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from rich.text import Text
from support.cli import call, subprocess_environment, write_npz

from rlscuda.cli.common.drawing import drawing
from rlscuda.cli.common.texts import one_line, shortened, terminal
from rlscuda.cli.report.page import ENVIRONMENT

HOSTILE = {
    "formula": "a$x_{$",
    "two formulas": "$x^$ and $\\frac{$",
    "markup": "[bold]b[/bold]",
    "closing markup": "c[/]",
    "open markup": "[link=file:x",
    "backslash": "d\\",
    "picture": ":bell:",
    "tag": "<script>alert(1)</script>",
    "attribute": '" id="x\' #30638e url(#y)',
    "newline": "e\nf\r\n",
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "direction": "g\u202eh",
    "private": "\ue000\x7f\x00"[:2],
    "emoji": "\U0001f600\u65e5\u672c",
    "format": "%s {0} {name!r} %(x)s",
    "long": "n" * 150,
    "empty-like": " ",
}
MODEL = """
from torch import nn

NAMES = {names!r}

def net(in_channels, image_size, num_classes):
    width = in_channels * image_size[0] * image_size[1]
    model = nn.Sequential(nn.Flatten())
    for place, name in enumerate(NAMES):
        model.add_module(name, nn.Linear(width if place == 0 else 6, 6))
        model.add_module(name + "relu", nn.ReLU())
    model.add_module("last", nn.Linear(6, num_classes))
    return model
"""


def test_one_line_is_one_line_that_can_be_printed_and_written():
    for name in (*HOSTILE.values(), "\udcff\ud800"):
        line = one_line(name)
        assert line.isprintable() and line.encode()
        assert line == name or not name.isprintable()
    assert one_line("a\nb\x1b\udcff") == r"a\nb\x1b\udcff"
    assert shortened("abc\n", 10) == r"abc\n" and shortened("abcdef", 4) == "…def"
    template = ENVIRONMENT.from_string('<p title="{{ name }}">{{ name }}</p>')
    shown = r"&lt;a\n&#39;&#34;&gt;\udcff"
    assert template.render(name="<a\n'\">\udcff") == f'<p title="{shown}">{shown}</p>'


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_the_terminal_takes_a_text_as_it_is(name, capsys):
    console = terminal()
    console.print(one_line(name), soft_wrap=True)
    assert capsys.readouterr().out == one_line(name) + "\n"


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_figure_takes_a_text_as_it_is(name, recwarn):
    with drawing(**{"svg.fonttype": "none"}) as pyplot:
        figure = pyplot.figure()
        label = shortened(name, 40)
        figure.suptitle(label)
        figure.canvas.draw()
        pyplot.close(figure)
    assert not recwarn.list


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def make_model(folder: Path, module: str, names: list[str]) -> str:
    (folder / f"{module}.py").write_text(MODEL.format(names=names), encoding="utf-8")
    return f"{module}:net"


def train(capsys, model: str, data: Path | str, out: str, *more: object):
    return call(capsys, "train", "--model", model, "--data", data, "--epochs", 2, "--batch-size",
                27, "--optimizer", "rls", "--out", out, *more)  # fmt: skip


def test_layers_of_any_name_are_trained_pruned_and_reported(folder, capsys):
    names = [name.replace(".", "") for name in HOSTILE.values()]
    model = make_model(folder, "hostile_layers", names)
    data = write_npz(folder / "$x_{$[red]<b>.npz")
    status, out, err = train(capsys, model, data, "run[/]$_$", "--prune-schedule", "linear:0.3:1")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    for name in [*names, data.name]:
        assert one_line(name) in out
    pruning = folder / "run[/]$_$" / "pruning"
    page = (pruning / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "$x_{$[red]&lt;b&gt;.npz" in page
    assert '" id="x\' #30638e url(#y)' in unescape(page)  # in figures too nothing replaced it
    assert page.count("#30638e") >= page.count("<svg") - 1
    report = json.loads((pruning / "report.json").read_text(encoding="ascii"))
    changed = {change["name"] for change in report["rounds"][0]["report"]["couplings"]}
    assert changed & set(names)


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are Linux's")
def test_a_file_whose_name_is_no_text(folder, capsys):
    data = write_npz(folder / "d.npz")
    named = os.fsdecode(os.fsencode(folder) + b"/\xff\xfe\n\x1b[31m" + b"d" * 180 + b".npz")
    os.rename(data, named)
    status, out, err = train(capsys, "mlp", named, "run")
    assert (status, err) == (0, "")
    assert r"\udcff\udcfe\n\x1b[31md" in out and "\x1b" not in out
    assert json.loads((folder / "run/config.json").read_text())["options"]["data"] == named
    assert train(capsys, "mlp", named, "run", "--resume")[0] == 0
    assert call(capsys, "prune", "--run", "run", "--ratio", "0.3")[0] == 0


def test_a_layer_whose_name_no_file_can_hold_is_refused_before_training(folder, capsys):
    model = make_model(folder, "unwritable", ["a"])
    path = folder / "unwritable.py"
    path.write_text(path.read_text().replace("NAMES = ['a']", "NAMES = ['a\\udcff']"))
    status, _, err = train(capsys, model, write_npz(folder / "d.npz"), "run")
    assert status == 1 and not (folder / "run").exists()
    assert err.count("\n") == 1 and "names that UTF-8 can say" in err


def test_a_terminal_without_the_characters_shows_them_escaped(folder):
    write_npz(folder / "日本.npz")
    result = subprocess.run(
        [sys.executable, "-m", "rlscuda.cli", "train", "--model", "mlp", "--data", "日本.npz",
         "--epochs", "1", "--optimizer", "sgd", "--out", "run"],
        env=subprocess_environment(PYTHONIOENCODING="ascii", COLUMNS="200"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert r"mlp on \u65e5\u672c.npz" in result.stdout


def test_styles_do_not_depend_on_what_is_styled(capsys):
    terminal().print(Text("[red]x", style="bold"))
    assert capsys.readouterr().out == "[red]x\n"
