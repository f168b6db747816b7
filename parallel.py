"""Several devices that share out what a device would keep whole: mlx.launch -n 4 -- python train.py --parallel=zero1.

zero1 (Rajbhandari et al. 2020, stage 1): every process computes gradients for its part of the batch and receives the
means of all, as without it. But it keeps Adam's two states, which are twice the size of the parameters, for 1/n of the
numbers of each parameter. It updates these, and all gather what they updated. The losses are those of one process.

A checkpoint holds whole states, so that a run may go on with another number of processes, or with one. watch() ends
all processes of a machine when one of them is killed. Deleting this file costs both and nothing else.
"""
import hashlib
import math
import os
import socket
import sys
import threading
import time

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from config import UserError

MODES = ("zero1",)


def check(mode: str, optimizer: str, bits: int):
    """UserError for a mode that there is not, or beside settings that it does not know."""
    if mode not in MODES:
        raise UserError(f"parallel={mode!r} is not one of {', '.join(MODES)}")
    if optimizer == "lion" or bits < 32:
        raise UserError(f"parallel={mode} shares out the states of Adam in float32: leave out "
                        f"{'--optimizer=lion' if optimizer == 'lion' else f'--optimizer_bits={bits}'}")


# ---- zero1 -----------------------------------------------------------------------------------------------------------


def own(x: mx.array, group: mx.distributed.Group) -> mx.array:
    """This process's part of the numbers of an array, of ceil(size / n): (size,) with zeros behind, cut into n."""
    each = -(-x.size // group.size())
    x = mx.pad(x.reshape(-1), (0, each * group.size() - x.size))
    return x[group.rank() * each:(group.rank() + 1) * each]


def whole(parts: list[mx.array], shapes: list[tuple], group: mx.distributed.Group) -> list[mx.array]:
    """The arrays of these shapes, of which own() gave the parts, in one gather."""
    ends, total = [], 0
    for part in parts:
        total += part.size
        ends.append(total)
    gathered = mx.distributed.all_gather(mx.concatenate(parts), group=group).reshape(group.size(), -1)
    pieces = mx.split(gathered, ends[:-1], axis=1)
    return [piece.reshape(-1)[:math.prod(shape)].reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class ShardedAdam(optim.Adam):
    """Adam that keeps its states for this process's part of each parameter."""

    def __init__(self, learning_rate: float, group: mx.distributed.Group, **others):
        super().__init__(learning_rate, **others)
        self.group = group

    def init_single(self, parameter: mx.array, state: dict):
        super().init_single(own(parameter, self.group), state)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        parts = tree_map(lambda g, p: own(p, self.group), gradients, parameters)
        updated = super().apply_gradients(tree_map(lambda g: own(g, self.group), gradients), parts)
        names, arrays = zip(*tree_flatten(updated), strict=True)
        shapes = [g.shape for _, g in tree_flatten(gradients)]
        return tree_unflatten(list(zip(names, whole(arrays, shapes, self.group), strict=True)))


def shapes_of(state: dict, parameters: dict) -> dict[str, tuple]:
    """The shapes that the arrays of an optimizer's state have in a checkpoint, by their names: those of the parameter
    whose name is in theirs. state, parameters: by name."""
    found = {}
    for name, array in state.items():
        parts = name.split(".")[:-1]
        paths = (".".join(parts[i:]) for i in range(len(parts)))
        found[name] = next((parameters[path].shape for path in paths if path in parameters), array.shape)
    return found


def is_cut(part: mx.array, shape: tuple, group: mx.distributed.Group) -> bool:
    """Whether an array of a state is a process's part of one of this shape. A part of one number is one of one."""
    return part.shape != shape or group.size() > 1 and part.shape == (1,)


def whole_state(state: dict, parameters: dict, group: mx.distributed.Group) -> dict:
    """An optimizer's state by name, as a checkpoint has it. Every process must call it."""
    shapes = shapes_of(state, parameters)
    cut = [name for name, array in state.items() if is_cut(array, shapes[name], group)]
    return state | dict(zip(cut, whole([state[name] for name in cut], [shapes[name] for name in cut], group),
                            strict=True)) if cut else state


def own_state(arrays: dict, state: dict, group: mx.distributed.Group) -> dict:
    """The arrays of a checkpoint, cut where those of the state are."""
    return {name: own(x, group) if is_cut(state[name], x.shape, group) else x for name, x in arrays.items()}


# ---- processes that are killed ---------------------------------------------------------------------------------------


def watch(group: mx.distributed.Group, seconds: float = 1.0) -> threading.Event:
    """End this process, with status 2, when another one of this machine has ended: a sum would wait for that one for
    ever. The first one that is left says so. It looks every so many seconds until the event is set."""
    host = int(hashlib.sha256(socket.gethostname().encode()).hexdigest()[:7], 16)
    everyone = mx.distributed.all_gather(mx.array([[host, os.getpid()]]), group=group).tolist()
    here, over = [pid for machine, pid in everyone if machine == host], threading.Event()

    def is_there(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # of another user
            pass
        return True

    def look():
        while not over.wait(seconds):
            left = [pid for pid in here if is_there(pid)]
            if len(left) < len(here) and not over.wait(seconds):  # it may be the end of training for all
                if os.getpid() != left[0]:
                    time.sleep(1)  # a launcher ends the first one, too, as soon as this one has ended
                else:
                    print(f"{os.path.basename(sys.argv[0])}: another process has ended: go on from the last checkpoint "
                          "with --resume=True", file=sys.stderr, flush=True)
                os._exit(2)

    threading.Thread(target=look, daemon=True).start()
    return over


if __name__ == "__main__":
    print("parallel.py has no command of its own: run mlx.launch -n 2 -- python train.py --parallel=zero1",
          file=sys.stderr)
    sys.exit(2)
