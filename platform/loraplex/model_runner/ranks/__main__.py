"""What the messages of a step cost on this machine, as JSON:

python -m loraplex.model_runner.ranks [RANKS [ROWS [STEPS]]]        2 ranks, 256 rows, 500 steps if not given
"""

import sys

import msgspec

from loraplex.model_runner.ranks.message_cost import measure_message_cost


def main(arguments: list[str]) -> None:
    if len(arguments) > 3 or not all(argument.isdecimal() and int(argument) > 0 for argument in arguments):
        sys.exit(__doc__)
    ranks, rows, steps = (int(word) for word in (*arguments, *("2", "256", "500")[len(arguments) :]))
    cost = measure_message_cost(num_ranks=ranks, num_rows=rows, num_steps=steps)
    print(msgspec.json.encode(cost).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
