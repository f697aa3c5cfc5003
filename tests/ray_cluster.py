"""Run a Ray cluster on this machine for test_ray.py. It has one node for workers, says its address, and takes commands.

`python ray_cluster.py` reads lines: "add" adds a node, "kill" ends the oldest node without telling the others. The end
of stdin ends the cluster.
"""

import os
import sys

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1)]
sys.stdout.write(f"{cluster.address}\n")
sys.stdout.flush()
for line in sys.stdin:
    if line == "add\n":
        nodes.append(cluster.add_node(num_cpus=1))
    else:
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
    sys.stdout.write("done\n")
    sys.stdout.flush()
cluster.shutdown()
