"""Profiles: what `pyllm calibrate` found out about one model, in one file, and the presets that it gives."""

from __future__ import annotations

import io
import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import atomic_file
from pyllm.attention import PARSED, PRESETS, Policy
from pyllm.calibration import Calibration
from pyllm.errors import FileError, FormatError, PyllmError

FORMAT, VERSION = "pyllm profile", 4
DESCRIPTION = "profile.json"  # the zip file's member that is no array
LARGEST = 2**28  # bytes of a member: more is no profile
# Of a budget, what decode may lose. A prompt that was read with the whole of it costs little in what is
# decoded behind it; the choice of pages for the answer itself does, and the answer is what counts.
DECODE_PART = 0.4
SHIPPED = Path(__file__).parent / "data" / "profiles"


def counted(prefill: float, decode: float) -> float:
    """Nats that count towards a budget, of a loss in prefill and one in decode."""
    return max(prefill, decode / DECODE_PART)


@dataclass(frozen=True)
class Measured:
    """A policy beside dense attention. tokens: of prefill, those with a bulk; decode_tokens: evaluated one by
    one. kl and decode_kl: mean KL in nats, low and high the ends of its 95 % interval. top1: % of prefill's
    tokens where dense attention's likeliest is also this one's. bulk_work: % of the bulk's multiply-adds
    in prefill, scoring included; bulk_read: % of the bulk's bytes read in decode, sketch included."""

    tokens: int
    kl: float
    kl_low: float
    kl_high: float
    top1: float
    bulk_work: float
    decode_tokens: int
    decode_kl: float
    decode_kl_low: float
    decode_kl_high: float
    bulk_read: float

    @property
    def loss(self) -> float:
        """Nats: what a budget bounds, the upper ends of the intervals."""
        return counted(self.kl_high, self.decode_kl_high)

    @property
    def mean_loss(self) -> float:
        """The same by the means."""
        return counted(self.kl, self.decode_kl)

    @property
    def cost(self) -> float:
        """% of dense attention's: the mean of prefill's work and decode's bytes on the bulk."""
        return (self.bulk_work + self.bulk_read) / 2


@dataclass(frozen=True)
class Preset:
    """A policy whose loss kept to a budget, in nats, on the text that it was chosen on. measured: on other
    text, which neither the fit nor the search saw."""

    policy: Policy
    budget: float
    measured: Measured


@dataclass(frozen=True, eq=False)
class Profile:
    """What belongs to the model with this fingerprint.

    model: its name, for people. made: how the profile was made, as JSON holds it. presets: by name.
    local_shares: (n_layers, n_heads) float32, the share of queries for which the oracle calls the head local.
    calibration: what estimates other than the Gaussian need, of presets among others.
    """

    fingerprint: str
    model: str
    made: Mapping[str, Any]
    presets: Mapping[str, Preset]
    local_shares: NDArray[np.float32]
    calibration: Calibration

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all, the same bytes for the same contents. Raises FileError."""
        description = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "made": self.made,
            "presets": {name: _preset_values(preset) for name, preset in self.presets.items()},
            "positions": self.calibration.positions,
            "moments": self.calibration.moments,
        }
        members = {DESCRIPTION: json.dumps(description, indent=1).encode() + b"\n"}
        arrays = {"local_shares": self.local_shares, **_calibration_arrays(self.calibration)}
        members |= {f"{name}.npy": _array_bytes(array) for name, array in arrays.items()}
        try:
            atomic_file.write(path, memoryview(_zipped(members)))
        except OSError as error:
            raise FileError(f"{path}: the profile cannot be written: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: Path, fingerprint: str | None = None) -> Profile:
        """fingerprint: of the model that it must be of.

        Raises FileError where the file cannot be read, FormatError for what is no profile of this version, is
        damaged or belongs to another model.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                description = json.loads(_member(archive, DESCRIPTION))
                _require_version(description)
                calibration = _calibration(archive, description)
                presets = description["presets"].items()
                profile = cls(
                    fingerprint=str(description["fingerprint"]),
                    model=str(description["model"]),
                    made=dict(description["made"]),
                    presets={name: _preset(values, calibration) for name, values in presets},
                    local_shares=_array(archive, "local_shares.npy"),
                    calibration=calibration,
                )
                profile._check()
        except OSError as error:
            raise FileError(f"{path}: the profile cannot be read: {error.strerror or error}") from None
        except _OtherVersionError as error:
            raise FormatError(f"{path}: {error}") from None
        except _BROKEN as error:
            cause = str(error) or type(error).__name__
            raise FormatError(f"{path}: not a profile, or a damaged one: {cause}") from None
        if fingerprint not in (None, profile.fingerprint):
            raise FormatError(
                f"{path}: a profile of another model, {profile.model} ({profile.fingerprint}, not "
                f"{fingerprint}): remove it, or make one of this model with pyllm calibrate"
            )
        return profile

    def _check(self) -> None:
        """Raises ValueError for arrays and presets that do not fit each other."""
        missing = [name for name in PRESETS if name not in self.presets]
        if missing:
            raise ValueError(f"no preset {', '.join(missing)}")
        shares = self.local_shares
        if shares.ndim != 2 or not np.issubdtype(shares.dtype, np.floating):
            raise ValueError(f"local_shares: {shares.dtype} of shape {shares.shape}")
        if self.calibration.coefficients.shape[:2] != shares.shape:
            raise ValueError(f"a calibration of {self.calibration.coefficients.shape[:2]} layers and heads")
        for preset in self.presets.values():
            preset.policy.native(*shares.shape)


