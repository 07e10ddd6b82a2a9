"""Written dates and times as seconds."""

import pyarrow as pa
import pyarrow.compute as pc


def unix_seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """float64 seconds from 1970 of ISO 8601 text, UTC when it names no zone. Raises ArrowInvalid for other text."""
    text = pc.replace_substring_regex(column, r"([+-]\d{2}):?(\d{2})$|Z$", "")
    zone = pc.extract_regex(column, r"(?P<sign>[+-])(?P<hours>\d{2}):?(?P<minutes>\d{2})$")
    has_zone = pc.is_valid(zone)
    nanoseconds = text.cast(pa.timestamp("ns")).cast(pa.int64())
    seconds = pc.divide(nanoseconds.cast(pa.float64(), safe=False), 1e9)
    if not pc.any(has_zone).as_py():
        return seconds
    parts = [pc.struct_field(zone, index) for index in range(3)]
    minutes = pc.add(pc.multiply(parts[1].cast(pa.float64()), 60), parts[2].cast(pa.float64()))
    signed = pc.if_else(pc.equal(parts[0], "-"), pc.negate(minutes), minutes)
    return pc.subtract(seconds, pc.multiply(pc.fill_null(signed, 0.0), 60))
