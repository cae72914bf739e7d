"""Several processes: the process group (`team`), the model under DDP or FSDP2 (`parallel`), Ray Train (`ray`)."""
