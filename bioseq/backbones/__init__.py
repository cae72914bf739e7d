"""The networks: what a backbone is, and how a checkpoint of any family becomes one.

protocol, families    the contract, and one way to all      packed/, checkpoints/, padded/    who computes, and their layouts
storage, importing    bundle <-> backbone <-> HF folder     hub, unpickling    the hub -> a folder, pickles apart
pooling               states -> embeddings                  lora               adapters, routed by segment of a packed batch
"""
