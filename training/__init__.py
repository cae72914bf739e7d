"""Making models: corpora and pretraining, label tables and fine-tuning, and the release of what ships.

Imports bioseq, never serving; jobs start it as `python -m bioseq pretrain|finetune --spec FILE`.
"""