def beside(paths: Sequence[Path]) -> Path:
    """Where `pyllm calibrate` leaves a model's profile, given the model's files."""
    return paths[0].with_suffix(".profile")


def find(paths: Sequence[Path], fingerprint: str) -> Path | None:
    """The profile beside a model's files, or the one that pyllm ships for it, or None."""
    candidates = (beside(paths), SHIPPED / f"{fingerprint}.profile")
    return next((path for path in candidates if path.exists()), None)


# What broken files raise while they are read. Policies refuse wrong values with ArgumentError.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    OverflowError,
    RuntimeError,  # zipfile's for encrypted members and unknown compression
    MemoryError,
    PyllmError,
)


class _OtherVersionError(Exception):
    """A profile, but of another pyllm."""


def _require_version(description: Any) -> None:
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{DESCRIPTION} is not of the format {FORMAT!r}")
    if description.get("version") != VERSION:
        found = description.get("version")
        raise _OtherVersionError(
            f"a profile of version {found!r}, but this pyllm reads {VERSION}: "
            f"make it again with pyllm calibrate"
        )


def _preset_values(preset: Preset) -> dict[str, Any]:
    policy = {f.name: getattr(preset.policy, f.name) for f in fields(preset.policy)}
    if "calibration" in policy:  # the profile's own
        policy["calibration"] = policy["calibration"] is not None
    return {
        "policy": {"name": preset.policy.name, **policy},
        "budget": preset.budget,
        "measured": asdict(preset.measured),
    }


def _preset(values: Mapping[str, Any], calibration: Calibration) -> Preset:
    arguments = dict(values["policy"])
    kind = PARSED[arguments.pop("name")]
    if unknown := arguments.keys() - {f.name for f in fields(kind)}:
        raise ValueError(f"{kind.name} has no {', '.join(sorted(unknown))}")
    if "calibration" in arguments:
        arguments["calibration"] = calibration if arguments["calibration"] else None
    policy = kind(**arguments)
    measured = Measured(**values["measured"])
    for name, number in (*asdict(measured).items(), ("budget", values["budget"])):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{name}: expected a number, got {number!r}")
    return Preset(policy, values["budget"], measured)


def _calibration_arrays(calibration: Calibration) -> dict[str, NDArray[np.float32]]:
    """Of the covariances, which are symmetric, the upper triangles."""
    upper = np.triu_indices(calibration.covariances.shape[-1])
    return {
        "coefficients": calibration.coefficients,
        "means": calibration.means,
        "covariances": calibration.covariances[..., upper[0], upper[1]],
        "page_variances": calibration.page_variances,
        "query_squares": calibration.query_squares,
        "query_means": calibration.query_means,
    }


def _calibration(archive: zipfile.ZipFile, description: Mapping[str, Any]) -> Calibration:
    names = ("coefficients", "means", "covariances", "page_variances", "query_squares", "query_means")
    coefficients, means, packed, inside, squares, queries = (_array(archive, f"{name}.npy") for name in names)
    n = means.shape[-1]
    rows, columns = np.triu_indices(n)
    covariances = np.empty((*packed.shape[:-1], n, n), np.float32)
    covariances[..., rows, columns] = packed
    covariances[..., columns, rows] = packed
    first, stop = description["positions"]
    model = str(description["fingerprint"])
    arrays = (coefficients, means, covariances, inside, squares, queries)
    return Calibration(*arrays, (first, stop), description["moments"], model)


def _array_bytes(array: NDArray[Any]) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    return data.getvalue()


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(_member(archive, name)), allow_pickle=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: not all values are finite")
    return array


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > LARGEST:
        raise ValueError(f"{name}: {size} bytes are too many")
    return archive.read(name)


def _zipped(members: Mapping[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            # ZipInfo's own date, the same for all, so that the same contents are the same bytes
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return data.getvalue()
