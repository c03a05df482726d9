"""Where packs train. `sweep.py` decides what trains together; an executor, where and when.

`local.py`, the default, has this process; `on_ray.py` a cluster's devices.
"""
