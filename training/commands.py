"""The subcommands that `training` adds to `bioseq`. Thin: everything heavy is imported inside."""

from __future__ import annotations


def pretrain(argv: list[str]) -> int:
    from training.pretrain.command import main

    return main(argv)


def campaign(argv: list[str]) -> int:
    from training.campaigns.command import main

    return main(argv)


def finetune(argv: list[str]) -> int:
    from training.finetune.command import main

    return main(argv)
