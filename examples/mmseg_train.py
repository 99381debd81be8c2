"""Run a configuration of mmsegmentation on generated scenes, as its tools/train.py would.

python examples/mmseg_train.py examples/mmseg_pico_config.py --steps 40
"""

import argparse
from pathlib import Path

from mmengine import Config
from mmengine.runner import Runner
from scenes import write_folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, help="default: the configuration's")
    parser.add_argument("--data", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--output", default="runs/mmseg")
    options = parser.parse_args(arguments)

    write_folder(options.data, train=32, val=8, size=64)
    config = Config.fromfile(options.config)
    config.work_dir = options.output
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = str(options.data)
    if options.steps:
        config.train_cfg.max_iters = config.train_cfg.val_interval = options.steps
    Runner.from_cfg(config).train()


if __name__ == "__main__":
    main()
