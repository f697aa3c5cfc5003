"""A Ray cluster of two nodes on this machine, for test_ray.py: says its address, kills a node when told to.

`python ray_cluster.py` reads lines: "kill" ends a node without a word to the others; the end of stdin ends the cluster.
"""

import os
import sys

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
sys.stdout.write(f"{cluster.address}\n")
sys.stdout.flush()
for _ in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    sys.stdout.write("killed\n")
    sys.stdout.flush()
cluster.shutdown()
