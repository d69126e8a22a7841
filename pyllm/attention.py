"""How attention decides what to read: the policies as values, their text form and their native arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from pyllm.calibration import MOMENTS, Calibration
from pyllm.errors import ArgumentError
from pyllm.local_heads import top_groups

if TYPE_CHECKING:
    from pyllm.profile import Profile

GRANULARITIES = ("head", "group")
GRADED = "graded"
PageBits = int | str
PAGE_BITS: dict[PageBits, int] = {0: 0, GRADED: 1, 2: 2, 3: 3, 4: 4}  # and as the library numbers them
GAUSSIANS = ("lognormal", "frozen", "truncated")
ESTIMATES = ("gaussian", "regression", "maximum")
# A threshold that no share reaches: every head is long, and attention dense to the last bit.
NEVER_LOCAL = 2.0
# Names of the policies that `pyllm calibrate` finds for a model, the first the closest to dense attention.
PRESETS = ("conservative", "balanced", "aggressive")
# What page_rest is by default. It takes back about what rounding adds to a mean of exponentials; from 0.5 to
# 0.7 it hardly matters (docs/performance.md, "What a list leaves out").
REST = 0.6


@dataclass(frozen=True)
class Policy:
    """What all policies share.

    window: newest tokens that are always read, at least. sinks: first tokens that are always read, 0..64,
    fixed for a session because its pages start behind them.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    parameter: ClassVar[str] = ""  # what the text form has after its colon

    window: int = field(default=1024, kw_only=True)
    sinks: int = field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        _require_int("window", self.window, 1, 2**31 - 1)
        _require_int("sinks", self.sinks, 0, 64)

    @property
    def sketch(self) -> int:
        """The key sketch that it needs, as the library numbers them; 0 for none."""
        return 0

    @property
    def reads_all(self) -> bool:
        """Whether it is dense attention, to which sinks and window make no difference."""
        return False

    def native(self, n_layers: int, n_heads: int) -> dict[str, Any]:
        """Arguments of `NativeSession.set_attention` for a model of this shape."""
        return {
            "policy": self.code,
            "granularity": 1,
            "n_window": self.window,
            "thresholds": None,
            "static_local": None,
        }

    def __str__(self) -> str:
        """The spelling that `parse` reads, where there is one."""
        head = self.name
        if self.parameter:
            value = getattr(self, self.parameter)
            head += f":{value}" if isinstance(value, (int, float)) else ":array"
        options = [f for f in fields(self) if f.name in OPTIONS and f.name != self.parameter]
        changed = [f for f in options if getattr(self, f.name) != f.default]
        return ",".join([head, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])


