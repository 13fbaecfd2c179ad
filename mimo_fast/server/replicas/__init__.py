"""The server as replicas of Ray Serve (`mimo-fast serve --ray`).

client -> proxy (a process a node) -> a replica (a process each) -> the application

cluster.py   starts and stops all, in the process of `mimo-fast serve`
proxy.py     in Ray's proxies: uvicorn's limits, a close code for sessions whose replica ended
replica.py   in a replica: the application, what replicas ask each other, draining
flow.py      between the two: nobody sends more than the other side reads
"""
