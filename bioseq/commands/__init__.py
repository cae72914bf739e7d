"""The subcommands of the core, one file each; `bioseq.cli` finds them by name."""
