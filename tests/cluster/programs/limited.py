"""Trains a few steps on random images; rank 0 prints the losses and the largest memory of a process.

    limited.py KEY=VALUE...

In bytes: `resident` is the most there was in memory, `data` what RLIMIT_DATA limits, at the end.
"""
import json
import os
import re
import sys
from pathlib import Path

from mxsimmim.config import configfile
from mxsimmim.parallel.strategies import strategy_of
from mxsimmim.runtime.environment import prepare
from mxsimmim.runtime.process import process_info

STEPS = 2
TESTS = Path(__file__).parents[2]


def main():
    config = configfile.load(TESTS.parent / 'conf' / 'base.yaml', sys.argv[1:])
    prepare(config.runtime)
    sys.path.append(str(TESTS))
    import mxnet as mx
    from support.trainer import random_batches

    from mxsimmim.training.build import build_trainer
    from mxsimmim.training.start import joined

    process = process_info(os.environ)
    with joined(config, strategy_of(config, process), process) as communicator:
        trainer = build_trainer(config, process, communicator=communicator)
        losses = []
        for batch in random_batches(config.model, STEPS, config.train.batch_size, 5):
            losses.append(float(trainer.train_step(batch).asnumpy()[0]))
            trainer.update_rule.poll(trainer.step, False)
        mx.nd.waitall()
        status = Path('/proc/self/status').read_text()
        resident, data = (1024 * int(re.search(rf'{name}:\s*(\d+)', status)[1]) for name in ('VmHWM', 'VmData'))
        told = communicator.control.all_gather('measured', [losses, resident, data])
        if process.rank == 0:
            losses, resident, data = zip(*told)
            print(json.dumps({'losses': [sum(values) for values in zip(*losses)], 'resident': max(resident),
                              'data': max(data)}))


if __name__ == '__main__':
    main()
