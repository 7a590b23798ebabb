"""Ray: the only folder that may import it. Training on one machine needs nothing from here.

`pipeline` starts the ranks of full-graph training as actors, one per part and stage, and watches over them; `actor` is
such a rank. Ray places, starts and supervises; rows travel between the actors over `torch.distributed`, not through
Ray's object store. Every node needs the installed package, and the run's files under the same paths.
Ray 2.60 guards local clusters with a token in `~/.ray/auth_token`, which it makes itself; a cluster of several nodes
needs the same token on each.
"""
