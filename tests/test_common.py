"""Device detection, seeding and plotting helpers."""

import argparse
import random

import matplotlib
import numpy as np
import pytest
import torch

import common


def test_detect_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert common.detect_device() == common.detect_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps", "cuda:1", "xpu", "nonsense"):
        with pytest.raises(argparse.ArgumentTypeError, match=name):
            common.detect_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.detect_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert common.detect_device().type == "cuda"
    with pytest.raises(argparse.ArgumentTypeError, match="cuda:1"):
        common.detect_device("cuda:1")


def test_bfloat16_is_a_fact_about_the_hardware(monkeypatch):
    asked = {}

    def is_bf16_supported(**options):
        asked.update(options)
        return False

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert common.has_bfloat16(torch.device("cuda")) is False
    assert asked == {"including_emulation": False}  # a T4 would say yes otherwise
    for answer in (True, False):
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, probe, lambda answer=answer: answer, raising=False)
        assert common.has_bfloat16(torch.device("cpu")) is answer


def test_seed_everything():
    def draw():
        common.seed_everything(3)
        return random.random(), np.random.random(), torch.rand(1).item()

    assert draw() == draw()


def test_interval_is_students_t():
    mean, width = common.mean_and_interval([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    np.testing.assert_allclose(mean, [2, 5])
    np.testing.assert_allclose(width, [4.302653 / np.sqrt(3), 0], rtol=1e-6)
    assert np.isnan(common.mean_and_interval([7.0])[1])


def test_no_window_is_opened_outside_a_notebook():
    assert matplotlib.get_backend().lower() == "agg"


def test_plots_show_their_values(tmp_path):
    fig, (bars, ranking, heat, curve) = common.new_figure("title", 1, 4)
    common.plot_bars(bars, ["a", "b"], {"x": [1, 2], "y": [3, 4]}, "{:.2f}")
    assert [text.get_text() for text in bars.texts] == ["1.00", "2.00", "3.00", "4.00"]
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["x", "y"]
    common.plot_ranking(ranking, {"high": 2, "low": 1})
    assert [label.get_text() for label in ranking.get_yticklabels()] == ["low", "high"]  # the highest on top
    common.plot_confusion(heat, [[3, 1], [0, 0]], ["no", "yes"], "model")
    assert "3\n75.0%" in {text.get_text() for text in heat.texts}
    common.plot_curve(curve, [1, 2], [[1, 2], [3, 4]], "mean of two")
    assert len(curve.collections) == 1  # the band
    common.save_figure(fig, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not matplotlib.pyplot.get_fignums()  # closed


def test_dots_have_an_interval_and_the_highlighted_one_is_black():
    fig, (ax,) = common.new_figure("title")
    common.plot_dots(ax, ["ours", "theirs"], {"accuracy": [90, 80]}, errors={"accuracy": [2, 3]}, highlight="ours")
    (bars,) = ax.collections[1:]
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends == [[88, 92], [77, 83]]
    assert [matplotlib.colors.to_hex(color) for color in ax.collections[0].get_facecolors()] == ["#000000", "#0072b2"]
    common.plt.close(fig)
