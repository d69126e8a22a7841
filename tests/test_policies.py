"""Attention policies as values: their text form, what they refuse, and the arrays the library gets."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm import LLM, Adaptive, ArgumentError, Calibration, Dense, Oracle, Static, Window
from pyllm.attention import REST, Policy, needs_profile, parse

windows = st.integers(1, 2**31 - 1)
sinks = st.integers(0, 64)
thresholds = st.integers(0, 200).map(lambda n: n / 100) | st.floats(0, 2)
granularities = st.sampled_from(["head", "group"])
gaussians = st.sampled_from(["lognormal", "frozen", "truncated"])
pages = {
    "page_bits": st.sampled_from([0, 2, 3, 4]),
    "page_share": st.sampled_from([0, 0.005, 0.01, 1]) | st.floats(0, 1),
    "decode_share": st.sampled_from([0, 0.005, 1]) | st.floats(0, 1),
    "page_drop": st.sampled_from([0, 0.1, 1]) | st.floats(0, 5),
    "page_rest": st.sampled_from([None, 0.0]),
}


@given(
    st.one_of(
        st.builds(Dense, window=windows, sinks=sinks, **pages),
        st.builds(Window, window=windows, sinks=sinks),
        st.builds(Oracle, thresholds, granularities, window=windows, sinks=sinks, **pages),
        st.builds(
            Adaptive, thresholds, granularities, window=windows, sinks=sinks, gaussian=gaussians, **pages
        ),
    )
)
def test_text_form_reads_back(policy: Policy) -> None:
    assert parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("dense", Dense()),
        ("window:512", Window(window=512)),
        ("adaptive", Adaptive(threshold=0.9, granularity="group", window=1024, sinks=16)),
        ("oracle:0.5,granularity=head", Oracle(0.5, "head")),
        ("adaptive:1.5,window=64,sinks=4", Adaptive(1.5, window=64, sinks=4)),
        ("adaptive:0.9,page_bits=3,page_share=0.01", Adaptive(0.9, page_bits=3, page_share=0.01)),
        ("dense,page_bits=3,decode_share=0.001", Dense(page_bits=3, decode_share=0.001)),
        ("oracle,page_bits=2,page_drop=0.1", Oracle(page_bits=2, page_share=0.005, page_drop=0.1)),
        ("dense,page_bits=4", Dense(page_bits=4)),
        ("dense,page_bits=4,page_rest=0", Dense(page_bits=4, page_rest=0.0)),
        ("adaptive:0.9,gaussian=truncated", Adaptive(0.9, gaussian="truncated")),
    ],
)
def test_parse(spec: str, policy: Policy) -> None:
    assert parse(spec) == policy


WRONG = """
static static:0.6 static:x static:nan static:1.5 static:-0.1 static:0.6,granularity=head
dens dense:1 dense,granularity=head window:x window:0 adaptive:-1 adaptive:nan adaptive:0.9,windw=3
adaptive:1e39 adaptive,window=1.5 adaptive,sinks=65 oracle,granularity=x
adaptive,gaussian=x adaptive,estimate=x adaptive,moments=x oracle,gaussian=frozen dense,moments=prompt
window,page_bits=3 adaptive,page_bits=1 adaptive,page_bits=x adaptive,page_share=2 adaptive,page_drop=-1
dense,page_rest=0.5 dense,page_bits=3,page_rest=0.5 dense,page_rest=-1 window,page_rest=0
"""


@pytest.mark.parametrize("spec", ["", *WRONG.split()])
def test_parse_refuses(spec: str) -> None:
    with pytest.raises(ArgumentError):
        parse(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "adaptive:0.9,estimate=regression",
        "adaptive:0.9,estimate=maximum",
        "adaptive:0.9,moments=calibrated",
        "adaptive:0.9,page_bits=graded",
        "dense,page_bits=graded",
        "oracle,page_bits=graded",
    ],
)
def test_what_needs_a_calibration_says_so(spec: str) -> None:
    assert needs_profile(spec)
    with pytest.raises(ArgumentError, match=r"needs a calibration for this model, and there is none"):
        parse(spec)


def calibration(rng: np.random.Generator, moments: str = "prompt") -> Calibration:
    """For the tiny model: 2 layers of 8 heads on 2 key/value heads of 32."""
    root = rng.standard_normal((2, 2, 32, 32)).astype(np.float32)
    covariances = root @ root.swapaxes(-1, -2)
    return Calibration(
        rng.standard_normal((2, 8, 3)),
        rng.standard_normal((2, 2, 32)),
        covariances,
        rng.random((2, 2, 32)),
        rng.random((2, 2, 32)),
        rng.standard_normal((2, 2, 32)),
        (16, 500),
        moments,
    )


def test_calibrations_are_part_of_the_value(rng: np.random.Generator) -> None:
    one, other = calibration(rng), calibration(rng)
    by_channel = one.page_variances, one.query_squares, one.query_means
    copy = Calibration(one.coefficients, one.means, one.covariances, *by_channel, one.positions)
    assert Adaptive(estimate="maximum", calibration=one) == Adaptive(estimate="maximum", calibration=copy)
    assert hash(Adaptive(calibration=one)) == hash(Adaptive(calibration=copy))
    assert Adaptive(calibration=one) != Adaptive(calibration=other)
    with pytest.raises(ArgumentError, match="fitted with moments 'prompt', not 'calibrated'"):
        Adaptive(estimate="regression", moments="calibrated", calibration=one)


def test_the_library_gets_what_an_estimate_reads(rng: np.random.Generator) -> None:
    prompt, other = calibration(rng), calibration(rng, "calibrated")
    asked = ("coefficients", "means", "covariances")
    for options, expected in (
        ({"calibration": prompt}, ()),
        ({"calibration": prompt, "estimate": "maximum"}, asked[:1]),
        ({"calibration": prompt, "moments": "calibrated"}, asked[1:]),
        ({"calibration": other, "moments": "calibrated", "estimate": "regression"}, asked),
    ):
        native = Adaptive(gaussian="frozen", **options).native(2, 8)
        assert tuple(name for name in asked if name in native) == expected
        assert native["gaussian"] == 1
    assert Dense(page_bits=np.int64(3)).native(2, 8)["page_bits"] == 3  # type: ignore[arg-type]
    graded = Dense(page_bits="graded", calibration=prompt).native(2, 8)
    assert graded["page_bits"] == 1
    np.testing.assert_array_equal(graded["channels"], prompt.channels)
    np.testing.assert_array_equal(graded["query_means"], prompt.query_means)
    assert graded["page_rest"] == REST
    for rest in (0, 0.25):
        assert Dense(page_bits="graded", calibration=prompt, page_rest=rest).native(2, 8)["page_rest"] == rest
    plain = Dense(page_bits=3, calibration=prompt).native(2, 8)
    assert plain.keys().isdisjoint({"channels", "query_means", "page_rest"})


def zero_calibration(n_layers: int, n_kv_heads: int, d: int) -> Calibration:
    heads = n_layers, n_kv_heads
    return Calibration(
        np.zeros((n_layers, 8, 3)),
        np.zeros((*heads, d)),
        np.zeros((*heads, d, d)),
        np.zeros((*heads, d)),
        np.zeros((*heads, d)),
        np.zeros((*heads, d)),
        (0, 1),
    )


def test_calibrations_of_other_models_are_refused(tiny: LLM, rng: np.random.Generator) -> None:
    fits = calibration(rng)
    session = tiny.session(attention=Adaptive(estimate="maximum", calibration=fits))
    before = session.attention
    for wrong, options in (
        (zero_calibration(3, 2, 32), {"estimate": "maximum"}),
        (zero_calibration(2, 2, 16), {"moments": "calibrated"}),
        (zero_calibration(2, 1, 32), {"moments": "calibrated"}),
        (zero_calibration(2, 2, 16), {"page_bits": "graded"}),
    ):
        with pytest.raises(ArgumentError, match="but the model has"):
            session.attention = Adaptive(calibration=wrong, **options)  # type: ignore[arg-type]
    lopsided = fits.covariances.copy()
    lopsided[1, 0, 3, 5] += 10
    by_channel = fits.page_variances, fits.query_squares, fits.query_means
    skewed = Calibration(fits.coefficients, fits.means, lopsided, *by_channel, fits.positions)
    with pytest.raises(ArgumentError, match="layer 1, key/value head 0: not symmetric"):
        session.attention = Adaptive(moments="calibrated", calibration=skewed)
    assert session.attention == before


def test_thresholds_per_layer_and_head(rng: np.random.Generator) -> None:
    per_layer = Adaptive([0.5, 0.75]).native(2, 3)["thresholds"]
    np.testing.assert_array_equal(per_layer, np.array([[0.5] * 3, [0.75] * 3], np.float32))
    per_head = rng.random((2, 3))
    np.testing.assert_array_equal(Adaptive(per_head).native(2, 3)["thresholds"], per_head.astype(np.float32))
    assert Adaptive(per_head) == Adaptive(per_head.tolist())
    assert hash(Adaptive(per_head)) == hash(Adaptive(per_head.copy()))


@pytest.mark.parametrize(
    "values", [[0.5, 0.5, 0.5], np.ones((3, 2)), np.ones((1, 1, 1)), [], [[0.5], [0.1, 0.2]]]
)
def test_thresholds_of_another_shape(values: object) -> None:
    with pytest.raises(ArgumentError, match="threshold"):
        Adaptive(values).native(2, 3)  # type: ignore[arg-type]


def test_static_labels(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, (2, 3))
    np.testing.assert_array_equal(Static(labels).native(2, 3)["static_local"], labels.astype(np.uint8))
    with pytest.raises(ArgumentError, match=r"\(2, 3\)"):
        Static(labels).native(3, 3)
    for wrong in ([1, 0], [[2]], [["a"]]):
        with pytest.raises(ArgumentError, match="static"):
            Static(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"page_bits": 1}, r"page_bits: expected one of \(0, 'graded', 2, 3, 4\), got 1"),
        ({"page_bits": 3.0}, "page_bits: expected one of"),
        ({"page_bits": True}, "page_bits: expected one of"),
        ({"page_bits": "3"}, "page_bits: expected one of"),
        ({"page_share": -0.1}, "page_share: expected a number from 0 to 1, got -0.1"),
        ({"decode_share": 2}, "decode_share: expected a number from 0 to 1, got 2"),
        ({"page_share": float("nan")}, "page_share: expected a number from 0 to 1, got nan"),
        ({"page_rest": 1.5}, "page_rest: expected a number from 0 to 1, got 1.5"),
        ({"page_rest": 0.5, "page_bits": 3}, "page_rest 0.5 needs page_bits 'graded'"),
        ({"page_drop": "0.1"}, "page_drop: expected a number of at least 0, got '0.1'"),
    ],
)
def test_page_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    for policy in (Dense, Oracle, Adaptive, partial(Static, [[1]])):
        with pytest.raises(ArgumentError, match=message):
            policy(**wrong)
    with pytest.raises(TypeError):
        Window(**wrong)


def test_page_settings_reach_the_library() -> None:
    settings: dict[str, Any] = {"page_bits": 3, "page_share": 0.01, "page_drop": 0.2}
    for policy in (Dense, Oracle, Adaptive, partial(Static, [[1, 0]])):
        native = policy(**settings).native(1, 2)
        assert {name: native[name] for name in settings} == settings
        assert "decode_share" not in native
        assert policy(**settings, decode_share=0.002).native(1, 2)["decode_share"] == 0.002
        assert policy().native(1, 2)["page_bits"] == 0
    assert "page_bits" not in Window().native(1, 2)
