"""
Many processes that train one model: who is who, sums over all of them, and the FSDP wrapper.

torchrun starts the processes and tells each its number in the environment. Without torchrun there is one process, and
every function here does what is right for one.

FSDP ("fully sharded data parallel"): each process keeps a part of every weight, its gradient and its optimizer state.
Just before a block runs, the processes put its weights together; just after, each drops what is not its own.

A model that is too large for one process must not be whole in any of them. So it begins without memory (on the device
"meta"), is sharded, gets memory for each process's parts, and `fill` reads just these parts.

FSDP2: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html; https://arxiv.org/abs/2304.11277.
"""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from configurator import fail


def start_processes() -> tuple[int, int, str]:
    """
    Join the other processes, if torchrun started this one. Returns this process's number, how many there are, and the
    device that it trains on. Raises ValueError if the environment is none that torchrun makes.
    """
    if not dist.is_initialized():
        check_environment()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            stop_with_launcher()
    has_cuda = torch.cuda.is_available()
    device = "cpu"
    if has_cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if is_torchrun() and not dist.is_initialized():
        # gloo is there on GPUs, too: checkpoints are written from copies in the CPU's memory.
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
    return rank(), world_size(), device


def stop_with_launcher():
    """
    From now on this process gets SIGTERM, on which it saves and ends, when torchrun has ended, even if that was killed.
    (torchrun starts it in a session of its own, so that no terminal and no kill of a group reaches it.) Raises
    ValueError if torchrun has ended already.
    """
    threading.Thread(target=watch_launcher, args=(os.getppid(),), daemon=True).start()

    # It may have ended before it was watched. Then nobody listens where the processes are to meet.
    launcher_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launcher_listens:
        host = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection((host, port), timeout=60).close()
        except OSError as error:
            raise ValueError(f"torchrun does not answer at {host}:{port} ({error}); start it again") from None


def watch_launcher(launcher: int):
    """Wait until this process has another parent than `launcher`, and send it SIGTERM."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def check_environment():
    """
    Raise ValueError if Slurm or something else started many processes that do not know of each other, or asked for many
    of which only this one runs.
    """
    if not is_torchrun():
        # srun counts the tasks of its step. Without srun, in a batch script, there is only what the job asked for.
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
        if tasks not in ("", "1"):
            raise ValueError(
                f"Slurm has {tasks} tasks, but this process knows of no other: with srun each would train alone, "
                f"without srun only this one trains. Start one task per node (srun --ntasks-per-node 1) that runs "
                f"`torchrun --nproc-per-node GPUS ...`; for one process: --ntasks 1, or `unset SLURM_NTASKS`"
            )
        return

    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"RANK is set, but not {', '.join(missing)}: start the script with `torchrun --nproc-per-node GPUS ...`, "
            f"which sets them all; for one process: `unset RANK`"
        )
    local_rank = os.environ.get("LOCAL_RANK", "0")
    num_gpus = torch.cuda.device_count()
    if num_gpus and int(local_rank) >= num_gpus:
        raise ValueError(f"process {local_rank} of this node has no GPU: torchrun --nproc-per-node {num_gpus}")


def is_torchrun() -> bool:
    return "RANK" in os.environ


def rank() -> int:
    """The number of this process: 0, 1, ..."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """True in the one process that prints and writes files."""
    return rank() == 0


def barrier():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def total(x: torch.Tensor) -> torch.Tensor:
    """Replace x by its sum over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def shard(model: nn.Module, units: Iterable[nn.Module], device: str, bf16: bool):
    """
    Spread weights, gradients and optimizer state over all processes, in place. With several nodes each node holds a
    whole copy: weights then travel inside a node only, and gradients between nodes.

    units: the parts whose weights are put together at a time, blocks before what contains them.
    bf16: compute in bfloat16; weights and the sums of gradients stay in float32.
    """
    if not dist.is_initialized():
        # One GPU takes the same path, so that it too has float32 weights and computes in bfloat16.
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    world = world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = world // per_node
    if nodes > 1:
        mesh = init_device_mesh(device, (nodes, per_node), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device, (world,), mesh_dim_names=("shard",))

    dtype = torch.bfloat16 if bf16 else torch.float32
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


# -----------------------------------------------------------------------------
# The part of a weight that this process holds


def own_rows(weight: DTensor) -> slice:
    """Return which rows of a sharded weight this process holds; a row is all that has one index in dimension 0."""
    mesh = weight.device_mesh
    processes = mesh.size(mesh.ndim - 1)  # the last dimension of the mesh shards, one before it replicates
    process = mesh.get_local_rank(mesh.ndim - 1)

    num_rows = weight.shape[0]
    rows_each = math.ceil(num_rows / processes)  # the last processes may have fewer, or none
    start = min(process * rows_each, num_rows)
    return slice(start, min(start + rows_each, num_rows))


@torch.no_grad()
def fill(weight: torch.Tensor, values) -> bool:
    """
    Give a weight its values, converted to its dtype. If the weight is sharded, only this process's rows are read.
    Returns True if nothing was copied: then a weight that is mapped to its file needs no memory of its own.

    values: the whole weight: a tensor, or what safetensors' `get_slice` returns.
    """
    if isinstance(weight, DTensor):
        rows = own_rows(weight)
        if rows.start < rows.stop:
            weight.to_local().copy_(values[rows])
        return False

    whole = values[:]
    weight.data = whole.to(weight.device, weight.dtype)
    return weight.data_ptr() == whole.data_ptr()


def gather(weight: torch.Tensor) -> torch.Tensor:
    """Return the whole of a weight. All processes must call this, and all get it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


# -----------------------------------------------------------------------------
# The end


@contextmanager
def exit_cleanly() -> Iterator[None]:
    """Wrap a training script's main: one clear message for what the user can fix, and no process group left behind."""
    try:
        yield
        # The threads of gloo may still hold tensors of the last collective when Python is torn down, which aborts the
        # process. After a barrier they hold none.
        barrier()
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
