"""Ray: the only folder that may import it. Training on one machine needs nothing from here.

`pipeline` starts the ranks of full-graph training as actors, one per part and stage, and watches over them; `actor` is
such a rank. Ray places, starts and supervises; rows travel between the actors over `torch.distributed`, not through
Ray's object store. `replicas` says where replicas of sampled training run; `feeders` and `feeder_pool` start those who
sample and pack for them (`feeder`), `puller` and `lane` bring windows over, `directory` says which feeders there are;
`jobs` submits runs, `metrics` offers numbers to Prometheus. Every node needs the installed package, and the graph
store under the same path or at a URI. Ray 2.60 guards local clusters with a token in `~/.ray/auth_token`, which it
makes itself; a cluster of several nodes needs the same token on each.
"""
