"""Curves: a picture that shows every epoch, for every kind of history."""

import sys

import pytest

from tests.helpers import png_size
from ulr_snn.errors import UsageError
from ulr_snn.runs.plots import save_curves

pytest.importorskip("matplotlib")

EPOCH = {"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.4, "val_loss": 2.1, "val_accuracy": 0.3}


def test_loss_and_accuracy_side_by_side_without_pyplot(tmp_path):
    save_curves([EPOCH, {**EPOCH, "epoch": 2}], tmp_path / "curves.png")
    width, height = png_size(tmp_path / "curves.png")
    assert width > 2 * height
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_regression_draws_the_loss_alone(tmp_path):
    save_curves([{"epoch": 1, "train_loss": 1.0, "train_accuracy": None}], tmp_path / "curves.png")
    width, height = png_size(tmp_path / "curves.png")
    assert width < 2 * height


def test_axes_show_percent_and_whole_epochs():
    from matplotlib.figure import Figure

    from ulr_snn.runs import plots

    figure = Figure()
    axes = figure.subplots()
    plots.draw_curve(axes, [EPOCH, {**EPOCH, "epoch": 2, "val_accuracy": None}], "accuracy")
    train, val = axes.lines
    assert list(train.get_ydata()) == [40, 40] and list(val.get_xdata()) == [1]
    assert axes.get_ylabel() == "accuracy (%)"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]


def test_empty_history_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no epoch"):
        save_curves([], tmp_path / "curves.png")
