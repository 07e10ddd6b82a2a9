"""All formats, and which of them a file has."""

from collections.abc import Sequence

from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.traces.convert.alpaserve import ALPASERVE
from loraplex.traces.convert.azure_functions import MAF_2021, MAF_DAY, MAF_MINUTES
from loraplex.traces.convert.azure_llm import AZURE_LLM
from loraplex.traces.convert.burstgpt import BURSTGPT
from loraplex.traces.convert.format import TraceFormat
from loraplex.traces.convert.mooncake import MOONCAKE
from loraplex.traces.convert.public import PLAIN, PUBLIC
from loraplex.traces.convert.servegen import SERVEGEN_WINDOWS

FORMATS = {
    each.name: each
    for each in (
        PUBLIC,
        PLAIN,
        AZURE_LLM,
        BURSTGPT,
        MOONCAKE,
        MAF_MINUTES,
        MAF_DAY,
        MAF_2021,
        SERVEGEN_WINDOWS,
        ALPASERVE,
    )
}


def choose_format(columns: Sequence[str], *, name: str | None, extra: frozenset[str], where: str) -> TraceFormat:
    """The format called ``name``, or the one whose columns these are; ``extra``: columns to overlook.

    Raises BadConfig for an unknown name, InvalidInput naming ``where`` and the column that is missing or unknown.
    """
    if name is not None and name not in FORMATS:
        raise BadConfig(f"unknown trace format {name!r}, known: trace, {', '.join(FORMATS)}", param="format")
    present = frozenset(columns)
    fitting = [each for each in FORMATS.values() if name in (None, each.name) and frozenset(each.required) <= present]
    if not fitting and name is not None:
        missing = next(column for column in FORMATS[name].required if column not in present)
        raise InvalidInput(f"{where}: no column {missing!r}, which format {name} needs", code="invalid_trace")
    if not fitting:
        known = ", ".join(FORMATS)
        raise InvalidInput(
            f"{where}: columns {', '.join(columns)} are those of no known format ({known})", code="invalid_trace"
        )
    chosen = max(fitting, key=lambda each: len(each.required))
    unknown = [column for column in columns if column not in chosen.known | extra]
    if unknown:
        raise InvalidInput(
            f"{where}: format {chosen.name} has no column {unknown[0]!r}; --ignore-column overlooks it",
            code="invalid_trace",
        )
    return chosen