@dataclass(frozen=True)
class _Paged(Policy):
    """What all policies share that let some heads be long: how much of the bulk these read.

    page_bits: 0, the whole bulk; or 2, 3 or 4: bits per value of a sketch of the bulk's keys, from which the
    shares of attention of read pages, 16 tokens, are estimated; or "graded": 4 bits of those channels of a
    head that move its scores most, 2 of some more, none of the others, half the size of 3 bits, for which it
    needs a calibration, or a profile: one of this model, or its file. page_share: the share above which a
    read page is read, 0..1. decode_share: the same for a token that is evaluated alone, as in decode, where
    bytes are what costs; None, page_share. page_drop: what the shares of the others may sum to, at least 0;
    a share is halved for a head until they do, 1 is no bound. page_rest, with "graded" alone: what such a
    token, a batch by itself, does not read counts so much of its estimated weight, 0..1, with one value per
    64 tokens that stands for theirs; None, as much as was found best. With page_bits results depend on how a
    prompt is cut into batches. Raises FileError and FormatError as `Profile.load` does.
    """

    page_bits: PageBits = field(default=0, kw_only=True)
    page_share: float = field(default=0.005, kw_only=True)
    decode_share: float | None = field(default=None, kw_only=True)
    page_drop: float = field(default=1.0, kw_only=True)
    page_rest: float | None = field(default=None, kw_only=True)
    calibration: Calibration | None = field(default=None, kw_only=True)
    profile: InitVar[Profile | str | PathLike[str] | None] = field(default=None, kw_only=True)

    def __post_init__(self, profile: Profile | str | PathLike[str] | None) -> None:
        super().__post_init__()
        if profile is not None:
            object.__setattr__(self, "calibration", self._calibration_of(profile))
        require_page_bits(self.page_bits)
        if self.page_bits == GRADED:
            self._require_calibration(f"page_bits {GRADED!r}")
        object.__setattr__(self, "page_share", _require_float("page_share", self.page_share, 1.0))
        if self.decode_share is not None:
            object.__setattr__(self, "decode_share", _require_float("decode_share", self.decode_share, 1.0))
        object.__setattr__(self, "page_drop", _require_float("page_drop", self.page_drop, math.inf))
        if self.page_rest is not None:
            object.__setattr__(self, "page_rest", _require_float("page_rest", self.page_rest, 1.0))
            if self.page_rest and self.page_bits != GRADED:
                raise ArgumentError(f"attention: page_rest {self.page_rest:g} needs page_bits {GRADED!r}")

    def _calibration_of(self, profile: Profile | str | PathLike[str]) -> Calibration:
        if self.calibration is not None:
            raise ArgumentError("attention: a calibration and a profile, which has its own: give one of them")
        from pyllm.profile import Profile  # whose presets are policies: it imports this module

        return (profile if isinstance(profile, Profile) else Profile.load(Path(profile))).calibration

    def _require_calibration(self, what: str) -> None:
        if self.calibration is None:
            raise ArgumentError(f"attention: {what} needs a calibration for this model, and there is none")

    @property
    def sketch(self) -> int:
        return PAGE_BITS[self.page_bits]

    def native(self, n_layers: int, n_heads: int) -> dict[str, Any]:
        pages: dict[str, Any] = {"page_bits": self.sketch}
        pages |= {name: getattr(self, name) for name in ("page_share", "page_drop")}
        if self.decode_share is not None:
            pages["decode_share"] = self.decode_share
        if self.calibration and self.page_bits == GRADED:
            pages["channels"] = self.calibration.channels
            pages["query_means"] = self.calibration.query_means
            pages["page_rest"] = REST if self.page_rest is None else self.page_rest
        return super().native(n_layers, n_heads) | pages


@dataclass(frozen=True)
class Dense(_Paged):
    """Every head reads everything, or with page_bits the read pages it wants of everything."""

    name = "dense"
    code = 0

    @property
    def reads_all(self) -> bool:
        return not self.page_bits


@dataclass(frozen=True)
class Window(Policy):
    """Every head reads the sinks and the window, never the bulk between them."""

    name = "window"
    code = 1
    parameter = "window"


@dataclass(frozen=True)
class Static(_Paged):
    """Fixed labels. local: (n_layers, n_heads), true where a head never reads the bulk."""

    name = "static"
    code = 2
    parameter = "local"

    local: ArrayLike

    def __post_init__(self, profile: Profile | str | PathLike[str] | None) -> None:
        super().__post_init__(profile)
        labels = np.asarray(self.local)
        if labels.ndim != 2 or not np.isin(labels, (0, 1)).all():
            raise ArgumentError(f"static labels: expected 0 or 1 per (layer, head), got shape {labels.shape}")
        object.__setattr__(self, "local", _nested(labels.astype(bool)))

    def native(self, n_layers: int, n_heads: int) -> dict[str, Any]:
        labels = np.array(self.local, np.uint8)
        if labels.shape != (n_layers, n_heads):
            raise ArgumentError(
                f"static labels of shape {labels.shape}, but the model has {(n_layers, n_heads)}"
            )
        return {**super().native(n_layers, n_heads), "granularity": 0, "static_local": labels}


@dataclass(frozen=True)
class _Thresholded(_Paged):
    """What Oracle and Adaptive share.

    threshold: of the local share, at least 0; above 1 every head is long. One number, (n_layers,)
    numbers or (n_layers, n_heads). granularity: "group" makes all query heads of a key/value head long when
    one is, "head" decides one by one.
    """

    parameter = "threshold"

    threshold: ArrayLike = 0.9
    granularity: str = "group"

    def __post_init__(self, profile: Profile | str | PathLike[str] | None) -> None:
        super().__post_init__(profile)
        object.__setattr__(self, "threshold", _thresholds(self.threshold))
        if self.granularity not in GRANULARITIES:
            raise ArgumentError(f"granularity: expected 'head' or 'group', got {self.granularity!r}")

    def native(self, n_layers: int, n_heads: int) -> dict[str, Any]:
        values = np.array(self.threshold, np.float32)
        if values.ndim == 1:
            values = values[:, None]
        try:
            thresholds = np.broadcast_to(values, (n_layers, n_heads)).copy()
        except ValueError:
            shape = np.shape(self.threshold)
            raise ArgumentError(
                f"thresholds of shape {shape}, but the model has {(n_layers, n_heads)}"
            ) from None
        granularity = GRANULARITIES.index(self.granularity)
        return {**super().native(n_layers, n_heads), "granularity": granularity, "thresholds": thresholds}


