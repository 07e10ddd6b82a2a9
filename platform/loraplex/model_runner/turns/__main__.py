"""What it costs on this machine that replicas of one group take turns, as JSON:

python -m loraplex.model_runner.turns [TURNS [MODEL CONFIG]]

TURNS: 500 if not given. MODEL: random:tiny-llama if not given; CONFIG: of an executor, as JSON, which two replicas have
at a time, such as '{"device": "cuda", "tp": 2, "num_pages": 2000}'. ``turn_us`` in the result is a simulation's
``turn_s``.
"""

import sys

import msgspec

from loraplex.model_runner.config import ExecutorConfig
from loraplex.model_runner.turns.cost import measure_turn_cost


def main(arguments: list[str]) -> None:
    if len(arguments) not in (0, 1, 3) or not all(one.isdecimal() and int(one) > 1 for one in arguments[:1]):
        sys.exit(__doc__)
    num_turns = int(arguments[0]) if arguments else 500
    if len(arguments) == 3:
        config = msgspec.json.decode(arguments[2], type=ExecutorConfig)
        cost = measure_turn_cost(num_turns=num_turns, model=arguments[1], config=config)
    else:
        cost = measure_turn_cost(num_turns=num_turns)
    print(msgspec.json.encode({**msgspec.structs.asdict(cost), "turn_us": cost.turn_us}).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
