"""What it costs on this machine that replicas of one group take turns, as JSON:

python -m loraplex.model_runner.turns [TURNS]        500 if not given
"""

import sys

import msgspec

from loraplex.model_runner.turns.cost import measure_turn_cost


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or not all(argument.isdecimal() and int(argument) > 1 for argument in arguments):
        sys.exit(__doc__)
    cost = measure_turn_cost(num_turns=int(arguments[0]) if arguments else 500)
    print(msgspec.json.encode(cost).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