@dataclass(frozen=True)
class Oracle(_Thresholded):
    """The adaptive rule with the true bulk mass in place of its estimate: the best an estimate could do."""

    name = "oracle"
    code = 3


@dataclass(frozen=True)
class Adaptive(_Thresholded):
    """A head is local for a query iff sinks and window hold an estimated share of at least the threshold.

    The bulk's mass is estimated from mean and variance of its scores, by the moments of its keys: those of
    the prompt, or with moments "calibrated" of other text. estimate: "gaussian", as of Gaussian keys;
    "regression", as fitted to each head on other text; "maximum", the larger of both. gaussian: of infinitely
    many keys, "lognormal" (arXiv 2502.09647), or of as many as there are, "frozen" or "truncated" at the
    largest one expected. All but Gaussian estimates from the prompt's moments need a calibration, or a
    profile.
    """

    name = "adaptive"
    code = 4

    gaussian: str = field(default="lognormal", kw_only=True)
    estimate: str = field(default="gaussian", kw_only=True)
    moments: str = field(default="prompt", kw_only=True)

    def __post_init__(self, profile: Profile | str | PathLike[str] | None) -> None:
        super().__post_init__(profile)
        for name, known in (("gaussian", GAUSSIANS), ("estimate", ESTIMATES), ("moments", MOMENTS)):
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        fitted = self.estimate != "gaussian"
        if fitted or self.moments == "calibrated":
            self._require_calibration(f"estimate {self.estimate!r}" if fitted else "moments 'calibrated'")
        if self.calibration is not None and fitted and self.calibration.moments != self.moments:
            raise ArgumentError(
                f"attention: the calibration was fitted with moments {self.calibration.moments!r}, "
                f"not {self.moments!r}"
            )

    def native(self, n_layers: int, n_heads: int) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        if self.calibration and self.estimate != "gaussian":
            arrays["coefficients"] = self.calibration.coefficients
        if self.calibration and self.moments == "calibrated":
            arrays |= {"means": self.calibration.means, "covariances": self.calibration.covariances}
        codes = {"gaussian": GAUSSIANS.index(self.gaussian), "estimate": ESTIMATES.index(self.estimate)}
        return super().native(n_layers, n_heads) | codes | arrays


# Options of the text form, and what reads their values.
OPTIONS: dict[str, Callable[[str], Any]] = {
    "window": int,
    "sinks": int,
    "granularity": str,
    "gaussian": str,
    "estimate": str,
    "moments": str,
    "page_bits": lambda text: text if text == GRADED else int(text),
    "page_share": float,
    "decode_share": float,
    "page_drop": float,
    "page_rest": float,
}
PARSED: dict[str, type[Policy]] = {policy.name: policy for policy in (Dense, Window, Oracle, Adaptive)}
SYNTAX = (
    "dense, window[:TOKENS], adaptive[:THRESHOLD] or oracle[:THRESHOLD], "
    "then any of ,window=N ,sinks=N ,granularity=head|group ,page_bits=0|2|3|4|graded ,page_share=X "
    ",decode_share=X ,page_drop=X ,page_rest=X, "
    "for adaptive ,gaussian=lognormal|frozen|truncated ,estimate=gaussian|regression|maximum "
    ",moments=prompt|calibrated; "
    "or, for a model with a profile, static:SHARE, of heads that are local, or conservative, balanced or "
    "aggressive[:PROFILE]"
)


def is_preset(spec: str) -> bool:
    """Whether a text names a preset, and perhaps behind a colon the profile that it is of."""
    return spec.strip().partition(":")[0] in PRESETS


def needs_profile(spec: str) -> bool:
    """Whether a text may stand for a policy only with what was found out about a model."""
    options = ("estimate=", "moments=", f"page_bits={GRADED}")
    return is_preset(spec) or _head(spec)[0] == Static.name or any(option in spec for option in options)


