"""The report of a pilot: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.filesize import decimal

import pyllm
from pyllm.bulk import bulk_from
from pyllm.files import shown
from pyllm.pilot import figures
from pyllm.pilot.choice import cost, loss
from pyllm.pilot.heads import AUDITED, PROMISE
from pyllm.pilot.kpis import kpis
from pyllm.pilot.pilot import Pilot

TEMPLATE = "pilot.html"


def render(pilot: Pilot, calibration: str, model: str, made: Mapping[str, str]) -> bytes:
    """calibration: a sentence on where presets come from. model: as commands name it. made: how the report
    was made, for people."""
    environment = Environment(
        loader=FileSystemLoader(Path(pyllm.__file__).parent / "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": lambda value, digits: "–" if value is None else f"{value:,.{digits}f}",
        "bytes": lambda value: decimal(round(value)),
        "image": _image,
        "path": shown,
    }
    html = environment.get_template(TEMPLATE).render(
        pilot=pilot,
        survey=pilot.survey,
        made=made,
        calibration=calibration,
        kpis=kpis(pilot.row, pilot.projection, pilot.heads),
        figures={
            "lengths": figures.lengths(pilot.survey),
            "frontier": figures.frontier(pilot.pooled),
            "heat_map": figures.heat_map(pilot.heads, pilot.row.name),
            "shares": figures.shares(pilot.heads),
            "masses": figures.masses(pilot.heads),
        },
        loss=loss,
        cost=cost,
        bulk_from=bulk_from(pilot.survey.window, pilot.survey.sinks),
        chat=lambda attention: _chat(model, attention),
        promise=PROMISE,
        audited=AUDITED,
    )
    return html.encode()


def _chat(model: str, attention: str) -> str:
    """The command that chats under a policy, as a shell takes it."""
    return shown(shlex.join(["pyllm", "chat", "--model", model, "--attention", attention]))


def _image(svg: bytes, alt: str) -> Markup:
    """As an image with its own scope: inline SVGs would share the names of their parts."""
    data = base64.b64encode(svg).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(alt, data)
