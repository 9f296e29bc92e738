"""
How fast and how large? Each command prints a table and then one JSON line; docs/benchmarks.md holds what was measured.

    python -m bench infer --shape 100m --dtype float32 --device cpu          # one action, with and without drafts
    python -m bench infer --shape 7b --vs official --official openvla --official_python venv/bin/python
    python -m bench infer --checkpoint runs/toy/checkpoint --trajectories toy --dtype float32 --plot speed.png
    python -m bench drafts --checkpoint runs/toy/checkpoint --trajectories toy --dtype float32
    python -m bench agree --checkpoint runs/toy-int4 --against runs/toy/checkpoint --trajectories toy --dtype bfloat16
    python -m bench serve --checkpoint runs/toy/checkpoint --dtype float32 --seconds 60
    python -m bench load                          # random weights of the 7B shape in a temporary folder: load, act once
    python -m bench start --shape 1b --processes 4          # memory of each process that starts training, sharded
    python -m bench train --shape 100m --dtype float32                       # one training step
    python -m bench gpu --out DIR                 # all about one GPU in nine minutes; with --tiny a try-out on a CPU
    python -m bench enlarge --data_root_dir DIR --out BIG        # the Bridge sample with 256 x 256 images
    python -m bench data --data_root_dir DIR --data_mix bridge --image_aug True
    python -m bench index                         # read 2 GB of made-up episodes once, with one process and with two
"""

import sys
from pathlib import Path

from bench.common import Config
from bench.data_speed import bench_data, bench_enlarge
from bench.drafts import bench_agree, bench_drafts
from bench.gpu import bench_gpu
from bench.index import bench_index
from bench.infer import bench_infer
from bench.load import bench_load
from bench.server import bench_serve
from bench.start import bench_start
from bench.train_step import bench_train
from configurator import configure, fail

COMMANDS = {
    "infer": bench_infer,
    "drafts": bench_drafts,
    "agree": bench_agree,
    "load": bench_load,
    "start": bench_start,
    "train": bench_train,
    "serve": bench_serve,
    "gpu": bench_gpu,
    "data": bench_data,
    "enlarge": bench_enlarge,
    "index": bench_index,
}

# Options that take one of a few values; "" is the default of some of them
CHOICES = {
    "dtype": ("bfloat16", "float32", "float16"),
    "vs": ("", "official"),
    "trajectories": ("", "toy", "data"),
}


def check_options(cfg: Config):
    """End the program with a message if an option cannot be right."""
    for key, choices in CHOICES.items():
        value = getattr(cfg, key)
        if value not in choices:
            fail(f"--{key} {value}: must be one of {', '.join(filter(None, choices))}")
    if min(cfg.actions, cfg.inputs, cfg.batch_size, cfg.clients, cfg.processes, cfg.episodes) < 1:
        fail("--actions, --inputs, --batch_size, --clients, --processes and --episodes must be 1 or more")
    if cfg.vs and not (Path(cfg.official) / "prismatic" / "extern" / "hf").is_dir():
        fail(f"--official {cfg.official or '(missing)'}: give a checkout of github.com/openvla/openvla")


def main(argv: list[str]):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip() + "\n")
        configure(Config, ["--help"])  # prints the options and ends
    if not argv or argv[0] not in COMMANDS:
        fail(f"usage: python -m bench {{{'|'.join(COMMANDS)}}} [--option value ...]; --help lists the options")
    cfg = configure(Config, argv[1:])
    check_options(cfg)
    try:
        COMMANDS[argv[0]](cfg)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
