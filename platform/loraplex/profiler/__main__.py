"""As ``loraplex profile``, options as JSON, for machines without the packages of the command line:

python -m loraplex.profiler PROFILE SAMPLES OPTIONS        writes both files; OPTIONS: the JSON of ``ProfileOptions``
"""

import sys
from pathlib import Path

import msgspec

from loraplex.profiler.measure import ProfileOptions, measure


def main(arguments: list[str]) -> None:
    if len(arguments) != 3:
        sys.exit(__doc__)
    out, samples, options = arguments
    measurement = measure(msgspec.json.decode(options, type=ProfileOptions), say=lambda line: print(line, flush=True))
    # First: a fit can be made again, a measurement is dear.
    Path(samples).write_bytes(msgspec.json.encode(measurement))
    profile = measurement.profile()
    Path(out).write_bytes(profile.to_json())
    print(msgspec.json.encode(profile.steps[0].held_out).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