def parse(spec: str, profile: Profile | None = None) -> Policy:
    """The policy a command line names: "dense", "window:512", "adaptive:0.9,page_bits=3,page_share=0.01".

    profile: for static labels, and for the estimates that need a calibration. Raises ArgumentError with the
    syntax when it names none, and for presets, which `LLM.policy` finds.
    """
    if is_preset(spec):
        raise ArgumentError(f"attention {spec!r}: a preset, which stands for a policy only with a model")
    name, value, options = _head(spec)
    policy = Static if name == Static.name else PARSED.get(name)
    if policy is None:
        raise ArgumentError(f"attention {spec!r}: expected {SYNTAX}")
    arguments: dict[str, Any] = {}
    if policy is Static:
        arguments[policy.parameter] = _labels(spec, value, profile)
    elif value:
        if not policy.parameter:
            raise ArgumentError(f"attention {spec!r}: {name} takes no value; expected {SYNTAX}")
        arguments[policy.parameter] = _value(spec, value, int if policy is Window else float)
    for option in options:
        key, _, text = option.partition("=")
        if key not in OPTIONS:
            raise ArgumentError(f"attention {spec!r}: unknown option {key!r}; expected {SYNTAX}")
        arguments[key] = _value(spec, text, OPTIONS[key])
    if policy is Adaptive or arguments.get("page_bits") == GRADED:
        arguments["profile"] = profile
    try:
        return policy(**arguments)
    except TypeError:
        raise ArgumentError(f"attention {spec!r}: not for {name}; expected {SYNTAX}") from None


def _head(spec: str) -> tuple[str, str, list[str]]:
    """The policy's name, the value behind its colon, and the options."""
    head, *options = spec.strip().split(",")
    name, _, value = head.partition(":")
    return name, value, options


def _labels(spec: str, value: str, profile: Profile | None) -> ArrayLike:
    """Of the heads that a profile found local most often."""
    share = _value(spec, value, float)
    if not 0 <= share <= 1:
        raise ArgumentError(f"attention {spec!r}: expected a share of heads from 0 to 1, got {value}")
    if profile is None:
        raise ArgumentError(f"attention {spec!r}: needs a profile of this model, which pyllm calibrate makes")
    return top_groups(profile.local_shares, share, profile.calibration.means.shape[1])


def _value(spec: str, text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except ValueError:
        raise ArgumentError(f"attention {spec!r}: {text!r} is not a number; expected {SYNTAX}") from None


def _thresholds(value: ArrayLike) -> Any:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(f"threshold: expected a number or an array of numbers, got {value!r}") from None
    usable = (array >= 0) & (array <= np.finfo(np.float32).max)  # which the native library holds them in
    if array.ndim > 2 or array.size == 0 or not usable.all():
        shown = f"{value!r}" if array.ndim == 0 else f"an array of shape {array.shape}"
        raise ArgumentError(
            f"threshold: expected numbers >= 0 of float32, one, per layer or per head, got {shown}"
        )
    return _nested(array)


def _nested(array: np.ndarray) -> Any:
    """As nested tuples, so that policies are values that compare and hash."""
    return tuple(_nested(row) for row in array) if array.ndim else array.item()


def require_page_bits(value: Any) -> None:
    """Raises ArgumentError for what is not one of PAGE_BITS."""
    kind = isinstance(value, (int, np.integer, str)) and not isinstance(value, bool)
    if not kind or value not in PAGE_BITS:
        raise ArgumentError(f"page_bits: expected one of {tuple(PAGE_BITS)}, got {value!r}")


def page_tier(
    page_bits: PageBits, page_share: float, calibration: Calibration | None, decode_share: float | None = None
) -> dict[str, Any]:
    """The arguments that make a policy's page tier. A graded sketch's are the calibration and page_rest,
    which is named so that what was measured with it keeps it."""
    tier: dict[str, Any] = {"page_bits": page_bits, "page_share": page_share, "decode_share": decode_share}
    return tier | {"calibration": calibration, "page_rest": REST} if page_bits == GRADED else tier


def _require_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ArgumentError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")


def _require_float(name: str, value: Any, high: float) -> float:
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and 0 <= value <= high:
        return float(value)
    bound = f"from 0 to {high:g}" if math.isfinite(high) else "of at least 0"
    raise ArgumentError(f"{name}: expected a number {bound}, got {value!r}")


# Of a model without a profile. A head tier before the pages saves little more, and judges by moments of many
# keys, which do not show the one that an answer hangs on (docs/evaluation.md, "What a gate does not see").
UNCALIBRATED = Dense(page_bits=3, page_share=0.003)
