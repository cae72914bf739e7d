"""The subcommands that `training` adds to `bioseq`. Thin: everything heavy is imported inside."""

from __future__ import annotations


def pretrain(argv: list[str]) -> int:
    from training.pretrain_command import main

    return main(argv)


def finetune(argv: list[str]) -> int:
    from training.finetune_command import main

    return main(argv)
