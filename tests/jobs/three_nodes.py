"""A local Ray cluster of several nodes, in a process of its own: `python three_nodes.py NODES`.

Prints the GCS address when it is up; "kill" on standard input kills the last node that is left, without a word
to it; end of input ends the cluster.
"""

from __future__ import annotations

import os
import sys

from ray.cluster_utils import Cluster

PORT = {"dashboard_agent_listen_port": 0}  # any: the default is one fixed port for all Rays of a machine


def main(nodes: int) -> None:
    os.makedirs(os.path.join(os.environ["RAY_TMPDIR"], "ray"), exist_ok=True)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "include_dashboard": True, "dashboard_host": "127.0.0.1", **PORT},
    )
    workers = [cluster.add_node(num_cpus=3, **PORT) for _ in range(nodes - 1)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(workers.pop(), allow_graceful=False)
            print("killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
